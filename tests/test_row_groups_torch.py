"""EXL2's groups of rows on a GPU, by torch's processor: what is chosen there is what is here, but for rounding."""

from __future__ import annotations

import numpy as np
import pytest

from fewbits.codecs.row_groups import GroupedRows, RowGroups
from fewbits.methods import Known, factorize, gptq_row_groups, gptq_row_groups_torch, method

ELSEWHERE = "cpu:0"
NAMES = ["2_G64", "3_G32", "4_G128", "5_G64", "6_G32", "8_G32", "8x.1_4x.3_2x.6_G32-64-48", "6x.2_5x.3_3x.5_G32"]


def layer(outputs: int, inputs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights with heavy tails and outputs of different size, and the Hessian of correlated inputs."""
    random = np.random.default_rng(seed)
    weights = random.standard_t(5, (outputs, inputs)) * random.uniform(0.01, 0.05, (outputs, 1))
    x = random.standard_normal((3 * inputs, inputs)) @ random.standard_normal((inputs, inputs))
    x *= np.exp(random.normal(0, 0.7, inputs))
    return weights.astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


def both(weights: np.ndarray, kind: RowGroups, hessian: np.ndarray | None, fed: bool) -> list[GroupedRows]:
    """Made here and elsewhere."""
    made = []
    for device in ("cpu", ELSEWHERE):
        importance = None if hessian is None else np.ascontiguousarray(hessian.diagonal())
        factor = factorize(hessian, device=device) if fed and hessian is not None else None
        found = method("gptq").make(weights, kind, Known(importance, factor, device=device))
        assert isinstance(found, GroupedRows)
        made.append(found)
    return made


def losses(made: list[GroupedRows], weights: np.ndarray, hessian: np.ndarray) -> list[float]:
    wrong = [(found.decode() - weights).astype(np.float64) for found in made]
    return [float(np.sum((each @ hessian) * each)) for each in wrong]


@pytest.mark.parametrize("known", ["nothing", "importance", "factor"])
@pytest.mark.parametrize("name", NAMES)
def test_the_choice(name: str, known: str) -> None:
    kind = RowGroups.parse(name)
    for seed, (outputs, inputs) in enumerate([(64, 96), (100, 192), (77, 160)]):
        weights, hessian = layer(outputs, inputs, seed)
        here, there = made = both(weights, kind, None if known == "nothing" else hessian, known == "factor")
        np.testing.assert_array_equal(there.order, here.order)
        assert there.type == here.type
        for part in ("codes", "scale_codes", "scale_max"):
            one, other = getattr(here, part), getattr(there, part)
            assert other.dtype == one.dtype and other.shape == one.shape
            assert np.mean(one == other) >= 0.99, part
        loss = losses(made, weights, hessian)
        assert loss[1] == pytest.approx(loss[0], rel=1e-3)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-7, 1e-4, 1.0, 3000.0, 1e12])
def test_weights_of_any_size(size: float) -> None:
    weights, hessian = layer(40, 64, 7)
    weights *= np.float32(size / np.abs(weights).max())
    weights[1] = 0
    for name in ("2_G32", "4_G64", "8_G32"):
        for fed in (False, True):
            here, there = both(weights, RowGroups.parse(name), hessian, fed)
            assert np.mean(there.codes == here.codes) >= 0.99
            assert np.isfinite(there.decode()).all() and not there.decode()[1].any()


def test_few_scales_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, hessian = layer(64, 96, 1)
    known = Known(factor=factorize(hessian, device=ELSEWHERE), device=ELSEWHERE)
    whole = gptq_row_groups.quantize(weights, RowGroups.uniform(3, 32), known)
    for work in (1, 5 * 32 * 64):
        monkeypatch.setattr(gptq_row_groups_torch, "WORK", work)
        parts = gptq_row_groups.quantize(weights, RowGroups.uniform(3, 32), known)
        for part in ("codes", "scale_codes", "scale_max"):
            np.testing.assert_array_equal(getattr(parts, part), getattr(whole, part))


def test_nothing_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("free_scales", "scan_units", "choose_codes", "feed_group"):
        monkeypatch.delattr(gptq_row_groups, name)
    weights, hessian = layer(32, 64, 2)
    # a factor that was made here is taken there
    for known in (Known(device=ELSEWHERE), Known(factor=factorize(hessian), device=ELSEWHERE)):
        assert gptq_row_groups.quantize(weights, RowGroups.uniform(4, 32), known).codes.shape == (64, 32)
