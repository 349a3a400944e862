"""What is done of a long job, as lines of a file: each is safe on the disk before the next step relies on it."""

from __future__ import annotations

import json
import os
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAFE_EVERY = 0.5
"""Seconds of work between two times that it is made safe: what an interruption costs at least ..."""
SAFE_SHARE = 0.05
"""... and where that takes long, the next time waits until it takes no more than this share."""
CHUNK = 1 << 24
JOURNAL, PUBLISHED = "journal", "publish"
"""The journal of a run in its work folder, and the key of its last entry, when only renaming is left to be done."""

Entry = dict[str, Any]


class Journal:
    """An append-only file of JSON objects, one a line, each behind the CRC-32 of its text. Any thread may append.

    A process may be killed within a line, and a disk may return something else than was written: what follows the
    first line that is not as it was written is dropped.

    Attributes:
        entries: the objects, in the order in which they were appended.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there; the file is not changed before something is appended."""
        self.path = path
        self._lock = threading.Lock()
        try:
            self.entries, self._size = parsed(path.read_bytes())
        except FileNotFoundError:
            self.entries, self._size = [], 0

    def append(self, *entries: Mapping[str, Any]) -> None:
        """Add lines and wait until they are on the disk.

        Raises:
            OSError: they may be there or not; what was there before is.
        """
        data = b"".join(_line(entry) for entry in entries)
        with self._lock:
            fresh = not self.path.exists()
            with open(self.path, "ab") as file:
                file.truncate(self._size)  # what was not understood, and what an append that failed has left
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if fresh:
                sync(self.path.parent)
            self._size += len(data)
            self.entries += parsed(data)[0]


def parsed(data: bytes) -> tuple[list[Entry], int]:
    """The objects of a journal, and how many of its bytes hold them."""
    entries: list[Entry] = []
    size = 0
    while (end := data.find(b"\n", size)) >= 0:
        mark, _, text = data[size:end].partition(b" ")
        if mark != _mark(text):
            break
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
        size = end + 1
    return entries, size


def _line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(entry).encode()
    return _mark(text) + b" " + text + b"\n"


def _mark(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


@dataclass
class Pace:
    """Tells when it is time to make work safe."""

    _last: float = field(default_factory=time.monotonic)
    _wait: float = 0.0

    def due(self) -> bool:
        return time.monotonic() - self._last >= max(SAFE_EVERY, self._wait)

    def took(self, started: float) -> None:
        """Work has been made safe, beginning at this time of `time.monotonic`."""
        self._last = time.monotonic()
        self._wait = (self._last - started) / SAFE_SHARE


def checksum(path: Path, start: int = 0, nbytes: int | None = None) -> int | None:
    """CRC-32 of a part of a file, or of all of it; None where there are not so many bytes."""
    value, left = 0, nbytes
    try:
        with open(path, "rb") as file:
            file.seek(start)
            while left is None or left > 0:
                data = file.read(CHUNK if left is None else min(CHUNK, left))
                if not data:
                    break
                value = zlib.crc32(data, value)
                left = None if left is None else left - len(data)
    except FileNotFoundError:
        return None
    return None if left else value


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are safely on the disk."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def work_folder(output: Path) -> Path:
    """Where an unfinished run keeps what it goes on from."""
    return output.with_name(f"{output.name}.partial")


def published(output: Path) -> bool:
    """Whether a run was interrupted in its very last step, so that its output may be there already."""
    path = work_folder(output) / JOURNAL
    return path.is_file() and any(PUBLISHED in entry for entry in Journal(path).entries[-1:])
