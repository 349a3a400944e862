"""GPTQ on groups of rows with square-law scales (EXL2): scales are found when a group's turn comes.

The loss of error feedback is the sum of (error / U[i, i])^2 over all rows i, U being the upper Cholesky factor of the
inverse Hessian: what a row's error costs once the rows after it have made up for it as well as they can. So that is
what scales are chosen by: first by rounding to nearest with these weights, then, for each output, between the three
best scales by running the feedback of the group with each. On layers of smollm2-768, calibrated and tested on different
text, this leaves 12 % less error of the output at 4 bits than exllamav2's rule (largest weights, then one factor for
all) under the same feedback, 18 % less at 2 bits. Going over the groups again with the codes of all others settled
gains 1 % more at 2 bits and nothing at 4, for twice the time: it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fewbits.codecs.row_groups import GroupedRows, RowGroups
from fewbits.kernels.lanes import LANES, usable_importance
from fewbits.kernels.row_groups import choose_codes, feed_group, free_scales, scan_units
from fewbits.methods.base import Known

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
STRIP = 512
"""Outputs that a thread takes at once: always so many, as the last bits of matrix products depend on their shapes."""
BLOCK = 128
"""Rows that are rounded, at least, before their errors reach the rest in one matrix product."""
LEAST = {2: 0.35, 3: 0.45, 4: 0.55, 5: 0.65, 6: 0.75, 8: 0.85}
"""Bits -> the smallest scale worth a try, in terms of the one that just reaches the largest weight."""
UNITS = np.geomspace(0.4, 1.15, 16)
"""Units that are tried first, in terms of the one that just reaches the largest scale."""
NEARBY = np.linspace(0.96, 1.04, 9)
"""Units that are tried next, in terms of the best of those."""
REACH = {2: 3, 3: 3, 4: 3, 5: 2, 6: 2, 8: 1}
"""Bits -> how many scale codes are tried on either side of an output's own scale."""
TRIES = {2: 1, 3: 1, 4: 1, 5: 0, 6: 0, 8: 0}
"""Bits -> how many codes on either side of the best one are tried by feedback; with more bits that gains nothing."""


@dataclass(frozen=True)
class Strip:
    """Some outputs of a matrix under way; outputs of zeros fill the last lanes.

    Attributes:
        columns: which of the matrix.
        left: float32 [in, width], rows in order: what is to be rounded, errors of the rows before passed on.
        codes: uint8 [in, width].
        scale_codes: float32 [groups, width], 1 to 16.
        free: float32 [width], work: scales that the group's columns would have by themselves.
        errors: float32 [rows of the block, width], work.
    """

    columns: slice
    left: Floats
    codes: npt.NDArray[np.uint8]
    scale_codes: Floats
    free: Floats
    errors: Floats


@dataclass(frozen=True)
class Group:
    """Rows start to stop of the matrix, the index-th group; rows first to last make up its block.

    Attributes:
        weight: float32 [rows], of each row's squared error, one on average.
        upper: float32 [in, in], None: errors are not passed on.
    """

    index: int
    bits: int
    start: int
    stop: int
    first: int
    last: int
    weight: Floats
    upper: Floats | None

    @property
    def half(self) -> np.float32:
        return np.float32(1 << (self.bits - 1))

    def units(self, sizes: Doubles) -> Floats:
        """The nearest ones that half precision has, above zero and so small that no weight overflows."""
        most = 65504.0 / (256 << (self.bits - 1))
        return np.clip(sizes, 2.0**-24, most).astype(np.float16).astype(np.float32)

    def feed(self, strip: Strip, unit: np.float32, own: Floats) -> None:
        """Round the group's rows and pass their errors on: to the rest of the block, or from the block to the rest."""
        errors = strip.errors[self.start - self.first : self.stop - self.first]
        codes, ranks = strip.scale_codes[self.index], strip.codes[self.start : self.stop]
        tries = 0 if self.upper is None else TRIES[self.bits]
        feed_group(strip.left[self.start : self.stop], own, self.half, unit, tries, codes, ranks, errors)
        if self.upper is None:
            return
        if self.stop < self.last:
            here, there = slice(self.start, self.stop), slice(self.stop, self.last)
        else:
            here, there, errors = slice(self.first, self.last), slice(self.last, None), strip.errors
        strip.left[there] -= self.upper[here, there].T @ errors[: here.stop - here.start]


Each = Callable[[Callable[[Strip], Any]], list[Any]]
"""Calls a function with every strip, side by side where there are threads; results in order."""


