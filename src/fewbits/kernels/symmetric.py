"""Search for the scale of block types without offset: w = scale * code, codes from -n to n - 1.

For a candidate scale s the codes are l = round(w / s) and the residuals e = w / s - l. Moving the scale to s (1 + a)
under the same codes leaves the error s^2 (sum w e^2 - 2 a sum w e l + a^2 sum w l^2), least at
a = sum w e l / sum w l^2: residuals are small, so float32 sums do not cancel.

Everything is a plain module-level function: Numba cannot reuse compiled closures in the next process.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels.lanes import F16_MAX, FAST, INLINE, LANES, TINY, lane_rows, load_tile, round_f16, round_f16_lanes

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
WORST = np.float32(3e38)
SLL, SEL, SEE = range(3)
"""Rows of `sums`: of squared codes, residuals times codes, squared residuals."""

# fmt: off
CANDIDATES = {
    4: np.array((-6.9, -5.5, -4.8, -4.5, -4.2, -4.0, -3.7, -3.3, -2.9, 4.4), np.float32),
    8: np.array(
        (-12.8, -10.7, -9.8, -9.2, -8.8, -8.5, -8.3, -8.2, -8.0, -7.8, -7.6, -7.3, -7.0, -6.7, -6.1, 8.4), np.float32,
    ),
    16: np.array(
        (-18.2, -17.3, -16.7, -16.4, -16.1, -15.8, -15.4, -15.1, -14.8, -14.2, -13.9, -13.1, -12.2), np.float32,
    ),
    32: np.array((-32.0,), np.float32),
}
# fmt: on
"""For each n the codes, whole or not, at which the largest magnitude of a block is tried.

