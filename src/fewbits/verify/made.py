"""What was just written, read back before anyone relies on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fewbits.errors import FewbitsError
from fewbits.verify.run import verify
from fewbits.verify.tensors import Progress

FAULTY = ".faulty"
"""Added to the names of files that did not pass."""
OF_THE_SOURCE = "tokenizer"
"""Where faults lie that come with the model, and that quantizing has told of."""


def check_made(files: Sequence[Path], threads: int | None = None, progress: Progress | None = None) -> None:
    """Decode a model once more: `verify` without hashes and reference.

    Args:
        files: a GGUF file, all of a split set, or a model directory.

    Raises:
        FewbitsError: it has a fault; it is then kept under another name, ending in `.faulty`.
    """
    try:
        found = verify(files[0], quick=True, threads=threads, progress=progress)
        problems = [f"{fault.where}: {fault.problem}" for fault in found.faults if fault.where != OF_THE_SOURCE]
    except FewbitsError as error:
        problems = [error.message]
    if not problems:
        return
    for file in files:
        os.replace(file, file.with_name(file.name + FAULTY))
    raise FewbitsError(
        f"{files[0]}: what was written has a fault ({problems[0]}); it is kept as {files[0].name}{FAULTY}.",
        "Run `fewbits verify` on the model that it was made from; if that is whole, disk or memory fail here.",
    )
