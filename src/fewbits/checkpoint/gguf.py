"""GGUF files (one file or a split set), parsed with every length checked before it is believed.

Layout: the GGUF specification in ggml's docs/gguf.md, version 3 (and 2); ../specs of the project name the block sizes.
The official reader maps the whole file and trusts its lengths, so the header is parsed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from fewbits.checkpoint.base import Checkpoint, TensorInfo, check_layout, check_name, check_regular, element_count
from fewbits.checkpoint.urls import SPLIT_NAME
from fewbits.codecs import CODECS
from fewbits.errors import FewbitsError

MAGIC = b"GGUF"
DAMAGED = "It is truncated or damaged: fetch it again."
SCALARS: dict[int, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("u1"),
    GGUFValueType.INT8: np.dtype("i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}
"""GGUF's fixed-width value types. Values stay numpy scalars and arrays so that they are written back as they were."""
GGML_TYPES = {kind.name: kind.value for kind in GGMLQuantizationType} | {"Q1_0": 41, "Q2_0": 42}
"""Type numbers of ggml.h; the gguf package may not know the newest."""
PLAIN_BYTES = {"I8": 1, "I16": 2, "I32": 4, "I64": 8, "F64": 8}
_TYPE_NAMES = {number: name for name, number in GGML_TYPES.items()}


