"""Matrices in a GGUF storage type, for methods and runs that work on whole matrices."""

from __future__ import annotations

from dataclasses import dataclass

from fewbits.codecs.base import Bytes, Codec, Floats
from fewbits.codecs.storage import Coded, StorageType


@dataclass(frozen=True)
class Blocks(StorageType):
    """Rows of a codec's blocks."""

    codec: type[Codec]

    @property
    def name(self) -> str:
        return self.codec.name

    @property
    def bits(self) -> float:  # type: ignore[override]
        return 8 * self.codec.block_bytes / self.codec.block

    @property
    def rows_apart(self) -> bool:
        return True


@dataclass(frozen=True)
class BlocksCoded(Coded):
    """A matrix as rows of blocks.

    Attributes:
        data: uint8 [rows, row bytes].
    """

    type: Blocks
    data: Bytes

    def decode(self) -> Floats:
        return self.type.codec.decode(self.data)
