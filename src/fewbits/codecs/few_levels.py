"""TQ1_0, TQ2_0, Q1_0 and Q2_0: two to four evenly spaced levels over one half-precision scale.

Layouts: block_tq1_0, block_tq2_0, block_q1_0 and block_q2_0 of ggml-common.h.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.codecs.base import Blocked, Bytes, Floats
from fewbits.kernels.lanes import EXACT, get_f16, put_f16, usable_importance
from fewbits.kernels.symmetric import encode_blocks
from fewbits.kernels.ternary import mean_magnitudes, ternary_scales

U8 = npt.NDArray[np.uint8]
STARTS = np.array((0.35, 0.5, 0.65, 0.85, 1.2, 1.8, 2.8), np.float32)
"""Multiples of a block's deviation that are tried as the threshold between levels: within 1 % of what 60 of them give.

Weights of -s, 0, s deviate by s at most: the smallest find them all.
"""
FOUR = np.array((-4.3, -3.2, -2.7, -2.1, 1.0, 2.3, 2.9), np.float32)
"""Where on levels from -2 to 1 the largest magnitude of a block is tried: the scale comes out negated.

Chosen greedily out of 63 (either sign, in steps of 0.1) for the least error on Gaussian, Student-t(3) and real blocks
with equal and with lognormal importances: within 0.3 % of what all of them give. 1 finds weights of -s, 0, s.
"""
_HALF, _ZERO = np.float32(0.5), np.float32(0)


@njit(**EXACT)
def _level(x: np.float32, limit: np.float32) -> np.int32:
    """0, 1, 2 for -1, 0, 1."""
    return np.int32(1) + np.int32(x > limit) - np.int32(x < -limit)


@njit(**EXACT)
def _five(values: Floats, limit: np.float32, bytes_out: U8) -> None:
    """Bytes of five levels each, elements i, i + n, ... in byte i of n: the fraction of 256 of a base-3 number."""
    n = bytes_out.size
    a, b, c, d, e = values[:n], values[n : 2 * n], values[2 * n : 3 * n], values[3 * n : 4 * n], values[4 * n :]
    for i in range(n):
        low = 9 * _level(c[i], limit) + 3 * _level(d[i], limit) + _level(e[i], limit)
        number = 81 * _level(a[i], limit) + 27 * _level(b[i], limit) + low
        bytes_out[i] = np.uint8((256 * number + 242) // 243)


@njit(**EXACT)
def _digit(byte: np.uint8, power: np.int32) -> np.int32:
    """The base-3 digit of a fraction of 256."""
    return np.int32(((np.int32(byte) * power) & np.int32(255)) * np.int32(3)) >> np.int32(8)


@njit(**EXACT)
def _pack_tq1_0(x: Floats, scale: Floats, out: U8) -> None:
    """qs[32 + 16] (five levels a byte, of 160 and of 80 weights), qh[4] (four levels a byte, of 16 weights), d."""
    for block in range(out.shape[0]):
        row, values, limit = out[block], x[block], _HALF * scale[block]
        _five(values[:160], limit, row[:32])
        _five(values[160:240], limit, row[32:48])
        for i in range(4):
            number = np.int32(0)
            for k in range(4):
                number = np.int32(3) * (number + _level(values[240 + 4 * k + i], limit))
            row[48 + i] = np.uint8((256 * number + 242) // 243)
        put_f16(row, 52, scale[block])


@njit(**EXACT)
def _decode_tq1_0(data: U8, out: Floats) -> None:
    for block in range(data.shape[0]):
        row, values = data[block], out[block]
        d = get_f16(row, 52)
        power = np.int32(1)
        for k in range(5):
            for i in range(32):
                values[32 * k + i] = np.float32(_digit(row[i], power) - 1) * d
            for i in range(16):
                values[160 + 16 * k + i] = np.float32(_digit(row[32 + i], power) - 1) * d
            if k < 4:
                for i in range(4):
                    values[240 + 4 * k + i] = np.float32(_digit(row[48 + i], power) - 1) * d
            power *= np.int32(3)


@njit(**EXACT)
def _pack_tq2_0(x: Floats, scale: Floats, out: U8) -> None:
    """qs[64] (2 bits; elements m, m + 32, m + 64, m + 96 of each 128 share byte m), d."""
    for block in range(out.shape[0]):
        row, limit = out[block], _HALF * scale[block]
        for half in range(2):
            values, codes = x[block, 128 * half : 128 * half + 128], row[32 * half : 32 * half + 32]
            for m in range(32):
                low = _level(values[m], limit) | (_level(values[m + 32], limit) << 2)
                high = _level(values[m + 64], limit) | (_level(values[m + 96], limit) << 2)
                codes[m] = np.uint8(low | (high << 4))
        put_f16(row, 64, scale[block])


@njit(**EXACT)
def _decode_tq2_0(data: U8, out: Floats) -> None:
    for block in range(data.shape[0]):
        row = data[block]
        d = get_f16(row, 64)
        for half in range(2):
            codes = row[32 * half : 32 * half + 32]
            for k in range(4):
                values, shift = out[block, 128 * half + 32 * k : 128 * half + 32 * k + 32], np.int32(2 * k)
                for m in range(32):
                    values[m] = np.float32(((np.int32(codes[m]) >> shift) & 3) - 1) * d


@njit(**EXACT)
def _pack_q1_0(x: Floats, scale: Floats, out: U8) -> None:
    """d, qs[16] (1 for plus)."""
    for block in range(out.shape[0]):
        row, values = out[block], x[block]
        put_f16(row, 0, scale[block])
        for i in range(16):
            byte = np.int32(0)
            for k in range(8):
                byte |= np.int32(values[8 * i + k] >= _ZERO) << k
            row[2 + i] = np.uint8(byte)


@njit(**EXACT)
def _decode_q1_0(data: U8, out: Floats) -> None:
    for block in range(data.shape[0]):
        row, values = data[block], out[block]
        d = get_f16(row, 0)
        for i in range(16):
            byte = np.int32(row[2 + i])
            for k in range(8):
                values[8 * i + k] = d if (byte >> k) & 1 else -d


@njit(**EXACT)
def _pack_q2_0(codes: U8, scale: Floats, out: U8) -> None:
    """d, qs[16] (2 bits, least significant first, 0 to 3 for -1 to 2), of codes 0 to 3 for -2 to 1 negated."""
    for block in range(out.shape[0]):
        row, code = out[block], codes[block]
        put_f16(row, 0, -scale[block])
        for i in range(16):
            low, high = code[4 * i] | (code[4 * i + 1] << 2), code[4 * i + 2] | (code[4 * i + 3] << 2)
            row[2 + i] = np.uint8(255 - (low | (high << 4)))


@njit(**EXACT)
def _decode_q2_0(data: U8, out: Floats) -> None:
    for block in range(data.shape[0]):
        row, values = data[block], out[block]
        d = get_f16(row, 0)
        for i in range(16):
            byte = np.int32(row[2 + i])
            for k in range(4):
                values[4 * i + k] = np.float32(((byte >> (2 * k)) & 3) - 1) * d


class _Levels(Blocked):
    """Scales by search, then levels; subclasses name the kernels."""

    weighted = True
    pack: Any

    @classmethod
    def encode(cls, weights: Floats, importance: Floats | None = None) -> Bytes:
        rows, columns = weights.shape
        flat, weight = np.ascontiguousarray(weights, np.float32).reshape(-1), usable_importance(importance, columns)
        scale = np.empty(flat.size // cls.block, np.float32)
        cls.search(flat, weight, scale)
        out = np.empty((scale.size, cls.block_bytes), np.uint8)
        cls.pack(flat.reshape(-1, cls.block), scale, out)
        return out.reshape(rows, -1)

    @classmethod
    def search(cls, flat: Floats, weight: Floats, scale: Floats) -> None:
        """The scale of each block, in half precision."""
        ternary_scales(flat, weight, STARTS, cls.rounds, cls.block, scale)

    rounds: ClassVar[int] = 2
    """See `ternary_scales`."""


class TQ1_0(_Levels):
    """Three levels, one scale for 256 weights, five weights in a byte."""

    name = "TQ1_0"
    block, block_bytes = 256, 54
    pack, decoder = staticmethod(_pack_tq1_0), staticmethod(_decode_tq1_0)


class TQ2_0(_Levels):
    """Three levels, one scale for 256 weights, four weights in a byte."""

    name = "TQ2_0"
    block, block_bytes = 256, 66
    pack, decoder = staticmethod(_pack_tq2_0), staticmethod(_decode_tq2_0)


class Q1_0(_Levels):
    """A sign for each weight, one scale for 128."""

    name = "Q1_0"
    block, block_bytes = 128, 18
    pack, decoder = staticmethod(_pack_q1_0), staticmethod(_decode_q1_0)

    @classmethod
    def search(cls, flat: Floats, weight: Floats, scale: Floats) -> None:
        mean_magnitudes(flat, weight, cls.block, scale)


class Q2_0(Blocked):
    """Four levels, -1 to 2, one scale for 64 weights, of either sign."""

    name = "Q2_0"
    block, block_bytes, weighted = 64, 18, True
    decoder = staticmethod(_decode_q2_0)

    @classmethod
    def encode(cls, weights: Floats, importance: Floats | None = None) -> Bytes:
        rows, columns = weights.shape
        flat, weight = np.ascontiguousarray(weights, np.float32).reshape(-1), usable_importance(importance, columns)
        count = flat.size // cls.block
        codes, scale = np.empty((count, cls.block), np.uint8), np.empty(count, np.float32)
        encode_blocks(flat, weight, 2, FOUR, 2, codes, scale)
        out = np.empty((count, cls.block_bytes), np.uint8)
        _pack_q2_0(codes, scale, out)
        return out.reshape(rows, -1)
