"""IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S: super-blocks of 256, magnitudes out of a codebook, 4-bit block scales.

Layouts: block_iq2_xxs, block_iq2_xs, block_iq2_s, block_iq3_xxs and block_iq3_s of ggml-common.h.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.codecs.base import Floats
from fewbits.codecs.fixed_codebooks import Found, GroupCodebook
from fewbits.kernels.codebook import EIGHTS, FREE, PAIRS, Book, book, encode_blocks
from fewbits.kernels.grids import LEVELS, grid
from fewbits.kernels.group_feedback import EVEN
from fewbits.kernels.group_feedback import FREE as ANY
from fewbits.kernels.lanes import EXACT, get_f16, put_f16, usable_importance

U8 = npt.NDArray[np.uint8]
I16 = npt.NDArray[np.int16]
PARTS = np.linspace(17, 36, 48, dtype=np.float32)
"""The odd numbers, whole or not, that are tried for the largest block scale; 31 is the largest there is."""
AROUND = np.float32(1.1) ** np.arange(-5, 7, dtype=np.float32)
"""Multiples of `middle` that are tried for the first scale of a block."""
_QUARTER, _HALF = np.float32(0.25), np.float32(0.5)


@njit(**EXACT)
def _put_u32(out: U8, at: int, value: np.uint32) -> None:
    for k in range(4):
        out[at + k] = np.uint8((value >> np.uint32(8 * k)) & np.uint32(255))


@njit(**EXACT)
def _get_u32(data: U8, at: int) -> np.uint32:
    low = np.uint32(data[at]) | (np.uint32(data[at + 1]) << np.uint32(8))
    return np.uint32(low | (np.uint32(data[at + 2]) << np.uint32(16)) | (np.uint32(data[at + 3]) << np.uint32(24)))


@njit(**EXACT)
def _even(sign: np.uint32) -> np.uint32:
    """Seven stored sign bits and the eighth that makes the number of ones even."""
    s = sign & np.uint32(127)
    p = s ^ (s >> np.uint32(4))
    p = p ^ (p >> np.uint32(2))
    p = (p ^ (p >> np.uint32(1))) & np.uint32(1)
    return np.uint32(s | (p << np.uint32(7)))


@njit(**EXACT)
def _put_values(entry: Floats, scale: np.float32, signs: np.uint32, values: Floats, at: int) -> None:
    for i in range(entry.size):
        v = scale * entry[i]
        values[at + i] = -v if (signs >> np.uint32(i)) & np.uint32(1) else v


@njit(**EXACT)
def _pack_iq2_xxs(entries: I16, minus: U8, scales: U8, steps: Floats, out: U8) -> None:
    """d, then for each 32 weights four 8-bit entries and a 32-bit word of four 7-bit signs and the scale."""
    for block in range(out.shape[0]):
        row = out[block]
        put_f16(row, 0, steps[block])
        for j in range(8):
            word = np.uint32(scales[block, j]) << np.uint32(28)
            for g in range(4):
                row[2 + 8 * j + g] = np.uint8(entries[block, j, g])
                word |= np.uint32(minus[block, j, g] & 127) << np.uint32(7 * g)
            _put_u32(row, 6 + 8 * j, word)


@njit(**EXACT)
def _decode_iq2_xxs(data: U8, grid: Floats, out: Floats) -> None:
    for block in range(data.shape[0]):
        row, values = data[block], out[block]
        d = get_f16(row, 0)
        for j in range(8):
            word = _get_u32(row, 6 + 8 * j)
            scale = d * (_HALF + np.float32(word >> np.uint32(28))) * _QUARTER
            for g in range(4):
                _put_values(grid[row[2 + 8 * j + g]], scale, _even(word >> np.uint32(7 * g)), values, 32 * j + 8 * g)


@njit(**EXACT)
def _pack_iq2_xs(entries: I16, minus: U8, scales: U8, steps: Floats, out: U8) -> None:
    """d, for each 8 weights a 9-bit entry and 7 signs, scales[8] (4 bits for each 16 weights)."""
    for block in range(out.shape[0]):
        row = out[block]
        put_f16(row, 0, steps[block])
        for j in range(16):
            for g in range(2):
                word = np.int32(entries[block, j, g]) | (np.int32(minus[block, j, g] & 127) << 9)
                row[2 + 4 * j + 2 * g] = np.uint8(word & 255)
                row[3 + 4 * j + 2 * g] = np.uint8(word >> 8)
        for j in range(8):
            row[66 + j] = scales[block, 2 * j] | (scales[block, 2 * j + 1] << 4)


@njit(**EXACT)
def _decode_iq2_xs(data: U8, grid: Floats, out: Floats) -> None:
    for block in range(data.shape[0]):
        row, values = data[block], out[block]
        d = get_f16(row, 0)
        for j in range(16):
            code = (np.int32(row[66 + (j >> 1)]) >> (4 * (j & 1))) & 15
            scale = d * (_HALF + np.float32(code)) * _QUARTER
            for g in range(2):
                low, high = np.uint32(row[2 + 4 * j + 2 * g]), np.uint32(row[3 + 4 * j + 2 * g])
                entry = low | ((high & np.uint32(1)) << np.uint32(8))
                _put_values(grid[entry], scale, _even(high >> np.uint32(1)), values, 16 * j + 8 * g)


@njit(**EXACT)
def _pack_iq2_s(entries: I16, minus: U8, scales: U8, steps: Floats, out: U8) -> None:
    """d, qs[32] (eight low bits of entries), signs[32], qh[8] (two high bits), scales[8] (4 bits for each 16)."""
    out[:, 66:74] = 0
    for block in range(out.shape[0]):
        row = out[block]
        put_f16(row, 0, steps[block])
        for k in range(32):
            entry = np.int32(entries[block, k >> 1, k & 1])
            row[2 + k] = np.uint8(entry & 255)
            row[34 + k] = minus[block, k >> 1, k & 1]
            row[66 + (k >> 2)] |= np.uint8((entry >> 8) << (2 * (k & 3)))
        for j in range(8):
            row[74 + j] = scales[block, 2 * j] | (scales[block, 2 * j + 1] << 4)


@njit(**EXACT)
def _decode_iq2_s(data: U8, grid: Floats, out: Floats) -> None:
    for block in range(data.shape[0]):
        row, values = data[block], out[block]
        d = get_f16(row, 0)
        for k in range(32):
            code = (np.int32(row[74 + (k >> 2)]) >> (4 * ((k >> 1) & 1))) & 15
            scale = d * (_HALF + np.float32(code)) * _QUARTER
            high = (np.uint32(row[66 + (k >> 2)]) >> np.uint32(2 * (k & 3))) & np.uint32(3)
            entry = np.uint32(row[2 + k]) | (high << np.uint32(8))
            _put_values(grid[entry], scale, np.uint32(row[34 + k]), values, 8 * k)


@njit(**EXACT)
def _pack_iq3_xxs(entries: I16, minus: U8, scales: U8, steps: Floats, out: U8) -> None:
    """d, qs[64] (an 8-bit entry for each 4 weights), for each 32 weights a word of four 7-bit signs and the scale."""
    for block in range(out.shape[0]):
        row = out[block]
        put_f16(row, 0, steps[block])
        for j in range(8):
            word = np.uint32(scales[block, j]) << np.uint32(28)
            for g in range(8):
                row[2 + 8 * j + g] = np.uint8(entries[block, j, g])
            for g in range(4):
                signs = np.uint32(minus[block, j, 2 * g]) | (np.uint32(minus[block, j, 2 * g + 1] & 7) << np.uint32(4))
                word |= signs << np.uint32(7 * g)
            _put_u32(row, 66 + 4 * j, word)


@njit(**EXACT)
def _decode_iq3_xxs(data: U8, grid: Floats, out: Floats) -> None:
    for block in range(data.shape[0]):
        row, values = data[block], out[block]
        d = get_f16(row, 0)
        for j in range(8):
            word = _get_u32(row, 66 + 4 * j)
            scale = d * (_HALF + np.float32(word >> np.uint32(28))) * _HALF
            for g in range(4):
                signs, at = _even(word >> np.uint32(7 * g)), 8 * j + 2 * g
                _put_values(grid[row[2 + at]], scale, signs, values, 4 * at)
                _put_values(grid[row[3 + at]], scale, signs >> np.uint32(4), values, 4 * at + 4)


@njit(**EXACT)
def _pack_iq3_s(entries: I16, minus: U8, scales: U8, steps: Floats, out: U8) -> None:
    """d, qs[64] (eight low bits of entries), qh[8] (the ninth), signs[32], scales[4] (4 bits for each 32 weights)."""
    out[:, 66:74] = 0
    for block in range(out.shape[0]):
        row = out[block]
        put_f16(row, 0, steps[block])
        for k in range(64):
            entry = np.int32(entries[block, k >> 3, k & 7])
            row[2 + k] = np.uint8(entry & 255)
            row[66 + (k >> 3)] |= np.uint8((entry >> 8) << (k & 7))
        for k in range(32):
            g = 2 * (k & 3)
            row[74 + k] = minus[block, k >> 2, g] | (minus[block, k >> 2, g + 1] << 4)
        for j in range(4):
            row[106 + j] = scales[block, 2 * j] | (scales[block, 2 * j + 1] << 4)


@njit(**EXACT)
def _decode_iq3_s(data: U8, grid: Floats, out: Floats) -> None:
    for block in range(data.shape[0]):
        row, values = data[block], out[block]
        d = get_f16(row, 0)
        for k in range(64):
            code = (np.int32(row[106 + (k >> 4)]) >> (4 * ((k >> 3) & 1))) & 15
            scale = d * np.float32(1 + 2 * code)
            high = (np.uint32(row[66 + (k >> 3)]) >> np.uint32(k & 7)) & np.uint32(1)
            entry = np.uint32(row[2 + k]) | (high << np.uint32(8))
            _put_values(grid[entry], scale, np.uint32(row[74 + (k >> 1)]) >> np.uint32(4 * (k & 1)), values, 4 * k)


@cache
def _book(name: str) -> Book:
    return book(name)


@cache
def _values(name: str) -> Floats:
    return np.array(LEVELS[name], np.float32)[grid(name)]


class _Codebook(GroupCodebook):
    """Encoding by search; subclasses name the kernels."""

    signs: ClassVar[int]
    middle: ClassVar[float] = 22.0
    """The deviation of most blocks is some such multiple of their scale."""
    starts: ClassVar[tuple[float, ...]]
    """Multiples of the first scale at which all entries are searched."""

    @classmethod
    def search(cls, weights: Floats, importance: Floats | None = None) -> Found:
        flat = np.ascontiguousarray(weights, np.float32).reshape(-1)
        found = cls.empty(flat.size // cls.block)
        settings = (np.float32(cls.unit), np.float32(cls.middle) * AROUND, np.array(cls.starts, np.float32), PARTS)
        weight = usable_importance(importance, weights.shape[1])
        encode_blocks(flat, weight, cls.signs, _book(cls.name), *settings, *found)
        return found

    @classmethod
    def tables(cls) -> tuple[Floats, ...]:
        return (_values(cls.name),)

    @classmethod
    def vocabulary(cls) -> tuple[Floats, int]:
        return _values(cls.name), ANY if cls.signs == FREE else EVEN

    @classmethod
    def with_codewords(cls, found: Found, words: I16, minus: U8) -> Found:
        return found._replace(entries=words, marks=minus)


class IQ2_XXS(_Codebook):
    """256 entries for 8 weights, a scale for each 32; signs of 8 multiply to plus."""

    name = "IQ2_XXS"
    block_bytes = 66
    step_bytes = (0,)
    blocks, groups, signs, unit = 8, 4, EIGHTS, 0.125
    starts = (0.87, 1.0, 1.15)
    pack, decoder = staticmethod(_pack_iq2_xxs), staticmethod(_decode_iq2_xxs)


class IQ2_XS(_Codebook):
    """512 entries for 8 weights, a scale for each 16; signs of 8 multiply to plus."""

    name = "IQ2_XS"
    block_bytes = 74
    step_bytes = (0,)
    blocks, groups, signs, unit = 16, 2, EIGHTS, 0.125
    starts = (0.8, 0.9, 1.0, 1.1, 1.25)
    pack, decoder = staticmethod(_pack_iq2_xs), staticmethod(_decode_iq2_xs)


class IQ2_S(_Codebook):
    """1024 entries for 8 weights, a scale for each 16."""

    name = "IQ2_S"
    block_bytes = 82
    step_bytes = (0,)
    blocks, groups, signs, unit = 16, 2, FREE, 0.125
    starts = (0.9, 1.1)
    pack, decoder = staticmethod(_pack_iq2_s), staticmethod(_decode_iq2_s)


class IQ3_XXS(_Codebook):
    """256 entries for 4 weights, a scale for each 32; signs of 8 multiply to plus."""

    name = "IQ3_XXS"
    block_bytes = 98
    step_bytes = (0,)
    blocks, groups, signs, unit = 8, 8, PAIRS, 0.25
    middle = 26.0
    starts = (0.75, 0.9, 1.06, 1.25)
    pack, decoder = staticmethod(_pack_iq3_xxs), staticmethod(_decode_iq3_xxs)


class IQ3_S(_Codebook):
    """512 entries for 4 weights, a scale for each 32."""

    name = "IQ3_S"
    block_bytes = 110
    step_bytes = (0,)
    blocks, groups, signs, unit = 8, 8, FREE, 1.0
    middle = 6.0
    starts = (0.87, 1.0, 1.15)
    pack, decoder = staticmethod(_pack_iq3_s), staticmethod(_decode_iq3_s)
