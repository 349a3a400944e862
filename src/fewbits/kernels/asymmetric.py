"""Search for the scale and offset of block types: w = low + scale * code, codes from 0 to n.

For a candidate scale and offset the codes are l = round((w - low) / scale) and the residuals e = (w - low) / scale - l.
Five weighted sums over the residuals say everything that is asked here: how large the error is, and how scale and
offset should move (e ~ a l + b by least squares: scale (1 + a), low + b scale). Residuals are small, so float32 sums
do not cancel.

Everything is a plain module-level function: Numba cannot reuse compiled closures over other compiled functions in
the next process.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels.lanes import F16_MAX, FAST, LANES, TINY, lane_rows, load_tile, round_f16

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
INLINE = {**FAST, "inline": "always"}
"""Inlined, arrays are known not to overlap and loops over lanes become vector code: twice as fast."""
HUGE = np.float32(1e9)
"""Larger weights are searched as this: no code of these types reaches it, and its square stays in float32."""
NO_CEILING = np.float32(2e9)
WORST = np.float32(3e38)
F16_TINY = np.float32(2.0**-24)
FLAT = np.float32(1e-5)
"""Relative determinant below which all codes of a block count as equal."""
WL, WLL, WE, WEL, WEE = range(5)
"""Rows of `sums`: of the codes, their squares, the residuals, residuals times codes, squared residuals."""

# fmt: off
_STARTS = {
    3: (
        (-0.6, -0.2), (0.0, 0.2), (0.0, 0.0), (0.2, -0.3), (0.5, -0.75), (0.6, 0.0),
        (0.6, 0.2), (0.7, -0.65), (0.7, -0.25), (0.7, -0.45), (0.8, -0.4), (1.4, -1.2),
        (1.5, -0.45), (1.6, -0.3), (1.7, -1.15), (2.2, -1.0),
    ),
    15: (
        (-1.9, 1.05), (-1.8, 0.8), (-1.0, 0.8), (-0.9, -0.05), (-0.9, 0.15), (-0.2, 0.1),
        (-0.2, -0.1), (0.0, 0.2), (0.2, 0.2), (0.2, 0.0), (0.3, -0.45), (0.4, -0.2),
        (0.5, -0.35), (0.6, 0.2), (0.7, -0.15), (0.9, -0.75), (1.1, -1.05), (1.2, -0.7),
        (1.3, -0.55), (1.3, -0.25),
    ),
    31: (
        (-2.2, 0.6), (-2.2, 1.5), (-2.0, 1.2), (-2.0, 0.8), (-1.9, 0.95), (-1.2, 0.1),
        (-0.9, 0.75), (-0.9, 0.15), (-0.7, -0.15), (-0.3, 0.15), (-0.2, -0.1), (0.0, 0.3),
        (0.1, 0.05), (0.3, -0.45), (0.4, -0.3), (0.6, 0.2), (0.7, -0.05), (0.8, -0.3),
        (1.2, -1.1), (1.3, -0.85),
    ),
}
# fmt: on
CANDIDATES = {n: np.array(pairs, np.float32) + np.array([n, 0], np.float32) for n, pairs in _STARTS.items()}
"""For each largest code n: [candidates, 2], as `search` takes them.

