"""Q2_K, Q4_K, Q5_K: super-blocks of 256 whose blocks have an integer scale and an integer offset.

The value of a code is d * scale * code - dmin * offset, d and dmin half precision. Layouts: block_q2_K, block_q4_K,
block_q5_K of ggml-common.h.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.codecs.base import Blocked, Bytes, Floats
from fewbits.kernels.asymmetric import CANDIDATES, encode_super_blocks
from fewbits.kernels.lanes import EXACT, get_f16, put_f16, usable_importance

U8 = npt.NDArray[np.uint8]


@njit(**EXACT)
def _pack_q2_k(codes: U8, integers: U8, steps: Floats, out: U8) -> None:
    """scales[16] (low nibble scale, high nibble offset), qs[64], d, dmin."""
    for block in range(out.shape[0]):
        row = out[block]
        for j in range(16):
            row[j] = integers[block, 0, j] | (integers[block, 1, j] << 4)
        for half in range(2):
            for k in range(32):
                j, i = 8 * half + (k >> 4), k & 15
                low = codes[block, j, i] | (codes[block, j + 2, i] << 2)
                row[16 + 32 * half + k] = low | (codes[block, j + 4, i] << 4) | (codes[block, j + 6, i] << 6)
        put_f16(row, 80, steps[block, 0])
        put_f16(row, 82, steps[block, 1])


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
def _pack_scales(integers: U8, steps: Floats, row: U8) -> None:
    """d, dmin, scales[12]: six bits each of 8 scales and 8 offsets; the last four of both are split 4 + 2 bits."""
    put_f16(row, 0, steps[0])
    put_f16(row, 2, steps[1])
    for j in range(4):
        later_scale, later_offset = integers[0, j + 4], integers[1, j + 4]
        row[4 + j] = integers[0, j] | ((later_scale >> 4) << 6)
        row[8 + j] = integers[1, j] | ((later_offset >> 4) << 6)
        row[12 + j] = (later_scale & 15) | ((later_offset & 15) << 4)


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
def _pack_q4_k(codes: U8, integers: U8, steps: Floats, out: U8) -> None:
    """d, dmin, scales[12], qs[128]: nibbles of blocks 2 j (low) and 2 j + 1 (high)."""
    for block in range(out.shape[0]):
        _pack_scales(integers[block], steps[block], out[block])
        for j in range(4):
            for k in range(32):
                out[block, 16 + 32 * j + k] = codes[block, 2 * j, k] | (codes[block, 2 * j + 1, k] << 4)


@njit(**EXACT)
def _pack_q5_k(codes: U8, integers: U8, steps: Floats, out: U8) -> None:
    """As Q4_K with qh[32] before qs: bit j of byte k is the fifth bit of element k of block j."""
    for block in range(out.shape[0]):
        _pack_scales(integers[block], steps[block], out[block])
        out[block, 16:48] = 0
        for j in range(8):
            for k in range(32):
                out[block, 16 + k] |= (codes[block, j, k] >> 4) << j
        for j in range(4):
            for k in range(32):
                high = (codes[block, 2 * j + 1, k] & 15) << 4
                out[block, 48 + 32 * j + k] = (codes[block, 2 * j, k] & 15) | high


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


class _SuperBlocks(Blocked):
    """Encoding by search; subclasses name the kernels."""

    block = 256
    weighted = True
    elements: ClassVar[int]
    """Weights in a block of the super-block."""
    levels: ClassVar[int]
    most: ClassVar[int]
    """The largest scale and offset."""
    reach: ClassVar[int] = 1
    rounds: ClassVar[int] = 3
    pack: Any

    @classmethod
    def encode(cls, weights: Floats, importance: Floats | None = None) -> Bytes:
        rows, columns = weights.shape
        flat = np.ascontiguousarray(weights, np.float32).reshape(-1)
        count, blocks = flat.size // cls.block, cls.block // cls.elements
        codes = np.empty((count, blocks, cls.elements), np.uint8)
        integers, steps = np.empty((count, 2, blocks), np.uint8), np.empty((count, 2), np.float32)
        weight, n = usable_importance(importance, columns), cls.levels - 1
        encode_super_blocks(flat, weight, n, cls.most, CANDIDATES[n], cls.reach, cls.rounds, codes, integers, steps)
        out = np.empty((count, cls.block_bytes), np.uint8)
        cls.pack(codes, integers, steps, out)
        return out.reshape(rows, -1)


class Q2_K(_SuperBlocks):
    """4 levels, a 4-bit scale and a 4-bit offset for each 16 weights."""

    name = "Q2_K"
    code_bytes = slice(16, 80)
    block_bytes = 84
    step_bytes = (80, 82)
    elements, levels, most = 16, 4, 15
    pack = staticmethod(_pack_q2_k)
    decoder = staticmethod(_decode_q2_k)


class Q4_K(_SuperBlocks):
    """16 levels, a 6-bit scale and a 6-bit offset for each 32 weights."""

    name = "Q4_K"
    code_bytes = slice(16, 144)
    block_bytes = 144
    step_bytes = (0, 2)
    elements, levels, most = 32, 16, 63
    pack = staticmethod(_pack_q4_k)
    decoder = staticmethod(_decode_q4_k)


class Q5_K(_SuperBlocks):
    """32 levels, a 6-bit scale and a 6-bit offset for each 32 weights."""

    name = "Q5_K"
    code_bytes = slice(16, 176)
    block_bytes = 176
    step_bytes = (0, 2)
    elements, levels, most = 32, 32, 63
    pack = staticmethod(_pack_q5_k)
    decoder = staticmethod(_decode_q5_k)
