"""Additively coded weights as aqlm 1.1 stores them (AQLM, Egiazarian et al., arXiv 2401.06118).

Each group of 8 or 16 inputs of an output is a sum of codewords, one out of each codebook of the matrix, times the
output's scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fewbits.codecs.base import Floats
from fewbits.codecs.storage import Coded, StorageType
from fewbits.errors import FewbitsError
from fewbits.kernels.additive import add_words

if TYPE_CHECKING:
    import torch

MOST_BOOKS, MOST_BITS = 16, 16
GROUPS = (8, 16)
Codes = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Additive(StorageType):
    """Sums of codewords.

    Attributes:
        books: codebooks of a matrix.
        code_bits: of a code: a codebook has 2^code_bits codewords.
        group: inputs that a codeword stands for.
    """

    books: int
    code_bits: int
    group: int

    def __post_init__(self) -> None:
        if not (1 <= self.books <= MOST_BOOKS and 1 <= self.code_bits <= MOST_BITS and self.group >= 1):
            raise FewbitsError(
                f"There are no {self.books} codebooks of {self.code_bits} bits for groups of {self.group}.",
                f"Take 1 to {MOST_BOOKS} codebooks of 1 to {MOST_BITS} bits.",
            )

    @property
    def bits(self) -> float:  # type: ignore[override]
        return self.books * self.code_bits / self.group

    @property
    def words(self) -> int:
        """Codewords of a codebook."""
        return 1 << self.code_bits

    @property
    def name(self) -> str:
        return f"AQLM_{self.books}x{self.code_bits}g{self.group}"

    @classmethod
    def from_name(cls, name: str) -> Additive:
        """The type that plans name so.

        Raises:
            FewbitsError: none.
        """
        found = re.fullmatch(r"AQLM_(\d{1,2})x(\d{1,2})g(\d{1,3})", name)
        if not found:
            raise FewbitsError(f"Unknown additive type {name!r}.", "One is AQLM_2x8g8.")
        return cls(*map(int, found.groups()))


@dataclass(frozen=True)
class AdditiveCoded(Coded):
    """A matrix as codes, codebooks and scales.

    Attributes:
        codes: uint16 [out, in / group, codebooks].
        codebooks: float16, in files of others float32, [codebooks, codewords, group].
        scales: likewise, [out].
    """

    type: Additive
    codes: Codes
    codebooks: npt.NDArray[np.floating]
    scales: npt.NDArray[np.floating]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.codes.shape[0], self.codes.shape[1] * self.type.group

    def decode(self) -> Floats:
        out = np.empty(self.shape, np.float32)
        add_words(self.codes, self.codebooks.astype(np.float32), self.scales.astype(np.float32), out)
        return out

    def tensors(self) -> dict[str, torch.Tensor]:
        """What gradients can change: float32 `codebooks` and `scales`, shaped as they are here."""
        import torch  # takes a second

        return {
            "codebooks": torch.from_numpy(self.codebooks.astype(np.float32)),
            "scales": torch.from_numpy(self.scales.astype(np.float32)),
        }

    def decode_torch(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`decode` with other tensors in place of those of `tensors`, which gradients reach."""
        from fewbits.codecs.additive_torch import Decode

        weights: torch.Tensor = Decode.apply(tensors["codebooks"], tensors["scales"], self.codes)
        return weights

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> AdditiveCoded:
        """The same codes with other tensors, rounded to float16."""
        halves = {name: to_half(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()}
        return replace(self, codebooks=halves["codebooks"], scales=halves["scales"])


def to_half(values: Floats) -> npt.NDArray[np.float16]:
    """The nearest finite float16."""
    return np.clip(values, -65504, 65504).astype(np.float16)
