"""The tokenizer files of a Hugging Face model directory: reading them, and what special tokens they name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_JSON_BYTES = 256 << 20  # the largest published tokenizer.json files are around 35 MB
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json with merges.txt")
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "eot", "eom")


MAX_TOKENS_BESIDE = 100_000
"""How many token ids may be unused, besides as many as there are tokens: lists of that length are made."""
TOKENIZER_CLASS = re.compile(r"\w*(Tokenizer|TokenizerFast|TokenizersBackend|SentencePieceBackend|PythonBackend)")
PROBE = "\N{SNOWMAN} a"
"""Has a character that few vocabularies know."""


@contextmanager
def malformed(where: object) -> Iterator[None]:
    """A tokenizer of any other structure than the readers take for granted is one error, whatever it trips over.

    Raises:
        FewbitsError: says where it is.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise FewbitsError(f"{where}: the tokenizer is malformed ({reason}).", "Download it again.") from error


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the raw text before anything else."""

    id: int
    content: str
    special: bool


@dataclass
class TokenizerFiles:
    """The parsed JSON files of a directory. Missing optional files read as empty.

    Attributes:
        directory: the model directory.
        config: the model's config.json, already read by the caller.
    """

    directory: Path
    config: Mapping[str, Any]
    tokenizer: dict[str, Any] = field(init=False)
    tokenizer_config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        if not self.directory.is_dir():
            raise FewbitsError(f"{self.directory} is not a directory.", "Pass the directory with the tokenizer files.")
        self.tokenizer_config = self._json("tokenizer_config.json")
        self.tokenizer = self._json("tokenizer.json")
        pair = [self.directory / name for name in ("vocab.json", "merges.txt")]
        if not self.tokenizer and not self.sentencepiece and all(path.is_file() for path in pair):
            # transformers builds the one-file form from the older two-file form
            backend = load_tokenizer(self.directory).backend_tokenizer
            self.tokenizer = json.loads(backend.to_str())
        if self.tokenizer and not isinstance(self.tokenizer.get("model"), dict):
            raise FewbitsError(f"{self.directory / 'tokenizer.json'}: has no 'model' object.", "Download it again.")
        if not self.tokenizer and not self.sentencepiece:
            raise FewbitsError(
                f"{self.directory}: no tokenizer found; looked for {', '.join(TOKENIZER_FILES)}.",
                "Copy the tokenizer files of the original model there.",
            )

    @property
    def sentencepiece(self) -> Path | None:
        """The SentencePiece model, if there is one."""
        path = self.directory / "tokenizer.model"
        return path if path.is_file() else None

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of config.json that describes the language model."""
        inner = self.config.get("text_config")
        return {**self.config, **inner} if isinstance(inner, Mapping) else self.config

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding, to which the vocabulary is padded; None if config.json does not say."""
        size = self.text_config.get("vocab_size")
        if size is not None and (not isinstance(size, int) or size <= 0):
            raise FewbitsError(
                f"{self.directory}: config.json has vocab_size {size!r}.", "It must be a positive number."
            )
        return size

    @cached_property
    def added_tokens(self) -> dict[int, AddedToken]:
        """Added tokens by id, of added_tokens.json, tokenizer_config.json and tokenizer.json: the later ones win."""
        found: dict[int, AddedToken] = {}
        try:
            for content, token_id in self._json("added_tokens.json").items():
                found[int(token_id)] = AddedToken(int(token_id), content, special=False)
            decoder = self.tokenizer_config.get("added_tokens_decoder") or {}
            entries = [*((int(key), value) for key, value in decoder.items())]
            entries += [(int(value["id"]), value) for value in self.tokenizer.get("added_tokens") or []]
            for token_id, entry in entries:
                found[token_id] = AddedToken(token_id, str(entry["content"]), bool(entry.get("special", False)))
        except (ArithmeticError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise FewbitsError(
                f"{self.directory}: malformed added token ({error!r}).", "Download the tokenizer files again."
            ) from error
        known = len(found) + len((self.tokenizer.get("model") or {}).get("vocab") or ())
        pieces = self.sentencepiece.stat().st_size if self.sentencepiece else 0  # each takes some bytes
        limit = 2 * known + pieces + MAX_TOKENS_BESIDE
        if wrong := [token_id for token_id in found if not 0 <= token_id <= limit]:
            raise FewbitsError(
                f"{self.directory}: an added token has the id {wrong[0]}.", "Download the tokenizer files again."
            )
        return found

    def special_ids(self, vocab: Mapping[str, int]) -> dict[str, int]:
        """The ids of bos, eos, unk, ... : by the text in tokenizer_config.json, else by the id in config.json.

        Args:
            vocab: every token's id by text.
        """
        by_text = {token.content: token.id for token in self.added_tokens.values()}
        found: dict[str, int] = {}
        for kind in SPECIAL:
            entry = self.tokenizer_config.get(f"{kind}_token")
            text = entry.get("content") if isinstance(entry, dict) else entry
            token_id = by_text.get(text, vocab.get(text)) if isinstance(text, str) else None
            if token_id is None:
                token_id = self.text_config.get(f"{kind}_token_id")
            if isinstance(token_id, int) and not isinstance(token_id, bool) and 0 <= token_id < len(vocab):
                found[kind] = token_id
        return found

    def template_ends(self) -> tuple[str | None, str | None] | None:
        """The special tokens that encoding puts first and last, None where none; None altogether if nothing says.

        Read from the post_processor of tokenizer.json.
        """
        processors = list(_processors(self.tokenizer.get("post_processor")))
        for processor in processors:
            if processor.get("type") == "TemplateProcessing":
                single = processor.get("single") or [{}]
                first, last = ((end.get("SpecialToken") or {}).get("id") for end in (single[0], single[-1]))
                return first, last if len(single) > 1 else None
        return (None, None) if processors else None

    def chat_templates(self) -> dict[str, str]:
        """Chat templates by name; "default" is the one without a name."""
        found: dict[str, str] = {}
        # as transformers: the files win over tokenizer_config.json
        for named in (
            self.tokenizer_config.get("chat_template"),
            self._json("chat_template.json").get("chat_template"),
        ):
            if isinstance(named, str):
                found["default"] = named
            elif isinstance(named, list):
                entries = (entry for entry in named if isinstance(entry, dict))
                found |= {str(entry.get("name")): str(entry.get("template")) for entry in entries}
        if (main := self.directory / "chat_template.jinja").is_file():
            found["default"] = _text(main)
        for path in sorted((self.directory / "additional_chat_templates").glob("*.jinja")):
            found[path.stem] = _text(path)
        return found

    def _json(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        return json_object(path) if path.is_file() else {}


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a tokenizer's file.

    Raises:
        FewbitsError: something else, or absurdly large.
    """
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise FewbitsError(f"{path}: not valid JSON ({error}).", "Download it again.") from error
    if not isinstance(value, dict):
        raise FewbitsError(f"{path}: holds a {type(value).__name__}, not an object.", "Download it again.")
    return value


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face model directory, from its files alone: no network, no code of the model's own.

    Args:
        directory: holds tokenizer.json, tokenizer.model or vocab.json with merges.txt.

    Raises:
        FewbitsError: the files are missing, malformed, or need code that comes with the model.
    """
    from transformers import AutoTokenizer

    wanted = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
    if not any((directory / name).is_file() for name in wanted):
        raise FewbitsError(
            f"{directory}: no tokenizer found; looked for {', '.join(TOKENIZER_FILES)}.",
            "Copy the tokenizer files of the original model there.",
        )
    config = directory / "tokenizer_config.json"
    named = json_object(config).get("tokenizer_class") if config.is_file() else None
    if named is not None and not (isinstance(named, str) and TOKENIZER_CLASS.fullmatch(named)):
        # transformers takes any of its classes, models too
        raise FewbitsError(f"{config}: {str(named)[:80]!r} is no tokenizer's class.", "Download it again.")
    try:
        found = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        found(PROBE)
        return found
    except Exception as error:  # transformers and tokenizers raise all kinds for a bad file, bare Exception among them
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FewbitsError(
            f"{directory}: the tokenizer cannot be loaded: {reason[0]}",
            "Check the tokenizer files, or download them again.",
        ) from error


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise FewbitsError(
            f"{path}: {path.stat().st_size} bytes is too large for a tokenizer file.",
            "Check that it is the right file.",
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FewbitsError(f"{path}: not UTF-8 text ({error}).", "Download it again.") from error


def _processors(processor: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if processor is None:
        return
    if processor.get("type") == "Sequence":
        for inner in processor.get("processors", []):
            yield from _processors(inner)
    else:
        yield processor
