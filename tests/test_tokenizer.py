"""Tokenizers: token ids in llama.cpp, through our GGUF metadata, against transformers on thousands of mixed lines."""

from __future__ import annotations

import json
import os
import random
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from fewbits.errors import FewbitsError
from fewbits.tokenizer import gguf_tokenizer, load_tokenizer, tokenizer_from_gguf
from fewbits.tokenizer import pretokenizers as pt

SENTENCES = (
    "The quick brown fox jumps over the lazy dog; it wasn't there, we'll see, they've gone, I'm sure, he'd know.",
    "WE'LL SHOUT, THEY'VE SHOUTED, I'M DONE, IT'S MIXED Case'S and don'T",
    "Größe, naïve café, Ærøskøbing, œuvre, ſtraße, İstanbul, ılık, Ĳssel, Ǆ ǅ ǆ",
    "нещо на Български, Їжак і ґанок; ёлка, ОБЪЁМ",
    "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία",
    "我想在apple工作1314151天～ 你好，世界！這是繁體。",
    "これはテストです。カタカナとひらがな、漢字ー々〆",
    "한국어 문장입니다. 안녕하세요! ㄱㄴㄷ",
    "مرحبا بالعالم، كيف الحال؟ ١٢٣٤٥",
    "שָׁלוֹם עוֹלָם",
    "नमस्ते दुनिया, हिन्दी में १२३ पाठ।",
    "কেমন আছেন? তামিল: வணக்கம் உலகம்",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง",
    "កាន់តែពិសេសអាចខលចេញ",
    "ქართული ენა, Հայերեն լեզու, አማርኛ",
    "Cửa Việt, tiếng Việt có dấu",
    "🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 👨\u200d👩\u200d👧\u200d👦 🇩🇪 👍🏽 ❤️",
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 1,234,567.89 0x1F 1e-5 ½ ² Ⅷ ①",
    "------======= '''''' ```````\"\"\"\"......!!!!!!?????? <=> != ~/.bashrc && || $HOME #define",
    "def f(x: int) -> str:\n    return f\"{x!r}\"  # comment\n\n\nclass A(B):\n\tpass\n",
    "for (int i = 0; i < n; ++i) { a[i] ^= b[i]; } // done\r\n\r\nint main()\r\n{\r\n}\r\n",
    '{"key": [1, 2.5, null, true], "url": "https://example.com/a_b?c=d&e=%20#f"}',
    "SELECT * FROM t WHERE a <> 'it''s' -- ok\n",
    "a\tb\t\tc   d    e\u00a0f\u2003g\u3000h\u200bi\u2028j",
    "   leading and trailing   ",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n",
    "camelCaseWords snake_case_words SCREAMING_SNAKE kebab-case XMLHttpRequest iPhone15Pro",
    "<html><body class='x'>&nbsp;&lt;</body></html>",
    "\\frac{a}{b} \\alpha_1^2 $x \\in \\mathbb{R}$ ∑ ∫ √ ≤ ≠ ∞ → ⇒ €£¥₿ © ® ™ § ¶ † • … – — “q” ‘r’ «s»",
    "\x01\x02\x7f control \x1b[31mred\x1b[0m \ufeffbom \ufffd",
    "e\u0301 u\u0308 a\u030a combining, zwj\u200dzwnj\u200c",
)  # fmt: skip
SPECIAL_LINES = ("<|im_start|>user\nhi<|im_end|>\n", "a<|endoftext|>b", " <|im_start|> ", "<|im_start|><|im_end|>")


def mixed_lines(count: int = 2400) -> list[str]:
    """Deterministic mixed text: the sentences, then random splices of their words with all kinds of white space."""
    rng = random.Random(7)
    words = [word for sentence in SENTENCES for word in sentence.split(" ")]
    gaps = (" ", " ", " ", "", "  ", "   ", "\t", "\n", "\r\n", "\n\n", " \n ", "        ", "\u00a0", ".", ",")
    lines = list(SENTENCES)
    while len(lines) < count:
        if rng.random() < 0.15:  # characters at random, from one block to the other
            blocks = ((32, 127), (32, 127), (0xA0, 0x250), (0x370, 0x530), (0x4E00, 0x4F00), (0x3040, 0x3100))
            line = "".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(rng.randrange(1, 40)))
        else:
            line = "".join(rng.choice(words) + rng.choice(gaps) for _ in range(rng.randrange(1, 14)))
        lines.append(line)
    return lines


