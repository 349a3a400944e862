"""What a type's codes can say once its scales are settled: for methods that choose codes one by one.

Where a block keeps each weight's code in bits of its own (`Codec.code_bytes`), nothing more need be known of the
layout: which bits belong to which weight, and what they are worth, is found out by decoding blocks with single bits
set, and the ends of a weight's range by decoding the block with all of them cleared and all of them set.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from fewbits.codecs.base import Bytes, Codec, Floats


@dataclass(frozen=True)
class FixedScales:
    """The codes of a type's blocks: value = low + width * levels[code].

    Attributes:
        levels: float32 [codes], ascending from 0 to 1.
        weight: int64 [bits]: which weight of a block each bit of the code bytes, least significant first, belongs to.
        place: uint8 [bits]: and which bit of its code it is.
    """

    codec: type[Codec]
    where: slice
    levels: Floats
    weight: npt.NDArray[np.int64]
    place: npt.NDArray[np.uint8]

    @property
    def uniform(self) -> bool:
        """Whether the levels are evenly spaced."""
        even = np.linspace(0, 1, self.levels.size, dtype=np.float32)
        return bool(np.allclose(self.levels, even, atol=1e-4))

    def ranges(self, data: Bytes) -> tuple[Floats, Floats]:
        """(low, width) of every weight, float32 [rows, columns], for uint8 [rows, row bytes]."""
        low = self.codec.decode(self._filled(data, 0))
        return low, self.codec.decode(self._filled(data, 255)) - low

    def codes(self, data: Bytes) -> npt.NDArray[np.uint8]:
        """uint8 [rows, columns] from uint8 [rows, row bytes]."""
        blocks = np.ascontiguousarray(data).reshape(-1, self.codec.block_bytes)[:, self.where]
        bits = np.unpackbits(blocks, axis=1, bitorder="little") << self.place
        out = np.zeros((blocks.shape[0], self.codec.block), np.uint8)
        for place in range(int(self.place.max()) + 1):
            chosen = self.place == place
            out[:, self.weight[chosen]] |= bits[:, chosen]
        return out.reshape(data.shape[0], -1)

    def with_codes(self, data: Bytes, codes: npt.NDArray[np.uint8]) -> Bytes:
        """Blocks of the same scales with other codes: uint8 [rows, row bytes]."""
        out = np.array(data, order="C").reshape(-1, self.codec.block_bytes)
        per_block = codes.reshape(-1, self.codec.block)
        out[:, self.where] = np.packbits((per_block[:, self.weight] >> self.place) & 1, axis=1, bitorder="little")
        return out.reshape(data.shape)

    def _filled(self, data: Bytes, byte: int) -> Bytes:
        out = np.array(data, order="C").reshape(-1, self.codec.block_bytes)
        out[:, self.where] = byte
        return out.reshape(data.shape)


@cache
def fixed_scales(codec: type[Codec]) -> FixedScales | None:
    """How codes of this type stand in its blocks; None for types whose codes do not stand for single weights."""
    if codec.code_bytes is None:
        return None
    block = codec.encode(np.random.default_rng(0).normal(size=(1, codec.block)).astype(np.float32))
    block[:, codec.code_bytes] = 0
    bits = np.arange(8 * block[:, codec.code_bytes].size)
    probes = np.repeat(block, bits.size + 2, axis=0)
    probes[bits, codec.code_bytes.start + bits // 8] = 1 << (bits % 8)
    probes[-1, codec.code_bytes] = 255
    values = codec.decode(probes)
    worth = (values[:-2] - values[-2]) / (values[-1] - values[-2])
    weight = np.abs(worth).argmax(axis=1)
    worth = worth[bits, weight]
    per_weight = bits.size // codec.block
    order = np.argsort(worth, kind="stable")
    place = np.empty(bits.size, np.uint8)
    for index in range(codec.block):
        place[order[weight[order] == index]] = np.arange(per_weight)
    found = FixedScales(codec, codec.code_bytes, np.zeros(1, np.float32), weight, place)
    codes = np.repeat(np.arange(1 << per_weight, dtype=np.uint8)[:, None], codec.block, axis=1)
    ladder = codec.decode(found.with_codes(np.repeat(block, codes.shape[0], axis=0), codes))[:, 0]
    levels = (ladder - ladder[0]) / (ladder[-1] - ladder[0])
    return FixedScales(codec, codec.code_bytes, levels.astype(np.float32), weight, place)
