"""Search for the scale of block types whose codes name one of 16 levels: w = scale * level, levels unevenly spaced.

As in symmetric.py, sums over the residuals e = w / s - level tell how large the error of a scale s is and how the
scale should move under the same codes. The nearest level is found by comparing with the middles between levels, all
15 of them: vector code has no cheap way to look up a table.

Two kinds of stored scales: half precision, alone or times an integer per block, which least squares can fit; and
floats of a few bits, of which those near the block's range are tried one by one.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels.lanes import F16_MAX, FAST, INLINE, LANES, TINY, lane_rows, load_tile, round_f16, round_f16_lanes
from fewbits.kernels.symmetric import SEE, SEL, SLL, choose_step, keep_better

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Levels = tuple[np.float32, ...]
"""16 ascending levels, then the 15 middles between them: a tuple, since its scalars stay in registers."""
ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)


def with_middles(levels: tuple[float, ...]) -> Levels:
    """The `Levels` of up to 16 ascending levels; what is missing is filled up with levels that are never nearest."""
    middles = [(a + b) / 2 for a, b in pairwise(levels)]
    filled = [*levels, *[levels[-1]] * (16 - len(levels)), *middles, *[3e38] * (16 - len(levels))]
    return tuple(np.float32(v) for v in filled)


@njit(**INLINE)
def nearest(t: np.float32, v: Levels) -> np.float32:
    """The level nearest to t."""
    q = v[1] if t > v[16] else v[0]
    q = v[2] if t > v[17] else q
    q = v[3] if t > v[18] else q
    q = v[4] if t > v[19] else q
    q = v[5] if t > v[20] else q
    q = v[6] if t > v[21] else q
    q = v[7] if t > v[22] else q
    q = v[8] if t > v[23] else q
    q = v[9] if t > v[24] else q
    q = v[10] if t > v[25] else q
    q = v[11] if t > v[26] else q
    q = v[12] if t > v[27] else q
    q = v[13] if t > v[28] else q
    q = v[14] if t > v[29] else q
    return v[15] if t > v[30] else q


@njit(**INLINE)
def residuals(xt: F32, wt: F32, inverse: F32, v: Levels, sums: F32) -> None:
    """Sum what the levels nearest to x * inverse leave over, for 128 blocks.

    xt, wt [elements, 128], inverse [128] -> sums [3, 128].
    """
    for row in range(3):
        for lane in range(LANES):
            sums[row, lane] = ZERO
    for i in range(xt.shape[0]):
        for lane in range(LANES):
            t, w = xt[i, lane] * inverse[lane], wt[i, lane]
            q = nearest(t, v)
            e, a = t - q, w * q
            sums[SLL, lane] += a * q
            sums[SEL, lane] += a * e
            sums[SEE, lane] += w * e * e


@njit(**INLINE)
def squares(xt: F32, wt: F32, inverse: F32, v: Levels, see: F32) -> None:
    """Row SEE of `residuals` alone: see [128]."""
    for lane in range(LANES):
        see[lane] = ZERO
    for i in range(xt.shape[0]):
        for lane in range(LANES):
            t = xt[i, lane] * inverse[lane]
            e = t - nearest(t, v)
            see[lane] += wt[i, lane] * e * e


@njit(**INLINE)
def search(
    xt: F32, wt: F32, v: Levels, candidates: F32, refinements: int, half: bool, scale: F32, curve: F32, work: F32
) -> None:
    """Find the best signed scale of each of 128 blocks.

    Args:
        xt, wt: [elements, 128].
        candidates: the numbers at which the largest magnitude of a block is tried.
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
        residuals(xt, wt, inverse, v, sums)
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
def round_codes(xt: F32, scale: F32, v: Levels, codes: U8) -> None:
    """Which levels are nearest for scales that are settled: codes [elements, 128], 0 to 15."""
    for i in range(xt.shape[0]):
        for lane in range(LANES):
            s = scale[lane]
            t = xt[i, lane] / s if s != ZERO else ZERO
            code = np.int32(t > v[16]) + np.int32(t > v[17]) + np.int32(t > v[18]) + np.int32(t > v[19])
            code += np.int32(t > v[20]) + np.int32(t > v[21]) + np.int32(t > v[22]) + np.int32(t > v[23])
            code += np.int32(t > v[24]) + np.int32(t > v[25]) + np.int32(t > v[26]) + np.int32(t > v[27])
            code += np.int32(t > v[28]) + np.int32(t > v[29]) + np.int32(t > v[30])
            codes[i, lane] = np.uint8(code)


