"""Trellis-coded weights as exllamav3 stores them (EXL3; QTIP, Tseng et al., arXiv 2406.11235).

A matrix W [in, out] is diag(suh) H Q H diag(svh), with H the Hadamard matrix of 128 divided by sqrt(128), blockwise on
either side. Q is cut into tiles of 16 x 16; the weights of a tile, in the order in which tensor cores want them, are
256 steps through a trellis: each adds K bits to the last 16, and these 16 are hashed to a value by a codebook. The last
step leads back to where the first began, so there is no state to store.

Read from exllamav3 1.x (`exl3_lib/quantize.py`, `codebook.cuh`) and checked against GPTQModel 7.7
(`exllamav3_torch.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fewbits.codecs.base import Floats
from fewbits.codecs.hadamard import sylvester
from fewbits.codecs.storage import Coded, StorageType
from fewbits.errors import FewbitsError
from fewbits.kernels.trellis import STEPS, TILE, pack_steps, unpack_weights
from fewbits.kernels.viterbi import Walker

HADAMARD = 128
BITS = range(1, 9)
CODEBOOKS = {"mul1": 0x83DCD12D, "mcg": 0xCBAC1FED, "3inst": None}
"""Multiplier of each hash that files name; that of `3inst` goes without saying."""
MOST_HALF = 3
"""Most whole bits of a rate with a half."""
VALUES = 2048
"""Values of a codebook that the search tells apart."""
States = npt.NDArray[np.uint16]
Workspace = tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]
Real = TypeVar("Real", np.float32, np.float64)


@cache
def codebook(name: str) -> Floats:
    """The value of each state, float32 [65536], as engines compute it in half precision.

    Args:
        name: of `CODEBOOKS`. mul1 sums four bytes; the others add two halves.
    """
    states = np.arange(1 << 16, dtype=np.uint64)
    if name == "mul1":
        hashed = (states * np.uint64(0x83DCD12D)) & 0xFFFFFFFF
        total = ((hashed[:, None] >> np.arange(0, 32, 8, dtype=np.uint64)) & 255).sum(axis=1)
        scale, shift = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16).astype(np.float64)
        # the sum in the mantissa of 1024: a fused multiply-add rounds once
        return ((1024.0 + total.astype(np.float64)) * scale + shift).astype(np.float16).astype(np.float32)
    factor, offset = (0xCBAC1FED, 0) if name == "mcg" else (89226354, 64248484)
    halves = (
        (((states * np.uint64(factor) + np.uint64(offset)) & 0x8FFF8FFF) ^ 0x3B603B60)
        .astype(np.uint32)
        .view(np.float16)
        .reshape(-1, 2)
    )
    return (halves[:, 0] + halves[:, 1]).astype(np.float32)


@cache
def walker(bits: int, name: str) -> Walker:
    """Searches a trellis.

    Of a codebook with more than 2048 values it tells only means of neighbours apart; what is stored is exact.
    """
    table = codebook(name)
    values, ranks = np.unique(table, return_inverse=True)
    if values.size > VALUES:
        low, high = float(values[0]), float(values[-1])
        bins = np.minimum((table - low) * (VALUES / (high - low)), VALUES - 1).astype(np.int64)
        _, ranks = np.unique(bins, return_inverse=True)
        values = (np.bincount(ranks, table) / np.bincount(ranks)).astype(np.float32)
    return Walker(ranks, values, bits)


@cache
def tile_order() -> npt.NDArray[np.int64]:
    """int64 [256]: where in its tile (input * 16 + output) the weight of each step is.

    A thread of a tensor core (mma.m16n8k16) holds inputs 2t, 2t + 1, 2t + 8 and 2t + 9 of outputs u and u + 8.
    """
    thread, half, row = np.meshgrid(np.arange(32), (0, 8), (0, 1, 8, 9), indexing="ij")
    return (((thread % 4) * 2 + row) * TILE + thread // 4 + half).ravel()


@cache
def hadamard() -> npt.NDArray[np.float64]:
    """Sylvester's Hadamard matrix of 128, divided by sqrt(128)."""
    return sylvester(HADAMARD) / np.sqrt(HADAMARD)


def rotate_columns(matrix: npt.NDArray[Real]) -> npt.NDArray[Real]:
    """Hadamard transform along the columns of [rows, columns], in blocks of 128."""
    return (matrix.reshape(-1, HADAMARD) @ hadamard().astype(matrix.dtype)).reshape(matrix.shape)


def rotate_rows(matrix: npt.NDArray[Real]) -> npt.NDArray[Real]:
    """The same along the rows."""
    rows, columns = matrix.shape
    return np.matmul(hadamard().astype(matrix.dtype), matrix.reshape(-1, HADAMARD, columns)).reshape(rows, columns)


