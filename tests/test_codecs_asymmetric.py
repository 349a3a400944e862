"""Q4_1, Q5_1, Q2_K, Q4_K, Q5_K against gguf-py and libggml, and where searches break: constants, zeros, outliers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

import ggml
from fewbits.codecs.base import Codec
from fewbits.codecs.kquants_asymmetric import Q2_K, Q4_K, Q5_K
from fewbits.codecs.legacy_asymmetric import Q4_1, Q5_1

ALL = pytest.mark.parametrize("codec", [Q4_1, Q5_1, Q2_K, Q4_K, Q5_K], ids=lambda codec: codec.name)
WORST = {"Q4_1": 0.12, "Q5_1": 0.06, "Q2_K": 0.5, "Q4_K": 0.12, "Q5_K": 0.06}
"""Largest error of a code in a block of small range, relative to the range."""

HARD = {
    "sparse": lambda rng, n: n * (rng.random(n.shape) < 0.05),
    "two values": lambda rng, n: np.sign(n) * 0.04,
    "three values": lambda rng, n: np.sign(n) * (np.abs(n) > 0.6) * 0.04,
    "few values": lambda rng, n: np.round(n * 4) / 50,
    "far below zero": lambda rng, n: n * 0.01 - 1,
    "shifted blocks": lambda rng, n: n * 0.02 + np.repeat(rng.normal(size=(16, 32)), 32, 1),
    "scaled blocks": lambda rng, n: n * np.repeat(np.exp(rng.normal(size=(16, 32))), 32, 1),
    "outlier columns": lambda rng, n: n * np.where(np.arange(1024) % 97, 0.02, 2.0),
    "very heavy-tailed": lambda rng, n: rng.standard_t(2, n.shape),
    "below half precision": lambda rng, n: n * 1e-8,
}
IMPORTANCES = {
    "ones": lambda rng: np.ones(1024),
    "wide": lambda rng: rng.lognormal(0, 3, 1024),
    "many zero": lambda rng: rng.lognormal(0, 1, 1024) * (rng.random(1024) < 0.7),
    "few hot": lambda rng: np.where(np.arange(1024) % 64, 1.0, 1e4),
    "small": lambda rng: rng.lognormal(0, 1, 1024) * 1e-12,
}


def _error(weights: np.ndarray, decoded: np.ndarray, importance: np.ndarray | float = 1.0) -> float:
    return float((importance * (weights.astype(np.float64) - decoded) ** 2).sum())


def _rows(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "heavy":
        return (0.03 * rng.standard_t(3, (rows, columns))).astype(np.float32)
    if kind == "offset":
        return (0.5 + 0.03 * rng.standard_normal((rows, columns))).astype(np.float32)
    return (0.03 * rng.standard_normal((rows, columns))).astype(np.float32)


def _decoded(codec: type[Codec], weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    decoded = codec.decode(codec.encode(weights.astype(np.float32), importance))
    assert np.isfinite(decoded).all()
    return decoded


@ALL
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 4))
def test_decodes_any_bytes_as_gguf_and_libggml(codec: type[Codec], seed: int, rows: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, (rows, 2 * codec.block_bytes), np.uint8)
    ours = codec.decode(data)
    with np.errstate(invalid="ignore"):
        theirs = dequantize(data, GGMLQuantizationType[codec.name])
    for other in (theirs, ggml.to_float(codec.name, data)):
        finite = np.isfinite(other)  # random bytes hold halves that are infinite or no number
        assert np.array_equal(ours[finite], other[finite])
        assert not np.isfinite(ours[~finite]).any()


@ALL
def test_row_size_is_ggmls(codec: type[Codec]) -> None:
    assert codec.nbytes((3, 768)) == 3 * ggml.row_size(codec.name, 768)
    assert codec.encode(_rows("gauss", 3, 768)).shape == (3, ggml.row_size(codec.name, 768))


@ALL
@pytest.mark.parametrize("kind", ["gauss", "heavy", "offset"])
def test_error_is_below_libggmls(codec: type[Codec], kind: str) -> None:
    weights = _rows(kind, 32, 768)
    importance = np.random.default_rng(1).lognormal(0, 1, 768).astype(np.float32)
    ours = _error(weights, _decoded(codec, weights, importance), importance)
    theirs = ggml.to_float(codec.name, ggml.quantize_chunk(codec.name, weights, importance))
    # where all weights are positive, the offset of K-quants, which are subtracted, is of no use
    most = 1.0 if kind == "offset" else 0.97
    assert ours < most * _error(weights, theirs, importance)

    ours = _error(weights, _decoded(codec, weights))
    for given_importance in (None, np.ones(768, np.float32)):
        theirs = ggml.to_float(codec.name, ggml.quantize_chunk(codec.name, weights, given_importance))
        assert ours < max(most, 0.985) * _error(weights, theirs)


@ALL
def test_error_is_below_libggmls_on_real_rows(codec: type[Codec], test_models: Path) -> None:
    from fewbits.checkpoint.safetensors import SafetensorsCheckpoint

    checkpoint = SafetensorsCheckpoint(test_models / "smollm2-768")
    for part in ("self_attn.q_proj", "mlp.down_proj"):
        weights = checkpoint.read(f"model.layers.12.{part}.weight", slice(0, 32))
        importance = np.random.default_rng(1).lognormal(0, 1, weights.shape[1]).astype(np.float32)
        theirs = ggml.to_float(codec.name, ggml.quantize_chunk(codec.name, weights, importance))
        ours = _decoded(codec, weights, importance)
        assert _error(weights, ours, importance) < 0.96 * _error(weights, theirs, importance)


@ALL
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(2, 40), cut=st.integers(1, 39), seed=st.integers(0, 1000))
def test_bytes_of_a_row_do_not_depend_on_the_slab(codec: type[Codec], rows: int, cut: int, seed: int) -> None:
    weights = _rows("heavy", rows, 512, seed)
    importance = np.random.default_rng(seed).lognormal(0, 1, 512).astype(np.float32)
    cut = min(cut, rows - 1)
    parts = [codec.encode(weights[:cut], importance), codec.encode(weights[cut:], importance)]
    assert np.array_equal(codec.encode(weights, importance), np.concatenate(parts))


@ALL
def test_what_is_on_the_grid_stays(codec: type[Codec]) -> None:
    """Weights that a decoder gave are encoded nearly without loss: far better than weights off the grid."""
    once = _decoded(codec, _rows("gauss", 8, 512))
    twice = _decoded(codec, once)
    assert _error(once, twice) < 0.05 * _error(_rows("gauss", 8, 512), once)


@ALL
@settings(max_examples=30, deadline=None)
@given(
    low=st.floats(-10, 10), extent=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 50.0]), seed=st.integers(0, 1000),
    spread=st.sampled_from([0.0, 1.0, 6.0]),
)  # fmt: skip
def test_error_within_a_block_is_bounded(
    codec: type[Codec], low: float, extent: float, seed: int, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    weights = (low + extent * rng.random((2, 256))).astype(np.float32)
    importance = rng.lognormal(0, spread, 256).astype(np.float32)
    reach = max(extent, np.abs(weights).max() if codec.block == 256 else 0.0)
    # beside the codes: the offset's rounding to half precision
    bound = WORST[codec.name] * reach + 2**-10 * np.abs(weights).max() + 1e-6
    mean_square = _error(weights, _decoded(codec, weights, importance), importance) / (2 * importance.sum())
    assert np.sqrt(mean_square) < bound


@ALL
def test_zeros_are_zeros(codec: type[Codec]) -> None:
    weights = np.zeros((3, 512), np.float32)
    assert not codec.encode(weights).any()
    assert not _decoded(codec, weights, np.zeros(512, np.float32)).any()


@ALL
@pytest.mark.parametrize("value", [0.3, -0.3, 1e-4, -1e-4, 30000.0, -30000.0])
def test_constants(codec: type[Codec], value: float) -> None:
    weights = np.full((2, 512), value, np.float32)
    assert (
        np.abs(_decoded(codec, weights) - value).max() <= 2**-9 * abs(value) + 63 * 2**-25
    )  # 63 steps of the smallest half


@ALL
@pytest.mark.parametrize("value", [1e-45, 1e-38, 1e-20, 1e-8, 1e5, 1e10, 1e20, 3e38])
def test_numbers_out_of_range_stay_finite(codec: type[Codec], value: float) -> None:
    rng = np.random.default_rng(0)
    weights = (value * rng.uniform(-1, 1, (4, 512))).astype(np.float32)
    decoded = _decoded(codec, weights, rng.lognormal(0, 3, 512).astype(np.float32))
    assert _error(weights, decoded) <= 1.01 * _error(weights, np.zeros_like(weights)) + 1e-9


@ALL
def test_zero_importance_columns(codec: type[Codec]) -> None:
    weights = _rows("gauss", 8, 512)
    importance = np.ones(512, np.float32)
    importance[::3] = 0
    importance[256:288] = 0
    decoded = _decoded(codec, weights, importance)
    assert np.abs(decoded).max() < 10 * np.abs(weights).max()
    theirs = ggml.to_float(codec.name, ggml.quantize_chunk(codec.name, weights, importance + np.float32(1e-6)))
    assert _error(weights, decoded, importance) < _error(weights, theirs, importance)
    assert np.array_equal(codec.encode(weights, np.zeros(512, np.float32)), codec.encode(weights))


@ALL
def test_one_outlier(codec: type[Codec]) -> None:
    weights = _rows("gauss", 8, 512)
    weights[:, 100] = 5.0
    theirs = ggml.to_float(codec.name, ggml.quantize_chunk(codec.name, weights, np.ones(512, np.float32)))
    assert _error(weights, _decoded(codec, weights)) < _error(weights, theirs)


@ALL
@pytest.mark.parametrize("sign", [1, -1])
def test_one_sign_only(codec: type[Codec], sign: int) -> None:
    weights = sign * np.abs(_rows("gauss", 8, 512)) + np.float32(sign * 0.01)
    theirs = ggml.to_float(codec.name, ggml.quantize_chunk(codec.name, weights, np.ones(512, np.float32)))
    assert _error(weights, _decoded(codec, weights)) < _error(weights, theirs)


@ALL
def test_channels_that_outweigh_the_rest(codec: type[Codec]) -> None:
    """Importances of real models reach a thousand times their median."""
    weights = _rows("gauss", 16, 512)
    importance = np.random.default_rng(2).lognormal(0, 1, 512).astype(np.float32)
    importance[[5, 77, 300]] *= 5000
    theirs = ggml.to_float(codec.name, ggml.quantize_chunk(codec.name, weights, importance))
    assert _error(weights, _decoded(codec, weights, importance), importance) < _error(weights, theirs, importance)


@ALL
@pytest.mark.parametrize("kind", HARD)
def test_error_is_not_above_libggmls_on_hard_weights(codec: type[Codec], kind: str) -> None:
    rng = np.random.default_rng(0)
    weights = HARD[kind](rng, rng.normal(size=(16, 1024))).astype(np.float32)
    for label, make in IMPORTANCES.items():
        importance = make(rng).astype(np.float32)
        theirs = ggml.to_float(codec.name, ggml.quantize_chunk(codec.name, weights, importance))
        # below this the luck of half-precision rounding decides who is nearer
        luck = 1e-5 * _error(weights, np.zeros_like(weights), importance)
        ours = _error(weights, _decoded(codec, weights, importance), importance)
        assert ours <= _error(weights, theirs, importance) + luck, label


@ALL
def test_outliers_of_little_importance_are_given_up(codec: type[Codec]) -> None:
    weights = _rows("gauss", 16, 512)
    matter = np.arange(512) % 16 != 0
    plain = _error(weights, _decoded(codec, weights))
    weights[:, ~matter] *= 100
    importance = np.where(matter, 1.0, 1e-5).astype(np.float32)
    assert _error(weights, _decoded(codec, weights, importance), matter) < 2 * plain