# What the published tokenizer.json files hold, written out here independently of the table under test.
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RAW_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


PUBLISHED = {
    "gpt-2": (GPT2_BYTES, False),
    "llama-bpe": (sequence(split(LLAMA3_REGEX), RAW_BYTES), True),
    "dbrx": (sequence(split(LLAMA3_REGEX, "Removed", True), RAW_BYTES), False),
    "qwen2": (sequence(split(LLAMA3_REGEX.replace("{1,3}", "")), RAW_BYTES), False),
    "smollm": (sequence({"type": "Digits", "individual_digits": True}, GPT2_BYTES), False),
    "falcon": (
        sequence(
            {"type": "Punctuation", "behavior": "Contiguous"},
            GPT2_BYTES,
            {"type": "Digits", "individual_digits": False},
            split("[0-9][0-9][0-9]"),
        ),
        False,
    ),
}  # fmt: skip


def train_byte_level(directory: Path, pre_tokenizer: dict[str, Any], ignore_merges: bool = False) -> Path:
    """A small byte-level BPE tokenizer, trained on the mixed lines, as a Hugging Face directory."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    document = json.loads(tokenizer.to_str())
    document["pre_tokenizer"] = pre_tokenizer
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(mixed_lines(1200), trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write_vocabulary(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file with a vocabulary and no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            assert isinstance(value, list) or value.dtype in (np.int32, np.float32)
            writer.add_array(key, value if isinstance(value, list) else value.tolist())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


Tokenize = Callable[[str], list[int]]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], Tokenize]]:
    """Metadata -> llama.cpp's own tokenize function for it."""
    llama_cpp = pytest.importorskip("llama_cpp")
    opened = []

    def make(metadata: dict[str, Any], add_special: bool = False) -> Tokenize:
        path = write_vocabulary(tmp_path / f"vocabulary-{len(opened)}.gguf", metadata)
        opened.append(llama_cpp.Llama(str(path), vocab_only=True, verbose=False))
        return lambda text: opened[-1].tokenize(text.encode(), add_bos=add_special, special=True)

    yield make
    for model in opened:
        model.close()


def mismatches(one: Tokenize, other: Tokenize, lines: list[str]) -> list[str]:
    return [line for line in lines if one(line) != other(line)]


def plain(tokenizer: Any) -> Tokenize:
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.engine
def test_smollm_ids_are_equal_in_llama_cpp_and_transformers(test_models: Path, engine: Any) -> None:
    directory = test_models / "smollm2-135m"
    config = json.loads((directory / "config.json").read_text())
    metadata = gguf_tokenizer(directory, config)
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert len(metadata["tokenizer.ggml.tokens"]) == config["vocab_size"]
    assert metadata["tokenizer.chat_template"] == (directory / "chat_template.jinja").read_text()
    lines = [*mixed_lines(), *SPECIAL_LINES]
    original = load_tokenizer(directory)
    llama = engine(metadata)
    assert mismatches(llama, plain(original), lines) == []
    back = tokenizer_from_gguf(metadata)
    assert mismatches(llama, plain(back), lines) == []
    assert (back.bos_token, back.eos_token) == (original.bos_token, original.eos_token)
    assert back.encode("hello") == original.encode("hello")
    chat = [{"role": "user", "content": "hi"}]
    assert back.apply_chat_template(chat, tokenize=False) == original.apply_chat_template(chat, tokenize=False)
    assert back.decode(back.encode(lines[5])) == lines[5]


@pytest.mark.engine
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_structures_are_recognized_and_tokenize_equally(name: str, tmp_path: Path, engine: Any) -> None:
    structure, ignore_merges = PUBLISHED[name]
    directory = train_byte_level(tmp_path / "model", structure, ignore_merges)
    metadata = gguf_tokenizer(directory, {"vocab_size": 1280})
    assert metadata["tokenizer.ggml.pre"] == name
    assert metadata["tokenizer.ggml.tokens"][1279] == "[PAD1279]"
    original = load_tokenizer(directory)
    llama = engine(metadata)
    lines = [*mixed_lines(), *SPECIAL_LINES, "a<tool_call> b"]
    assert mismatches(llama, plain(original), lines) == []
    assert mismatches(llama, plain(tokenizer_from_gguf(metadata)), lines) == []


