"""Groups of input channels with their own number of bits each, as EXL2 stores them (exllamav2 0.3.2).

A matrix is seen as [in, out]. Its rows, input channels, lie in order of how active they are, the most active first,
and are cut into groups of one number of bits each, the most bits first. A group has one scale of half precision, and
each output in it a 4-bit code c that says how much of that is its own: (c + 1)^2 / 256.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from fewbits.codecs.base import Floats
from fewbits.codecs.packing import transposed
from fewbits.codecs.storage import Coded, StorageType
from fewbits.errors import FewbitsError
from fewbits.kernels.row_groups import decode_rows

BITS = (8, 6, 5, 4, 3, 2)
"""In the order in which groups lie in a file."""
Part = tuple[int, int, float]
"""Bits, group size, share of the rows."""
_SPEC = re.compile(r"(?:EXL2_)?([0-9x._]+)_G(\d+(?:-\d+)*)", re.IGNORECASE)
_PART = re.compile(r"(\d)(?:x(\d?\.?\d*))?")
_HALF_MAX = 65520.0
"""From here on products round to infinity."""


def padded(outputs: int) -> int:
    """Outputs as they are stored: kernels take 32 at a time."""
    return -(-outputs // 32) * 32


@dataclass(frozen=True)
class RowGroups(StorageType):
    """Rows in groups of 2, 3, 4, 5, 6 or 8 bits.

    Attributes:
        parts: bits, rows in a group and share of all rows, in descending bits; shares add up to one.
    """

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        bits = [part[0] for part in self.parts]
        shares = [part[2] for part in self.parts]
        if not bits or any(b not in BITS for b in bits) or bits != sorted(bits, reverse=True):
            raise FewbitsError(f"Parts of {bits} bits.", "Take some of 8, 6, 5, 4, 3 and 2, in this order.")
        if any(size < 1 or size % (16 if b == 2 else 32) for b, size, _ in self.parts):
            raise FewbitsError(f"Groups of {[part[1] for part in self.parts]} rows.", "Take multiples of 32.")
        if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise FewbitsError(f"Shares of {shares}.", "Take positive ones that add up to 1.")

    @classmethod
    def uniform(cls, bits: int, size: int = 128) -> RowGroups:
        """The same bits everywhere."""
        return cls(((bits, size, 1.0),))

    @classmethod
    def parse(cls, text: str) -> RowGroups:
        """The type of a name, with or without `EXL2_`: `8x.05_4x.95_G128`, `8x.05_4x.95_G32-128`, `4_G128`.

        Raises:
            FewbitsError: it is none.
        """
        found = _SPEC.fullmatch(text)
        parts = [_PART.fullmatch(part) for part in found[1].split("_")] if found else []
        sizes = [int(size) for size in found[2].split("-")] if found else []
        sizes = sizes * len(parts) if len(sizes) == 1 else sizes
        try:
            if not parts or len(sizes) != len(parts):
                raise ValueError
            read = [(int(part[1]), float(part[2] or 1)) for part in parts if part]
            return cls(tuple((bits, size, share) for (bits, share), size in zip(read, sizes, strict=True)))
        except (ValueError, FewbitsError) as error:
            raise FewbitsError(
                f"{text!r} names no groups of rows.",
                error.message
                if isinstance(error, FewbitsError)
                else "Write e.g. 4_g128 or 8x.05_4x.95_g32-128: bits, shares of the rows, group sizes.",
            ) from None

    @classmethod
    def covering(cls, groups: list[tuple[int, int]]) -> RowGroups:
        """The type whose `groups` these are: bits and rows of each group, in descending bits.

        Raises:
            FewbitsError: no type has these, since bits rise or a size cannot be.
        """
        n_in = sum(rows for _, rows in groups)
        runs: list[list[int]] = []  # bits, group size, rows
        for bits, rows in groups:
            if runs and runs[-1][0] == bits and rows <= runs[-1][1] and runs[-1][2] % runs[-1][1] == 0:
                runs[-1][2] += rows
            else:
                runs.append([bits, rows, rows])
        for digits, less in product(range(1, 9), (0, 1)):
            # the shares that were asked for are unknown: the shortest ones with the same result, which is rounded up
            shares = [(rows - less) * 10**digits // n_in / 10**digits for _, _, rows in runs[:-1]]
            rest = round(1 - sum(shares), 9)
            if min([*shares, rest]) > 0:
                kind = cls(tuple((b, g, p) for (b, g, _), p in zip(runs, [*shares, rest], strict=True)))
                if kind.groups(n_in) == groups:
                    return kind
        raise FewbitsError("its groups of rows are of sizes that no converter makes.", "Fetch the file again.")

    @property
    def bits(self) -> float:  # type: ignore[override]
        return sum(bits * share for bits, _, share in self.parts)

    @property
    def name(self) -> str:
        if len(self.parts) == 1:
            shares = f"{self.parts[0][0]}"
        else:
            shares = "_".join(f"{bits}x{repr(share).removeprefix('0')}" for bits, _, share in self.parts)
        sizes = [size for _, size, _ in self.parts]
        return f"EXL2_{shares}_G{'-'.join(map(str, sizes if len(set(sizes)) > 1 else sizes[:1]))}"

    def groups(self, n_in: int) -> list[tuple[int, int]]:
        """Bits and rows of each group of a matrix with so many inputs, as exllamav2 0.3.2 cuts them
        (conversion/adaptivegptq.py): each part is rounded up to whole groups, the last group may be short."""
        cut: list[tuple[int, int]] = []
        left = n_in
        for index, (bits, size, share) in enumerate(self.parts):
            wanted = left if index == len(self.parts) - 1 else min(n_in * share, left)
            for _ in range(math.ceil(wanted / size)):
                cut.append((bits, min(size, left)))
                left -= cut[-1][1]
        return cut

    def narrowed(self, n_in: int) -> RowGroups:
        """This type for a matrix with few inputs: smaller groups where a share is much less than a group, so that
        rounding it up does not take a large part of the rows."""
        parts = []
        for index, (bits, size, share) in enumerate(self.parts):
            rows = n_in * share
            while index < len(self.parts) - 1 and size > 32 and size % 64 == 0 and -rows % size > max(rows / 4, 16):
                size //= 2
            parts.append((bits, size, share))
        return RowGroups(tuple(parts))

    def total_bits(self, shape: tuple[int, int]) -> int:
        """Bits of a matrix [out, in] as exllamav2 counts them: outputs without padding."""
        outputs, n_in = shape
        groups = self.groups(n_in)
        codes = sum(bits * rows for bits, rows in groups) * outputs
        return codes + len(groups) * (4 * outputs + 48) + 32 * n_in

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a matrix [out, in] in a file."""
        return self.total_bits((padded(shape[0]), shape[1])) // 8