@dataclass(frozen=True)
class Trellis(StorageType):
    """A trellis of 65536 states.

    Attributes:
        bits: of a step, and so of a weight: 1 to 8.
        codebook: what states stand for: `mul1`, `mcg` or `3inst`.
        half: whether every other step adds one bit more, as exllamav3 has it for 1.5, 2.5 and 3.5 bits with mul1
            (`frac_k` in its `quantize.py`, 1.6.5). Such trellises are read and not made.
    """

    bits: int
    codebook: str = "mul1"
    half: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.codebook not in CODEBOOKS:
            raise FewbitsError(
                f"There is no trellis of {self.bits} bits with the codebook {self.codebook!r}.",
                f"Take 1 to 8 bits and one of {', '.join(CODEBOOKS)}.",
            )
        if self.half and (self.bits > MOST_HALF or self.codebook != "mul1"):
            raise FewbitsError(
                f"There is no trellis of {self.bits}.5 bits with the codebook {self.codebook!r}.",
                "exllamav3 has 1.5, 2.5 and 3.5 bits with the codebook mul1.",
            )

    @property
    def name(self) -> str:
        bits = f"{self.bits}.5" if self.half else f"{self.bits}"
        return f"EXL3_{bits}" + ("" if self.codebook == "mul1" else f"_{self.codebook.upper()}")

    @property
    def words(self) -> int:
        """Words of 16 bits in a tile."""
        return TILE * self.bits + (TILE // 2 if self.half else 0)

    @classmethod
    def from_name(cls, name: str) -> Trellis:
        """The type that plans name so, among those that can be made.

        Raises:
            FewbitsError: none.
        """
        found = re.fullmatch(r"EXL3_([1-8])(?:_(MCG|3INST))?", name)
        if not found:
            raise FewbitsError(f"Unknown trellis {name!r}.", "Known: EXL3_1 to EXL3_8, with _MCG or _3INST behind it.")
        return cls(int(found[1]), (found[2] or "mul1").lower())

    def check_made(self) -> None:
        """Refuse what is only read.

        Raises:
            FewbitsError: steps of two kinds.
        """
        if self.half:
            raise FewbitsError(f"{self.name}: half bits are read and not made.", "Take whole bits.")

    def workspace(self) -> Workspace:
        """Memory for `search`, which one thread at a time can use again and again."""
        return walker(self.bits, self.codebook).workspace()

    def search(self, tiles: Floats, work: Workspace | None = None) -> States:
        """The closest walks through the trellis.

        Args:
            tiles: float32 [tiles, 256], in the order of the steps.
            work: of `workspace`.

        Returns:
            uint16 [tiles, 256]: the state of each step.

        Raises:
            FewbitsError: steps of two kinds.
        """
        self.check_made()
        return self.states(walker(self.bits, self.codebook).walk(tiles, work))

    def states(self, steps: States) -> States:
        """The state after each step [tiles, 256], from the bits that the steps add."""
        found = np.zeros(steps.shape, np.uint32)
        for back in range(-(-16 // self.bits)):
            found |= np.roll(steps, back, axis=1).astype(np.uint32) << (self.bits * back)
        return found.astype(np.uint16)

    def pack(self, states: States) -> npt.NDArray[np.int16]:
        """Tail-biting states [..., 256] as they are stored, int16 [..., 16 bits]."""
        flat = np.ascontiguousarray(states.reshape(-1, STEPS))
        packed = np.empty((flat.shape[0], TILE * self.bits), np.uint16)
        pack_steps(flat, self.bits, packed)
        return packed.reshape(*states.shape[:-1], -1).view(np.int16)


@dataclass(frozen=True)
class TrellisCoded(Coded):
    """A matrix as trellises and scales.

    Attributes:
        trellis: int16 [in / 16, out / 16, words of a tile].
        suh: float16 [in], signs and scales of the inputs.
        svh: float16 [out], of the outputs.
    """

    type: Trellis
    trellis: npt.NDArray[np.int16]
    suh: npt.NDArray[np.float16]
    svh: npt.NDArray[np.float16]

    def inner(self) -> Floats:
        """Q^T, float32 [out, in]: the values of the codebook."""
        tiles_in, tiles_out, _ = self.trellis.shape
        weights = np.empty((tiles_out * TILE, tiles_in * TILE), np.float32)
        packed = np.ascontiguousarray(self.trellis).view(np.uint16)
        unpack_weights(packed, codebook(self.type.codebook), tile_order(), weights)
        return weights

    def decode(self) -> Floats:
        rotated = rotate_columns(self.inner())
        rotated *= self.suh.astype(np.float32)
        weights = rotate_rows(rotated)
        weights *= self.svh.astype(np.float32)[:, None]
        return weights
