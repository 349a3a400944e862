"""Q4_0, Q5_0, Q8_0: blocks of 32 with one half-precision scale and no offset.

Layouts: block_q4_0, block_q5_0, block_q8_0 of ggml-common.h. Low nibbles hold elements 0-15, high nibbles
elements 16-31; fifth bits lie in a 32-bit word, element i at bit i.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.codecs.base import Blocked, Bytes, Floats
from fewbits.kernels.lanes import EXACT, get_f16, put_f16, usable_importance
from fewbits.kernels.symmetric import CANDIDATES, encode_blocks

U8 = npt.NDArray[np.uint8]
REFINEMENTS = 1


@njit(**EXACT)
def _pack_q4_0(codes: U8, scale: Floats, out: U8) -> None:
    for block in range(out.shape[0]):
        put_f16(out[block], 0, scale[block])
        for i in range(16):
            out[block, 2 + i] = codes[block, i] | (codes[block, i + 16] << 4)


@njit(**EXACT)
def _pack_q5_0(codes: U8, scale: Floats, out: U8) -> None:
    for block in range(out.shape[0]):
        put_f16(out[block], 0, scale[block])
        out[block, 2:6] = 0
        for i in range(32):
            out[block, 2 + (i >> 3)] |= (codes[block, i] >> 4) << (i & 7)
        for i in range(16):
            out[block, 6 + i] = (codes[block, i] & 15) | ((codes[block, i + 16] & 15) << 4)


# Loops over a block's elements take their length from an array: LLVM unrolls loops of a known short length before it
# could make vector code of them, and decoding is then four times slower.


@njit(**EXACT)
def _decode_q4_0(data: U8, out: Floats) -> None:
    half = out.shape[1] // 2
    for block in range(data.shape[0]):
        d = get_f16(data[block], 0)
        for i in range(half):
            byte = np.int32(data[block, 2 + i])
            out[block, i] = np.float32((byte & 15) - 8) * d
            out[block, half + i] = np.float32((byte >> 4) - 8) * d


@njit(**EXACT)
def _decode_q5_0(data: U8, out: Floats) -> None:
    half = out.shape[1] // 2
    for block in range(data.shape[0]):
        d = get_f16(data[block], 0)
        fifth = np.int32(0)
        for k in range(4):
            fifth |= np.int32(data[block, 2 + k]) << np.int32(8 * k)
        for i in range(half):
            byte = np.int32(data[block, 6 + i])
            low = (byte & 15) | (((fifth >> np.int32(i)) & 1) << 4)
            high = (byte >> 4) | (((fifth >> np.int32(16 + i)) & 1) << 4)
            out[block, i] = np.float32(low - 16) * d
            out[block, half + i] = np.float32(high - 16) * d


@njit(**EXACT)
def _decode_q8_0(data: U8, out: Floats) -> None:
    signed = data.view(np.int8)
    for block in range(data.shape[0]):
        d = get_f16(data[block], 0)
        for i in range(out.shape[1]):
            out[block, i] = np.float32(signed[block, 2 + i]) * d


@njit(**EXACT)
def _encode_q8_0(x: Floats, out: U8) -> None:
    for block in range(out.shape[0]):
        top = np.float32(0)
        for i in range(32):
            top = max(top, abs(x[32 * block + i]))
        d = min(top / np.float32(127), np.float32(65504))
        inverse = np.float32(1) / d if d > np.float32(1e-30) else np.float32(0)
        put_f16(out[block], 0, d)
        for i in range(32):
            t = x[32 * block + i] * inverse
            # half away from zero, as ggml's roundf
            t = np.trunc(t + (np.float32(0.5) if t >= 0 else np.float32(-0.5)))
            out[block, 2 + i] = np.uint8(np.int32(min(max(t, np.float32(-127)), np.float32(127))) & 255)


class _Blocks(Blocked):
    """Encoding by search; subclasses name the kernels."""

    block = 32
    weighted = True
    half_levels: ClassVar[int]
    pack: Any

    @classmethod
    def encode(cls, weights: Floats, importance: Floats | None = None) -> Bytes:
        rows, columns = weights.shape
        flat = np.ascontiguousarray(weights, np.float32).reshape(-1)
        count = flat.size // cls.block
        codes, scale = np.empty((count, cls.block), np.uint8), np.empty(count, np.float32)
        n = cls.half_levels
        encode_blocks(flat, usable_importance(importance, columns), n, CANDIDATES[n], REFINEMENTS, codes, scale)
        out = np.empty((count, cls.block_bytes), np.uint8)
        cls.pack(codes, scale, out)
        return out.reshape(rows, -1)


class Q4_0(_Blocks):
    """16 levels, one scale for 32 weights."""

    name = "Q4_0"
    code_bytes = slice(2, 18)
    block_bytes = 18
    step_bytes = (0,)
    half_levels = 8
    pack = staticmethod(_pack_q4_0)
    decoder = staticmethod(_decode_q4_0)


class Q5_0(_Blocks):
    """32 levels, one scale for 32 weights."""

    name = "Q5_0"
    code_bytes = slice(2, 22)
    block_bytes = 22
    step_bytes = (0,)
    half_levels = 16
    pack = staticmethod(_pack_q5_0)
    decoder = staticmethod(_decode_q5_0)


class Q8_0(Blocked):
    """255 levels, one scale for 32 weights: the scale that just holds the largest, as ggml takes it."""

    name = "Q8_0"
    block = 32
    block_bytes = 34
    step_bytes = (0,)
    decoder = staticmethod(_decode_q8_0)

    @classmethod
    def encode(cls, weights: Floats, importance: Floats | None = None) -> Bytes:
        out = np.empty((weights.size // cls.block, cls.block_bytes), np.uint8)
        _encode_q8_0(np.ascontiguousarray(weights, np.float32).reshape(-1), out)
        return out.reshape(weights.shape[0], -1)
