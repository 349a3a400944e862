"""Error feedback for types whose codes stand for groups: the choice is the best there is, files hold what was chosen,
each step loses less, and what does not fit is refused."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

import fewbits
from fewbits.calibration.run import calibrate
from fewbits.checkpoint import GGUFCheckpoint
from fewbits.codecs import codec
from fewbits.codecs.blocks import Blocks
from fewbits.codecs.fixed_codebooks import GroupCodebook, fixed_codebook
from fewbits.errors import FewbitsError
from fewbits.kernels.group_feedback import EVEN, FREE, UNSIGNED, codewords, round_groups
from fewbits.methods import GPTQ, Factor, Known, factorize
from fewbits.methods.gptq import feedback_span
from fewbits.methods.gptq_groups import _Job
from fewbits.quantize.hessians import Factors
from fewbits.quantize.learned import Learned
from tiny_models import save_tiny

NAMES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M")
COLUMNS = 512


def kind(name: str) -> type[GroupCodebook]:
    found = codec(name)
    assert issubclass(found, GroupCodebook)
    return found


def weights(rows: int = 24) -> np.ndarray:
    return (np.random.default_rng(6).normal(size=(rows, COLUMNS)) * 0.02).astype(np.float32)


def hessian(columns: int = COLUMNS, tokens: int = 1200) -> np.ndarray:
    """Of inputs of which a few directions hold most."""
    rng = np.random.default_rng(5)
    basis = rng.normal(size=(columns, columns)) * np.geomspace(4, 0.1, columns)[:, None]
    inputs = (rng.normal(size=(tokens, columns)) @ basis / columns**0.5).astype(np.float32)
    return inputs.T @ inputs / tokens


def loss(error: np.ndarray, of: np.ndarray) -> float:
    return float((error @ of * error).sum())


def job(name: str, x: np.ndarray) -> tuple[_Job, Factor]:
    factor = factorize(hessian(), span=feedback_span(kind(name)))
    assert factor.hessian is not None
    return _Job(
        kind(name), fixed_codebook(kind(name)), factor, factor.hessian, np.ascontiguousarray(x.T[factor.order])
    ), factor


def signed(values: np.ndarray, signs: int, odd: int) -> np.ndarray:
    """All candidates of a group: [candidates, weights]."""
    if signs == UNSIGNED:
        return values
    turns = np.array(list(product([1, -1], repeat=values.shape[1])))
    if signs == EVEN:
        turns = turns[(turns < 0).sum(1) % 2 == odd]
    return (values[:, None] * turns).reshape(-1, values.shape[1])


def best(target: np.ndarray, values: np.ndarray, signs: int, factor: np.ndarray, odd: int = 0) -> tuple[float, ...]:
    """The least cost of a group over all candidates, and the error that it leaves over the factor."""
    errors = (target - signed(values, signs, odd)) @ np.linalg.inv(factor)
    costs = np.square(errors).sum(1)
    return costs.min(), errors[costs.argmin()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("again", [False, True])
def test_the_codeword_chosen_is_the_best_of_all(name: str, again: bool) -> None:
    rng = np.random.default_rng(0)
    known, rows = fixed_codebook(kind(name)), 6
    values, signs = kind(name).vocabulary()
    span, size = known.span, known.size
    factor = np.triu(rng.normal(size=(span, span)) * 0.2)
    np.fill_diagonal(factor, rng.lognormal(sigma=0.3, size=span))
    scale = rng.lognormal(sigma=0.3, size=rows) / values.max()
    target = rng.standard_t(4, size=(rows, span))
    groups = span // size
    spread = np.repeat(scale[None], groups, axis=0).astype(np.float32)
    old = rng.normal(size=(rows, span)) if again else np.zeros((rows, span))
    # again, what comes in is the errors times the Hessian, the inverse of which has this factor
    came = (target - old) @ np.linalg.inv(factor.T @ factor) if again else target
    made, words = np.array(old.T, np.float32, order="C"), np.empty((groups, rows), np.int16)
    minus, errors = np.empty((groups, rows), np.uint8), np.empty((span, rows), np.float32)
    round_groups(
        *(np.array(came.T, np.float32, order="C"), made, again, spread, np.zeros_like(spread)),
        *(np.eye(span, dtype=np.float32), factor[None].astype(np.float32), known.book, words, minus, errors),
    )
    for row in range(rows):
        turns = 1 - 2.0 * (minus[:, row, None] >> np.arange(size) & 1)
        np.testing.assert_allclose(made[:, row], (scale[row] * values[words[:, row]] * turns).reshape(-1), atol=1e-4)
        found = np.square((target[row] - made[:, row]) @ np.linalg.inv(factor)).sum()
        wanted = []
        for odd in range(groups):  # two groups: the first's best for each parity, then the second's for what it leaves
            total, left = 0.0, target[row].copy()
            for part in range(groups):
                here = slice(part * size, (part + 1) * size)
                least, error = best(left[here], scale[row] * values, signs, factor[here, here], odd)
                total, left[here.stop :] = total + least, left[here.stop :] - error @ factor[here, here.stop :]
            wanted.append(total)
        assert found == pytest.approx(min(wanted), rel=1e-3)
        if signs == EVEN:
            assert (turns < 0).sum() % 2 == 0
        change = made[:, row] - old[row] if again else (target[row] - made[:, row]) @ np.linalg.inv(factor)
        np.testing.assert_allclose(errors[:, row], change, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_device_chooses_the_same(name: str) -> None:
    """The device is torch's processor by another name: what is computed is a GPU's, but for ties."""
    x, second = weights(6)[:, :256], hessian(256)
    x[2, :32] = 0
    made = []
    for device in ("cpu", "cpu:0"):
        factor = factorize(second, span=feedback_span(kind(name)), device=device)
        known = Known(importance=second.diagonal().copy(), hessian=second, factor=factor, device=device)
        made.append(GPTQ.make(x, Blocks(kind(name)), known).decode())
    here, there = made
    assert (here == there).mean() > 0.97
    assert loss(there - x, second) == pytest.approx(loss(here - x, second), rel=0.01)


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("signs", [UNSIGNED, FREE, EVEN])
def test_every_codeword_can_be_chosen(size: int, signs: int) -> None:
    rng = np.random.default_rng(1)
    values = np.unique(rng.integers(1, 4, (60, size)), axis=0).astype(np.float32)
    span = 8 if signs == EVEN else size
    groups, rows = span // size, len(values)
    # signs with an even number of minus in each group, which all rules allow
    turns = np.where(np.arange(size) % 4 < 2, -1, 1) if signs != UNSIGNED else np.ones(size)
    target = np.array(np.tile(values * turns, groups).T, np.float32, order="C")
    ones, words = np.ones((groups, rows), np.float32), np.empty((groups, rows), np.int16)
    minus, errors = np.empty((groups, rows), np.uint8), np.empty((span, rows), np.float32)
    eye = np.eye(span, dtype=np.float32)
    made = np.zeros_like(target)
    book = codewords(values, signs)
    round_groups(target.copy(), made, False, ones, 0 * ones, eye, eye[None], book, words, minus, errors)
    np.testing.assert_array_equal(made, target)
    np.testing.assert_array_equal(words, np.tile(np.arange(rows), (groups, 1)))
    assert not errors.any() and (minus == (turns < 0) @ (1 << np.arange(size))).all()


@pytest.mark.parametrize("name", NAMES)
def test_files_hold_what_was_chosen_and_each_step_loses_less(name: str) -> None:
    x = weights()
    work, factor = job(name, x)
    found = kind(name).search(x)
    made, values = work.choose(found)
    np.testing.assert_array_equal(made.scales, found.scales)
    np.testing.assert_array_equal(made.steps, found.steps)

    def left(known: np.ndarray) -> float:
        return loss((work.weights - known).T, work.hessian)

    losses = [left(values)]
    for step in (work.fit_steps, work.choose, work.choose):
        made, values = step(made, values)
        losses.append(left(values))
        decoded = kind(name).decode(kind(name).packed(made, len(x)))
        np.testing.assert_allclose(decoded.T[factor.order], values, atol=1e-5)
    assert losses[0] > losses[1] > losses[2] > losses[3]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_come_nearer(name: str) -> None:
    x, of = weights(), hessian()
    importance, factor = of.diagonal().copy(), factorize(of, span=feedback_span(kind(name)))

    def left(data: np.ndarray) -> float:
        return loss(kind(name).decode(data) - x, of)

    fed = left(GPTQ.quantize(x, kind(name), importance, factor))
    assert fed < 0.5 * left(kind(name).encode(x, importance))
    # rows do not depend on each other; only the rounding of the matrix products may differ
    parts = [GPTQ.quantize(part, kind(name), importance, factor) for part in (x[:5], x[5:])]
    assert left(np.concatenate(parts)) == pytest.approx(fed, rel=0.02)
    # a matrix with its Hessian: the factor is made anew for the type
    known = Known(importance, factorize(of), of)
    np.testing.assert_array_equal(
        GPTQ.make(x, Blocks(kind(name)), known).data, GPTQ.quantize(x, kind(name), importance, factor)
    )


def test_a_factor_keeps_columns_together_and_holds_the_hessian() -> None:
    of = hessian(64)
    factor = factorize(of, damping=0.03, span=8)
    together = factor.order.reshape(-1, 8)
    np.testing.assert_array_equal(together, together[:, :1] + np.arange(8))
    assert (np.diff(of.diagonal()[together].sum(1)) <= 0).all()
    damped = of[np.ix_(factor.order, factor.order)] + 0.03 * of.diagonal().mean() * np.eye(64)
    np.testing.assert_allclose(factor.hessian, damped, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(factor.upper.T @ factor.upper @ damped, np.eye(64), atol=2e-3)


def test_a_factor_for_other_groups_is_refused() -> None:
    of = hessian()
    for factor in (factorize(of), factorize(of, span=4)):
        with pytest.raises(FewbitsError, match="IQ2_S takes 8 columns at once"):
            GPTQ.quantize(weights(), kind("IQ2_S"), None, factor)
    with pytest.raises(FewbitsError, match="whole Hessian"):
        GPTQ.make(weights(), Blocks(kind("IQ2_S")), Known(factor=factorize(of)))


@pytest.mark.parametrize("name", NAMES)
def test_dead_columns_and_empty_blocks_do_no_harm(name: str) -> None:
    x = weights(6)
    x[0], x[1, :256], x[2, 256:288] = 0, 0, 0.03
    dead = np.zeros((COLUMNS, COLUMNS), np.float32)
    made = kind(name).decode(GPTQ.quantize(x, kind(name), None, factorize(dead, span=feedback_span(kind(name)))))
    searched = kind(name).decode(kind(name).encode(x))
    assert not made[0].any() and not made[1, :256].any()
    assert np.square(made - x).sum() < 1.02 * np.square(searched - x).sum()


def test_quantize_and_appraise_with_hessians(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 256}
    model = save_tiny(tmp_path / "model", "llama", wide)
    text = tmp_path / "text.txt"
    words = ["the", "and", "other", "in", "winter", "banner", "hand", "tin", "θ", "inner"]
    text.write_text(" ".join(np.random.default_rng(0).choice(words, 4000)), "utf-8")
    calibrate(model, text, tmp_path / "s.gguf", chunks=6, hessians=tmp_path / "h")
    made = {}
    for case, folder in (("plain", None), ("fed", tmp_path / "h")):
        out = tmp_path / f"{case}.gguf"
        report = fewbits.quantize(model, "IQ3_S", out, calibration=[tmp_path / "s.gguf"], hessians=folder)
        made[case] = GGUFCheckpoint(out)
    assert "error feedback" in " ".join(report.notes)
    fewbits.quantize(model, "F32", tmp_path / "f.gguf")
    plain, factors = GGUFCheckpoint(tmp_path / "f.gguf"), Factors(tmp_path / "h")
    name = "blk.1.ffn_down.weight"
    of = factors.block(name).read(name)
    losses = {case: loss(file.read(name) - plain.read(name), of) for case, file in made.items()}
    assert losses["fed"] < 0.7 * losses["plain"]
    # what mixtures are chosen by asks for the factor in the same way
    learned = Learned(factors=factors)
    orders = {to: learned.factor(name, 0, codec(to)) for to in ("IQ3_S", "IQ2_XS", "Q4_K", "Q8_0")}
    assert orders["Q8_0"] is None and orders["Q4_K"] is not None and orders["Q4_K"].hessian is None
    for to, span in (("IQ3_S", 4), ("IQ2_XS", 8)):
        factor = orders[to]
        assert factor is not None and (np.diff(factor.order.reshape(-1, span)) == 1).all()
