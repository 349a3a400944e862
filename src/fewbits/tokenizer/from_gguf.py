"""The `tokenizer.*` metadata of a GGUF file -> a transformers tokenizer that gives the ids llama.cpp gives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gguf import TokenType

from fewbits.errors import FewbitsError
from fewbits.tokenizer import pretokenizers
from fewbits.tokenizer.files import malformed
from fewbits.tokenizer.vocabulary import SPACE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODELS = ("gpt2", "llama", "gemma4")
SPECIAL_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
# Ids that llama.cpp takes where a "llama" file names none.
LLAMA_IDS = {"bos": 1, "eos": 2, "unk": 0}
VISIBLE_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
MATCHED_FIRST = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """A transformers tokenizer equal to llama.cpp's for the same file.

    Special tokens in the text are recognized, as llama.cpp does with parse_special.

    Args:
        metadata: a GGUF file's metadata; the `tokenizer.*` entries and general.name are read.

    Returns:
        A fast tokenizer with the chat template, special tokens and BOS/EOS handling of the file.

    Raises:
        FewbitsError: not a BPE or SentencePiece tokenizer, an unknown pre-tokenizer, or inconsistent metadata.
    """
    with malformed("The GGUF file"):
        return _made(metadata)


def _made(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    model = metadata.get("tokenizer.ggml.model")
    if not isinstance(model, str) or model not in MODELS:
        raise FewbitsError(
            f"The GGUF file's tokenizer is {model!r}; those that can be read are {', '.join(MODELS)}.",
            "Pass the directory of the original model for its tokenizer.",
        )
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    types = _numbers(metadata, "tokenizer.ggml.token_type", len(tokens)) or [int(TokenType.NORMAL)] * len(tokens)
    if model == "gpt2":
        parts, adds_bos = _byte_level(metadata, tokens)
    elif model == "llama":
        parts, adds_bos = _sentencepiece(metadata, tokens, types), True
    else:
        parts, adds_bos = _visible_space_bpe(metadata, tokens), True
    special = _special(metadata, tokens, LLAMA_IDS if model == "llama" else {})
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types, str(metadata.get("general.name", ""))),
        **parts,
        "post_processor": _post_processor(metadata, special, tokens, adds_bos),
    }
    try:
        backend = Tokenizer.from_str(json.dumps(document, ensure_ascii=False))
    except Exception as error:  # tokenizers raises bare Exception
        raise FewbitsError(
            f"The GGUF file's tokenizer is inconsistent: {error}", "Get the file, or its conversion, anew."
        ) from error
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=_chat_template(metadata),
        **{f"{kind}_token": tokens[token_id] for kind, token_id in special.items()},
    )


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[dict[str, Any], bool]:
    row = pretokenizers.named(str(metadata.get("tokenizer.ggml.pre") or "default"))
    vocab = {text: token_id for token_id, text in enumerate(tokens)}
    bytes_step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    parts = {
        "normalizer": None,
        "pre_tokenizer": pretokenizers.build(row),
        "decoder": bytes_step,
        "model": _bpe(vocab, _merges(metadata, vocab), ignore_merges=row.ignore_merges, byte_fallback=False),
    }
    return parts, row.adds_bos


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    scores = _numbers(metadata, "tokenizer.ggml.scores", len(tokens))
    if scores is None:
        raise FewbitsError("The GGUF file's tokenizer has no scores.", "Get the file, or its conversion, anew.")
    vocab = {text: token_id for token_id, text in enumerate(tokens)}
    plain = {text: token_id for text, token_id in vocab.items() if types[token_id] == TokenType.NORMAL}
    # any two neighbours whose joined text is a token merge, best score first (equal scores: the leftmost, which a rank
    # cannot say)
    merges = [
        (-scores[token_id], len(text[:cut]), text[:cut], text[cut:])
        for text, token_id in plain.items()
        for cut in range(1, len(text))
        if text[:cut] in plain and text[cut:] in plain
    ]
    merges.sort(key=lambda merge: merge[:2])
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps = [{"type": "Prepend", "prepend": SPACE}, VISIBLE_SPACE] if prefix else [VISIBLE_SPACE]
    unknown = tokens[int(metadata.get("tokenizer.ggml.unknown_token_id", 0))]
    pairs = [[left, right] for _, _, left, right in merges]
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": _visible_space_decoder(prefix),
        "model": _bpe(vocab, pairs, ignore_merges=False, byte_fallback=True, unknown=unknown),
    }


def _visible_space_bpe(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    vocab = {text: token_id for token_id, text in enumerate(tokens)}
    split = {"type": "Split", "pattern": {"Regex": r"[^\n]+|[\n]+"}, "behavior": "Isolated", "invert": False}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    return {
        "normalizer": VISIBLE_SPACE,
        "pre_tokenizer": split,
        "decoder": _visible_space_decoder(False),
        "model": _bpe(
            vocab,
            _merges(metadata, vocab),
            ignore_merges=False,
            byte_fallback=True,
            unknown=None if unknown is None else tokens[int(unknown)],
        ),
    }


def _bpe(
    vocab: dict[str, int], merges: list[list[str]], ignore_merges: bool, byte_fallback: bool, unknown: str | None = None
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    }


def _visible_space_decoder(prefix: bool) -> dict[str, Any]:
    space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    steps: list[dict[str, Any]] = [space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _merges(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> list[list[str]]:
    pairs = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        at = merge.find(" ", 1)  # a merge may begin with a space
        left, right = merge[:at], merge[at + 1 :]
        if at > 0 and left in vocab and right in vocab and left + right in vocab:
            pairs.append([left, right])
    return pairs


def _added(tokens: list[str], types: list[int], model_name: str) -> list[dict[str, Any]]:
    # llama.cpp knows by the model's name alone that Phi-3's special tokens swallow the whitespace after them
    strips = "phi-3" in model_name.lower() or "phi3" in model_name.lower()
    return [
        {
            "id": token_id,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": strips and text not in {"<unk>", "<s>", "<|endoftext|>"},
            "normalized": False,
            "special": types[token_id] != TokenType.USER_DEFINED,
        }
        for token_id, text in enumerate(tokens)
        if text and types[token_id] in MATCHED_FIRST
    ]


def _special(metadata: Mapping[str, Any], tokens: list[str], default: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for kind, key in SPECIAL_KEYS.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id", default.get(kind))
        if token_id is not None and 0 <= int(token_id) < len(tokens):
            found[kind] = int(token_id)
    return found


def _post_processor(
    metadata: Mapping[str, Any], special: Mapping[str, int], tokens: list[str], adds_bos: bool
) -> dict[str, Any]:
    def entries(kind: str, default: bool, sequence: int) -> list[dict[str, Any]]:
        if kind not in special or not metadata.get(f"tokenizer.ggml.add_{kind}_token", default):
            return []
        return [{"SpecialToken": {"id": tokens[special[kind]], "type_id": sequence}}]

    def template(name: str, sequence: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": name, "type_id": sequence}}
        return [*entries("bos", adds_bos, sequence), text, *entries("eos", False, sequence)]

    used = {tokens[special[kind]]: special[kind] for kind in ("bos", "eos") if kind in special}
    return {
        "type": "TemplateProcessing",
        "single": template("A", 0),
        "pair": [*template("A", 0), *template("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [token_id], "tokens": [text]} for text, token_id in used.items()},
    }


def _chat_template(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): str(value) for key, value in metadata.items() if key.startswith(prefix)}
    default = metadata.get("tokenizer.chat_template")
    if named and default is not None:
        named["default"] = str(default)
    return named or (None if default is None else str(default))


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if values is None or not len(values):
        raise FewbitsError(f"The GGUF file has no {key}.", "Get the file, or its conversion, anew.")
    return [str(value) for value in values]


def _numbers(metadata: Mapping[str, Any], key: str, count: int) -> list[Any] | None:
    values: Sequence[Any] | None = metadata.get(key)
    if values is None:
        return None
    if len(values) != count:
        raise FewbitsError(
            f"{key} has {len(values)} entries for {count} tokens.", "Get the file, or its conversion, anew."
        )
    return values.tolist() if hasattr(values, "tolist") else list(values)
