"""Results appear under their final name whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from fewbits.errors import FewbitsError
from fewbits.formats.journal import published


class DiskError(FewbitsError):
    """A disk that is full or refuses to be written, which says nothing of what was to be written."""


class AtomicFile:
    """A context manager that writes beside the final name and renames at the end; on any error nothing is left.

    Raises:
        FewbitsError: the output exists (without `overwrite`), its folder does not or is not writable, no room.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        check_output(path, overwrite)

    def __enter__(self) -> AtomicFile:
        try:
            self.stream: BinaryIO = open(self.partial, "wb")
        except OSError as error:
            raise explain(self.path, error) from None
        return self

    def write(self, data: bytes | memoryview) -> None:
        try:
            self.stream.write(data)
        except OSError as error:
            raise explain(self.path, error) from None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.stream.flush()
            if error is None:
                os.fsync(self.stream.fileno())
            self.stream.close()
            if error is None:
                os.replace(self.partial, self.path)
        except OSError as fault:
            if error is None:
                raise explain(self.path, fault) from None
        finally:
            # a failed flush leaves the stream open with its buffer: close the descriptor without writing it
            if not self.stream.closed:
                self.stream.raw.close() if hasattr(self.stream, "raw") else None
            self.partial.unlink(missing_ok=True)


def explain(path: Path, error: OSError) -> DiskError:
    """What a failed write means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskError(f"{path}: no room left on the disk.", "Free some or choose another output folder.")
    return DiskError(f"{path}: cannot be written ({error.strerror or error}).", "Choose another output.")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What goes wrong with the disk, said of an output.

    Raises:
        DiskError: for any OSError.
    """
    try:
        yield
    except OSError as error:
        raise explain(path, error) from None


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse an output that cannot be written before any work is done.

    Raises:
        FewbitsError: it exists (without `overwrite`, and not of a run that was killed in its last step), or its folder
            does not exist.
    """
    if path.is_dir():
        raise FewbitsError(f"{path}: the output is a directory.", "Name a file.")
    if path.exists() and not overwrite and not published(path):
        raise FewbitsError(f"{path}: the output exists.", "Choose another name or pass --overwrite.")
    if not path.parent.is_dir():
        raise FewbitsError(f"{path}: the folder {path.parent} does not exist.", "Create it first.")


def check_room(path: Path, needed: int) -> None:
    """Refuse early when the disk cannot hold the result.

    Raises:
        FewbitsError: with both sizes.
    """
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise FewbitsError(
            f"{path}: the result needs {needed / 1e6:.1f} MB, the disk has {free / 1e6:.1f} MB free.",
            "Free some or choose another output folder.",
        )
