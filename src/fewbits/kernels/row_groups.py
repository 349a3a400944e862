"""Square-law scales of groups of rows, error feedback within a group, and decoding.

Everything here works on a group seen as [rows, columns]: rows are input channels, columns outputs, side by side in
lanes; the number of columns is a multiple of 128. A column's scale is unit * k^2, k from 1 to 16, where the unit is
common to the group and, like the scale itself, rounded to half precision.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels.lanes import EXACT, FAST, HUGE, INLINE, LANES, TINY, lane_rows, round_f16_lanes

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]
ZERO, ONE, HALF, TOP = np.float32(0), np.float32(1), np.float32(0.5), np.float32(16)
WIDTHS = 14
"""Scales of a column that are tried without regard to the others."""


@njit(**INLINE)
def load(x: F32, start: int, tile: F32) -> None:
    """128 columns of a group, with no weight so large that its square leaves float32."""
    for i in range(x.shape[0]):
        for lane in range(LANES):
            tile[i, lane] = min(max(x[i, start + lane], -HUGE), HUGE)


@njit(**INLINE)
def add_errors(tile: F32, weight: F32, rows: int, scale: F32, half: np.float32, inverse: F32, total: F32) -> None:
    """Weighted squared errors of each lane's column with its scale."""
    low, high = -half, half - ONE
    for lane in range(LANES):
        inverse[lane] = ONE / max(scale[lane], TINY)
        total[lane] = ZERO
    for i in range(rows):
        w = weight[i]
        for lane in range(LANES):
            x = tile[i, lane]
            wrong = x - min(max(np.rint(x * inverse[lane]), low), high) * scale[lane]
            total[lane] += w * wrong * wrong


@njit(**FAST)
def free_scales(x: F32, weight: F32, half: np.float32, least: np.float32, found: F32) -> None:
    """The best scale of each column by itself.

    Args:
        x: [rows, columns].
        weight: [rows], of each row's squared error.
        half: 2^(bits - 1).
        least: the smallest scale that is tried, in terms of the one that just reaches the largest weight.
        found: out, [columns]; zero where the column is.
    """
    rows, columns = x.shape
    tile, work = lane_rows(rows), lane_rows(6)
    base, scale, inverse, total, best, error = work[0], work[1], work[2], work[3], work[4], work[5]
    step = np.float32((1.15 / least) ** (1 / (WIDTHS - 1)))
    for start in range(0, columns, LANES):
        load(x, start, tile)
        base[:] = ZERO
        for i in range(rows):
            for lane in range(LANES):
                base[lane] = max(base[lane], abs(tile[i, lane]))
        for lane in range(LANES):
            scale[lane] = base[lane] / (half - HALF) * least
            best[lane] = scale[lane]
            error[lane] = np.float32(3e38)
        for _ in range(WIDTHS):
            add_errors(tile, weight, rows, scale, half, inverse, total)
            for lane in range(LANES):
                better = total[lane] < error[lane]
                error[lane] = total[lane] if better else error[lane]
                best[lane] = scale[lane] if better else best[lane]
                scale[lane] *= step
        for lane in range(LANES):
            found[start + lane] = best[lane]


@njit(**FAST)
def scan_units(x: F32, weight: F32, half: np.float32, free: F32, units: F32, totals: F64) -> None:
    """The error of a group with each of some units, every column with the better of the two scales around its own.

    Args:
        x, weight, half: as for `free_scales`, whose result `free` [columns] is.
        units: [n].
        totals: in and out, [n]: errors are added.
    """
    rows, columns = x.shape
    tile, work = lane_rows(rows), lane_rows(6)
    k, lower, upper, inverse, below, above = work[0], work[1], work[2], work[3], work[4], work[5]
    for start in range(0, columns, LANES):
        load(x, start, tile)
        for n in range(units.size):
            unit = units[n]
            for lane in range(LANES):
                k[lane] = min(max(np.floor(np.sqrt(free[start + lane] / unit)), ONE), TOP - ONE)
                lower[lane] = k[lane] * k[lane] * unit
                upper[lane] = (k[lane] + ONE) * (k[lane] + ONE) * unit
            add_errors(tile, weight, rows, lower, half, inverse, below)
            add_errors(tile, weight, rows, upper, half, inverse, above)
            total = np.float64(0)
            for lane in range(LANES):
                total += min(below[lane], above[lane])
            totals[n] += total