@njit(**FAST)
def encode_blocks(x: F32, importance: F32, v: Levels, candidates: F32, refinements: int, codes: U8, scale: F32) -> None:
    """Blocks with one half-precision scale each.

    Args:
        x: flat, row-major [rows, columns].
        importance: [columns].
        v, candidates, refinements: see `search`.
        codes: out, [blocks, elements].
        scale: out, [blocks], representable in half precision.
    """
    count, elements = codes.shape
    xt, wt = lane_rows(elements), lane_rows(elements)
    tile = np.empty((elements, LANES), np.uint8)
    work, lanes = lane_rows(9), lane_rows(2)
    found, curve = lanes[0], lanes[1]
    for first in range(0, count, LANES):
        load_tile(x, importance, first, count, xt, wt)
        search(xt, wt, v, candidates, refinements, True, found, curve, work)
        round_codes(xt, found, v, tile)
        for lane in range(min(LANES, count - first)):
            scale[first + lane] = found[lane]
            for i in range(elements):
                codes[first + lane, i] = tile[i, lane]


@njit(**INLINE)
def choose_integers(
    xt: F32, wt: F32, v: Levels, most: np.float32, reach: int, step: F32, ideal: F32, chosen: F32, work: F32
) -> None:
    """For each lane the integer near its ideal scale over its step, or 0, with the least error.

    Where no level is 0, only a scale of 0 stores zeros. chosen [2, 128] takes the integers and their errors.
    """
    inverse, whole, see, nearby = work[0], work[1], work[2], work[3]
    for lane in range(LANES):
        d = step[lane]
        nearby[lane] = np.floor(ideal[lane] / d + HALF) if d != ZERO else ZERO
        chosen[0, lane] = ZERO
        chosen[1, lane] = ZERO
    for i in range(xt.shape[0]):
        for lane in range(LANES):
            chosen[1, lane] += wt[i, lane] * xt[i, lane] * xt[i, lane]
    for k in range(-reach, reach + 1):
        for lane in range(LANES):
            whole[lane] = min(max(nearby[lane] + np.float32(k), -most), most - ONE)
            s = step[lane] * whole[lane]
            inverse[lane] = ONE / s if s != ZERO else ZERO
        squares(xt, wt, inverse, v, see)
        for lane in range(LANES):
            s, best, least, integer = step[lane] * whole[lane], chosen[0, lane], chosen[1, lane], whole[lane]
            left = see[lane] * s * s
            better = (left < least) & (s != ZERO)
            chosen[0, lane] = integer if better else best
            chosen[1, lane] = left if better else least


@njit(**INLINE)
def refit_step(xt: F32, wt: F32, v: Levels, blocks: int, step: F32, integer: F32, other: F32, work: F32) -> None:
    """The step of each super-block with the least error for the codes that `step` and `integer` give."""
    inverse, sums = work[0], work[3:6]
    for lane in range(LANES):
        s = step[lane] * integer[lane]
        inverse[lane] = ONE / s if s != ZERO else ZERO
    residuals(xt, wt, inverse, v, sums)
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
    v: Levels,
    most: int,
    candidates: F32,
    refinements: int,
    step_candidates: F32,
    reaches: npt.NDArray[np.int64],
    codes: U8,
    integers: npt.NDArray[np.int8],
    steps: F32,
) -> None:
    """Super-blocks whose blocks have an integer scale: a code's value is step * integer * level.

    Args:
        x: flat, row-major [rows, columns].
        importance: [columns].
        v, candidates, refinements: see `search`.
        most: integers run from -most to most - 1.
        step_candidates: the integers, whole or not, at which the largest block scale of a super-block is tried.
        reaches: how far from the nearest integer other block scales are tried: with the first step, then
            with each step that is fitted to the codes so far.
        codes: out, [super-blocks, blocks, elements].
        integers: out, [super-blocks, blocks].
        steps: out, [super-blocks], representable in half precision.
    """
    count, blocks, elements = codes.shape
    per_tile, last = LANES // blocks, np.float32(most)
    xt, wt = lane_rows(elements), lane_rows(elements)
    tile = np.empty((elements, LANES), np.uint8)
    work, lanes, grid = lane_rows(9), lane_rows(4), np.empty((4, step_candidates.size), np.float32)
    ideal, curve, step, other = lanes[0], lanes[1], lanes[2], lanes[3]
    best, trial = lane_rows(2), lane_rows(2)
    parts = ONE / step_candidates
    for first in range(0, count, per_tile):
        load_tile(x, importance, first * blocks, count * blocks, xt, wt)
        search(xt, wt, v, candidates, refinements, False, ideal, curve, work)
        for lane0 in range(0, LANES, blocks):
            d = choose_step(ideal, curve, lane0, blocks, last, parts, grid)
            for lane in range(lane0, lane0 + blocks):
                step[lane] = d
        choose_integers(xt, wt, v, last, reaches[0], step, ideal, best, work)
        for k in range(1, reaches.size):
            refit_step(xt, wt, v, blocks, step, best[0], other, work)
            for lane in range(LANES):
                ideal[lane] = step[lane] * best[0, lane]
            choose_integers(xt, wt, v, last, reaches[k], other, ideal, trial, work)
            keep_better(blocks, step, best, other, trial)
        for lane in range(LANES):
            ideal[lane] = step[lane] * best[0, lane]
        round_codes(xt, ideal, v, tile)
        for s in range(min(per_tile, count - first)):
            steps[first + s] = step[s * blocks]
            for j in range(blocks):
                integers[first + s, j] = np.int8(best[0, s * blocks + j])
                for i in range(elements):
                    codes[first + s, j, i] = tile[i, s * blocks + j]


