"""Large arrays that are needed part by part: in memory, or in a file whose pages do not stay in memory."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fewbits.errors import FewbitsError

SPILL_BYTES = 2**31
"""Arrays larger than this live in a file where nothing else is said."""


@dataclass(frozen=True)
class Spill:
    """Where the large arrays of one run live. What is computed with them does not depend on it.

    Attributes:
        above: arrays of more bytes are put into files.
        folder: of these files, which have no name and are gone with the run; None: the system's for temporary files.
    """

    above: int = SPILL_BYTES
    folder: Path | None = None
    _mapped: weakref.WeakSet[mmap.mmap] = field(default_factory=weakref.WeakSet, compare=False)

    @property
    def scarce(self) -> bool:
        """Whether memory is bounded so narrowly that all goes to files that can."""
        return self.above < SPILL_BYTES

    def empty(self, shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> npt.NDArray[Any]:
        """An array of this shape, its values not set.

        Raises:
            FewbitsError: the disk has no room.
        """
        size = prod(shape) * np.dtype(dtype).itemsize
        if size <= self.above:
            return np.empty(shape, dtype)
        with tempfile.TemporaryFile(prefix=".fewbits-", dir=self.folder) as file:
            try:
                # room for all of it: a page that the disk cannot hold would kill the process
                os.posix_fallocate(file.fileno(), 0, size) if hasattr(os, "posix_fallocate") else file.truncate(size)
            except OSError as error:
                raise FewbitsError(
                    f"{self.folder or tempfile.gettempdir()}: no room for {size / 1e9:.1f} GB of intermediate results "
                    f"({error.strerror}).",
                    "Make room on the disk, or allow more memory.",
                ) from None
            mapped = mmap.mmap(file.fileno(), size)
        self._mapped.add(mapped)
        return np.frombuffer(mapped, dtype).reshape(shape)

    def forget(self) -> None:
        """Let go of the memory that holds parts of files; they are read again when they are needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._mapped:
                mapped.madvise(mmap.MADV_DONTNEED)