Chosen greedily out of 400 pairs for the least error on Gaussian, Student-t(3) and real blocks with equal and with
lognormal importances: within 1.3 % of what all 400 give. Moving only the range, with the lowest weight at code 0,
leaves 6 % (n of 15 and 31) to 9 % (n of 3) more error however many ranges are tried.
"""
REFINEMENTS = 2
"""Rounds of alternating between codes and scales; more gain below 0.1 %."""


@njit(**INLINE)
def residuals(xt: F32, wt: F32, inverse: F32, shift: F32, top: np.float32, sums: F32) -> None:
    """Sum what codes leave over, for 128 blocks.

    Codes are round(x * inverse + shift) within 0..top; xt, wt [elements, 128], inverse, shift [128] -> sums [5, 128].
    """
    for row in range(5):
        for lane in range(LANES):
            sums[row, lane] = ZERO
    for i in range(0, xt.shape[0], 4):
        for lane in range(LANES):
            s, z = inverse[lane], shift[lane]
            t0, t1 = xt[i, lane] * s + z, xt[i + 1, lane] * s + z
            t2, t3 = xt[i + 2, lane] * s + z, xt[i + 3, lane] * s + z
            l0 = min(max(np.floor(t0 + HALF), ZERO), top)
            l1 = min(max(np.floor(t1 + HALF), ZERO), top)
            l2 = min(max(np.floor(t2 + HALF), ZERO), top)
            l3 = min(max(np.floor(t3 + HALF), ZERO), top)
            e0, e1, e2, e3 = t0 - l0, t1 - l1, t2 - l2, t3 - l3
            w0, w1, w2, w3 = wt[i, lane], wt[i + 1, lane], wt[i + 2, lane], wt[i + 3, lane]
            a0, a1, a2, a3 = w0 * l0, w1 * l1, w2 * l2, w3 * l3
            b0, b1, b2, b3 = w0 * e0, w1 * e1, w2 * e2, w3 * e3
            sums[WL, lane] += a0 + a1 + a2 + a3
            sums[WLL, lane] += a0 * l0 + a1 * l1 + a2 * l2 + a3 * l3
            sums[WE, lane] += b0 + b1 + b2 + b3
            sums[WEL, lane] += b0 * l0 + b1 * l1 + b2 * l2 + b3 * l3
            sums[WEE, lane] += b0 * e0 + b1 * e1 + b2 * e2 + b3 * e3


@njit(**INLINE)
def products(xt: F32, wt: F32, inverse: F32, shift: F32, top: np.float32, sums: F32) -> None:
    """Sum, for 128 blocks, the codes l, their squares and l t, t = x * inverse + shift: rows WL, WLL, WEL of sums.

    With the sums of t and t t, which need no codes, that is all least squares needs; two thirds of the work of
    `residuals`, but the error comes out as a difference of large numbers: good enough to compare candidates.
    """
    for row in (WL, WLL, WEL):
        for lane in range(LANES):
            sums[row, lane] = ZERO
    for i in range(0, xt.shape[0], 4):
        for lane in range(LANES):
            s, z = inverse[lane], shift[lane]
            t0, t1 = xt[i, lane] * s + z, xt[i + 1, lane] * s + z
            t2, t3 = xt[i + 2, lane] * s + z, xt[i + 3, lane] * s + z
            l0 = min(max(np.floor(t0 + HALF), ZERO), top)
            l1 = min(max(np.floor(t1 + HALF), ZERO), top)
            l2 = min(max(np.floor(t2 + HALF), ZERO), top)
            l3 = min(max(np.floor(t3 + HALF), ZERO), top)
            w0, w1, w2, w3 = wt[i, lane], wt[i + 1, lane], wt[i + 2, lane], wt[i + 3, lane]
            a0, a1, a2, a3 = w0 * l0, w1 * l1, w2 * l2, w3 * l3
            sums[WL, lane] += a0 + a1 + a2 + a3
            sums[WLL, lane] += a0 * l0 + a1 * l1 + a2 * l2 + a3 * l3
            sums[WEL, lane] += a0 * t0 + a1 * t1 + a2 * t2 + a3 * t3


@njit(**INLINE)
def search(
    xt: F32,
    wt: F32,
    top: np.float32,
    grid: F32,
    ceiling: np.float32,
    total: F32,
    scale: F32,
    low: F32,
    work: F32,
) -> None:
    """Find the best scale and offset of each of 128 blocks.

    Args:
        xt, wt: [elements, 128], elements a multiple of 4; xt is clipped to what float32 can square.
        top: the largest code.
        grid: [candidates, 2]: the range of a block is tried as so many codes, its lowest weight at such a code.
        ceiling: no offset is above this; zero, or anything beyond HUGE for no limit.
        total, scale, low: out, [128]; total is the sum of weights.
        work: [13, 128].
    """
    inverse, shift, bottom, extent, error, sums = work[0], work[1], work[2], work[3], work[4], work[5:10]
    wx, wxx, density = work[10], work[11], work[12]
    for lane in range(LANES):
        bottom[lane] = ceiling
        extent[lane] = -HUGE
        total[lane] = ZERO
        wx[lane] = ZERO
        wxx[lane] = ZERO
        scale[lane] = ZERO
        error[lane] = WORST
    for i in range(xt.shape[0]):
        for lane in range(LANES):
            x = min(max(xt[i, lane], -HUGE), HUGE)
            xt[i, lane] = x
            bottom[lane] = min(bottom[lane], x)
            extent[lane] = max(extent[lane], x)
    for i in range(xt.shape[0]):
        for lane in range(LANES):
            x = xt[i, lane] - bottom[lane]
            total[lane] += wt[i, lane]
            wx[lane] += wt[i, lane] * x
            wxx[lane] += wt[i, lane] * x * x
    for lane in range(LANES):
        size = extent[lane] - bottom[lane]
        extent[lane] = size
        density[lane] = ONE / max(size, TINY)
        density[lane] = density[lane] if size > TINY else ZERO
        low[lane] = bottom[lane]
    for k in range(grid.shape[0]):
        reach, start = grid[k, 0], grid[k, 1]
        whole = ONE / reach
        for lane in range(LANES):
            inverse[lane] = reach * density[lane]
            shift[lane] = start - bottom[lane] * inverse[lane]
        products(xt, wt, inverse, shift, top, sums)
        for lane in range(LANES):
            w, wl, wll, wtl = total[lane], sums[WL, lane], sums[WLL, lane], sums[WEL, lane]
            s, z, unit = inverse[lane], shift[lane], extent[lane] * whole
            old, old_scale, old_low = error[lane], scale[lane], low[lane]
            wt1 = s * wx[lane] + start * w
            wtt = s * (s * wxx[lane] + TWO * start * wx[lane]) + start * start * w
            determinant, least = w * wll - wl * wl, FLAT * w * wll + TINY
            b = (wll * wt1 - wl * wtl) / max(determinant, least)
            b = z if (b - z) * unit > ceiling else b
            a = (wtl - b * wl) / (wll + TINY)
            left = (wtt - TWO * (a * wtl + b * wt1 - a * b * wl) + a * a * wll + b * b * w) * unit * unit
            new_scale, new_low = a * unit, (b - z) * unit
            better = (s > ZERO) & (determinant > least) & (left < old) & (a > HALF)
            error[lane] = left if better else old
            scale[lane] = new_scale if better else old_scale
            low[lane] = new_low if better else old_low
    for lane in range(LANES):  # where no candidate was solvable, all weights but negligible ones are one value
        plain, old_scale = extent[lane] / top, scale[lane]
        plain = plain if extent[lane] > TINY else ZERO
        scale[lane] = plain if old_scale == ZERO else old_scale
        error[lane] = WORST
    for _ in range(REFINEMENTS):
        for lane in range(LANES):
            s = ONE / max(scale[lane], TINY)
            s = s if scale[lane] > TINY else ZERO
            inverse[lane] = s
            shift[lane] = -low[lane] * s
        residuals(xt, wt, inverse, shift, top, sums)
        for lane in range(LANES):
            w, wl, wll, we, wel = total[lane], sums[WL, lane], sums[WLL, lane], sums[WE, lane], sums[WEL, lane]
            s, old, old_low = scale[lane], error[lane], low[lane]
            determinant, least = w * wll - wl * wl, FLAT * w * wll + TINY
            b = (wll * we - wl * wel) / max(determinant, least)
            b = b if determinant > least else ZERO
            b = shift[lane] if old_low + b * s > ceiling else b
            a = (wel - b * wl) / (wll + TINY)
            left = (sums[WEE, lane] - TWO * (a * wel + b * we - a * b * wl) + a * a * wll + b * b * w) * s * s
            new_scale, new_low = s * (ONE + a), old_low + b * s
            better = (inverse[lane] > ZERO) & (left < old) & (a > -HALF)
            error[lane] = left if better else old
            scale[lane] = new_scale if better else s
            low[lane] = new_low if better else old_low


@njit(**INLINE)
def round_codes(xt: F32, scale: F32, low: F32, top: np.float32, work: F32, codes: U8) -> None:
    """The codes for scales and offsets that are settled: codes [elements, 128]."""
    inverse = work[0]
    for lane in range(LANES):
        inverse[lane] = ONE / scale[lane] if scale[lane] != ZERO else ZERO
    for i in range(xt.shape[0]):
        for lane in range(LANES):
            t = (xt[i, lane] - low[lane]) * inverse[lane]
            codes[i, lane] = np.uint8(np.int32(min(max(t + HALF, ZERO), top)))


@njit(**FAST)
def encode_blocks(x: F32, importance: F32, n: int, grid: F32, codes: U8, scale: F32, low: F32) -> None:
    """Blocks with one half-precision scale and one half-precision offset each.

    Args:
        x: flat, row-major [rows, columns].
        importance: [columns].
        n: codes run from 0 to n.
        grid: CANDIDATES[n].
        codes: out, [blocks, elements].
        scale, low: out, [blocks], representable in half precision.
    """
    count, elements = codes.shape
    top = np.float32(n)
    xt, wt = lane_rows(elements), lane_rows(elements)
    tile = np.empty((elements, LANES), np.uint8)
    work, lanes = lane_rows(13), lane_rows(3)
    total, scales, lows = lanes[0], lanes[1], lanes[2]
    for first in range(0, count, LANES):
        load_tile(x, importance, first, count, xt, wt)
        search(xt, wt, top, grid, NO_CEILING, total, scales, lows, work)
        for lane in range(LANES):
            scales[lane] = round_f16(scales[lane])
            lows[lane] = round_f16(lows[lane])
        round_codes(xt, scales, lows, top, work, tile)
        for lane in range(min(LANES, count - first)):
            scale[first + lane] = scales[lane]
            low[first + lane] = lows[lane]
            for i in range(elements):
                codes[first + lane, i] = tile[i, lane]


@njit(**INLINE)
def half_step(largest: np.float32, most: np.float32) -> np.float32:
    """The half-precision step with which integers up to `most` reach the largest; zero only for zero."""
    return max(round_f16(min(largest / most, F16_MAX)), F16_TINY) if largest > ZERO else ZERO


@njit(**INLINE)
def choose_integers(
    xt: F32,
    wt: F32,
    total: F32,
    scale: F32,
    low: F32,
    top: np.float32,
    most: np.float32,
    reach: int,
    steps: F32,
    pair: F32,
    work: F32,
) -> None:
    """For each lane the pair of integers (scale, offset) near its ideal scale and offset with the least error."""
    inverse, shift, whole, error, sums = work[0], work[1], work[2], work[4], work[5:10]
    for k in range(-reach, reach + 1):
        first = k == -reach
        for lane in range(LANES):
            d = steps[0, lane]
            p = min(max(np.floor(scale[lane] / max(d, TINY) + HALF) + np.float32(k), ONE), most)
            s = ONE / max(d * p, TINY)
            s = s if d > ZERO else ZERO
            whole[lane] = p
            inverse[lane] = s
            shift[lane] = -low[lane] * s
        residuals(xt, wt, inverse, shift, top, sums)
        for lane in range(LANES):
            w, we, wee, p, m = total[lane], sums[WE, lane], sums[WEE, lane], whole[lane], steps[1, lane]
            old, old_p, old_q = error[lane], pair[0, lane], pair[1, lane]
            s = steps[0, lane] * p
            q = min(max(np.floor(HALF - (low[lane] + s * we / w) / max(m, TINY)), ZERO), most)
            q = q if m > ZERO else ZERO
            b = (-q * m - low[lane]) * inverse[lane]
            left = (wee - TWO * b * we + b * b * w) * s * s
            better = (left < old) | first
            error[lane] = left if better else old
            pair[0, lane] = p if better else old_p
            pair[1, lane] = q if better else old_q


@njit(**INLINE)
def measure(xt: F32, wt: F32, top: np.float32, steps: F32, pair: F32, error: F32, work: F32) -> None:
    """Errors of the lanes with codes rounded for these steps and integers; work[5:10] keeps the sums."""
    inverse, shift = work[0], work[1]
    for lane in range(LANES):
        s = steps[0, lane] * pair[0, lane]
        inverse[lane] = ONE / max(s, TINY) if s > ZERO else ZERO
        shift[lane] = steps[1, lane] * pair[1, lane] * inverse[lane]
    residuals(xt, wt, inverse, shift, top, work[5:10])
    for lane in range(LANES):
        s = steps[0, lane] * pair[0, lane]
        error[lane] = work[5 + WEE, lane] * s * s


@njit(**INLINE)
def refit_steps(total: F32, blocks: int, steps: F32, pair: F32, work: F32, other: F32) -> None:
    """The two steps of each super-block with the least error for the codes that `measure` saw."""
    sums = work[5:10]
    for lane0 in range(0, LANES, blocks):
        aa, ab, bb, ra, rb = ZERO, ZERO, ZERO, ZERO, ZERO
        d, m = steps[0, lane0], steps[1, lane0]
        for lane in range(lane0, lane0 + blocks):
            p, q = pair[0, lane], -pair[1, lane]
            s = d * p
            aa += p * p * sums[WLL, lane]
            ab += p * q * sums[WL, lane]
            bb += q * q * total[lane]
            ra += p * s * sums[WEL, lane]
            rb += q * s * sums[WE, lane]
        determinant = aa * bb - ab * ab
        if determinant > np.float32(1e-4) * aa * bb:
            d += (bb * ra - ab * rb) / determinant
            m += (aa * rb - ab * ra) / determinant
        elif aa > ZERO:
            d += ra / aa
        d = max(round_f16(min(max(d, ZERO), F16_MAX)), F16_TINY)
        m = round_f16(min(max(m, ZERO), F16_MAX))
        for lane in range(lane0, lane0 + blocks):
            other[0, lane] = d
            other[1, lane] = m


@njit(**FAST)
def encode_super_blocks(
    x: F32,
    importance: F32,
    n: int,
    most: int,
    grid: F32,
    reach: int,
    rounds: int,
    codes: U8,
    integers: U8,
    steps: F32,
) -> None:
    """Super-blocks whose blocks have an integer scale and an integer offset.

    The value of a code is step 0 * integer 0 * code - step 1 * integer 1.

    Args:
        x: flat, row-major [rows, columns].
        importance: [columns].
        n: codes run from 0 to n.
        most: integers run from 0 to this.
        grid, refinements: see `search`.
        reach: how far from the nearest integer other block scales are tried.
        rounds: how often the steps are fitted to the codes and the integers chosen anew.
        codes: out, [super-blocks, blocks, elements].
        integers: out, [super-blocks, 2, blocks].
        steps: out, [super-blocks, 2], representable in half precision.
    """
    count, blocks, elements = codes.shape
    per_tile = LANES // blocks
    top, last = np.float32(n), np.float32(most)
    xt, wt = lane_rows(elements), lane_rows(elements)
    tile = np.empty((elements, LANES), np.uint8)
    work, lanes = lane_rows(13), lane_rows(5)
    total, scale, low, error, other_error = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    best, pair = lane_rows(2), lane_rows(2)
    other, other_pair = lane_rows(2), lane_rows(2)
    for first in range(0, count, per_tile):
        load_tile(x, importance, first * blocks, count * blocks, xt, wt)
        search(xt, wt, top, grid, ZERO, total, scale, low, work)
        for lane0 in range(0, LANES, blocks):
            largest, deepest = ZERO, ZERO
            for lane in range(lane0, lane0 + blocks):
                largest = max(largest, scale[lane])
                deepest = max(deepest, -low[lane])
            d, m = half_step(largest, last), half_step(deepest, last)
            for lane in range(lane0, lane0 + blocks):
                best[0, lane] = d
                best[1, lane] = m
        choose_integers(xt, wt, total, scale, low, top, last, reach, best, pair, work)
        measure(xt, wt, top, best, pair, error, work)
        for k in range(rounds):
            refit_steps(total, blocks, best, pair, work, other)
            if k < rounds - 1:
                choose_integers(xt, wt, total, scale, low, top, last, reach, other, other_pair, work)
            else:
                for lane in range(LANES):
                    other_pair[0, lane] = pair[0, lane]
                    other_pair[1, lane] = pair[1, lane]
            measure(xt, wt, top, other, other_pair, other_error, work)
            for lane0 in range(0, LANES, blocks):
                gain = ZERO
                for lane in range(lane0, lane0 + blocks):
                    gain += error[lane] - other_error[lane]
                if gain > ZERO and best[0, lane0] > ZERO:
                    for lane in range(lane0, lane0 + blocks):
                        error[lane] = other_error[lane]
                        for row in range(2):
                            best[row, lane] = other[row, lane]
                            pair[row, lane] = other_pair[row, lane]
            if k < rounds - 1:
                measure(xt, wt, top, best, pair, error, work)
        for lane in range(LANES):
            scale[lane] = best[0, lane] * pair[0, lane]
            low[lane] = -best[1, lane] * pair[1, lane]
        round_codes(xt, scale, low, top, work, tile)
        for s in range(min(per_tile, count - first)):
            for row in range(2):
                steps[first + s, row] = best[row, s * blocks]
                used = best[row, s * blocks] > ZERO
                for j in range(blocks):
                    integers[first + s, row, j] = np.uint8(pair[row, s * blocks + j]) if used else np.uint8(0)
            for j in range(blocks):
                for i in range(elements):
                    codes[first + s, j, i] = tile[i, s * blocks + j]
