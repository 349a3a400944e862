"""Rounding group by group with error feedback, for groups of weights whose codes are entries of a fixed grid.

With U the group's block of the upper Cholesky factor of the inverse Hessian, a group's error d costs |d U^-1|^2 once
the columns to come have made up for it as well as they can. The least cost over all entries and all signs that are
allowed is found exactly: the cost is that of the first half of the group plus that of the second, whose targets the
error of the first half moves. All first halves are tried, cheaply, and after the best of them only such as cost less
than the best whole group found so far; for each of them all second halves that the grid allows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from fewbits.kernels.lanes import EXACT, FAST, INLINE, LANES, lane_rows
from fewbits.kernels.ternary import lowest
from fewbits.kernels.vectors import WIDTH, add, load, multiply, spread, spread_bits, store, subtract, where_less

F32 = npt.NDArray[np.float32]
I16 = npt.NDArray[np.int16]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
WORST = np.float32(1e38)
UNSIGNED, FREE, EVEN = range(3)
"""What signs are: part of the entries, free, or free but for an even number of minus in each 8 weights."""


@intrinsic
def bits_less(typing: Any, a: Any, b: Any) -> Any:
    """An int32 whose bit k tells whether a < b in lane k."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        less = builder.fcmp_ordered("<", arguments[0], arguments[1])
        return builder.zext(builder.bitcast(less, ir.IntType(WIDTH)), ir.IntType(32))

    return types.int32(a, b), generate


