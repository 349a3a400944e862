"""IQ4_NL, IQ4_XS, MXFP4, NVFP4: values bit-equal to the references', errors below libggml's, grids kept exactly."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

import ggml
from fewbits.codecs.base import Codec
from fewbits.codecs.nonuniform import E2M1, IQ4, IQ4_NL, IQ4_XS, MXFP4, NVFP4
from fewbits.kernels.lanes import round_f16

ALL = pytest.mark.parametrize("codec", [IQ4_NL, IQ4_XS, MXFP4, NVFP4], ids=lambda codec: codec.name)
HALVES = pytest.mark.parametrize("codec", [IQ4_NL, IQ4_XS], ids=lambda codec: codec.name)
FLOATS = pytest.mark.parametrize("codec", [MXFP4, NVFP4], ids=lambda codec: codec.name)
BOUNDS = {"IQ4_NL": (0.95, 0.98), "IQ4_XS": (0.93, 0.97), "MXFP4": (0.95, 0.96), "NVFP4": (0.8, 0.9)}
"""Weighted error over libggml's at most, with importances and with ones."""


def _weights(kind: str, rows: int = 64, columns: int = 1024) -> np.ndarray:
    rng = np.random.default_rng(0)
    made = rng.normal(size=(rows, columns)) if kind == "normal" else rng.standard_t(3, size=(rows, columns))
    return (0.02 * made).astype(np.float32)


def _error(weights: np.ndarray, decoded: np.ndarray, importance: np.ndarray | float = 1.0) -> float:
    return float((importance * (weights.astype(np.float64) - decoded) ** 2).sum())


def _same(codec: type[Codec], data: np.ndarray) -> None:
    got = codec.decode(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the largest exponents of MXFP4 overflow
        np.testing.assert_array_equal(got, dequantize(data, GGMLQuantizationType[codec.name]))
    np.testing.assert_array_equal(got.view(np.int32), ggml.to_float(codec.name, data).view(np.int32))


@ALL
def test_any_bytes_decode_bit_equal(codec: type[Codec]) -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, size=(700, codec.nbytes((512,))), dtype=np.uint8)
    if codec in (IQ4_NL, IQ4_XS):
        blocks = data.reshape(-1, codec.block_bytes)
        blocks[:, 1] &= 0xFB  # an exponent that is not all ones: finite
    _same(codec, data)


@FLOATS
def test_every_scale_byte_decodes_bit_equal(codec: type[Codec]) -> None:
    data = np.random.default_rng(1).integers(0, 256, size=(256, codec.block_bytes), dtype=np.uint8)
    data[:, : 4 if codec is NVFP4 else 1] = np.arange(256, dtype=np.uint8)[:, None]
    _same(codec, data)


@ALL
@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_error_is_well_below_libggmls(codec: type[Codec], kind: str) -> None:
    x = _weights(kind)
    importance = np.random.default_rng(2).lognormal(size=x.shape[1]).astype(np.float32)
    with_importance, with_ones = BOUNDS[codec.name]
    theirs = _error(x, ggml.to_float(codec.name, ggml.quantize_chunk(codec.name, x, importance)), importance)
    assert _error(x, codec.decode(codec.encode(x, importance)), importance) <= with_importance * theirs
    ones = np.ones(x.shape[1], np.float32)
    theirs = _error(x, ggml.to_float(codec.name, ggml.quantize_chunk(codec.name, x, ones)))
    assert _error(x, codec.decode(codec.encode(x))) <= with_ones * theirs


@ALL
def test_no_block_is_worse_than_all_zeros(codec: type[Codec]) -> None:
    rng = np.random.default_rng(3)
    x = (rng.standard_t(1, size=(64, 512)) * 10.0 ** rng.integers(-3, 3, size=(64, 1))).astype(np.float32)
    importance = rng.lognormal(sigma=3, size=512).astype(np.float32)
    decoded = codec.decode(codec.encode(x, importance))
    parts = [(importance * y**2).reshape(-1, 32).sum(1, dtype=np.float64) for y in (x - decoded, x)]
    assert (parts[0] <= parts[1] * 1.0001).all()


def _grid_half(codec: type[Codec]) -> np.ndarray:
    """Weights on the grid: half-precision scales; in every block the outermost level occurs."""
    rng = np.random.default_rng(4)
    levels = np.array(IQ4, np.float32)[rng.integers(0, 16, size=(128, codec.block // 32 * 4, 32))]
    levels[:, :, 7] = rng.choice([-127, 113], size=levels.shape[:2])
    levels[:, :, 9] = np.where(levels[:, :, 7] == 113, -104, levels[:, :, 9])
    steps = rng.normal(size=(128, 4, 1)) * 1e-3
    steps = np.array([round_f16(np.float32(s)) for s in steps.ravel()], np.float32).reshape(steps.shape)
    if codec is IQ4_XS:
        integers = rng.integers(-32, 32, size=(128, 4, 8))
        integers[:, :, 3] = -32
        scale = (steps * integers.astype(np.float32)).reshape(128, 32, 1)
    else:
        scale = steps
    return (scale * levels).reshape(128, -1)


@HALVES
def test_weights_on_a_half_precision_grid_come_back(codec: type[Codec]) -> None:
    x = _grid_half(codec)
    np.testing.assert_array_equal(codec.decode(codec.encode(x)), x)


@FLOATS
def test_weights_on_a_grid_of_floats_come_back(codec: type[Codec]) -> None:
    rng = np.random.default_rng(5)
    size = codec.block if codec is MXFP4 else 16
    levels = np.array(E2M1, np.float32)[rng.integers(0, 15, size=(4096, size))]
    levels[:, 3] = rng.choice([-6, -4, 4, 6], size=4096)
    if codec is MXFP4:
        scales = np.float32(2.0) ** rng.integers(-60, 25, size=(4096, 1)).astype(np.float32)
    else:
        values = np.array([m / 512 if not e else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)])
        scales = rng.choice(values[1:127], size=(4096, 1)).astype(np.float32)
    x = (levels * scales).astype(np.float32).reshape(64, -1)
    for importance in (None, rng.lognormal(size=x.shape[1]).astype(np.float32)):
        np.testing.assert_array_equal(codec.decode(codec.encode(x, importance)), x)


@ALL
def test_re_encoding_what_libggml_made_keeps_it(codec: type[Codec]) -> None:
    made = ggml.to_float(codec.name, ggml.quantize_chunk(codec.name, _weights("heavy")))
    left = _error(made, codec.decode(codec.encode(made)))
    assert left <= (1e-4 if codec is IQ4_XS else 0) * float((made.astype(np.float64) ** 2).sum())


@FLOATS
def test_zeros_are_stored_as_libggml_does(codec: type[Codec]) -> None:
    zeros = np.zeros((2, 256), np.float32)
    np.testing.assert_array_equal(codec.encode(zeros), ggml.quantize_chunk(codec.name, zeros))


def test_the_largest_nvfp4_value_is_reached() -> None:
    x = np.full((1, 64), -1e4, np.float32)
    np.testing.assert_array_equal(NVFP4.decode(NVFP4.encode(x)), np.full((1, 64), -2688, np.float32))
