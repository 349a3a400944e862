"""Rounding column by column with error feedback, for codes whose scales are settled."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels.lanes import FAST, INLINE, LANES, lane_rows

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)


@njit(**INLINE)
def pass_on(tile: F32, wrong: F32, upper: F32, first: int) -> None:
    """Let the columns from `first` on make up for a column's errors: tile [columns, lanes], wrong [lanes]."""
    for k in range(first, upper.size):
        share = upper[k]
        for lane in range(LANES):
            tile[k, lane] -= share * wrong[lane]


@njit(**FAST)
def round_columns(
    weights: F32,
    low: F32,
    width: F32,
    upper: F32,
    levels: F32,
    uniform: bool,
    codes: npt.NDArray[np.uint8],
    errors: F32,
) -> None:
    """Choose the codes of some columns, each column's error made up for by those that follow.

    Args:
        weights: [columns, rows].
        low, width: [columns, rows]: a code stands for low + width * levels[code].
        upper: [columns, columns], of the upper Cholesky factor of the inverse Hessian.
        levels: [codes], ascending from 0 to 1.
        uniform: whether the levels are evenly spaced.
        codes: out, [columns, rows].
        errors: out, [columns, rows], what columns beyond these have to make up for.
    """
    columns, rows = weights.shape
    top = np.float32(levels.size - 1)
    tile, wrong = lane_rows(columns), lane_rows(columns)
    place, chosen = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for start in range(0, rows, LANES):
        n = min(LANES, rows - start)
        for j in range(columns):
            for lane in range(n):
                tile[j, lane] = weights[j, start + lane]
            for lane in range(n, LANES):
                tile[j, lane] = ZERO
        for j in range(columns):
            for lane in range(n):
                span = width[j, start + lane]
                place[lane] = (tile[j, lane] - low[j, start + lane]) / (span if span != ZERO else ONE)
            if uniform:
                for lane in range(LANES):
                    chosen[lane] = min(max(np.floor(place[lane] * top + HALF), ZERO), top)
            else:
                chosen[:] = ZERO
                for k in range(levels.size - 1):
                    middle = (levels[k] + levels[k + 1]) * HALF
                    for lane in range(LANES):
                        chosen[lane] += ONE if place[lane] > middle else ZERO
            inverse = ONE / upper[j, j]
            for lane in range(n):
                # a NaN passes through min and max
                code = min(max(np.int32(chosen[lane]), np.int32(0)), np.int32(levels.size - 1))
                codes[j, start + lane] = np.uint8(code)
                value = low[j, start + lane] + width[j, start + lane] * levels[code]
                wrong[j, lane] = (tile[j, lane] - value) * inverse
                errors[j, start + lane] = wrong[j, lane]
            pass_on(tile, wrong[j], upper[j], j + 1)
