"""The layer table of a config.json: what transformers' configuration classes mean by it, in the terms of `shape`.

Source: transformers 5.23 (2026-10), configuration_*.py for names and defaults, cache_utils.py for which layers cache
what. Sizes of recurrent states are llama.cpp's, which are those of the models' papers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fewbits import arch
from fewbits.errors import FewbitsError
from fewbits.memory.gguf_shape import MOST_LAYERS, WINDOWS
from fewbits.memory.shape import LayerCache, ModelShape

GGUF_NAMES: dict[str, str] = {
    **{family.model_type: family.gguf for family in arch.FAMILIES},
    "apertus": "apertus", "arcee": "arcee", "cohere": "command-r", "cohere2": "cohere2", "dbrx": "dbrx",
    "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "deepseek_v32": "deepseek32", "dots1": "dots1",
    "ernie4_5": "ernie4_5", "ernie4_5_moe": "ernie4_5-moe", "exaone4": "exaone4", "falcon": "falcon",
    "falcon_h1": "falcon-h1", "falcon_mamba": "mamba", "gemma": "gemma", "gemma3n_text": "gemma3n",
    "gemma4_text": "gemma4", "glm4": "glm4", "glm4_moe": "glm4moe", "glm4_moe_lite": "deepseek2",
    "glm_moe_dsa": "glm-dsa", "gpt_neox": "gptneox", "gpt_oss": "gpt-oss", "granite": "granite",
    "granitemoe": "granitemoe", "granitemoehybrid": "granitehybrid", "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe", "jamba": "jamba", "kimi_k2": "deepseek2", "kimi_linear": "kimi-linear",
    "lfm2": "lfm2", "lfm2_moe": "lfm2moe", "llama4_text": "llama4", "mamba": "mamba", "mamba2": "mamba2",
    "minicpm3": "minicpm3", "minimax": "minimax-01", "minimax_m2": "minimax-m2", "nemotron": "nemotron",
    "nemotron-nas": "deci", "nemotron_h": "nemotron_h", "olmo": "olmo", "olmo2": "olmo2", "olmo3": "olmo2",
    "olmoe": "olmoe", "phi": "phi2", "phimoe": "phimoe", "qwen2_moe": "qwen2moe", "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe", "qwen3_next": "qwen3next", "seed_oss": "seed_oss", "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}  # fmt: skip
"""``model_type`` -> ``general.architecture``, where llama.cpp's converter makes a GGUF of it."""
SAME_AS = {"kimi_k2": "deepseek_v3"}
"""``model_type`` that stands for another model's architecture."""
NO_OPERATION = ("moe", "mlp")
RECURRENT = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "lightning_attention", "linear")
CHUNKED, SLIDING = "chunked_attention", "sliding_attention"
CACHES = ("full_attention", "attention", "hybrid", "indexed_attention", "global", CHUNKED, SLIDING)

