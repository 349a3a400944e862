"""Codebook types: the search finds the best entries there are, signs obey the layout, errors stay below libggml's."""

from __future__ import annotations

import numpy as np
import pytest

import ggml
from fewbits.codecs import codec
from fewbits.errors import FewbitsError
from fewbits.kernels import grids
from fewbits.kernels.codebook import EIGHTS, FREE, PAIRS, WORK, book, measure
from fewbits.kernels.grids import LEVELS, grid
from fewbits.kernels.lanes import LANES, lane_rows

NAMES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
SIGNS = {"IQ2_XXS": EIGHTS, "IQ2_XS": EIGHTS, "IQ2_S": FREE, "IQ3_XXS": PAIRS, "IQ3_S": FREE}
BOUNDS = {"IQ2_XXS": 0.93, "IQ2_XS": 0.93, "IQ2_S": 0.95, "IQ3_XXS": 0.97, "IQ3_S": 0.93}
"""Weighted error over libggml's that normal and heavy-tailed weights stay below."""


def weights(kind: str, rows: int = 64, columns: int = 1024) -> np.ndarray:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(rows, columns)) if kind == "normal" else rng.standard_t(3, size=(rows, columns))
    return (x * 0.02).astype(np.float32)


def brute_force(name: str, x: np.ndarray, w: np.ndarray, s: float, odd: bool) -> float:
    """Least error of one unit of signs (8 weights, or a group where signs are free), all entries and turns tried."""
    values = np.array(LEVELS[name])[grid(name)].astype(np.float64) * s
    size = values.shape[1]
    parts = x.reshape(-1, size), w.reshape(-1, size)
    plain, turned = [], []
    for xs, ws in zip(*parts, strict=True):
        errors = ws * (xs - values) ** 2
        plain.append(errors.sum(1).min())
        turned.append((errors.sum(1) + (4 * ws * xs * values).min(1)).min())
    if not odd:
        return float(sum(plain))
    return float(min(sum(plain) - p + t for p, t in zip(plain, turned, strict=True)))


@pytest.mark.parametrize("name", NAMES)
def test_search_finds_the_best_entries_there_are(name: str) -> None:
    rng = np.random.default_rng(0)
    size = grid(name).shape[1]
    groups = 2 if size == 8 else 4
    per_unit = 2 if SIGNS[name] == PAIRS else 1
    xt, wt = lane_rows(groups * size), lane_rows(groups * size)
    odd, patterns, turned = lane_rows(groups), lane_rows(groups), lane_rows(groups)
    xt[:], wt[:], turned[:] = 1, 1, 0
    xt[:, :LANES] = np.abs(rng.standard_t(4, size=(groups * size, LANES)))
    wt[:, :LANES] = rng.lognormal(size=(groups * size, LANES))
    odd[:] = np.repeat(rng.integers(0, 2, (groups // per_unit, odd.shape[1])), per_unit, axis=0)
    if SIGNS[name] == EIGHTS:
        turned[:] = odd
    scale = (rng.uniform(0.5, 3, LANES) / max(LEVELS[name])).astype(np.float32)
    found = lane_rows(2)
    measure(xt, wt, odd, SIGNS[name], scale, book(name), patterns, turned, found, np.empty(WORK, np.float32))
    for lane in range(LANES):
        x, w, s = xt[:, lane].astype(np.float64), wt[:, lane].astype(np.float64), float(scale[lane])
        unit = per_unit * size
        need = odd[::per_unit, lane] * (SIGNS[name] != FREE)
        best = sum(
            brute_force(name, x[k * unit : (k + 1) * unit], w[k * unit : (k + 1) * unit], s, bool(need[k]))
            for k in range(groups // per_unit)
        )
        ours = (w * x * x).sum() + s * (s * found[0, lane] - 2 * found[1, lane])
        assert ours == pytest.approx(best, rel=2e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_error_is_well_below_llama_cpps(name: str, kind: str) -> None:
    x = weights(kind)
    ones = np.ones(x.shape[1], np.float32)
    for importance in (np.random.default_rng(2).lognormal(size=x.shape[1]).astype(np.float32), ones):
        ours = codec(name).decode(codec(name).encode(x, importance))
        theirs = ggml.to_float(name, ggml.quantize_chunk(name, x, importance))
        assert (importance * (x - ours) ** 2).sum() < BOUNDS[name] * (importance * (x - theirs) ** 2).sum()


@pytest.mark.parametrize("name", NAMES)
def test_only_one_sign_of_eight_is_wrong_and_only_where_it_must_be(name: str) -> None:
    x = weights("normal")
    decoded = codec(name).decode(codec(name).encode(x))
    wrong = (np.signbit(decoded) != np.signbit(x)).reshape(-1, 8).sum(1)
    odd = np.signbit(x).reshape(-1, 8).sum(1) % 2
    np.testing.assert_array_equal(wrong, 0 if SIGNS[name] == FREE else odd)


@pytest.mark.parametrize("name", NAMES)
def test_weights_on_the_grid_come_back(name: str) -> None:
    rng = np.random.default_rng(0)
    values = np.array(LEVELS[name], np.float32)[grid(name)]
    x = values[rng.integers(0, len(values), 64 * 256 // values.shape[1])].reshape(64, 256) / 1024
    error = codec(name).decode(codec(name).encode(x)) - x
    assert np.sqrt((error**2).mean() / (x**2).mean()) < 0.1


def test_another_grid_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(grids._DIGESTS, "IQ3_S", "0" * 64)
    grids.grid.cache_clear()
    with pytest.raises(FewbitsError, match="another codebook for IQ3_S"):
        grids.grid("IQ3_S")
    monkeypatch.undo()
    grids.grid.cache_clear()
