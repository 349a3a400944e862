"""What a plan knows of a model before a weight is read: tensors by name and shape, and what each one does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from fewbits.errors import FewbitsError


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the model to be quantized.

    Attributes:
        name: GGUF name, e.g. `blk.0.attn_q.weight`.
        shape: row-major: the last axis is ggml's ne0, stacked experts are [experts, out, in].
        dtype: its type before quantization: that of the GGUF file it comes from, or what `converted_dtype` says.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ModelFacts:
    """What the choice depends on besides the tensors.

    Attributes:
        arch: `general.architecture`.
        n_layer: `block_count`, layers for multi-token prediction included.
        n_head, n_head_kv: of the first layer.
        n_expert: 0 for a dense model.
    """

    arch: str
    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ModelFacts:
        """Read the facts from GGUF metadata; missing ones count as llama.cpp counts them.

        Raises:
            FewbitsError: there is no architecture, or a value is not a number.
        """
        arch = metadata.get("general.architecture")
        if not isinstance(arch, str) or not arch:
            raise FewbitsError("The metadata has no general.architecture.", "Give a model, not a projector or adapter.")

        def number(key: str, missing: int) -> int:
            value = metadata.get(f"{arch}.{key}", missing)
            if hasattr(value, "__len__") and not isinstance(value, str | bytes):  # one value a layer
                value = value[0] if len(value) else missing
            try:
                return int(value)
            except (TypeError, ValueError):
                raise FewbitsError(f"The metadata's {arch}.{key} is {value!r}, not a number.") from None

        n_head = number("attention.head_count", 0)
        return cls(
            arch=arch,
            n_layer=number("block_count", 0),
            n_head=n_head,
            n_head_kv=number("attention.head_count_kv", n_head),
            n_expert=number("expert_count", 0),
        )

    @property
    def gqa(self) -> int:
        """Query heads that share a key-value head."""
        return self.n_head // self.n_head_kv if self.n_head_kv else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp calls the model "70B", from its depth alone but for llama's."""
        if self.arch in ("llama", "llama-embed"):
            return self.n_layer == 80 and self.n_head != self.n_head_kv and self.n_expert != 8
        return (self.arch, self.n_layer) in {("qwen2", 80), ("deci", 80), ("olmo", 80), ("jais2", 68)}


VALUE, KEY, QUERY, ATTN_OUT = "value", "key", "query", "attention output"
DOWN, GATE, UP = "down", "gate", "up"
OUTPUT, EMBEDDING, OTHER = "output", "embedding", "other"

EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_ROLE_MARKS = (  # the first mark found in the name decides
    ("attn_qkv.weight", VALUE),
    ("attn_kv_b.weight", VALUE),
    ("attn_v.weight", VALUE),
    ("attn_k.weight", KEY),
    ("attn_q.weight", QUERY),
    ("attn_output.weight", ATTN_OUT),
    ("ffn_up", UP),
    ("ffn_gate", GATE),
    ("ffn_down", DOWN),
)

_NEVER = (  # marks of tensors that are too small or too sensitive, or that llama.cpp's operators take as floats only
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight"),
    *(".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger"),
    *("a.rvq.codebook", "mm.a.code_embd"),
    *(f"time_mix_{part}.weight" for part in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2")),
    *(f"time_mix_{part}.weight" for part in ("g1", "g2", "decay_w1", "decay_w2", "lerp_fused")),
)
_NEVER_NAMES = ("position_embd.weight", "token_types.weight")
_NEVER_OF_ARCH = {
    "glm5-next": (
        *("hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate"),
        *("indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight"),
        *("ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight"),
    )
}
Q8_OF_ARCH = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}


def role(name: str) -> str:
    """What a tensor does, as far as the mixture cares."""
    if name == "output.weight":
        return OUTPUT
    if name in EMBEDDINGS:
        return EMBEDDING
    return next((what for mark, what in _ROLE_MARKS if mark in name), OTHER)


def quantizable(name: str, shape: tuple[int, ...], arch: str = "") -> bool:
    """Whether llama.cpp ever quantizes this tensor (row-major shape)."""
    if not name.endswith("weight") or name in _NEVER_NAMES or prod(shape[:-1]) <= 1:
        return False
    return not any(mark in name for mark in (*_NEVER, *_NEVER_OF_ARCH.get(arch, ())))


def layer_of(name: str) -> int:
    """The layer number in a name, -1 where there is none."""
    found = re.match(r"blk\.(\d{1,6})(?!\d)", name)
    return int(found[1]) if found else -1


_FLOAT32_STEMS = frozenset(  # names without `blk.N.` and `.weight`
    {
        *("ffn_gate_inp", "ffn_gate_inp_shexp", "position_embd", "token_types", "v.position_embd", "a.position_embd"),
        *("ssm_conv1d", "ssm_conv1d_q", "ssm_conv1d_k", "ssm_conv1d_v", "shortconv.conv", "indexer.proj"),
        *("time_mix_first", "time_mix_w1", "time_mix_w2", "time_mix_decay_w1", "time_mix_decay_w2"),
        *("time_mix_lerp_fused", "altup_correct_coef", "altup_predict_coef"),
    }
)
_FLOAT32_OF_ARCH = {  # where the converter of one architecture adds to the list
    "glm5-next": ("hc_attn_", "hc_ffn_", "indexer_compressor_", "ssm_a", "ssm_dt", "exp_probs_b"),
    "minimax-m3": (".indexer.",),
}
_CONVERTED = {"F16": "F16", "F32": "F32", "F64": "F32", "BF16": "BF16"}


def converted_dtype(gguf_name: str, shape: tuple[int, ...], source_dtype: str, arch: str) -> str:
    """The type that llama.cpp's converter writes a Hugging Face tensor in (`conversion/base.py`).

    Vectors, norms, routers, convolutions and position tables become F32; the others keep their type, where it is one
    that GGUF has: F64 becomes F32, and everything packed or 8-bit is unpacked to BF16.

    Args:
        gguf_name: name in the GGUF file.
        shape: row-major.
        source_dtype: e.g. `BF16`, `F8_E4M3`.
        arch: `general.architecture`.
    """
    name = re.sub(r"^blk\.\d+\.", "", gguf_name)
    if len(shape) <= 1 or name.endswith("_norm.weight"):
        return "F32"
    kept = _CONVERTED.get(source_dtype.upper(), "BF16")
    if arch == "dbrx":  # its converter keeps the router in the outtype
        return kept
    if not name.endswith((".weight", ".lora_a", ".lora_b")):
        return "F32"
    if name.removesuffix(".weight") in _FLOAT32_STEMS or re.fullmatch(r"posnet\.\d+\.norm[12]\.weight", name):
        return "F32"
    if any(mark in gguf_name for mark in _FLOAT32_OF_ARCH.get(arch, ())):
        return "F32"
    return kept
