"""What layouts have in common: stored scales and back, groups along a row, and checks of what a file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fewbits.codecs.base import Floats
from fewbits.codecs.floats import BF16
from fewbits.codecs.scaled import Quantized, Scaled
from fewbits.errors import FewbitsError
from fewbits.layouts.base import Part

GROUPS = (128, 64, 32)
"""What engines take, largest (and smallest file) first."""
FLOAT_TYPES = ("F32", "F16", "BF16")
DAMAGED = "The file is damaged or made for another configuration: fetch it again."


def to_stored(values: Floats, dtype: str) -> npt.NDArray[Any]:
    """float32 -> `F32`, `F16` or `BF16` (as uint16), rounded to nearest."""
    if dtype == "BF16":
        return BF16.encode(np.ascontiguousarray(values)).view(np.uint16)
    return np.ascontiguousarray(values, {"F32": np.float32, "F16": np.float16}[dtype])


def from_stored(array: npt.NDArray[Any], suffix: str) -> Floats:
    """float32 of float32, float16, or bfloat16 in uint16.

    Raises:
        FewbitsError: a value is not finite.
    """
    values = BF16.decode(np.atleast_1d(array).view(np.uint8)) if array.dtype == np.uint16 else array.astype(np.float32)
    if not np.isfinite(values).all():
        raise FewbitsError(f"{suffix} holds values that are not finite.", DAMAGED)
    return values


def compare(parts: Mapping[str, Part], expected: Mapping[str, Part]) -> None:
    """Refuse stored tensors that are not those expected; floats may be stored in any precision.

    Raises:
        FewbitsError: names the part that is missing or does not fit.
    """
    for suffix, part in expected.items():
        found = parts.get(suffix)
        if found is None:
            raise FewbitsError(f"{suffix} is missing.", DAMAGED)
        kinds = FLOAT_TYPES if part.dtype in FLOAT_TYPES else (part.dtype,)
        if found.shape != part.shape or found.dtype not in kinds:
            raise FewbitsError(
                f"{suffix} is {found.dtype} {list(found.shape)}, where {part.dtype} {list(part.shape)} belongs.",
                DAMAGED,
            )


def get(parts: Mapping[str, Part], suffix: str, axes: int = 2) -> Part:
    """A part by which the others are judged.

    Raises:
        FewbitsError: it is missing or has another number of axes.
    """
    part = parts.get(suffix)
    if part is None:
        raise FewbitsError(f"{suffix} is missing.", DAMAGED)
    if len(part.shape) != axes:
        raise FewbitsError(f"{suffix} has shape {list(part.shape)}, not {axes} axes.", DAMAGED)
    return part


def nearest_group(columns: int) -> int:
    """The largest group that engines take and that divides a row; 0 if only the whole row does."""
    return next((group for group in GROUPS if columns % group == 0), 0)


def decode_groups(matrix: Quantized, g_idx: npt.NDArray[np.integer] | None) -> Floats:
    """Decode a matrix whose columns name their groups.

    Args:
        matrix: with one group after the other in `scales` and `zeros`.
        g_idx: [columns], the group of each column; None where groups are neighbours.

    Returns:
        float32 [rows, columns].

    Raises:
        FewbitsError: an index out of range, or groups of unequal size.
    """
    columns, groups = matrix.codes.shape[1], matrix.scales.shape[1]
    neighbours = np.arange(columns) // (matrix.type.block[1] or columns)
    if g_idx is None or np.array_equal(g_idx, neighbours):
        return matrix.decode()
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise FewbitsError(f"g_idx names group {int(g_idx.max())} or a negative one of {groups}.", DAMAGED)
    order = np.argsort(g_idx, kind="stable")
    if not np.array_equal(g_idx[order], neighbours):
        raise FewbitsError("g_idx gives groups of unequal size.", DAMAGED)
    out = np.empty(matrix.codes.shape, np.float32)
    out[:, order] = replace(matrix, codes=np.ascontiguousarray(matrix.codes[:, order])).decode()
    return out


def row_block(group: int) -> tuple[int, int]:
    """Block of a storage type for groups along a row; -1 as in configurations: the whole row."""
    return (1, 0 if group == -1 else group)


def setting(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of a configuration that anybody may have written.

    Raises:
        FewbitsError: it is missing and has no default, or is something else.
    """
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise FewbitsError(f"quantization_config: {key!r} is {value!r}, not a whole number.", "Mend config.json.")
    return value


def integers(bits: int, group: int, symmetric: bool, scale: str) -> Scaled:
    """The storage type of integers in groups along a row; `group` as in configurations."""
    return Scaled("INT", bits, row_block(group), "middle" if symmetric else "integer", scale)  # type: ignore[arg-type]
