"""Search for the scales, and integer zero points, of groups of weights whose scale has a type of its own.

value = scale * (level - zero): the level is an integer, or one of at most 16 that a table holds and the zero is 0. As
in symmetric.py, sums over the residuals e = w / s - (level - zero) tell how large the error of a scale s is, and how
the scale should move under the same codes. A scale is judged as its type stores it, and the scale to begin with is
left only for a smaller error.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels import asymmetric
from fewbits.kernels import levels as tables
from fewbits.kernels.lanes import FAST, INLINE, LANES, TINY, lane_rows, load_tile, round_f16_lanes
from fewbits.kernels.levels import Levels
from fewbits.kernels.symmetric import SEE, SEL, SLL, WORST

F32 = npt.NDArray[np.float32]
ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
PLAIN, F16, BF16, E4M3, E8M0 = range(5)
"""Types of scales; E4M3 ones are stored times the matrix' global scale."""
F16_TINY, E4M3_TINY, E4M3_NORMAL = np.float32(2.0**-24), np.float32(2.0**-9), np.float32(2.0**-6)
E4M3_STEPS = np.float32(2.0**9)
E4M3_MAX, E8M0_MAX = np.float32(448), np.float32(2.0**125)
DOUBT = np.float32(1 - 2e-6)
"""Smaller gains are the rounding of float32 sums."""


@njit(**INLINE)
def round_scales(scales: F32, kind: int, factor: np.float32, bits: F32) -> None:
    """Make scales [128] what their stored type decodes to, in place; none becomes zero. bits: work, [128]."""
    if kind == F16:
        round_f16_lanes(scales, bits.view(np.int32))
        for lane in range(LANES):
            s = scales[lane]
            scales[lane] = np.copysign(F16_TINY, s) if abs(s) < F16_TINY else s
    elif kind == BF16:
        whole, rounded = scales.view(np.int32), bits.view(np.int32)
        for lane in range(LANES):
            b = whole[lane]
            rounded[lane] = (b + np.int32(0x7FFF) + ((b >> np.int32(16)) & np.int32(1))) & np.int32(-0x10000)
        for lane in range(LANES):
            scales[lane] = bits[lane]
    elif kind == E4M3:
        whole, rounded = scales.view(np.int32), bits.view(np.int32)
        inverse = ONE / factor
        for lane in range(LANES):
            scales[lane] = min(abs(scales[lane] * factor), E4M3_MAX)
        for lane in range(LANES):
            b = whole[lane]
            rounded[lane] = (b + np.int32(0x7FFFF) + ((b >> np.int32(20)) & np.int32(1))) & np.int32(-0x100000)
        for lane in range(LANES):
            v, r = scales[lane], bits[lane]
            small = max(np.rint(v * E4M3_STEPS), ONE) * E4M3_TINY
            scales[lane] = (small if v < E4M3_NORMAL else r) * inverse
    elif kind == E8M0:
        whole, rounded = scales.view(np.int32), bits.view(np.int32)
        for lane in range(LANES):
            b = whole[lane] & np.int32(0x7FFFFFFF)
            rounded[lane] = max((b + np.int32(0x400000)) & np.int32(0x7F800000), np.int32(0x800000))
        for lane in range(LANES):
            scales[lane] = min(bits[lane], E8M0_MAX)


@njit(**INLINE)
def residuals(xt: F32, wt: F32, inverse: F32, bottom: F32, top: F32, sums: F32) -> None:
    """Sum what integers leave over, for 128 groups.

    Levels less their zero are c = round(x * inverse) within bottom..top; xt, wt [elements, 128], the others [128] ->
    sums [3, 128].
    """
    for row in range(3):
        for lane in range(LANES):
            sums[row, lane] = ZERO
    whole = xt.shape[0] - xt.shape[0] % 2
    for i in range(0, whole, 2):
        for lane in range(LANES):
            s, low, high = inverse[lane], bottom[lane], top[lane]
            t0, t1 = xt[i, lane] * s, xt[i + 1, lane] * s
            c0, c1 = min(max(np.rint(t0), low), high), min(max(np.rint(t1), low), high)
            w0, w1 = wt[i, lane], wt[i + 1, lane]
            e0, e1, a0, a1 = t0 - c0, t1 - c1, w0 * c0, w1 * c1
            sums[SLL, lane] += a0 * c0 + a1 * c1
            sums[SEL, lane] += a0 * e0 + a1 * e1
            sums[SEE, lane] += w0 * e0 * e0 + w1 * e1 * e1
    for i in range(whole, xt.shape[0]):
        for lane in range(LANES):
            t, w = xt[i, lane] * inverse[lane], wt[i, lane]
            c = min(max(np.rint(t), bottom[lane]), top[lane])
            e = t - c
            sums[SLL, lane] += w * c * c
            sums[SEL, lane] += w * c * e
            sums[SEE, lane] += w * e * e


