"""The token list of a GGUF file: texts, types, scores and merges, from a tokenizer.json or a SentencePiece model."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from gguf import TokenType

from fewbits.errors import FewbitsError
from fewbits.tokenizer.files import MAX_TOKENS_BESIDE, AddedToken, TokenizerFiles

log = logging.getLogger(__name__)

SPACE = "\u2581"  # SentencePiece's visible space
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
ADDED_SCORE = -1000.0
PAD_SCORE = -10000.0
# Added tokens that some models do not mark special although nothing should ever print them (as llama.cpp's converter).
CONTROL_TEXTS = frozenset({"<pad>", "<mask>", "<2mass>", "[@BOS@]"})
CONTROL_AFFIXES = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))


@dataclass
class Vocabulary:
    """A token list under construction; every list is indexed by token id.

    Attributes:
        texts: what `tokenizer.ggml.tokens` holds.
        types: gguf.TokenType values.
        scores: SentencePiece scores (higher merges first); None for byte-level BPE.
        merges: "left right" pairs, most frequent first; empty for SentencePiece.
    """

    texts: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] | None = None
    merges: list[str] = field(default_factory=list)

    @property
    def ids(self) -> dict[str, int]:
        """Token ids by text."""
        return {text: token_id for token_id, text in enumerate(self.texts)}

    def put(self, token_id: int, text: str, kind: TokenType, score: float) -> None:
        """Sets one token, padding with unused tokens up to it."""
        self.pad(token_id + 1)
        self.texts[token_id], self.types[token_id] = text, int(kind)
        if self.scores is not None:
            self.scores[token_id] = score

    def pad(self, size: int) -> None:
        """Appends unused tokens up to `size` tokens: an embedding often has more rows than the tokenizer has tokens."""
        for token_id in range(len(self.texts), size):
            self.texts.append(f"[PAD{token_id}]")
            self.types.append(int(TokenType.UNUSED))
            if self.scores is not None:
                self.scores.append(PAD_SCORE)

    def finish(self, files: TokenizerFiles) -> None:
        """Fits the list to the embedding and checks what llama.cpp aborts on.

        Raises:
            FewbitsError: more tokens than the embedding has rows, or two tokens with one text.
        """
        size = files.vocab_size or len(self.texts)
        if size > 2 * len(self.texts) + MAX_TOKENS_BESIDE:
            raise FewbitsError(
                f"{files.directory}: config.json's vocab_size is {size}, the tokenizer has {len(self.texts)} tokens.",
                "Use the tokenizer that belongs to the model.",
            )
        beyond = range(size, len(self.texts))
        if any(token_id not in files.added_tokens for token_id in beyond):
            raise FewbitsError(
                f"{files.directory}: the tokenizer has {len(self.texts)} tokens, config.json's vocab_size is {size}.",
                "Use the tokenizer that belongs to the model.",
            )
        if beyond:
            log.warning("%s: %d added tokens beyond the embedding left out", files.directory, len(beyond))
        for values in (self.texts, self.types, self.scores or []):
            del values[size:]
        self.pad(size)
        if len(last := self.ids) != size:
            twice = next(text for token_id, text in enumerate(self.texts) if last[text] != token_id)
            raise FewbitsError(
                f"{files.directory}: the token {twice!r} is in the vocabulary twice.", "llama.cpp refuses such a file."
            )

    def metadata(self) -> dict[str, Any]:
        """The `tokenizer.ggml.*` arrays."""
        found: dict[str, Any] = {"tokenizer.ggml.tokens": self.texts}
        if self.scores is not None:
            found["tokenizer.ggml.scores"] = np.asarray(self.scores, np.float32)
        found["tokenizer.ggml.token_type"] = np.asarray(self.types, np.int32)
        if self.merges:
            found["tokenizer.ggml.merges"] = self.merges
        return found


def byte_level(files: TokenizerFiles) -> Vocabulary:
    """The vocabulary of a byte-level BPE tokenizer.json."""
    vocab, merges = _model(files)
    vocabulary = Vocabulary()
    for text, token_id in vocab.items():
        vocabulary.put(token_id, text, TokenType.NORMAL, 0.0)
    # a space inside a merge would end it: spell it as the byte-level alphabet does
    vocabulary.merges = [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges]
    _put_added(vocabulary, files)
    vocabulary.finish(files)
    return vocabulary


def sentencepiece_style(files: TokenizerFiles) -> Vocabulary:
    """The vocabulary of a tokenizer.json whose BPE came from a SentencePiece model (byte fallback, visible spaces).

    The scores were lost in the conversion; only their order matters, and the merges keep it: a token's score is minus
    its place among the merge results.
    """
    vocab, merges = _model(files)
    order: dict[str, int] = {}
    for left, right in merges:
        order.setdefault(left + right, len(order))
    vocabulary = Vocabulary(scores=[])
    unknown = files.tokenizer["model"].get("unk_token")
    for text, token_id in vocab.items():
        kind = TokenType.BYTE if BYTE_TOKEN.fullmatch(text) else TokenType.NORMAL
        # characters come after every merge result, as in SentencePiece
        score = 0.0 if kind == TokenType.BYTE else -float(order.get(text, len(order)))
        vocabulary.put(token_id, text, kind, score)
    _put_added(vocabulary, files)
    if unknown in vocab:
        vocabulary.put(vocab[unknown], unknown, TokenType.UNKNOWN, 0.0)
    vocabulary.merges = [" ".join(pair) for pair in merges]
    vocabulary.finish(files)
    return vocabulary


def scores_replace_merges(files: TokenizerFiles) -> bool:
    """Whether merging by score gives what merging by rank gives, for a tokenizer.json from a SentencePiece model.

    llama.cpp's SentencePiece tokenizer joins any two neighbours whose joined text is a token, best score first. That
    equals the listed merges if every split of a token into two tokens is listed and the merges with one result stand
    together.
    """
    vocab, merges = _model(files)
    results = [left + right for left, right in merges]
    runs = sum(1 for one, other in pairwise(results) if one != other) + bool(results)
    if runs != len(set(results)):
        return False
    added = {token.content for token in files.added_tokens.values()}
    words = [text for text in vocab if text not in added and not BYTE_TOKEN.fullmatch(text)]
    plain = set(words)
    listed = set(merges)
    return all(
        (text[:cut], text[cut:]) in listed
        for text in words
        for cut in range(1, len(text))
        if text[:cut] in plain and text[cut:] in plain
    )


def sentencepiece_model(files: TokenizerFiles) -> tuple[Vocabulary, bool]:
    """The vocabulary of a tokenizer.model, and whether it puts a space before the text.

    Raises:
        FewbitsError: unreadable, or a unigram or word model, which llama.cpp's "llama" tokenizer cannot stand for.
    """
    from sentencepiece import sentencepiece_model_pb2

    path = files.sentencepiece
    assert path is not None
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError, of one class or another by its backend
        raise FewbitsError(f"{path}: not a SentencePiece model ({error}).", "Download it again.") from error
    if not model.pieces:
        raise FewbitsError(f"{path}: not a SentencePiece model (no pieces).", "Download it again.")
    spec = model.trainer_spec
    if spec.model_type != spec.BPE:
        raise FewbitsError(
            f"{path}: a SentencePiece {spec.ModelType.Name(spec.model_type)} model, not BPE as llama.cpp's 'llama'.",
            "Only SentencePiece models of type BPE can be written.",
        )
    normalizer = model.normalizer_spec
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        log.warning(
            "%s: normalizes text (%s, remove_extra_whitespaces=%s), llama.cpp does not: such text gets other tokens",
            path, normalizer.name or "identity", normalizer.remove_extra_whitespaces,
        )  # fmt: skip
    known = {piece.piece for piece in model.pieces}
    if "<0x0A>" not in known:
        raise FewbitsError(
            f"{path}: has no byte tokens; llama.cpp crashes at the first character that such a model does not know.",
            "Only SentencePiece models with byte fallback can be written.",
        )
    vocabulary = Vocabulary(scores=[])
    for token_id, piece in enumerate(model.pieces):
        kind, text = TokenType(piece.type), piece.piece
        if kind == TokenType.USER_DEFINED and normalizer.add_dummy_prefix and _joins(text, known):
            # llama.cpp puts a space after each token that it matches first; merging, it finds this one without
            kind = TokenType.NORMAL
        elif kind == TokenType.USER_DEFINED:
            text = text.replace(SPACE, " ")  # these are looked for in the raw text
        vocabulary.put(token_id, text, kind, piece.score)
    _put_added(vocabulary, files)
    vocabulary.finish(files)
    return vocabulary, bool(normalizer.add_dummy_prefix)


def _joins(text: str, known: set[str]) -> bool:
    """Whether llama.cpp's merging arrives at this token by itself: one character, or two known halves."""
    halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
    return len(text) == 1 or any(all(len(half) == 1 or half in known for half in pair) for pair in halves)