def outside_ascii(line: str, *categories: str) -> bool:
    return any(c > "\x7f" and unicodedata.category(c) in categories for c in line)


# Where llama.cpp's regexes differ from the ones they stand for; the lines that show it are left out. llama.cpp maps
# every character outside ASCII to a stand-in for its class before matching, so that its regexes cannot tell upper from
# lower case there (nor count combining marks as letters), and takes \d and \b otherwise there.
CASE_BLIND = dict.fromkeys(
    ("tekken", "gpt-4o", "granite-embed-multi-97m", "youtu", "tiny_aya"), ("Lu", "Ll", "Lt", "Mn", "Mc", "Me")
)
DIFFERENCES: dict[str, tuple[str, ...]] = {
    **CASE_BLIND,
    "superbpe": ("Nd",),
}


@pytest.mark.engine
@pytest.mark.parametrize("row", pt.PRE_TOKENIZERS, ids=lambda row: row.name)
def test_every_pre_tokenizer_of_the_table_agrees_with_llama_cpp(
    row: pt.PreTokenizer, tmp_path: Path, engine: Any
) -> None:
    directory = train_byte_level(tmp_path / "model", pt.build(row), row.ignore_merges)
    metadata = gguf_tokenizer(directory, {}, pre=row.name)
    lines = [line for line in mixed_lines(800) if not outside_ascii(line, *DIFFERENCES.get(row.name, ()))]
    if row.name == "tiny_aya":  # llama.cpp groups digits with code of its own, which it marks as not quite the regex
        lines = [line for line in lines if not any(map(str.isdigit, line))]
    assert len(lines) > 90
    llama = engine(metadata)
    assert mismatches(llama, plain(load_tokenizer(directory)), lines) == []
    if row.recognize:
        structure = json.loads((directory / "tokenizer.json").read_text())["pre_tokenizer"]
        found = pt.recognize(structure, row.ignore_merges, not row.without_bos)
        assert found is row


SENTENCEPIECE = {
    # as Llama 2 and Mistral: a space before the text, bytes for unknown characters
    "llama": {"add_dummy_prefix": True, "unk_id": 0, "bos_id": 1, "eos_id": 2},
    # as Gemma: no space, symbols of its own that are matched first
    "gemma": {
        "add_dummy_prefix": False,
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
        "bos_piece": "<bos>",
        "eos_piece": "<eos>",
        "user_defined_symbols": ["<start_of_turn>", "<end_of_turn>", "\n\n", "\t\t", "<table>"],
    },
}