@njit(**INLINE)
def keep_better(
    spacing: F32, sums: F32, zero: F32, kind: int, factor: np.float32, unit: F32, best: F32, found: F32, bits: F32
) -> None:
    """Take the scales `spacing`, or those that fit its codes best, where they have the least error so far.

    Args:
        spacing: [128], stored scales.
        sums: [3, 128], of the residuals for them.
        zero: [128], their zeros.
        unit: [128], the inverse of the scale in whose squares errors are given.
        best: [3, 128]: error, scale, zero.
        found, bits: work, [128].
    """
    for lane in range(LANES):
        found[lane] = spacing[lane] + spacing[lane] * (sums[SEL, lane] / max(sums[SLL, lane], TINY))
    round_scales(found, kind, factor, bits)
    for lane in range(LANES):
        s, new, sel, sll, see = spacing[lane], found[lane], sums[SEL, lane], sums[SLL, lane], sums[SEE, lane]
        least, old, old_zero, z = best[0, lane], best[1, lane], best[2, lane], zero[lane]
        a = (new - s) / s if s != ZERO else ZERO
        part = s * unit[lane]
        stay, move = see * part * part, (see - a * (TWO * sel - a * sll)) * part * part
        moved = move < stay * DOUBT
        left = move if moved else stay
        left = left if abs(s) > TINY else WORST
        better = left < least * DOUBT
        best[0, lane] = left if better else least
        best[1, lane] = (new if moved else s) if better else old
        best[2, lane] = z if better else old_zero


@njit(**FAST)
def search_scales(
    x: F32,
    importance: F32,
    elements: int,
    v: Levels,
    lowest: np.float32,
    highest: np.float32,
    candidates: F32,
    signed: bool,
    refinements: int,
    kind: int,
    factor: np.float32,
    scale: F32,
) -> None:
    """Groups without zero points, or with a constant one.

    Args:
        x: flat, row-major [rows, columns].
        importance: [columns].
        elements: of a group; they divide the columns.
        v: the levels of a table; not looked at where the levels are integers.
        lowest, highest: of the integers less their zero; both 0: the levels are those of the table.
        candidates: levels as which the largest magnitude of a group is tried; negative ones give scales of the sign
            opposite to that of this largest weight.
        signed: whether scales may be negative.
        refinements: further rounds in which the best scale so far is the candidate.
        kind, factor: how scales are stored; factor is the matrix' global scale.
        scale: in and out, [groups]: the scale to begin with, and the best one.
    """
    uniform = lowest != highest
    count = scale.size
    xt, wt = lane_rows(elements), lane_rows(elements)
    lanes, sums, best = lane_rows(9), lane_rows(3), lane_rows(3)
    peak, spacing, inverse, unit, zero = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    bottom, top, found, bits = lanes[5], lanes[6], lanes[7, :LANES], lanes[8, :LANES]
    for lane in range(LANES):
        zero[lane] = ZERO
        bottom[lane] = lowest
        top[lane] = highest
    for first in range(0, count, LANES):
        load_tile(x, importance, first, count, xt, wt)
        for lane in range(LANES):
            s = scale[min(first + lane, count - 1)]
            unit[lane] = ONE / s if s != ZERO else ZERO
            best[0, lane] = WORST if abs(s) > TINY else ZERO
            best[1, lane] = s
            peak[lane] = ZERO
        for i in range(elements):
            for lane in range(LANES):
                value, largest = xt[i, lane], peak[lane]
                peak[lane] = value if abs(value) > abs(largest) else largest
        for k in range(-1, candidates.size + refinements):
            if 0 <= k < candidates.size:
                part = ONE / candidates[k]
                for lane in range(LANES):
                    s = peak[lane] * part
                    spacing[lane] = s if signed else abs(s)
                round_scales(spacing[:LANES], kind, factor, bits)
            else:
                for lane in range(LANES):
                    spacing[lane] = best[1, lane]
            for lane in range(LANES):
                s = spacing[lane]
                inverse[lane] = ONE / s if abs(s) > TINY else ZERO
            if uniform:
                residuals(xt, wt, inverse, bottom, top, sums)
            else:
                tables.residuals(xt, wt, inverse, v, sums)
            keep_better(spacing, sums, zero, kind, factor, unit, best, found, bits)
        for lane in range(min(LANES, count - first)):
            scale[first + lane] = best[1, lane]


