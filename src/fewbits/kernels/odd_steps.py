"""Super-blocks whose blocks have odd multiples of a half-precision step as scales: all IQ1, IQ2 and IQ3 types.

With scale s, the codes of a block leave the error s^2 A - 2 s B more than storing zeros would.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels.lanes import F16_MAX, INLINE, LANES, TINY, round_f16, round_f16_lanes

F32 = npt.NDArray[np.float32]
ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
WORST = np.float32(3e38)


@njit(**INLINE)
def choose_steps(
    squares: F32,
    products: F32,
    blocks: int,
    unit: np.float32,
    most: np.float32,
    parts: F32,
    best: F32,
    step: F32,
    grid: F32,
) -> None:
    """For each super-block the half-precision step with which the block scales lose least.

    A block's error at a scale is bounded by the least of the parabolas s^2 A - 2 s B of its codes found so far.

    Args:
        squares, products: [tries, 128], A and B.
        blocks: of a super-block.
        unit: a block's scale is step * unit * (2 code + 1).
        most: codes run from 0 to this.
        parts: the odd numbers, whole or not, that are tried for the largest scale.
        best: [128], the block's best scales.
        step: out, [128].
        grid: work, [6, parts.size].
    """
    tried, miss, inverse, bits = grid[0], grid[1], grid[2], grid[3].view(np.int32)
    scales, error = grid[4], grid[5]
    for lane0 in range(0, LANES, blocks):
        largest = ZERO
        for lane in range(lane0, lane0 + blocks):
            largest = max(largest, best[lane])
        for k in range(parts.size):
            tried[k] = min(largest / (unit * parts[k]), F16_MAX)
            miss[k] = ZERO
        round_f16_lanes(tried, bits)
        for k in range(parts.size):
            inverse[k] = HALF / (tried[k] * unit) if tried[k] > ZERO else ZERO
        for lane in range(lane0, lane0 + blocks):
            target = best[lane]
            for k in range(parts.size):
                scales[k] = tried[k] * unit * (TWO * min(max(np.floor(target * inverse[k]), ZERO), most) + ONE)
                error[k] = WORST
            for t in range(squares.shape[0]):
                a, b = squares[t, lane], TWO * products[t, lane]
                for k in range(parts.size):
                    error[k] = min(error[k], scales[k] * (scales[k] * a - b))
            for k in range(parts.size):
                miss[k] += error[k]
        choice, lowest = tried[0], miss[0]
        for k in range(1, parts.size):
            choice = tried[k] if miss[k] < lowest else choice
            lowest = min(miss[k], lowest)
        for lane in range(lane0, lane0 + blocks):
            step[lane] = choice


@njit(**INLINE)
def refit_steps(blocks: int, unit: np.float32, code: F32, square: F32, product: F32, step: F32) -> None:
    """The step of each super-block with the least error for what its blocks hold, whose A and B are given."""
    for lane0 in range(0, LANES, blocks):
        upper, lower, d = ZERO, ZERO, step[lane0]
        for lane in range(lane0, lane0 + blocks):
            odd = unit * (TWO * code[lane] + ONE)
            upper += odd * product[lane]
            lower += odd * odd * square[lane]
        new = round_f16(min(max(upper / max(lower, TINY), ZERO), F16_MAX))
        if new * (new * lower - TWO * upper) < d * (d * lower - TWO * upper):
            for lane in range(lane0, lane0 + blocks):
                step[lane] = new