def train_sentencepiece(directory: Path, kind: str, **more: Any) -> Path:
    """A small SentencePiece model in a directory that transformers loads as that family's tokenizer."""
    import io

    import sentencepiece

    out = io.BytesIO()
    options: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 1100,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.98,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(mixed_lines(1200)), model_writer=out, **(options | SENTENCEPIECE[kind] | more)
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(out.getvalue())
    tokenizer_class = {"llama": "LlamaTokenizer", "gemma": "GemmaTokenizer"}[kind]
    marks = ("<s>", "</s>") if kind == "llama" else ("<bos>", "<eos>")
    config = {"tokenizer_class": tokenizer_class, "bos_token": marks[0], "eos_token": marks[1], "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    return directory


def comparable(lines: list[str], kind: str) -> list[str]:
    """The lines on which transformers agrees with SentencePiece: its Metaspace puts no space before a space."""
    return lines if kind == "gemma" else [line for line in lines if not line.startswith(" ")]


@pytest.mark.engine
@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_sentencepiece_models_tokenize_equally(kind: str, tmp_path: Path, engine: Any) -> None:
    import sentencepiece

    directory = train_sentencepiece(tmp_path / "model", kind)
    metadata = gguf_tokenizer(directory, {"vocab_size": 1104})
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is (kind == "llama")
    assert metadata["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    llama = engine(metadata)
    lines = mixed_lines()
    assert mismatches(llama, processor.encode, lines) == []
    assert mismatches(llama, plain(tokenizer_from_gguf(metadata)), lines) == []
    assert mismatches(llama, plain(load_tokenizer(directory)), comparable(lines, kind)) == []


@pytest.mark.engine
@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_tokenizer_json_from_sentencepiece_tokenizes_equally(kind: str, tmp_path: Path, engine: Any) -> None:
    directory = train_sentencepiece(tmp_path / "model", kind)
    original = load_tokenizer(directory)
    original.save_pretrained(tmp_path / "fast")
    assert not (tmp_path / "fast" / "tokenizer.model").exists()
    metadata = gguf_tokenizer(tmp_path / "fast", {})
    assert metadata["tokenizer.ggml.model"] == "llama"
    llama = engine(metadata)
    lines = mixed_lines()
    assert mismatches(llama, plain(original), comparable(lines, kind)) == []
    assert mismatches(llama, plain(tokenizer_from_gguf(metadata)), lines) == []
    assert engine(metadata, add_special=True)("hello") == original.encode("hello")


@pytest.mark.engine
def test_symbols_of_a_sentencepiece_model_with_a_space_prefix(tmp_path: Path, engine: Any) -> None:
    import sentencepiece

    directory = train_sentencepiece(tmp_path / "model", "llama", user_defined_symbols=["<tool>", "\n\n", "<sep>"])
    metadata = gguf_tokenizer(directory, {})
    types = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    assert types["\n\n"] == gguf.TokenType.NORMAL
    assert types["<tool>"] == gguf.TokenType.USER_DEFINED
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    assert mismatches(engine(metadata), processor.encode, mixed_lines()) == []


@pytest.mark.engine
def test_visible_space_bpe_that_is_no_sentencepiece_model_keeps_its_ranks(tmp_path: Path, engine: Any) -> None:
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        limit_alphabet=300,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator((word for line in mixed_lines(800) for word in line.split("\n")), trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = document["added_tokens"][:4]  # bytes are ordinary tokens
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<unk>"}))
    metadata = gguf_tokenizer(tmp_path, {})
    assert metadata["tokenizer.ggml.model"] == "gemma4"
    llama = engine(metadata)
    lines = mixed_lines()
    assert mismatches(llama, plain(load_tokenizer(tmp_path)), lines) == []
    assert mismatches(llama, plain(tokenizer_from_gguf(metadata)), lines) == []


def published_vocabularies_of_llama_cpp() -> None:
    """Every ggml-vocab-*.gguf of llama.cpp's models/ folder whose kind can be read."""
    llama_cpp = pytest.importorskip("llama_cpp")
    compared = 0
    for path in sorted(Path(os.environ["FEWBITS_LLAMACPP_MODELS"]).glob("ggml-vocab-*.gguf")):
        metadata = {key: value.contents() for key, value in gguf.GGUFReader(path).fields.items()}
        if metadata["tokenizer.ggml.model"] not in {"gpt2", "llama", "gemma4"}:
            continue
        model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        tokenizer = tokenizer_from_gguf(metadata)

        def llama(text: str, model: Any = model) -> list[int]:
            return model.tokenize(text.encode(), add_bos=False, special=True)

        assert mismatches(llama, plain(tokenizer), mixed_lines()) == [], path.name
        compared += 1
        model.close()
    assert compared


# minutes of work on 100 MB of files that few have: asked for by naming their folder, not part of the ordinary run
if "FEWBITS_LLAMACPP_MODELS" in os.environ:
    test_published_vocabularies_of_llama_cpp = pytest.mark.engine(published_vocabularies_of_llama_cpp)


def test_flags_templates_and_ids(trained: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(trained, tmp_path / "model"))
    document = json.loads((directory / "tokenizer.json").read_text())
    document["post_processor"] = {
        "type": "Sequence",
        "processors": [
            RAW_BYTES,
            {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
            },
        ],
    }
    (directory / "tokenizer.json").write_text(json.dumps(document))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "D"}, {"name": "tool-use", "template": "T"}]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    metadata = gguf_tokenizer(directory, {"unk_token_id": 0, "eos_token_id": [2, 0]})
    wanted = {
        "model": "gpt2", "pre": "gpt-2", "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
        "padding_token_id": 0, "add_bos_token": True, "add_eos_token": False,
    }  # fmt: skip
    assert {key: metadata[f"tokenizer.ggml.{key}"] for key in wanted} == wanted
    assert metadata["tokenizer.chat_template"] == "D"
    assert metadata["tokenizer.chat_template.tool_use"] == "T"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    types = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    assert types["<|im_end|>"] == gguf.TokenType.CONTROL
    assert types["<tool_call>"] == gguf.TokenType.USER_DEFINED
    assert metadata["tokenizer.ggml.token_type"].dtype == np.int32
    back = tokenizer_from_gguf(metadata)
    assert back.encode("hi") == load_tokenizer(directory).encode("hi")
    assert back.chat_template == {"default": "D", "tool_use": "T"}
    # an explicit flag wins, as in transformers
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    assert gguf_tokenizer(directory, {})["tokenizer.ggml.add_bos_token"] is False


def test_two_file_bpe_is_read(trained: Path, tmp_path: Path) -> None:
    model = json.loads((trained / "tokenizer.json").read_text())["model"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (old / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (old / "tokenizer_config.json").write_text(json.dumps(config))
    metadata = gguf_tokenizer(old, {})
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.merges"][:50] == merges[:50]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2-like tokenizer; tests that change it work on a copy."""
    return train_byte_level(tmp_path_factory.mktemp("trained"), GPT2_BYTES)


def break_json(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((directory / "tokenizer.json").read_text())
    change(document)
    (directory / "tokenizer.json").write_text(json.dumps(document))


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "unknown pre-tokenizer": (
        lambda d: d.update(pre_tokenizer=sequence(split(r"\w+"), RAW_BYTES)),
        r'"\\\\w\+".*--pre-tokenizer',
    ),
    "lower-casing": (lambda d: d.update(normalizer={"type": "Lowercase"}), "normalizes text with Lowercase"),
    "unigram": (lambda d: d["model"].update(type="Unigram"), "a Unigram tokenizer"),
    "no model": (lambda d: d.pop("model"), "no 'model' object"),
    "no merges": (lambda d: d["model"].update(merges=[]), "malformed BPE model"),
    "ids twice": (lambda d: d["model"]["vocab"].update(zzz=5), "distinct whole numbers"),
    "id far out": (lambda d: d["model"]["vocab"].update(zzz=10**9), "malformed BPE model"),
    "text twice": (lambda d: d["added_tokens"].append({"id": 1300, "content": "a"}), "'a' is in the vocabulary twice"),
    "added without id": (lambda d: d["added_tokens"].append({"content": "a"}), "malformed added token"),
    "word suffix": (lambda d: d["model"].update(end_of_word_suffix="</w>"), "prefix or suffix"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_tokenizer_files_are_named(what: str, trained: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(trained, tmp_path / "model"))
    change, message = BROKEN[what]
    break_json(directory, change)
    with pytest.raises(FewbitsError, match=message) as caught:
        gguf_tokenizer(directory, {})
    assert str(directory) in str(caught.value)


def test_pre_tokenizer_can_be_named(tmp_path: Path) -> None:
    directory = train_byte_level(tmp_path / "model", sequence(split(r"\w+"), RAW_BYTES))
    assert gguf_tokenizer(directory, {}, pre="qwen2")["tokenizer.ggml.pre"] == "qwen2"
    with pytest.raises(FewbitsError, match="no pre-tokenizer name"):
        gguf_tokenizer(directory, {}, pre="a b")


def test_missing_files_sizes_and_bad_json(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="no tokenizer found; looked for"):
        gguf_tokenizer(tmp_path, {})
    with pytest.raises(FewbitsError, match="no tokenizer found; looked for"):
        load_tokenizer(tmp_path)
    with pytest.raises(FewbitsError, match="not a directory"):
        gguf_tokenizer(tmp_path / "nowhere", {})
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(FewbitsError, match="not valid JSON"):
        gguf_tokenizer(tmp_path, {})
    with pytest.raises(FewbitsError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\x01 not a model")
    with pytest.raises(FewbitsError, match="not a SentencePiece model"):
        gguf_tokenizer(tmp_path, {})
    with pytest.raises(FewbitsError, match="vocab_size is 100"):
        gguf_tokenizer(trained, {"vocab_size": 100})
    assert len(gguf_tokenizer(trained, {"vocab_size": 1200})["tokenizer.ggml.tokens"]) == 1200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.pre": "no-such"}, "'no-such' is not known"),
        ({"tokenizer.ggml.token_type": [1]}, "1 entries"),
        ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.tokens": []}, "no tokenizer.ggml.tokens"),
    ],
)
def test_bad_metadata_is_refused(change: dict[str, Any], message: str) -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.token_type": np.ones(3, np.int32),
        "tokenizer.ggml.merges": ["a b"],
    }
    assert tokenizer_from_gguf(metadata).encode("abab") == [2, 2]
    with pytest.raises(FewbitsError, match=message):
        tokenizer_from_gguf(metadata | change)
