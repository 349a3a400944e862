"""Search for types whose weights are three levels, -1, 0, 1 over a scale: free ones, and groups of 8 out of a grid.

In a grid type the levels of a group are moved by a shift of an eighth up or down. Where the pattern of nearest levels
is in the grid, nothing is left to search. Where it is not: over a given scale and shift a weight's sign says which of
-1 and 1 is the nearer, and the other is never tried, which costs 0.1 %. Of the 256 patterns left a table says which
are in the grid. Their costs are sums of one out of 16 sums over the first four weights and one out of 16 over the last
four: 16 masked minima of vectors of 16 find the least.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from fewbits.kernels.grids import grid
from fewbits.kernels.lanes import (
    F16_MAX,
    FAST,
    INLINE,
    LANES,
    STRIDE,
    TINY,
    lane_rows,
    load_tile,
    round_f16,
)
from fewbits.kernels.odd_steps import choose_steps, refit_steps
from fewbits.kernels.vectors import (
    WIDTH,
    add,
    any_bits,
    both_bits,
    least,
    load,
    multiply,
    spread,
    spread_bits,
    store,
    subtract,
)

F32 = npt.NDArray[np.float32]
I16 = npt.NDArray[np.int16]
I32 = npt.NDArray[np.int32]
U16 = npt.NDArray[np.uint16]
U8 = npt.NDArray[np.uint8]
ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
SHIFT = np.float32(0.125)
WORST = np.float32(1e38)
MARGIN = np.float32(1 + 2.0**-18)
"""By more than sums are rounded."""
MOST = np.float32(7)
"""Codes of scales run from 0 to this."""


@intrinsic
def where_bits(typing: Any, bits: Any, a: Any) -> Any:
    """The lanes whose bit is set, zero elsewhere."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = context.cast(builder, arguments[0], bits, types.uint16)
        chosen = builder.bitcast(whole, ir.VectorType(ir.IntType(1), WIDTH))
        return builder.select(chosen, arguments[1], ir.Constant(arguments[1].type, [0.0] * WIDTH))

    return a(bits, a), generate


@intrinsic
def lowest(typing: Any, a: Any) -> Any:
    """The smallest lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, lanes = arguments[0], WIDTH
        while lanes > 1:
            lanes //= 2
            halves = [
                builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(part)))
                for part in (range(lanes), range(lanes, 2 * lanes))
            ]
            value = builder.select(builder.fcmp_ordered("<", *halves), *halves)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return types.float32(a), generate


class Book(NamedTuple):
    """A grid of {-1, 0, 1}^8, laid out for the search."""

    allowed: U16
    """[signs, j]: bit k tells whether the grid has the pattern of bits j of the first and k of the last four weights.

    Weights whose bit is 1 are at the level of their sign (bits of `signs`: 1 for minus), others at 0. Every k has a j.
    """
    powers: I16
    """Sum of the powers of three that the bits of a byte name: [256]."""
    entry: I16
    """Index of a pattern, by 3280 + powers[bits of ones] - powers[bits of minus ones]: [6561]."""
    member: F32
    """Member of subset k of four: [4 * 16], ones and zeros."""
    names: I32
    """The lanes' numbers: [16]."""


def book(name: str) -> Book:
    """The grid of a type, by its name in grids.LEVELS."""
    levels = grid(name).astype(np.int64) - 1
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    powers = bits @ 3 ** np.arange(8)
    entry = np.full(3**8, -1, np.int16)
    entry[3280 + levels @ 3 ** np.arange(8)] = np.arange(len(levels))
    sign, chosen = np.arange(256)[:, None], np.arange(256)[None]
    inside = entry[3280 + powers[chosen & ~sign] - powers[chosen & sign]] >= 0
    allowed = (inside.reshape(256, 16, 16).transpose(0, 2, 1).astype(np.int64) << np.arange(16)).sum(2)
    member = (np.arange(16) >> np.arange(4)[:, None]) & 1
    return Book(
        allowed=allowed.astype(np.uint16),
        powers=powers.astype(np.int16),
        entry=entry,
        member=member.astype(np.float32).reshape(-1),
        names=np.arange(16, dtype=np.int32),
    )


