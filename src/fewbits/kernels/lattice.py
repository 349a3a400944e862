"""The nearest points of lattice codebooks of 8 dimensions, for 128 vectors side by side."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels.lanes import FAST, LANES

DIMENSIONS = 8
SHIFT = np.float32(0.25)
HALF, TWO, HUGE = np.float32(0.5), np.float32(2), np.float32(3e38)
F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]


@njit(**FAST)
def load(vectors: F32, first: int, tile: F32) -> int:
    """Gather vectors from `first` on [count, 8] into a tile [8, 128], the last repeated; returns how many there are."""
    count = min(LANES, vectors.shape[0] - first)
    for lane in range(LANES):
        at = first + min(lane, count - 1)
        for i in range(DIMENSIONS):
            tile[i, lane] = vectors[at, i]
    return count


@njit(**FAST)
def nearest_signed(vectors: F32, patterns: F32, odd: npt.NDArray[np.uint8], bits: npt.NDArray[np.uint8]) -> U16:
    """The nearest points of E8P: magnitudes of a table with signs, all shifted by a quarter to one side.

    Signs are free but for the sum of the coordinates, which is even. With magnitudes settled, the nearest signs are the
    vector's own, or, where their number is of the wrong parity, with that one turned which costs least.

    Args:
        vectors: [count, 8].
        patterns: [256, 8], magnitudes.
        odd: [256], whether the number of minus signs is odd.
        bits: [8], the bit of the index that is the sign of each coordinate; that of the last is turned where odd.

    Returns:
        [count], the magnitudes' row in the high byte, in the low one signs. An odd number of them says that the shift
        is -1/4, and that the lowest is turned.
    """
    count, shapes = vectors.shape[0], patterns.shape[0]
    found = np.empty(count, np.uint16)
    halves = np.empty(shapes, np.float32)
    for k in range(shapes):
        halves[k] = HALF * (patterns[k] * patterns[k]).sum()
    tile, size = np.empty((DIMENSIONS, LANES), np.float32), np.empty((DIMENSIONS, LANES), np.float32)
    base, turned = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    best, which = np.empty(LANES, np.float32), np.empty(LANES, np.int32)
    for first in range(0, count, LANES):
        here = load(vectors, first, tile)
        best[:] = HUGE
        which[:] = 0
        for side in range(2):
            shift = SHIFT if side == 0 else -SHIFT
            base[:] = 0
            turned[:] = 1
            for i in range(DIMENSIONS):
                for lane in range(LANES):
                    value = tile[i, lane] - shift
                    size[i, lane] = abs(value)
                    base[lane] += HALF * value * value
                    turned[lane] = -turned[lane] if value < 0 else turned[lane]
            a, b, c, d, e, f, g, h = size[0], size[1], size[2], size[3], size[4], size[5], size[6], size[7]
            for k in range(shapes):
                p, q, r, s = patterns[k, 0], patterns[k, 1], patterns[k, 2], patterns[k, 3]
                t, u, v, w = patterns[k, 4], patterns[k, 5], patterns[k, 6], patterns[k, 7]
                wrong = np.float32(1) if odd[k] else np.float32(-1)
                half, code = halves[k], np.int32(2 * k + side)
                for lane in range(LANES):
                    x0, x1, x2, x3 = a[lane] * p, b[lane] * q, c[lane] * r, d[lane] * s
                    x4, x5, x6, x7 = e[lane] * t, f[lane] * u, g[lane] * v, h[lane] * w
                    least = min(x0, x1, x2, x3, x4, x5, x6, x7)
                    total = ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7))
                    cost = base[lane] + half - total + (TWO * least if turned[lane] == wrong else np.float32(0))
                    better = cost < best[lane]
                    best[lane] = cost if better else best[lane]
                    which[lane] = code if better else which[lane]
        for lane in range(here):
            k, side = which[lane] >> 1, which[lane] & 1
            shift = SHIFT if side == 0 else -SHIFT
            signs, minus, least_at, least = 0, 0, 0, HUGE
            for i in range(DIMENSIONS):
                value = tile[i, lane] - shift
                if value < 0:
                    signs ^= 1 << bits[i]
                    minus ^= 1
                if abs(value) * patterns[k, i] < least:
                    least, least_at = abs(value) * patterns[k, i], i
            if minus != odd[k]:
                signs ^= 1 << bits[least_at]
            if odd[k]:
                signs ^= 1 << bits[DIMENSIONS - 1]
            found[first + lane] = (k << 8) | (signs ^ side)
    return found


@njit(**FAST)
def nearest_points(vectors: F32, points: F32) -> U16:
    """The nearest of some points [points, 8], at most 65536, to each vector [count, 8]."""
    count = vectors.shape[0]
    found = np.empty(count, np.uint16)
    halves = np.empty(points.shape[0], np.float32)
    for k in range(points.shape[0]):
        halves[k] = HALF * (points[k] * points[k]).sum()
    tile = np.empty((DIMENSIONS, LANES), np.float32)
    best, which = np.empty(LANES, np.float32), np.empty(LANES, np.int32)
    a, b, c, d, e, f, g, h = tile[0], tile[1], tile[2], tile[3], tile[4], tile[5], tile[6], tile[7]
    for first in range(0, count, LANES):
        here = load(vectors, first, tile)
        best[:] = HUGE
        which[:] = 0
        for k in range(points.shape[0]):
            p, q, r, s = points[k, 0], points[k, 1], points[k, 2], points[k, 3]
            t, u, v, w = points[k, 4], points[k, 5], points[k, 6], points[k, 7]
            half = halves[k]
            for lane in range(LANES):
                low = (a[lane] * p + b[lane] * q) + (c[lane] * r + d[lane] * s)
                high = (e[lane] * t + f[lane] * u) + (g[lane] * v + h[lane] * w)
                cost = half - (low + high)
                better = cost < best[lane]
                best[lane] = cost if better else best[lane]
                which[lane] = np.int32(k) if better else which[lane]
        for lane in range(here):
            found[first + lane] = which[lane]
    return found