@njit(**INLINE)
def nearest_small_floats(value: F32, mantissa: int, bias: int, index: F32) -> None:
    """Stored bytes, as float32, of the unsigned floats nearest to value: value, index [128], value not above 2e9."""
    bits = value.view(np.int32)
    offset, shift = np.int32((127 - bias) << mantissa), np.int32(23 - mantissa)
    half, normal = np.int32(1 << (22 - mantissa)), np.float32(2.0 ** (1 - bias))
    per_least = np.float32(2.0 ** (bias + mantissa - 1))
    for lane in range(LANES):
        index[lane] = np.float32(((bits[lane] + half) >> shift) - offset)
    for lane in range(LANES):
        y, k = value[lane], index[lane]
        index[lane] = np.floor(min(y, normal) * per_least + HALF) if y < normal else k


@njit(**INLINE)
def small_floats(index: F32, mantissa: int, bias: int, value: F32) -> None:
    """Values of the unsigned floats whose stored bytes are index: index, value [128]."""
    bits = value.view(np.int32)
    offset, shift = np.int32((127 - bias) << mantissa), np.int32(23 - mantissa)
    below, least = np.float32(1 << mantissa), np.float32(2.0 ** (1 - bias - mantissa))
    for lane in range(LANES):
        bits[lane] = (np.int32(index[lane]) + offset) << shift
    for lane in range(LANES):
        y, k = value[lane], index[lane]
        value[lane] = k * least if k < below else y


@njit(**FAST)
def encode_float_blocks(
    x: F32,
    importance: F32,
    v: Levels,
    mantissa: int,
    bias: int,
    highest: int,
    offsets: npt.NDArray[np.int64],
    codes: U8,
    scales: U8,
) -> None:
    """Blocks with a scale that is an unsigned float of a few bits.

    Args:
        x: flat, row-major [rows, columns].
        importance: [columns].
        v: the levels.
        mantissa, bias: bits of the mantissa and bias of the exponent: 0 and 127 for E8M0, 3 and 7 for UE4M3.
        highest: largest stored byte that is a number.
        offsets: the bytes that are tried, as distances from the one whose scale takes the largest magnitude to the
            last level.
        codes: out, [blocks, elements].
        scales: out, [blocks], as stored.
    """
    count, elements = codes.shape
    xt, wt = lane_rows(elements), lane_rows(elements)
    tile = np.empty((elements, LANES), np.uint8)
    work, part = lane_rows(7), ONE / v[15]
    start, index, best, error = work[0], work[1], work[2], work[3]
    inverse, see, scale = work[4], work[5], work[6, :LANES]
    for first in range(0, count, LANES):
        load_tile(x, importance, first, count, xt, wt)
        for lane in range(LANES):
            scale[lane] = ZERO
            best[lane] = ZERO
            error[lane] = ZERO
        for i in range(elements):
            for lane in range(LANES):
                y, largest = xt[i, lane], scale[lane]
                scale[lane] = max(abs(y), largest)
                error[lane] += wt[i, lane] * y * y
        for lane in range(LANES):
            scale[lane] *= part
        nearest_small_floats(scale, mantissa, bias, start)
        for k in range(offsets.size):
            for lane in range(LANES):
                index[lane] = min(max(start[lane] + np.float32(offsets[k]), ONE), np.float32(highest))
            small_floats(index, mantissa, bias, scale)
            for lane in range(LANES):
                s = scale[lane]
                inverse[lane] = ONE / s if s > TINY else ZERO
            squares(xt, wt, inverse, v, see)
            for lane in range(LANES):
                s, new, old, least = scale[lane], index[lane], best[lane], error[lane]
                left = see[lane] * s * s
                better = (left < least) & (s > TINY)
                best[lane] = new if better else old
                error[lane] = left if better else least
        small_floats(best, mantissa, bias, scale)
        round_codes(xt, scale, v, tile)
        for lane in range(min(LANES, count - first)):
            scales[first + lane] = np.uint8(best[lane])
            for i in range(elements):
                codes[first + lane, i] = tile[i, lane]
