"""What every storage type of whole matrices has in common, however it codes them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from fewbits.codecs.base import Floats


class StorageType(ABC):
    """How the weights of a matrix are stored; immutable.

    Attributes:
        bits: of a code; of types that mix several, their mean.
    """

    bits: float

    @property
    @abstractmethod
    def name(self) -> str:
        """As plans name it."""

    @property
    def rows_apart(self) -> bool:
        """Whether rows are coded one by one, so that parts of a matrix can be made side by side."""
        return False

    @property
    def needs_all_rows(self) -> bool:
        """Whether a few rows alone cannot stand for a matrix, since groups go along the outputs."""
        return False

    @property
    def shares_a_scale(self) -> bool:
        """Whether matrices that engines fuse have one global scale together."""
        return False


class Coded(ABC):
    """A matrix in a storage type."""

    @abstractmethod
    def decode(self) -> Floats:
        """float32 [rows, columns], as engines decode it."""
