"""AQLM (Egiazarian et al., arXiv 2401.06118): codebooks learned for each matrix, under the Hessian of its inputs.

What is minimized is e^T H e summed over the outputs' errors e. From codebooks found by k-means, rounds of three steps:

- codes, codebooks and scales given: groups of inputs one after another, each output's best codewords for the group
  given its codes of all other groups. The first rounds begin with nothing coded and pass on what is lost instead, as
  LDLQ does (QuIP, arXiv 2307.13304), with blocks of a group. With two codebooks of 256, all 65536 sums are compared,
  where the paper's beam search follows the best few.
- codebooks, codes and scales given: a linear least-squares problem, solved by conjugate gradients; the paper takes
  steps of Adam.
- scales, codes and codebooks given: one number for each output, in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fewbits.codecs.additive import Additive, AdditiveCoded, Codes, to_half
from fewbits.codecs.storage import StorageType
from fewbits.errors import FewbitsError
from fewbits.kernels.additive import add_words, collect_words, count_words, nearest_pairs, nearest_words
from fewbits.methods.base import Effort, Known, Method
from fewbits.methods.block_cholesky import check_hessian, factored

DAMPING = 0.025
"""Added to the Hessian's diagonal, times its mean: of 0.003 to 0.1 what loses least of text not looked at, on matrices
of smollm2-576 and smollm2-768 with 16 thousand tokens. What a held-out part of the windows chooses leaves .94 of that
of single matrices, but the whole of smollm2-768, judged on text of another kind, lost 1 % more."""
RETRIES = 12
ROWS = 256
"""Outputs that a thread takes at once: always so many, since the last bits of matrix products depend on it."""
COLUMNS = 128
"""Inputs that are coded before what is lost on them reaches the others in one matrix product."""
FEEDS = 3
"""Rounds in which all codes are chosen anew."""
ROUNDS: dict[Effort, int] = {"fast": 2, "default": 6, "thorough": 20}
"""Rounds at most, ..."""
TOLERANCE: dict[Effort, float] = {"fast": 0.03, "default": 0.02, "thorough": 0.003}
"""... and the gain of a round, as a share of the loss, below which they end."""
STEPS, SETTLED = 12, 1e-7
"""Of conjugate gradients in a round at most, and the share of the first residual's size that needs no further one."""
MEANS_STEPS, MEANS_SAMPLES = 8, 64
"""Steps of k-means, and vectors that it looks at for each codeword, ..."""
LARGE, LARGE_STEPS = 4096, 1
"""... and its steps for codebooks of at least so many codewords, which take as long as a round each."""
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.integer]
Search = Callable[[Floats, Floats], Indices]
T = TypeVar("T")


@dataclass(frozen=True)
class Moments:
    """A damped Hessian in the forms that coding uses.

    Attributes:
        hessian: float32 [in, in].
        lower: float32 [in, in], L of H = L D L^T with unit blocks of a group on its diagonal.
        spread: float32 [groups, group, group], the lower Cholesky factors of D's blocks, ...
        own: ... and of the blocks on the Hessian's diagonal; float32 [groups, group, group].
        inverse: of these blocks themselves.
    """

    hessian: Floats
    lower: Floats
    spread: Floats
    own: Floats
    inverse: Floats

    @property
    def group(self) -> int:
        return self.own.shape[1]