def quantize(weights: Floats, kind: RowGroups, known: Known, pool: Executor | None = None) -> GroupedRows:
    """Choose scales and codes of a matrix.

    Args:
        weights: float32 [out, in], finite.
        known: the factor is what errors are passed on by; without it rows are rounded as they are, weighted by the
            importance where that is known. With another device than the processor all of it runs there.
        pool: to work on several outputs at once; the result is the same.
    """
    n_out, n_in = weights.shape
    cost = usable_importance(known.importance, n_in)
    upper = None
    if known.factor is not None:
        order, upper = known.factor.order, known.factor.upper
        cost = (np.maximum(upper.diagonal(), np.float32(1e-15)) ** -2).astype(np.float32)
    else:
        order = np.argsort(-cost, kind="stable")
        cost = cost[order]
    groups = list(_groups(kind, cost, upper))
    if known.device != "cpu":
        from fewbits.methods import gptq_row_groups_torch  # imports torch

        return gptq_row_groups_torch.quantize(weights, kind, known, order, groups)
    strips = list(_strips(weights, order, len(groups), max(group.last - group.first for group in groups)))
    scale_max = np.empty(len(groups), np.float16)

    def each(work: Callable[[Strip], Any]) -> list[Any]:
        return list(map(work, strips) if pool is None else pool.map(work, strips))

    for group in groups:
        unit = _search(group, each)
        scale_max[group.index] = unit * np.float32(256)
        here = slice(group.start, group.stop)
        rows = group.stop - group.start
        own = np.eye(rows, dtype=np.float32) if upper is None else np.ascontiguousarray(upper[here, here])

        def feed(strip: Strip, group: Group = group, unit: np.float32 = unit, own: Floats = own) -> None:
            group.feed(strip, unit, own)

        each(feed)
    codes = np.empty((n_in, n_out), np.uint8)
    scale_codes = np.empty((len(groups), n_out), np.uint8)
    for strip in strips:
        width = strip.columns.stop - strip.columns.start
        codes[:, strip.columns] = strip.codes[:, :width]
        scale_codes[:, strip.columns] = strip.scale_codes[:, :width] - 1
    return GroupedRows(kind, order, codes, scale_codes, scale_max)


def _groups(kind: RowGroups, cost: Floats, upper: Floats | None) -> Iterator[Group]:
    """The groups of a matrix, as many at a time as make a block; cost: [in], of each row's squared error."""
    ends = np.cumsum([rows for _, rows in kind.groups(cost.size)]).tolist()
    first = last = start = 0
    for index, (bits, rows) in enumerate(kind.groups(cost.size)):
        if start == last:
            first, last = last, next((end for end in ends if end >= last + BLOCK), cost.size)
        weight = cost[start : start + rows]
        yield Group(
            index, bits, start, start + rows, first, last, weight / max(weight.mean(), np.float32(1e-30)), upper
        )
        start += rows


def _strips(weights: Floats, order: npt.NDArray[np.int64], groups: int, block: int) -> Iterator[Strip]:
    for start in range(0, weights.shape[0], STRIP):
        part = weights[start : start + STRIP]
        width = -(-part.shape[0] // LANES) * LANES
        left = np.zeros((order.size, width), np.float32)
        left[:, : part.shape[0]] = part.T[order]
        yield Strip(
            slice(start, start + part.shape[0]),
            left,
            np.empty(left.shape, np.uint8),
            np.ones((groups, width), np.float32),
            np.empty(width, np.float32),
            np.zeros((block, width), np.float32),
        )


def _search(group: Group, each: Each) -> np.float32:
    """The unit of a group's scales with the least weighted error; leaves each strip with scale codes for it."""
    rows = slice(group.start, group.stop)

    def alone(strip: Strip) -> float:
        free_scales(strip.left[rows], group.weight, group.half, np.float32(LEAST[group.bits]), strip.free)
        return float(strip.free.max())

    largest = max(each(alone))

    def scan(units: Floats) -> Doubles:
        def one(strip: Strip) -> Doubles:
            totals = np.zeros(units.size)
            scan_units(strip.left[rows], group.weight, group.half, strip.free, units, totals)
            return totals

        return np.sum(each(one), axis=0)

    def choose(unit: np.float32) -> Doubles:
        def one(strip: Strip) -> Doubles:
            sums, codes = np.zeros(3), strip.scale_codes[group.index]
            choose_codes(strip.left[rows], group.weight, group.half, strip.free, unit, REACH[group.bits], codes, sums)
            return sums

        return np.sum(each(one), axis=0)

    return settled_unit(group, largest, scan, choose)


def settled_unit(
    group: Group, largest: float, scan: Callable[[Floats], Doubles], choose: Callable[[np.float32], Doubles]
) -> np.float32:
    """The unit of a group's scales with the least weighted error.

    Args:
        largest: of the scales that columns would have by themselves.
        scan: gives the error with each of some units.
        choose: settles the columns' scale codes for a unit; gives the error, and the numerator and the denominator of
            the unit that would be best for these codes. What it is called with last is the unit that is returned.
    """

    def best(units: Floats) -> np.float32:
        return np.float32(units[int(np.argmin(scan(units)))])

    coarse = best(group.units(largest / 256 * UNITS))
    unit = best(group.units(coarse * NEARBY))
    error, above, below = choose(unit)
    refined = group.units(np.array([above / below]))[0] if below > 0 else unit
    if refined == unit:
        return unit
    if choose(refined)[0] <= error:
        return refined
    choose(unit)
    return unit