Chosen greedily, with replacements, out of 100 to 200 (either sign, in steps of 0.1) for the least error on Gaussian,
Student-t(3), uniform, one-sided and real blocks with equal and with lognormal importances: within 0.5 % of what all
of them give. n = 32 only sets the range: its block scales are tried one by one, as they will be stored.
"""
STEPS = {
    4: np.linspace(-24, -40, 33, dtype=np.float32),
    32: np.array((-112.0,), np.float32),
}
"""For each n the integers, whole or not, at which the largest block scale of a super-block is tried."""


@njit(**INLINE)
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


@njit(**INLINE)
def squares(xt: F32, wt: F32, inverse: F32, n: np.float32, see: F32) -> None:
    """Row SEE of `residuals` alone: see [128]."""
    low, high = -n, n - ONE
    for lane in range(LANES):
        see[lane] = ZERO
    for i in range(0, xt.shape[0], 4):
        for lane in range(LANES):
            s = inverse[lane]
            t0, t1, t2, t3 = xt[i, lane] * s, xt[i + 1, lane] * s, xt[i + 2, lane] * s, xt[i + 3, lane] * s
            e0 = t0 - min(max(np.floor(t0 + HALF), low), high)
            e1 = t1 - min(max(np.floor(t1 + HALF), low), high)
            e2 = t2 - min(max(np.floor(t2 + HALF), low), high)
            e3 = t3 - min(max(np.floor(t3 + HALF), low), high)
            w0, w1, w2, w3 = wt[i, lane], wt[i + 1, lane], wt[i + 2, lane], wt[i + 3, lane]
            see[lane] += w0 * e0 * e0 + w1 * e1 * e1 + w2 * e2 * e2 + w3 * e3 * e3


@njit(**INLINE)
def search(
    xt: F32,
    wt: F32,
    n: np.float32,
    candidates: F32,
    refinements: int,
    half: bool,
    scale: F32,
    curve: F32,
    work: F32,
) -> None:
    """Find the best signed scale of each of 128 blocks.

    Args:
        xt, wt: [elements, 128], elements a multiple of 4.
        n: codes run from -n to n - 1.
        candidates: CANDIDATES[n].
        refinements: further rounds in which the best scale so far is the candidate.
        half: whether scales are judged as rounded to half precision, and given so.
        scale: out, [128].
        curve: out, [128]: half the second derivative of the error by the scale.
        work: [9, 128].
    """
    top, inverse, error, sums, spacing = work[0], work[1], work[2], work[3:6], work[6]
    found, bits = work[7, :LANES], work[8, :LANES].view(np.int32)
    for lane in range(LANES):
        top[lane] = ZERO
        scale[lane] = ZERO
        error[lane] = ZERO
        curve[lane] = ZERO
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
            s = spacing[lane]
            found[lane] = s + s * (sums[SEL, lane] / max(sums[SLL, lane], TINY))
        if half:
            round_f16_lanes(found, bits)
        for lane in range(LANES):
            # both sides of each choice are loaded first: only then it becomes a select and not a branch
            s, sel, sll, new, best = spacing[lane], sums[SEL, lane], sums[SLL, lane], found[lane], scale[lane]
            least, old_curve = error[lane], curve[lane]
            a = (new - s) * inverse[lane]
            left = (sums[SEE, lane] - a * (TWO * sel - a * sll)) * s * s
            better = left < least
            scale[lane] = new if better else best
            error[lane] = left if better else least
            curve[lane] = sll if better else old_curve


@njit(**INLINE)
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
    work, lanes = lane_rows(9), lane_rows(2)
    found, curve = lanes[0], lanes[1]
    for first in range(0, count, LANES):
        load_tile(x, importance, first, count, xt, wt)
        search(xt, wt, span, candidates, refinements, True, found, curve, work)
        round_codes(xt, found, span, tile)
        for lane in range(min(LANES, count - first)):
            scale[first + lane] = found[lane]
            for i in range(elements):
                codes[first + lane, i] = tile[i, lane]


@njit(**FAST)
def choose_step(ideal: F32, curve: F32, lane0: int, blocks: int, most: np.float32, parts: F32, grid: F32) -> np.float32:
    """The half-precision step whose integer multiples, -most to most - 1, come nearest to ideal block scales.

    Nearest by what errors grow: curve x squared distance.

    Args:
        ideal, curve: [128], of which lane0 to lane0 + blocks belong to the super-block.
        parts: [steps], the inverses of STEPS[n].
        grid: work, [4, steps].
    """
    tried, inverse, miss, bits = grid[0], grid[1], grid[2], grid[3].view(np.int32)
    largest = ZERO
    for lane in range(lane0, lane0 + blocks):
        largest = ideal[lane] if abs(ideal[lane]) > abs(largest) else largest
    for k in range(parts.size):
        tried[k] = largest * parts[k]
        miss[k] = ZERO
    round_f16_lanes(tried, bits)
    for k in range(parts.size):
        d = tried[k]
        inverse[k] = ONE / d if d != ZERO else ZERO
    for lane in range(lane0, lane0 + blocks):
        s, c = ideal[lane], curve[lane]
        for k in range(parts.size):
            e = s - tried[k] * min(max(np.floor(s * inverse[k] + HALF), -most), most - ONE)
            miss[k] += c * e * e
    best, least = tried[0], miss[0]
    for k in range(1, parts.size):
        best = tried[k] if miss[k] < least else best
        least = min(miss[k], least)
    return best


@njit(**INLINE)
def choose_integers(
    xt: F32, wt: F32, n: np.float32, most: np.float32, reach: int, step: F32, ideal: F32, chosen: F32, work: F32
) -> None:
    """For each lane the integer near its ideal scale over its step with the least error.

    chosen [2, 128] takes the integers and their errors.
    """
    inverse, whole, see, nearest = work[0], work[1], work[2], work[3]
    for lane in range(LANES):
        d = step[lane]
        nearest[lane] = np.floor(ideal[lane] / d + HALF) if d != ZERO else ZERO
        nearest[lane] = min(max(nearest[lane], -most), most - ONE)
        chosen[0, lane] = ZERO
        chosen[1, lane] = WORST
    for k in range(-reach, reach + 1):
        for lane in range(LANES):
            whole[lane] = min(max(nearest[lane] + np.float32(k), -most), most - ONE)
            s = step[lane] * whole[lane]
            inverse[lane] = ONE / s if s != ZERO else ZERO
        squares(xt, wt, inverse, n, see)
        for lane in range(LANES):
            s, best, least, integer = step[lane] * whole[lane], chosen[0, lane], chosen[1, lane], whole[lane]
            left = see[lane] * s * s
            # a scale of zero leaves no residual to weigh: it stands only where nothing else was tried
            better = (left < least) & (s != ZERO)
            chosen[0, lane] = integer if better else best
            chosen[1, lane] = left if better else least


@njit(**INLINE)
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


@njit(**INLINE)
def keep_better(blocks: int, step: F32, best: F32, other: F32, trial: F32) -> None:
    """For each super-block the step, integers and errors of the trial where they leave less error."""
    for lane0 in range(0, LANES, blocks):
        gain = ZERO
        for lane in range(lane0, lane0 + blocks):
            gain += best[1, lane] - trial[1, lane]
        if gain > ZERO:
            for lane in range(lane0, lane0 + blocks):
                step[lane] = other[lane]
                best[0, lane] = trial[0, lane]
                best[1, lane] = trial[1, lane]


@njit(**FAST)
def encode_super_blocks(
    x: F32,
    importance: F32,
    n: int,
    most: int,
    candidates: F32,
    refinements: int,
    step_candidates: F32,
    reaches: npt.NDArray[np.int64],
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
        step_candidates: STEPS[n].
        reaches: how far from the nearest integer other block scales are tried: with the first step, then
            with each step that is fitted to the codes so far.
        codes: out, [super-blocks, blocks, elements], plus n.
        integers: out, [super-blocks, blocks].
        steps: out, [super-blocks], representable in half precision.
    """
    count, blocks, elements = codes.shape
    per_tile = LANES // blocks
    span, last = np.float32(n), np.float32(most)
    xt, wt = lane_rows(elements), lane_rows(elements)
    tile = np.empty((elements, LANES), np.uint8)
    work, lanes, grid = lane_rows(9), lane_rows(4), np.empty((4, step_candidates.size), np.float32)
    ideal, curve, step, other = lanes[0], lanes[1], lanes[2], lanes[3]
    best, trial = lane_rows(2), lane_rows(2)
    parts = ONE / step_candidates
    for first in range(0, count, per_tile):
        load_tile(x, importance, first * blocks, count * blocks, xt, wt)
        search(xt, wt, span, candidates, refinements, False, ideal, curve, work)
        for lane0 in range(0, LANES, blocks):
            d = choose_step(ideal, curve, lane0, blocks, last, parts, grid)
            for lane in range(lane0, lane0 + blocks):
                step[lane] = d
        choose_integers(xt, wt, span, last, reaches[0], step, ideal, best, work)
        for k in range(1, reaches.size):
            refit_step(xt, wt, span, blocks, step, best[0], other, work)
            for lane in range(LANES):
                ideal[lane] = step[lane] * best[0, lane]
            choose_integers(xt, wt, span, last, reaches[k], other, ideal, trial, work)
            keep_better(blocks, step, best, other, trial)
        for lane in range(LANES):
            ideal[lane] = step[lane] * best[0, lane]
        round_codes(xt, ideal, span, tile)
        for s in range(min(per_tile, count - first)):
            steps[first + s] = step[s * blocks]
            for j in range(blocks):
                integers[first + s, j] = np.int8(best[0, s * blocks + j])
                for i in range(elements):
                    codes[first + s, j, i] = tile[i, s * blocks + j]
