"""Bits of trellis-coded tiles: what steps add, put into words and taken out as states and weights.

A tile of 16 x 16 weights is 256 steps of K bits: 16 K words of 16 bits, the first bit the highest, the two words of
every 32 bits exchanged. The state of a step is the 16 bits that end with its own; before the first bit comes the last.
At a rate of K and a half, the second, fourth, ... step has one bit more.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels.lanes import EXACT

TILE = 16
STEPS = TILE * TILE
U16 = npt.NDArray[np.uint16]
F32 = npt.NDArray[np.float32]


@njit(**EXACT)
def pack_steps(steps: U16, bits: int, packed: U16) -> None:
    """Steps [tiles, 256], of which the lowest bits count, to packed [tiles, 16 bits]."""
    mask = (1 << bits) - 1
    for tile in range(steps.shape[0]):
        held, count, word = 0, 0, 0
        for t in range(STEPS):
            held = ((held << bits) | (steps[tile, t] & mask)) & 0xFFFFFFFF
            count += bits
            if count >= 16:
                count -= 16
                packed[tile, word ^ 1] = np.uint16((held >> count) & 0xFFFF)
                word += 1


@njit(**EXACT)
def unpack_weights(packed: U16, table: F32, order: npt.NDArray[np.int64], weights: F32) -> None:
    """Weights that trellises stand for, without scales.

    Args:
        packed: [rows of tiles (inputs), columns of tiles (outputs), words of a tile].
        table: [65536], the value of each state.
        order: [256], where in its tile (input * 16 + output) each step's weight is.
        weights: out, [outputs, inputs].
    """
    words = packed.shape[2]
    halves = words // 8  # of a bit, a step
    for row in range(packed.shape[0]):
        for column in range(packed.shape[1]):
            tile = packed[row, column]
            part = weights[column * TILE : (column + 1) * TILE, row * TILE : (row + 1) * TILE]
            for t in range(STEPS):
                first = (t + 1) * halves // 2 - 16 + 16 * words
                word, offset = (first // 16) % words, first % 16
                pair = (np.int64(tile[word ^ 1]) << 16) | np.int64(tile[((word + 1) % words) ^ 1])
                state = (pair >> (16 - offset)) & 0xFFFF
                part[order[t] % TILE, order[t] // TILE] = table[state]
