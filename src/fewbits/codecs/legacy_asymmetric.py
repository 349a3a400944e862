"""Q4_1, Q5_1: blocks of 32 with one half-precision scale and one half-precision offset.

Layouts: block_q4_1, block_q5_1 of ggml-common.h: scale, offset, (fifth bits, element i at bit i of a 32-bit word),
nibbles (low ones hold elements 0-15, high ones elements 16-31).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.codecs.base import Blocked, Bytes, Floats
from fewbits.kernels.asymmetric import CANDIDATES, encode_blocks
from fewbits.kernels.lanes import EXACT, get_f16, put_f16, usable_importance

U8 = npt.NDArray[np.uint8]


@njit(**EXACT)
def _pack_q4_1(codes: U8, scale: Floats, low: Floats, out: U8) -> None:
    for block in range(out.shape[0]):
        put_f16(out[block], 0, scale[block])
        put_f16(out[block], 2, low[block])
        for i in range(16):
            out[block, 4 + i] = codes[block, i] | (codes[block, i + 16] << 4)


@njit(**EXACT)
def _pack_q5_1(codes: U8, scale: Floats, low: Floats, out: U8) -> None:
    for block in range(out.shape[0]):
        put_f16(out[block], 0, scale[block])
        put_f16(out[block], 2, low[block])
        for byte in range(4):
            high = np.int32(0)
            for bit in range(8):
                high |= np.int32(codes[block, 8 * byte + bit] >> 4) << bit
            out[block, 4 + byte] = np.uint8(high)
        for i in range(16):
            out[block, 8 + i] = (codes[block, i] & 15) | ((codes[block, i + 16] & 15) << 4)


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


class _Asymmetric(Blocked):
    """Encoding by search; subclasses name the kernels."""

    block = 32
    weighted = True
    levels: ClassVar[int]
    pack: Any

    @classmethod
    def encode(cls, weights: Floats, importance: Floats | None = None) -> Bytes:
        rows, columns = weights.shape
        flat = np.ascontiguousarray(weights, np.float32).reshape(-1)
        count = flat.size // cls.block
        codes = np.empty((count, cls.block), np.uint8)
        scale, low = np.empty(count, np.float32), np.empty(count, np.float32)
        weight, n = usable_importance(importance, columns), cls.levels - 1
        encode_blocks(flat, weight, n, CANDIDATES[n], codes, scale, low)
        out = np.empty((count, cls.block_bytes), np.uint8)
        cls.pack(codes, scale, low, out)
        return out.reshape(rows, -1)


class Q4_1(_Asymmetric):
    """16 levels, a scale and an offset for 32 weights."""

    name = "Q4_1"
    code_bytes = slice(4, 20)
    block_bytes = 20
    step_bytes = (0, 2)
    levels = 16
    pack = staticmethod(_pack_q4_1)
    decoder = staticmethod(_decode_q4_1)


class Q5_1(_Asymmetric):
    """32 levels, a scale and an offset for 32 weights."""

    name = "Q5_1"
    code_bytes = slice(4, 24)
    block_bytes = 24
    step_bytes = (0, 2)
    levels = 32
    pack = staticmethod(_pack_q5_1)
    decoder = staticmethod(_decode_q5_1)