@njit(**INLINE)
def gains_of_ones(
    xt: F32, wt: F32, scale: F32, shift: np.float32, gains: F32, signs: I32, ones: I32, zeros: F32, best: F32, top: F32
) -> None:
    """How much more weights cost at the nearer of -1 and 1 than at 0.

    Args:
        xt, wt: [8 groups, 128].
        scale: [128].
        shift: SHIFT or its negative.
        gains: out, [8 groups, 128].
        signs, ones: out, [groups, 128], the bits of weights nearer to -1 than to 1, and of those not nearest to 0.
        zeros: out, [groups, 128], what a group costs where all are at 0.
        best: out, [groups, 128], what it costs more where all are at what is nearest.
        top: out, [groups, 128], above what the first four can cost more.
    """
    for g in range(signs.shape[0]):
        for lane in range(LANES):
            signs[g, lane] = 0
            ones[g, lane] = 0
            zeros[g, lane] = ZERO
            best[g, lane] = ZERO
            top[g, lane] = ZERO
        for i in range(8):
            bit = np.int32(1 << i)
            for lane in range(LANES):
                s, w, m, n = scale[lane], wt[8 * g + i, lane], signs[g, lane], ones[g, lane]
                y = xt[8 * g + i, lane] - shift * s
                more = s * w * (s - TWO * abs(y))
                gains[8 * g + i, lane] = more
                signs[g, lane] = m | (bit if y < ZERO else np.int32(0))
                ones[g, lane] = n | (bit if more < ZERO else np.int32(0))
                zeros[g, lane] += w * y * y
                best[g, lane] += min(more, ZERO)
            if i < 4:
                for lane in range(LANES):
                    top[g, lane] += max(gains[8 * g + i, lane], ZERO)
        for lane in range(LANES):
            top[g, lane] = top[g, lane] * MARGIN + TINY


@njit(**FAST)
def search_groups(
    gains: F32, signs: I32, ones: I32, top: F32, best: F32,
    allowed: U16, member: F32, names: I32, places: I32, sums: F32,
) -> None:  # fmt: skip
    """Replaces what is nearest by the best pattern of the grid, where it is not in the grid itself.

    Args:
        gains: [8 groups * 144], flat.
        signs, ones, top, best: [groups, 128], see `gains_of_ones`; ones and best are replaced.
        allowed, member, names: of the `Book`, allowed flat.
        places: work, [129].
        sums: work, [3 * 16 * 16].
    """
    low, high = spread_bits(np.int32(-256)), spread_bits(np.int32(-16))
    tags = names.view(np.float32)
    for g in range(signs.shape[0]):
        count = 0
        for lane in range(LANES):
            m = ones[g, lane]
            places[count] = lane
            fits = np.int32(allowed[16 * signs[g, lane] + (m & np.int32(15))]) >> (m >> np.int32(4))
            count += np.int32(1) - (fits & np.int32(1))
        # in loops of their own: what one stores, the next loads into all lanes or by a number
        for start in range(0, count, WIDTH):
            some = min(count - start, WIDTH)
            for n in range(some):
                lane = places[start + n]
                at = 8 * g * STRIDE + lane
                a = multiply(load(member, 0), spread(gains[at]))
                b = multiply(load(member, 0), spread(gains[at + 4 * STRIDE]))
                for i in range(1, 4):
                    a = add(a, multiply(load(member, i * WIDTH), spread(gains[at + i * STRIDE])))
                    b = add(b, multiply(load(member, i * WIDTH), spread(gains[at + (i + 4) * STRIDE])))
                # below zero, which stands for what is not in the grid
                a = subtract(a, spread(top[g, lane]))
                store(sums, n * WIDTH, any_bits(both_bits(a, high), load(tags, 0)))
                store(sums, (WIDTH + n) * WIDTH, b)
            for n in range(some):
                # unsigned: no index is looked at for being negative
                row, at_first = np.uint32(16 * signs[g, places[start + n]]), np.uint32(n * WIDTH)
                x, y = spread(ZERO), spread(ZERO)
                for i in range(0, WIDTH, 2):
                    even, odd = np.uint32(i), np.uint32(i + 1)
                    x = least(x, where_bits(allowed[row + even], spread(sums[at_first + even])))
                    y = least(y, where_bits(allowed[row + odd], spread(sums[at_first + odd])))
                x = least(x, y)
                store(sums, (2 * WIDTH + n) * WIDTH, x)
                total = add(x, load(sums, (WIDTH + n) * WIDTH))
                sums[(WIDTH + n) * WIDTH] = lowest(any_bits(both_bits(total, low), load(tags, 0)))
            for n in range(some):
                lane = places[start + n]
                found = np.float32(sums[(WIDTH + n) * WIDTH])
                last = found.view(np.int32) & np.int32(15)
                first = np.float32(sums[(2 * WIDTH + n) * WIDTH + last]).view(np.int32) & np.int32(15)
                best[g, lane] = found + top[g, lane]
                ones[g, lane] = first | (last << np.int32(4))


