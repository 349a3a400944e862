"""Pre-tokenizers: how text is cut into words before byte-pair merges, and what llama.cpp calls each way.

A `tokenizer.json` says it as a list of steps (split by a regex, split digits, map bytes to printable characters); a
GGUF file says it as one name, `tokenizer.ggml.pre`, for which llama.cpp has the regexes built in
(src/llama-vocab.cpp). The table below holds both sides. Equal steps mean equal words, so a structure that is not in
the table is an error, never a guess: a wrong name would load and then tokenize almost right.

Known limits of llama.cpp, whatever the file says: it applies no Unicode normalization (NFC and NFKC normalizers of a
`tokenizer.json` are dropped: text that is not already normalized gets other tokens), no lower-casing for BPE, and no
`add_prefix_space` for byte-level BPE.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fewbits.errors import FewbitsError

Step = tuple[str, ...]
"""One of ("split", regex), ("digits", "each" | "runs"), ("punctuation", "runs") and ("bytes",)."""

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# The same group as llama.cpp and some files spell it, for engines without inline flags.
CONTRACTIONS_SPELLED = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SLASH_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + TAIL
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + TAIL
QWEN35 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|"
TEKKEN = _CASED.replace("%s", "") + r"\p{N}|" + SLASH_TAIL
O200K = _CASED.replace("%s", CONTRACTIONS + "?") + r"\p{N}{1,3}|" + SLASH_TAIL
YOUTU_CJK = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
    "\ufe30-\ufe4f]+|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
)
YOUTU = _CASED.replace("%s", CONTRACTIONS + "?") + r"\p{N}|" + SLASH_TAIL
BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
SEED_CODER = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
EXAONE_MOE = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)
MINICPM5 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+|" + TAIL
JAIS2 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)"
    r"|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}"
)
UFAKZEKA = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + TAIL
BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"
THREES_FROM_THE_RIGHT = r"\d{1,3}(?=(?:\d{3})*\b)"
CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"""
)
DEEPSEEK_V3 = DEEPSEEK_WORDS + r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPARK = DEEPSEEK_WORDS + r"|[\r\n]|\s+(?!\S)|\s+"
# The cased letters (Latin, Greek, Cyrillic, ...) as the tokenizer's authors listed them.
DEEPSEEK_LETTERS = (
    "\\s?[A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
DEEPSEEK_PUNCTUATION = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"

BYTES: Step = ("bytes",)
EACH_DIGIT: Step = ("digits", "each")


def _splits(*regexes: str) -> tuple[Step, ...]:
    return (*(("split", regex) for regex in regexes), BYTES)


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting text into words.

    Attributes:
        name: what `tokenizer.ggml.pre` says.
        steps: the steps of the `tokenizer.json`.
        aliases: further names for which llama.cpp runs the same regexes with the same `ignore_merges`.
        ignore_merges: a word that is a vocabulary entry is taken whole, without running the merges.
        adds_bos: llama.cpp adds a BOS token where the file has no `add_bos_token`.
        without_bos: the name for models that have no BOS token (llama.cpp then sets none by default).
        recognize: False where only llama.cpp's side is known, so that no `tokenizer.json` is given this name.
    """

    name: str
    steps: tuple[Step, ...]
    aliases: tuple[str, ...] = ()
    ignore_merges: bool = False
    adds_bos: bool = False
    without_bos: bool = False
    recognize: bool = True


_DIGITS_GPT2 = (EACH_DIGIT, ("split", GPT2), BYTES)
# Where several rows have the same steps, the first that also agrees in ignore_merges and BOS is written.
PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", _splits(GPT2),
                 ("phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "jina-es", "jina-de",
                  "jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code", "roberta-bpe", "gigachat", "a.x-4.0",
                  "mellum", "modern-bert")),
    PreTokenizer("llama-bpe", _splits(LLAMA3),
                 ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
                 ignore_merges=True, adds_bos=True),
    PreTokenizer("glm4", _splits(LLAMA3), ("glm5",), ignore_merges=True, without_bos=True),
    PreTokenizer("dbrx", _splits(LLAMA3), ("smaug-bpe",)),
    PreTokenizer("chatglm-bpe", _splits(LLAMA3), without_bos=True),
    PreTokenizer("qwen2", _splits(QWEN2),
                 ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2")),
    PreTokenizer("qwen35", _splits(QWEN35)),
    PreTokenizer("smollm", _DIGITS_GPT2,
                 ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2")),
    PreTokenizer("deepseek-v3", _splits(r"\p{N}{1,3}", CJK, DEEPSEEK_V3), ("hunyuan-dense", "joyai-llm", "hy_v4")),
    PreTokenizer("deepseek-llm",
                 (("split", r"[\r\n]"), ("split", DEEPSEEK_LETTERS), ("split", DEEPSEEK_PUNCTUATION),
                  ("split", r"\s+$"), ("split", DEEPSEEK_CJK), EACH_DIGIT, BYTES)),
    PreTokenizer("deepseek-coder",
                 (("split", r"[\r\n]"), ("split", r"\s?\p{L}+"), ("split", r"\s?\p{P}+"), ("split", DEEPSEEK_CJK),
                  EACH_DIGIT, BYTES)),
    PreTokenizer("falcon",
                 (("punctuation", "runs"), ("split", GPT2), BYTES, ("digits", "runs"), ("split", "[0-9][0-9][0-9]"))),
    PreTokenizer("tekken", _splits(TEKKEN), ignore_merges=True, adds_bos=True),
    PreTokenizer("gpt-4o", _splits(O200K), ("llama4", "kanana2", "talkie", "minimax-m2")),
    PreTokenizer("granite-embed-multi-97m", _splits(O200K), ignore_merges=True),
    PreTokenizer("tiny_aya", _splits(THREES_FROM_THE_RIGHT, O200K), ("cohere2moe",)),
    PreTokenizer("bloom", _splits(BLOOM), ("poro-chat", "gpt3-finnish")),
    PreTokenizer("viking", (("split", BLOOM), EACH_DIGIT, BYTES)),
    PreTokenizer("bailingmoe", _splits(BAILING), ("bailingmoe2", "llada-moe")),
    PreTokenizer("seed-coder", _splits(SEED_CODER)),
    PreTokenizer("exaone-moe", _splits(EXAONE_MOE)),
    PreTokenizer("minicpm5", _splits(r"\p{N}{1,3}", MINICPM5), ignore_merges=True),
    PreTokenizer("jais-2", _splits(JAIS2)),
    PreTokenizer("ufakzeka", _splits(UFAKZEKA)),
    PreTokenizer("youtu", _splits(YOUTU_CJK, YOUTU), ignore_merges=True),
    PreTokenizer("superbpe", _splits(r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    PreTokenizer("spark2_5", _splits(r"\p{N}{1,3}", CJK, SPARK, r"\p{N}"), recognize=False),
    PreTokenizer("laguna", _splits(r"[^\n]+|[\n]+", QWEN2), recognize=False),
    PreTokenizer("chameleon",
                 _splits("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", r"\p{N}",
                         r"[\p{P}!-/:-@\[-`{-~]", GPT2), adds_bos=True, recognize=False),
    PreTokenizer("default", _splits(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"), recognize=False),
)  # fmt: skip
BY_NAME = {name: row for row in PRE_TOKENIZERS for name in (row.name, *row.aliases)}


def named(name: str) -> PreTokenizer:
    """The pre-tokenizer that llama.cpp calls `name`; FewbitsError if there is none in the table."""
    if name not in BY_NAME:
        raise FewbitsError(
            f"The pre-tokenizer {name!r} is not known.", f"Pass the original model's tokenizer; known: {known_names()}."
        )
    return BY_NAME[name]


def known_names() -> str:
    """All names of the table, for messages."""
    return ", ".join(sorted(BY_NAME))


def steps_of(pre_tokenizer: dict[str, Any] | None) -> tuple[Step, ...] | None:
    """The steps of the `pre_tokenizer` of a tokenizer.json, spelling differences removed; None where one is unknown."""
    steps: list[Step] = []
    for part in _flatten(pre_tokenizer):
        step = _step(part)
        if step is None:
            return None
        steps.extend(step)
    return tuple(steps)


def recognize(pre_tokenizer: dict[str, Any] | None, ignore_merges: bool, has_bos: bool) -> PreTokenizer | None:
    """The row of the table whose steps equal those of a tokenizer.json, best agreement first; None if there is none.

    Args:
        pre_tokenizer: the `pre_tokenizer` object of the tokenizer.json.
        ignore_merges: the model's `ignore_merges`; a row that differs in it is returned only where no row agrees.
        has_bos: whether the model has a BOS token.
    """
    steps = steps_of(pre_tokenizer)
    rows = [row for row in PRE_TOKENIZERS if row.recognize and row.steps == steps]
    rows.sort(key=lambda row: (row.ignore_merges != ignore_merges, row.without_bos == has_bos))
    return rows[0] if rows else None


def unknown_structure(pre_tokenizer: dict[str, Any] | None, where: str) -> FewbitsError:
    """The error for a tokenizer.json whose pre-tokenizer is not in the table."""
    shown = json.dumps(pre_tokenizer, ensure_ascii=False)
    shown = shown if len(shown) <= 600 else shown[:600] + "..."
    return FewbitsError(
        f"{where}: llama.cpp has no pre-tokenizer known to split text like this one: {shown}",
        f"If you know which one it is, pass --pre-tokenizer NAME ({known_names()}).",
    )


def build(row: PreTokenizer) -> dict[str, Any]:
    """The `pre_tokenizer` object of a tokenizer.json with the row's steps."""
    parts: list[dict[str, Any]] = []
    for kind, *detail in row.steps:
        if kind == "split":
            parts.append({"type": "Split", "pattern": {"Regex": detail[0]}, "behavior": "Isolated", "invert": False})
        elif kind == "digits":
            parts.append({"type": "Digits", "individual_digits": detail[0] == "each"})
        elif kind == "punctuation":
            parts.append({"type": "Punctuation", "behavior": "Contiguous"})
        else:
            parts.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    return {"type": "Sequence", "pretokenizers": parts}


def _flatten(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    if part.get("type") == "Sequence":
        for inner in part.get("pretokenizers", []):
            yield from _flatten(inner)
    else:
        yield part


def _step(part: dict[str, Any]) -> list[Step] | None:
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space", True):
        return [("split", GPT2), BYTES] if part.get("use_regex", True) else [BYTES]
    if kind == "Digits":
        return [("digits", "each" if part.get("individual_digits") else "runs")]
    if kind == "Punctuation" and part.get("behavior") == "Contiguous":
        return [("punctuation", "runs")]
    pattern = part.get("pattern")
    if kind == "Split" and isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        # "keep only what matches" is the same as "cut around what matches" for regexes that match any text
        how = (part.get("behavior"), bool(part.get("invert")))
        if how in {("Isolated", False), ("Isolated", True), ("Removed", True)}:
            return [("split", _spelling(pattern["Regex"]))]
    return None


def _spelling(regex: str) -> str:
    """One spelling for regexes that differ only in how line breaks and the contraction group are written."""
    regex = regex.replace("\r", r"\r").replace("\n", r"\n")
    return regex.replace(CONTRACTIONS_SPELLED, CONTRACTIONS)
