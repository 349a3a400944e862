"""Search for codebook types: groups of weights whose magnitudes, over a common scale, are one entry of a fixed grid.

With scale s, entry q leaves the error s^2 A - 2 s B more than storing zeros would, A = sum w q^2, B = sum w |x| q.
Every entry is tried: the sums of all patterns of half a group are tables, and an entry costs one load and one
comparison, since entries that share their first half need only the least of their second halves.

Signs are free, or their product over 8 weights must be positive. Then, where it is not, one weight takes the wrong
sign, which costs 4 s w |x| q: "turned" sums contain the least such cost of a pattern, found along with them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels.grids import LEVELS, grid
from fewbits.kernels.lanes import (
    FAST,
    INLINE,
    LANES,
    STRIDE,
    TINY,
    lane_rows,
    load_tile,
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
    where_less,
)

F32 = npt.NDArray[np.float32]
I16 = npt.NDArray[np.int16]
I32 = npt.NDArray[np.int32]
U32 = npt.NDArray[np.uint32]
U8 = npt.NDArray[np.uint8]
ZERO, HALF, ONE, TWO, FOUR = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2), np.float32(4)
WORST = np.float32(3e38)
CHUNK = 6
"""Entries with the same first half that are compared at once: the least work for all five grids."""
FREE, EIGHTS, PAIRS = range(3)
"""What signs must obey: nothing, an even number of minus in each group of 8, or in each two groups of 4."""
MOST = np.float32(15)
"""Codes of scales run from 0 to this."""
WHOLE = np.int32(-1)
NO_TAGS = np.zeros(81, np.int32)
"""Mask and tags with which `add_patterns` leaves sums as they are."""
WORK = (12 * 9 + 4 * 81 + 8) * WIDTH
"""Floats `search` works in: patterns of one and two elements, of half a group, and what pairs of groups leave."""


class Book(NamedTuple):
    """A grid, laid out for `search`.

    A half pattern's code is its small integers, the first in the lowest bits; a whole code is that of the second half
    and above it that of the first. The row of a half pattern in the tables of sums counts up, the first as the highest
    digit.
    """

    values: F32
    """What the small integers stand for: [levels]."""
    tags: I32
    """Codes of the half patterns, by row."""
    firsts: U32
    """For each chunk where the sums of its first half stand: [chunks]."""
    first_tags: I32
    """The codes of those first halves, at their place in the whole code."""
    seconds: U32
    """Where the sums of the second halves stand: [chunks * CHUNK], the last repeated to fill a chunk."""
    entry: I16
    """Index of a whole code, -1 where there is none."""


def book(name: str) -> Book:
    """The grid of a type, by its name in LEVELS."""
    entries = grid(name).astype(np.int64)
    half, levels = entries.shape[1] // 2, len(LEVELS[name])
    bits = (levels - 1).bit_length()
    digits = levels ** np.arange(half)[::-1]
    codes = (entries << (bits * np.roll(np.arange(2 * half), half))).sum(1)
    patterns = np.arange(levels**half)[:, None] // digits % levels
    half_codes = (patterns << (bits * np.arange(half))).sum(1)
    first, second = (entries[:, :half] * digits).sum(1), (entries[:, half:] * digits).sum(1)
    firsts, seconds = [], []
    for row in np.unique(first):
        same = second[first == row]
        for start in range(0, same.size, CHUNK):
            part = same[start : start + CHUNK]
            seconds.append(np.concatenate([part, np.repeat(part[-1:], CHUNK - part.size)]))
            firsts.append(row)
    index = np.full(1 << (2 * half * bits), -1, np.int16)
    index[codes] = np.arange(len(codes))
    return Book(
        values=np.array(LEVELS[name], np.float32),
        tags=half_codes.astype(np.int32),
        firsts=(np.array(firsts) * WIDTH).astype(np.uint32),
        first_tags=(half_codes[firsts] << (bits * half)).astype(np.int32),
        seconds=(np.concatenate(seconds) * WIDTH).astype(np.uint32),
        entry=index,
    )


@njit(**INLINE)
def add_patterns(a: F32, b: F32, count: int, mask: np.int32, tags: I32, out: F32) -> None:
    """All sums of a row of a and one of b; the bits outside mask are replaced by the tag of the sum's row."""
    keep = spread_bits(mask)
    for i in range(count):
        x = load(a, i * WIDTH)
        for j in range(count):
            row = i * count + j
            both = add(x, load(b, j * WIDTH))
            store(out, row * WIDTH, any_bits(both_bits(both, keep), spread_bits(tags[row])))


