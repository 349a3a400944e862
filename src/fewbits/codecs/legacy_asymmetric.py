"""Q4_1, Q5_1: blocks of 32 with one half-precision scale and one half-precision offset.

Layouts: block_q4_1, block_q5_1 of ggml-common.h: scale, offset, (fifth bits, element i at bit i of a 32-bit word),
nibbles (low ones hold elements 0-15, high ones elements 16-31).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.codecs.base import Floats
from fewbits.codecs.legacy_symmetric import _Symmetric
from fewbits.kernels.asymmetric import make_encoder
from fewbits.kernels.lanes import EXACT, get_f16, put_f16

U8 = npt.NDArray[np.uint8]
GRID = (-0.9, -0.7, -0.55, -0.4, -0.25, -0.1, 0.05, 0.2, 0.4, 0.6)
"""How many codes more than n the range of a block is taken for."""


@njit(**EXACT)
def _pack_q4_1(codes: U8, lane: int, scale: np.float32, low: np.float32, out: U8) -> None:
    put_f16(out, 0, scale)
    put_f16(out, 2, low)
    for i in range(16):
        out[4 + i] = codes[i, lane] | (codes[i + 16, lane] << 4)


@njit(**EXACT)
def _pack_q5_1(codes: U8, lane: int, scale: np.float32, low: np.float32, out: U8) -> None:
    put_f16(out, 0, scale)
    put_f16(out, 2, low)
    for byte in range(4):
        high = np.int32(0)
        for bit in range(8):
            high |= np.int32(codes[8 * byte + bit, lane] >> 4) << bit
        out[4 + byte] = np.uint8(high)
    for i in range(16):
        out[8 + i] = (codes[i, lane] & 15) | ((codes[i + 16, lane] & 15) << 4)


@njit(**EXACT)
def _decode_q4_1(data: U8, out: Floats) -> None:
    for block in range(data.shape[0]):
        d, m = get_f16(data[block], 0), get_f16(data[block], 2)
        for i in range(16):
            byte = np.int32(data[block, 4 + i])
            out[block, i] = np.float32(byte & 15) * d + m
            out[block, i + 16] = np.float32(byte >> 4) * d + m


@njit(**EXACT)
def _decode_q5_1(data: U8, out: Floats) -> None:
    for block in range(data.shape[0]):
        d, m = get_f16(data[block], 0), get_f16(data[block], 2)
        for i in range(16):
            byte = np.int32(data[block, 8 + i])
            first = (np.int32(data[block, 4 + (i >> 3)]) >> (i & 7)) & 1
            second = (np.int32(data[block, 6 + (i >> 3)]) >> (i & 7)) & 1
            out[block, i] = np.float32((byte & 15) | (first << 4)) * d + m
            out[block, i + 16] = np.float32((byte >> 4) | (second << 4)) * d + m


class Q4_1(_Symmetric):
    """16 levels, a scale and an offset for 32 weights."""

    name = "Q4_1"
    block = 32
    block_bytes = 20
    encoder = staticmethod(make_encoder(32, 15, GRID, 2, _pack_q4_1))
    decoder = staticmethod(_decode_q4_1)


class Q5_1(_Symmetric):
    """32 levels, a scale and an offset for 32 weights."""

    name = "Q5_1"
    block = 32
    block_bytes = 24
    encoder = staticmethod(make_encoder(32, 31, GRID, 2, _pack_q5_1))
    decoder = staticmethod(_decode_q5_1)
