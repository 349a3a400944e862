"""F16, BF16, Q8_0, Q4_0, Q5_0, Q3_K, Q6_K: bits as libggml's, and errors below its own where searches could break."""

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
from fewbits.codecs.floats import BF16, F16
from fewbits.codecs.kquants_symmetric import Q3_K, Q6_K
from fewbits.codecs.legacy_symmetric import Q4_0, Q5_0, Q8_0
from fewbits.kernels.lanes import HUGE, LANES, lane_rows, load_tile, round_f16, round_f16_lanes

SEARCHED = pytest.mark.parametrize("codec", [Q4_0, Q5_0, Q3_K, Q6_K], ids=lambda codec: codec.name)
BLOCKED = pytest.mark.parametrize("codec", [Q4_0, Q5_0, Q8_0, Q3_K, Q6_K], ids=lambda codec: codec.name)
HALVES = pytest.mark.parametrize("codec", [F16, BF16], ids=lambda codec: codec.name)
LARGEST_CODE = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 127, "Q3_K": 4 * 32, "Q6_K": 32 * 128}


def _normal(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.normal(size=shape)


def _outlier_columns(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.normal(size=shape) * np.where(np.arange(shape[1]) % 97 == 0, 30, 1)


def _one_sided(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    signs = np.repeat(rng.choice([-1, 1], (shape[0], shape[1] // 32)), 32, axis=1)
    return rng.normal(size=shape) * 0.2 + signs


KINDS = {
    "normal": _normal,
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "cauchy": lambda rng, shape: np.clip(rng.standard_cauchy(shape), -1e4, 1e4),
    "positive": lambda rng, shape: np.abs(rng.normal(size=shape)),
    "sparse": lambda rng, shape: rng.normal(size=shape) * (rng.random(shape) < 0.1),
    "ternary": lambda rng, shape: rng.choice([-1.0, 0.0, 1.0], size=shape),
    "constant blocks": lambda rng, shape: np.repeat(rng.normal(size=(shape[0], shape[1] // 32)), 32, axis=1),
    "on a grid": lambda rng, shape: np.round(rng.normal(size=shape) * 2) / 2,
    "outlier columns": _outlier_columns,
    "one-sided": _one_sided,
    "near half-precision's end": lambda rng, shape: rng.normal(size=shape) * 1e-5,
}


def _rows(kind: str, rows: int = 32, columns: int = 768) -> np.ndarray:
    return (0.02 * KINDS[kind](np.random.default_rng(0), (rows, columns))).astype(np.float32)


def _error(weights: np.ndarray, decoded: np.ndarray, importance: np.ndarray | float = 1.0) -> float:
    return float((importance * (weights.astype(np.float64) - decoded) ** 2).sum())


def _ours(codec: type[Codec], weights: np.ndarray, importance: np.ndarray | None = None) -> float:
    return _error(weights, codec.decode(codec.encode(weights, importance)), 1.0 if importance is None else importance)


def _ggmls(codec: type[Codec], weights: np.ndarray, importance: np.ndarray | None = None) -> float:
    """Of libggml's way with these importances; for None the better of its way without and its way with ones."""
    given_ = [importance] if importance is not None else [None, np.ones(weights.shape[1], np.float32)]
    paths = [ggml.to_float(codec.name, ggml.quantize_chunk(codec.name, weights, i)) for i in given_]
    return min(_error(weights, path, 1.0 if importance is None else importance) for path in paths)


@HALVES
def test_halves_are_ggmls_bit_for_bit(codec: type[Codec]) -> None:
    rng = np.random.default_rng(0)
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore"):
        around = [halves, halves[:-1] / 2 + halves[1:] / 2, np.nextafter(halves, 0), np.nextafter(halves, 9e9)]
    upper = np.arange(2**16, dtype=np.uint32) << 16
    bits = [np.concatenate(around).astype(np.float32).view(np.uint32), upper, upper | 0x8000, upper | 0x7FFF]
    bits.append(rng.integers(0, 2**32, 200_000, dtype=np.uint32))
    weights = np.concatenate(bits).view(np.float32)[None]
    np.testing.assert_array_equal(codec.encode(weights), ggml.quantize_chunk(codec.name, weights))


@HALVES
def test_every_half_is_read_as_by_ggml(codec: type[Codec]) -> None:
    data = np.arange(2**16, dtype=np.uint16)[None].view(np.uint8)
    np.testing.assert_array_equal(codec.decode(data), ggml.to_float(codec.name, data))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_rounding_lanes_to_halves_is_rounding_each(values: list[float]) -> None:
    lanes = np.array(values, np.float32)
    each = np.array([round_f16(v) for v in lanes], np.float32)
    np.testing.assert_array_equal(each, np.clip(lanes, -65504, 65504).astype(np.float16).astype(np.float32))
    round_f16_lanes(lanes, np.empty(lanes.size, np.int32))
    np.testing.assert_array_equal(lanes, each)


@pytest.mark.parametrize("kind", KINDS)
def test_q8_0_is_ggmls_byte_for_byte(kind: str) -> None:
    np.testing.assert_array_equal(Q8_0.encode(_rows(kind)), ggml.quantize_chunk("Q8_0", _rows(kind)))


@BLOCKED
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 4))
def test_decodes_any_bytes_as_gguf_and_libggml(codec: type[Codec], seed: int, rows: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, (rows, 3 * codec.block_bytes), np.uint8)
    ours = codec.decode(data)
    with np.errstate(invalid="ignore"):
        theirs = dequantize(data, GGMLQuantizationType[codec.name])
    for other in (theirs, ggml.to_float(codec.name, data)):
        finite = np.isfinite(other)  # random bytes hold halves that are infinite or no number
        np.testing.assert_array_equal(ours[finite], other[finite])
        assert not np.isfinite(ours[~finite]).any()


@SEARCHED
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [0.0, 1.0, 2.5])
def test_error_is_never_above_libggmls(codec: type[Codec], kind: str, spread: float) -> None:
    weights = _rows(kind)
    importance = np.random.default_rng(1).lognormal(0, spread, weights.shape[1]).astype(np.float32) if spread else None
    theirs = _ggmls(codec, weights, importance)
    # what both can store exactly leaves float32's own rounding of the sums
    assert _ours(codec, weights, importance) <= theirs * (1 + 1e-6)
    if kind == "normal":
        assert _ours(codec, weights, importance) < 0.985 * theirs


@SEARCHED
@pytest.mark.parametrize("model", ["smollm2-135m", "smollm2-576", "smollm2-768"])
def test_error_is_below_libggmls_on_real_rows(codec: type[Codec], model: str, test_models: Path) -> None:
    from fewbits.checkpoint.safetensors import SafetensorsCheckpoint

    checkpoint = SafetensorsCheckpoint(test_models / model)
    for part in ("self_attn.o_proj", "mlp.down_proj", "mlp.up_proj"):
        weights = checkpoint.read(f"model.layers.12.{part}.weight", slice(0, 16))
        if not codec.fits(weights.shape[1]):
            continue
        importance = np.random.default_rng(1).lognormal(0, 1, weights.shape[1]).astype(np.float32)
        assert _ours(codec, weights) < 0.99 * _ggmls(codec, weights)
        assert _ours(codec, weights, importance) < 0.975 * _ggmls(codec, weights, importance)


@BLOCKED
@pytest.mark.parametrize("value", [1e-45, 1e-38, 1e-20, 1e-8, 1e5, 1e10, 1e20, 3e38])
def test_numbers_out_of_range_stay_finite_and_saturate(codec: type[Codec], value: float) -> None:
    rng = np.random.default_rng(0)
    weights = (value * rng.uniform(-1, 1, (4, 512))).astype(np.float32)
    decoded = codec.decode(codec.encode(weights, rng.lognormal(0, 3, 512).astype(np.float32)))
    assert np.isfinite(decoded).all()
    reach = 65504.0 * LARGEST_CODE[codec.name]
    if value > 10 * reach:  # the largest number there is, with the right sign
        top = np.abs(weights).argmax()
        assert decoded.flat[top] * np.sign(weights.flat[top]) > 0.4 * reach
    else:
        assert _error(weights, decoded) <= 1.01 * _error(weights, np.zeros_like(weights)) + 1e-9


@SEARCHED
def test_columns_of_no_importance_are_given_up_for_the_others(codec: type[Codec]) -> None:
    weights = _rows("normal", 8, 512)
    importance = np.ones(512, np.float32)
    importance[::3] = 0
    importance[256:288] = 0
    assert _ours(codec, weights, importance) < _ggmls(codec, weights, importance + np.float32(1e-6))
    plain = codec.encode(weights)
    for nothing in (np.zeros(512, np.float32), np.full(512, 7, np.float32)):
        np.testing.assert_array_equal(codec.encode(weights, nothing), plain)


@SEARCHED
def test_what_is_on_the_grid_stays(codec: type[Codec]) -> None:
    weights = _rows("normal", 8, 512)
    once = codec.decode(codec.encode(weights))
    assert _ours(codec, once) < 0.05 * _error(weights, once)


@BLOCKED
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(2, 40), cut=st.integers(1, 39), blocks=st.integers(1, 5), seed=st.integers(0, 1000))
def test_bytes_of_a_row_do_not_depend_on_the_slab(
    codec: type[Codec], rows: int, cut: int, blocks: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    columns = blocks * codec.block
    weights = rng.standard_t(3, (rows, columns)).astype(np.float32)
    importance = rng.lognormal(0, 1, columns).astype(np.float32)
    cut = min(cut, rows - 1)
    parts = [codec.encode(weights[:cut], importance), codec.encode(weights[cut:], importance)]
    np.testing.assert_array_equal(codec.encode(weights, importance), np.concatenate(parts))


@pytest.mark.parametrize("per_row", [1, 3, 18, 64, 128, 200])
def test_tiles_hold_their_blocks_and_their_columns_importances(per_row: int) -> None:
    rng = np.random.default_rng(0)
    rows, elements = 400 // per_row + 1, 16
    weights = rng.normal(size=(rows, per_row * elements)).astype(np.float32)
    weights[0, 3] = 1e30
    importance = rng.random(per_row * elements).astype(np.float32)
    count = rows * per_row
    xt, wt = lane_rows(elements), lane_rows(elements)
    spread = np.broadcast_to(importance, weights.shape).reshape(count, elements)
    for first in range(0, count, LANES):
        load_tile(weights.reshape(-1), importance, first, count, xt, wt)
        used = min(LANES, count - first)
        blocks = np.clip(weights.reshape(count, elements)[first : first + used], -HUGE, HUGE)
        np.testing.assert_array_equal(xt[:, :used].T, blocks)
        np.testing.assert_array_equal(wt[:, :used].T, spread[first : first + used])
        np.testing.assert_array_equal(xt[:, used:LANES].T, np.broadcast_to(blocks[-1], (LANES - used, elements)))
