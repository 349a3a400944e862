"""AQLM's steps on a GPU, all outputs of a matrix at a time. Importing this needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fewbits.methods.aqlm import COLUMNS, Doubles, Fit, Floats, Indices
from fewbits.methods.nearest_torch import Words, nearest_pairs


def nearest(
    targets: torch.Tensor, words: torch.Tensor, metric: torch.Tensor, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`aqlm.nearest` there.

    Args:
        targets: float32 [rows, group].
        words: float32 [codebooks, codewords, group].
        metric: float32 [group, group], the lower factor of the metric.
        codes: int64 [rows, codebooks]: with more than two codebooks, the codes to begin with.

    Returns:
        The codes, and their sums [rows, group].
    """
    seen, wanted, codes, books = [Words(book @ metric) for book in words], targets @ metric, codes.clone(), len(words)
    if books == 1:
        codes[:, 0] = seen[0].nearest(wanted)
    for book in range(0, books if books > 1 else 0, 2):
        pair = [book, (book + 1) % books]
        left = wanted
        for other in set(range(books)) - set(pair):
            left = left - seen[other].values[codes[:, other]]
        codes[:, pair[0]], codes[:, pair[1]] = nearest_pairs(left, [seen[each] for each in pair])
    return codes, torch.stack([words[book, codes[:, book]] for book in range(books)]).sum(0)


@dataclass
class DeviceFit(Fit):
    """A matrix on its way on a device. Codes, codebooks and scales are in main memory between two steps.

    Sums of what falls to one codeword are taken in a fixed order, so that results can be repeated.
    """

    device: str

    @cached_property
    def _weights(self) -> torch.Tensor:
        return self._there(self.weights)

    @cached_property
    def _hessian(self) -> torch.Tensor:
        return self._there(self.moments.hessian)

    def _there(self, values: Floats) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)

    @cached_property
    def _codes(self) -> torch.Tensor:
        return torch.from_numpy(self.codes.astype(np.int64)).to(self.device)

    def _keep(self, codes: torch.Tensor) -> None:
        self._codes, self.codes = codes, codes.cpu().numpy().astype(np.uint16)

    def _decoded(self, codes: torch.Tensor, words: Floats, scales: Floats | None = None) -> torch.Tensor:
        """What codes stand for, [out, in]."""
        table = self._there(words)
        out = table[0, codes[:, :, 0]]
        for book in range(1, len(words)):
            out += table[book, codes[:, :, book]]
        return out.flatten(1) if scales is None else out.flatten(1) * self._there(scales)[:, None]

    def _normalized(self) -> torch.Tensor:
        return self._there(self.normalized(slice(None)))

    def nearest_word(self, vectors: Floats, words: Floats) -> Indices:
        """Which of some codewords [codewords, group] is nearest to each vector [n, group]."""
        return Words(self._there(words)).nearest(self._there(vectors)).cpu().numpy()

    def feed(self) -> None:
        weights, words, lower = self._normalized(), self._there(self.words), self._there(self.moments.lower)
        spread, group = self._there(self.moments.spread), self.moments.group
        codes, missed = torch.zeros_like(self._codes), torch.zeros_like(weights)
        for stop in range(weights.shape[1], 0, -COLUMNS):
            start = max(0, stop - COLUMNS)
            target = weights[:, start:stop] + missed[:, stop:] @ lower[stop:, start:stop]
            for first in range(stop - group, start - 1, -group):
                here, block = slice(first, first + group), first // group
                now = target[:, first - start : first - start + group]
                now = now + missed[:, here.stop : stop] @ lower[here.stop : stop, here]
                codes[:, block], found = nearest(now, words, spread[block], codes[:, block])
                missed[:, here] = weights[:, here] - found
        self._keep(codes)

    def recode(self) -> None:
        weights, words, codes = self._normalized(), self._there(self.words), self._codes
        own, inverse, group = self._there(self.moments.own), self._there(self.moments.inverse), self.moments.group
        decoded = self._decoded(codes, self.words)
        for start in range(0, weights.shape[1], COLUMNS):
            stop = min(start + COLUMNS, weights.shape[1])
            pull = (weights - decoded) @ self._hessian[:, start:stop]
            for first in range(start, stop, group):
                here, block = slice(first, first + group), first // group
                target = decoded[:, here] + pull[:, first - start : first - start + group] @ inverse[block]
                codes[:, block], found = nearest(target, words, own[block], codes[:, block])
                pull -= (found - decoded[:, here]) @ self._hessian[here, start:stop]
                decoded[:, here] = found
        self._keep(codes)

    def rescale(self) -> None:
        shape = self._decoded(self._codes, self.words)
        weighed = shape @ self._hessian
        power, wanted = (shape * weighed).sum(1), (self._weights * weighed).sum(1)
        scales = torch.where(power > 0, wanted / torch.where(power > 0, power, 1), self._there(self.scales))
        self.scales = scales.cpu().numpy()

    def loss(self) -> float:
        wrong = self._weights - self._decoded(self._codes, self.words, self.scales)
        return float((wrong @ self._hessian).mul_(wrong).sum(dtype=torch.float64))

    def pulled(self, words: Floats, of_weights: bool) -> Doubles:
        codes = self._codes
        made = self._decoded(codes, words, self.scales)
        weighed = ((self._weights - made if of_weights else made) @ self._hessian) * self._there(self.scales)[:, None]
        each = weighed.view(-1, self.moments.group).double()
        return np.stack([_collected(codes[:, :, book].reshape(-1), each, words.shape[1]) for book in range(len(words))])

    def used(self) -> Floats:
        codes, (books, count, _) = self._codes, self.words.shape
        groups = codes.shape[1]
        square = self._there(np.square(self.scales))[:, None].expand(-1, groups).reshape(-1, 1)
        place = codes * groups + torch.arange(groups, device=self.device)[:, None]
        found = [_collected(place[:, :, book].reshape(-1), square, count * groups) for book in range(books)]
        return np.stack(found).reshape(books, count, groups).astype(np.float32)


def _collected(places: torch.Tensor, values: torch.Tensor, count: int) -> Doubles:
    """Sums of values [n, size] by place, [count, size]."""
    out = torch.zeros((count, values.shape[1]), dtype=values.dtype, device=values.device)
    # of all ways to do this, the one that sorts first: on a GPU, others add in any order
    found: Doubles = out.index_put_((places,), values, accumulate=True).cpu().numpy()
    return found