@njit(**INLINE)
def add_turned(a: F32, b: F32, ta: F32, tb: F32, count: int, mask: np.int32, tags: I32, out: F32) -> None:
    """`add_patterns` of which one part is turned, whichever costs less."""
    keep = spread_bits(mask)
    for i in range(count):
        x, tx = load(a, i * WIDTH), load(ta, i * WIDTH)
        for j in range(count):
            row = i * count + j
            both = least(add(x, load(tb, j * WIDTH)), add(tx, load(b, j * WIDTH)))
            store(out, row * WIDTH, any_bits(both_bits(both, keep), spread_bits(tags[row])))


@njit(**FAST)
def half_sums(
    xt: F32, wt: F32, odd: F32, at: int, odd_at: int, elements: int, scale: F32, lane: int,
    turned: bool, values: F32, mask: np.int32, tags: I32, work: F32, out: F32, out_turned: F32,
) -> None:  # fmt: skip
    """Costs of all patterns of half a group, for 16 lanes.

    Args:
        xt, wt: flat; the half's first weights stand at `at`, its next STRIDE further.
        odd: flat; what the turned costs are multiplied by stands at `odd_at`.
        elements: 2 or 4.
        mask, tags: see `add_patterns`.
        work: [2, 6, 9 * WIDTH].
        out, out_turned: [patterns * WIDTH].
    """
    levels = values.size
    s = load(scale, lane)
    for i in range(elements):
        x, w = load(xt, at + i * STRIDE), load(wt, at + i * STRIDE)
        penalty = multiply(multiply(multiply(s, w), multiply(spread(FOUR), x)), load(odd, odd_at))
        for q in range(levels):
            v = spread(values[q])
            miss = subtract(x, multiply(s, v))
            cost = multiply(w, multiply(miss, miss))
            store(work[0, i], q * WIDTH, cost)
            if turned:
                store(work[1, i], q * WIDTH, add(cost, multiply(v, penalty)))
    plain, other = work[0], work[1]
    # counts known when compiling: the loops are unrolled
    if elements == 2:
        add_patterns(plain[0], plain[1], 8, mask, tags, out)
        if turned:
            add_turned(plain[0], plain[1], other[0], other[1], 8, mask, tags, out_turned)
        return
    for k in range(2):
        i, j, pair = 2 * k, 2 * k + 1, 4 + k
        add_patterns(plain[i], plain[j], 3, WHOLE, NO_TAGS, plain[pair])
        if turned:
            add_turned(plain[i], plain[j], other[i], other[j], 3, WHOLE, NO_TAGS, other[pair])
    add_patterns(plain[4], plain[5], 9, mask, tags, out)
    if turned:
        add_turned(plain[4], plain[5], other[4], other[5], 9, mask, tags, out_turned)


@njit(**FAST)
def search_plain(
    firsts: U32, first_tags: I32, seconds: U32, mask: np.int32,
    a: F32, b: F32, cost: F32, cost_at: int, codes: F32, at: int,
) -> None:  # fmt: skip
    """The code with the least sum, for 16 lanes: cost and the bits of codes take it at `at`.

    a, b: costs of first halves and, tagged, of second halves.
    """
    best, low, high = spread(WORST), spread(ZERO), spread(ZERO)
    e = 0
    for k in range(firsts.size):
        x = least(load(b, seconds[e]), load(b, seconds[e + 1]))
        y = least(load(b, seconds[e + 2]), load(b, seconds[e + 3]))
        z = least(load(b, seconds[e + 4]), load(b, seconds[e + 5]))
        e += CHUNK
        second = least(least(x, y), z)
        total = add(load(a, firsts[k]), second)
        low = where_less(total, best, second, low)
        high = where_less(total, best, spread_bits(first_tags[k]), high)
        best = least(total, best)
    store(cost, cost_at, best)
    store(codes, at, any_bits(high, both_bits(low, spread_bits(mask))))


