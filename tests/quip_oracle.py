"""QuIP# decoded slowly, bit by bit, from the description of its layout."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which coordinate stands in each nibble and under each sign bit."""


def table(padding: list[list[float]]) -> list[list[float]]:
    """256 rows of magnitudes: D8 + 1/2 up to a squared norm of 10, in order, and 29 of 12."""
    near = [p for p in product((0.5, 1.5, 2.5, 3.5), repeat=8) if sum(x * x for x in p) <= 10]
    return [*map(list, sorted(near)), *padding]


def point(index: int, magnitudes: list[list[float]]) -> list[float]:
    """The point of E8P with this index."""
    row, signs = magnitudes[index >> 8], index & 255
    down = signs.bit_count() % 2
    signs ^= down
    found = [0.0] * 8
    for place, coordinate in enumerate(NIBBLES):
        value = row[coordinate]
        if place == 7 and sum(row) % 2:
            value = -value
        found[coordinate] = (-value if signs >> place & 1 else value) + (-0.25 if down else 0.25)
    return found


def index(packed: npt.NDArray[np.int64], row: int, block: int) -> int:
    """The index of 8 inputs of one output in what quip-sharp's kernels read.

    Four indices, of 2 outputs and 16 inputs, are a word; 8 by 4 words a tile, of 16 outputs and 64 inputs; tiles follow
    one another along the inputs.
    """
    words = packed.shape[1]
    flat = packed.view(np.uint64).ravel()
    tile = (row // 16) * (words * 32 // 64) + block // 8
    word = int(flat[tile * 32 + (row % 16) // 2 * 4 + (block % 8) // 2])
    at = row % 2 + 2 * (block % 2)
    high = word >> (8 * at) & 255
    low = sum((word >> (32 + 4 * bit + at) & 1) << bit for bit in range(8))
    return high << 8 | low


def sylvester(size: int) -> Doubles:
    signs = [[-1 if (i & j).bit_count() % 2 else 1 for j in range(size)] for i in range(size)]
    return np.array(signs) / np.sqrt(size)


def character(number: int, prime: int) -> int:
    """Legendre's symbol."""
    return 0 if number % prime == 0 else 1 if pow(number, (prime - 1) // 2, prime) == 1 else -1


def paley(order: int) -> Doubles:
    """Of primes alone: the first construction where order - 1 is one that leaves 3 divided by 4, else the second."""
    first = (order - 1) % 4 == 3 and all((order - 1) % d for d in range(2, order - 1))
    q = order - 1 if first else order // 2 - 1
    core = np.ones((q + 1, q + 1))
    core[0, 0] = 0
    core[1:, 1:] = [[character(i + j, q) for j in range(q)] for i in range(q)]
    zero = np.zeros((q + 1, q + 1))
    zero[0, 0] = 1
    zero[1:, 1:] = [[(i + j) % q == 0 for j in range(q)] for i in range(q)]
    if first:
        zero[0, 0] = -1
        return (core + zero) / np.sqrt(order)
    found = np.kron(core, [[1, 1], [1, -1]]) + np.kron(zero, [[1, -1], [-1, -1]])
    return np.asarray(found / np.sqrt(order))


def inner(arrays: dict[str, npt.NDArray[Any]], padding: list[list[float]], near: Doubles, finer: float) -> Doubles:
    """Q [out, in], in float32's sums."""
    magnitudes = table(padding)
    packed, bits = arrays[".Qidxs"], {7: 2, 18: 3, 17: 4}[int(arrays[".codebook_id"])]
    rows, columns = arrays[".SV"].size, arrays[".SU"].size
    first = np.ascontiguousarray(packed[:, : columns // 32])
    rest = np.ascontiguousarray(packed[:, columns // 32 :])
    found = np.zeros((rows, columns), np.float32)
    for row in range(rows):
        for block in range(columns // 8):
            here = np.array(point(index(first, row, block), magnitudes), np.float32)
            if bits == 4:
                here += np.array(point(index(rest, row, block), magnitudes), np.float32) / np.float32(finer)
            if bits == 3:
                second = int(rest[row, block // 8]) >> (8 * (block % 8)) & 255
                here += near[second].astype(np.float32) / np.float32(finer)
            found[row, block * 8 : block * 8 + 8] = here
    return found.astype(np.float64)


def decode(arrays: dict[str, npt.NDArray[Any]], q: Doubles, left: Doubles, right: Doubles) -> Doubles:
    """float64 [out, in] of Q, given the transforms of outputs and inputs."""
    outputs = arrays[".SV"].astype(float) * float(arrays[".Wscale"])
    return np.asarray(outputs[:, None] * (left @ q @ right) * arrays[".SU"].astype(float))