@njit(**FAST)
def choose_codes(
    x: F32, weight: F32, half: np.float32, free: F32, unit: np.float32, reach: int, codes: F32, sums: F64
) -> None:
    """The best scale of each column that a unit leaves, and what would be the best unit for the codes then.

    Args:
        x, weight, half, free: as for `scan_units`.
        unit: of the group, rounded to half precision.
        reach: how many codes are tried on either side.
        codes: out, [columns]: k, 1 to 16.
        sums: in and out, [3]: added are the error and the numerator and denominator of the better unit.
    """
    rows, columns = x.shape
    tile, work = lane_rows(rows), lane_rows(8)
    first, k, scale, inverse = work[0], work[1], work[2], work[3]
    total, best, error, scratch = work[4], work[5], work[6], work[7].view(np.int32)
    for start in range(0, columns, LANES):
        load(x, start, tile)
        for lane in range(LANES):
            first[lane] = np.floor(np.sqrt(free[start + lane] / unit))
            error[lane] = np.float32(3e38)
            best[lane] = ONE
        for step in range(1 - reach, reach + 1):
            for lane in range(LANES):
                k[lane] = min(max(first[lane] + np.float32(step), ONE), TOP)
                scale[lane] = k[lane] * k[lane] * unit
            round_f16_lanes(scale[:LANES], scratch[:LANES])
            add_errors(tile, weight, rows, scale, half, inverse, total)
            for lane in range(LANES):
                better = total[lane] < error[lane]
                error[lane] = total[lane] if better else error[lane]
                best[lane] = k[lane] if better else best[lane]
        for lane in range(LANES):
            codes[start + lane] = best[lane]
            k[lane] = best[lane] * best[lane]
            scale[lane] = k[lane] * unit
            inverse[lane] = ONE / max(scale[lane], TINY)
            first[lane] = ZERO
            total[lane] = ZERO
        for i in range(rows):
            w = weight[i]
            for lane in range(LANES):
                q = min(max(np.rint(tile[i, lane] * inverse[lane]), -half), half - ONE) * k[lane]
                first[lane] += w * tile[i, lane] * q
                total[lane] += w * q * q
        for lane in range(LANES):
            sums[0] += error[lane]
            sums[1] += first[lane]
            sums[2] += total[lane]


@njit(**INLINE)
def feed_tile(
    tile: F32, upper: F32, scale: F32, half: np.float32, inverse: F32, place: F32, value: F32,
    bits: npt.NDArray[np.int32], wrong: F32, ranks: F32, cost: F32,
) -> None:  # fmt: skip
    """Round the rows of a tile one by one, errors made up for by the rows that follow.

    Args:
        tile: [rows, lanes].
        upper: [rows, rows], of the upper Cholesky factor of the inverse Hessian.
        scale: [lanes].
        inverse, place, value, bits: work, [lanes].
        wrong: out, [rows, lanes]: errors divided by the factor's diagonal.
        ranks: out, [rows, lanes]: codes minus half.
        cost: out, [lanes]: sums of their squares.
    """
    low, high = -half, half - ONE
    for lane in range(LANES):
        cost[lane] = ZERO
        inverse[lane] = ONE / max(scale[lane], TINY)
    for j in range(upper.shape[0]):
        for lane in range(LANES):
            place[lane] = tile[j, lane]
        # eight rows a pass: every pass loads and stores what it adds to
        whole = j - j % 8
        for i in range(0, whole, 8):
            a, b, c, d = upper[i, j], upper[i + 1, j], upper[i + 2, j], upper[i + 3, j]
            e, f, g, h = upper[i + 4, j], upper[i + 5, j], upper[i + 6, j], upper[i + 7, j]
            eight = wrong[i : i + 8]
            for lane in range(LANES):
                place[lane] -= (
                    (a * eight[0, lane] + b * eight[1, lane] + c * eight[2, lane] + d * eight[3, lane])
                    + (e * eight[4, lane] + f * eight[5, lane] + g * eight[6, lane] + h * eight[7, lane])
                )  # fmt: skip
        for i in range(whole, j):
            a = upper[i, j]
            for lane in range(LANES):
                place[lane] -= a * wrong[i, lane]
        for lane in range(LANES):
            q = min(max(np.rint(place[lane] * inverse[lane]), low), high)
            ranks[j, lane] = q
            value[lane] = q * scale[lane]
        round_f16_lanes(value[:LANES], bits[:LANES])
        own = ONE / upper[j, j]
        for lane in range(LANES):
            wrong[j, lane] = (place[lane] - value[lane]) * own
            cost[lane] += wrong[j, lane] * wrong[j, lane]


