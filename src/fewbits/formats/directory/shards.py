"""Safetensors shards of exactly known size, without any weight.

Layout: u64 header length, JSON header padded with spaces to 8 bytes, data (https://github.com/huggingface/safetensors).
The bytes are those that safetensors itself would write.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from fewbits.errors import FewbitsError

MAX_SHARD_SIZE = 5_000_000_000
"""Bytes of tensor data in a shard, unless asked otherwise: what hubs and download tools are used to."""
INDEX = "model.safetensors.index.json"
NUMPY_TYPES = {
    "U64": "<u8", "I64": "<i8", "F64": "<f8", "F32": "<f4", "U32": "<u4", "I32": "<i4", "BF16": "<u2", "F16": "<f2",
    "U16": "<u2", "I16": "<i2", "F8_E4M3": "u1", "F8_E5M2": "u1", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip
"""How each stored type comes in numpy, which has neither BF16 nor 8-bit floats. In the order in which safetensors puts
types into a file, so that every tensor is aligned to its items."""
RANKS = {dtype: rank for rank, dtype in enumerate(NUMPY_TYPES)}


@dataclass(frozen=True)
class Entry:
    """One tensor of a directory.

    Attributes:
        dtype: by safetensors' name, e.g. `BF16`.
        unit: neighbours with the same unit (the parts of one quantized module) are kept in one shard.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    unit: str = ""

    @property
    def nbytes(self) -> int:
        return np.dtype(NUMPY_TYPES[self.dtype]).itemsize * prod(self.shape)


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file: its header, whole, and its tensors in the order in which they lie there."""

    name: str
    entries: tuple[Entry, ...]

    @cached_property
    def header(self) -> bytes:
        fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in self.entries:
            stop = offset + entry.nbytes
            fields[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(entry.nbytes for entry in self.entries)

    def offsets(self) -> Iterator[tuple[Entry, int]]:
        """Every tensor and where its bytes start in the file."""
        offset = len(self.header)
        for entry in self.entries:
            yield entry, offset
            offset += entry.nbytes


def lay_out(entries: Iterable[Entry], max_shard_size: int = MAX_SHARD_SIZE) -> list[ShardFile]:
    """The exact files that these tensors make, without any weight.

    Args:
        entries: in the order in which they are dealt to the shards.
        max_shard_size: most bytes of tensor data in a shard; a unit or a single tensor that is larger gets its own.

    Raises:
        FewbitsError: a name that stands there twice or that safetensors reserves, a type that it has not.
    """
    groups: list[list[Entry]] = [[]]
    seen: set[str] = set()
    filled = 0
    for unit in _units(entries):
        for entry in unit:
            if entry.dtype not in NUMPY_TYPES:
                raise FewbitsError(f"Tensor {entry.name!r} cannot be written as {entry.dtype!r}.")
            if entry.name in seen or entry.name == "__metadata__":
                raise FewbitsError(f"There cannot be a tensor {entry.name!r}{' twice' if entry.name in seen else ''}.")
            if any(n < 0 for n in entry.shape):
                raise FewbitsError(f"Tensor {entry.name!r} has the impossible shape {list(entry.shape)}.")
            seen.add(entry.name)
        size = sum(entry.nbytes for entry in unit)
        if groups[-1] and filled + size > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1] += unit
        filled += size
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    names = ["model.safetensors"] if len(groups) == 1 else names
    return [
        ShardFile(name, tuple(sorted(group, key=lambda entry: (RANKS[entry.dtype], entry.name.encode()))))
        for name, group in zip(names, groups, strict=True)
    ]


def _units(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    unit: list[Entry] = []
    for entry in entries:
        if unit and not (entry.unit and entry.unit == unit[-1].unit):
            yield unit
            unit = []
        unit.append(entry)
    if unit:
        yield unit


def index_json(shards: Sequence[ShardFile]) -> bytes | None:
    """Contents of `model.safetensors.index.json`; None for a single file, which needs none."""
    if len(shards) == 1:
        return None
    weight_map = {entry.name: shard.name for shard in shards for entry in shard.entries}
    total = sum(entry.nbytes for shard in shards for entry in shard.entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2).encode() + b"\n"
