"""GGUF version 3 on disk: header, alignment, split sets; sizes known before a weight is read.

Layout: ggml's docs/gguf.md. A file is magic, version, counts, key/values, tensor entries, padding, tensor data; each
tensor starts at a multiple of the alignment, and the last one is padded too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from fewbits.checkpoint.gguf import GGML_TYPES, SCALARS
from fewbits.errors import FewbitsError
from fewbits.formats.atomic import AtomicFile, check_output
from fewbits.formats.tensor_files import Span

ALIGNMENT = 32
VERSION = 3
TYPE_OF_DTYPE = {dtype: GGUFValueType(kind) for kind, dtype in SCALARS.items()}


@dataclass(frozen=True)
class TensorEntry:
    """What the header says of one tensor: row-major shape, GGML type by name, exact bytes."""

    name: str
    shape: tuple[int, ...]
    codec: str
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One file of the result: its header, whole, and the tensors it holds in order."""

    path: Path
    header: bytes
    tensors: tuple[TensorEntry, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(padded(entry.nbytes) for entry in self.tensors)


def padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def lay_out(path: Path, metadata: Mapping[str, Any], tensors: Sequence[TensorEntry], split: int | None) -> list[Shard]:
    """The exact files that these tensors make, without any weight.

    Args:
        path: final name; shards of a split set are named `<stem>-00001-of-00003.gguf` after it.
        metadata: bool -> BOOL, int -> UINT32, float -> FLOAT32, str -> STRING, list[str] -> array of strings, numpy
            scalars and arrays as their dtype says.
        split: most bytes of tensor data in a shard (a larger single tensor gets a shard of its own), None for one file.

    Raises:
        FewbitsError: a value that GGUF cannot hold.
    """
    groups = _groups(tensors, split)
    if len(groups) == 1:
        return [Shard(path, _header(metadata, groups[0]), tuple(groups[0]))]
    shards = []
    for number, group in enumerate(groups):
        keys = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(len(groups)),
            "split.tensors.count": np.int32(len(tensors)),
        }
        name = f"{path.stem}-{number + 1:05}-of-{len(groups):05}.gguf"
        header = _header({**metadata, **keys} if number == 0 else keys, group)
        shards.append(Shard(path.with_name(name), header, tuple(group)))
    return shards


def _groups(tensors: Sequence[TensorEntry], split: int | None) -> list[list[TensorEntry]]:
    groups: list[list[TensorEntry]] = [[]]
    for entry in tensors:
        full = split is not None and sum(padded(e.nbytes) for e in groups[-1]) + padded(entry.nbytes) > split
        if groups[-1] and full:
            groups.append([])
        groups[-1].append(entry)
    return groups


def spans_of(shards: Sequence[Shard], parts: Mapping[str, int] | None = None) -> dict[str, Span]:
    """Where the tensors lie.

    Args:
        parts: of how many parts of one size a tensor is put together; they are named `TENSOR.0` and so on.
    """
    found = {}
    for shard in shards:
        start = len(shard.header)
        for entry in shard.tensors:
            count = (parts or {}).get(entry.name)
            if count is None:
                found[entry.name] = Span(shard.path.name, start, entry.nbytes)
            else:
                size = entry.nbytes // count
                found |= {f"{entry.name}.{n}": Span(shard.path.name, start + n * size, size) for n in range(count)}
            start += padded(entry.nbytes)
    return found


def write_shards(shards: Sequence[Shard], data: Iterator[Iterable[bytes | memoryview]], overwrite: bool) -> None:
    """Write small files, each under its final name only when whole.

    Args:
        data: for each tensor, in the order of the shards, its bytes in pieces.

    Raises:
        FewbitsError: an output exists, the disk is full, or the pieces do not add up to what the header says.
    """
    for shard in shards:
        check_output(shard.path, overwrite)
    for shard in shards:
        with AtomicFile(shard.path, overwrite) as file:
            file.write(shard.header)
            for entry in shard.tensors:
                written = 0
                for piece in next(data):
                    file.write(piece)
                    written += len(piece)
                if written != entry.nbytes:
                    raise FewbitsError(
                        f"{shard.path}: tensor {entry.name!r} came out as {written} bytes, not {entry.nbytes}."
                    )
                file.write(bytes(padded(written) - written))


def _header(metadata: Mapping[str, Any], tensors: Sequence[TensorEntry]) -> bytes:
    parts = [b"GGUF", _u32(VERSION), _u64(len(tensors)), _u64(len(metadata))]
    for key, value in metadata.items():
        kind, packed = _value(key, value)
        parts += [_string(key), _u32(kind), packed]
    offset = 0
    for entry in tensors:
        dims = b"".join(_u64(n) for n in reversed(entry.shape))
        kind = GGML_TYPES[entry.codec]
        parts += [_string(entry.name), _u32(len(entry.shape)), dims, _u32(kind), _u64(offset)]
        offset += padded(entry.nbytes)
    header = b"".join(parts)
    return header + bytes(padded(len(header)) - len(header))


def _value(key: str, value: Any) -> tuple[int, bytes]:
    if isinstance(value, str):
        return GGUFValueType.STRING, _string(value)
    if isinstance(value, bool | np.bool_):
        return GGUFValueType.BOOL, bytes([bool(value)])
    if isinstance(value, int) and not isinstance(value, np.generic):
        if not 0 <= value < 2**32:
            raise FewbitsError(f"The value {value} of {key!r} does not fit 32 unsigned bits.")
        return GGUFValueType.UINT32, _u32(value)
    if isinstance(value, float) and not isinstance(value, np.generic):
        value = np.float32(value)
    if isinstance(value, np.generic) and value.dtype in TYPE_OF_DTYPE:
        return TYPE_OF_DTYPE[value.dtype], value.tobytes()
    if isinstance(value, np.ndarray) and value.dtype in TYPE_OF_DTYPE and value.ndim == 1:
        items = _u32(TYPE_OF_DTYPE[value.dtype]) + _u64(value.size) + value.tobytes()
        return GGUFValueType.ARRAY, items
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        items = _u32(GGUFValueType.STRING) + _u64(len(value)) + b"".join(_string(item) for item in value)
        return GGUFValueType.ARRAY, items
    raise FewbitsError(f"GGUF metadata cannot hold {key!r} of type {type(value).__name__}.")


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return _u64(len(data)) + data


def _u32(value: int) -> bytes:
    return int(value).to_bytes(4, "little")


def _u64(value: int) -> bytes:
    return int(value).to_bytes(8, "little")
