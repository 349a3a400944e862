"""Hugging Face tokenizer files -> the `tokenizer.*` metadata of a GGUF file."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewbits.errors import FewbitsError
from fewbits.tokenizer import pretokenizers, vocabulary
from fewbits.tokenizer.files import TokenizerFiles, malformed
from fewbits.tokenizer.vocabulary import Vocabulary

log = logging.getLogger(__name__)

# What llama.cpp calls the ids that tokenizer_config.json calls otherwise; the other kinds keep their name.
ID_KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}
NORMALIZERS_WITHOUT_EFFECT = {"NFC", "NFKC", "NFD", "NFKD"}  # llama.cpp takes text as it comes


def gguf_tokenizer(directory: Path, config: Mapping[str, Any], pre: str | None = None) -> dict[str, Any]:
    """The `tokenizer.*` metadata with which llama.cpp tokenizes like the model's own tokenizer.

    Args:
        directory: the model directory with tokenizer.json, tokenizer.model or vocab.json and merges.txt.
        config: the model's config.json; the vocabulary is padded to its vocab_size with unused tokens.
        pre: the name for `tokenizer.ggml.pre`, in place of the one recognized from tokenizer.json.

    Returns:
        Metadata in the order llama.cpp's converter writes it: token_type is an int32 array, scores a float32 array.

    Raises:
        FewbitsError: no tokenizer, a malformed one, or one that llama.cpp has no counterpart for.
    """
    if pre is not None and not re.fullmatch(r"[\w.-]+", pre):
        raise FewbitsError(f"{pre!r} is no pre-tokenizer name.", f"Known: {pretokenizers.known_names()}.")
    with malformed(directory):
        return _made(TokenizerFiles(Path(directory), config), pre)


def _made(files: TokenizerFiles, pre: str | None) -> dict[str, Any]:
    model = files.tokenizer.get("model") or {}
    kind = model.get("type", "BPE" if "merges" in model else None)
    space_prefix: bool | None = None
    if kind == "BPE" and not model.get("byte_fallback"):
        words = vocabulary.byte_level(files)
        has_bos = "bos" in files.special_ids(words.ids)
        head = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre or _recognized(files, has_bos)}
    elif files.sentencepiece:
        words, space_prefix = vocabulary.sentencepiece_model(files)
        head = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    elif kind == "BPE":
        words = vocabulary.sentencepiece_style(files)
        space_prefix = _space_prefix(files.tokenizer)
        head = _sentencepiece_head(files, words, space_prefix)
    else:
        raise FewbitsError(
            f"{files.directory / 'tokenizer.json'}: a {kind} tokenizer; GGUF files are written for BPE tokenizers.",
            "Use a model with a byte-level BPE or SentencePiece BPE tokenizer.",
        )
    return head | words.metadata() | _special(files, words, space_prefix) | _chat_templates(files)


def _recognized(files: TokenizerFiles, has_bos: bool) -> str:
    where = str(files.directory / "tokenizer.json")
    normalizer = files.tokenizer.get("normalizer") or {}
    parts = normalizer.get("normalizers", []) if normalizer.get("type") == "Sequence" else [normalizer]
    odd = [part.get("type") for part in parts if part and part.get("type") not in NORMALIZERS_WITHOUT_EFFECT]
    if odd:
        raise FewbitsError(
            f"{where}: normalizes text with {', '.join(map(str, odd))}, which llama.cpp cannot do for byte-level BPE.",
            "Pass --pre-tokenizer NAME to write the file nevertheless.",
        )
    model = files.tokenizer["model"]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise FewbitsError(
            f"{where}: marks word parts with a prefix or suffix, which llama.cpp's BPE does not know.",
            "Use a model with a byte-level BPE or SentencePiece BPE tokenizer.",
        )
    ignore_merges = bool(model.get("ignore_merges"))
    row = pretokenizers.recognize(files.tokenizer.get("pre_tokenizer"), ignore_merges, has_bos)
    if row is None:
        raise pretokenizers.unknown_structure(files.tokenizer.get("pre_tokenizer"), where)
    if row.ignore_merges != ignore_merges:
        log.warning(
            "%s: llama.cpp's pre-tokenizer %s has ignore_merges=%s, this one %s: words that are tokens but that no "
            "merges lead to are tokenized differently", where, row.name, row.ignore_merges, ignore_merges,
        )  # fmt: skip
    return row.name


def _sentencepiece_head(files: TokenizerFiles, words: Vocabulary, space_prefix: bool) -> dict[str, Any]:
    by_rank = str(files.text_config.get("model_type", "")).startswith("gemma4")
    if not by_rank and vocabulary.scores_replace_merges(files):
        words.merges = []
        return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    if space_prefix:
        words.merges = []
        log.warning(
            "%s: its merges are not those of a SentencePiece model; llama.cpp will tokenize some words differently",
            files.directory / "tokenizer.json",
        )
        return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    return {"tokenizer.ggml.model": "gemma4"}  # merges by rank on visible-space text


def _space_prefix(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json puts a space before the text."""
    for part, members in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        outer = tokenizer.get(part) or {}
        for step in outer.get(members) or [outer]:
            if step.get("type") == "Prepend":
                return True
            if step.get("type") == "Metaspace":
                scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
                return scheme != "never"
    return False


def _special(files: TokenizerFiles, words: Vocabulary, space_prefix: bool | None) -> dict[str, Any]:
    ids = words.ids
    special = files.special_ids(ids)
    adds: dict[str, bool] = {}
    ends = files.template_ends()
    if ends is not None:
        for kind, text in zip(("bos", "eos"), ends, strict=True):
            adds[kind] = text is not None and text in ids
            if adds[kind] and special.get(kind) != ids[str(text)]:
                if kind == "eos" and "eos" in special:
                    special.setdefault("eot", special["eos"])  # still ends a turn
                special[kind] = ids[str(text)]
    for kind in ("bos", "eos"):
        # as transformers: an explicit flag wins over the template of tokenizer.json
        flag = files.tokenizer_config.get(f"add_{kind}_token")
        if isinstance(flag, bool):
            adds[kind] = flag and kind in special
    found: dict[str, Any] = {
        f"tokenizer.ggml.{ID_KEYS.get(kind, kind)}_token_id": token_id for kind, token_id in special.items()
    }
    found |= {f"tokenizer.ggml.add_{kind}_token": flag for kind, flag in adds.items()}
    flag = files.tokenizer_config.get("add_prefix_space")
    prefix = flag if isinstance(flag, bool) else space_prefix
    if prefix is not None:
        found["tokenizer.ggml.add_space_prefix"] = prefix
    return found


def _chat_templates(files: TokenizerFiles) -> dict[str, Any]:
    templates = files.chat_templates()
    names = {re.sub(r"[^A-Za-z0-9]", "_", name): name for name in templates if name != "default"}
    found: dict[str, Any] = {f"tokenizer.chat_template.{safe}": templates[name] for safe, name in names.items()}
    if names:
        found["tokenizer.chat_templates"] = sorted(names)
    if "default" in templates:
        found["tokenizer.chat_template"] = templates["default"]
    return found
