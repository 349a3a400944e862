"""Search for the scales of block types without offset: w = scale * code, codes from -n to n - 1.

For a candidate inverse scale the codes are l = round(w / s) and the residuals e = w / s - l. Fitting the residuals,
e ~ a l, by weighted least squares moves the scale to s (1 + a) and leaves the error s^2 (sum w e^2 - a sum w e l):
residuals are small, so float32 sums do not cancel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels.lanes import F16_MAX, FAST, LANES, TINY, load_tile, round_f16

F32 = npt.NDArray[np.float32]
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)


NEGATIVE = (-0.9, -0.7, -0.5, -0.35, -0.2, -0.1, 0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
POSITIVE = (-0.6, -0.3, 0.0, 0.3)
"""How far beyond the last code on either side the largest magnitude is tried, in codes."""


def make_search(elements: int, n: int, refinements: int) -> Callable[..., None]:
    """A kernel that finds the best signed scale of each of 128 blocks.

    Args:
        elements: weights in a block, a multiple of 4.
        n: codes run from -n to n - 1; the largest magnitude is tried around both ends.
        refinements: further rounds in which the best scale so far is the candidate.

    Returns:
        search(xt, wt, scale, error, scratch): xt, wt [elements, 128] -> scale, error [128]; scratch [8, 128].
    """
    targets = np.array([-(n + g) for g in NEGATIVE] + [n - 1 + g for g in POSITIVE], np.float32)
    candidates = len(targets)
    low, high = np.float32(-n), np.float32(n - 1)

    @njit(**FAST)
    def search(xt: F32, wt: F32, scale: F32, error: F32, scratch: F32) -> None:
        top, inverse, sll, sel, see = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
        for lane in range(LANES):
            top[lane] = ZERO
            scale[lane] = ZERO
            error[lane] = ZERO
        for i in range(elements):
            for lane in range(LANES):
                x = xt[i, lane]
                top[lane] = x if abs(x) > abs(top[lane]) else top[lane]
                error[lane] += wt[i, lane] * x * x
        for k in range(candidates + refinements):
            for lane in range(LANES):
                alive = abs(top[lane]) > TINY
                if k < candidates:
                    inverse[lane] = targets[k] / top[lane] if alive else ZERO
                else:
                    inverse[lane] = ONE / scale[lane] if alive and scale[lane] != ZERO else ZERO
                sll[lane] = ZERO
                sel[lane] = ZERO
                see[lane] = ZERO
            for i in range(0, elements, 4):
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
                    sll[lane] += a0 * l0 + a1 * l1 + a2 * l2 + a3 * l3
                    sel[lane] += a0 * e0 + a1 * e1 + a2 * e2 + a3 * e3
                    see[lane] += w0 * e0 * e0 + w1 * e1 * e1 + w2 * e2 * e2 + w3 * e3 * e3
            for lane in range(LANES):
                usable = sll[lane] > ZERO
                a = sel[lane] / sll[lane] if usable else ZERO
                s = ONE / inverse[lane] if usable else ZERO
                left = (see[lane] - a * sel[lane]) * s * s
                better = usable and left < error[lane]
                error[lane] = left if better else error[lane]
                scale[lane] = s * (ONE + a) if better else scale[lane]

    return search


def make_rounding(elements: int, n: int) -> Callable[..., None]:
    """A kernel that gives the codes, plus n, for scales that are settled: codes [elements, 128] uint8."""
    low, high = np.float32(-n), np.float32(n - 1)

    @njit(**FAST)
    def rounding(xt: F32, scale: F32, codes: npt.NDArray[np.uint8]) -> None:
        for i in range(elements):
            for lane in range(LANES):
                s = scale[lane]
                t = xt[i, lane] / s if s != ZERO else ZERO
                codes[i, lane] = np.uint8(min(max(np.floor(t + HALF), low), high) - low)

    return rounding


def make_encoder(elements: int, n: int, refinements: int, pack: Any) -> Callable[..., None]:
    """An encoder for types with one half-precision scale per block.

    Args:
        pack: pack(codes, lane, scale, out) writes one block's bytes.

    Returns:
        encode(x, importance, out): flat float32, importance of a row, uint8 [blocks, block bytes].
    """
    search = make_search(elements, n, refinements)
    rounding = make_rounding(elements, n)

    @njit(**FAST)
    def encode(x: F32, importance: F32, out: npt.NDArray[np.uint8]) -> None:
        xt, wt = np.empty((elements, LANES), np.float32), np.empty((elements, LANES), np.float32)
        codes = np.empty((elements, LANES), np.uint8)
        scratch = np.empty((8, LANES), np.float32)
        scale, error = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        count = out.shape[0]
        for first in range(0, count, LANES):
            load_tile(x, importance, first, count, xt, wt)
            search(xt, wt, scale, error, scratch)
            for lane in range(LANES):
                scale[lane] = round_f16(scale[lane])
            rounding(xt, scale, codes)
            for lane in range(min(LANES, count - first)):
                pack(codes, lane, scale[lane], out[first + lane])

    return encode


def make_super_encoder(n: int, steps: int, refinements: int, reach: int, pack: Any) -> Callable[..., None]:
    """An encoder for 256 weights in 16 blocks of 16 whose scales are integers times one half-precision scale.

    Args:
        steps: block scales run from -steps to steps - 1.
        reach: how far from the nearest integer other block scales are tried.
        pack: pack(codes, first lane, integers, super scale, out) writes one super-block's bytes.

    Returns:
        encode(x, importance, out): flat float32, importance of a row, uint8 [super-blocks, block bytes].
    """
    elements, blocks = 16, 16
    search = make_search(elements, n, refinements)
    rounding = make_rounding(elements, n)
    low, high = np.float32(-n), np.float32(n - 1)
    step_low, step_high = np.float32(-steps), np.float32(steps - 1)

    @njit(**FAST)
    def choose(xt: F32, wt: F32, step: F32, ideal: F32, integer: F32, error: F32, scratch: F32) -> None:
        """For each lane the integer near its ideal scale with the least error once the codes are rounded anew."""
        inverse, actual, left, whole = scratch[0], scratch[1], scratch[2], scratch[3]
        for k in range(2 * reach + 1):
            for lane in range(LANES):
                d = step[lane]
                nearest = np.floor(ideal[lane] / d + HALF) if d != ZERO else ZERO
                whole[lane] = min(max(nearest + np.float32(k - reach), step_low), step_high)
                actual[lane] = d * whole[lane]
                inverse[lane] = ONE / actual[lane] if actual[lane] != ZERO else ZERO
                left[lane] = ZERO
            for i in range(0, elements, 2):
                for lane in range(LANES):
                    x0, x1 = xt[i, lane], xt[i + 1, lane]
                    l0 = min(max(np.floor(x0 * inverse[lane] + HALF), low), high)
                    l1 = min(max(np.floor(x1 * inverse[lane] + HALF), low), high)
                    e0, e1 = x0 - actual[lane] * l0, x1 - actual[lane] * l1
                    left[lane] += wt[i, lane] * e0 * e0 + wt[i + 1, lane] * e1 * e1
            for lane in range(LANES):
                better = k == 0 or left[lane] < error[lane]
                error[lane] = left[lane] if better else error[lane]
                integer[lane] = whole[lane] if better else integer[lane]

    @njit(**FAST)
    def refit(xt: F32, wt: F32, step: F32, integer: F32, lane0: int, scratch: F32) -> np.float32:
        """The super-block's scale with the least error for the codes that `step` and `integer` give."""
        upper, lower = ZERO, ZERO
        for lane in range(lane0, lane0 + blocks):
            s = step[lane] * integer[lane]
            inverse = ONE / s if s != ZERO else ZERO
            slx, sll = ZERO, ZERO
            for i in range(elements):
                code = min(max(np.floor(xt[i, lane] * inverse + HALF), low), high)
                slx += wt[i, lane] * code * xt[i, lane]
                sll += wt[i, lane] * code * code
            upper += integer[lane] * slx
            lower += integer[lane] * integer[lane] * sll
        return upper / lower if lower > ZERO else step[lane0]

    @njit(**FAST)
    def encode(x: F32, importance: F32, out: npt.NDArray[np.uint8]) -> None:
        xt, wt = np.empty((elements, LANES), np.float32), np.empty((elements, LANES), np.float32)
        codes = np.empty((elements, LANES), np.uint8)
        scratch = np.empty((8, LANES), np.float32)
        ideal, error, step = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        integer, other, other_error = (
            np.empty(LANES, np.float32),
            np.empty(LANES, np.float32),
            np.empty(LANES, np.float32),
        )
        other_step = np.empty(LANES, np.float32)
        count = out.shape[0]
        per_tile = LANES // blocks
        for first in range(0, count, per_tile):
            load_tile(x, importance, first * blocks, count * blocks, xt, wt)
            search(xt, wt, ideal, error, scratch)
            for lane0 in range(0, LANES, blocks):
                largest = ZERO
                for lane in range(lane0, lane0 + blocks):
                    largest = ideal[lane] if abs(ideal[lane]) > abs(largest) else largest
                d = round_f16(min(max(largest / step_low, -F16_MAX), F16_MAX))
                for lane in range(lane0, lane0 + blocks):
                    step[lane] = d
            choose(xt, wt, step, ideal, integer, error, scratch)
            for lane0 in range(0, LANES, blocks):
                d = round_f16(refit(xt, wt, step, integer, lane0, scratch))
                for lane in range(lane0, lane0 + blocks):
                    other_step[lane] = d
            choose(xt, wt, other_step, ideal, other, other_error, scratch)
            for lane0 in range(0, LANES, blocks):
                gain = ZERO
                for lane in range(lane0, lane0 + blocks):
                    gain += error[lane] - other_error[lane]
                for lane in range(lane0, lane0 + blocks):
                    step[lane] = other_step[lane] if gain > ZERO else step[lane]
                    integer[lane] = other[lane] if gain > ZERO else integer[lane]
            for lane in range(LANES):
                scratch[0, lane] = step[lane] * integer[lane]
            rounding(xt, scratch[0], codes)
            for s in range(min(per_tile, count - first)):
                lane0 = s * blocks
                pack(codes, lane0, integer[lane0 : lane0 + blocks], step[lane0], out[first + s])

    return encode