@intrinsic
def first_bit(typing: Any, bits: Any) -> Any:
    """The number of the lowest bit that is set, of an int32 that is not zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = context.cast(builder, arguments[0], bits, types.int32)
        return builder.cttz(whole, ir.Constant(ir.IntType(1), 1))

    return types.int32(bits), generate


class Codewords(NamedTuple):
    """What a group can be, over its scale: halves in rows of 16 candidates, side by side.

    A row holds the patterns of magnitudes that it has room for, each with all its signs: bit i of a lane's number is
    set where weight i is negative. Unsigned halves stand for themselves.
    """

    half: tuple[int, ...]
    """The numbers of the weights in half a group: its length is known when compiling, so that loops are unrolled."""
    first: F32
    """First halves: [rows, half, 16]."""
    first_none: F32
    """[rows * 16], WORST where a lane holds none."""
    second: F32
    """Second halves: [rows, half, 16]."""
    second_none: F32
    odd: F32
    """[2 * 16]: WORST for second halves whose signs are (first 16) odd, (last 16) even; all zero where signs are
    free."""
    begins: I32
    """Where in `rows` those of the second halves begin that go with a pattern of first halves: [patterns + 1]."""
    rows: I32
    entry: I16
    """Which codeword each pattern of second halves makes, in the order of `rows`: [rows * patterns in a row]."""


def codewords(values: F32, signs: int) -> Codewords:
    """Lay out codewords for `feed_groups`.

    Args:
        values: [codewords, 4 or 8]; magnitudes, unless signs are part of them.
        signs: UNSIGNED, FREE or EVEN.
    """
    half = values.shape[1] // 2
    turns = 1 if signs == UNSIGNED else 1 << half
    patterns = WIDTH // turns
    turn = 1 - 2 * ((np.arange(WIDTH) % turns)[:, None] >> np.arange(half) & 1)
    firsts, class_of = np.unique(values[:, :half], axis=0, return_inverse=True)
    class_of = class_of.reshape(-1)

    def packed(some: list[npt.NDArray[np.float32]]) -> tuple[F32, F32]:
        """Rows of patterns: their candidates, and which lanes are empty."""
        out, none = np.zeros((len(some), half, WIDTH), np.float32), np.full((len(some), WIDTH), WORST, np.float32)
        for row, block in enumerate(some):
            lanes = np.arange(len(block) * turns)
            out[row][:, lanes] = (block[lanes // turns] * turn[lanes]).T
            none[row, lanes] = 0
        return out, none.reshape(-1)

    unique: dict[bytes, int] = {}
    blocks: list[F32] = []
    rows, entries, begins = [], [], [0]
    for index in range(len(firsts)):
        chosen = np.flatnonzero(class_of == index)
        for start in range(0, chosen.size, patterns):
            some = chosen[start : start + patterns]
            block = values[some, half:]
            key = block.tobytes()
            if key not in unique:
                unique[key] = len(blocks)
                blocks.append(block)
            rows.append(unique[key])
            entries.append(np.concatenate([some, np.repeat(some[-1:], patterns - some.size)]))
        begins.append(len(rows))
    first, first_none = packed([firsts[i : i + patterns] for i in range(0, len(firsts), patterns)])
    second, second_none = packed(blocks)
    parity = (turn < 0).sum(1) % 2
    odd = np.stack([parity == 1, parity == 0]) * (WORST if signs == EVEN else ZERO)
    return Codewords(
        tuple(range(half)),
        first,
        first_none,
        second,
        second_none,
        odd.astype(np.float32).reshape(-1),
        np.array(begins, np.int32),
        np.array(rows, np.int32),
        np.concatenate(entries).astype(np.int16),
    )


@njit(**EXACT)
def split(factor: F32, at: int, size: int, whole: F32, tail: F32, turn: F32, work: npt.NDArray[np.float64]) -> None:
    """The cost of a group's error as that of its halves: |d1 R1|^2 + |(d2 - d1 turn) R2|^2, R the halves' inverses.

    Args:
        factor: the group's factor, an upper triangle, begins at [0, at].
        whole, tail: out, [half, half], twice R R^T of the first and the second half.
        turn: out, [half, half].
        work: [2, half, half].
    """
    half = size // 2
    for part in range(2):
        inverse, out, first = work[part], tail if part else whole, part * half
        for i in range(half):
            for j in range(half):
                inverse[i, j] = 0.0
        for j in range(half):
            inverse[j, j] = 1.0 / factor[first + j, at + first + j]
            for i in range(j):
                total = 0.0
                for k in range(i, j):
                    total += inverse[i, k] * factor[first + k, at + first + j]
                inverse[i, j] = -total * inverse[j, j]
        for i in range(half):
            for j in range(half):
                total = 0.0
                for k in range(half):
                    total += inverse[i, k] * inverse[j, k]
                out[i, j] = np.float32(2.0 * total)
    for i in range(half):
        for j in range(half):
            total = 0.0
            for k in range(half):
                total += work[0, i, k] * factor[k, at + half + j]
            turn[i, j] = np.float32(total)


@njit(**FAST)
def norms(candidates: F32, none: F32, matrix: F32, out: F32) -> None:
    """What candidates cost by themselves: half of c matrix c^T, [rows * 16], WORST where there is none."""
    half = matrix.shape[0]
    for row in range(candidates.shape[0]):
        at = row * half * WIDTH
        total = load(none, row * WIDTH)
        for i in range(half):
            inner = spread(ZERO)
            for j in range(half):
                inner = add(inner, multiply(spread(matrix[i, j] * HALF), load(candidates, at + j * WIDTH)))
            total = add(total, multiply(inner, load(candidates, at + i * WIDTH)))
        store(out, row * WIDTH, total)


@njit(**INLINE)
def choose(
    target: F32, at: int, weights: tuple[int, ...], patterns: int, needed: int,
    first: F32, second: F32, odd: F32, begins: I32, rows: I32, entry: I16,
    first_norms: F32, second_norms: F32, whole: F32, tail: F32, turn: F32,
    costs: F32, moved: F32, found: I32,
) -> np.float32:  # fmt: skip
    """The codeword of the least cost, and that.

    Args:
        target: [columns], over the scale; the group's stand at `at`.
        weights: of half a group, by number.
        patterns: in 16 lanes.
        needed: 1 where an odd number of signs must be minus, else 0.
        first ... entry: of the `Codewords`, first and second flat.
        first_norms, second_norms: see `norms`.
        whole, tail, turn: see `split`.
        costs: work, [first halves].
        moved: work, [2 * half + 32].
        found: out: codeword, signs, and where the halves stand in first and second.
    """
    half = len(weights)
    turns, four = WIDTH // patterns, half == 4
    slopes = moved[half:]
    const = ZERO
    for i in range(half):
        total = ZERO
        for j in range(half):
            total += whole[i, j] * target[at + j]
        slopes[i] = total
        const += HALF * total * target[at + i]
    a0, a1 = spread(slopes[0]), spread(slopes[1])
    a2, a3 = (spread(slopes[2]), spread(slopes[3])) if four else (a0, a1)
    base, low, where = spread(const), spread(WORST), spread(ZERO)
    for row in range(first_norms.size // WIDTH):
        first_at = row * half * WIDTH
        cost = subtract(add(base, load(first_norms, row * WIDTH)), multiply(a0, load(first, first_at)))
        cost = subtract(cost, multiply(a1, load(first, first_at + WIDTH)))
        if four:
            cost = subtract(cost, multiply(a2, load(first, first_at + 2 * WIDTH)))
            cost = subtract(cost, multiply(a3, load(first, first_at + 3 * WIDTH)))
        store(costs, row * WIDTH, cost)
        where = where_less(cost, low, spread_bits(np.int32(row)), where)
        low = where_less(cost, low, cost, low)
    least = lowest(low)
    store(moved, 2 * half, where)
    # what is not above the least
    lane0 = first_bit(np.int32(65535) ^ bits_less(spread(least), low) | np.int32(65536))
    lane0 = min(lane0, np.int32(WIDTH - 1))
    row0 = moved.view(np.int32)[2 * half + lane0]
    best, number, lane2, chosen = WORST, np.int32(-1), np.int32(0), np.int32(0)
    for step in range(-1, first_norms.size // WIDTH):
        row_at = row0 if step < 0 else np.int32(step)
        bits = bits_less(load(costs, row_at * WIDTH), spread(best))
        if step < 0:
            bits = np.int32(1) << lane0
        while bits != 0:
            lane = first_bit(bits)
            bits &= bits - np.int32(1)
            candidate = row_at * WIDTH + lane
            cost1 = costs[candidate]
            if not cost1 < best:
                continue
            costs[candidate] = WORST
            for j in range(half):
                moved[j] = target[at + half + j]
            for i in range(half):
                missed = target[at + i] - first[(row_at * half + i) * WIDTH + lane]
                for j in range(half):
                    moved[j] -= missed * turn[i, j]
            for i in range(half):
                total = ZERO
                for j in range(half):
                    total += tail[i, j] * moved[j]
                slopes[i] = total
                cost1 += HALF * total * moved[i]
            b0, b1 = spread(slopes[0]), spread(slopes[1])
            b2, b3 = (spread(slopes[2]), spread(slopes[3])) if four else (b0, b1)
            minus, odds = lane % turns, np.int32(needed)
            for i in range(half):
                odds = odds ^ (minus >> i) & 1
            base = add(spread(cost1), load(odd, odds * WIDTH))
            pattern = candidate // turns
            low, where = spread(WORST), spread_bits(begins[pattern])
            for k in range(begins[pattern], begins[pattern + 1]):
                second_at = rows[k] * half * WIDTH
                cost = subtract(load(second_norms, rows[k] * WIDTH), multiply(b0, load(second, second_at)))
                cost = subtract(cost, multiply(b1, load(second, second_at + WIDTH)))
                if four:
                    cost = subtract(cost, multiply(b2, load(second, second_at + 2 * WIDTH)))
                    cost = subtract(cost, multiply(b3, load(second, second_at + 3 * WIDTH)))
                where = where_less(cost, low, spread_bits(np.int32(k)), where)
                low = where_less(cost, low, cost, low)
            low = add(low, base)
            least = lowest(low)
            if (least < best) | (number < 0):
                best, chosen = least, candidate
                lane2 = first_bit(np.int32(65535) ^ bits_less(spread(least), low) | np.int32(65536))
                lane2 = min(lane2, np.int32(WIDTH - 1))
                store(moved, 2 * half + WIDTH, where)
                number = moved.view(np.int32)[2 * half + WIDTH + lane2]
    found[0] = entry[number * patterns + lane2 // turns]
    found[1] = chosen % turns | (lane2 % turns) << half
    found[2] = chosen // WIDTH * half * WIDTH + chosen % WIDTH
    found[3] = rows[number] * half * WIDTH + lane2
    return best


@njit(**FAST)
def round_groups(
    left: F32, values: F32, again: bool, scale: F32, offset: F32, matrix: F32, factors: F32, book: Codewords,
    words: I16, minus: U8, errors: F32,
) -> None:  # fmt: skip
    """Choose the codewords of some groups, each group's error made up for by those that follow.

    Or, `again`: choose them once more, each group for the errors that all others have left.

    Args:
        left: [columns, rows]: what is to be stood for; again: the errors times the Hessian.
        values: [columns, rows]: out, what the codewords stand for; again: in, what stood there before, too.
        scale, offset: [groups, rows]: a group stands for offset + scale * codeword.
        matrix: [columns, columns]: of the upper Cholesky factor of the inverse Hessian; again: of the Hessian.
        factors: [groups chosen at once, span, span]: each one's block of that factor; again: the upper Cholesky factor
            of the inverse of its block of the Hessian. A span is two groups where the even number of minus is theirs.
        words: out, [groups, rows].
        minus: out, [groups, rows], the bits of the weights with a minus; 0 for unsigned codewords.
        errors: out, [columns, rows], what columns beyond these have to make up for; again: the changes.
    """
    columns, rows = left.shape
    half, span = len(book.half), factors.shape[1]
    size = 2 * half
    parts = span // size
    patterns = book.entry.size // book.rows.size
    first, second = book.first.reshape(-1), book.second.reshape(-1)
    tile, wrong = lane_rows(columns), lane_rows(columns)
    whole, tail = np.empty((2, half, half), np.float32), np.empty((2, half, half), np.float32)
    turn, work = np.empty((2, half, half), np.float32), np.empty((2, half, half), np.float64)
    first_norms = np.empty((2, book.first_none.size), np.float32)
    second_norms = np.empty((2, book.second_none.size), np.float32)
    costs, moved = np.empty(book.first_none.size, np.float32), np.empty(2 * half + 2 * WIDTH, np.float32)
    wanted, target, shares = np.empty(16, np.float32), np.empty(16, np.float32), np.empty(16, np.float32)
    missed, tried = np.empty((2, 16), np.float32), np.empty((2, 16), np.float32)
    found, picked = np.empty(4, np.int32), np.empty((2, 4), np.int32)
    for start in range(0, rows, LANES):
        n = min(LANES, rows - start)
        for j in range(columns):
            for lane in range(n):
                tile[j, lane] = left[j, start + lane]
            for lane in range(n, LANES):
                tile[j, lane] = ZERO
                wrong[j, lane] = ZERO
        for j0 in range(0, columns, span):
            factor = factors[j0 // span]
            for part in range(parts):
                split(factor[part * size :], part * size, size, whole[part], tail[part], turn[part], work)
                norms(book.first, book.first_none, whole[part], first_norms[part])
                norms(book.second, book.second_none, tail[part], second_norms[part])
            for lane in range(n):
                for i in range(span):
                    wanted[i] = tile[j0 + i, lane]
                if again:
                    for i in range(span):
                        total = ZERO
                        for j in range(i, span):
                            total += factor[i, j] * wanted[j]
                        shares[i] = total
                    for j in range(span):
                        total = values[j0 + j, start + lane]
                        for i in range(j + 1):
                            total += shares[i] * factor[i, j]
                        wanted[j] = total
                least, chosen = WORST, 0
                for parity in range(parts):
                    cost = ZERO
                    for part in range(parts):
                        at, group = part * size, j0 // size + part
                        s, o = scale[group, start + lane], offset[group, start + lane]
                        inverse = ONE / s if s != ZERO else ZERO
                        for i in range(size):
                            t = wanted[at + i] - o
                            for k in range(at):
                                t -= tried[parity, k] * factor[k, at + i]
                            missed[parity, at + i] = t
                            target[i] = t * inverse
                        cost += choose(
                            target, 0, book.half, patterns, parity,
                            first, second, book.odd, book.begins, book.rows, book.entry,
                            first_norms[part], second_norms[part], whole[part], tail[part], turn[part],
                            costs, moved, found,
                        )  # fmt: skip
                        picked[parity, 2 * part], picked[parity, 2 * part + 1] = found[0], found[1]
                        for i in range(size):
                            place = found[2] + i * WIDTH if i < half else found[3] + (i - half) * WIDTH
                            missed[parity, at + i] -= s * (first[place] if i < half else second[place])
                        for i in range(at, at + size):
                            t = missed[parity, i]
                            for k in range(at, i):
                                t -= tried[parity, k] * factor[k, i]
                            tried[parity, i] = t / factor[i, i]
                    if (cost < least) | (parity == 0):
                        least, chosen = cost, parity
                for part in range(parts):
                    words[j0 // size + part, start + lane] = np.int16(picked[chosen, 2 * part])
                    minus[j0 // size + part, start + lane] = np.uint8(picked[chosen, 2 * part + 1])
                for i in range(span):
                    # whole errors: those of a second group were what the first one's had left of its target
                    t = ZERO
                    for k in range(i + 1):
                        t += tried[chosen, k] * factor[k, i]
                    value, old = wanted[i] - t, values[j0 + i, start + lane]
                    values[j0 + i, start + lane] = value
                    wrong[j0 + i, lane] = value - old if again else tried[chosen, i]
            last = j0 + span
            for j in range(j0, last):
                for k in range(last, columns):
                    share = matrix[j, k]
                    for lane in range(LANES):
                        tile[k, lane] -= share * wrong[j, lane]
        for j in range(columns):
            for lane in range(n):
                errors[j, start + lane] = wrong[j, lane]