class GGUFCheckpoint(Checkpoint):
    """A GGUF model: its metadata and tensors, all shards of a split set together.

    Attributes:
        metadata: key -> value; numbers are numpy scalars, arrays numpy arrays or lists of strings.

    Raises:
        FewbitsError: not GGUF, an unknown version or type, lengths that do not fit the file, overlapping tensors,
            a missing shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        files = self._shards(path)
        for number, file in enumerate(files):
            metadata, tensors = _Header(file).parse()
            if number == 0:
                self.metadata = metadata
                declared = int(metadata.get("split.count", len(files)))
                if declared > 1 and declared != len(files):
                    raise FewbitsError(
                        f"{file}: it is one of {declared} shards.", "Name the first shard, all beside it."
                    )
            for info in tensors:
                if info.name in self.tensors:
                    raise FewbitsError(f"{file}: tensor {info.name!r} stands there twice.", DAMAGED)
                self.tensors[info.name] = info

    @staticmethod
    def _shards(path: Path) -> list[Path]:
        match = SPLIT_NAME.match(path.name)
        if not match:
            return [path]
        count = int(match["count"])
        files = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
        for file in files:
            if not file.is_file():
                raise FewbitsError(f"{file} is missing: {path.name} is one of {count} shards.", "Fetch all of them.")
        return files

    def _read_range(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        return self.decode(name, start, stop)


class _Header:
    """Parses one file's header. No allocation is larger than what the file still holds."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.size = check_regular(file)

    def parse(self) -> tuple[dict[str, Any], list[TensorInfo]]:
        with open(self.file, "rb") as self.stream:
            if self.stream.read(4) != MAGIC:
                raise FewbitsError(f"{self.file}: not a GGUF file.")
            version = self._number("<u4")
            if version not in (2, 3):
                raise FewbitsError(f"{self.file}: GGUF version {version} is not known (2 and 3 are).", DAMAGED)
            n_tensors, n_values = self._number("<u8"), self._number("<u8")
            # the smallest tensor entry takes 32 bytes, the smallest value 13
            self._bound(n_tensors * 32 + n_values * 13, "the counts in the header")
            metadata: dict[str, Any] = {}
            for _ in range(n_values):
                key = check_name(self.file, self._string("a key"))
                if key in metadata:
                    raise FewbitsError(f"{self.file}: the key {key!r} stands there twice.", DAMAGED)
                metadata[key] = self._value(self._number("<u4"), key)
            entries = [self._tensor() for _ in range(n_tensors)]
            alignment = int(metadata.get("general.alignment", 32))
            if alignment < 1 or alignment & (alignment - 1) or alignment > 2**20:
                raise FewbitsError(f"{self.file}: general.alignment is {alignment}.", DAMAGED)
            start = -(-self.stream.tell() // alignment) * alignment
        infos = [TensorInfo(n, shape, kind, size, self.file, start + at) for n, shape, kind, size, at in entries]
        if len({info.name for info in infos}) != len(infos):
            raise FewbitsError(f"{self.file}: the header names a tensor twice.", DAMAGED)
        for info in infos:
            if (info.offset - start) % alignment:
                raise FewbitsError(f"{self.file}: tensor {info.name!r} is not aligned to {alignment} bytes.", DAMAGED)
        check_layout(self.file, self.size, infos)
        return metadata, infos

    def _bound(self, nbytes: int, what: str) -> None:
        if nbytes > self.size - self.stream.tell():
            raise FewbitsError(f"{self.file}: {what} needs {nbytes} bytes, the file has {self.size}.", DAMAGED)

    def _take(self, nbytes: int, what: str) -> bytes:
        self._bound(nbytes, what)
        return self.stream.read(nbytes)

    def _number(self, dtype: str) -> int:
        kind = np.dtype(dtype)
        return int(np.frombuffer(self._take(kind.itemsize, "the header"), kind)[0])

    def _string(self, what: str) -> str:
        data = self._take(self._number("<u8"), what)
        # vocabularies hold broken UTF-8 in the wild: keep it byte for byte
        return data.decode("utf-8", "surrogateescape")

    def _value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            data = self._take(SCALARS[kind].itemsize, f"the value of {key!r}")
            value = np.frombuffer(data, SCALARS[kind])[0]
            return bool(value) if kind == GGUFValueType.BOOL else value
        if kind == GGUFValueType.STRING:
            return self._string(f"the value of {key!r}")
        if kind != GGUFValueType.ARRAY:
            raise FewbitsError(f"{self.file}: the value of {key!r} has the unknown type {kind}.", DAMAGED)
        item, count = self._number("<u4"), self._number("<u8")
        if item in SCALARS:
            data = self._take(count * SCALARS[item].itemsize, f"the array {key!r}")
            return np.frombuffer(data, SCALARS[item])
        if item != GGUFValueType.STRING:
            raise FewbitsError(f"{self.file}: the array {key!r} has items of the unknown type {item}.", DAMAGED)
        self._bound(count * 8, f"the array {key!r}")
        return [self._string(f"the array {key!r}") for _ in range(count)]

    def _tensor(self) -> tuple[str, tuple[int, ...], str, int, int]:
        name = check_name(self.file, self._string("a tensor name"))
        dimensions = self._number("<u4")
        if dimensions > 8:
            raise FewbitsError(f"{self.file}: tensor {name!r} has {dimensions} dimensions.", DAMAGED)
        shape = tuple(self._number("<u8") for _ in range(dimensions))[::-1]
        kind, offset = self._number("<u4"), self._number("<u8")
        count = element_count(self.file, name, shape)
        if kind not in _TYPE_NAMES:
            raise FewbitsError(f"{self.file}: tensor {name!r} has the unknown type {kind}.")
        dtype = _TYPE_NAMES[kind]
        if dtype in CODECS:
            if shape and not CODECS[dtype].fits(shape[-1]):
                raise FewbitsError(
                    f"{self.file}: tensor {name!r} is {dtype} with rows of {shape[-1]}, no multiple of "
                    f"{CODECS[dtype].block}.",
                    DAMAGED,
                )
            nbytes = count // CODECS[dtype].block * CODECS[dtype].block_bytes
        else:
            nbytes = count * PLAIN_BYTES.get(dtype, 0)
            if dtype not in PLAIN_BYTES:
                raise FewbitsError(f"{self.file}: tensor {name!r} is {dtype}, which cannot be read.")
        return name, shape, dtype, nbytes, offset
