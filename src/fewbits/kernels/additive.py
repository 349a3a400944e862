"""Nearest sums of codewords, and what codes stand for: the hot loops of additive quantization.

Searches take 16 targets side by side, one in each lane of a vector. With one codebook, every codeword is compared. With
two, every pair is: |t - a - b|^2 / 2 = |t|^2 / 2 + (|a|^2 / 2 - t.a) + (|b|^2 / 2 - t.b) + a.b, of which the brackets
are found once for each codeword and a.b once for all targets, so that a pair costs one addition and one minimum.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels.lanes import EXACT
from fewbits.kernels.vectors import WIDTH, add, least, load, multiply, spread, spread_bits, store, subtract, where_less

STEP = 16
"""Codewords among which the best is found again once the best of all is known to be there."""
INLINE = {**EXACT, "inline": "always"}
FAR = np.float32(3e38)
F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]
I32 = npt.NDArray[np.int32]


@njit(**INLINE)
def load_targets(targets: F32, first: int, tile: F32) -> None:
    """targets [rows, size] from row `first` on, into tile [size, 16]; the last row again where there are none left."""
    for lane in range(WIDTH):
        row = min(first + lane, targets.shape[0] - 1)
        for i in range(targets.shape[1]):
            tile[i, lane] = targets[row, i]


@njit(**INLINE)
def score(tile: F32, words: F32, halves: F32, scores: F32) -> None:
    """|c|^2 / 2 - t.c of a multiple of four codewords.

    Args:
        tile: [size, 16].
        words: [codewords, size].
        halves: [codewords], half of each one's squared norm.
        scores: out, [codewords, 16].
    """
    for k in range(0, words.shape[0], 4):
        s0, s1, s2, s3 = spread(halves[k]), spread(halves[k + 1]), spread(halves[k + 2]), spread(halves[k + 3])
        for i in range(words.shape[1]):
            t = load(tile, i * WIDTH)
            s0 = subtract(s0, multiply(t, spread(words[k, i])))
            s1 = subtract(s1, multiply(t, spread(words[k + 1, i])))
            s2 = subtract(s2, multiply(t, spread(words[k + 2, i])))
            s3 = subtract(s3, multiply(t, spread(words[k + 3, i])))
        store(scores, k * WIDTH, s0)
        store(scores, (k + 1) * WIDTH, s1)
        store(scores, (k + 2) * WIDTH, s2)
        store(scores, (k + 3) * WIDTH, s3)


@njit(**EXACT)
def nearest_words(targets: F32, words: F32, halves: F32, found: U16) -> None:
    """The nearest codeword of each target.

    Args:
        targets: [rows, size].
        words: [codewords, size], a multiple of 16 codewords.
        halves: [codewords], half of each one's squared norm.
        found: out, [rows].
    """
    size = words.shape[1]
    tile, scores = np.empty((size, WIDTH), np.float32), np.empty((STEP, WIDTH), np.float32)
    where = np.empty(WIDTH, np.float32)
    for first in range(0, targets.shape[0], WIDTH):
        load_targets(targets, first, tile)
        lowest, at = spread(FAR), spread_bits(0)
        for k in range(0, words.shape[0], STEP):
            here = spread(FAR)
            for j in range(k, k + STEP, 4):
                s0, s1, s2, s3 = spread(halves[j]), spread(halves[j + 1]), spread(halves[j + 2]), spread(halves[j + 3])
                for i in range(size):
                    t = load(tile, i * WIDTH)
                    s0 = subtract(s0, multiply(t, spread(words[j, i])))
                    s1 = subtract(s1, multiply(t, spread(words[j + 1, i])))
                    s2 = subtract(s2, multiply(t, spread(words[j + 2, i])))
                    s3 = subtract(s3, multiply(t, spread(words[j + 3, i])))
                here = least(here, least(least(s0, s1), least(s2, s3)))
            at = where_less(here, lowest, spread_bits(k), at)
            lowest = least(here, lowest)
        store(where, 0, at)
        starts = where.view(np.int32)
        for lane in range(min(WIDTH, targets.shape[0] - first)):
            start, low = starts[lane], FAR
            score(tile, words[start : start + STEP], halves[start : start + STEP], scores)
            for k in range(STEP):
                if scores[k, lane] < low:
                    low = scores[k, lane]
                    found[first + lane] = start + k


@njit(**EXACT)
def nearest_pairs(
    targets: F32, one: F32, other: F32, one_halves: F32, other_halves: F32, products: F32, found: U16, others: U16
) -> None:
    """The codewords of two codebooks whose sum is nearest to each target.

    Args:
        targets: [rows, size].
        one, other: [codewords, size], a multiple of four codewords each.
        one_halves, other_halves: [codewords], half of each one's squared norm.
        products: [codewords of one, codewords of the other], their inner products.
        found, others: out, [rows].
    """
    size, count = one.shape[1], other.shape[0]
    tile, scores = np.empty((size, WIDTH), np.float32), np.empty((one.shape[0], WIDTH), np.float32)
    others_scores = np.empty((count, WIDTH), np.float32)
    where = np.empty(WIDTH, np.float32)
    for first in range(0, targets.shape[0], WIDTH):
        load_targets(targets, first, tile)
        score(tile, one, one_halves, scores)
        score(tile, other, other_halves, others_scores)
        lowest, at = spread(FAR), spread_bits(0)
        for j in range(0, one.shape[0], 4):
            b0, b1, b2, b3 = spread(FAR), spread(FAR), spread(FAR), spread(FAR)
            for k in range(count):
                s = load(others_scores, k * WIDTH)
                b0 = least(b0, add(s, spread(products[j, k])))
                b1 = least(b1, add(s, spread(products[j + 1, k])))
                b2 = least(b2, add(s, spread(products[j + 2, k])))
                b3 = least(b3, add(s, spread(products[j + 3, k])))
            b0 = add(b0, load(scores, j * WIDTH))
            at = where_less(b0, lowest, spread_bits(j), at)
            lowest = least(b0, lowest)
            b1 = add(b1, load(scores, (j + 1) * WIDTH))
            at = where_less(b1, lowest, spread_bits(j + 1), at)
            lowest = least(b1, lowest)
            b2 = add(b2, load(scores, (j + 2) * WIDTH))
            at = where_less(b2, lowest, spread_bits(j + 2), at)
            lowest = least(b2, lowest)
            b3 = add(b3, load(scores, (j + 3) * WIDTH))
            at = where_less(b3, lowest, spread_bits(j + 3), at)
            lowest = least(b3, lowest)
        store(where, 0, at)
        ones = where.view(np.int32)
        for lane in range(min(WIDTH, targets.shape[0] - first)):
            j, low, k_best = ones[lane], FAR, 0
            for k in range(count):
                value = others_scores[k, lane] + products[j, k]
                if value < low:
                    low, k_best = value, k
            found[first + lane], others[first + lane] = j, k_best


@njit(**EXACT)
def add_words(codes: U16, words: F32, scales: F32, out: F32) -> None:
    """What codes stand for.

    Args:
        codes: [rows, groups, codebooks].
        words: [codebooks, codewords, size].
        scales: [rows].
        out: [rows, groups * size].
    """
    rows, groups, books = codes.shape
    size = words.shape[2]
    for row in range(rows):
        scale = scales[row]
        for group in range(groups):
            at = group * size
            for i in range(size):
                out[row, at + i] = np.float32(0)
            for book in range(books):
                code = codes[row, group, book]
                for i in range(size):
                    out[row, at + i] += words[book, code, i]
            for i in range(size):
                out[row, at + i] *= scale


@njit(**EXACT)
def collect_words(codes: U16, gradient: F32, scales: F32, out: F32) -> None:
    """The transpose of `add_words`: add to each codeword what reaches it of a gradient.

    Args:
        gradient: [rows, groups * size].
        out: [codebooks, codewords, size], added to.
    """
    rows, groups, books = codes.shape
    size = out.shape[2]
    for row in range(rows):
        scale = scales[row]
        for group in range(groups):
            at = group * size
            for book in range(books):
                code = codes[row, group, book]
                for i in range(size):
                    out[book, code, i] += scale * gradient[row, at + i]


@njit(**EXACT)
def count_words(codes: U16, weights: F32, out: F32) -> None:
    """Sum of the weights of the rows that use each codeword in each group.

    Args:
        codes: [rows, groups, codebooks].
        weights: [rows].
        out: [codebooks, codewords, groups], added to.
    """
    rows, groups, books = codes.shape
    for row in range(rows):
        for group in range(groups):
            for book in range(books):
                out[book, codes[row, group, book], group] += weights[row]