@njit(**FAST)
def search_turned(
    firsts: U32, first_tags: I32, seconds: U32, mask: np.int32,
    a: F32, b: F32, ta: F32, tb: F32, cost: F32, cost_at: int, codes: F32, at: int,
) -> None:  # fmt: skip
    """`search_plain` where either the first or the second half is turned."""
    best, low, high = spread(WORST), spread(ZERO), spread(ZERO)
    e = 0
    for k in range(firsts.size):
        s0, s1, s2 = seconds[e], seconds[e + 1], seconds[e + 2]
        s3, s4, s5 = seconds[e + 3], seconds[e + 4], seconds[e + 5]
        x, y, z = least(load(b, s0), load(b, s1)), least(load(b, s2), load(b, s3)), least(load(b, s4), load(b, s5))
        tx, ty = least(load(tb, s0), load(tb, s1)), least(load(tb, s2), load(tb, s3))
        tz = least(load(tb, s4), load(tb, s5))
        e += CHUNK
        second, turned = least(least(x, y), z), least(least(tx, ty), tz)
        total, other = add(load(ta, firsts[k]), second), add(load(a, firsts[k]), turned)
        second = where_less(other, total, turned, second)
        total = least(other, total)
        low = where_less(total, best, second, low)
        high = where_less(total, best, spread_bits(first_tags[k]), high)
        best = least(total, best)
    store(cost, cost_at, best)
    store(codes, at, any_bits(high, both_bits(low, spread_bits(mask))))


@njit(**FAST)
def search(xt: F32, wt: F32, odd: F32, signs: int, scale: F32, book: Book, codes: F32, turned: F32, work: F32) -> None:
    """The best entry of each group of 128 blocks at given scales.

    Args:
        xt, wt: [elements, 144]; xt not negative.
        odd: [groups, 144], 1 where a group's signs need a turn (PAIRS: a pair's, in both rows), else 0.
        signs: FREE, EIGHTS or PAIRS.
        scale: [128].
        codes: out, the bits of each [groups, 144].
        turned: out, [groups, 144], 1 where one weight of the group takes the wrong sign, else 0.
        work: [WORK].
    """
    groups = codes.shape[0]
    half = xt.shape[0] // groups // 2
    x, w, o, c = xt.reshape(-1), wt.reshape(-1), odd.reshape(-1), codes.reshape(-1)
    table = work[: 12 * 9 * WIDTH].reshape(2, 6, 9 * WIDTH)
    sums = work[12 * 9 * WIDTH : (12 * 9 + 4 * 81) * WIDTH].reshape(4, 81 * WIDTH)
    other = work[(12 * 9 + 4 * 81) * WIDTH : WORK].reshape(4, 2 * WIDTH)
    a, b, ta, tb = sums[0], sums[1], sums[2], sums[3]
    costs, turned_costs, turned_codes = other[0], other[1], other[2]
    chunks = (book.firsts, book.first_tags, book.seconds)
    below = np.int32((1 << (8 if book.values.size == 3 else 6)) - 1)
    turns = signs != FREE
    for lane in range(0, LANES, WIDTH):
        for g in range(groups):
            first = 2 * half * g * STRIDE + lane
            second, here = first + half * STRIDE, g * STRIDE + lane
            half_sums(x, w, o, first, here, half, scale, lane, turns, book.values, WHOLE, NO_TAGS, table, a, ta)
            half_sums(x, w, o, second, here, half, scale, lane, turns, book.values, ~below, book.tags, table, b, tb)
            if signs == EIGHTS:
                search_turned(*chunks, below, a, b, ta, tb, costs, 0, c, here)
                continue
            at = (g & 1) * WIDTH
            search_plain(*chunks, below, a, b, costs, at, c, here)
            if signs == FREE:
                continue
            search_turned(*chunks, below, a, b, ta, tb, turned_costs, at, turned_codes, at)
            if g & 1:
                for k in range(WIDTH):
                    even = turned_costs[k] - costs[k] < turned_costs[WIDTH + k] - costs[WIDTH + k]
                    need = odd[g, lane + k] > ZERO
                    turned[g - 1, lane + k] = ONE if need and even else ZERO
                    turned[g, lane + k] = ONE if need and not even else ZERO
                    if need:
                        if even:
                            codes[g - 1, lane + k] = turned_codes[k]
                        else:
                            codes[g, lane + k] = turned_codes[WIDTH + k]


