"""Calibration text: plain files, lists of documents, conversations; all become windows of token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fewbits.errors import FewbitsError
from fewbits.forward.text import Text, encode, read_text
from fewbits.tokenizer.templates import chat_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Names of the speakers in files of the `conversations` kind -> roles of chat templates."""
CHARACTERS_PER_TOKEN = 8
MARGIN = 256
"""Where only the beginning of a text is tokenized, its last tokens are not trusted."""


@dataclass(frozen=True)
class CalibrationText:
    """What goes through the model.

    Attributes:
        inputs: int64 [n_windows, context], BOS placed at each window's start if the tokenizer begins texts with it.
        datasets: names of the files.
        sha256: of each file.
    """

    inputs: npt.NDArray[np.int64]
    datasets: list[str]
    sha256: list[str]

    @property
    def facts(self) -> dict[str, Any]:
        """What a result follows from, for `formats.facts`."""
        names = [Path(name).name for name in self.datasets]
        windows, context = self.inputs.shape
        return {
            "calibration text": {name: f"digest:{sha256}" for name, sha256 in zip(names, self.sha256, strict=True)},
            "windows": windows,
            "context": context,
            "tokens": f"digest:{hashlib.sha256(self.inputs.tobytes()).hexdigest()}",
        }

    def check(self, n_vocab: int, model: Path) -> None:
        """Refuse tokens that a model does not have.

        Raises:
            FewbitsError: there is one.
        """
        if int(self.inputs.max()) >= n_vocab:
            raise FewbitsError(
                f"{model}: the text has token {self.inputs.max()}, the vocabulary ends at {n_vocab}.",
                "The tokenizer belongs to another model.",
            )


def read_texts(
    paths: Sequence[Path], tokenizer: PreTrainedTokenizerFast, context: int, chunks: int | None = None
) -> CalibrationText:
    """Cut files into windows that follow one another without overlap, as llama-imatrix does.

    What remains at the ends of the files is joined to further windows; the rest of that is dropped.

    Args:
        paths: `.jsonl` files hold an object a line: {"text"}, {"messages"} or {"conversations"}; others are text.
        chunks: at most so many windows, taken from all files in turn; None means all.

    Raises:
        FewbitsError: a file cannot be read, or all are shorter than one window.
    """
    if chunks is not None and chunks < 1:
        raise FewbitsError(f"{chunks} windows calibrate nothing.", "Take at least 1, or leave it out for all.")
    per_file: list[npt.NDArray[np.int64]] = []
    rest: list[int] = []
    texts = [read_text(path) for path in paths]
    bos = encode(tokenizer, "")[1]
    for text in texts:
        ids = _file_ids(text, tokenizer, chunks * context if chunks else None)
        whole = len(ids) // context * context
        per_file.append(np.asarray(ids[:whole], np.int64).reshape(-1, context))
        rest += ids[whole:]
    whole = len(rest) // context * context
    per_file.append(np.asarray(rest[:whole], np.int64).reshape(-1, context))
    windows = [w for turn in range(max(map(len, per_file))) for w in (f[turn] for f in per_file if turn < len(f))]
    if not windows:
        raise FewbitsError(
            f"{paths[0]}: the text has {len(rest)} tokens, one window needs {context}.",
            "Take more text or a smaller context.",
        )
    inputs = np.stack(windows[:chunks])
    if bos is not None:
        inputs[:, 0] = bos
    return CalibrationText(inputs, [str(path) for path in paths], [text.sha256 for text in texts])


def _file_ids(text: Text, tokenizer: PreTrainedTokenizerFast, enough: int | None) -> list[int]:
    """Token ids of a file; where `enough` are asked for, maybe only those of its beginning."""
    if text.path.suffix == ".jsonl":
        ids: list[int] = []
        for document in _documents(text, tokenizer):
            ids += document
            if enough is not None and len(ids) >= enough:
                break
        return ids
    if enough is not None and (enough + MARGIN) * CHARACTERS_PER_TOKEN < len(text.content):
        ids = encode(tokenizer, text.content[: (enough + MARGIN) * CHARACTERS_PER_TOKEN])[0]
        if len(ids) >= enough + MARGIN:
            return ids[:enough]
    return encode(tokenizer, text.content)[0]


def _documents(text: Text, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """Token ids of each line: a text between BOS and EOS where there are any, a chat as the template has it."""
    bos = encode(tokenizer, "")[1]
    for number, line in enumerate(text.content.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{text.path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise FewbitsError(f"{where}: not JSON ({error}).", "Write one object a line.") from None
        if not isinstance(entry, dict):
            raise FewbitsError(f"{where}: not an object.", 'Write {"text": ...} or {"messages": [...]}.')
        if isinstance(entry.get("text"), str):
            eos = tokenizer.eos_token_id
            yield encode(tokenizer, entry["text"])[0] + ([] if eos is None else [eos])
            continue
        rendered = _render(_messages(entry, where), tokenizer, where)
        ids = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        yield ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _messages(entry: dict[str, Any], where: str) -> list[dict[str, Any]]:
    turns = entry.get("messages") or entry.get("conversations")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise FewbitsError(
            f"{where}: there is neither a text nor a conversation.",
            'Write {"text": ...}, {"messages": [...]} or {"conversations": [...]}.',
        )
    messages = []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str | list):
            raise FewbitsError(f"{where}: a turn has no role or no content.", "Each needs both.")
        messages.append({**turn, "role": SPEAKERS.get(role, role), "content": content})
    return messages


def _render(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, where: str) -> str:
    if not tokenizer.chat_template:
        raise FewbitsError(f"{where}: a conversation, but the model has no chat template.", "Use plain text.")
    try:
        return chat_text(tokenizer, messages)
    except FewbitsError as error:
        raise FewbitsError(f"{where}: {error.message}", "Leave the line out.") from None
