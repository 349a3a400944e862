"""Rounding column by column with error feedback, for codes whose scales are settled."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels.lanes import FAST

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
LANES = 64
"""Rows side by side: with 128 columns they fill half of the first cache."""
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)


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
        weights: [columns, rows]; changed as errors are passed on.
        low, width: [columns, rows]: a code stands for low + width * levels[code].
        upper: [columns, columns], of the upper Cholesky factor of the inverse Hessian.
        levels: [codes], ascending from 0 to 1.
        uniform: whether the levels are evenly spaced.
        codes: out, [columns, rows].
        errors: out, [columns, rows], what columns beyond these have to make up for.
    """
    columns, rows = weights.shape
    top = np.float32(levels.size - 1)
    place, chosen = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for start in range(0, rows, LANES):
        n = min(LANES, rows - start)
        for j in range(columns):
            for lane in range(n):
                span = width[j, start + lane]
                place[lane] = (weights[j, start + lane] - low[j, start + lane]) / (span if span != ZERO else ONE)
            if uniform:
                for lane in range(n):
                    chosen[lane] = min(max(np.floor(place[lane] * top + HALF), ZERO), top)
            else:
                chosen[:] = ZERO
                for k in range(levels.size - 1):
                    middle = (levels[k] + levels[k + 1]) * HALF
                    for lane in range(n):
                        chosen[lane] += ONE if place[lane] > middle else ZERO
            inverse = ONE / upper[j, j]
            for lane in range(n):
                code = np.int32(chosen[lane])
                codes[j, start + lane] = np.uint8(code)
                value = low[j, start + lane] + width[j, start + lane] * levels[code]
                errors[j, start + lane] = (weights[j, start + lane] - value) * inverse
            for k in range(j + 1, columns):
                share = upper[j, k]
                for lane in range(n):
                    weights[k, start + lane] -= share * errors[j, start + lane]
