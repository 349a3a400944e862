"""Weights coded by points of the E8 lattice, as QuIP# does it (Tseng et al., arXiv 2402.04396).

A matrix W [out, in] is diag(SV) H Q H diag(SU), H the Hadamard transforms of `codecs.hadamard` over all outputs and all
inputs. Of Q, 8 inputs at a time are a point of E8P, a codebook of 2^16: the magnitudes of a table of 256, signs whose
sum is even, and a quarter up or down. With 3 and 4 bits a second point says, in smaller steps, what the first missed:
one of 256 points of E8, or another of E8P.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt

from fewbits.codecs.base import Floats
from fewbits.codecs.hadamard import rotate_columns, rotate_rows
from fewbits.codecs.storage import Coded, StorageType
from fewbits.errors import FewbitsError
from fewbits.kernels.lattice import DIMENSIONS, nearest_points, nearest_signed

Codes = npt.NDArray[np.uint16]
SIGN_BITS = np.array([0, 4, 1, 5, 2, 6, 3, 7], np.uint8)
"""The bit of an index that is the sign of each coordinate."""
PADDING = (
    "31113333 13113333 11313333 11133333 33313311 33313131 33311331 33313113 33311313 33311133 "
    "33133311 33133131 33131331 33133113 33131313 33131133 31333311 31333131 31331331 31333113 "
    "31331313 13331133 13333311 13333131 13331331 13333113 13331313 11331333 33113331"
)
"""Twice the magnitudes of the 29 points of squared norm 12 that fill up the table (the paper's appendix C.1)."""
NAMES = {2: "E8P12", 3: "E8P12RVQ3B", 4: "E8P12RVQ4B"}
"""The codebooks by their bits."""
FINER = {3: 2.0, 4: 3.45}
"""By how much the second point's steps are finer: 3.45 is the paper's, that of 3 bits loses least on Gaussian noise."""
ROWS_TOGETHER, INPUTS_TOGETHER = 16, 64
"""Matrices are packed in tiles of so many outputs and inputs."""


@cache
def magnitudes() -> Floats:
    """float32 [256, 8]: all of D8 + 1/2 of squared norm up to 10, in order, then `PADDING`."""
    near = sorted(p for p in product((0.5, 1.5, 2.5), repeat=DIMENSIONS) if sum(x * x for x in p) <= 10)
    padding = [[int(digit) / 2 for digit in word] for word in PADDING.split()]
    return np.array([*near, *padding], np.float32)


@cache
def odd_signs() -> npt.NDArray[np.uint8]:
    """uint8 [256]: whether the signs of these magnitudes are odd in number, so that their sum is even."""
    return (magnitudes().sum(axis=1) % 2).astype(np.uint8)


@cache
def e8p() -> Floats:
    """float32 [65536, 8]: the point of each index."""
    index = np.arange(1 << 16)
    signs = index & 255
    down = np.bitwise_count(signs) & 1
    minus = ((signs ^ down)[:, None] >> SIGN_BITS) & 1
    minus[:, -1] ^= odd_signs()[index >> 8]
    found = magnitudes()[index >> 8] * (1 - 2 * minus)
    return (found + np.where(down, -0.25, 0.25)[:, None]).astype(np.float32)


@cache
def e8_near() -> Floats:
    """float32 [256, 8]: the origin, the 240 shortest points of E8, and 15 of the next: 2 e_i and, but the last, -2 e_i.

    The paper pads with 15 points of squared norm 4 without saying which.
    """
    whole = [p for p in product((-1.0, 0.0, 1.0), repeat=DIMENSIONS) if sum(map(abs, p)) in (0, 2)]
    halves = [p for p in product((-0.5, 0.5), repeat=DIMENSIONS) if sum(p) % 2 == 0]
    far = np.concatenate([np.eye(DIMENSIONS), -np.eye(DIMENSIONS)[:-1]]) * 2
    return np.concatenate([sorted(whole + halves, key=lambda p: (sum(x * x for x in p), p)), far]).astype(np.float32)


def pack_e8p(codes: Codes) -> npt.NDArray[np.int64]:
    """Indices of E8P [out, in / 8] as quip-sharp's kernels read them, int64 [out, in / 32].

    Four indices, of 2 outputs and 16 inputs, are a word: their high bytes below, above them their low bytes bit by bit.
    """
    rows, columns = codes.shape
    four = codes.reshape(rows // 2, 2, columns // 2, 2).transpose(0, 2, 3, 1).reshape(rows // 2, columns // 2, 4)
    high = np.ascontiguousarray((four >> 8).astype(np.uint8)).view("<u4")[..., 0].astype(np.uint64)
    bits = np.unpackbits(four.astype(np.uint8), axis=-1, bitorder="little").reshape(*four.shape, 8)
    low = np.packbits(bits.swapaxes(-1, -2).reshape(rows // 2, columns // 2, 32), axis=-1, bitorder="little")
    words = (low.view("<u4")[..., 0].astype(np.uint64) << np.uint64(32)) | high
    tiles = words.reshape(rows // ROWS_TOGETHER, 8, columns // 8, 4).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiles).reshape(rows, columns // 4).view(np.int64)


def unpack_e8p(packed: npt.NDArray[np.int64]) -> Codes:
    """The reverse of `pack_e8p`: uint16 [out, in / 8]."""
    rows, columns = packed.shape[0], packed.shape[1] * 4
    tiles = packed.view(np.uint64).reshape(rows // ROWS_TOGETHER, columns // 8, 8, 4).transpose(0, 2, 1, 3)
    words = np.ascontiguousarray(tiles).reshape(rows // 2, columns // 2, 1).astype("<u8").view(np.uint8)
    bits = np.unpackbits(words[..., 4:], axis=-1, bitorder="little").reshape(rows // 2, columns // 2, 8, 4)
    low = np.packbits(bits.swapaxes(-1, -2), axis=-1, bitorder="little")[..., 0]
    four = (words[..., :4].astype(np.uint16) << 8) | low
    four = four.reshape(rows // 2, columns // 2, 2, 2).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(four).reshape(rows, columns)


def pack_bytes(codes: Codes) -> npt.NDArray[np.int64]:
    """Indices below 256 [out, in / 8] one after the other, int64 [out, in / 64]."""
    return np.ascontiguousarray(codes.astype(np.uint8)).view("<i8").astype(np.int64)


def unpack_bytes(packed: npt.NDArray[np.int64]) -> Codes:
    """The reverse of `pack_bytes`."""
    return np.ascontiguousarray(packed).astype("<i8").view(np.uint8).astype(np.uint16)


@dataclass(frozen=True)
class LatticeE8(StorageType):
    """Points of E8P, alone or with a second point each.

    Attributes:
        bits: of a weight: 2, 3 or 4.
    """

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in NAMES:
            raise FewbitsError(f"There is no E8 codebook of {self.bits} bits.", "Take 2, 3 or 4.")

    @property
    def name(self) -> str:
        return NAMES[self.bits]

    @property
    def stages(self) -> int:
        """Points that are added up."""
        return 1 if self.bits == 2 else 2

    @property
    def second(self) -> Floats:
        """float32 [points, 8]: what the second indices stand for."""
        return (e8p() if self.bits == 4 else e8_near()) / np.float32(FINER[self.bits])

    def search(self, vectors: Floats) -> Codes:
        """The nearest points, the second to what the first misses.

        Args:
            vectors: float32 [count, 8].

        Returns:
            uint16 [stages, count].
        """
        first = nearest_signed(vectors, magnitudes(), odd_signs(), SIGN_BITS)
        if self.stages == 1:
            return first[None]
        rest = (vectors - e8p()[first]) * np.float32(FINER[self.bits])
        if self.bits == 3:
            return np.stack([first, nearest_points(rest, e8_near())])
        return np.stack([first, nearest_signed(rest, magnitudes(), odd_signs(), SIGN_BITS)])

    def values(self, codes: Codes) -> Floats:
        """What indices [stages, ...] stand for, float32 [..., 8]."""
        found = e8p()[codes[0]]
        return found if self.stages == 1 else found + self.second[codes[1]]

    def pack(self, codes: Codes) -> npt.NDArray[np.int64]:
        """Indices [stages, out, in / 8] as they are stored, int64 [out, in bits / 64], second indices behind."""
        packed = [pack_e8p(codes[0])]
        if self.stages == 2:
            packed.append(pack_e8p(codes[1]) if self.bits == 4 else pack_bytes(codes[1]))
        return np.concatenate(packed, axis=1)

    def unpack(self, packed: npt.NDArray[np.int64]) -> Codes:
        """The reverse of `pack`."""
        if self.stages == 1:
            return unpack_e8p(packed)[None]
        first, rest = np.split(packed, [packed.shape[1] * 2 // self.bits], axis=1)
        return np.stack([unpack_e8p(first), unpack_e8p(rest) if self.bits == 4 else unpack_bytes(rest)])


@dataclass(frozen=True)
class LatticeCoded(Coded):
    """A matrix as points of lattices and scales.

    Attributes:
        codes: uint16 [stages, out, in / 8].
        su: float16, in files of others any float, [in], signs and scales of the inputs.
        sv: likewise, [out], of the outputs.
        scale: of all.
    """

    type: LatticeE8
    codes: Codes
    su: npt.NDArray[np.floating]
    sv: npt.NDArray[np.floating]
    scale: float = 1.0

    def inner(self) -> Floats:
        """Q, float32 [out, in]: points of the codebooks."""
        return self.type.values(self.codes).reshape(self.sv.size, self.su.size)

    def decode(self) -> Floats:
        weights = rotate_rows(rotate_columns(self.inner()))
        weights *= self.su.astype(np.float32)
        weights *= (self.sv.astype(np.float32) * np.float32(self.scale))[:, None]
        return weights
