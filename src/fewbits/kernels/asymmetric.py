"""Search for the scale and offset of block types: w = low + scale * code, codes from 0 to n.

For a candidate scale and offset the codes are l = round((w - low) / scale) and the residuals e = (w - low) / scale - l.
Five weighted sums over the residuals say everything that is asked here: how large the error is, and how scale and
offset should move (e ~ a l + b by least squares: scale (1 + a), low + b scale). Residuals are small, so float32 sums
do not cancel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels.lanes import F16_MAX, FAST, LANES, TINY, load_tile, round_f16

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
HUGE = np.float32(1e9)
"""Larger weights are searched as this: no code of these types reaches it, and its square stays in float32."""
WORST = np.float32(3e38)
F16_TINY = np.float32(2.0**-24)
WL, WLL, WE, WEL, WEE = range(5)
"""Rows of `sums`: of the codes, their squares, the residuals, residuals times codes, squared residuals."""


def make_residuals(elements: int, n: int) -> Callable[..., None]:
    """A kernel that sums, for 128 blocks, what codes leave over.

    Returns:
        residuals(xt, wt, inverse, shift, sums): codes are round(x * inverse + shift) within 0..n; xt, wt
        [elements, 128], inverse, shift [128] -> sums [5, 128].
    """
    top = np.float32(n)

    @njit(**FAST)
    def residuals(xt: F32, wt: F32, inverse: F32, shift: F32, sums: F32) -> None:
        for row in range(5):
            for lane in range(LANES):
                sums[row, lane] = ZERO
        for i in range(0, elements, 4):
            for lane in range(LANES):
                s, z = inverse[lane], shift[lane]
                t0, t1, t2, t3 = (
                    xt[i, lane] * s + z,
                    xt[i + 1, lane] * s + z,
                    xt[i + 2, lane] * s + z,
                    xt[i + 3, lane] * s + z,
                )
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

    return residuals


def make_search(elements: int, n: int, grid: tuple[float, ...], refinements: int, signed: bool) -> Callable[..., None]:
    """A kernel that finds the best scale and offset of each of 128 blocks.

    Args:
        elements: weights in a block, a multiple of 4.
        n: codes run from 0 to n; the range of a block is tried as n + g codes for each g of the grid.
        refinements: further rounds in which the best scale and offset so far are the candidate.
        signed: whether offsets may be positive.

    Returns:
        search(xt, wt, total, scale, low, error, work): xt, wt [elements, 128] -> total (sum of weights), scale, low,
        error [128]; work [9, 128]. Clips xt to what float32 can square.
    """
    residuals = make_residuals(elements, n)
    reaches = np.array(grid, np.float32) + np.float32(n)
    rounds = len(grid)

    @njit(**FAST)
    def search(xt: F32, wt: F32, total: F32, scale: F32, low: F32, error: F32, work: F32) -> None:
        inverse, shift, bottom, extent, sums = work[0], work[1], work[2], work[3], work[4:9]
        for lane in range(LANES):
            bottom[lane] = HUGE if signed else ZERO
            extent[lane] = -HUGE
            total[lane] = ZERO
            scale[lane] = ZERO
            error[lane] = WORST
        for i in range(elements):
            for lane in range(LANES):
                x = min(max(xt[i, lane], -HUGE), HUGE)
                xt[i, lane] = x
                bottom[lane] = min(bottom[lane], x)
                extent[lane] = max(extent[lane], x)
                total[lane] += wt[i, lane]
        for lane in range(LANES):
            extent[lane] = extent[lane] - bottom[lane]
            low[lane] = bottom[lane]
        for k in range(rounds + refinements):
            for lane in range(LANES):
                if k < rounds:
                    s = reaches[k] / extent[lane] if extent[lane] > TINY else ZERO
                    inverse[lane] = s
                    shift[lane] = -bottom[lane] * s
                else:
                    s = ONE / scale[lane] if scale[lane] > ZERO else ZERO
                    inverse[lane] = s
                    shift[lane] = -low[lane] * s
            residuals(xt, wt, inverse, shift, sums)
            for lane in range(LANES):
                w, wl, wll, we, wel = total[lane], sums[WL, lane], sums[WLL, lane], sums[WE, lane], sums[WEL, lane]
                usable = inverse[lane] > ZERO and wll > ZERO
                s = ONE / inverse[lane] if usable else ZERO
                determinant = w * wll - wl * wl
                solvable = usable and determinant > np.float32(1e-5) * w * wll
                b = (wll * we - wl * wel) / determinant if solvable else ZERO
                base = -shift[lane] * s
                if not signed:
                    b = b if base + b * s < ZERO else shift[lane]
                a = (wel - b * wl) / wll if usable else ZERO
                left = sums[WEE, lane] - TWO * (a * wel + b * we - a * b * wl) + a * a * wll + b * b * w
                left = left * s * s
                better = usable and left < error[lane] and a > -HALF
                error[lane] = left if better else error[lane]
                scale[lane] = s * (ONE + a) if better else scale[lane]
                low[lane] = base + b * s if better else low[lane]

    return search


def make_rounding(elements: int, n: int) -> Callable[..., None]:
    """A kernel that gives the codes for scales and offsets that are settled: codes [elements, 128] uint8."""
    top = np.float32(n)

    @njit(**FAST)
    def rounding(xt: F32, scale: F32, low: F32, work: F32, codes: U8) -> None:
        inverse = work[0]
        for lane in range(LANES):
            inverse[lane] = ONE / scale[lane] if scale[lane] != ZERO else ZERO
        for i in range(elements):
            for lane in range(LANES):
                t = (xt[i, lane] - low[lane]) * inverse[lane]
                codes[i, lane] = np.uint8(np.int32(min(max(t + HALF, ZERO), top)))

    return rounding


def make_encoder(elements: int, n: int, grid: tuple[float, ...], refinements: int, pack: Any) -> Callable[..., None]:
    """An encoder for types with one half-precision scale and one half-precision offset per block.

    Args:
        pack: pack(codes, lane, scale, low, out) writes one block's bytes.

    Returns:
        encode(x, importance, out): flat float32, importance of a row, uint8 [blocks, block bytes].
    """
    search = make_search(elements, n, grid, refinements, True)
    rounding = make_rounding(elements, n)

    @njit(**FAST)
    def encode(x: F32, importance: F32, out: U8) -> None:
        xt, wt = np.empty((elements, LANES), np.float32), np.empty((elements, LANES), np.float32)
        codes = np.empty((elements, LANES), np.uint8)
        work, lanes = np.empty((9, LANES), np.float32), np.empty((4, LANES), np.float32)
        total, scale, low, error = lanes[0], lanes[1], lanes[2], lanes[3]
        count = out.shape[0]
        for first in range(0, count, LANES):
            load_tile(x, importance, first, count, xt, wt)
            search(xt, wt, total, scale, low, error, work)
            for lane in range(LANES):
                scale[lane] = round_f16(scale[lane])
                low[lane] = round_f16(low[lane])
            rounding(xt, scale, low, work, codes)
            for lane in range(min(LANES, count - first)):
                pack(codes, lane, scale[lane], low[lane], out[first + lane])

    return encode


def make_super_encoder(
    elements: int, n: int, steps: int, grid: tuple[float, ...], refinements: int, reach: int, pack: Any
) -> Callable[..., None]:
    """An encoder for 256 weights in blocks whose scales and offsets are integers times two half-precision steps.

    The value of a code is step * integer * code - lowstep * lowinteger, integers from 0 to steps.

    Args:
        reach: how far from the nearest integer other block scales are tried.
        pack: pack(codes, first lane, integers, lowintegers, step, lowstep, out) writes one super-block's bytes.

    Returns:
        encode(x, importance, out): flat float32, importance of a row, uint8 [super-blocks, block bytes].
    """
    blocks = 256 // elements
    per_tile = LANES // blocks
    search = make_search(elements, n, grid, refinements, False)
    residuals = make_residuals(elements, n)
    rounding = make_rounding(elements, n)
    most = np.float32(steps)

    @njit(**FAST)
    def half_step(largest: np.float32) -> np.float32:
        """The step with which integers up to `steps` reach the largest; zero only for zero."""
        return max(round_f16(min(largest / most, F16_MAX)), F16_TINY) if largest > ZERO else ZERO

    @njit(**FAST)
    def choose(xt: F32, wt: F32, total: F32, scale: F32, low: F32, steps2: F32, pair: F32, error: F32, work: F32) -> None:
        """For each lane the pair of integers near its ideal scale and offset with the least error."""
        inverse, shift, whole, sums = work[0], work[1], work[2], work[4:9]
        for k in range(-reach, reach + 1):
            for lane in range(LANES):
                d = steps2[0, lane]
                nearest = np.floor(scale[lane] / d + HALF) if d > ZERO else ONE
                whole[lane] = min(max(nearest + np.float32(k), ONE), most)
                inverse[lane] = ONE / (d * whole[lane]) if d > ZERO else ZERO
                shift[lane] = -low[lane] * inverse[lane]
            residuals(xt, wt, inverse, shift, sums)
            for lane in range(LANES):
                s, m = steps2[0, lane] * whole[lane], steps2[1, lane]
                offset = low[lane] + s * sums[WE, lane] / total[lane]
                integer = min(max(np.floor(HALF - offset / m), ZERO), most) if m > ZERO else ZERO
                b = (-integer * m - low[lane]) * inverse[lane]
                left = (sums[WEE, lane] - TWO * b * sums[WE, lane] + b * b * total[lane]) * s * s
                better = k == -reach or left < error[lane]
                error[lane] = left if better else error[lane]
                pair[0, lane] = whole[lane] if better else pair[0, lane]
                pair[1, lane] = integer if better else pair[1, lane]

    @njit(**FAST)
    def measure(xt: F32, wt: F32, steps2: F32, pair: F32, error: F32, work: F32) -> None:
        """Errors of the lanes with codes rounded for these steps and integers; work[4:9] keeps the sums."""
        inverse, shift = work[0], work[1]
        for lane in range(LANES):
            s = steps2[0, lane] * pair[0, lane]
            inverse[lane] = ONE / s if s > ZERO else ZERO
            shift[lane] = steps2[1, lane] * pair[1, lane] * inverse[lane]
        residuals(xt, wt, inverse, shift, work[4:9])
        for lane in range(LANES):
            s = steps2[0, lane] * pair[0, lane]
            error[lane] = work[4 + WEE, lane] * s * s

    @njit(**FAST)
    def refit(total: F32, steps2: F32, pair: F32, work: F32, other: F32) -> None:
        """The two steps of each super-block with the least error for the codes that `measure` saw."""
        sums = work[4:9]
        for lane0 in range(0, LANES, blocks):
            aa, ab, bb, ra, rb = ZERO, ZERO, ZERO, ZERO, ZERO
            d, m = steps2[0, lane0], steps2[1, lane0]
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
            d = round_f16(min(max(d, ZERO), F16_MAX))
            m = round_f16(min(max(m, ZERO), F16_MAX))
            for lane in range(lane0, lane0 + blocks):
                other[0, lane] = d
                other[1, lane] = m

    @njit(**FAST)
    def encode(x: F32, importance: F32, out: U8) -> None:
        xt, wt = np.empty((elements, LANES), np.float32), np.empty((elements, LANES), np.float32)
        codes = np.empty((elements, LANES), np.uint8)
        work, lanes = np.empty((9, LANES), np.float32), np.empty((5, LANES), np.float32)
        total, scale, low, error, other_error = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
        steps2, pair = np.empty((2, LANES), np.float32), np.empty((2, LANES), np.float32)
        other = np.empty((2, LANES), np.float32)
        count = out.shape[0]
        for first in range(0, count, per_tile):
            load_tile(x, importance, first * blocks, count * blocks, xt, wt)
            search(xt, wt, total, scale, low, error, work)
            for lane0 in range(0, LANES, blocks):
                largest, deepest = ZERO, ZERO
                for lane in range(lane0, lane0 + blocks):
                    largest = max(largest, scale[lane])
                    deepest = max(deepest, -low[lane])
                d, m = half_step(largest), half_step(deepest)
                for lane in range(lane0, lane0 + blocks):
                    steps2[0, lane] = d
                    steps2[1, lane] = m
            choose(xt, wt, total, scale, low, steps2, pair, error, work)
            measure(xt, wt, steps2, pair, error, work)
            refit(total, steps2, pair, work, other)
            measure(xt, wt, other, pair, other_error, work)
            for lane0 in range(0, LANES, blocks):
                gain = ZERO
                for lane in range(lane0, lane0 + blocks):
                    gain += error[lane] - other_error[lane]
                if gain > ZERO and other[0, lane0] > ZERO:
                    for lane in range(lane0, lane0 + blocks):
                        steps2[0, lane] = other[0, lane]
                        steps2[1, lane] = other[1, lane]
            for lane in range(LANES):
                scale[lane] = steps2[0, lane] * pair[0, lane]
                low[lane] = -steps2[1, lane] * pair[1, lane]
            rounding(xt, scale, low, work, codes)
            for s in range(min(per_tile, count - first)):
                lane0 = s * blocks
                pack(codes, lane0, pair[0], pair[1], steps2[0, lane0], steps2[1, lane0], out[first + s])

    return encode