def _put_added(vocabulary: Vocabulary, files: TokenizerFiles) -> None:
    for token in sorted(files.added_tokens.values(), key=lambda token: token.id):
        if token.id < len(vocabulary.types) and vocabulary.types[token.id] in (TokenType.UNKNOWN, TokenType.BYTE):
            continue
        text = token.content
        kind = TokenType.CONTROL if _is_control(token) else TokenType.USER_DEFINED
        if kind == TokenType.USER_DEFINED:
            text = text.replace(SPACE, " ")
        vocabulary.put(token.id, text, kind, ADDED_SCORE)


def _is_control(token: AddedToken) -> bool:
    text = token.content
    looks_so = text in CONTROL_TEXTS or any(text.startswith(a) and text.endswith(b) for a, b in CONTROL_AFFIXES)
    return token.special or looks_so


def _model(files: TokenizerFiles) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocab and the merges of a tokenizer.json's BPE model, checked."""
    where = files.directory / "tokenizer.json"
    vocab: Mapping[str, Any] = files.tokenizer["model"].get("vocab") or {}
    raw = files.tokenizer["model"].get("merges") or []
    try:
        ids = sorted(vocab.values())
        limit = 2 * len(ids) + MAX_TOKENS_BESIDE
        if not ids or any(type(token_id) is not int for token_id in ids) or len(set(ids)) != len(ids):
            raise ValueError("token ids must be distinct whole numbers")
        if ids[0] < 0 or ids[-1] > limit:
            raise ValueError(f"token ids from {ids[0]} to {ids[-1]} for {len(ids)} tokens")
        # "left right" until tokenizers 0.20, ["left", "right"] since
        merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in raw]
        if not merges or any(len(pair) != 2 for pair in merges):
            raise ValueError("merges must be pairs")
        return dict(vocab), [(str(left), str(right)) for left, right in merges]
    except (TypeError, ValueError, AttributeError) as error:
        raise FewbitsError(f"{where}: malformed BPE model ({error}).", "Download it again.") from error
