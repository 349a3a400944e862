"""What every storage type has in common, and the registry that the class definitions fill."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import prod
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fewbits.errors import FewbitsError

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

CODECS: dict[str, type[Codec]] = {}


class Codec(ABC):
    """One storage type: how rows of numbers become bytes and back.

    Codecs know no files and no models. They are stateless: every method is a class method and releases the GIL
    where it is slow, so that threads can work on several slabs at once; the result never depends on the slab height.
    """

    name: ClassVar[str]
    block: ClassVar[int]
    """Weights in one block; a row must be a multiple of it."""
    block_bytes: ClassVar[int]
    weighted: ClassVar[bool] = False
    """Whether `encode` makes use of importances."""
    code_bytes: ClassVar[slice | None] = None
    """Where in a block the codes stand, if each weight has one in bits of its own; scales stand elsewhere."""
    step_bytes: ClassVar[tuple[int, ...]] = ()
    """Where in a block half-precision numbers stand in which all its weights are linear: `d`, and `dmin` or `m`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in cls.__dict__:
            CODECS[cls.name] = cls

    @classmethod
    def bits_per_weight(cls) -> float:
        return cls.block_bytes * 8 / cls.block

    @classmethod
    def fits(cls, columns: int) -> bool:
        return columns % cls.block == 0

    @classmethod
    def nbytes(cls, shape: tuple[int, ...]) -> int:
        """Exact bytes of a tensor of this shape (row-major, last axis contiguous)."""
        if not cls.fits(shape[-1]):
            raise FewbitsError(f"{cls.name} needs rows that are a multiple of {cls.block}, got {shape[-1]}.")
        return prod(shape) // cls.block * cls.block_bytes

    @classmethod
    @abstractmethod
    def encode(cls, weights: Floats, importance: Floats | None = None) -> Bytes:
        """Encode rows.

        Args:
            weights: float32 [rows, columns], C-contiguous, finite.
            importance: float32 [columns], non-negative: the weight of each column's squared error (an imatrix row).
                None means ones. Columns of zero, or all zero, never give a NaN.

        Returns:
            uint8 [rows, columns // block * block_bytes].
        """

    @classmethod
    @abstractmethod
    def decode(cls, data: Bytes) -> Floats:
        """Decode rows: uint8 [rows, row bytes] -> float32 [rows, columns], bit-equal to libggml."""


class Blocked(Codec):
    """A type whose blocks a kernel decodes.

    Attributes:
        decoder: decoder(blocks, *tables, out): uint8 [blocks, block_bytes] -> float32 [blocks, block].
    """

    decoder: ClassVar[Callable[..., None]]

    @classmethod
    def tables(cls) -> tuple[Floats, ...]:
        """What the decoder needs besides: the codebook's values, for types that have one."""
        return ()

    @classmethod
    def decode(cls, data: Bytes) -> Floats:
        blocks = np.ascontiguousarray(data).reshape(-1, cls.block_bytes)
        out = np.empty((blocks.shape[0], cls.block), np.float32)
        cls.decoder(blocks, *cls.tables(), out)
        return out.reshape(data.shape[0], -1)


def codec(name: str) -> type[Codec]:
    """The storage type of this name, e.g. ``Q4_K``.

    Raises:
        FewbitsError: unknown name; the message lists the known ones.
    """
    try:
        return CODECS[name.upper()]
    except KeyError:
        raise FewbitsError(f"Unknown storage type {name!r}.", f"Known: {', '.join(sorted(CODECS))}.") from None
