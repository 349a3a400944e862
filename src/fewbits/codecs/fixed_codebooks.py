"""Types whose codes stand for groups of weights, and what is left to choose once their scales are settled.

The counterpart of `fixed_scales` for codebooks: a group of 4 or 8 weights stands for scale * (offset + codeword), the
codeword an entry of a fixed grid with the signs that the type allows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from fewbits.codecs.base import Blocked, Bytes, Floats
from fewbits.kernels.group_feedback import EVEN, Codewords, codewords

U8 = npt.NDArray[np.uint8]
I16 = npt.NDArray[np.int16]


class Found(NamedTuple):
    """What stands in super-blocks, before it is packed."""

    entries: I16
    """[super-blocks, blocks, groups]."""
    marks: U8
    """As entries: the bits of a group's negative weights, or 1 where its shift is down."""
    scales: U8
    """The codes of the blocks' scales: [super-blocks, blocks]."""
    steps: Floats
    """[super-blocks], representable in half precision; a block's scale is step * unit * (2 code + 1)."""


class GroupCodebook(Blocked):
    """A type of super-blocks of 256 weights, in blocks with a scale each, in groups with an entry of a grid each."""

    block = 256
    weighted = True
    blocks: ClassVar[int]
    """Block scales in a super-block."""
    groups: ClassVar[int]
    """Entries in a block."""
    unit: ClassVar[float]
    pack: ClassVar[Callable[..., None]]
    """pack(entries, marks, scales, steps, out): out uint8 [super-blocks, block_bytes]."""

    @classmethod
    def empty(cls, count: int) -> Found:
        """Room for so many super-blocks."""
        shape = (count, cls.blocks, cls.groups)
        numbers = np.empty(shape, np.int16), np.empty(shape, np.uint8), np.empty(shape[:2], np.uint8)
        return Found(*numbers, np.empty(count, np.float32))

    @classmethod
    @abstractmethod
    def search(cls, weights: Floats, importance: Floats | None = None) -> Found:
        """The scales and entries that lose least; arguments as those of `encode`."""

    @classmethod
    @abstractmethod
    def vocabulary(cls) -> tuple[Floats, int]:
        """All codewords, float32 [codewords, 4 or 8], and what their signs are: see `kernels.group_feedback`."""

    @classmethod
    def offsets(cls, found: Found) -> Floats:
        """What is added to the codewords, before the scale: float32, as `Found.entries`."""
        return np.zeros(found.entries.shape, np.float32)

    @classmethod
    @abstractmethod
    def with_codewords(cls, found: Found, words: I16, minus: U8) -> Found:
        """The same scales with other codewords: their numbers and the bits of their negative weights, as entries."""

    @classmethod
    def encode(cls, weights: Floats, importance: Floats | None = None) -> Bytes:
        return cls.packed(cls.search(weights, importance), weights.shape[0])

    @classmethod
    def packed(cls, found: Found, rows: int) -> Bytes:
        """uint8 [rows, row bytes]."""
        out = np.empty((found.steps.size, cls.block_bytes), np.uint8)
        cls.pack(*found, out)
        return out.reshape(rows, -1)

    @classmethod
    def scales(cls, found: Found) -> Floats:
        """The scale of each group: float32, as `Found.entries`."""
        each = found.steps[:, None] * (np.float32(cls.unit) * (2 * found.scales.astype(np.float32) + 1))
        return np.broadcast_to(each[..., None], found.entries.shape)


@dataclass(frozen=True)
class FixedCodebook:
    """A type's codewords.

    Attributes:
        size: weights in a group.
        span: weights that are chosen at once: a group, or two where the rule for signs is over both.
    """

    book: Codewords
    size: int
    span: int


@cache
def fixed_codebook(codec: type[GroupCodebook]) -> FixedCodebook:
    """The codewords of a type, laid out for choosing among them."""
    values, signs = codec.vocabulary()
    size = values.shape[1]
    return FixedCodebook(codewords(values, signs), size, 8 if signs == EVEN else size)
