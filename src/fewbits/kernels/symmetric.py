"""Search for the scale of block types without offset: w = scale * code, codes from -n to n - 1.

For a candidate inverse scale the codes are l = round(w / s) and the residuals e = w / s - l. Fitting the residuals,
e ~ a l, by weighted least squares moves the scale to s (1 + a) and leaves the error s^2 (sum w e^2 - a sum w e l):
residuals are small, so float32 sums do not cancel.

Everything is a plain module-level function: Numba cannot reuse compiled closures in the next process.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels.lanes import F16_MAX, FAST, LANES, TINY, lane_rows, load_tile, round_f16

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
WORST = np.float32(3e38)
SLL, SEL, SEE = range(3)
"""Rows of `sums`: of squared codes, residuals times codes, squared residuals."""
NEGATIVE = (-0.9, -0.7, -0.5, -0.35, -0.2, -0.1, 0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
POSITIVE = (-0.6, -0.3, 0.0, 0.3)
"""How far beyond the last code on either side the largest magnitude is tried, in codes."""


def targets(n: int) -> F32:
    """The codes, whole or not, at which the largest magnitude of a block is tried: a candidate each."""
    return np.array([-(n + g) for g in NEGATIVE] + [n - 1 + g for g in POSITIVE], np.float32)


@njit(**FAST, inline="always")
def residuals(xt: F32, wt: F32, inverse: F32, n: np.float32, sums: F32) -> None:
    """Sum what codes round(x * inverse) leave over, for 128 blocks.

    xt, wt [elements, 128], inverse [128] -> sums [3, 128].
    """
    low, high = -n, n - ONE
    for row in range(3):
        for lane in range(LANES):
            sums[row, lane] = ZERO
    for i in range(0, xt.shape[0], 4):
        for lane in range(LANES):
            s = inverse[lane]
            t0, t1, t2, t3 = xt[i, lane] * s, xt[i + 1, lane] * s, xt[i + 2, lane] * s, xt[i + 3, lane] * s
            l0 = min(max(np.floor(t0 + HALF), low), high)
            l1 = min(max(np.floor(t1 + HALF), low), high)
            l2 = min(max(np.floor(t2 + HALF), low), high)
            l3 = min(max(np.floor(t3 + HALF), low), high)
            e0, e1, e2, e3 = t0 - l0, t1 - l1, t2 - l2, t3 - l3
            w0, w1, w2, w3 = wt[i, lane], wt[i + 1, lane], wt[i + 2, lane], wt[i + 3, lane]
            a0, a1, a2, a3 = w0 * l0, w1 * l1, w2 * l2, w3 * l3
            sums[SLL, lane] += a0 * l0 + a1 * l1 + a2 * l2 + a3 * l3
            sums[SEL, lane] += a0 * e0 + a1 * e1 + a2 * e2 + a3 * e3
            sums[SEE, lane] += w0 * e0 * e0 + w1 * e1 * e1 + w2 * e2 * e2 + w3 * e3 * e3


@njit(**FAST)
def search(xt: F32, wt: F32, n: np.float32, candidates: F32, refinements: int, scale: F32, work: F32) -> None:
    """Find the best signed scale of each of 128 blocks.

    Args:
        xt, wt: [elements, 128], elements a multiple of 4.
        n: codes run from -n to n - 1.
        candidates: see `targets`.
        refinements: further rounds in which the best scale so far is the candidate.
        scale: out, [128].
        work: [7, 128].
    """
    top, inverse, error, sums, spacing = work[0], work[1], work[2], work[3:6], work[6]
    for lane in range(LANES):
        top[lane] = ZERO
        scale[lane] = ZERO
        error[lane] = ZERO
    for i in range(xt.shape[0]):
        for lane in range(LANES):
            x, largest = xt[i, lane], top[lane]
            top[lane] = x if abs(x) > abs(largest) else largest
            error[lane] += wt[i, lane] * x * x
    for k in range(candidates.size + refinements):
        if k < candidates.size:
            part = ONE / candidates[k]
            for lane in range(LANES):
                spacing[lane] = top[lane] * part
        else:
            for lane in range(LANES):
                spacing[lane] = scale[lane]
        for lane in range(LANES):
            s = spacing[lane]
            inverse[lane] = ONE / s if abs(s) > TINY else ZERO
        residuals(xt, wt, inverse, n, sums)
        for lane in range(LANES):
            # both sides of each choice are loaded first: only then it becomes a select and not a branch
            s, sel, best, least = spacing[lane], sums[SEL, lane], scale[lane], error[lane]
            a = sel / max(sums[SLL, lane], TINY)
            left = (sums[SEE, lane] - a * sel) * s * s
            better = left < least
            scale[lane] = s * (ONE + a) if better else best
            error[lane] = left if better else least


@njit(**FAST)
def round_codes(xt: F32, scale: F32, n: np.float32, codes: U8) -> None:
    """The codes, plus n, for scales that are settled: codes [elements, 128]."""
    for i in range(xt.shape[0]):
        for lane in range(LANES):
            s = scale[lane]
            t = xt[i, lane] / s if s != ZERO else ZERO
            codes[i, lane] = np.uint8(np.int32(min(max(np.floor(t + HALF), -n), n - ONE) + n))


@njit(**FAST)
def encode_blocks(x: F32, importance: F32, n: int, candidates: F32, refinements: int, codes: U8, scale: F32) -> None:
    """Blocks with one half-precision scale each.

    Args:
        x: flat, row-major [rows, columns].
        importance: [columns].
        n, candidates, refinements: see `search`.
        codes: out, [blocks, elements], plus n.
        scale: out, [blocks], representable in half precision.
    """
    count, elements = codes.shape
    span = np.float32(n)
    xt, wt = lane_rows(elements), lane_rows(elements)
    tile = np.empty((elements, LANES), np.uint8)
    work, found = lane_rows(7), lane_rows(1)[0]
    for first in range(0, count, LANES):
        load_tile(x, importance, first, count, xt, wt)
        search(xt, wt, span, candidates, refinements, found, work)
        for lane in range(LANES):
            found[lane] = round_f16(found[lane])
        round_codes(xt, found, span, tile)
        for lane in range(min(LANES, count - first)):
            scale[first + lane] = found[lane]
            for i in range(elements):
                codes[first + lane, i] = tile[i, lane]


@njit(**FAST)
def choose_integers(
    xt: F32, wt: F32, n: np.float32, most: np.float32, reach: int, step: F32, ideal: F32, chosen: F32, work: F32
) -> None:
    """For each lane the integer near its ideal scale over its step with the least error.

    chosen [2, 128] takes the integers and their errors; work[3:6] keeps no sums that belong to them.
    """
    inverse, whole, sums = work[0], work[1], work[3:6]
    for lane in range(LANES):
        chosen[0, lane] = ZERO
        chosen[1, lane] = WORST
    for k in range(-reach, reach + 1):
        for lane in range(LANES):
            d = step[lane]
            nearest = np.floor(ideal[lane] / d + HALF) if d != ZERO else ZERO
            whole[lane] = min(max(nearest + np.float32(k), -most), most - ONE)
            s = d * whole[lane]
            inverse[lane] = ONE / s if s != ZERO else ZERO
        residuals(xt, wt, inverse, n, sums)
        for lane in range(LANES):
            s, best, least, integer = step[lane] * whole[lane], chosen[0, lane], chosen[1, lane], whole[lane]
            left = sums[SEE, lane] * s * s
            # a scale of zero leaves no residual to weigh: it stands only where nothing else was tried
            better = (left < least) & (s != ZERO)
            chosen[0, lane] = integer if better else best
            chosen[1, lane] = left if better else least


@njit(**FAST)
def refit_step(xt: F32, wt: F32, n: np.float32, blocks: int, step: F32, integer: F32, other: F32, work: F32) -> None:
    """The step of each super-block with the least error for the codes that `step` and `integer` give."""
    inverse, sums = work[0], work[3:6]
    for lane in range(LANES):
        s = step[lane] * integer[lane]
        inverse[lane] = ONE / s if s != ZERO else ZERO
    residuals(xt, wt, inverse, n, sums)
    for lane0 in range(0, LANES, blocks):
        upper, lower = ZERO, ZERO
        for lane in range(lane0, lane0 + blocks):
            square = integer[lane] * integer[lane]
            upper += square * (sums[SLL, lane] + sums[SEL, lane])
            lower += square * sums[SLL, lane]
        d = step[lane0] * (upper / lower) if lower > ZERO else step[lane0]
        d = round_f16(min(max(d, -F16_MAX), F16_MAX))
        for lane in range(lane0, lane0 + blocks):
            other[lane] = d


@njit(**FAST)
def encode_super_blocks(
    x: F32,
    importance: F32,
    n: int,
    most: int,
    candidates: F32,
    refinements: int,
    reach: int,
    rounds: int,
    codes: U8,
    integers: npt.NDArray[np.int8],
    steps: F32,
) -> None:
    """Super-blocks whose blocks have an integer scale: a code's value is step * integer * code.

    Args:
        x: flat, row-major [rows, columns].
        importance: [columns].
        n, candidates, refinements: see `search`.
        most: integers run from -most to most - 1.
        reach: how far from the nearest integer other block scales are tried.
        rounds: how often the step is fitted to the codes and the integers chosen anew.
        codes: out, [super-blocks, blocks, elements], plus n.
        integers: out, [super-blocks, blocks].
        steps: out, [super-blocks], representable in half precision.
    """
    count, blocks, elements = codes.shape
    per_tile = LANES // blocks
    span, last = np.float32(n), np.float32(most)
    xt, wt = lane_rows(elements), lane_rows(elements)
    tile = np.empty((elements, LANES), np.uint8)
    work, lanes = lane_rows(7), lane_rows(3)
    ideal, step, other = lanes[0], lanes[1], lanes[2]
    best, trial = lane_rows(2), lane_rows(2)
    for first in range(0, count, per_tile):
        load_tile(x, importance, first * blocks, count * blocks, xt, wt)
        search(xt, wt, span, candidates, refinements, ideal, work)
        for lane0 in range(0, LANES, blocks):
            largest = ZERO
            for lane in range(lane0, lane0 + blocks):
                largest = ideal[lane] if abs(ideal[lane]) > abs(largest) else largest
            d = round_f16(min(max(largest / -last, -F16_MAX), F16_MAX))
            for lane in range(lane0, lane0 + blocks):
                step[lane] = d
        choose_integers(xt, wt, span, last, reach, step, ideal, best, work)
        for k in range(rounds + 1):
            if k == 0:  # a little larger, so that a block scale of the other sign is not cut off
                for lane in range(LANES):
                    other[lane] = round_f16(step[lane] * (last / (last - ONE)))
            else:
                refit_step(xt, wt, span, blocks, step, best[0], other, work)
            choose_integers(xt, wt, span, last, reach, other, ideal, trial, work)
            for lane0 in range(0, LANES, blocks):
                gain = ZERO
                for lane in range(lane0, lane0 + blocks):
                    gain += best[1, lane] - trial[1, lane]
                if gain > ZERO:
                    for lane in range(lane0, lane0 + blocks):
                        step[lane] = other[lane]
                        best[0, lane] = trial[0, lane]
                        best[1, lane] = trial[1, lane]
        for lane in range(LANES):
            ideal[lane] = step[lane] * best[0, lane]
        round_codes(xt, ideal, span, tile)
        for s in range(min(per_tile, count - first)):
            steps[first + s] = step[s * blocks]
            for j in range(blocks):
                integers[first + s, j] = np.int8(best[0, s * blocks + j])
                for i in range(elements):
                    codes[first + s, j, i] = tile[i, s * blocks + j]
