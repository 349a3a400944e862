"""EXL3 decoded slowly, bit by bit, from the format's description; and the search for the best walk as it is defined."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


def half(bits: int) -> float:
    return float(np.array(bits, np.uint16).view(np.float16))


def value(state: int, codebook: str) -> float:
    """What a state of 16 bits stands for."""
    if codebook == "mul1":
        hashed = state * 0x83DCD12D % 2**32
        total = sum(hashed.to_bytes(4, "little"))
        return float(np.float16(half(0x6400 + total) * half(0x1EEE) + half(0xC931)))
    hashed = state * 0xCBAC1FED if codebook == "mcg" else state * 89226354 + 64248484
    hashed = (hashed % 2**32 & 0x8FFF8FFF) ^ 0x3B603B60
    return float(np.float16(half(hashed & 0xFFFF) + half(hashed >> 16)))


def states(words: npt.NDArray[np.int16]) -> list[int]:
    """The 256 states of a tile from its words: bits highest first, the two words of each pair exchanged.

    Where the words are those of a half bit a step, odd steps add one bit more than even ones.
    """
    bits, half = divmod(words.size, 16)
    ends, end = [], 0
    for t in range(256):
        end += bits + (1 if half and t % 2 else 0)
        ends.append(end)
    plain = words.view(np.uint16).reshape(-1, 2)[:, ::-1].ravel()
    stream = "".join(f"{int(word):016b}" for word in plain)
    around = stream[-16:] + stream
    return [int(around[end : end + 16], 2) for end in ends]


def places() -> list[tuple[int, int]]:
    """Input and output within the tile of each step's weight, as a tensor core's threads hold them."""
    found = []
    for thread in range(32):
        first, column = thread % 4 * 2, thread // 4
        for right in (0, 8):
            found += [(first + down, column + right) for down in (0, 1, 8, 9)]
    return found


def hadamard() -> Doubles:
    """H[i, j] = (-1)^(number of ones in i & j) / sqrt(128)."""
    signs = [[-1 if (i & j).bit_count() % 2 else 1 for j in range(128)] for i in range(128)]
    return np.array(signs) / np.sqrt(128)


def decode(arrays: dict[str, npt.NDArray[Any]]) -> Doubles:
    """float64 [out, in] of the tensors by suffix."""
    codebook = next((name for name in ("mcg", "mul1") if f".{name}" in arrays), "3inst")
    trellis = arrays[".trellis"]
    inner = np.zeros((trellis.shape[0] * 16, trellis.shape[1] * 16))
    for i, j in np.ndindex(trellis.shape[:2]):
        for state, (down, right) in zip(states(trellis[i, j]), places(), strict=True):
            inner[i * 16 + down, j * 16 + right] = value(state, codebook)
    left, right = (np.kron(np.eye(size // 128), hadamard()) for size in inner.shape)
    weights = arrays[".suh"].astype(float)[:, None] * (left @ inner @ right) * arrays[".svh"].astype(float)
    return weights.T


def best_walk(tile: Doubles, values: Doubles, bits: int) -> npt.NDArray[np.int64]:
    """The states of one tile [256]: a search from the middle gives the node at the wrap, one from it to it the walk."""
    nodes = 1 << (16 - bits)
    into = (np.arange(1 << bits)[:, None] << (16 - bits)) | np.arange(nodes)  # states that end at each node
    before = into >> bits

    def search(order: list[int], start: int | None) -> tuple[list[npt.NDArray[np.int64]], Doubles]:
        costs = np.zeros(nodes) if start is None else np.where(np.arange(nodes) == start, 0.0, np.inf)
        ways = []
        for t in order:
            total = costs[before] + (values[into] - tile[t]) ** 2
            best = total.argmin(axis=0)
            ways.append(into[best, np.arange(nodes)])
            costs = total.min(axis=0)
        return ways, costs

    ways, costs = search([*range(128, 256), *range(128)], None)
    node = int(costs.argmin())
    for way in reversed(ways[128:]):
        node = int(way[node]) >> bits
    ways, _ = search(list(range(256)), node)
    found = np.zeros(256, np.int64)
    for t in reversed(range(256)):
        found[t] = ways[t][node]
        node = int(found[t]) >> bits
    return found
