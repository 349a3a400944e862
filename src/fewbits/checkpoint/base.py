"""A checkpoint: named tensors in files, read lazily and by rows."""

from __future__ import annotations

import hashlib
import socket
import stat
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fewbits.checkpoint.urls import fetch_url
from fewbits.codecs import CODECS
from fewbits.errors import FewbitsError

Rows = slice | npt.NDArray[np.integer] | None


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies, as the file's header says (checked against the file's size).

    Attributes:
        shape: row-major as in torch, last axis contiguous.
        dtype: storage type by its codec name (`BF16`, `Q4_K`), a type without codec (`F8_E4M3`, `I64`), or that of a
            quantized module in several stored tensors (`INT4_G128`).
        nbytes: of all stored tensors that it is made of.
        offset: bytes from the start of `file`; of several stored tensors, where the largest lies.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path
    offset: int


class Checkpoint(ABC):
    """Lazy access to the tensors of one model on disk. Headers are read and checked at opening, data only by `read`."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    url: str | None = None
    """Where the files at `path` were fetched from, if they were."""

    @abstractmethod
    def __init__(self, path: Path) -> None: ...

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is a path or a URL: it is opened anew where it arrives."""
        return _opened_elsewhere, (type(self), self.url or self.path.absolute(), self.headers)

    @cached_property
    def headers(self) -> str:
        """Digest of where each tensor lies, which another model does not share."""
        infos = sorted(self.tensors.values(), key=lambda info: info.name)
        told = (f"{i.name} {i.shape} {i.dtype} {i.nbytes} {i.file.name} {i.offset}" for i in infos)
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    def info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise FewbitsError(f"{self.path}: there is no tensor {name!r}.") from None

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """Stored bytes start:stop of a tensor."""
        return stored_bytes(self.info(name), start, stop)

    def read(self, name: str, rows: Rows = None) -> npt.NDArray[np.float32]:
        """Decoded values as float32.

        Args:
            rows: which indices of the first axis, as a slice with step 1 or an integer array; None means all.

        Returns:
            float32 array; its first axis holds the rows asked for, the others are the tensor's.
        """
        shape = self.info(name).shape
        if rows is None or not shape:
            return self._read_range(name, 0, shape[0] if shape else 1).reshape(shape)
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(shape[0])
            return self._read_range(name, start, stop)
        if not rows.size:
            return np.empty((0, *shape[1:]), np.float32)
        first = int(rows.min())
        return self._read_range(name, first, int(rows.max()) + 1)[rows - first]

    @abstractmethod
    def _read_range(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start:stop of the first axis as float32 [stop - start, *shape[1:]]."""

    def lines(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Lines start:stop of a tensor seen as [prod(shape[:-1]), columns], decoded by its codec."""
        info = self.info(name)
        if info.dtype not in CODECS:
            raise FewbitsError(f"{info.file}: tensor {info.name!r} is stored as {info.dtype}, which holds no weights.")
        columns = info.shape[-1] if info.shape else 1
        if not columns or stop <= start:
            return np.empty((max(0, stop - start), columns), np.float32)
        line_bytes = CODECS[info.dtype].nbytes((columns,))
        data = self.raw(name, start * line_bytes, stop * line_bytes)
        return CODECS[info.dtype].decode(data.reshape(stop - start, line_bytes))

    def decode(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Indices start:stop of the first axis of a tensor whose storage type has a codec."""
        shape = self.info(name).shape
        if len(shape) < 2:  # a single line: decode it whole, then cut
            return self.lines(name, 0, 1).reshape(-1)[start:stop]
        per_row = prod(shape[1:-1])
        return self.lines(name, start * per_row, stop * per_row).reshape(stop - start, *shape[1:])


def _opened_elsewhere(kind: type[Checkpoint], source: str | Path, headers: str) -> Checkpoint:
    """What was pickled in another process, maybe on another machine.

    Raises:
        FewbitsError: there is no such path here, or another model under it.
    """
    path = source if isinstance(source, Path) else fetch_url(source)
    if not path.exists():
        raise FewbitsError(
            f"{path}: the worker on {socket.gethostname()} sees no such path.",
            "Put the model on storage that all machines mount at the same place, or name it by a URL.",
        )
    found = kind(path)
    if found.headers != headers:
        raise FewbitsError(
            f"{path}: the worker on {socket.gethostname()} sees another model there.", "Give all machines the same."
        )
    return found


def stored_bytes(info: TensorInfo, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
    """Bytes start:stop of a tensor, read from its file.

    Raises:
        FewbitsError: the file has become shorter.
    """
    stop = info.nbytes if stop is None else min(stop, info.nbytes)
    # pread rather than mmap: mapped pages would count as resident memory until the kernel drops them
    with open(info.file, "rb") as file:
        file.seek(info.offset + start)
        data = np.fromfile(file, np.uint8, stop - start)
    if data.size != stop - start:
        raise FewbitsError(f"{info.file}: tensor {info.name!r} ends early.", "Fetch the file again.")
    return data


def check_layout(file: Path, size: int, tensors: list[TensorInfo]) -> None:
    """Refuse tensors that reach past the end of the file or lie on one another.

    Raises:
        FewbitsError: names the file and the tensors.
    """
    previous: TensorInfo | None = None
    for info in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if info.offset + info.nbytes > size:
            raise FewbitsError(
                f"{file}: tensor {info.name!r} should end at byte {info.offset + info.nbytes} of {size}.",
                "It is truncated or damaged: fetch it again.",
            )
        if previous is not None and info.offset < previous.offset + previous.nbytes:
            raise FewbitsError(
                f"{file}: tensors {previous.name!r} and {info.name!r} overlap.", "The file is damaged: fetch it again."
            )
        if info.nbytes:
            previous = info


def check_regular(file: Path) -> int:
    """Size of a file in bytes, refused where it cannot be read or is none: to open a pipe would wait for ever.

    Raises:
        FewbitsError: missing, not readable, a pipe, a device or a folder.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise FewbitsError(f"{file}: not a file.", "Name a model file, or a directory with model files.")
        with open(file, "rb"):
            return file.stat().st_size
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FewbitsError(f"{file}: cannot be read ({reason}).", "Check the name and its permissions.") from None


def check_name(file: Path, name: str) -> str:
    """The name, refused where it cannot be shown: no model has such, and it would upset terminals and JSON alike."""
    if not name.isprintable():
        raise FewbitsError(f"{file}: {name!r} is no name.", "It is damaged: fetch it again.")
    return name


def element_count(file: Path, name: str, shape: tuple[int, ...]) -> int:
    """Product of the dimensions, refused where a header lies (negative or absurd, also beside a zero)."""
    wrong = any(type(n) is not int or n < 0 for n in shape) or len(shape) > 8
    if wrong or prod(n for n in shape if n) >= 2**48:
        raise FewbitsError(f"{file}: tensor {name!r} has the impossible shape {list(shape)}.", "Fetch the file again.")
    return prod(shape)
