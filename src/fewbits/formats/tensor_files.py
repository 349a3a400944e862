"""Files of known headers whose tensors are written in any order, by any thread, and which an interrupted run goes on
with."""

from __future__ import annotations

import hashlib
import threading
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt

from fewbits.errors import FewbitsError
from fewbits.formats.atomic import DiskError, check_room, explained
from fewbits.formats.journal import Pace, checksum, sync
from fewbits.formats.work import CHECKSUM, WorkFolder

RESULT = "result"
"""Within the work folder: the files, until they get their final names."""
TENSOR = "tensor"
"""Key of the journal's entries: the tensor that is done."""


@dataclass(frozen=True)
class File:
    """A file to be made: name, header, and size of it all. What no tensor covers are zeros."""

    name: str
    header: bytes
    nbytes: int


@dataclass(frozen=True)
class Span:
    """Where a tensor's bytes lie."""

    file: str
    start: int
    nbytes: int


class TensorFiles:
    """A context manager for files in `<work folder>/result`.

    A tensor that is written counts as done, for this process and those that go on after an interruption, by its
    checksum in the journal. It gets there some time later, when it is safely on the disk.

    Args:
        spans: by name, what is written in one piece: a tensor, or a part of one.
        more: bytes of what will be written beside the files.

    Raises:
        FewbitsError: no room, or what an earlier run has begun has other files; at `finish`: a tensor was not put.
    """

    def __init__(self, work: WorkFolder, files: Sequence[File], spans: Mapping[str, Span], more: int = 0) -> None:
        self.work = work
        self.output = work.output
        self.folder = work.path / RESULT
        self._files = {file.name: file for file in files}
        self._spans = spans
        self._more = more
        self._mutex = threading.Lock()
        self._recording = threading.Lock()
        self._pace = Pace()
        self._claimed: set[str] = set()
        self._written: dict[str, int] = {}
        self._pending: list[str] = []

    def __enter__(self) -> TensorFiles:
        layout = hashlib.sha256()
        for file in self._files.values():
            layout.update(f"{file.name} {file.nbytes} ".encode() + file.header)
        self.work.check("layout of files", layout.hexdigest())
        self._take_over()
        done = sum(self._spans[name].nbytes for name in self._written)
        check_room(self.output, sum(file.nbytes for file in self._files.values()) + self._more - done)
        with explained(self.output):
            self.folder.mkdir(exist_ok=True)
            for file in self._files.values():
                (self.folder / file.name).touch()
                self._write(file.name, 0, memoryview(file.header))
            sync(self.folder)
            sync(self.work.path)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and (isinstance(error, DiskError) or not isinstance(error, FewbitsError)):
            with suppress(FewbitsError):
                self.flush()

    def has(self, name: str) -> bool:
        """Whether a tensor is written, now or by the run that is gone on from."""
        self.span(name)
        return name in self._written

    def span(self, name: str) -> Span:
        try:
            return self._spans[name]
        except KeyError:
            raise FewbitsError(f"{self.output}: no tensor {name!r} was laid out.") from None

    def put(self, name: str, pieces: Iterable[memoryview]) -> None:
        """Write a tensor's bytes, in order.

        Raises:
            FewbitsError: unknown or already written, another size, disk full.
        """
        span = self.span(name)
        with self._mutex:
            if name in self._claimed:
                raise FewbitsError(f"{self.output}: tensor {name!r} is written twice.")
            self._claimed.add(name)
        written, crc = 0, 0
        try:
            for piece in pieces:
                # checked before writing: never into the next tensor
                if written + piece.nbytes <= span.nbytes:
                    with explained(self.output):
                        self._write(span.file, span.start + written, piece)
                crc = zlib.crc32(piece, crc)
                written += piece.nbytes
            if written != span.nbytes:
                raise FewbitsError(f"{self.output}: tensor {name!r} came out as {written} bytes, not {span.nbytes}.")
        except BaseException:
            with self._mutex:
                self._claimed.discard(name)
            raise
        with self._mutex:
            self._written[name] = crc
            self._pending.append(name)
        if self._pace.due():
            self.flush()

    def stored(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor that is written."""
        if not self.has(name):
            raise FewbitsError(f"{self.output}: tensor {name!r} is read before it is written.")
        span = self._spans[name]
        return np.fromfile(self.folder / span.file, np.uint8, span.nbytes, offset=span.start)

    def flush(self) -> None:
        """Record what is written, once it is safely on the disk."""
        with self._recording, explained(self.output):
            started = time.monotonic()
            with self._mutex:
                names = list(self._pending)
            if not names:
                return
            for file in {self._spans[name].file for name in names}:
                sync(self.folder / file)
            self.work.journal.append(*({TENSOR: name, CHECKSUM: self._written[name]} for name in names))
            with self._mutex:
                del self._pending[: len(names)]
            self._pace.took(started)

    def finish(self) -> None:
        """Make the files what they are to be, and safe.

        Raises:
            FewbitsError: a tensor is missing.
        """
        missing = [name for name in self._spans if name not in self._written]
        if missing:
            raise FewbitsError(f"{self.output}: {len(missing)} tensors were not written, {missing[0]!r} among them.")
        with explained(self.output):
            for file in self._files.values():
                with open(self.folder / file.name, "r+b") as stream:
                    stream.truncate(file.nbytes)
        self.flush()
        with explained(self.output):
            for name in self._files:
                sync(self.folder / name)
            sync(self.folder)

    def _take_over(self) -> None:
        """Believe the journal where the bytes are as it says."""
        known = {entry[TENSOR]: entry[CHECKSUM] for entry in self.work.journal.entries if TENSOR in entry}
        with explained(self.output):
            for name, crc in known.items():
                span = self._spans.get(name)
                if span and checksum(self.folder / span.file, span.start, span.nbytes) == crc:
                    self._written[name] = crc
        self._claimed = set(self._written)

    def _write(self, file: str, start: int, data: memoryview) -> None:
        # a stream of its own for every write: positions are not shared between threads
        with open(self.folder / file, "r+b") as stream:
            stream.seek(start)
            stream.write(data)
