"""Hadamard transforms of other sizes than powers of two: Kronecker products of one matrix by Paley's constructions and
Sylvester's (R. E. A. C. Paley, On orthogonal matrices, 1933).

All matrices here are symmetric, divided by the square root of their size: each is its own inverse.
"""

from __future__ import annotations

from functools import cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fewbits.errors import FewbitsError

LARGEST = 1024
"""Order of the largest matrix by Paley's constructions."""
POWER = 7
"""Powers of two are multiplied by in factors of at most 2^7."""
Doubles = npt.NDArray[np.float64]
Real = TypeVar("Real", np.float32, np.float64)


def sylvester(size: int) -> Doubles:
    """Sylvester's matrix of 1 and -1, of a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def prime_power(number: int) -> tuple[int, int] | None:
    """(p, k) of p^k with k up to 3, or None."""
    for power in (1, 2, 3):
        prime = round(number ** (1 / power))
        if prime**power == number and prime > 1 and all(prime % d for d in range(2, int(prime**0.5) + 1)):
            return prime, power
    return None


def _sums(prime: int, power: int) -> npt.NDArray[np.bool_]:
    """bool [2, q, q] over the field of q = prime^power elements: where i + j is zero, and where it is a square."""
    size = prime**power
    digits = np.arange(size)[:, None] // prime ** np.arange(power) % prime
    # x^power = tail: without a root a polynomial of degree 2 or 3 has no factors
    tails = digits if power > 1 else np.zeros((1, power), np.int64)
    x = np.arange(prime)
    tail = next(t for t in tails if power == 1 or ((x**power - (x[:, None] ** np.arange(power)) @ t) % prime).all())
    square = np.zeros((size, 2 * power - 1), np.int64)
    for i in range(power):
        for j in range(power):
            square[:, i + j] += digits[:, i] * digits[:, j]
    for high in range(2 * power - 2, power - 1, -1):
        square[:, high - power : high] += square[:, high, None] % prime * tail
    squares = np.zeros(size, np.bool_)
    squares[square[1:, :power] % prime @ prime ** np.arange(power)] = True
    sums = (digits[:, None] + digits) % prime @ prime ** np.arange(power)
    return np.stack([sums == 0, squares[sums] & (sums != 0)])


def _conference(size: int) -> tuple[Doubles, Doubles]:
    """Of a field: chi(i + j) within a border of ones, and the places where i + j is zero with a one at the corner."""
    found = prime_power(size)
    assert found is not None
    zero, square = _sums(*found)
    character = np.ones((size + 1, size + 1))
    character[0, 0] = 0
    character[1:, 1:] = np.where(zero, 0.0, np.where(square, 1.0, -1.0))
    opposite = np.zeros((size + 1, size + 1))
    opposite[0, 0] = 1
    opposite[1:, 1:] = zero
    return character, opposite


@cache
def paley(order: int) -> Doubles | None:
    """A symmetric matrix of 1 and -1 whose rows are orthogonal, or None where Paley's constructions give none.

    The first is of the order q + 1 for prime powers q = 4 k + 3, with chi(i + j) in place of chi(i - j), which makes it
    symmetric; the second of 2 (q + 1) for q = 4 k + 1.
    """
    q = order - 1
    if q % 4 == 3 and prime_power(q):
        character, opposite = _conference(q)
        character[1:, 1:] += opposite[1:, 1:]
        character[0, 0] = -1
        return character
    q = order // 2 - 1
    if order % 4 == 0 and q % 4 == 1 and prime_power(q):
        character, opposite = _conference(q)
        # columns from i - j to i + j: what was the unit matrix is now where i + j is zero
        return np.kron(character, np.array([[1, 1], [1, -1]])) + np.kron(opposite, np.array([[1, -1], [-1, -1]]))
    return None


@cache
def order(size: int) -> int | None:
    """The least order, 1 for powers of two, of a matrix that times a power of two makes this size; None without."""
    odd = size // (size & -size) if size > 0 else 0
    if odd == 1:
        return 1
    for found in (odd * 2**k for k in range(2, 10)):
        if size and size % found == 0 and found <= LARGEST and paley(found) is not None:
            return found
    return None


@cache
def factors(size: int) -> tuple[Doubles, ...]:
    """Symmetric orthogonal matrices whose Kronecker product is the transform: Paley's first, if there is one.

    Raises:
        FewbitsError: there is none of this size by these constructions.
    """
    first = order(size)
    if first is None:
        raise FewbitsError(
            f"There is no Hadamard matrix of {size} by the constructions that QuIP# is made with here.",
            "Take exl3:2.0, whose transforms are blocks of 128, or keep this tensor as it is.",
        )
    found = [] if first == 1 else [paley(first)]
    power = (size // first).bit_length() - 1
    parts = -(-power // POWER)
    found += [sylvester(1 << ((power + i) // parts)) for i in range(parts)]
    return tuple(matrix / np.sqrt(len(matrix)) for matrix in found if matrix is not None)


def rotate_rows(matrix: npt.NDArray[Real]) -> npt.NDArray[Real]:
    """The transform along the rows of [rows, columns]: matrix times [rows, columns]."""
    rows, columns = matrix.shape
    found, after = matrix, rows
    for factor in factors(rows):
        after //= len(factor)
        found = np.matmul(factor.astype(matrix.dtype), found.reshape(-1, len(factor), after * columns))
    return found.reshape(rows, columns)


def rotate_columns(matrix: npt.NDArray[Real]) -> npt.NDArray[Real]:
    """The same along the columns."""
    found, after = matrix, matrix.shape[1]
    for factor in factors(matrix.shape[1]):
        after //= len(factor)
        turn = factor.astype(matrix.dtype)
        if after == 1:
            found = found.reshape(-1, len(factor)) @ turn
        else:
            found = np.matmul(turn, found.reshape(-1, len(factor), after))
    return found.reshape(matrix.shape)
