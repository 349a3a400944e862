"""Q2_K, Q4_K, Q5_K: super-blocks of 256 whose blocks have an integer scale and an integer offset.

The value of a code is d * scale * code - dmin * offset, d and dmin half precision. Layouts: block_q2_K, block_q4_K,
block_q5_K of ggml-common.h.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.codecs.base import Floats
from fewbits.codecs.legacy_symmetric import _Symmetric
from fewbits.kernels.asymmetric import make_super_encoder
from fewbits.kernels.lanes import EXACT, get_f16, put_f16

U8 = npt.NDArray[np.uint8]
GRID = (-0.9, -0.7, -0.55, -0.4, -0.25, -0.1, 0.05, 0.2, 0.4, 0.6)
"""How many codes more than n the range of a block is taken for."""


@njit(**EXACT)
def _pack_q2_k(
    codes: U8, lane0: int, scales: Floats, offsets: Floats, d: np.float32, dmin: np.float32, out: U8
) -> None:
    """scales[16] (low nibble scale, high nibble offset), qs[64], d, dmin."""
    for j in range(16):
        out[j] = np.int32(scales[lane0 + j]) | (np.int32(offsets[lane0 + j]) << 4)
    for half in range(2):
        for k in range(32):
            i, lane = k & 15, lane0 + 8 * half + (k >> 4)
            out[16 + 32 * half + k] = (
                codes[i, lane] | (codes[i, lane + 2] << 2) | (codes[i, lane + 4] << 4) | (codes[i, lane + 6] << 6)
            )
    put_f16(out, 80, d)
    put_f16(out, 82, dmin)


@njit(**EXACT)
def _decode_q2_k(data: U8, out: Floats) -> None:
    for block in range(data.shape[0]):
        row = data[block]
        d, dmin = get_f16(row, 80), get_f16(row, 82)
        for j in range(16):
            scale, offset = d * np.float32(row[j] & 15), dmin * np.float32(row[j] >> 4)
            start, turn = 16 + 32 * (j >> 3) + 16 * (j & 1), 2 * ((j >> 1) & 3)
            for k in range(16):
                out[block, 16 * j + k] = scale * np.float32((np.int32(row[start + k]) >> turn) & 3) - offset


@njit(**EXACT)
def _pack_scales(lane0: int, scales: Floats, offsets: Floats, d: np.float32, dmin: np.float32, out: U8) -> None:
    """d, dmin, scales[12]: six bits each of 8 scales and 8 offsets; the last four of both are split 4 + 2 bits."""
    put_f16(out, 0, d)
    put_f16(out, 2, dmin)
    for j in range(4):
        scale, offset = np.int32(scales[lane0 + j]), np.int32(offsets[lane0 + j])
        later_scale, later_offset = np.int32(scales[lane0 + j + 4]), np.int32(offsets[lane0 + j + 4])
        out[4 + j] = scale | ((later_scale >> 4) << 6)
        out[8 + j] = offset | ((later_offset >> 4) << 6)
        out[12 + j] = (later_scale & 15) | ((later_offset & 15) << 4)


@njit(**EXACT)
def _scale(row: U8, j: int) -> np.float32:
    if j < 4:
        return np.float32(row[4 + j] & 63)
    return np.float32((np.int32(row[8 + j]) & 15) | ((np.int32(row[j]) >> 6) << 4))


@njit(**EXACT)
def _offset(row: U8, j: int) -> np.float32:
    if j < 4:
        return np.float32(row[8 + j] & 63)
    return np.float32((np.int32(row[8 + j]) >> 4) | ((np.int32(row[4 + j]) >> 6) << 4))


@njit(**EXACT)
def _pack_q4_k(
    codes: U8, lane0: int, scales: Floats, offsets: Floats, d: np.float32, dmin: np.float32, out: U8
) -> None:
    _pack_scales(lane0, scales, offsets, d, dmin, out)
    for j in range(4):
        for k in range(32):
            out[16 + 32 * j + k] = codes[k, lane0 + 2 * j] | (codes[k, lane0 + 2 * j + 1] << 4)


@njit(**EXACT)
def _pack_q5_k(
    codes: U8, lane0: int, scales: Floats, offsets: Floats, d: np.float32, dmin: np.float32, out: U8
) -> None:
    """As Q4_K with qh[32] before qs: bit j of byte k is the fifth bit of element k of block j."""
    _pack_scales(lane0, scales, offsets, d, dmin, out)
    for k in range(32):
        high = np.int32(0)
        for j in range(8):
            high |= np.int32(codes[k, lane0 + j] >> 4) << j
        out[16 + k] = np.uint8(high)
        for j in range(4):
            out[48 + 32 * j + k] = (codes[k, lane0 + 2 * j] & 15) | ((codes[k, lane0 + 2 * j + 1] & 15) << 4)


@njit(**EXACT)
def _decode_q4_k(data: U8, out: Floats) -> None:
    for block in range(data.shape[0]):
        row = data[block]
        d, dmin = get_f16(row, 0), get_f16(row, 2)
        for j in range(8):
            scale, offset = d * _scale(row, j), dmin * _offset(row, j)
            start, turn = 16 + 32 * (j >> 1), 4 * (j & 1)
            for k in range(32):
                out[block, 32 * j + k] = scale * np.float32((np.int32(row[start + k]) >> turn) & 15) - offset


@njit(**EXACT)
def _decode_q5_k(data: U8, out: Floats) -> None:
    for block in range(data.shape[0]):
        row = data[block]
        d, dmin = get_f16(row, 0), get_f16(row, 2)
        for j in range(8):
            scale, offset = d * _scale(row, j), dmin * _offset(row, j)
            start, turn = 48 + 32 * (j >> 1), 4 * (j & 1)
            for k in range(32):
                code = (np.int32(row[start + k]) >> turn) & 15 | (((np.int32(row[16 + k]) >> j) & 1) << 4)
                out[block, 32 * j + k] = scale * np.float32(code) - offset


class Q2_K(_Symmetric):
    """4 levels, a 4-bit scale and a 4-bit offset for each 16 weights."""

    name = "Q2_K"
    block = 256
    block_bytes = 84
    encoder = staticmethod(make_super_encoder(16, 3, 15, GRID, 2, 1, _pack_q2_k))
    decoder = staticmethod(_decode_q2_k)


class Q4_K(_Symmetric):
    """16 levels, a 6-bit scale and a 6-bit offset for each 32 weights."""

    name = "Q4_K"
    block = 256
    block_bytes = 144
    encoder = staticmethod(make_super_encoder(32, 15, 63, GRID, 2, 0, _pack_q4_k))
    decoder = staticmethod(_decode_q4_k)


class Q5_K(_Symmetric):
    """32 levels, a 6-bit scale and a 6-bit offset for each 32 weights."""

    name = "Q5_K"
    block = 256
    block_bytes = 176
    encoder = staticmethod(make_super_encoder(32, 31, 63, GRID, 2, 0, _pack_q5_k))
    decoder = staticmethod(_decode_q5_k)
