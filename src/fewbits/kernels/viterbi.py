"""The cheapest tail-biting walk through a trellis of 65536 states, for 16 tiles of 256 weights side by side.

A step of a walk adds K bits to its state, of which 16 are remembered. Between two steps a walk is at a node, the 16 - K
bits that both states share, so each of the 2^(16-K) nodes is entered from 2^K others. The walk has to end at the node
where it began. As exllamav3 does it, one search finds the node for the wrap from the steps around it, and a second one,
from this node to this node, the walk.

Costs are uint16, so that 16 tiles fill one vector: squared misses in steps fine enough that the distortion is the same
as that of float32 (tests/test_exl3.py), less that of the cheapest node, saturating. For up to 4 bits the lowest bits of
a cost hold the node it comes from, and finding the best of 2^K ways is 2^K additions and minima, nothing else. For more
bits there would be too little left for the cost itself; there, costs of all steps are kept and the ways are found again
while walking back.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels import vectors
from fewbits.kernels.lanes import EXACT
from fewbits.kernels.words import WIDTH, add, both_bits, least, load, load_at, multiply, spread, store, subtract, whole

STEPS = 256
MEMORY = 16
"""Bits of a state."""
BLOCK = 4
"""Nodes whose ways in are compared together."""
POINTER_BITS = 4
"""Up to this many bits, costs carry the way."""
RANGE = 512.0
"""Largest cost that counts, in units of what a step costs on average; above 200 distortion does not depend on it."""
REACH = 128
"""How many steps before and after the wrap the search for its node looks at: all. With 80 it takes a fifth less
time, and the distortion is 0.3 % higher."""
BEYOND = np.float32(2)
"""Weights farther than this beyond the codebook's ends are moved there, or rounding errors of float32 would show."""
INLINE = {**EXACT, "inline": "always"}
U16 = npt.NDArray[np.uint16]
F32 = npt.NDArray[np.float32]


@njit(**INLINE)
def fill_table(wanted: F32, values: F32, unit: np.float32, shift: int, base: F32, table: U16) -> None:
    """What each value costs in a step.

    Args:
        wanted: [16], a weight of each tile.
        values: [values] of the codebook, ascending.
        unit: by which squared misses are multiplied.
        shift: how many of the lowest bits stay zero.
        base: work, [16].
        table: out, [values * 16].
    """
    first, last = values[0], values[values.size - 1]
    for lane in range(WIDTH):
        # what any value misses costs nothing extra, or costs of outliers would all saturate
        beyond = max(wanted[lane] - last, first - wanted[lane], np.float32(0))
        base[lane] = np.float32(0.5) - beyond * beyond * unit
    target, scale, offset = vectors.load(wanted, 0), vectors.spread(unit), vectors.load(base, 0)
    top, up = vectors.spread(np.float32(65535 >> shift)), spread(1 << shift)
    for j in range(values.size):
        miss = vectors.subtract(target, vectors.spread(values[j]))
        cost = vectors.add(vectors.multiply(vectors.multiply(miss, miss), scale), offset)
        store(table, j * WIDTH, multiply(whole(vectors.least(cost, top)), up))


@njit(**INLINE)
def run_of(bits: int) -> int:
    """Nodes of which the next step's ways lead into one and the same."""
    return 1 << (MEMORY - 2 * bits)


@njit(**INLINE)
def gap_of(bits: int) -> int:
    """Nodes left out after each run: the ways into a node come from one of each run, and runs of a power of two alone
    would put all of them into the same cache lines."""
    return 4 if run_of(bits) >= BLOCK else 0


