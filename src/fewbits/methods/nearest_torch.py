"""The nearest of many codewords by matrix products, on a GPU. Importing this needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

SCORES = 1 << 27
"""Scores of codewords, or of pairs of them, that are held at once."""


@dataclass(frozen=True)
class Words:
    """Codewords to choose among: float32 [codewords, size]."""

    values: torch.Tensor

    @cached_property
    def halves(self) -> torch.Tensor:
        """Half of each one's squared norm: float32 [codewords]."""
        return 0.5 * self.values.square().sum(1)

    def nearest(self, targets: torch.Tensor) -> torch.Tensor:
        """Which is nearest to each target.

        Args:
            targets: float32 [n, size].

        Returns:
            int64 [n], the first of those equally near.
        """
        found = torch.empty(len(targets), dtype=torch.int64, device=targets.device)
        for part in _parts(len(targets), len(self.values)):
            found[part] = self.scores(targets[part]).argmin(1)
        return found

    def scores(self, targets: torch.Tensor) -> torch.Tensor:
        """Half of the squared distances, less what they have in common: float32 [n, codewords]."""
        return torch.addmm(self.halves, targets, self.values.T, alpha=-1)


def nearest_pairs(targets: torch.Tensor, words: Sequence[Words]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which sum of two codewords, one of each of two codebooks, is nearest to each target; all are compared.

    Args:
        targets: float32 [n, size].
        words: two.

    Returns:
        Two of int64 [n].
    """
    first, second = (torch.empty(len(targets), dtype=torch.int64, device=targets.device) for _ in range(2))
    product = words[0].values @ words[1].values.T
    for part in _parts(len(targets), product.numel()):
        one, other = (book.scores(targets[part]) for book in words)
        first[part] = (one + (other[:, None] + product).amin(2)).argmin(1)
        second[part] = (other + product[first[part]]).argmin(1)
    return first, second


def _parts(count: int, each: int) -> Iterator[slice]:
    step = max(1, SCORES // each)
    return (slice(start, start + step) for start in range(0, count, step))