@njit(**INLINE)
def fit(xt: F32, wt: F32, codes: F32, turned: F32, values: F32, square: F32, product: F32, work: F32) -> None:
    """A = sum w q^2 and B = sum w x q of 128 blocks, turned weights with the wrong sign: square, product [128]."""
    elements, groups = xt.shape[0], codes.shape[0]
    size = elements // groups
    bits = np.int32(2 if values.size == 3 else 3)
    top, low = np.int32(values.size - 1), np.int32((1 << bits) - 1)
    base, step = values[0], values[1] - values[0]
    bump = values[top] - base - step * np.float32(top)
    least_loss, whole = work[0], codes.view(np.int32)
    for lane in range(LANES):
        square[lane] = ZERO
        product[lane] = ZERO
    for g in range(groups):
        for lane in range(LANES):
            least_loss[lane] = WORST
        for i in range(size):
            shift = np.int32(bits * ((i + size // 2) % size))
            for lane in range(LANES):
                q = (whole[g, lane] >> shift) & low
                v = base + step * np.float32(q) + (bump if q == top else ZERO)
                w = wt[g * size + i, lane] * v
                b = w * xt[g * size + i, lane]
                square[lane] += w * v
                product[lane] += b
                least_loss[lane] = min(least_loss[lane], b)
        for lane in range(LANES):
            product[lane] -= TWO * turned[g, lane] * least_loss[lane]


@njit(**FAST)
def measure(
    xt: F32, wt: F32, odd: F32, signs: int, scale: F32, book: Book, codes: F32, turned: F32, found: F32, work: F32
) -> None:
    """`search` and `fit`: found [2, 128] takes A and B."""
    search(xt, wt, odd, signs, scale, book, codes, turned, work)
    fit(xt, wt, codes, turned, book.values, found[0], found[1], work[:LANES].reshape(1, LANES))


@njit(**INLINE)
def gather(x: F32, importance: F32, first: int, count: int, signs: int, xt: F32, wt: F32, odd: F32, minus: I32) -> None:
    """Magnitudes and importances of blocks first..first+127, the bits of negative ones by group, and what is odd."""
    groups = odd.shape[0]
    size = xt.shape[0] // groups
    load_tile(x, importance, first, count, xt, wt)
    for g in range(groups):
        for lane in range(LANES):
            odd[g, lane] = ZERO
            minus[g, lane] = 0
        for i in range(size):
            for lane in range(LANES):
                v, o, m = xt[g * size + i, lane], odd[g, lane], minus[g, lane]
                xt[g * size + i, lane] = abs(v)
                odd[g, lane] = ONE - o if v < ZERO else o
                minus[g, lane] = m | (np.int32(1 << i) if v < ZERO else np.int32(0))
    if signs == PAIRS:
        for g in range(0, groups, 2):
            for lane in range(LANES):
                both = abs(odd[g, lane] - odd[g + 1, lane])
                odd[g, lane] = both
                odd[g + 1, lane] = both


@njit(**INLINE)
def first_scale(xt: F32, wt: F32, values: F32, guesses: F32, scale: F32, work: F32) -> None:
    """The scale at which each block loses least if every weight may take any value.

    Args:
        guesses: the deviation of a block over the scales that are tried.
        scale: out, [128].
        work: [5, 128].
    """
    upper, lower, square, product, gain = work[0], work[1], work[2], work[3], work[4]
    top = np.float32(values.size - 1)
    base, step = values[0], values[1] - values[0]
    bump = values[-1] - base - step * top
    part, shift = ONE / step, HALF - base / step
    for lane in range(LANES):
        upper[lane] = ZERO
        lower[lane] = ZERO
        gain[lane] = -ONE
        scale[lane] = ZERO
    for i in range(xt.shape[0]):
        for lane in range(LANES):
            upper[lane] += wt[i, lane] * xt[i, lane] * xt[i, lane]
            lower[lane] += wt[i, lane]
    for lane in range(LANES):
        upper[lane] = np.sqrt(upper[lane] / lower[lane])
        lower[lane] = part / max(upper[lane], TINY)
    for k in range(guesses.size):
        for lane in range(LANES):
            square[lane] = ZERO
            product[lane] = ZERO
        for i in range(0, xt.shape[0], 2):
            for lane in range(LANES):
                inverse = lower[lane] * guesses[k]
                x0, x1, w0, w1 = xt[i, lane], xt[i + 1, lane], wt[i, lane], wt[i + 1, lane]
                q0 = min(max(np.floor(x0 * inverse + shift), ZERO), top)
                q1 = min(max(np.floor(x1 * inverse + shift), ZERO), top)
                v0 = base + step * q0 + (bump if q0 == top else ZERO)
                v1 = base + step * q1 + (bump if q1 == top else ZERO)
                a0, a1 = w0 * v0, w1 * v1
                square[lane] += a0 * v0 + a1 * v1
                product[lane] += a0 * x0 + a1 * x1
        for lane in range(LANES):
            s, old_gain, old = product[lane] / square[lane], gain[lane], scale[lane]
            new_gain = s * product[lane]
            scale[lane] = s if new_gain > old_gain else old
            gain[lane] = max(new_gain, old_gain)


@njit(**INLINE)
def lowest_entry(xt: F32, wt: F32, value: np.float32, square: F32, product: F32) -> None:
    """A and B of the entry with which every grid begins, all of the least value: flat blocks are exact with it."""
    for lane in range(LANES):
        square[lane] = ZERO
        product[lane] = ZERO
    for i in range(xt.shape[0]):
        for lane in range(LANES):
            w = wt[i, lane] * value
            square[lane] += w * value
            product[lane] += w * xt[i, lane]


@njit(**FAST)
def encode_blocks(
    x: F32, importance: F32, signs: int, book: Book, unit: np.float32, guesses: F32, starts: F32, parts: F32,
    entries: I16, minus_out: U8, codes_out: U8, steps: F32,
) -> None:  # fmt: skip
    """Super-blocks of blocks that have a 4-bit scale each: a block's scale is step * unit * (2 code + 1).

    Args:
        x: flat, row-major [rows, columns].
        importance: [columns].
        signs: FREE, EIGHTS or PAIRS.
        unit: a power of two.
        guesses: see `first_scale`.
        starts: the multiples of the first scale at which entries are searched, free of what signs must obey.
        parts: see `choose_steps`.
        entries: out, [super-blocks, blocks, groups].
        minus_out: out, as entries, the bits of the negative weights of each group.
        codes_out: out, [super-blocks, blocks].
        steps: out, [super-blocks], representable in half precision.
    """
    count, blocks, groups = entries.shape
    size = 256 // blocks // groups
    bits = np.int32(2 if book.values.size == 3 else 3)
    low = np.int32((1 << bits) - 1)
    per_tile = LANES // blocks
    xt, wt, odd = lane_rows(size * groups), lane_rows(size * groups), lane_rows(groups)
    patterns, turned, minus = lane_rows(groups), lane_rows(groups), lane_rows(groups).view(np.int32)
    work = lane_rows(WORK // STRIDE + 1).reshape(-1)
    squares, products, found = lane_rows(starts.size + 1), lane_rows(starts.size + 1), lane_rows(2)
    lanes, trials, grid = lane_rows(6), lane_rows(5), np.empty((6, parts.size), np.float32)
    start, scale, best, gain, step, code = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5]
    whole = patterns.view(np.int32)
    for first in range(0, count, per_tile):
        gather(x, importance, first * blocks, count * blocks, signs, xt, wt, odd, minus)
        first_scale(xt, wt, book.values, guesses, start, trials)
        for lane in range(LANES):
            best[lane] = ZERO
            gain[lane] = -ONE
        for g in range(groups):
            for lane in range(LANES):
                turned[g, lane] = ZERO
        for t in range(starts.size + 1):
            if t == starts.size:
                lowest_entry(xt, wt, book.values[0], found[0], found[1])
            else:
                for lane in range(LANES):
                    scale[lane] = start[lane] * starts[t]
                measure(xt, wt, odd, FREE, scale, book, patterns, turned, found, work)
            for lane in range(LANES):
                a, b, old_gain, old_best = found[0, lane], found[1, lane], gain[lane], best[lane]
                squares[t, lane] = a
                products[t, lane] = b
                s = b / max(a, TINY)
                best[lane] = s if s * b > old_gain else old_best
                gain[lane] = max(s * b, old_gain)
        choose_steps(squares, products, blocks, unit, MOST, parts, best, step, grid)
        for lane in range(LANES):
            s, d = best[lane], step[lane] * unit
            c = np.floor(HALF * s / max(d, TINY))
            code[lane] = min(c, MOST)
            scale[lane] = d * (TWO * min(c, MOST) + ONE)
        if signs == EIGHTS:
            for g in range(groups):
                for lane in range(LANES):
                    turned[g, lane] = odd[g, lane]
        measure(xt, wt, odd, signs, scale, book, patterns, turned, found, work)
        refit_steps(blocks, unit, code, found[0], found[1], step)
        for s in range(min(per_tile, count - first)):
            steps[first + s] = step[s * blocks]
            for j in range(blocks):
                lane = s * blocks + j
                codes_out[first + s, j] = np.uint8(code[lane])
                for g in range(groups):
                    pattern, turn, loss = whole[g, lane], np.int32(0), WORST
                    entries[first + s, j, g] = book.entry[pattern]
                    if turned[g, lane] > ZERO:
                        for i in range(size):
                            q = (pattern >> np.int32(bits * ((i + size // 2) % size))) & low
                            v = wt[g * size + i, lane] * xt[g * size + i, lane] * book.values[q]
                            turn = np.int32(1 << i) if v < loss else turn
                            loss = min(v, loss)
                    minus_out[first + s, j, g] = np.uint8(minus[g, lane] ^ turn)