@njit(**FAST)
def search_pairs(
    x: F32,
    importance: F32,
    elements: int,
    most: np.float32,
    candidates: F32,
    kind: int,
    factor: np.float32,
    scale: F32,
    zeros: F32,
) -> None:
    """Groups with integer zero points.

    Args:
        x, importance, elements, kind, factor: as for `search_scales`.
        most: codes and zero points run from 0 to this.
        candidates: [candidates, 2]: codes that the range of a group spans, and the code of its lowest weight.
        scale, zeros: in and out, [groups]: the pair to begin with, and the best one.
    """
    count = scale.size
    xt, wt = lane_rows(elements), lane_rows(elements)
    lanes, sums, best = lane_rows(10), lane_rows(3), lane_rows(3)
    low, high, spacing, inverse, unit = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    bottom, top, zero, found, bits = lanes[5], lanes[6], lanes[7], lanes[8, :LANES], lanes[9, :LANES]
    tried = candidates.shape[0]
    for first in range(0, count, LANES):
        load_tile(x, importance, first, count, xt, wt)
        for lane in range(LANES):
            s = scale[min(first + lane, count - 1)]
            unit[lane] = ONE / s if s != ZERO else ZERO
            best[0, lane] = WORST if abs(s) > TINY else ZERO
            best[1, lane] = s
            best[2, lane] = zeros[min(first + lane, count - 1)]
            low[lane] = ZERO
            high[lane] = ZERO
        for i in range(elements):
            for lane in range(LANES):
                low[lane] = min(low[lane], xt[i, lane])
                high[lane] = max(high[lane], xt[i, lane])
        for k in range(-1, tried + 3):
            if 0 <= k < tried:
                part, start = ONE / candidates[k, 0], candidates[k, 1]
                for lane in range(LANES):
                    spacing[lane] = (high[lane] - low[lane]) * part
                round_scales(spacing[:LANES], kind, factor, bits)
                for lane in range(LANES):
                    s = spacing[lane]
                    z = start - low[lane] / (s if s > TINY else ONE)
                    zero[lane] = min(max(np.rint(z), ZERO), most)
            else:
                # the best so far, and its neighbours
                step = ZERO if k < 0 else np.float32((0, 1, -1)[k - tried])
                for lane in range(LANES):
                    spacing[lane] = best[1, lane]
                    zero[lane] = min(max(best[2, lane] + step, ZERO), most)
            for lane in range(LANES):
                s = spacing[lane]
                inverse[lane] = ONE / s if s > TINY else ZERO
                bottom[lane] = -zero[lane]
                top[lane] = most - zero[lane]
            residuals(xt, wt, inverse, bottom, top, sums)
            keep_better(spacing, sums, zero, kind, factor, unit, best, found, bits)
        for lane in range(min(LANES, count - first)):
            scale[first + lane] = best[1, lane]
            zeros[first + lane] = best[2, lane]


@njit(**INLINE)
def round_float(t: np.float32) -> np.float32:
    """The magnitude of the nearest E4M3 value, ties to even."""
    size = np.float32(min(abs(t), E4M3_MAX))
    bits = size.view(np.int32)
    bits = np.int32((bits + np.int32(0x7FFFF) + ((bits >> np.int32(20)) & np.int32(1))) & np.int32(-0x100000))
    small = np.rint(size * E4M3_STEPS) * E4M3_TINY
    return small if size < E4M3_NORMAL else bits.view(np.float32)


@njit(**FAST)
def search_floats(x: F32, importance: F32, high: int, wide: int, scales: F32, error: F32) -> None:
    """Sum the weighted squared errors of 8-bit floats for several scales of each block.

    Args:
        x: [rows, columns].
        importance: [columns].
        high, wide: of a block; those at the ends may be smaller.
        scales: [candidates, grid rows, grid columns].
        error: out, like scales, in units of the first candidate squared.
    """
    rows, columns = x.shape
    error[:] = ZERO
    for r in range(rows):
        g, line = r // high, x[r]
        for j in range(scales.shape[2]):
            start, stop = j * wide, min((j + 1) * wide, columns)
            # of slices Numba knows that no index is negative, and vector code loads them whole
            part_of_line, weight = line[start:stop], importance[start:stop]
            unit = ONE / scales[0, g, j]
            for k in range(scales.shape[0]):
                s = scales[k, g, j]
                inverse, part, total = ONE / s, s * unit, ZERO
                for c in range(part_of_line.size):
                    t = part_of_line[c] * inverse
                    e = abs(t) - round_float(t)
                    total += weight[c] * e * e
                error[k, g, j] += total * part * part


@njit(**FAST)
def search_free(x: F32, importance: F32, elements: int, most: np.float32, grid: F32, scale: F32, low: F32) -> None:
    """Groups with a scale and an offset in float32: code 0 stands for low.

    Args:
        x, importance, elements: as for `search_scales`; elements are a multiple of 4.
        most: the largest code.
        grid: see asymmetric.search.
        scale, low: out, [groups].
    """
    xt, wt = lane_rows(elements), lane_rows(elements)
    work, lanes = lane_rows(14), lane_rows(4)
    total, mean, scales, lows = lanes[0], lanes[1], lanes[2], lanes[3]
    for first in range(0, scale.size, LANES):
        load_tile(x, importance, first, scale.size, xt, wt)
        asymmetric.search(xt, wt, most, grid, asymmetric.NO_CEILING, total, mean, scales, lows, work)
        for lane in range(min(LANES, scale.size - first)):
            scale[first + lane] = scales[lane]
            low[first + lane] = mean[lane] + lows[lane]