@njit(**INLINE)
def fit(xt: F32, wt: F32, codes: I32, square: F32, product: F32) -> None:
    """A = sum w q^2 and B = sum w x q of 128 blocks: the error of a scale s is s^2 A - 2 s B above that of zeros."""
    for lane in range(LANES):
        square[lane] = ZERO
        product[lane] = ZERO
    for g in range(codes.shape[0]):
        for i in range(8):
            for lane in range(LANES):
                c, x, w = codes[g, lane], xt[8 * g + i, lane], wt[8 * g + i, lane]
                up, down = (c >> np.int32(i)) & np.int32(1), (c >> np.int32(8 + i)) & np.int32(1)
                level = np.float32(up - down) + SHIFT - np.float32(c >> np.int32(16)) * (TWO * SHIFT)
                square[lane] += w * level * level
                product[lane] += w * level * x


@njit(**INLINE)
def add_up(best: F32, zeros: F32, g0: int, span: int, cost: F32) -> None:
    """What the groups g0 to g0 + span - 1 cost together: cost [128]."""
    for lane in range(LANES):
        cost[lane] = ZERO
    for g in range(g0, g0 + span):
        for lane in range(LANES):
            cost[lane] += best[g, lane] + zeros[g, lane]


@njit(**FAST)
def measure(
    xt: F32, wt: F32, scale: F32, span: int, book: Book, codes: I32, square: F32, product: F32, work: F32
) -> None:
    """The best patterns and shifts of 128 blocks at given scales, and their A and B.

    Args:
        xt, wt: [8 groups, 144].
        scale: [128].
        span: groups that share a shift.
        codes: out, [groups, 144].
        square, product: out, [128].
        work: [14 groups + 7, 144].
    """
    groups = codes.shape[0]
    gains, zeros, top = work[: 8 * groups], work[8 * groups : 9 * groups], work[9 * groups : 10 * groups]
    signs, ones = work[10 * groups : 11 * groups].view(np.int32), work[11 * groups : 12 * groups].view(np.int32)
    cost, least_cost, small = work[12 * groups : 13 * groups], work[13 * groups : 14 * groups], work[14 * groups :]
    places, sums = small[0].view(np.int32), small[1:].reshape(-1)
    flat, allowed = gains.reshape(-1), book.allowed.reshape(-1)
    for down in range(2):
        shift, bit = SHIFT - np.float32(down) * TWO * SHIFT, np.int32(down << 16)
        gains_of_ones(xt, wt, scale, shift, gains, signs, ones, zeros, cost, top)
        if down:
            for g0 in range(0, groups, span):
                add_up(cost, zeros, g0, span, sums)
                for g in range(g0, g0 + span):
                    for lane in range(LANES):
                        m = ones[g, lane]
                        ones[g, lane] = m if sums[lane] < least_cost[g0, lane] else np.int32(0)
        search_groups(flat, signs, ones, top, cost, allowed, book.member, book.names, places, sums)
        for g0 in range(0, groups, span):
            add_up(cost, zeros, g0, span, sums)
            for g in range(g0, g0 + span):
                for lane in range(LANES):
                    old, m, sign = codes[g, lane], ones[g, lane], signs[g, lane]
                    new = (m & ~sign) | ((m & sign) << np.int32(8)) | bit
                    codes[g, lane] = new if (down == 0) | (sums[lane] < least_cost[g0, lane]) else old
            for lane in range(LANES):
                least_cost[g0, lane] = sums[lane]
    fit(xt, wt, codes, square, product)


@njit(**FAST)
def encode_grid_blocks(
    x: F32, importance: F32, span: int, book: Book, starts: F32, parts: F32,
    entries: I16, shifts: U8, scales: U8, steps: F32,
) -> None:  # fmt: skip
    """Super-blocks of blocks that have a 3-bit scale each: a block's scale is step * (2 code + 1).

    Args:
        x: flat, row-major [rows, columns].
        importance: [columns].
        span: groups that share a shift.
        starts: the multiples of a block's deviation that are tried as its scale.
        parts: see `choose_steps`.
        entries: out, [super-blocks, blocks, groups].
        shifts: out, as entries, 1 where the levels are moved down.
        scales: out, [super-blocks, blocks], the codes.
        steps: out, [super-blocks], representable in half precision.
    """
    count, blocks, groups = entries.shape
    per_tile = LANES // blocks
    xt, wt, work = lane_rows(8 * groups), lane_rows(8 * groups), lane_rows(14 * groups + 7)
    tries = starts.size
    codes, squares, products = lane_rows(groups).view(np.int32), lane_rows(tries + 1), lane_rows(tries + 1)
    lanes, grid = lane_rows(6), np.empty((6, parts.size), np.float32)
    start, scale, best, gain, step, code = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5]
    for first in range(0, count, per_tile):
        load_tile(x, importance, first * blocks, count * blocks, xt, wt)
        for lane in range(LANES):
            start[lane] = ZERO
            scale[lane] = ZERO
            best[lane] = ZERO
            gain[lane] = -ONE
        for i in range(8 * groups):
            for lane in range(LANES):
                start[lane] += wt[i, lane] * xt[i, lane] * xt[i, lane]
                scale[lane] += wt[i, lane]
        for lane in range(LANES):
            start[lane] = np.sqrt(start[lane] / scale[lane])
        for t in range(tries):
            for lane in range(LANES):
                scale[lane] = start[lane] * starts[t]
            measure(xt, wt, scale, span, book, codes, squares[t], products[t], work)
            for lane in range(LANES):
                a, b, old_gain, old_best = squares[t, lane], products[t, lane], gain[lane], best[lane]
                s = b / max(a, TINY)
                best[lane] = s if s * b > old_gain else old_best
                gain[lane] = max(s * b, old_gain)
        choose_steps(squares[:tries], products[:tries], blocks, ONE, MOST, parts, best, step, grid)
        for lane in range(LANES):
            s, d = best[lane], step[lane]
            code[lane] = min(max(np.floor(HALF * s / max(d, TINY)), ZERO), MOST)
            scale[lane] = d * (TWO * code[lane] + ONE)
        measure(xt, wt, scale, span, book, codes, squares[tries], products[tries], work)
        refit_steps(blocks, ONE, code, squares[tries], products[tries], step)
        for s in range(min(per_tile, count - first)):
            steps[first + s] = step[s * blocks]
            for j in range(blocks):
                lane = s * blocks + j
                scales[first + s, j] = np.uint8(code[lane])
                for g in range(groups):
                    c = codes[g, lane]
                    up, down = c & np.int32(255), (c >> np.int32(8)) & np.int32(255)
                    entries[first + s, j, g] = book.entry[3280 + book.powers[up] - book.powers[down]]
                    shifts[first + s, j, g] = np.uint8(c >> np.int32(16))


