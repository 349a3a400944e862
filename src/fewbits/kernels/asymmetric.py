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

from fewbits.kernels.lanes import EXACT, F16_MAX, FAST, LANES, TINY, from_f16, lane_rows, load_tile, round_f16, to_f16

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
INLINE = {**FAST, "inline": "always"}
"""Inlined, arrays are known not to overlap and loops over lanes become vector code: twice as fast."""
HUGE = np.float32(1e9)
"""Larger weights are searched as this: no code of these types reaches it, and its square stays in float32."""
NO_CEILING = np.float32(2e9)
WORST = np.float32(1e36)
F16_TINY = np.float32(2.0**-24)
FLAT = np.float32(1e-6)
"""Relative determinant below which all codes of a block count as equal."""
DOUBT = np.float32(2e-6)
"""By this part of a block's variance, the rounding of float32 sums, a later candidate must beat a preferred one."""
PREFERRED = 2
"""So many of the candidates: those that hold blocks of two and of three evenly spaced values exactly."""
SHALLOW = np.float32(0.92)
"""Second start of a super-block's offsets: the deepest is cut to this, or to the mean offset if that is more."""
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
_WHOLE = 1e4
_CUT = ((0.0, 0.0, 1.1), (0.0, 0.0, 1.9), (0.0, 0.0, 2.6))


def candidates(n: int) -> F32:
    """What `search` tries for codes 0..n: [candidates, 3]."""
    rows = [(0.0, 0.0, _WHOLE), (-1.0, 0.0, _WHOLE), *((*pair, _WHOLE) for pair in _STARTS[n]), *_CUT]
    return np.array(rows, np.float32) + np.array([n, 0, 0], np.float32)


