"""IQ1_S and IQ1_M: super-blocks of 256, groups of 8 levels -1, 0, 1 out of a codebook, moved by an eighth up or down.

Layouts: block_iq1_s and block_iq1_m of ggml-common.h.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.codecs.base import Floats
from fewbits.codecs.fixed_codebooks import Found, GroupCodebook
from fewbits.kernels.grids import grid
from fewbits.kernels.group_feedback import UNSIGNED
from fewbits.kernels.lanes import EXACT, from_f16, get_f16, put_f16, to_f16, usable_importance
from fewbits.kernels.ternary import Book, book, encode_grid_blocks

U8 = npt.NDArray[np.uint8]
I16 = npt.NDArray[np.int16]
PARTS = np.linspace(10, 17, 32, dtype=np.float32)
"""The odd numbers, whole or not, that are tried for the largest block scale; 15 is the largest there is."""
GRID = "IQ1_S"
SHIFT = np.float32(0.125)


@njit(**EXACT)
def _pack_iq1_s(entries: I16, shifts: U8, scales: U8, steps: Floats, out: U8) -> None:
    """d, qs[32] (eight low bits of entries), for each 32 weights a word: 4 x 3 high bits, scale, shift."""
    for block in range(out.shape[0]):
        row = out[block]
        put_f16(row, 0, steps[block])
        for j in range(8):
            word = (np.int32(scales[block, j]) << 12) | (np.int32(shifts[block, j, 0]) << 15)
            for g in range(4):
                entry = np.int32(entries[block, j, g])
                row[2 + 4 * j + g] = np.uint8(entry & 255)
                word |= (entry >> 8) << (3 * g)
            row[34 + 2 * j] = np.uint8(word & 255)
            row[35 + 2 * j] = np.uint8(word >> 8)


@njit(**EXACT)
def _decode_iq1_s(data: U8, grid: Floats, out: Floats) -> None:
    for block in range(data.shape[0]):
        row, values = data[block], out[block]
        d = get_f16(row, 0)
        for j in range(8):
            word = np.int32(row[34 + 2 * j]) | (np.int32(row[35 + 2 * j]) << 8)
            scale = d * np.float32(2 * ((word >> 12) & 7) + 1)
            shift = -SHIFT if word >> 15 else SHIFT
            for g in range(4):
                levels = grid[np.int32(row[2 + 4 * j + g]) | (((word >> (3 * g)) & 7) << 8)]
                for i in range(8):
                    values[32 * j + 8 * g + i] = scale * (levels[i] + shift)


@njit(**EXACT)
def _pack_iq1_m(entries: I16, shifts: U8, scales: U8, steps: Floats, out: U8) -> None:
    """qs[32] (eight low bits of entries), qh[16] (two groups: 3 high bits, shift), scales[8] (3 bits each, d above)."""
    for block in range(out.shape[0]):
        row = out[block]
        for k in range(32):
            row[k] = np.uint8(entries[block, k >> 1, k & 1] & 255)
        for j in range(16):
            a = (np.int32(entries[block, j, 0]) >> 8) | (np.int32(shifts[block, j, 0]) << 3)
            b = (np.int32(entries[block, j, 1]) >> 8) | (np.int32(shifts[block, j, 1]) << 3)
            row[32 + j] = np.uint8(a | (b << 4))
        d = np.int32(to_f16(steps[block]))
        for k in range(4):
            word = ((d >> (4 * k)) & 15) << 12
            for j in range(4):
                word |= np.int32(scales[block, 4 * k + j]) << (3 * j)
            row[48 + 2 * k] = np.uint8(word & 255)
            row[49 + 2 * k] = np.uint8(word >> 8)


@njit(**EXACT)
def _decode_iq1_m(data: U8, grid: Floats, out: Floats) -> None:
    for block in range(data.shape[0]):
        row, values = data[block], out[block]
        bits = np.int32(0)
        for k in range(4):
            bits |= (np.int32(row[49 + 2 * k]) >> 4) << (4 * k)
        d = from_f16(np.uint16(bits))
        for j in range(16):
            word = np.int32(row[48 + 2 * (j >> 2)]) | (np.int32(row[49 + 2 * (j >> 2)]) << 8)
            scale = d * np.float32(2 * ((word >> (3 * (j & 3))) & 7) + 1)
            for g in range(2):
                top = np.int32(row[32 + j]) >> (4 * g)
                levels = grid[np.int32(row[2 * j + g]) | ((top & 7) << 8)]
                shift = -SHIFT if top & 8 else SHIFT
                for i in range(8):
                    values[16 * j + 8 * g + i] = scale * (levels[i] + shift)


@cache
def _book() -> Book:
    return book(GRID)


@cache
def _levels() -> Floats:
    return grid(GRID).astype(np.float32) - np.float32(1)


class _TernaryGrid(GroupCodebook):
    """Encoding by search; subclasses name the kernels."""

    span: ClassVar[int]
    """Entries that share a shift; where each has its own, it is part of the codeword, else settled like a scale."""
    starts: ClassVar[tuple[float, ...]]
    """Multiples of a block's deviation at which entries are searched."""
    unit = 1.0

    @classmethod
    def search(cls, weights: Floats, importance: Floats | None = None) -> Found:
        flat = np.ascontiguousarray(weights, np.float32).reshape(-1)
        found = cls.empty(flat.size // cls.block)
        weight = usable_importance(importance, weights.shape[1])
        encode_grid_blocks(flat, weight, cls.span, _book(), np.array(cls.starts, np.float32), PARTS, *found)
        return found

    @classmethod
    def tables(cls) -> tuple[Floats, ...]:
        return (_levels(),)

    @classmethod
    def vocabulary(cls) -> tuple[Floats, int]:
        levels = _levels()
        return levels if cls.span > 1 else np.concatenate([levels + SHIFT, levels - SHIFT]), UNSIGNED

    @classmethod
    def offsets(cls, found: Found) -> Floats:
        shift = SHIFT - found.marks * np.float32(2 * SHIFT)
        return shift if cls.span > 1 else np.zeros_like(shift)

    @classmethod
    def with_codewords(cls, found: Found, words: I16, minus: U8) -> Found:
        size = len(_levels())
        return found._replace(
            entries=(words % size).astype(np.int16),
            marks=found.marks if cls.span > 1 else (words // size).astype(np.uint8),
        )


class IQ1_S(_TernaryGrid):
    """2048 entries for 8 weights, a scale and a shift for each 32."""

    name = "IQ1_S"
    block_bytes = 50
    step_bytes = (0,)
    blocks, groups, span = 8, 4, 4
    starts = (1.1, 1.5, 2.0)
    pack, decoder = staticmethod(_pack_iq1_s), staticmethod(_decode_iq1_s)


class IQ1_M(_TernaryGrid):
    """2048 entries and a shift for 8 weights, a scale for each 16."""

    name = "IQ1_M"
    block_bytes = 56
    blocks, groups, span = 16, 2, 1
    starts = (1.1, 1.5, 2.0)
    pack, decoder = staticmethod(_pack_iq1_m), staticmethod(_decode_iq1_m)
