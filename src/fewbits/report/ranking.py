"""Which candidates are worth having, and the result in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewbits.measure.metrics import Estimate, estimate
from fewbits.report.numbers import bytes_text, kl_text, percent_text
from fewbits.report.schema import Candidate, MemoryLine

NEAR = 1.15
"""Candidates of nearly one size are compared with each other: at most this ratio apart."""
NAMED = 4
"""So many candidates are named in one sentence."""


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other beats in both coordinates (less is better), from left to right."""
    found: list[int] = []
    lowest = float("inf")
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < lowest:
            found.append(index)
            lowest = points[index][1]
    return found


def difference(one: Candidate, other: Candidate) -> Estimate:
    """KL divergence of one less the other's, in pairs: both saw the same windows, so most of the noise cancels."""
    return estimate((np.array(one.window_kl) - np.array(other.window_kl))[:, None])


def undecided(one: Candidate, other: Candidate) -> bool:
    """Whether the measured text does not tell which of two is better (95 %)."""
    if len(one.window_kl) < 2:
        return True
    found = difference(one, other)
    return found.low <= 0 <= found.high


@dataclass(frozen=True)
class Ranking:
    """The candidates in order of size.

    Attributes:
        best: no other is both smaller and nearer to the reference.
        beaten: by label, the smallest that beats it.
        ties: pairs of nearly one size that the text does not tell apart.
    """

    best: list[Candidate]
    beaten: dict[str, Candidate]
    ties: list[tuple[Candidate, Candidate]]

    @staticmethod
    def of(candidates: Sequence[Candidate]) -> Ranking:
        ordered = sorted(candidates, key=lambda c: (c.size, c.kl("mean")))
        best = [ordered[i] for i in frontier([(c.size, c.kl("mean")) for c in ordered])]
        beaten = {}
        for candidate in ordered:
            if candidate not in best:
                better = [b for b in best if b.size <= candidate.size and b.kl("mean") <= candidate.kl("mean")]
                beaten[candidate.label] = max(better, key=lambda c: c.size)
        ties = [
            (one, other)
            for i, one in enumerate(ordered)
            for other in ordered[i + 1 :]
            if other.size <= NEAR * one.size and undecided(one, other)
        ]
        return Ranking(best, beaten, ties)


def summary(
    reference: str, candidates: Sequence[Candidate], n_scored: int, has_floor: bool, line: MemoryLine | None
) -> list[str]:
    """The result in sentences, for readers who know nothing of the figures."""
    ranking = Ranking.of(candidates)
    plural = "quantization was" if len(candidates) == 1 else "quantizations were"
    found = [
        f"{len(candidates)} {plural} compared with {reference} over {n_scored:,} predicted tokens. The figure is KL "
        "divergence: how far a model's predictions have moved from the original's; 0 is no change, lower is better."
    ]
    found += _clean(ranking.best, has_floor)
    found += _steps(ranking.best)
    found += _fits(candidates, line)
    if ranking.beaten:
        names = _names([f"{label} (take {by.label})" for label, by in ranking.beaten.items()])
        found.append(f"Not worth their bytes, as another is no larger and nearer to the original: {names}.")
    if ranking.ties:
        pairs = _names([f"{one.label} and {other.label}" for one, other in ranking.ties])
        found.append(f"About the same size, and too close to call on this text: {pairs}.")
    return found


def _clean(best: Sequence[Candidate], has_floor: bool) -> list[str]:
    """The smallest that is as good as the reference."""
    clean = next((c for c in best if c.within_noise), None)
    if clean is not None:
        return [
            f"{clean.label} ({bytes_text(clean.size)}) cannot be told from the original: its loss is below the noise "
            "floor, which is what rounding the original to bfloat16 changes."
        ]
    if has_floor:
        return ["Every one of them loses more than the noise floor, which is what rounding the original changes."]
    return []


def _steps(best: Sequence[Candidate]) -> list[str]:
    """What to take at each size: the best ones from the largest to the smallest."""
    steps = [c for c in reversed(best) if not c.within_noise]
    if not steps:
        return []
    told = [
        f"{c.label} ({bytes_text(c.size)}, divergence {kl_text(c.kl('mean'))}, "
        f"{percent_text(c.comparison.same_top.value)} the same first choice)"
        for c in _spread(steps)
    ]
    return [f"The best for their size, from large to small: {'; '.join(told)}."]


def _spread(steps: Sequence[Candidate]) -> list[Candidate]:
    """At most `NAMED` of them, the first and last among them."""
    if len(steps) <= NAMED:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (NAMED - 1))] for i in range(NAMED)]


def _fits(candidates: Sequence[Candidate], line: MemoryLine | None) -> list[str]:
    """What fits into the user's memory."""
    known = [c for c in candidates if c.memory is not None]
    if line is None or not known:
        return []
    fitting = [c for c in known if c.memory is not None and c.memory.total <= line.size]
    context = f"with {known[0].memory.context:,} tokens of context" if known[0].memory else ""
    if not fitting:
        return [f"None of them fits into {line.label} {context}."]
    least = min(fitting, key=lambda c: c.kl("mean"))
    if len(fitting) == len(known):
        return [f"All of them fit into {line.label} {context}; {least.label} loses least."]
    return [f"Into {line.label} {context}, {len(fitting)} of {len(known)} fit; of these {least.label} loses least."]


def _names(names: Sequence[str]) -> str:
    if len(names) > NAMED:
        return ", ".join(names[:NAMED]) + f" and {len(names) - NAMED} more"
    return ", ".join(names)
