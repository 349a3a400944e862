"""IQ1_S, IQ1_M, TQ1_0, TQ2_0, Q1_0, Q2_0: bits as libggml's, the grid search finds what there is, exact levels stay."""

from __future__ import annotations

import numpy as np
import pytest

import ggml
from fewbits.codecs import codec
from fewbits.codecs.few_levels import STARTS
from fewbits.kernels.grids import grid
from fewbits.kernels.lanes import LANES, lane_rows
from fewbits.kernels.ternary import book, measure

GRIDS = ("IQ1_S", "IQ1_M")
FEW = ("TQ1_0", "TQ2_0", "Q1_0", "Q2_0")
BOUNDS = {"IQ1_S": 0.85, "IQ1_M": 0.86, "TQ1_0": 0.52, "TQ2_0": 0.52, "Q1_0": 0.995, "Q2_0": 0.36}
"""Weighted error over libggml's that normal and heavy-tailed weights stay below."""
LEVELS = {"TQ1_0": (-1, 0, 1), "TQ2_0": (-1, 0, 1), "Q1_0": (-1, 1), "Q2_0": (-1, 0, 1)}
"""Levels that can come back exactly: Q2_0 stores twice the level as well."""


def weights(kind: str, rows: int = 64, columns: int = 1024) -> np.ndarray:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(rows, columns)) if kind == "normal" else rng.standard_t(3, size=(rows, columns))
    return (x * 0.02).astype(np.float32)


def lognormal(columns: int) -> np.ndarray:
    return np.random.default_rng(2).lognormal(size=columns).astype(np.float32)


def weighted(x: np.ndarray, decoded: np.ndarray, importance: np.ndarray) -> float:
    return float((importance * (x.astype(np.float64) - decoded) ** 2).sum())


@pytest.mark.parametrize("name", GRIDS + FEW)
def test_any_bytes_decode_as_libggml_does(name: str) -> None:
    kind = codec(name)
    blocks = np.random.default_rng(0).integers(0, 256, (512, kind.block_bytes), dtype=np.uint8)
    top = {"IQ1_M": 55, "TQ1_0": 53, "TQ2_0": 65}.get(name, 1)
    blocks[:, top] &= 0xBF  # the scale's highest exponent bit: finite
    np.testing.assert_array_equal(kind.decode(blocks), ggml.to_float(name, blocks))


@pytest.mark.parametrize("name", GRIDS + FEW)
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_error_is_well_below_llama_cpps(name: str, kind: str) -> None:
    x = weights(kind)
    importance = lognormal(x.shape[1])
    ours = codec(name).decode(codec(name).encode(x, importance))
    theirs = ggml.to_float(name, ggml.quantize_chunk(name, x, importance))
    assert weighted(x, ours, importance) < BOUNDS[name] * weighted(x, theirs, importance)


def levels_of(code: int) -> np.ndarray:
    ones = np.array([((code >> i) & 1) - ((code >> (8 + i)) & 1) for i in range(8)])
    return ones + (-0.125 if code >> 16 else 0.125)


def test_every_half_pattern_can_be_completed() -> None:
    """The search relies on it: what no pattern of the grid has would cost nothing."""
    assert (np.bitwise_or.reduce(book("IQ1_S").allowed, axis=1) == 0xFFFF).all()


@pytest.mark.parametrize("span", [1, 4])
def test_search_finds_nearly_the_best_entries_there_are(span: int) -> None:
    rng = np.random.default_rng(0)
    groups = 4
    xt, wt, codes = lane_rows(8 * groups), lane_rows(8 * groups), lane_rows(groups).view(np.int32)
    xt[:] = rng.standard_t(4, size=xt.shape)
    wt[:] = rng.lognormal(size=wt.shape)
    scale = rng.uniform(0.8, 2, LANES).astype(np.float32)
    found, work = lane_rows(2), lane_rows(14 * groups + 7)
    measure(xt, wt, scale, span, book("IQ1_S"), codes, found[0], found[1], work)
    entries = grid("IQ1_S").astype(np.float64) - 1
    inside = {tuple(entry) for entry in entries}
    ours = best = exact = 0.0
    for lane in range(LANES):
        x, w, s = (v[:, lane].astype(np.float64).reshape(groups, 8) for v in (xt, wt, np.tile(scale, (8 * groups, 1))))
        q = np.array([levels_of(int(codes[g, lane])) for g in range(groups)])
        assert all(tuple(np.rint(row)) in inside for row in q)
        assert (w * q * q).sum() == pytest.approx(found[0, lane], rel=1e-4)
        assert (w * x * q).sum() == pytest.approx(found[1, lane], rel=1e-3, abs=1e-3)
        shifted = entries[:, None] + np.array((0.125, -0.125))[:, None]
        errors = [(w[g] * (x[g] - s[g] * shifted) ** 2).sum(2).min(0) for g in range(groups)]
        lane_best = sum(np.array(errors[g : g + span]).sum(0).min() for g in range(0, groups, span))
        lane_ours = (w * (x - s * q) ** 2).sum()
        assert lane_ours >= lane_best * (1 - 1e-5)
        ours, best, exact = ours + lane_ours, best + lane_best, exact + (lane_ours < lane_best * (1 + 1e-4))
    assert ours < 1.003 * best
    assert exact > 0.85 * LANES