@njit(**FAST)
def ternary_scales(x: F32, importance: F32, starts: F32, rounds: int, elements: int, scale: F32) -> None:
    """The scale of each block with the least error of its multiples by -1, 0 and 1.

    With the weights beyond half a scale at 1 or -1, the best scale is their weighted mean magnitude B / A. It moves
    the threshold, so some rounds follow from the best of the starts.

    Args:
        x: flat, row-major [rows, columns].
        importance: [columns].
        starts: the multiples of a block's deviation that are tried as threshold.
        rounds: how often half the best scale so far is tried thereafter.
        elements: weights in a block.
        scale: out, [blocks], representable in half precision.
    """
    xt, wt, lanes = lane_rows(elements), lane_rows(elements), lane_rows(6)
    deviation, limit, lower, upper = lanes[0], lanes[1], lanes[2], lanes[3]
    best, gain = lanes[4], lanes[5]
    for first in range(0, scale.size, LANES):
        load_tile(x, importance, first, scale.size, xt, wt)
        for lane in range(LANES):
            upper[lane] = ZERO
            lower[lane] = ZERO
            best[lane] = ZERO
            gain[lane] = ZERO
        for i in range(elements):
            for lane in range(LANES):
                upper[lane] += wt[i, lane] * xt[i, lane] * xt[i, lane]
                lower[lane] += wt[i, lane]
        for lane in range(LANES):
            deviation[lane] = np.sqrt(upper[lane] / lower[lane])
        for t in range(starts.size + rounds):
            for lane in range(LANES):
                upper[lane] = ZERO
                lower[lane] = TINY
                limit[lane] = deviation[lane] * starts[t] if t < starts.size else HALF * best[lane]
            for i in range(elements):
                for lane in range(LANES):
                    v, w = abs(xt[i, lane]), wt[i, lane]
                    w = w if v > limit[lane] else ZERO
                    lower[lane] += w
                    upper[lane] += w * v
            for lane in range(LANES):
                b, old_gain, old = upper[lane], gain[lane], best[lane]
                s = b / lower[lane]
                best[lane] = s if s * b > old_gain else old
                gain[lane] = max(s * b, old_gain)
        for lane in range(min(LANES, scale.size - first)):
            scale[first + lane] = round_f16(min(best[lane], F16_MAX))


@njit(**FAST)
def mean_magnitudes(x: F32, importance: F32, elements: int, scale: F32) -> None:
    """The weighted mean magnitude of each block, the best scale of signs: scale [blocks], in half precision."""
    xt, wt, lanes = lane_rows(elements), lane_rows(elements), lane_rows(2)
    upper, lower = lanes[0], lanes[1]
    for first in range(0, scale.size, LANES):
        load_tile(x, importance, first, scale.size, xt, wt)
        for lane in range(LANES):
            upper[lane] = ZERO
            lower[lane] = ZERO
        for i in range(elements):
            for lane in range(LANES):
                upper[lane] += wt[i, lane] * abs(xt[i, lane])
                lower[lane] += wt[i, lane]
        for lane in range(min(LANES, scale.size - first)):
            scale[first + lane] = round_f16(min(upper[lane] / lower[lane], F16_MAX))
