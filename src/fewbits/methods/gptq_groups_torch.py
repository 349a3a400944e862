"""Error feedback for codebooks of groups on a GPU, all rows of a matrix at once. Importing this needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch

from fewbits.codecs.fixed_codebooks import GroupCodebook
from fewbits.kernels.group_feedback import EVEN, UNSIGNED
from fewbits.methods.nearest_torch import Words

SIGNED_TOGETHER = 8
"""Weights whose number of minus is even, where that is the rule."""


@dataclass(frozen=True)
class Table:
    """Codewords, each with all the signs that it may have.

    Attributes:
        values: float32 [candidates, size].
        words: int16 [candidates], the codeword's number.
        minus: uint8 [candidates], the bits of the weights with a minus.
    """

    values: torch.Tensor
    words: torch.Tensor
    minus: torch.Tensor

    def nearest(self, targets: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        """The candidates whose error d costs least by |d inverse|^2: int64 [rows], of targets [rows, size]."""
        return Words(self.values @ inverse).nearest(targets @ inverse)


@cache
def tables(codec: type[GroupCodebook], device: str) -> list[Table]:
    """All candidates in one table; or in two, with an even and an odd number of minus, where groups share the rule."""
    values, signs = codec.vocabulary()
    size = values.shape[1]
    turns = np.arange(1 if signs == UNSIGNED else 1 << size)
    odd = np.bitwise_count(turns) & 1
    kept = [turns] if signs != EVEN else [turns[odd == each] for each in range(SIGNED_TOGETHER // size)]
    made = []
    for some in kept:
        sign = (1 - 2 * (some[:, None] >> np.arange(size) & 1)).astype(np.float32)
        every = (values[:, None] * sign).reshape(-1, size)
        words = np.repeat(np.arange(len(values), dtype=np.int16), len(some))
        parts = (every, words, np.tile(some, len(values)).astype(np.uint8))
        made.append(Table(*(torch.from_numpy(part).to(device) for part in parts)))
    return made


@dataclass(frozen=True)
class Rounding:
    """A matrix whose scales are settled. All tensors are on the device, [rows, columns or groups].

    Attributes:
        tables: of all candidates; with two, two groups are chosen at once, both from the first or both from the second.
        matrix: float32 [columns, columns], the upper Cholesky factor of the inverse Hessian; `again`: the Hessian.
        factors: float32 [columns / span, span, span], each block of that factor; `again`: the upper Cholesky factor of
            the inverse of the Hessian's block.
        scale, offset: a group stands for offset + scale * codeword.
        again: whether groups are chosen once more, each for the errors that all others leave.
    """

    tables: list[Table]
    matrix: torch.Tensor
    factors: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    again: bool

    @property
    def size(self) -> int:
        return self.tables[0].values.shape[1]

    @property
    def span(self) -> int:
        return self.size * len(self.tables)

    @cached_property
    def inverses(self) -> torch.Tensor:
        """Of the blocks of single groups on the factors' diagonals: [groups, size, size]."""
        parts = [self.factors[:, at : at + self.size, at : at + self.size] for at in range(0, self.span, self.size)]
        return torch.linalg.inv(torch.stack(parts, 1).flatten(0, 1))

    def rounded(self, weights: torch.Tensor, values: torch.Tensor, together: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose all groups' codewords, one group after another.

        Args:
            weights: [rows, columns]: what is to be stood for.
            values: in and out, [rows, columns], what the codewords stand for.
            together: columns whose errors reach the rest in one product.

        Returns:
            The codewords' numbers, int16, and the bits of their negative weights, uint8: [rows, groups].
        """
        words = torch.empty_like(self.scale, dtype=torch.int16)
        minus = torch.empty_like(self.scale, dtype=torch.uint8)
        left = weights - values if self.again else weights.clone()
        for start in range(0, weights.shape[1], together):
            here = slice(start, min(start + together, weights.shape[1]))
            wanted = left @ self.matrix[:, here] if self.again else left[:, here].clone()
            wrong = torch.empty_like(wanted)
            for first in range(here.start, here.stop, self.span):
                own, place = slice(first, first + self.span), slice(first - start, first - start + self.span)
                groups = slice(first // self.size, own.stop // self.size)
                target, factor = wanted[:, place], self.factors[first // self.span]
                if self.again:
                    target = values[:, own] + target @ (factor.T @ factor)
                words[:, groups], minus[:, groups], tried = self._chosen(target, groups.start, factor)
                new = target - tried @ factor
                wrong[:, place] = new - values[:, own] if self.again else tried
                values[:, own] = new
                wanted[:, place.stop :] -= wrong[:, place] @ self.matrix[own, own.stop : here.stop]
            if self.again:
                left[:, here] = weights[:, here] - values[:, here]
            else:
                left[:, here.stop :] -= wrong @ self.matrix[here, here.stop :]
        return words, minus

    def _chosen(
        self, wanted: torch.Tensor, group: int, factor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The codewords that cost least, and their signs, [rows, groups]; their errors over the factor, [rows, span].

        Args:
            wanted: [rows, span].
            group: the first of those in the span.
        """
        options = [self._tried(table, wanted, group, factor) for table in self.tables]
        found, tried = options[0]
        words, minus = self.tables[0].words[found], self.tables[0].minus[found]
        for table, (other, errors) in zip(self.tables[1:], options[1:], strict=True):
            better = (errors.square().sum(1) < tried.square().sum(1))[:, None]
            words = torch.where(better, table.words[other], words)
            minus = torch.where(better, table.minus[other], minus)
            tried = torch.where(better, errors, tried)
        return words, minus, tried

    def _tried(
        self, table: Table, wanted: torch.Tensor, group: int, factor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One table's best candidates [rows, groups], and their errors over the factor, [rows, span]."""
        found, tried = [], torch.zeros_like(wanted)
        for part in range(len(self.tables)):
            at, before = slice(part * self.size, (part + 1) * self.size), slice(part * self.size)
            scale, inverse = self.scale[:, group + part, None], self.inverses[group + part]
            target = wanted[:, at] - self.offset[:, group + part, None] - tried[:, before] @ factor[before, at]
            over = torch.where(scale != 0, target / torch.where(scale != 0, scale, 1), 0)
            found.append(table.nearest(over, inverse))
            tried[:, at] = (target - scale * table.values[found[-1]]) @ inverse
        return torch.stack(found, 1), tried
