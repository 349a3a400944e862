"""What every method has in common, and the registry that the class definitions fill."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from fewbits.codecs import Codec
from fewbits.codecs.blocks import Blocks, BlocksCoded
from fewbits.codecs.scaled import Quantized, Scaled
from fewbits.codecs.storage import Coded, StorageType
from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    import torch

ROWS = 256
"""Rows that a thread takes at once: always so many, since the last bits of matrix products depend on their shapes."""
ROWS_THERE = 1024
"""The same where a GPU does most of it: a few hundred rows would leave it idle."""
DAMPING = 0.01
"""Added to a Hessian's diagonal, times its mean: what 16 thousand tokens say of directions is not the whole truth."""
Effort = Literal["fast", "default", "thorough"]


@dataclass(frozen=True)
class Factor:
    """A Hessian as error feedback uses it.

    Attributes:
        order: int64 [columns]: in which columns are rounded, the most important first.
        upper: float32 [columns, columns]: the upper Cholesky factor of the damped inverse, in that order.
        hessian: float32 [columns, columns], damped, in that order; for types whose groups of columns stay together.
        device: where codes that stand for single weights are fed back; others are on the processor.
    """

    order: npt.NDArray[np.int64]
    upper: npt.NDArray[np.float32]
    hessian: npt.NDArray[np.float32] | None = None
    device: str = "cpu"

    @cached_property
    def upper_there(self) -> torch.Tensor:
        """`upper` on the device."""
        return self._there(self.upper)

    @cached_property
    def hessian_there(self) -> torch.Tensor:
        """`hessian` on the device."""
        assert self.hessian is not None
        return self._there(self.hessian)

    def _there(self, matrix: npt.NDArray[np.float32]) -> torch.Tensor:
        import torch  # takes a second

        return torch.from_numpy(matrix).to(self.device)

    def expected(self, importance: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The weight of each column's squared error for a search of scales that error feedback follows.

        That is the importance where nothing makes up for an error, and the inverse of the inverse Hessian's diagonal,
        as far as columns to come are free, where all do. What is left lies between: the geometric mean wins (held-out
        error over that of the plain importance: Q4_0 .90, Q3_K .91, IQ4_XS .95, Q2_K .96, Q4_K .98, IQ3_S .90).

        Args:
            importance: float32 [columns], the mean square of each input.
        """
        free = np.empty_like(importance)
        free[self.order] = 1 / np.square(self.upper.diagonal())
        return np.sqrt(importance * free)


@dataclass(frozen=True)
class Known:
    """What is known of a matrix besides its weights; None for what is not.

    Attributes:
        importance: float32 [columns], the weight of each column's squared error: the mean square of each input.
        factor: of the Hessian.
        hessian: float32 [columns, columns], the mean of x x^T.
        peak: largest absolute input.
        amax: largest magnitude of all matrices that share a global scale with this one, for types that have one.
        damping: what does best on text held out, as a share of the mean of the Hessian's diagonal.
        device: where searches and factorizations run that can run on a GPU.
        effort: how much time to take, for methods that gain by it.
    """

    importance: npt.NDArray[np.float32] | None = None
    factor: Factor | None = None
    hessian: npt.NDArray[np.float32] | None = None
    peak: float | None = None
    amax: float | None = None
    damping: float | None = None
    device: str = "cpu"
    effort: Effort = "default"


METHODS: dict[str, type[Method]] = {}


class Method(ABC):
    """A way of choosing codes: for rows of weights in a type of blocks, for a whole matrix in a type with scales, or
    for both."""

    name: ClassVar[str]
    summary: ClassVar[str]
    hessian: ClassVar[Literal["", "diagonal", "factor", "whole"]] = ""
    """What of the inputs' Hessian is used where text runs: with `factor` or `whole` errors are passed on by it."""

    @classmethod
    def feeds_back(cls) -> bool:
        """Whether errors are passed on, for which a text must have as many tokens as a matrix has columns."""
        return cls.hessian in ("factor", "whole")

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        METHODS[cls.name] = cls

    @classmethod
    def quantize(
        cls,
        weights: npt.NDArray[np.float32],
        codec: type[Codec],
        importance: npt.NDArray[np.float32] | None = None,
        factor: Factor | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Choose codes.

        Args:
            weights: float32 [rows, columns], finite.
            codec: the storage type.
            importance: float32 [columns] weight of each column's squared error, or None for ones.
            factor: of the Hessian of the inputs, for methods that use it.

        Returns:
            uint8 [rows, bytes per row].

        Raises:
            FewbitsError: the method is not for types of blocks.
        """
        raise FewbitsError(f"The method {cls.name!r} does not make {codec.name}.", "Leave the choice to the target.")

    @classmethod
    def fit(cls, weights: npt.NDArray[np.float32], kind: Scaled, known: Known) -> Quantized:
        """Choose scales and codes of a matrix.

        Args:
            weights: float32 [rows, columns], finite.

        Raises:
            FewbitsError: the method is not for matrices of this type.
        """
        raise FewbitsError(f"The method {cls.name!r} does not make {kind.name}.", "Leave the choice to the target.")

    @classmethod
    def make(
        cls, weights: npt.NDArray[np.float32], kind: StorageType, known: Known, pool: Executor | None = None
    ) -> Coded:
        """Like `fit`, for types of other kinds than `Scaled`, too.

        Args:
            pool: to work on several parts of the matrix at once; the result is the same.
        """
        if isinstance(kind, Scaled):
            return cls.fit(weights, kind, known)
        if isinstance(kind, Blocks):

            def part(rows: slice) -> npt.NDArray[np.uint8]:
                return cls.quantize(weights[rows], kind.codec, known.importance, known.factor)

            there = known.factor is not None and known.factor.device != "cpu"
            return BlocksCoded(kind, by_rows(part, len(weights), pool, ROWS_THERE if there else ROWS))
        raise FewbitsError(f"The method {cls.name!r} does not make {kind.name}.", "Leave the choice to the target.")


def by_rows(
    part: Callable[[slice], npt.NDArray[np.uint8]], count: int, pool: Executor | None, step: int = ROWS
) -> npt.NDArray[np.uint8]:
    """What a function makes of `step` rows at a time, several such parts at once where there is a pool."""
    parts = (slice(start, start + step) for start in range(0, count, step))
    return np.concatenate(list((pool.map if pool else map)(part, parts)))


def method(name: str) -> type[Method]:
    """The method of this name.

    Raises:
        FewbitsError: unknown; the message lists the known ones.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise FewbitsError(f"Unknown method {name!r}.", f"Known: {', '.join(sorted(METHODS))}.") from None
