"""Choosing the scale of a group of weights among candidates by the error of what the group adds to a layer's output."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels.lanes import FAST, INLINE, LANES, lane_rows

F32 = npt.NDArray[np.float32]
ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)


@njit(**INLINE)
def quadratic(wrong: F32, hessian: F32, row: F32, out: F32) -> None:
    """out [lanes] = d^T H d of each lane's d, wrong [columns, lanes]; only H's upper triangle is read."""
    columns = hessian.shape[0]
    for lane in range(LANES):
        out[lane] = ZERO
    for i in range(columns):
        own = HALF * hessian[i, i]
        for lane in range(LANES):
            row[lane] = own * wrong[i, lane]
        j = i + 1
        while j + 3 < columns:
            a, b, c, d = hessian[i, j], hessian[i, j + 1], hessian[i, j + 2], hessian[i, j + 3]
            for lane in range(LANES):
                row[lane] += (a * wrong[j, lane] + b * wrong[j + 1, lane]) + (
                    c * wrong[j + 2, lane] + d * wrong[j + 3, lane]
                )
            j += 4
        while j < columns:
            a = hessian[i, j]
            for lane in range(LANES):
                row[lane] += a * wrong[j, lane]
            j += 1
        for lane in range(LANES):
            out[lane] += TWO * wrong[i, lane] * row[lane]


@njit(**FAST)
def best_candidates(
    weights: F32,
    hessian: F32,
    pull: F32,
    scales: F32,
    zeros: F32,
    levels: F32,
    uniform: bool,
    chosen: npt.NDArray[np.uint8],
) -> None:
    """For each row of a group of columns the candidate with the least d^T H d + 2 p^T d, d being the error of rounding
    to nearest.

    Args:
        weights: [columns, rows].
        hessian: [columns, columns], of the group's inputs.
        pull: [columns, rows], p: how the errors of other groups correlate with this one's.
        scales, zeros: [candidates, rows]: a level stands for (level - zero) * scale; scales are above zero.
        levels: [n], ascending.
        uniform: whether the levels are neighbouring whole numbers.
        chosen: out, [rows].
    """
    columns, rows = weights.shape
    x, wrong, p = lane_rows(columns), lane_rows(columns), lane_rows(columns)
    row, error, least = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    scale, inverse, zero = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    lowest, highest = levels[0], levels[-1]
    for start in range(0, rows, LANES):
        n = min(LANES, rows - start)
        for j in range(columns):
            for lane in range(n):
                x[j, lane] = weights[j, start + lane]
                p[j, lane] = TWO * pull[j, start + lane]
            for lane in range(n, LANES):
                x[j, lane] = p[j, lane] = ZERO
        for lane in range(LANES):
            least[lane] = np.float32(np.inf)
            scale[lane], zero[lane] = ONE, ZERO
        for candidate in range(scales.shape[0]):
            for lane in range(n):
                scale[lane] = scales[candidate, start + lane]
                zero[lane] = zeros[candidate, start + lane]
            for lane in range(LANES):
                inverse[lane] = ONE / scale[lane]
            for j in range(columns):
                if uniform:
                    for lane in range(LANES):
                        number = np.floor(x[j, lane] * inverse[lane] + zero[lane] + HALF)
                        number = min(max(number, lowest), highest)
                        wrong[j, lane] = (number - zero[lane]) * scale[lane] - x[j, lane]
                else:
                    for lane in range(LANES):
                        row[lane] = lowest
                    for k in range(1, levels.size):
                        step, middle = levels[k] - levels[k - 1], HALF * (levels[k] + levels[k - 1])
                        for lane in range(LANES):
                            row[lane] += step if x[j, lane] * inverse[lane] > middle else ZERO
                    for lane in range(LANES):
                        wrong[j, lane] = row[lane] * scale[lane] - x[j, lane]
            quadratic(wrong, hessian, row, error)
            for j in range(columns):
                for lane in range(LANES):
                    error[lane] += p[j, lane] * wrong[j, lane]
            for lane in range(n):
                if error[lane] < least[lane]:
                    least[lane] = error[lane]
                    chosen[start + lane] = candidate