CANDIDATES = {n: candidates(n) for n in _STARTS}
"""For each largest code n.

_STARTS were chosen greedily out of 400 pairs for the least error on Gaussian, Student-t(3) and real blocks with equal
and with lognormal importances: within 1.3 % of what all 400 give. Moving only the range, with the lowest weight at
code 0, leaves 6 % (n of 15 and 31) to 9 % (n of 3) more error however many ranges are tried. _CUT gives up outliers
that matter little: without it, the rest of such a block falls onto two or three codes.
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
    """Sum, for 128 blocks, c = l - shift, c c and c x: rows WL, WLL, WEL of sums.

    Codes are l = round(x * inverse + shift) within 0..top. Where the weighted mean of x is zero, that is all least
    squares needs, for two thirds of the work of `residuals`; the error comes out as a difference, good enough to
    compare candidates.
    """
    for row in (WL, WLL, WEL):
        for lane in range(LANES):
            sums[row, lane] = ZERO
    for i in range(0, xt.shape[0], 4):
        for lane in range(LANES):
            s, z = inverse[lane], shift[lane]
            x0, x1, x2, x3 = xt[i, lane], xt[i + 1, lane], xt[i + 2, lane], xt[i + 3, lane]
            c0 = min(max(np.floor(x0 * s + z + HALF), ZERO), top) - z
            c1 = min(max(np.floor(x1 * s + z + HALF), ZERO), top) - z
            c2 = min(max(np.floor(x2 * s + z + HALF), ZERO), top) - z
            c3 = min(max(np.floor(x3 * s + z + HALF), ZERO), top) - z
            w0, w1, w2, w3 = wt[i, lane], wt[i + 1, lane], wt[i + 2, lane], wt[i + 3, lane]
            a0, a1, a2, a3 = w0 * c0, w1 * c1, w2 * c2, w3 * c3
            sums[WL, lane] += a0 + a1 + a2 + a3
            sums[WLL, lane] += a0 * c0 + a1 * c1 + a2 * c2 + a3 * c3
            sums[WEL, lane] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3


@njit(**INLINE)
def search(
    xt: F32,
    wt: F32,
    top: np.float32,
    grid: F32,
    ceiling: np.float32,
    total: F32,
    mean: F32,
    scale: F32,
    low: F32,
    work: F32,
) -> None:
    """Find the best scale and offset of each of 128 blocks.

    Args:
        xt, wt: [elements, 128], elements a multiple of 4; xt is clipped to what float32 can square, and its weighted
            mean is subtracted, so that a few heavy weights cancel in no sum.
        top: the largest code.
        grid: [candidates, 3]: codes that the range of a block spans, code of its lowest weight, and weighted deviations
            about the mean to which the range is cut.
        ceiling: no offset is above this; zero, or anything beyond HUGE for no limit.
        total, mean: out, [128]; the sum and the mean of the weights.
        scale, low: out, [128]; low is the offset less the mean.
        work: [14, 128].
    """
    inverse, shift, bottom, peak, error, sums = work[0], work[1], work[2], work[3], work[4], work[5:10]
    square, spread, roof, unit = work[10], work[11], work[12], work[13]
    for lane in range(LANES):
        total[lane] = ZERO
        mean[lane] = ZERO
    for i in range(xt.shape[0]):
        for lane in range(LANES):
            x = min(max(xt[i, lane], -HUGE), HUGE)
            xt[i, lane] = x
            total[lane] += wt[i, lane]
            mean[lane] += wt[i, lane] * x
    for lane in range(LANES):
        mean[lane] = mean[lane] / total[lane]
        roof[lane] = ceiling - mean[lane]
        bottom[lane] = roof[lane]
        peak[lane] = -HUGE
        square[lane] = ZERO
    for i in range(xt.shape[0]):
        for lane in range(LANES):
            x = xt[i, lane] - mean[lane]
            xt[i, lane] = x
            bottom[lane] = min(bottom[lane], x)
            peak[lane] = max(peak[lane], x)
            square[lane] += wt[i, lane] * x * x
    for lane in range(LANES):
        spread[lane] = np.sqrt(square[lane] / total[lane])
        low[lane] = bottom[lane]
        scale[lane] = ZERO
        error[lane] = WORST
    for k in range(grid.shape[0]):
        reach, start, clip = grid[k, 0], grid[k, 1], grid[k, 2]
        whole, doubt = ONE / reach, DOUBT if k < PREFERRED else ZERO
        for lane in range(LANES):
            base = min(max(bottom[lane], -clip * spread[lane]), roof[lane])
            size = min(peak[lane], clip * spread[lane]) - base
            s = reach / max(size, TINY)
            s = s if size > TINY else ZERO
            unit[lane] = size * whole
            inverse[lane] = s
            shift[lane] = start - base * s
        products(xt, wt, inverse, shift, top, sums)
        for lane in range(LANES):
            w, wl, wll, wxl = total[lane], sums[WL, lane], sums[WLL, lane], sums[WEL, lane]
            s, z, m = inverse[lane], shift[lane], roof[lane]
            old, old_scale, old_low = error[lane], scale[lane], low[lane]
            determinant, least = w * wll - wl * wl, FLAT * w * wll + TINY
            a = w * wxl / max(determinant, least)
            b = -a * (wl / w + z)
            left = square[lane] - a * wxl
            high, wt1 = b > m, wl + z * w  # an offset above the limit becomes the limit, the scale follows
            r = wxl - m * wt1
            a = r / (wll + z * (wl + wt1) + TINY) if high else a
            left = square[lane] + m * m * w - a * r if high else left
            b = m if high else b
            sane = (s > ZERO) & (determinant > least) & (a > HALF * unit[lane]) & (a < TWO * unit[lane])
            better = sane & (left < old)
            error[lane] = left - doubt * square[lane] if better else old
            scale[lane] = a if better else old_scale
            low[lane] = b if better else old_low
    for lane in range(LANES):  # where no candidate was solvable, all weights but negligible ones are one value
        extent, old_scale = peak[lane] - bottom[lane], scale[lane]
        plain = extent / top if extent > TINY else ZERO
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
            s, old, old_low, m = scale[lane], error[lane], low[lane], roof[lane]
            determinant, least = w * wll - wl * wl, FLAT * w * wll + TINY
            b = (wll * we - wl * wel) / max(determinant, least)
            b = b if determinant > least else ZERO
            b = (m - old_low) * inverse[lane] if old_low + b * s > m else b
            a = (wel - b * wl) / (wll + TINY)
            left = (sums[WEE, lane] - TWO * (a * wel + b * we - a * b * wl) + a * a * wll + b * b * w) * s * s
            new_scale, new_low = s * (ONE + a), old_low + b * s
            better = (inverse[lane] > ZERO) & (left < old) & (a > -HALF) & (a < ONE)
            error[lane] = left if better else old
            scale[lane] = new_scale if better else s
            low[lane] = new_low if better else old_low


@njit(**INLINE)
def round_codes(xt: F32, mean: F32, scale: F32, low: F32, top: np.float32, work: F32, codes: U8) -> None:
    """The codes for scales and offsets that are settled: codes [elements, 128]."""
    inverse, gap = work[0], work[1]
    for lane in range(LANES):
        gap[lane] = mean[lane] - low[lane]
        inverse[lane] = ONE / scale[lane] if scale[lane] != ZERO else ZERO
    for i in range(xt.shape[0]):
        for lane in range(LANES):
            t = (xt[i, lane] + gap[lane]) * inverse[lane]
            codes[i, lane] = np.uint8(np.int32(min(max(t + HALF, ZERO), top)))


@njit(**EXACT)
def next_f16(value: np.float32, step: int) -> np.float32:
    """The half so many places from this half, away from zero for positive steps; itself at the ends."""
    bits = np.int32(to_f16(value))
    magnitude = (bits & 0x7FFF) + step
    if magnitude < 0 or magnitude > 0x7BFF:
        return value
    return from_f16(np.uint16((bits & 0x8000) | magnitude))


@njit(**INLINE)
def settle(xt: F32, wt: F32, mean: F32, scale: F32, low: F32, top: np.float32, work: F32) -> None:
    """Round to half precision: the offset to the nearest or a neighbour, the scale so that it fits with that.

    Afterwards low is the offset itself.
    """
    inverse, shift, nearest, step, error, sums, point = (
        work[0],
        work[1],
        work[2],
        work[3],
        work[4],
        work[5:10],
        work[10],
    )
    for lane in range(LANES):
        offset = mean[lane] + low[lane]
        nearest[lane] = round_f16(offset)
        # a scale below this could not make up for the rounding of the offset
        step[lane] = max(scale[lane], abs(offset) * np.float32(2.0**-11) / top, F16_TINY)
        inverse[lane] = ONE / step[lane]
        error[lane] = WORST
    for k in (0, 1, -1):
        for lane in range(LANES):
            point[lane] = next_f16(nearest[lane], k)
            shift[lane] = (mean[lane] - point[lane]) * inverse[lane]
        residuals(xt, wt, inverse, shift, top, sums)
        for lane in range(LANES):
            wll, wel, wee, s = sums[WLL, lane], sums[WEL, lane], sums[WEE, lane], step[lane]
            old, old_scale, old_low = error[lane], scale[lane], low[lane]
            fitted = round_f16(s + s * wel / (wll + TINY))
            fitted = fitted if wll > ZERO else ZERO
            a = fitted * inverse[lane] - ONE
            left = wee - TWO * a * wel + a * a * wll
            better = left < old
            error[lane] = left if better else old
            scale[lane] = fitted if better else old_scale
            low[lane] = point[lane] if better else old_low


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
    work, lanes = lane_rows(14), lane_rows(4)
    total, mean, scales, lows = lanes[0], lanes[1], lanes[2], lanes[3]
    for first in range(0, count, LANES):
        load_tile(x, importance, first, count, xt, wt)
        search(xt, wt, top, grid, NO_CEILING, total, mean, scales, lows, work)
        settle(xt, wt, mean, scales, lows, top, work)
        round_codes(xt, mean, scales, lows, top, work, tile)
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
def start_steps(mean: F32, scale: F32, low: F32, most: np.float32, blocks: int, shallow: bool, steps: F32) -> None:
    """Steps that just reach the largest scale and the deepest offset of each super-block; shallow: the mean offset."""
    for lane0 in range(0, LANES, blocks):
        largest, deepest, together = ZERO, ZERO, ZERO
        for lane in range(lane0, lane0 + blocks):
            offset = max(-mean[lane] - low[lane], ZERO)
            largest = max(largest, scale[lane])
            deepest = max(deepest, offset)
            together += offset
        if shallow:
            deepest = max(SHALLOW * deepest, together / np.float32(blocks))
        d, m = half_step(largest, most), half_step(deepest, most)
        for lane in range(lane0, lane0 + blocks):
            steps[0, lane] = d
            steps[1, lane] = m


@njit(**INLINE)
def choose_integers(
    xt: F32,
    wt: F32,
    total: F32,
    mean: F32,
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
            q = min(max(np.floor(HALF - (mean[lane] + low[lane] + s * we / w) / max(m, TINY)), ZERO), most)
            q = q if m > ZERO else ZERO
            b = (-q * m - mean[lane] - low[lane]) * inverse[lane]
            left = (wee - TWO * b * we + b * b * w) * s * s
            better = (left < old) | first
            error[lane] = left if better else old
            pair[0, lane] = p if better else old_p
            pair[1, lane] = q if better else old_q


@njit(**INLINE)
def measure(xt: F32, wt: F32, mean: F32, top: np.float32, steps: F32, pair: F32, error: F32, work: F32) -> None:
    """Errors of the lanes with codes rounded for these steps and integers; work[5:10] keeps the sums."""
    inverse, shift = work[0], work[1]
    for lane in range(LANES):
        s = steps[0, lane] * pair[0, lane]
        inverse[lane] = ONE / max(s, TINY) if s > ZERO else ZERO
        shift[lane] = (steps[1, lane] * pair[1, lane] + mean[lane]) * inverse[lane]
    residuals(xt, wt, inverse, shift, top, work[5:10])
    for lane in range(LANES):
        s = steps[0, lane] * pair[0, lane]
        error[lane] = work[5 + WEE, lane] * s * s


@njit(**INLINE)
def refit_steps(total: F32, blocks: int, steps: F32, pair: F32, sums: F32, other: F32) -> None:
    """The two steps of each super-block with the least error for the codes that `measure` saw."""
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
        grid: CANDIDATES[n].
        reach: how far from the nearest integer other block scales are tried.
        rounds: how often the steps are fitted to the codes; the integers are chosen anew but for the last.
        codes: out, [super-blocks, blocks, elements].
        integers: out, [super-blocks, 2, blocks].
        steps: out, [super-blocks, 2], representable in half precision.
    """
    count, blocks, elements = codes.shape
    per_tile = LANES // blocks
    top, last = np.float32(n), np.float32(most)
    xt, wt = lane_rows(elements), lane_rows(elements)
    tile = np.empty((elements, LANES), np.uint8)
    work, lanes = lane_rows(14), lane_rows(6)
    total, mean, scale, low, error, other_error = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5]
    best, pair, sums = lane_rows(2), lane_rows(2), lane_rows(5)
    other, other_pair = lane_rows(2), lane_rows(2)
    for first in range(0, count, per_tile):
        load_tile(x, importance, first * blocks, count * blocks, xt, wt)
        search(xt, wt, top, grid, ZERO, total, mean, scale, low, work)
        for lane in range(LANES):
            error[lane] = WORST
        for k in range(2 + rounds):
            if k < 2:
                start_steps(mean, scale, low, last, blocks, k == 1, other)
            else:
                refit_steps(total, blocks, best, pair, sums, other)
            if k < 1 + rounds:
                choose_integers(xt, wt, total, mean, scale, low, top, last, reach, other, other_pair, work)
            else:
                for lane in range(LANES):
                    other_pair[0, lane] = pair[0, lane]
                    other_pair[1, lane] = pair[1, lane]
            measure(xt, wt, mean, top, other, other_pair, other_error, work)
            for lane0 in range(0, LANES, blocks):
                gain = ZERO
                for lane in range(lane0, lane0 + blocks):
                    gain += error[lane] - other_error[lane]
                if gain > ZERO:
                    for lane in range(lane0, lane0 + blocks):
                        error[lane] = other_error[lane]
                        for row in range(2):
                            best[row, lane] = other[row, lane]
                            pair[row, lane] = other_pair[row, lane]
                        for row in range(5):
                            sums[row, lane] = work[5 + row, lane]
        for lane in range(LANES):
            scale[lane] = best[0, lane] * pair[0, lane]
            low[lane] = -best[1, lane] * pair[1, lane]
        round_codes(xt, mean, scale, low, top, work, tile)
        for s in range(min(per_tile, count - first)):
            for row in range(2):
                steps[first + s, row] = best[row, s * blocks]
                used = best[row, s * blocks] > ZERO
                for j in range(blocks):
                    integers[first + s, row, j] = np.uint8(pair[row, s * blocks + j]) if used else np.uint8(0)
            for j in range(blocks):
                for i in range(elements):
                    codes[first + s, j, i] = tile[i, s * blocks + j]
