"""The layer table of a GGUF file, from its metadata alone, as llama.cpp makes its caches.

Source: llama.cpp's model loaders (src/models/*.cpp: load_arch_hparams), src/llama-model.cpp (create_memory) and
src/llama-hparams.cpp, as bundled with llama-cpp-python 0.3.36 (2026-10). An architecture that stands in none of the
tables below gets a bound: every layer keeps everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fewbits.errors import FewbitsError
from fewbits.memory.shape import Kind, LayerCache, ModelShape

MOST_LAYERS = 4096


@dataclass(frozen=True)
class Window:
    """How an architecture's layers slide where the file does not say it layer by layer.

    Attributes:
        every: each so many-th layer sees everything; 0 where the file must say.
        first: whether the first of each group is the one that sees everything, not the last.
        default: window where the file has none; None: then no layer slides.
        fixed: whether the default holds whatever the file says (unless that is 0).
        layers: only models of so many layers slide.
        chunked: whether windows lie side by side instead of moving with the token.
    """

    every: int
    first: bool = False
    default: int | None = None
    fixed: bool = False
    layers: int | None = None
    chunked: bool = False


WINDOWS: dict[str, Window] = {
    "gemma2": Window(2, default=4096),
    "gemma3": Window(6),
    "gemma3n": Window(5),
    "gemma4": Window(0),
    "cohere2": Window(4),
    "cohere2moe": Window(4, first=True),
    "exaone4": Window(4, default=4096, layers=64),
    "exaone-moe": Window(4, default=128),
    "olmo2": Window(4),
    "gpt-oss": Window(2),
    "llama4": Window(4, default=8192, fixed=True, chunked=True),
    "smallthinker": Window(4, first=True, default=4096, fixed=True),
    "afmoe": Window(4),
    "plamo3": Window(8),
    "muse-glimmer": Window(4),
    "mellum": Window(4),
    "laguna": Window(4, first=True),
    **dict.fromkeys(("mimo2", "step35", "granite_swa", "maple", "spark2_5"), Window(0)),
}
"""Architectures some of whose layers slide. All others keep everything, whatever window their files tell."""
RECURRENT = ("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7")
"""Architectures without attention."""
Mix = Literal["no kv heads", "no kv heads, no ff", "both", "interval"]
HYBRID: dict[str, tuple[Mix, int]] = {
    **dict.fromkeys(
        ("jamba", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "kimi-linear", "bailingmoe3"), ("no kv heads", 0)
    ),
    **dict.fromkeys(("nemotron_h", "nemotron_h_moe"), ("no kv heads, no ff", 0)),
    "falcon-h1": ("both", 0),
    **dict.fromkeys(("qwen3next", "qwen35", "qwen35moe"), ("interval", 4)),
    "minimax-01": ("interval", 8),
}
"""Which layers of a hybrid are recurrent, and the interval of layers with attention where the file tells none."""
SPARSE = ("deepseek32", "glm-dsa")
"""Architectures whose layers keep an indexer's key beside the latent vector."""
SHARED_FROM = {"gemma3n": 20}
"""Layers from this one on use the caches of earlier ones, where the file does not tell how many do."""
CACHELESS = (
    "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3", "eurobert",
    "gemma-embedding", "dream", "llada", "llada-moe", "rnd1", "wavtokenizer-dec",
)  # fmt: skip
"""Architectures that read their whole input at once."""
PLAIN = (
    "llama", "deci", "falcon", "grok", "gpt2", "gptj", "gptneox", "mpt", "baichuan", "starcoder", "refact", "bloom",
    "stablelm", "qwen", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe", "phi2", "phi3",
    "phimoe", "plamo", "codeshell", "orion", "internlm2", "minicpm", "minicpm3", "gemma", "starcoder2", "xverse",
    "command-r", "dbrx", "olmo", "olmoe", "openelm", "arctic", "deepseek", "deepseek2", "deepseek2-ocr", "chatglm",
    "glm4", "glm4moe", "bitnet", "jais", "jais2", "nemotron", "exaone", "granite", "granitemoe", "chameleon", "plm",
    "bailingmoe", "bailingmoe2", "dots1", "arcee", "ernie4_5", "ernie4_5-moe", "hunyuan-moe", "hunyuan-dense",
    "hunyuan_vl", "smollm3", "seed_oss", "grovemoe", "apertus", "minimax-m2", "cogvlm", "pangu-embedded", "mistral3",
    "mistral4", "paddleocr", "llama-embed", "maincoder",
)  # fmt: skip
"""Architectures all of whose layers keep the keys and values, or latent vectors, of everything."""