@njit(**INLINE)
def place(node: int, bits: int) -> int:
    """Where the costs of a node are."""
    return (node + (node // run_of(bits)) * gap_of(bits)) * WIDTH


@njit(**INLINE)
def carried(bits: int) -> int:
    """How many of the lowest bits of a cost say where it comes from."""
    return bits if bits <= POINTER_BITS else 0


@njit(**INLINE)
def step(bits: int, cost: U16, fresh: U16, table: U16, offsets: U16, low: U16, ways: U16) -> None:
    """One step of all walks.

    Args:
        bits: a constant where this is inlined.
        cost, fresh: of all nodes, before and, out, after.
        table: of `fill_table`.
        offsets: [65536], where in it the value of each state is, in the order in which they are compared here.
        low: [16], the least cost, in and out.
        ways: out, [nodes / 4 * 16].
    """
    fan, stride = 1 << bits, (run_of(bits) + gap_of(bits)) * WIDTH
    mask = fan - 1 if carried(bits) else 0
    top, up, pointer, kept = spread(65535), spread(fan), spread(mask), spread(65535 - mask)
    before, lowest = load(low, 0), top
    j = 0
    for node in range(0, 1 << (MEMORY - bits), BLOCK):
        source = (node >> bits) * WIDTH
        b0, b1, b2, b3 = top, top, top, top
        for way in range(fan):
            here = load(cost, source + way * stride)
            there = load(cost, source + way * stride + WIDTH) if bits == 1 else here
            b0 = least(b0, add(here, load_at(table, offsets, j)))
            b1 = least(b1, add(here, load_at(table, offsets, j + 1)))
            b2 = least(b2, add(there, load_at(table, offsets, j + 2)))
            b3 = least(b3, add(there, load_at(table, offsets, j + 3)))
            j += BLOCK
        less = before
        if carried(bits):
            found = both_bits(b3, pointer)
            found = add(multiply(found, up), both_bits(b2, pointer))
            found = add(multiply(found, up), both_bits(b1, pointer))
            found = add(multiply(found, up), both_bits(b0, pointer))
            store(ways, node // BLOCK * WIDTH, found)
            b0, b1, b2, b3 = both_bits(b0, kept), both_bits(b1, kept), both_bits(b2, kept), both_bits(b3, kept)
            less = subtract(before, spread(node // run_of(bits)))  # and the next step's pointer is in
        b0, b1, b2, b3 = subtract(b0, less), subtract(b1, less), subtract(b2, less), subtract(b3, less)
        at = place(node, bits)
        store(fresh, at, b0)
        store(fresh, at + WIDTH, b1)
        store(fresh, at + 2 * WIDTH, b2)
        store(fresh, at + 3 * WIDTH, b3)
        lowest = least(lowest, least(least(b0, b1), least(b2, b3)))
    store(low, 0, both_bits(lowest, kept))


@njit(**INLINE)
def way_into(
    node: int, lane: int, bits: int, wanted: F32, cost: U16, values: F32, offsets: U16, unit: np.float32, ways: U16
) -> int:
    """By which way the walk of a lane comes to a node in a step."""
    block, part = node // BLOCK, node % BLOCK
    if carried(bits):
        return (int(ways[block * WIDTH + lane]) >> (bits * part)) & ((1 << bits) - 1)
    best, least_cost = 0, np.float32(np.inf)
    for way in range(1 << bits):
        miss = wanted[lane] - values[offsets[((block << bits) + way) * BLOCK + part] // WIDTH]
        source = (node >> bits) + way * (run_of(bits) + gap_of(bits))
        total = np.float32(cost[source * WIDTH + lane]) + miss * miss * unit
        if total < least_cost:
            best, least_cost = way, total
    return best


@njit(**EXACT)
def search(
    kind: tuple[int, ...], tiles: F32, values: F32, offsets: U16, unit: np.float32, reach: int, costs: U16, ways: U16
) -> U16:
    """The bits that each step adds, uint16 [tiles, 256].

    Args:
        kind: as many numbers as a step has bits: a tuple's length is a constant when this is compiled, once for each.
        tiles: [tiles, 256].
        values: [values] of the codebook, ascending.
        offsets: [65536], 16 times the rank of the value of each state, in the order in which `step` compares them.
        unit: by which squared misses are multiplied.
        reach: how many steps before and after the wrap the first search looks at.
        costs, ways: memory, of `Walker.workspace`.
    """
    bits = len(kind)
    count, rows, nodes = tiles.shape[0], costs.shape[0], 1 << (MEMORY - bits)
    symbols = np.empty((count, STEPS), np.uint16)
    table, low = np.empty(values.size * WIDTH, np.uint16), np.empty(WIDTH, np.uint16)
    base, wanted = np.empty(WIDTH, np.float32), np.empty((STEPS, WIDTH), np.float32)
    wraps = np.zeros(WIDTH, np.int64)
    least_value, most = values[0] - BEYOND, values[values.size - 1] + BEYOND
    for first in range(0, count, WIDTH):
        for lane in range(WIDTH):
            tile = tiles[min(first + lane, count - 1)]
            for i in range(STEPS):
                wanted[i, lane] = min(max(tile[i], least_value), most)
        for final in range(2):
            begin, length = (0, STEPS) if final else (STEPS - reach, 2 * reach)
            costs[0, :] = 65535 if final else 0
            low[:] = 0
            for node in range(nodes):
                for lane in range(WIDTH):
                    if final == 0 or node == wraps[lane]:
                        costs[0, place(node, bits) + lane] = node // run_of(bits) if carried(bits) else 0
            for i in range(length):
                fill_table(wanted[(begin + i) % STEPS], values, unit, carried(bits), base, table)
                now, then = costs[i % rows], costs[(i + 1) % rows]
                step(bits, now, then, table, offsets, low, ways[i % ways.shape[0]])
            ends = costs[length % rows]
            for lane in range(WIDTH):
                node = wraps[lane]
                if final == 0:
                    node = 0
                    for other in range(nodes):
                        rival, best = ends[place(other, bits) + lane], ends[place(node, bits) + lane]
                        if rival >> carried(bits) < best >> carried(bits):
                            node = other
                for back in range(length if final else reach):
                    i = length - 1 - back
                    at = (begin + i) % STEPS
                    if final and first + lane < count:
                        symbols[first + lane, at] = node & ((1 << bits) - 1)
                    now = costs[i % rows]
                    taken = ways[i % ways.shape[0]]
                    way = way_into(node, lane, bits, wanted[at], now, values, offsets, unit, taken)
                    node = (way << (MEMORY - 2 * bits)) | (node >> bits)
                wraps[lane] = node
    return symbols


def at_cache_lines(rows: int, columns: int) -> U16:
    """Uninitialized [rows, columns] that begins where a cache line does: vectors that straddle two are slower."""
    raw = np.empty(rows * columns + 32, np.uint16)
    skip = (-raw.ctypes.data % 64) // 2
    return raw[skip : skip + rows * columns].reshape(rows, columns)


class Walker:
    """Searches through one trellis.

    Args:
        ranks: [65536], which value each state stands for.
        values: float32 [values], ascending, at most 4096.
        bits: of a step, 1 to 8.
    """

    def __init__(self, ranks: npt.NDArray[np.integer], values: F32, bits: int) -> None:
        self.bits, self.values = bits, values
        pointed = carried(bits) > 0
        nodes = np.arange(1 << (MEMORY - bits)).reshape(-1, 1, BLOCK)
        states = (np.arange(1 << bits)[None, :, None] << (MEMORY - bits)) | nodes
        self.offsets = (ranks[states] * WIDTH).astype(np.uint16).ravel()
        expected = float(np.var(values[ranks])) * 4.0**-bits
        self.unit = np.float32(2.0 ** (16 - bits) / (RANGE * expected) if pointed else 65536 / (16 * RANGE * expected))

    def workspace(self) -> tuple[U16, U16]:
        """Memory for `walk`, 8 to 68 MB, which one thread at a time can use again and again."""
        pointed = carried(self.bits) > 0
        nodes = 1 << (MEMORY - self.bits)
        costs = at_cache_lines(2 if pointed else STEPS + 1, place(nodes, self.bits))
        return costs, at_cache_lines(STEPS if pointed else 1, nodes // BLOCK * WIDTH)

    def walk(self, tiles: F32, work: tuple[U16, U16] | None = None) -> U16:
        """The walks that come closest to tiles.

        Args:
            tiles: float32 [tiles, 256], in the order of the steps.
            work: of `workspace`.

        Returns:
            uint16 [tiles, 256], the bits that each step adds.
        """
        costs, ways = work or self.workspace()
        tiles = np.ascontiguousarray(tiles, np.float32)
        return search((0,) * self.bits, tiles, self.values, self.offsets, self.unit, REACH, costs, ways)
