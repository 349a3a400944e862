"""Error feedback within settled scales: codes in and out of blocks, the factor, what it gains, what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fewbits
from fewbits.calibration import read_statistics, write_statistics
from fewbits.calibration.collect import Inputs
from fewbits.calibration.hessians import open_block
from fewbits.calibration.run import calibrate
from fewbits.checkpoint import GGUFCheckpoint
from fewbits.codecs import CODECS, codec
from fewbits.codecs.fixed_scales import fixed_scales
from fewbits.errors import FewbitsError
from fewbits.methods import GPTQ, Search, factorize
from fewbits.methods.base import DAMPING
from fewbits.methods.gptq import DAMPINGS, choose_damping
from tiny_models import save_tiny

SINGLE = [name for name, kind in CODECS.items() if kind.code_bytes is not None]
EVEN = {name for name in SINGLE if not name.startswith("IQ4")}
COLUMNS = 256


def correlated(columns: int = COLUMNS, tokens: int = 600) -> np.ndarray:
    """float32 [tokens, columns]: inputs of which a few directions hold most."""
    rng = np.random.default_rng(5)
    basis = rng.normal(size=(columns, columns)) * np.geomspace(4, 0.1, columns)[:, None]
    return (rng.normal(size=(tokens, columns)) @ basis / columns**0.5).astype(np.float32)


def weights(rows: int = 24) -> np.ndarray:
    return (np.random.default_rng(6).normal(size=(rows, COLUMNS)) * 0.02).astype(np.float32)


def test_the_types_that_have_single_codes() -> None:
    assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1"} == EVEN
    assert set(SINGLE) - EVEN == {"IQ4_NL", "IQ4_XS"}
    assert fixed_scales(codec("Q8_0")) is None and fixed_scales(codec("F16")) is None


@pytest.mark.parametrize("name", SINGLE)
def test_codes_and_ranges_say_what_is_decoded(name: str) -> None:
    scales = fixed_scales(codec(name))
    assert scales is not None and scales.uniform == (name in EVEN)
    data = codec(name).encode(weights())
    codes = scales.codes(data)
    np.testing.assert_array_equal(scales.with_codes(data, codes), data)
    low, width = scales.ranges(data)
    np.testing.assert_allclose(low + width * scales.levels[codes], codec(name).decode(data), atol=1e-7)


@pytest.mark.parametrize("name", SINGLE)
def test_any_codes_are_stored_and_scales_stay(name: str) -> None:
    scales = fixed_scales(codec(name))
    assert scales is not None
    data = codec(name).encode(weights())
    codes = np.random.default_rng(7).integers(0, scales.levels.size, size=(24, COLUMNS)).astype(np.uint8)
    other = scales.with_codes(data, codes)
    np.testing.assert_array_equal(scales.codes(other), codes)
    for before, after in zip(scales.ranges(data), scales.ranges(other), strict=True):
        np.testing.assert_array_equal(before, after)


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    inputs = correlated()
    hessian = inputs.T @ inputs / len(inputs)
    factor = factorize(hessian, damping=0.01)
    assert (np.diff(hessian.diagonal()[factor.order]) <= 0).all()
    damped = hessian[np.ix_(factor.order, factor.order)] + 0.01 * hessian.diagonal().mean() * np.eye(COLUMNS)
    np.testing.assert_allclose(factor.upper.T @ factor.upper @ damped, np.eye(COLUMNS), atol=2e-3)
    assert not np.tril(factor.upper, -1).any()


@pytest.mark.parametrize("bad", [np.nan, -1.0])
def test_a_hessian_that_is_none_is_refused(bad: float) -> None:
    hessian = np.eye(8, dtype=np.float32)
    hessian[3, 3] = bad
    with pytest.raises(FewbitsError, match="finite and positive"):
        factorize(hessian)


@pytest.mark.parametrize("tokens", [80, 20000])
def test_damping_is_what_does_best_on_other_text(tokens: int) -> None:
    """Of few tokens a Hessian knows little: it takes more."""
    random = np.random.default_rng(5)
    every = (random.normal(size=(tokens + 4000, 64)) @ random.normal(size=(64, 64))).astype(np.float32)
    rows = weights()[:, :64]
    seen, held = every[:tokens].T @ every[:tokens] / tokens, every[tokens:].T @ every[tokens:] / 4000

    def loss(damping: float) -> float:
        made = codec("Q4_0").decode(GPTQ.quantize(rows, codec("Q4_0"), seen.diagonal(), factorize(seen, damping)))
        return float(np.einsum("oi,ij,oj", made - rows, held, made - rows, optimize=True))

    found = choose_damping(seen, held)
    assert (found > DAMPING) == (tokens == 80)
    assert loss(found) <= 1.1 * min(loss(damping) for damping in DAMPINGS)


def test_a_part_of_the_batches_is_counted_apart() -> None:
    x = torch.from_numpy(correlated(8, 90))
    inputs = Inputs.empty(("a",), 1, x, True, holds_out=True)
    for batch in x.split(10):
        inputs.add(batch)
    torch.testing.assert_close(inputs.hessians[0], x.T @ x)
    apart = torch.cat([x[30:40], x[70:80]])
    torch.testing.assert_close(inputs.held[0], apart.T @ apart)
    assert inputs.counts == [90] and inputs.held_counts == [20]


def test_dead_columns_do_no_harm() -> None:
    factor = factorize(np.zeros((COLUMNS, COLUMNS), np.float32))
    np.testing.assert_array_equal(
        GPTQ.quantize(weights(), codec("Q4_0"), None, factor), codec("Q4_0").encode(weights())
    )


@pytest.mark.parametrize("name", SINGLE)
def test_outputs_come_nearer(name: str) -> None:
    inputs, x = correlated(), weights()
    hessian = inputs.T @ inputs / len(inputs)
    importance = hessian.diagonal().copy()
    factor = factorize(hessian)

    def loss(data: np.ndarray) -> float:
        return float(((inputs @ (codec(name).decode(data) - x).T) ** 2).mean())

    searched = loss(Search.quantize(x, codec(name), importance))
    assert loss(GPTQ.quantize(x, codec(name), importance, factor)) < 0.8 * searched
    # rows do not depend on each other; only the rounding of the matrix products may differ
    parts = [GPTQ.quantize(part, codec(name), importance, factor) for part in (x[:5], x[5:])]
    assert abs(loss(np.concatenate(parts)) / loss(GPTQ.quantize(x, codec(name), importance, factor)) - 1) < 0.01


def test_types_without_feedback_are_searched_as_before() -> None:
    factor = factorize(np.eye(COLUMNS, dtype=np.float32))
    np.testing.assert_array_equal(
        GPTQ.quantize(weights(), codec("Q8_0"), None, factor), codec("Q8_0").encode(weights())
    )


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_quantize_with_hessians(tmp_path: Path, family: str) -> None:
    model = save_tiny(tmp_path / family, family)
    text = tmp_path / "text.txt"
    words = ["the", "and", "other", "in", "winter", "banner", "hand", "tin", "θ", "inner"]
    text.write_text(" ".join(np.random.default_rng(0).choice(words, 4000)), "utf-8")
    calibrate(model, text, tmp_path / "s.gguf", chunks=6, hessians=tmp_path / "h")
    made = {}
    for name, folder in (("plain", None), ("fed", tmp_path / "h")):
        out = tmp_path / f"{name}.gguf"
        report = fewbits.quantize(model, "Q4_0", out, calibration=[tmp_path / "s.gguf"], hessians=folder)
        made[name] = GGUFCheckpoint(out)
        assert out.stat().st_size == report.size
    assert "error feedback" in " ".join(report.notes)
    changed = [
        info.name
        for info in made["fed"].tensors.values()
        if (made["fed"].read(info.name) != made["plain"].read(info.name)).any()
    ]
    assert "blk.0.attn_q.weight" in changed
    assert any("ffn_down" in name for name in changed)
    assert not any(name.startswith(("token_embd", "output")) for name in changed)


@pytest.fixture
def calibrated(tmp_path: Path) -> Path:
    """A folder with a tiny mixture of experts `model`, its text, statistics `s.gguf` and Hessians `h`."""
    model = save_tiny(tmp_path / "model", "mixtral")
    text = tmp_path / "text.txt"
    words = ["the", "and", "other", "in", "winter", "banner", "hand", "tin", "θ", "inner"]
    text.write_text(" ".join(np.random.default_rng(0).choice(words, 4000)), "utf-8")
    calibrate(model, text, tmp_path / "s.gguf", chunks=6, hessians=tmp_path / "h")
    return tmp_path


def test_hessians_that_do_not_fit_are_refused_before_anything_is_done(calibrated: Path) -> None:
    model, out, s = calibrated / "model", calibrated / "x.gguf", calibrated / "s.gguf"
    for make in (fewbits.plan, lambda m, t, **o: fewbits.quantize(m, t, out, **o)):
        with pytest.raises(FewbitsError, match="no Hessian"):
            make(model, "Q4_0", calibration=s, hessians=calibrated / "none")
        with pytest.raises(FewbitsError, match="statistics"):
            make(model, "Q4_0", hessians=calibrated / "h")
        with pytest.raises(FewbitsError, match="does not fit"):
            llama = save_tiny(calibrated / "other", "llama", {"intermediate_size": 160})
            calibrate(llama, calibrated / "text.txt", calibrated / "o.gguf", chunks=1, overwrite=True)
            changed = {"num_local_experts": 2}
            calibrate(
                save_tiny(calibrated / "two", "mixtral", changed),
                *(calibrated / "text.txt", calibrated / "t.gguf"),
                chunks=1,
                hessians=calibrated / "h2",
                overwrite=True,
            )
            make(model, "Q4_0", calibration=s, hessians=calibrated / "h2")
    assert not out.exists()


def test_hessians_of_other_texts_than_the_statistics_are_refused(calibrated: Path) -> None:
    other = calibrated / "other.txt"
    other.write_text("winter banner tin " * 700, "utf-8")
    calibrate(calibrated / "model", other, calibrated / "o.gguf", chunks=1)
    with pytest.raises(FewbitsError, match="other texts"):
        fewbits.plan(calibrated / "model", "Q4_0", calibration=calibrated / "o.gguf", hessians=calibrated / "h")


def test_each_expert_is_fed_back_by_its_own_hessian_without_statistics_too(calibrated: Path) -> None:
    name = "blk.0.ffn_down_exps.weight"
    known = open_block(calibrated / "h", 0)
    statistics = read_statistics(calibrated / "s.gguf")
    del statistics.tensors[name]
    write_statistics(statistics, calibrated / "less.gguf")
    losses = {}
    for case, hessians in (("searched", None), ("fed", calibrated / "h")):
        out = calibrated / f"{case}.gguf"
        fewbits.quantize(calibrated / "model", "Q4_0", out, calibration=calibrated / "less.gguf", hessians=hessians)
        fewbits.quantize(calibrated / "model", "F32", calibrated / "f.gguf", overwrite=True)
        wrong = GGUFCheckpoint(out).read(name) - GGUFCheckpoint(calibrated / "f.gguf").read(name)
        losses[case] = [float(np.einsum("ij,jk,ik", d, known.read(name, e), d)) for e, d in enumerate(wrong)]
    assert all(fed < 0.7 * searched for fed, searched in zip(losses["fed"], losses["searched"], strict=True))


def test_few_tokens_are_not_fed_back(calibrated: Path) -> None:
    calibrate(
        *(calibrated / "model", calibrated / "text.txt", calibrated / "few.gguf"),
        context=16,
        chunks=2,
        hessians=calibrated / "few",
    )
    options = {"calibration": calibrated / "few.gguf"}
    notes = fewbits.quantize(
        calibrated / "model", "Q4_0", calibrated / "fed.gguf", hessians=calibrated / "few", **options
    ).notes
    assert any("fewer tokens than they have columns" in note for note in notes)
    fewbits.quantize(calibrated / "model", "Q4_0", calibrated / "plain.gguf", **options)
    assert (calibrated / "fed.gguf").read_bytes() == (calibrated / "plain.gguf").read_bytes()


def test_a_plan_that_asks_for_feedback_needs_hessians(calibrated: Path) -> None:
    options = {"calibration": calibrated / "s.gguf"}
    saved = calibrated / "plan.json"
    fewbits.plan(calibrated / "model", "Q4_0", hessians=calibrated / "h", **options).save(saved)
    with pytest.raises(FewbitsError, match="asks for error feedback"):
        fewbits.quantize(calibrated / "model", "Q4_0", calibrated / "x.gguf", edited=saved, **options)
    fewbits.quantize(
        calibrated / "model", "Q4_0", calibrated / "x.gguf", edited=saved, hessians=calibrated / "h", **options
    )