def shape_from_gguf(metadata: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
    """The sizes of a GGUF file's model.

    Args:
        metadata: keys and values of the file.
        vocabulary: rows of the token embeddings, where the tensors are known.

    Raises:
        FewbitsError: there is no architecture, or a value cannot be.
    """
    keys = _Keys(metadata)
    arch, stored = keys.arch, keys.number("block_count")
    if not 0 < stored <= MOST_LAYERS:
        raise FewbitsError(
            f"The metadata's {arch}.block_count is {stored}, which it cannot be.", "Fetch the file again."
        )
    count = stored - keys.number("nextn_predict_layers", 0)
    if count < 1:
        raise FewbitsError(f"The metadata's {arch}.nextn_predict_layers leaves no layer.", "Fetch the file again.")
    known = arch in (*PLAIN, *CACHELESS, *WINDOWS, *RECURRENT, *HYBRID, *SPARSE)
    layers = tuple(_Layers(keys, stored, count).layer(index) for index in range(count))
    heads = keys.each("attention.head_count", stored, 0)
    length = keys.head_length("attention.key_length", max(heads))
    mla = keys.number("attention.key_length_mla", 0), keys.number("attention.value_length_mla", 0)
    experts = keys.number("expert_count", 0)
    feed_forward = max(keys.each("feed_forward_length", stored, 0))
    tokens = metadata.get("tokenizer.ggml.tokens")
    listed = len(tokens) if isinstance(tokens, list | np.ndarray) else 0
    return ModelShape(
        architecture=arch,
        layers=layers,
        stored_layers=stored,
        hidden=keys.number("embedding_length", 0),
        vocabulary=vocabulary or keys.number("vocab_size", 0) or listed,
        context_length=keys.number("context_length", 0),
        heads=max(heads),
        queries=max(heads) * (mla[0] or length),
        feed_forward=feed_forward,
        experts=experts,
        experts_used=max(keys.each("expert_used_count", stored, 0)),
        expert_width=max(keys.each("expert_feed_forward_length", stored, feed_forward)) if experts else 0,
        latent=(keys.number("attention.value_length", 0), length, *mla) if all(mla) else None,
        inner=keys.number("ssm.inner_size", 0) if arch in (*RECURRENT, *HYBRID) else 0,
        per_layer=count * keys.number("embedding_length_per_layer_input", 0),
        certain=known,
        notes=() if known else (f"unknown architecture {arch}: a bound, as if every layer kept everything",),
    )


class _Keys:
    """Metadata of one architecture, each value checked to be a number."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        arch = metadata.get("general.architecture")
        if not isinstance(arch, str) or not arch:
            raise FewbitsError("The metadata has no general.architecture.", "Give a model, not a projector or adapter.")
        self.arch, self.metadata = arch, metadata

    def each(self, key: str, count: int, missing: int) -> list[int]:
        """One value for each layer, of a key with one value or with one a layer."""
        value = self.metadata.get(f"{self.arch}.{key}", missing)
        values = list(value) if isinstance(value, list | np.ndarray) else [value] * count
        for item in values:
            if not isinstance(item, int | bool | np.integer | np.bool_) or not 0 <= item < 2**32:
                raise FewbitsError(f"The metadata's {self.arch}.{key} is {item!r}, which it cannot be.")
        if len(values) < count:
            raise FewbitsError(f"The metadata's {self.arch}.{key} has {len(values)} values for {count} layers.")
        return [int(item) for item in values[:count]]

    def number(self, key: str, missing: int | None = None) -> int:
        if missing is None and f"{self.arch}.{key}" not in self.metadata:
            raise FewbitsError(f"The metadata lacks {self.arch}.{key}.", "Fetch the file again.")
        return max(self.each(key, 1, missing or 0))

    def listed(self, key: str) -> bool:
        """Whether a key has a value for each layer."""
        return isinstance(self.metadata.get(f"{self.arch}.{key}"), list | np.ndarray)

    def has(self, key: str) -> bool:
        return f"{self.arch}.{key}" in self.metadata

    def head_length(self, key: str, heads: int) -> int:
        return self.number(key, self.number("embedding_length", 0) // heads if heads else 0)


class _Layers:
    """The caches of one file's layers."""

    def __init__(self, keys: _Keys, stored: int, count: int) -> None:
        self.keys, self.count = keys, count
        self.heads = keys.each("attention.head_count", stored, 0)
        self.kv_heads = (
            keys.each("attention.head_count_kv", stored, 0) if keys.has("attention.head_count_kv") else self.heads
        )
        self.feed_forward = keys.each("feed_forward_length", stored, 0)
        first = self.heads[0]
        # llama.cpp takes the heads of the first layer, even where that one has none
        key, value = (keys.head_length(f"attention.{name}_length", first) for name in ("key", "value"))
        self.lengths = (key, value) if first or keys.has("attention.key_length") else (0, 0)
        self.sliding_lengths = (
            keys.number("attention.key_length_swa", self.lengths[0]),
            keys.number("attention.value_length_swa", self.lengths[1]),
        )
        self.latent = keys.number("attention.key_length_mla", 0) > 0
        self.window, self.slides = self._sliding()
        self.state = self._state()
        self.indexer = keys.number("attention.indexer.key_length", 0) if keys.arch in SPARSE else 0
        self.indexers = self._indexers()
        self.own = self._own()

    def _sliding(self) -> tuple[int | None, list[bool]]:
        """The window, and for each layer whether it slides."""
        keys, rule = self.keys, WINDOWS.get(self.keys.arch)
        none = [False] * self.count
        if keys.arch in ("lfm2", "lfm2moe"):
            window = keys.number("attention.sliding_window", 0) if keys.arch == "lfm2" else 0
            return (window, [heads > 0 for heads in self.kv_heads[: self.count]]) if window else (None, none)
        if rule is None or (rule.layers is not None and rule.layers != self.count):
            return None, none
        window = keys.number("attention.sliding_window", rule.default or 0)
        if rule.fixed and rule.default and (window or not keys.has("attention.sliding_window")):
            window = rule.default
        if not window:
            return None, none
        pattern = "attention.sliding_window_pattern"
        if keys.listed(pattern):
            return window, [bool(value) for value in keys.each(pattern, self.count, 0)]
        every = keys.number(pattern, rule.every)
        full = 0 if rule.first else every - 1
        return window, [every == 0 or index % every != full for index in range(self.count)]

    def _state(self) -> tuple[int, int]:
        """Elements of (convolution, state) of a recurrent layer (llama-hparams.cpp: n_embd_r, n_embd_s)."""
        keys, hidden, heads = self.keys, self.keys.number("embedding_length", 0), self.heads[0]
        if head := keys.number("wkv.head_size", 0):
            return keys.number("token_shift_count", 2) * hidden, hidden * head
        if length := keys.number("shortconv.l_cache", 0):
            return hidden * (length - 1), 0
        kernel = keys.number("ssm.conv_kernel", 0)
        if head := keys.number("kda.head_dim", 0):
            return 3 * (kernel - 1 if kernel else 3) * heads * head, head * head * heads
        inner, state = keys.number("ssm.inner_size", 0), keys.number("ssm.state_size", 0)
        conv = max(kernel - 1, 0) * (inner + 2 * keys.number("ssm.group_count", 0) * state)
        if keys.arch == "minimax-01":
            return conv, self.lengths[0] ** 2 * heads
        return conv, state * inner

    def _indexers(self) -> list[bool]:
        """For each layer of sparse attention whether it has an indexer of its own."""
        keys, key = self.keys, "attention.indexer.types"
        if keys.arch == "glm-dsa" and keys.has(key):
            return [bool(value) for value in keys.each(key, self.count, 1)]
        return [True] * self.count

    def _own(self) -> int:
        """Layers from this one on keep nothing of their own."""
        shared = self.keys.number("attention.shared_kv_layers", 0)
        return self.count - shared if self.keys.arch == "gemma4" else SHARED_FROM.get(self.keys.arch, self.count)

    def _recurs(self, index: int) -> bool:
        mix, default = HYBRID.get(self.keys.arch, (None, 0))
        if mix == "no kv heads":
            return self.kv_heads[index] == 0
        if mix == "no kv heads, no ff":
            return self.kv_heads[index] == 0 and self.feed_forward[index] == 0
        if mix == "interval":
            if self.keys.listed("attention.recurrent_layers"):
                return bool(self.keys.each("attention.recurrent_layers", self.count, 0)[index])
            return (index + 1) % max(self.keys.number("full_attention_interval", default), 1) != 0
        return self.keys.arch in RECURRENT

    def layer(self, index: int) -> LayerCache:
        arch, kv_heads = self.keys.arch, self.kv_heads[index]
        if arch in CACHELESS:
            return LayerCache("none")
        if index >= self.own:
            return LayerCache("shared")
        conv, state = self.state
        if self._recurs(index):
            return LayerCache("recurrent", state=conv + state, conv=conv)
        if arch.startswith("nemotron_h") and self.feed_forward[index]:
            return LayerCache("none")
        slides = self.slides[index]
        key, value = self.sliding_lengths if slides else self.lengths
        if self.latent:
            indexer = self.indexer if self.indexers[index] else 0
            mla = self.keys.number("attention.key_length_mla", 0), self.keys.number("attention.value_length_mla", 0)
            wide = (self.heads[index] * mla[0], self.heads[index] * mla[1])
            return LayerCache("latent", keys=key * kv_heads, indexer=indexer, expanded=wide)
        if not kv_heads:
            return LayerCache("none")
        plain = LayerCache("attention", keys=key * kv_heads, values=value * kv_heads)
        if arch == "falcon-h1":
            return replace(plain, kind="parallel", state=conv + state, conv=conv)
        if not slides:
            return plain
        rule = WINDOWS.get(arch)
        kind: Kind = "chunked" if rule is not None and rule.chunked else "sliding"
        return replace(plain, kind=kind, window=self.window)