INNER = (
    ("mamba_num_heads", "mamba_head_dim"), ("mamba_n_heads", "mamba_d_head"), ("mamba_d_ssm",),
    ("linear_num_value_heads", "linear_value_head_dim"), ("num_heads", "head_dim"), ("mamba_intermediate_size",),
)  # fmt: skip
"""Names whose product is the width of a recurrent layer."""
GROUPS = ("mamba_n_groups", "linear_num_key_heads", "n_groups")
STATE = ("mamba_d_state", "ssm_state_size", "linear_key_head_dim", "state_size")
KERNEL = ("mamba_d_conv", "conv_kernel", "linear_conv_kernel_dim")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_USED = ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "num_experts_per_token")
EXPERT_WIDTH = ("moe_intermediate_size", "ffn_hidden_size", "intermediate_size")
UNGROUPED = ("mamba", "falcon_mamba", "jamba")
"""Mamba's first kind: its convolution sees the width alone."""


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json."""
    inner = next((config[key] for key in ("text_config", "llm_config", "language_config") if config.get(key)), None)
    if not isinstance(inner, Mapping):
        return dict(config)
    kept = {key: config[key] for key in ("tie_word_embeddings", "torch_dtype", "dtype") if key in config}
    return {**kept, **inner}


def load_config(config: Mapping[str, Any]) -> Any | None:
    """transformers' configuration object of the language model, or None for a model type that it does not know.

    Raises:
        FewbitsError: values that transformers refuses.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = text_config(config)
    kind = values.pop("model_type", None)
    kind = SAME_AS.get(str(kind), kind)
    if kind not in CONFIG_MAPPING:
        return None
    for name in ("auto_map", "quantization_config", "compression_config"):
        values.pop(name, None)
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:  # validators of any of 200 classes may raise anything
        reason = " ".join(str(error).split())[:200]
        raise FewbitsError(f"config.json: transformers refuses it ({reason}).", "Fetch the file again.") from None
    finally:
        logger.setLevel(level)


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The sizes of the language model that a config.json describes.

    Raises:
        FewbitsError: sizes that are missing or cannot be.
    """
    loaded = load_config(config)
    raw = text_config(config)
    values = _Values(raw if loaded is None else _complete(loaded), str(raw.get("model_type", "(none)")))
    count = values.number("num_hidden_layers", "n_layer", "num_layers", most=MOST_LAYERS)
    blocks = raw.get("block_configs")
    known = loaded is not None or isinstance(blocks, list)
    if isinstance(blocks, list) and len(blocks) == count:
        layers = tuple(_searched(values, block) for block in blocks)
    else:
        # what an unknown architecture does with its windows is unknown: for a bound nothing slides
        kinds = _kinds(values, count) if known else ["full_attention"] * count
        known = known and all(kind in (*CACHES, *RECURRENT, *NO_OPERATION) for kind in kinds)
        own = count - values.number("num_kv_shared_layers", missing=0)
        layers = tuple(
            LayerCache("shared") if index >= own else _layer(values, kind, index) for index, kind in enumerate(kinds)
        )
    heads = values.number("num_attention_heads", "n_head", missing=0)
    experts = values.number(*EXPERTS, missing=0)
    latent = _latent(values, heads)
    hidden = values.number("hidden_size", "n_embd", "d_model")
    key = latent[2] if latent else values.number("head_dim", missing=hidden // heads if heads else 0)
    wide = max((layer.keys + layer.values for layer in layers), default=0)
    feed_forward = values.number("intermediate_size", "n_inner", "ffn_dim", missing=4 * hidden)
    name = values.kind
    return ModelShape(
        architecture=name,
        layers=layers,
        stored_layers=count,
        hidden=hidden,
        vocabulary=values.number("vocab_size"),
        context_length=values.number("max_position_embeddings", "n_positions", "n_ctx", missing=0),
        heads=heads,
        queries=heads * key if latent or not wide else max(heads * key, *(layer.keys for layer in layers)),
        feed_forward=feed_forward,
        experts=experts,
        experts_used=values.number(*EXPERTS_USED, missing=0) if experts else 0,
        expert_width=values.number(*EXPERT_WIDTH, missing=0) if experts else 0,
        latent=latent,
        inner=_inner(values),
        per_layer=count * values.number("hidden_size_per_layer_input", missing=0),
        certain=known,
        notes=() if known else (f"unknown architecture {name}: a bound, as if every layer kept everything",),
    )


def as_llama_cpp(shape: ModelShape) -> ModelShape:
    """The same model as llama.cpp keeps it: it has no use for the windows of some architectures."""
    name = GGUF_NAMES.get(shape.architecture)
    if name is None:
        note = f"llama.cpp has no name for {shape.architecture} models that is known here"
        return replace(shape, notes=(*shape.notes, note), certain=False)
    if name in WINDOWS or name == "lfm2":
        return shape
    return replace(shape, layers=tuple(layer.without_window() for layer in shape.layers))


@dataclass(frozen=True)
class _Values:
    """Numbers of a configuration by any of the names they have, refused where they cannot be."""

    config: Mapping[str, Any]
    kind: str

    def number(self, *names: str, missing: int | None = None, most: int = 2**32) -> int:
        for name in names:
            value = self.config.get(name)
            if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
                value = max(value)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                raise FewbitsError(f"The configuration's {name} is {value!r}, which it cannot be.")
            return value
        if missing is None:
            raise FewbitsError(f"The configuration lacks {names[0]}.")
        return missing

    def of_layer(self, name: str, index: int, missing: int) -> int:
        """A value that may differ from layer to layer (Gemma 4's ``per_layer_config``)."""
        layers = self.config.get("per_layer_config")
        if isinstance(layers, Mapping):
            own = layers.get(f"{index:02}", layers.get(str(index)))
            if isinstance(own, Mapping) and isinstance(own.get(name), int):
                return int(own[name])
        return self.number(name, missing=missing)


def _complete(loaded: Any) -> dict[str, Any]:
    """Everything a configuration object says, under all of its names."""
    values = dict(loaded.to_dict())
    for name, own in getattr(loaded, "attribute_map", {}).items():
        values.setdefault(name, values.get(own))
    for name in ("layer_types", "layers_block_type", "num_hidden_layers", "head_dim", "num_key_value_heads"):
        if values.get(name) is None and (found := getattr(loaded, name, None)) is not None:
            values[name] = found
    return values


def _kinds(values: _Values, count: int) -> Sequence[str]:
    """What each layer is, in transformers' words."""
    config = values.config
    listed = config.get("layer_types") or config.get("layers_block_type")
    if listed and isinstance(listed, list | tuple) and len(listed) == count:
        return [str(kind) for kind in listed]
    if values.kind in ("mamba", "mamba2", "falcon_mamba", "rwkv"):
        return ["mamba"] * count
    if values.kind == "falcon_h1":
        return ["hybrid"] * count
    slides = config.get("sliding_window") and config.get("use_sliding_window", True)
    return [SLIDING if slides else "full_attention"] * count


def _layer(values: _Values, kind: str, index: int) -> LayerCache:
    if kind in NO_OPERATION:
        return LayerCache("none")
    state = _state(values, kind)
    if kind in RECURRENT:
        return LayerCache("recurrent", state=sum(state), conv=state[0])
    heads = values.number("num_attention_heads", "n_head")
    if (latent := _latent(values, heads)) and values.kind != "minicpm3":
        _, with_rope, key, value = latent
        indexer = values.number("index_head_dim", missing=0) if kind == "indexed_attention" else 0
        return LayerCache("latent", keys=with_rope, indexer=indexer, expanded=(heads * key, heads * value))
    if latent:
        return LayerCache("attention", keys=heads * latent[2], values=heads * latent[3])
    hidden = values.number("hidden_size", "n_embd", "d_model")
    length = values.of_layer("head_dim", index, hidden // heads)
    kv_heads = values.of_layer("num_key_value_heads", index, heads)
    full = kind not in (SLIDING, CHUNKED)
    if full and values.number("global_head_dim", missing=0):
        length = values.number("global_head_dim")
    if full and values.number("num_global_key_value_heads", missing=0):
        kv_heads = values.number("num_global_key_value_heads")
    value = values.number("v_head_dim", missing=length)
    plain = LayerCache("attention", keys=length * kv_heads, values=value * kv_heads)
    if kind == "hybrid":
        return replace(plain, kind="parallel", state=sum(state), conv=state[0])
    if kind == SLIDING:
        return replace(plain, kind="sliding", window=values.number("sliding_window"))
    if kind == CHUNKED:
        return replace(plain, kind="chunked", window=values.number("attention_chunk_size"))
    return plain


def _searched(values: _Values, block: Any) -> LayerCache:
    """A block of a model that an architecture search made (Nemotron): some have no attention."""
    attention = block.get("attention") if isinstance(block, Mapping) else None
    if not isinstance(attention, Mapping):
        raise FewbitsError("config.json: an entry of block_configs has no attention.", "Fetch the file again.")
    sharing = attention.get("n_heads_in_group")
    if attention.get("no_op") or attention.get("replace_with_linear") or not sharing:
        return LayerCache("none")
    heads = values.number("num_attention_heads")
    size = values.number("head_dim", missing=values.number("hidden_size") // heads) * (heads // int(sharing))
    return LayerCache("attention", keys=size, values=size)


def _latent(values: _Values, heads: int) -> tuple[int, int, int, int] | None:
    """Of MLA: the latent vector without and with its rotary part, a key and a value before compression."""
    rank = values.number("kv_lora_rank", missing=0)
    if not rank or not heads:
        return None
    rope = values.number("qk_rope_head_dim", missing=0)
    return rank, rank + rope, values.number("qk_nope_head_dim", missing=0) + rope, values.number("v_head_dim")


def _inner(values: _Values) -> int:
    for names in INNER:
        if all(isinstance(values.config.get(name), int) for name in names):
            if names == ("num_heads", "head_dim") and values.kind != "mamba2":
                continue
            product = 1
            for name in names:
                product *= values.number(name)
            return product
    if values.kind in ("mamba", "falcon_mamba"):
        return values.number("intermediate_size")
    expand = values.number("mamba_expand", missing=0)
    return expand * values.number("hidden_size", missing=0)


def _state(values: _Values, kind: str) -> tuple[int, int]:
    """Elements of (convolution, state) of a recurrent layer."""
    hidden = values.number("hidden_size", missing=0)
    if length := values.number("conv_L_cache", missing=0):
        return hidden * (length - 1), 0
    linear = values.config.get("linear_attn_config")
    if isinstance(linear, Mapping):
        width, heads = int(linear.get("head_dim", 0)), int(linear.get("num_heads", 0))
        kernel = int(linear.get("short_conv_kernel_size", 4))
        return 3 * (kernel - 1) * width * heads, width * width * heads
    if values.kind == "minimax" and kind in RECURRENT:
        width = values.number("head_dim", missing=0)
        return 0, width * width * values.number("num_attention_heads")
    inner, state = _inner(values), values.number(*STATE, missing=0)
    groups = 0 if values.kind in UNGROUPED else values.number(*GROUPS, missing=1)
    kernel = values.number(*KERNEL, missing=0)
    return max(kernel - 1, 0) * (inner + 2 * groups * state), inner * state
