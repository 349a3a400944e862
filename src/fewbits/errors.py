"""The errors that a user sees: one clear line that names the file, the tensor and the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""What may stand in a stranger's names and must reach no terminal: control characters and halves of surrogate pairs."""


class FewbitsError(Exception):
    """Bad input or a request that cannot be met. The command line prints it as one line and exits with code 2.

    Args:
        message: what is wrong, naming the file and, where there is one, the tensor.
        hint: the way out, as an imperative sentence.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        message, hint = UNPRINTABLE.sub("?", message), UNPRINTABLE.sub("?", hint)
        super().__init__(f"{message} {hint}".strip() if hint else message)
        self.message = message
        self.hint = hint


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Name the file in errors of code that knows no files."""
    try:
        yield
    except FewbitsError as error:
        if str(path) in error.message:
            raise
        raise FewbitsError(f"{path}: {error.message}", error.hint) from None
