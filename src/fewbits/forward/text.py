"""Text files and how they become token ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Text:
    """A text file with its provenance."""

    path: Path
    content: str
    sha256: str


def read_text(path: Path) -> Text:
    """Read a UTF-8 text file. One trailing newline is dropped, as llama.cpp's `-f` does.

    Raises:
        FewbitsError: no such file, or not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FewbitsError(f"{path}: the text cannot be read ({error.strerror}).", "Name a text file.") from None
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FewbitsError(f"{path}: not UTF-8 at byte {error.start}.", "Convert the text to UTF-8.") from None
    return Text(path, content.removesuffix("\n"), hashlib.sha256(data).hexdigest())


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], int | None]:
    """Token ids of a text and the BOS id if the tokenizer begins texts with it (then it is among the ids).

    Text that looks like a special token stays text, as in llama.cpp; an EOS at the end is left out.
    """
    plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    around = tokenizer("a", add_special_tokens=True)["input_ids"]
    if bos is None or not around or around[0] != bos:
        return plain, None
    return [bos, *plain], bos
