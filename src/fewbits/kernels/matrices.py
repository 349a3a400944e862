"""Rounding whole matrices for settled scales, and decoding them: row by row, exactly as engines divide and multiply.

A matrix' scales are a grid: weight (row, column) has the one at (row // high, column // wide), or, where groups are
strided, at (row % rows of the grid, column).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels.lanes import EXACT, FAST

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
INLINE = {**EXACT, "inline": "always"}
ZERO = np.float32(0)
E4M3_MAX, E4M3_NORMAL = np.float32(448), np.float32(2.0**-6)


@njit(**FAST)
def block_extremes(weights: F32, high: int, wide: int, strided: bool, low: F32, peak: F32) -> None:
    """Smallest and largest weight of every block: weights [rows, columns], low, peak: out, the grid."""
    rows, columns = weights.shape
    for g in range(low.shape[0]):
        for j in range(low.shape[1]):
            low[g, j] = np.float32(3.4028235e38)
            peak[g, j] = np.float32(-3.4028235e38)
    for r in range(rows):
        g = r % low.shape[0] if strided else r // high
        for j in range(low.shape[1]):
            least, most = low[g, j], peak[g, j]
            part = weights[r, j * wide : min((j + 1) * wide, columns)]
            for c in range(part.size):
                least = min(least, part[c])
                most = max(most, part[c])
            low[g, j] = least
            peak[g, j] = most


@njit(**INLINE)
def spread_row(values: F32, wide: int, line: F32) -> None:
    """A row of the grid as a row of the matrix."""
    if wide == 1:
        line[:] = values
        return
    for j in range(values.size):
        line[j * wide : min((j + 1) * wide, line.size)] = values[j]


@njit(**INLINE)
def places(row: F32, by: F32, divide: bool, out: F32) -> None:
    """Weights in units of their scales: divided by them, or multiplied by their inverses."""
    if divide:
        for c in range(row.size):
            out[c] = row[c] / by[c]
    else:
        for c in range(row.size):
            out[c] = row[c] * by[c]


@njit(**EXACT)
def round_integers(
    weights: F32,
    by: F32,
    divide: bool,
    zeros: F32,
    lowest: np.float32,
    highest: np.float32,
    grid: npt.NDArray[np.int64],
    codes: U8,
) -> None:
    """Codes of integers: the place is rounded, ties to even, and then the zero point added.

    Args:
        weights: [rows, columns].
        by, divide: see `places`; by is on the grid.
        zeros: on the grid.
        lowest, highest: codes.
        grid: high, wide, whether strided.
        codes: out, [rows, columns].
    """
    rows, columns = weights.shape
    line, shift, place = np.empty(columns, np.float32), np.empty(columns, np.float32), np.empty(columns, np.float32)
    for r in range(rows):
        g = r % by.shape[0] if grid[2] else r // grid[0]
        spread_row(by[g], grid[1], line)
        spread_row(zeros[g], grid[1], shift)
        places(weights[r], line, divide, place)
        out = codes[r]
        for c in range(columns):
            out[c] = np.uint8(np.int32(min(max(np.rint(place[c]) + shift[c], lowest), highest)))


@njit(**EXACT)
def round_levels(
    weights: F32, by: F32, divide: bool, steps: F32, order: U8, grid: npt.NDArray[np.int64], codes: U8
) -> None:
    """Codes of the nearest levels of a table: order[how many steps lie below the place]. Arguments as above."""
    rows, columns = weights.shape
    line, place = np.empty(columns, np.float32), np.empty(columns, np.float32)
    rank = np.empty(columns, np.int32)
    for r in range(rows):
        g = r % by.shape[0] if grid[2] else r // grid[0]
        spread_row(by[g], grid[1], line)
        places(weights[r], line, divide, place)
        for c in range(columns):
            rank[c] = 0
        for k in range(steps.size):
            step = steps[k]
            for c in range(columns):
                rank[c] += np.int32(place[c] > step)
        out = codes[r]
        for c in range(columns):
            out[c] = order[rank[c]]


@njit(**INLINE)
def nearest_e4m3(place: np.float32) -> np.int32:
    """Code of the nearest 8-bit float, ties to even; what is too large becomes the largest, zero is positive."""
    size = np.float32(min(abs(place), E4M3_MAX))
    bits = size.view(np.int32)
    normal = ((bits + np.int32(0x7FFFF) + ((bits >> np.int32(20)) & np.int32(1))) >> np.int32(20)) - np.int32(960)
    small = np.int32(np.rint(size * np.float32(512)))
    code = small if size < E4M3_NORMAL else normal
    sign = np.int32(128) if (place < ZERO) & (code > 0) else np.int32(0)
    return code | sign


@njit(**EXACT)
def round_e4m3(weights: F32, by: F32, grid: npt.NDArray[np.int64], codes: U8) -> None:
    """Codes of 8-bit floats; arguments as above."""
    rows, columns = weights.shape
    line, place = np.empty(columns, np.float32), np.empty(columns, np.float32)
    for r in range(rows):
        g = r % by.shape[0] if grid[2] else r // grid[0]
        spread_row(by[g], grid[1], line)
        places(weights[r], line, True, place)
        out = codes[r]
        for c in range(columns):
            out[c] = np.uint8(nearest_e4m3(place[c]))


@njit(**EXACT)
def decode_rows(codes: U8, table: F32, scales: F32, zeros: F32, grid: npt.NDArray[np.int64], out: F32) -> None:
    """(table[code] - zero) * scale: table [256], scales and zeros on the grid, codes, out [rows, columns]."""
    rows, columns = codes.shape
    line, shift = np.empty(columns, np.float32), np.empty(columns, np.float32)
    for r in range(rows):
        g = r % scales.shape[0] if grid[2] else r // grid[0]
        spread_row(scales[g], grid[1], line)
        spread_row(zeros[g], grid[1], shift)
        row, values = codes[r], out[r]
        for c in range(columns):
            values[c] = (table[row[c]] - shift[c]) * line[c]