@pytest.mark.parametrize("name", GRIDS)
def test_weights_on_the_grid_come_back(name: str) -> None:
    rng = np.random.default_rng(0)
    kind = codec(name)
    shift = np.repeat(rng.choice([-0.125, 0.125], (64, 8 if name == "IQ1_S" else 32)), 32 if name == "IQ1_S" else 8, 1)
    x = (grid("IQ1_S")[rng.integers(0, 2048, 64 * 32)].reshape(64, 256).astype(np.float32) - 1 + shift) * 15 / 1024
    np.testing.assert_allclose(kind.decode(kind.encode(x.astype(np.float32))), x, rtol=2e-3)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("size", [1e-40, 1e-24, 1e-12, 1e-7, 1e8, 1e20])
def test_entries_exist_whatever_the_size(name: str, size: float) -> None:
    x = (np.random.default_rng(0).normal(size=(16, 512)) * size).astype(np.float32)
    importance = np.where(np.arange(512) % 5, 1e-12, 1e6).astype(np.float32)
    kind = codec(name)
    data = kind.encode(x, importance)
    np.testing.assert_array_equal(kind.decode(data), ggml.to_float(name, data))
    assert np.abs(kind.decode(data)).max() <= 2.5 * np.abs(x).max() + 1e-6


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("share", [1.0, 0.6, 0.02])
def test_levels_come_back_exactly(name: str, share: float) -> None:
    rng = np.random.default_rng(1)
    kind = codec(name)
    scale = rng.lognormal(sigma=2, size=(64, 1)).astype(np.float16).astype(np.float32)
    levels = rng.choice(LEVELS[name], (64, 1024)).astype(np.float32)
    if 0 in LEVELS[name]:
        levels *= rng.random(levels.shape) < share
    for importance in (None, lognormal(1024)):
        np.testing.assert_array_equal(kind.decode(kind.encode(levels * scale, importance)), levels * scale)


def test_levels_of_either_sign_come_back_exactly() -> None:
    rng = np.random.default_rng(1)
    x = rng.choice([-1, 0, 1, 2], (64, 1024)) * np.repeat(rng.choice([-0.75, 0.75], (64, 16)), 64, 1)
    np.testing.assert_array_equal(codec("Q2_0").decode(codec("Q2_0").encode(x.astype(np.float32))), x)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_three_levels_lose_little_more_than_the_least(name: str) -> None:
    x, w = weights("heavy", rows=4).reshape(-1, 256).astype(np.float64), np.tile(lognormal(1024), 4).reshape(-1, 256)
    decoded = codec(name).decode(codec(name).encode(x.astype(np.float32).reshape(4, 1024), w.reshape(4, 1024)[0]))
    order = np.argsort(-np.abs(x), axis=1)
    sizes, parts = np.take_along_axis(np.abs(x), order, 1), np.take_along_axis(w, order, 1)
    gains = np.cumsum(parts * sizes, 1) ** 2 / np.cumsum(parts, 1)
    least = (w * x * x).sum() - gains.max(1).sum()
    assert weighted(x, decoded.reshape(x.shape), w) < 1.01 * least
    assert STARTS[0] < 1  # else blocks without a zero would be lost


def test_both_ternary_types_store_the_same() -> None:
    x = weights("heavy")
    a, b = (codec(name).decode(codec(name).encode(x, lognormal(1024))) for name in ("TQ1_0", "TQ2_0"))
    np.testing.assert_array_equal(a, b)


def test_one_bit_scale_is_the_weighted_mean() -> None:
    x, w = weights("normal", rows=1, columns=128), lognormal(128)
    decoded = codec("Q1_0").decode(codec("Q1_0").encode(x, w))
    np.testing.assert_array_equal(np.signbit(decoded), np.signbit(x))
    np.testing.assert_allclose(np.abs(decoded), (w * np.abs(x)).sum() / w.sum(), rtol=1e-3)