@njit(**FAST)
def feed_group(
    x: F32, upper: F32, half: np.float32, unit: np.float32, tries: int, codes: F32, ranks: U8, errors: F32
) -> None:
    """Round a group with error feedback, each column with the scale among its neighbours that then costs least.

    Args:
        x: [rows, columns], the rows as the errors of those before have left them.
        upper: [rows, rows], of the upper Cholesky factor of the inverse Hessian.
        half: 2^(bits - 1).
        unit: of the scales, rounded to half precision.
        tries: how many codes on either side are tried.
        codes: in and out, [columns]: k, 1 to 16.
        ranks: out, uint8 [rows, columns], the codes of the weights.
        errors: out, [rows, columns], what rows beyond these have to make up for.
    """
    rows, columns = x.shape
    tile, wrong, chosen, work = lane_rows(rows), lane_rows(rows), lane_rows(rows), lane_rows(8)
    k, scale, place, value, cost, least = work[0], work[1], work[2], work[3], work[4], work[5]
    inverse, bits = work[6], work[7].view(np.int32)
    for start in range(0, columns, LANES):
        load(x, start, tile)
        for lane in range(LANES):
            least[lane] = np.float32(3e38)
            k[lane] = codes[start + lane]
        if tries > 0:
            for step in range(-tries, tries + 1):
                for lane in range(LANES):
                    at = min(max(codes[start + lane] + np.float32(step), ONE), TOP)
                    scale[lane] = at * at * unit
                round_f16_lanes(scale[:LANES], bits[:LANES])
                feed_tile(tile, upper, scale, half, inverse, place, value, bits, wrong, chosen, cost)
                for lane in range(LANES):
                    better = cost[lane] < least[lane]
                    least[lane] = cost[lane] if better else least[lane]
                    k[lane] = min(max(codes[start + lane] + np.float32(step), ONE), TOP) if better else k[lane]
        for lane in range(LANES):
            codes[start + lane] = k[lane]
            scale[lane] = k[lane] * k[lane] * unit
        round_f16_lanes(scale[:LANES], bits[:LANES])
        feed_tile(tile, upper, scale, half, inverse, place, value, bits, wrong, chosen, cost)
        for j in range(rows):
            for lane in range(LANES):
                ranks[j, start + lane] = np.uint8(np.int32(chosen[j, lane] + half))
                errors[j, start + lane] = wrong[j, lane]


@njit(**EXACT)
def decode_rows(
    codes: U8, scales: F32, middles: F32, ends: npt.NDArray[np.int64], order: npt.NDArray[np.int64], out: F32
) -> None:
    """Weights as the engine decodes them, every product rounded to half precision.

    Args:
        codes: [out, in], in the order of activity.
        scales: [out, groups], of half precision.
        middles: [groups], the code that stands for zero.
        ends: [groups], where each group's rows end.
        order: [in], a permutation: where each row belongs.
        out: [out, in].
    """
    values, bits = np.empty(codes.shape[1], np.float32), np.empty(codes.shape[1], np.int32)
    for o in range(codes.shape[0]):
        line = codes[o]
        first = 0
        for g in range(ends.size):
            scale, middle = scales[o, g], middles[g]
            for i in range(first, ends[g]):
                values[i] = (np.float32(line[i]) - middle) * scale
            first = ends[g]
        round_f16_lanes(values, bits)
        row = out[o]
        for i in range(order.size):
            row[order[i]] = values[i]