def prepare(hessian: Floats, group: int, damping: float = DAMPING, device: str = "cpu") -> Moments:
    """Damp and decompose a Hessian, float32 [in, in], on a device of torch.

    Raises:
        FewbitsError: it is not finite and positive, however much it is damped.
    """
    check_hessian(hessian)
    diagonal = hessian.diagonal().astype(np.float64)
    mean = float(diagonal.mean()) or 1.0
    damped = hessian.astype(np.float64) / mean
    for attempt in range(RETRIES):
        np.fill_diagonal(damped, diagonal / mean + damping * 2**attempt)
        if found := factored(damped, group, device):
            break
    else:
        raise FewbitsError("the Hessian is not positive.", "Calibrate with more text.")
    at = np.arange(len(damped) // group)
    own = damped.reshape(len(at), group, len(at), group)[at, :, at]
    single = (damped, *found, np.linalg.cholesky(own), np.linalg.inv(own))
    return Moments(*(np.ascontiguousarray(part, np.float32) for part in single))


def nearest(targets: Floats, words: Floats, metric: Floats, codes: Codes) -> Floats:
    """The sums of codewords nearest to targets.

    Args:
        targets: float32 [rows, group].
        words: float32 [codebooks, codewords, group].
        metric: float32 [group, group], the lower factor of the metric.
        codes: out, uint16 [rows, codebooks]; in: with more than two codebooks, the codes to begin with.

    Returns:
        float32 [rows, group]: the sums.
    """
    seen, wanted = words @ metric, targets @ metric
    halves = 0.5 * np.einsum("bwi,bwi->bw", seen, seen)
    books = len(words)
    if books == 1:
        found = np.empty(len(targets), np.uint16)
        nearest_words(wanted, seen[0], halves[0], found)
        codes[:, 0] = found
        return words[0, found]
    pairs = [(book, (book + 1) % books) for book in range(0, books, 2)]
    products = [seen[one] @ seen[other].T for one, other in pairs]
    one_codes, other_codes = np.empty(len(targets), np.uint16), np.empty(len(targets), np.uint16)
    for (one, other), product in zip(pairs, products, strict=True):
        left = wanted
        for book in range(books):
            if book not in (one, other):
                left = left - seen[book, codes[:, book]]
        nearest_pairs(left, seen[one], seen[other], halves[one], halves[other], product, one_codes, other_codes)
        codes[:, one], codes[:, other] = one_codes, other_codes
    total = words[0, codes[:, 0]]
    for book in range(1, books):
        total += words[book, codes[:, book]]
    return total


def feed(weights: Floats, words: Floats, moments: Moments, codes: Codes) -> Floats:
    """Code rows, the last group of inputs first, passing on what is lost; returns what the codes stand for.

    Args:
        weights: float32 [rows, in], divided by the scales.
        codes: out, uint16 [rows, groups, codebooks].
    """
    group, columns = moments.group, weights.shape[1]
    missed = np.zeros_like(weights)
    for stop in range(columns, 0, -COLUMNS):
        start = max(0, stop - COLUMNS)
        target = weights[:, start:stop] + missed[:, stop:] @ moments.lower[stop:, start:stop]
        for first in range(stop - group, start - 1, -group):
            here, own = slice(first, first + group), slice(first - start, first - start + group)
            now: Floats = target[:, own] + missed[:, here.stop : stop] @ moments.lower[here.stop : stop, here]
            chosen = np.zeros_like(codes[:, 0])
            found = nearest(now, words, moments.spread[first // group], chosen)
            missed[:, here] = weights[:, here] - found
            codes[:, first // group] = chosen
    return weights - missed


def improve(weights: Floats, words: Floats, moments: Moments, codes: Codes, decoded: Floats) -> None:
    """Choose the codes of one group after another anew, those of all others given.

    Args:
        weights: float32 [rows, in], divided by the scales.
        codes: in and out, uint16 [rows, groups, codebooks].
        decoded: in and out, float32 [rows, in]: what they stand for.
    """
    group, columns = moments.group, weights.shape[1]
    for start in range(0, columns, COLUMNS):
        stop = min(start + COLUMNS, columns)
        pull = (weights - decoded) @ moments.hessian[:, start:stop]
        for first in range(start, stop, group):
            here, own = slice(first, first + group), slice(first - start, first - start + group)
            block = first // group
            target: Floats = decoded[:, here] + pull[:, own] @ moments.inverse[block]
            chosen = codes[:, block].copy()
            found = nearest(target, words, moments.own[block], chosen)
            pull -= (found - decoded[:, here]) @ moments.hessian[here, start:stop]
            codes[:, block], decoded[:, here] = chosen, found


def means(vectors: Floats, count: int, random: np.random.Generator, search: Search) -> Floats:
    """k-means: float32 [count, group] of vectors [n, group]."""
    group = vectors.shape[1]
    most = count * MEANS_SAMPLES
    if len(vectors) > most:
        vectors = vectors[random.choice(len(vectors), most, replace=False)]
    words = vectors[random.choice(len(vectors), count, replace=len(vectors) < count)]
    steps = LARGE_STEPS if count >= LARGE else MEANS_STEPS
    for _ in range(steps if len(vectors) > count else 0):
        found = search(vectors, words)
        sizes = np.bincount(found, minlength=count)
        sums = np.stack([np.bincount(found, vectors[:, i], count) for i in range(group)], axis=1)
        words = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], words).astype(np.float32)
    return words


def nearest_word(vectors: Floats, words: Floats) -> Indices:
    """Which of some codewords [codewords, group] is nearest to each vector [n, group]."""
    found = np.empty(len(vectors), np.uint16)
    nearest_words(vectors, words, 0.5 * np.square(words).sum(axis=1), found)
    return found


def residual_means(weights: Floats, kind: Additive, search: Search = nearest_word) -> Floats:
    """The first codebooks: of the weights, then of what is left of them, and so on."""
    random = np.random.default_rng(kind.words + kind.books)
    left = weights.reshape(-1, kind.group)
    most = kind.words * MEANS_SAMPLES
    if len(left) > most:
        left = left[random.choice(len(left), most, replace=False)]
    words = np.empty((kind.books, kind.words, kind.group), np.float32)
    for book in range(kind.books):
        if book:
            left = left - words[book - 1, search(left, words[book - 1])]
        words[book] = means(left, kind.words, random, search)
    return words


@dataclass
class Fit:
    """A matrix on its way.

    Attributes:
        weights: float32 [out, in].
        words: float32 [codebooks, codewords, group].
        codes: uint16 [out, groups, codebooks].
        scales: float32 [out].
    """

    weights: Floats
    moments: Moments
    words: Floats
    codes: Codes
    scales: Floats
    pool: Executor | None

    def each(self, work: Callable[[slice], T]) -> Iterator[T]:
        """What some rows after others give, in their order."""
        parts = (slice(start, start + ROWS) for start in range(0, len(self.weights), ROWS))
        return iter((self.pool.map if self.pool else map)(work, parts))

    def decode(self, rows: slice, words: Floats, scales: Floats) -> Floats:
        out = np.empty(self.weights[rows].shape, np.float32)
        add_words(self.codes[rows], words, scales[rows], out)
        return out

    def normalized(self, rows: slice) -> Floats:
        scales = np.where(self.scales[rows] == 0, 1, self.scales[rows])
        return np.ascontiguousarray(self.weights[rows] / scales[:, None])

    def loss(self) -> float:
        def part(rows: slice) -> float:
            wrong = self.weights[rows] - self.decode(rows, self.words, self.scales)
            return float(np.einsum("oi,oi->", wrong @ self.moments.hessian, wrong, dtype=np.float64))

        return sum(self.each(part))

    def feed(self) -> None:
        """All codes anew."""

        def part(rows: slice) -> None:
            feed(self.normalized(rows), self.words, self.moments, self.codes[rows])

        list(self.each(part))

    def recode(self) -> None:
        ones = np.ones_like(self.scales)

        def part(rows: slice) -> None:
            decoded = self.decode(rows, self.words, ones)
            improve(self.normalized(rows), self.words, self.moments, self.codes[rows], decoded)

        list(self.each(part))

    def rescale(self) -> None:
        ones = np.ones_like(self.scales)

        def part(rows: slice) -> Floats:
            shape = self.decode(rows, self.words, ones)
            weighed = shape @ self.moments.hessian
            power = np.einsum("oi,oi->o", shape, weighed)
            wanted = np.einsum("oi,oi->o", self.weights[rows], weighed)
            return np.where(power > 0, wanted / np.where(power > 0, power, 1), self.scales[rows]).astype(np.float32)

        self.scales = np.concatenate(list(self.each(part)))

    def refit(self, steps: int = STEPS) -> None:
        """Codebooks by preconditioned conjugate gradients from where they are."""
        inverse = self._preconditioner()
        residual = self.pulled(self.words, True)
        words = self.words.astype(np.float64)
        ahead = np.einsum("bwij,bwj->bwi", inverse, residual)
        direction, size = ahead, float(np.vdot(residual, ahead))
        enough = SETTLED * size
        for _ in range(steps):
            if not size > enough:
                break
            curved = self.pulled(direction.astype(np.float32), False)
            bend = float(np.vdot(direction, curved))
            if not bend > 0:  # weights whose squares are too small for float32
                break
            length = size / bend
            words += length * direction
            residual -= length * curved
            ahead = np.einsum("bwij,bwj->bwi", inverse, residual)
            before, size = size, float(np.vdot(residual, ahead))
            direction = ahead + size / before * direction
        self.words = words.astype(np.float32)

    def pulled(self, words: Floats, of_weights: bool) -> Doubles:
        """The normal equations' left side for some codebooks, or their right side minus left."""

        def part(rows: slice) -> Floats:
            decoded = self.decode(rows, words, self.scales)
            if of_weights:
                decoded = self.weights[rows] - decoded
            out = np.zeros_like(words)
            collect_words(self.codes[rows], decoded @ self.moments.hessian, self.scales[rows], out)
            return out

        return _total(self.each(part), words.shape)

    def used(self) -> Floats:
        """The squares of the scales with which codewords are used in each group, [codebooks, codewords, groups]."""
        found = np.zeros((*self.words.shape[:2], self.codes.shape[1]), np.float32)
        count_words(self.codes, np.square(self.scales), found)
        return found

    def _preconditioner(self) -> Doubles:
        """Inverses of the blocks of single codewords in the normal equations: [codebooks, codewords, group, group]."""
        books, count, group = self.words.shape
        own, used = self.moments.own, self.used()
        blocks = used @ (own @ own.transpose(0, 2, 1)).reshape(len(own), -1)
        blocks = blocks.astype(np.float64).reshape(books, count, group, group)
        ridge = 1e-6 * blocks.diagonal(axis1=2, axis2=3).mean() + 1e-30
        return np.linalg.inv(blocks + ridge * np.eye(group))


def _total(parts: Iterable[Floats], shape: tuple[int, ...]) -> Doubles:
    total = np.zeros(shape)
    for part in parts:
        total += part
    return total


class AQLM(Method):
    """Codes, codebooks and scales in turn; see the module."""

    name = "aqlm"
    hessian = "whole"
    summary = "learns codebooks for each matrix and sums of their codewords, by what the outputs lose (AQLM)"

    @classmethod
    def make(cls, weights: Floats, kind: StorageType, known: Known, pool: Executor | None = None) -> AdditiveCoded:
        if not isinstance(kind, Additive):
            raise FewbitsError(f"The method 'aqlm' does not make {kind.name}.", "Leave the choice to the target.")
        rows, columns = weights.shape
        hessian = np.eye(columns, dtype=np.float32) if known.hessian is None else known.hessian
        scales = np.sqrt(np.einsum("oi,oi->o", weights, weights) / columns)
        codes = np.zeros((rows, columns // kind.group, kind.books), np.uint16)
        moments = prepare(hessian, kind.group, device=known.device)
        fit, search = Fit(weights, moments, np.empty(0, np.float32), codes, scales, pool), nearest_word
        if known.device != "cpu":
            from fewbits.methods import aqlm_torch  # imports torch

            fit = aqlm_torch.DeviceFit(weights, moments, fit.words, codes, scales, None, known.device)
            search = fit.nearest_word
        fit.words = residual_means(fit.normalized(slice(None)), kind, search)
        for _ in range(FEEDS):
            fit.feed()
            fit.refit()
            fit.rescale()
        loss = fit.loss()
        for _ in range(ROUNDS[known.effort]):
            fit.recode()
            fit.refit()
            fit.rescale()
            before, loss = loss, fit.loss()
            if not loss < (1 - TOLERANCE[known.effort]) * before:
                break
        return AdditiveCoded(kind, fit.codes, to_half(fit.words), to_half(fit.scales))
