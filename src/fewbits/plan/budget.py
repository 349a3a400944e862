"""Spending a budget of bytes: one type for each tensor so that the sum of losses is the smallest.

A multiple-choice knapsack. It is solved by dynamic programming over bytes, exactly wherever the sizes have a common
divisor that is not tiny against the budget, which those of real models have: all are a product of rows, blocks in a
row and bytes in a block. Else sizes are rounded up to a unit and what that leaves is spent greedily; the bound from
the Lagrangian says how far from the best that can be at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd, inf

import numpy as np
import numpy.typing as npt

from fewbits.errors import FewbitsError
from fewbits.layouts import Layout

STATES = 1 << 17
"""Sizes that the program tells apart: with 200 tensors some 30 MB of choices and a second or two."""


@dataclass(frozen=True)
class Option:
    """What one tensor, or a set of tensors that must share a type, could become.

    Attributes:
        name: of the type.
        nbytes: what it takes in the file.
        loss: what it costs, in any unit that adds up over tensors.
    """

    name: str
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Alternative:
    """An option of linears that are decided together.

    Attributes:
        layouts: of each linear, by its weight's stored name.
    """

    option: Option
    layouts: Mapping[str, Layout]


@dataclass(frozen=True)
class Spent:
    """A choice for each tensor.

    Attributes:
        picks: index of the chosen option of each tensor.
        bound: no choice within the budget has a smaller loss.
    """

    picks: list[int]
    nbytes: int
    loss: float
    bound: float

    def note(self, budget: int) -> str:
        """What a user should know of it."""
        gap = self.loss / self.bound - 1 if self.bound > 0 else 0.0
        return (
            f"{budget - self.nbytes} bytes under the budget, expected to lose at most {gap:.2%} more than the best "
            "mixture"
        )


def spend(tensors: Sequence[Sequence[Option]], budget: int) -> Spent:
    """Choose an option for each tensor.

    Args:
        tensors: the options of each; at least one.
        budget: most bytes of all together.

    Raises:
        FewbitsError: even the smallest options take more.
    """
    frontiers = [_frontier(options) for options in tensors]
    least = sum(options[front[0]].nbytes for options, front in zip(tensors, frontiers, strict=True))
    if least > budget:
        raise FewbitsError(
            f"The smallest mixture takes {least} bytes, the budget has {budget} for tensors.",
            "Allow more, more types, or take a smaller model.",
        )
    chosen = _upgraded(tensors, frontiers, _program(tensors, frontiers, budget), budget)
    picks = [front[place] for front, place in zip(frontiers, chosen, strict=True)]
    nbytes, loss = _totals(tensors, picks)
    return Spent(picks, nbytes, loss, min(loss, _bound(tensors, frontiers, budget)))


def _frontier(options: Sequence[Option]) -> list[int]:
    """Indices of the options that no other beats in both size and loss, the smallest first."""
    front: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: (options[i].nbytes, options[i].loss, i)):
        if not front or options[index].loss < options[front[-1]].loss:
            front.append(index)
    return front


def _totals(tensors: Sequence[Sequence[Option]], picks: Sequence[int]) -> tuple[int, float]:
    chosen = [options[pick] for options, pick in zip(tensors, picks, strict=True)]
    return sum(option.nbytes for option in chosen), sum(option.loss for option in chosen)


def _program(tensors: Sequence[Sequence[Option]], frontiers: Sequence[list[int]], budget: int) -> list[int]:
    """Places on the frontiers, by dynamic programming over the bytes beyond the smallest options."""
    extra = [
        [options[i].nbytes - options[front[0]].nbytes for i in front]
        for options, front in zip(tensors, frontiers, strict=True)
    ]
    room = budget - sum(options[front[0]].nbytes for options, front in zip(tensors, frontiers, strict=True))
    room = min(room, sum(sizes[-1] for sizes in extra))
    unit = reduce(gcd, (size for sizes in extra for size in sizes), 0) or 1
    unit *= -(-room // (unit * STATES)) or 1
    states = room // unit + 1
    best = np.zeros(states)
    taken = np.zeros((len(tensors), states), np.uint8)
    for number, (options, front) in enumerate(zip(tensors, frontiers, strict=True)):
        before, best = best, np.full(states, inf)
        for place, index in enumerate(front):
            step = -(-extra[number][place] // unit)  # rounded up: never over the budget
            if step >= states:
                break
            loss = before[: states - step] + options[index].loss
            better = loss < best[step:]
            best[step:][better] = loss[better]
            taken[number, step:][better] = place
    places = [0] * len(tensors)
    state = states - 1
    for number in reversed(range(len(tensors))):
        places[number] = int(taken[number, state])
        state -= -(-extra[number][places[number]] // unit)
    return places


def _upgraded(
    tensors: Sequence[Sequence[Option]], frontiers: Sequence[list[int]], places: list[int], budget: int
) -> list[int]:
    """Spend what rounding has left: the upgrade with the most gain a byte, as long as one fits."""
    places = list(places)
    left = budget - _totals(tensors, [front[place] for front, place in zip(frontiers, places, strict=True)])[0]
    while True:
        found, most = None, 0.0
        for number, (options, front) in enumerate(zip(tensors, frontiers, strict=True)):
            now = options[front[places[number]]]
            for place in range(places[number] + 1, len(front)):
                then = options[front[place]]
                gain = (now.loss - then.loss) / (then.nbytes - now.nbytes)
                if then.nbytes - now.nbytes <= left and gain > most:
                    found, most = (number, place, then.nbytes - now.nbytes), gain
        if found is None:
            return places
        number, place, cost = found
        places[number] = place
        left -= cost


def _bound(tensors: Sequence[Sequence[Option]], frontiers: Sequence[list[int]], budget: int) -> float:
    """The Lagrangian's largest value: each tensor minimizes loss + price * bytes, the price is found by halving."""
    sizes, losses = _padded(tensors, frontiers)
    low, high = 0.0, 1.0
    with np.errstate(invalid="ignore"):

        def at(price: float) -> tuple[float, float]:
            costs = losses + price * sizes
            picks = costs.argmin(1)
            rows = np.arange(len(picks))
            return float(costs[rows, picks].sum() - price * budget), float(sizes[rows, picks].sum())

        scale = float(np.max(losses, where=np.isfinite(losses), initial=1e-300))
        while at(high * scale)[1] > budget and high < 1e30:
            high *= 4
        best = max(at(low)[0], at(high * scale)[0])
        for _ in range(200):
            middle = (low + high) / 2
            value, used = at(middle * scale)
            best = max(best, value)
            low, high = (middle, high) if used > budget else (low, middle)
    return best


def _padded(
    tensors: Sequence[Sequence[Option]], frontiers: Sequence[list[int]]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sizes and losses of the frontiers as [tensors, places], short rows filled with their last option."""
    width = max(map(len, frontiers))
    rows = [
        [options[front[min(place, len(front) - 1)]] for place in range(width)]
        for options, front in zip(tensors, frontiers, strict=True)
    ]
    sizes = np.array([[option.nbytes for option in row] for row in rows], np.float64)
    return sizes, np.array([[option.loss for option in row] for row in rows], np.float64)
