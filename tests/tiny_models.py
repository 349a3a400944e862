"""Tiny random models of every supported family, as Hugging Face directories that transformers itself wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VOCAB = 288
END = "<|endoftext|>"
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("an", "d"), ("Ġ", "and"), ("e", "r")]
WINDOW = 24
"""Sliding window of the families that have one: much shorter than the sequences that tests feed."""

_BASE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": None,
}  # fmt: skip
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": WINDOW, "num_hidden_layers": 3}
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0,
    "long_factor": [1.0, 1.1, 1.3, 1.7, 2.5, 4.0, 6.0, 8.0],
    "short_factor": [1.0, 1.0, 1.05, 1.1, 1.2, 1.4, 1.6, 2.0],
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """One tiny model: transformers' configuration class, and what differs from `_BASE`."""

    config: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=lambda: _BASE)


TINY: dict[str, Tiny] = {
    "llama": Tiny("LlamaConfig"),
    "llama-tied": Tiny("LlamaConfig", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama-bias": Tiny("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": Tiny(
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
            }
        },
    ),
    "llama-linear": Tiny("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-yarn": Tiny(
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128,
            }
        },
    ),
    "mistral": Tiny("MistralConfig", {"sliding_window": None, "head_dim": 32}),
    "mixtral": Tiny("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": Tiny("SmolLM3Config", {"num_hidden_layers": 5}),
    "qwen2": Tiny("Qwen2Config"),
    "qwen2-yarn": Tiny(
        "Qwen2Config",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128,
                "attention_factor": 1.3,
            },
        },
    ),
    "qwen3": Tiny("Qwen3Config", {"head_dim": 32}),
    "qwen3-moe": Tiny(
        "Qwen3MoeConfig",
        {
            "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
    ),
    "gemma2": Tiny("Gemma2Config", {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}),
    "gemma3": Tiny(
        "Gemma3TextConfig",
        {
            **_GEMMA, "num_hidden_layers": 6,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
    ),
    "gemma3-pattern": Tiny(
        "Gemma3TextConfig", {**_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    ),
    "phi3": Tiny("Phi3Config", {"original_max_position_embeddings": 512}),
    "phi3-long": Tiny(
        "Phi3Config",
        {
            "rope_parameters": {**_LONGROPE, "original_max_position_embeddings": 32},
            "original_max_position_embeddings": 32,
        },
    ),
    "phi3-short": Tiny(
        "Phi3Config",
        {
            "rope_parameters": {**_LONGROPE, "original_max_position_embeddings": 512},
            "original_max_position_embeddings": 512, "max_position_embeddings": 4096,
        },
    ),
    "bitnet": Tiny("BitNetConfig", {"hidden_act": "silu", "tie_word_embeddings": True}),
    "gpt2": Tiny(
        "GPT2Config",
        base={
            "vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
}  # fmt: skip
"""Every family and what is special in it."""


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of GPT-2's kind: one control token, 256 bytes, a few merges."""
    pieces = [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]
    bpe = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=MERGES))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, unk_token=END)


def tiny_model(name: str, changes: Mapping[str, Any] | None = None, seed: int = 0) -> transformers.PreTrainedModel:
    """A random float32 model.

    Weights are drawn anew, much wider than transformers does, so that attention is far from uniform and every norm and
    bias matters: an error in any of them shows in the logits.

    Args:
        name: a key of `TINY`.
        changes: further configuration values.
    """
    tiny = TINY[name]
    config = getattr(transformers, tiny.config)(**{**tiny.base, **tiny.changes, **(changes or {})})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.add_(0.3 * noise)
            else:
                embedding = "embed" in key or ".wte." in key
                weight.copy_(noise * (0.5 if embedding else 1.5 * weight.shape[-1] ** -0.5))
    return model


def save_tiny(directory: Path, name: str, changes: Mapping[str, Any] | None = None, seed: int = 0) -> Path:
    """Write config.json, model.safetensors (float32) and a tokenizer to `directory`, and give it back."""
    tiny_model(name, changes, seed).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
