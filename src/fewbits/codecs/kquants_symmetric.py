"""Q3_K and Q6_K: super-blocks of 256 in 16 blocks of 16, block scales integer times one half-precision scale.

Layouts: block_q3_K and block_q6_K of ggml-common.h.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.codecs.base import Blocked, Bytes, Floats
from fewbits.kernels.lanes import EXACT, get_f16, put_f16, usable_importance
from fewbits.kernels.symmetric import CANDIDATES, STEPS, encode_super_blocks

U8 = npt.NDArray[np.uint8]


@njit(**EXACT)
def _pack_q3_k(codes: U8, integers: npt.NDArray[np.int8], steps: Floats, out: U8) -> None:
    """hmask[32] (element i: byte i % 32, bit i / 32), qs[64] (two low bits), scales[12] (6 bits each), d."""
    out[:, :108] = 0
    for block in range(out.shape[0]):
        row = out[block]
        for i in range(256):
            code = codes[block, i >> 4, i & 15]
            row[i & 31] |= (code >> 2) << (i >> 5)
            row[32 + 32 * (i >> 7) + (i & 31)] |= (code & 3) << (2 * ((i >> 5) & 3))
        for j in range(16):
            level = np.int32(integers[block, j]) + 32
            row[96 + (j & 7)] |= (level & 15) << (j // 8 * 4)
            row[104 + (j & 3)] |= (level >> 4) << (2 * (j >> 2))
        put_f16(row, 108, steps[block])


@njit(**EXACT)
def _decode_q3_k(data: U8, out: Floats) -> None:
    width = out.shape[1] // 16
    for block in range(data.shape[0]):
        row, values = data[block], out[block]
        d = get_f16(row, 108)
        for j in range(16):
            low = (np.int32(row[96 + (j & 7)]) >> (j // 8 * 4)) & 15
            high = (np.int32(row[104 + (j & 3)]) >> (2 * (j >> 2))) & 3
            scale = d * np.float32((low | (high << 4)) - 32)
            mask, codes = 16 * (j & 1), 32 + 32 * (j >> 3) + 16 * (j & 1)
            bit, shift = np.int32(j >> 1), np.int32(2 * ((j >> 1) & 3))
            for k in range(width):
                code = (np.int32(row[codes + k]) >> shift) & 3
                top = (np.int32(row[mask + k]) >> bit) & 1
                values[16 * j + k] = scale * np.float32((code | (top << 2)) - 4)


@njit(**EXACT)
def _pack_q6_k(codes: U8, integers: npt.NDArray[np.int8], steps: Floats, out: U8) -> None:
    """ql[128] (four low bits), qh[64] (two high bits), scales[16] (int8), d."""
    for block in range(out.shape[0]):
        row = out[block]
        for half in range(2):
            for k in range(32):
                j, i = 8 * half + (k >> 4), k & 15
                a, b = codes[block, j, i], codes[block, j + 2, i]
                c, d = codes[block, j + 4, i], codes[block, j + 6, i]
                row[64 * half + k] = (a & 15) | ((c & 15) << 4)
                row[64 * half + 32 + k] = (b & 15) | ((d & 15) << 4)
                row[128 + 32 * half + k] = (a >> 4) | ((b >> 4) << 2) | ((c >> 4) << 4) | ((d >> 4) << 6)
        for j in range(16):
            row[192 + j] = np.uint8(integers[block, j])
        put_f16(row, 208, steps[block])


@njit(**EXACT)
def _decode_q6_k(data: U8, out: Floats) -> None:
    width = out.shape[1] // 16
    for block in range(data.shape[0]):
        row, values = data[block], out[block]
        d = get_f16(row, 208)
        for j in range(16):
            scale = d * np.float32(np.int8(row[192 + j]))
            half, quarter, part = j >> 3, (j >> 1) & 3, 16 * (j & 1)
            low_at, high_at = 64 * half + 32 * (quarter & 1) + part, 128 + 32 * half + part
            low_shift, high_shift = np.int32(4 * (quarter >> 1)), np.int32(2 * quarter)
            for k in range(width):
                low = (np.int32(row[low_at + k]) >> low_shift) & 15
                high = (np.int32(row[high_at + k]) >> high_shift) & 3
                values[16 * j + k] = scale * np.float32((low | (high << 4)) - 32)


class _SuperBlocks(Blocked):
    """Encoding by search; subclasses name the kernels."""

    block = 256
    weighted = True
    half_levels: ClassVar[int]
    most: ClassVar[int]
    """Block scales run from -most to most - 1."""
    refinements: ClassVar[int]
    reaches: ClassVar[tuple[int, ...]]
    pack: Any

    @classmethod
    def encode(cls, weights: Floats, importance: Floats | None = None) -> Bytes:
        rows, columns = weights.shape
        flat = np.ascontiguousarray(weights, np.float32).reshape(-1)
        count, n = flat.size // cls.block, cls.half_levels
        codes, integers = np.empty((count, 16, 16), np.uint8), np.empty((count, 16), np.int8)
        steps = np.empty(count, np.float32)
        weight, reaches = usable_importance(importance, columns), np.array(cls.reaches)
        tables = (CANDIDATES[n], cls.refinements, STEPS[n])
        encode_super_blocks(flat, weight, n, cls.most, *tables, reaches, codes, integers, steps)
        out = np.empty((count, cls.block_bytes), np.uint8)
        cls.pack(codes, integers, steps, out)
        return out.reshape(rows, -1)


class Q3_K(_SuperBlocks):
    """8 levels, a 6-bit scale for each 16 weights."""

    name = "Q3_K"
    code_bytes = slice(0, 96)
    block_bytes = 110
    step_bytes = (108,)
    half_levels, most, refinements, reaches = 4, 32, 1, (2, 1)
    pack = staticmethod(_pack_q3_k)
    decoder = staticmethod(_decode_q3_k)


class Q6_K(_SuperBlocks):
    """64 levels, an 8-bit scale for each 16 weights."""

    name = "Q6_K"
    code_bytes = slice(0, 192)
    block_bytes = 210
    step_bytes = (208,)
    half_levels, most, refinements, reaches = 32, 128, 0, (12, 1)
    pack = staticmethod(_pack_q6_k)
    decoder = staticmethod(_decode_q6_k)