@dataclass(frozen=True)
class GroupedRows(Coded):
    """A matrix in row groups.

    Attributes:
        type: its storage type.
        order: int64 [in], the input channel of each row.
        codes: uint8 [in, out], rows in this order.
        scale_codes: uint8 [groups, out], 0 to 15.
        scale_max: float16 [groups].
    """

    type: RowGroups
    order: npt.NDArray[np.int64]
    codes: npt.NDArray[np.uint8]
    scale_codes: npt.NDArray[np.uint8]
    scale_max: npt.NDArray[np.float16]

    def decode(self) -> Floats:
        groups = self.type.groups(self.codes.shape[0])
        return decode(groups, self.order, transposed(self.codes), scales_of(self.scale_codes, self.scale_max))


def scales_of(scale_codes: npt.NDArray[np.uint8], scale_max: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    """float16 [groups, out]: as the engine rounds them, once when it loads and once when it decodes."""
    unit = (scale_max.astype(np.float32) / 256).astype(np.float16)
    square = (scale_codes.astype(np.float32) + 1) ** 2
    return (square * unit[:, np.newaxis].astype(np.float32)).astype(np.float16)


def decode(
    groups: list[tuple[int, int]],
    order: npt.NDArray[np.integer],
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float16],
) -> Floats:
    """Decode in the engine's half precision.

    Args:
        groups: bits and rows of each.
        order: [in], a permutation: the input channel of each row.
        codes: uint8 [out, in], in this order.
        scales: float16 [groups, out].

    Returns:
        float32 [out, in], in the original order.

    Raises:
        FewbitsError: scales that are not finite, or so large that weights are not.
    """
    middles = np.array([1 << (bits - 1) for bits, _ in groups], np.float32)
    wide = scales.astype(np.float32)
    if not (np.isfinite(wide).all() and (np.abs(wide) * middles[:, np.newaxis] < _HALF_MAX).all()):
        raise FewbitsError("its scales stand for weights beyond half precision.", "Fetch the file again.")
    out = np.empty(codes.shape, np.float32)
    ends = np.cumsum([rows for _, rows in groups]).astype(np.int64)
    decode_rows(codes, np.ascontiguousarray(wide.T), middles, ends, order.astype(np.int64), out)
    return out
