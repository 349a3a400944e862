"""What the supported model families look like, in Hugging Face files and in GGUF files: data, and lookups into it.

Facts come from transformers' configuration classes, and from llama.cpp's converter and model loaders
(read at 0c1e57098).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fewbits.errors import FewbitsError

Kind = Literal["embedding", "position", "head", "norm", "linear", "router"]
Change = Literal["copy", "rope_q", "rope_k", "plus_one", "transpose"]


@dataclass(frozen=True)
class Fused:
    """Where transformers' in-memory layout keeps the same weights of all experts: `name` [experts, parts * out, in]."""

    name: str
    part: int
    parts: int


@dataclass(frozen=True)
class Role:
    """One kind of tensor.

    Attributes:
        hf: Hugging Face module name, relative to the block where it is a block's; ``{e}`` stands for the expert.
        gguf: GGUF name without ``.weight``, relative to the block likewise.
        kind: what it is to a quantizer.
        bias: whether a bias comes with it: never, wherever the checkpoint has one, or always.
        change: how HF values become GGUF values. ``rope_q``/``rope_k``: rows of a head go from [half, half] to
            interleaved pairs (llama.cpp rotates neighbours); ``plus_one``: Gemma's norms store weight - 1 in HF;
            ``transpose``: GPT-2's Conv1D stores [in, out].
        also: another HF name that checkpoints use.
        fused: the experts' weights in one tensor, in checkpoints that keep transformers' in-memory layout.
    """

    hf: str
    gguf: str
    kind: Kind
    bias: Literal["no", "maybe", "yes"] = "no"
    change: Change = "copy"
    also: str | None = None
    fused: Fused | None = None

    @property
    def per_expert(self) -> bool:
        return "{e}" in self.hf


@dataclass(frozen=True)
class Key:
    """One GGUF metadata key ``<arch>.<gguf>`` and the config.json names of the same value, the first one preferred.

    Attributes:
        real: a float32, else a uint32.
        required: whether it must have a value.
        null: the number that stands for config.json's null, if there is one.
    """

    gguf: str
    hf: tuple[str, ...]
    real: bool = False
    required: bool = True
    null: int | None = None


@dataclass(frozen=True)
class ScalePair:
    """Where a per-channel scale can move without changing the function: out of `source`, into all of `targets`.

    Attributes:
        source: block-relative HF module: a norm, or a linear whose output channels feed the targets one to one (of
            fused matrices the last ones: v of q, k, v; up of gate, up).
        targets: block-relative HF linears whose input channels are scaled.
        grouped: source is v_proj with fewer heads than o_proj has inputs (grouped-query attention): the query heads
            of one key/value head must share the scale.
    """

    source: str
    targets: tuple[str, ...]
    grouped: bool = False


def _nothing_more(config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: short name.
        architecture: ``architectures[0]`` of config.json.
        model_type: ``model_type`` of config.json.
        gguf: ``general.architecture`` of a GGUF file.
        roles: tensors outside the blocks.
        block_roles: tensors of every block.
        keys: metadata.
        defaults: what config.json means where it does not say.
        fixed: what llama.cpp computes whatever the configuration says: config key -> the values it is right for.
        implied: further values of the same kind that depend on others.
        rope_types: kinds of RoPE scaling that llama.cpp computes for this family.
        rope_local: whether layers with a sliding window have a RoPE base of their own.
        rope_dims: whether ``rope.dimension_count`` is written.
        swa_every: every so many-th layer attends to everything, the others to a sliding window; None if no layer does.
        bias_flags: config key -> the GGUF tensor whose presence tells its value.
        block: prefix of a block's HF names.
        base: prefix of the HF names that some checkpoints leave out.
        dropped: endings of HF tensor names that are buffers, not weights.
        groups: block-relative HF linears that engines fuse, so that they must share one quantization scheme.
        pairs: where activation-aware scaling can put its scales.
    """

    name: str
    architecture: str
    model_type: str
    gguf: str
    roles: tuple[Role, ...]
    block_roles: tuple[Role, ...]
    keys: tuple[Key, ...]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]]
    implied: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing_more
    rope_types: tuple[str, ...] = ("default", "dynamic", "linear", "yarn")
    rope_local: bool = False
    rope_dims: bool = False
    swa_every: int | None = None
    bias_flags: Mapping[str, str] = field(default_factory=dict)
    block: str = "model.layers.{i}."
    base: str = ""
    dropped: tuple[str, ...] = (".rotary_emb.inv_freq",)
    groups: tuple[tuple[str, ...], ...] = ()
    pairs: tuple[ScalePair, ...] = ()

    @property
    def moe(self) -> bool:
        return any(role.per_expert for role in self.block_roles)

    def key(self, gguf: str) -> str:
        """The preferred config.json name of ``<arch>.<gguf>``."""
        return next(key.hf[0] for key in self.keys if key.gguf == gguf)


# ---------------------------------------------------------------------------------------------------- shared parts

_EMBEDDING = Role("model.embed_tokens", "token_embd", "embedding")
_HEAD = Role("lm_head", "output", "head")
_ROLES = (_EMBEDDING, Role("model.norm", "output_norm", "norm"), _HEAD)
_ROLES_PLUS_ONE = (_EMBEDDING, Role("model.norm", "output_norm", "norm", change="plus_one"), _HEAD)


def _attention(bias: Literal["no", "maybe", "yes"], out_bias: Literal["no", "maybe"], rotate: bool) -> tuple[Role, ...]:
    return (
        Role("self_attn.q_proj", "attn_q", "linear", bias, "rope_q" if rotate else "copy"),
        Role("self_attn.k_proj", "attn_k", "linear", bias, "rope_k" if rotate else "copy"),
        Role("self_attn.v_proj", "attn_v", "linear", bias),
        Role("self_attn.o_proj", "attn_output", "linear", out_bias),
    )


def _mlp(bias: Literal["no", "maybe"] = "no") -> tuple[Role, ...]:
    return (
        Role("mlp.gate_proj", "ffn_gate", "linear", bias),
        Role("mlp.up_proj", "ffn_up", "linear", bias),
        Role("mlp.down_proj", "ffn_down", "linear", bias),
    )


def _experts(module: str, gate: str, up: str, down: str) -> tuple[Role, ...]:
    both, one = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    return (
        Role(f"{module}.gate", "ffn_gate_inp", "router", also="mlp.gate"),
        Role(f"{module}.experts.{{e}}.{gate}", "ffn_gate_exps", "linear", fused=Fused(both, 0, 2)),
        Role(f"{module}.experts.{{e}}.{up}", "ffn_up_exps", "linear", fused=Fused(both, 1, 2)),
        Role(f"{module}.experts.{{e}}.{down}", "ffn_down_exps", "linear", fused=Fused(one, 0, 1)),
    )


def _norms(change: Change, **names: str) -> tuple[Role, ...]:
    return tuple(Role(hf, gguf, "norm", change=change) for gguf, hf in names.items())


_NORMS = _norms("copy", attn_norm="input_layernorm", ffn_norm="post_attention_layernorm")
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

_KEYS = (
    Key("block_count", ("num_hidden_layers",)),
    Key("context_length", ("max_position_embeddings",)),
    Key("embedding_length", ("hidden_size",)),
    Key("feed_forward_length", ("intermediate_size",)),
    Key("attention.head_count", ("num_attention_heads",)),
    Key("attention.head_count_kv", ("num_key_value_heads",)),
    Key("attention.layer_norm_rms_epsilon", ("rms_norm_eps",), real=True),
    Key("vocab_size", ("vocab_size",), required=False),
)
_HEAD_DIM = (Key("attention.key_length", ("head_dim",)), Key("attention.value_length", ("head_dim",)))
_WINDOW = (Key("attention.sliding_window", ("sliding_window",)),)
_FINAL_CAP = (Key("final_logit_softcapping", ("final_logit_softcapping",), real=True, required=False),)

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_VALUE_OUT = ScalePair("self_attn.v_proj", ("self_attn.o_proj",), grouped=True)
_UP_DOWN = ScalePair("mlp.up_proj", ("mlp.down_proj",))
_GROUPS = (_QKV, _GATE_UP)
_PAIRS = (
    ScalePair("input_layernorm", _QKV),
    _VALUE_OUT,
    ScalePair("post_attention_layernorm", _GATE_UP),
    _UP_DOWN,
)


def _moe_pairs(module: str, gate: str, up: str, down: str) -> tuple[ScalePair, ...]:
    expert = f"{module}.experts.{{e}}."
    return (
        ScalePair("input_layernorm", _QKV),
        _VALUE_OUT,
        ScalePair("post_attention_layernorm", (f"{module}.gate", expert + gate, expert + up)),
        ScalePair(expert + up, (expert + down,)),
    )


# ------------------------------------------------------------ conditions that llama.cpp's graphs take for granted


def _attention_scale(layers_of_27b: int) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    def implied(config: Mapping[str, Any]) -> dict[str, Any]:
        if config["num_hidden_layers"] == layers_of_27b:
            return {"query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]}
        return {"query_pre_attn_scalar": config["head_dim"]}

    return implied


def _rope_in_three_of_four(config: Mapping[str, Any]) -> dict[str, Any]:
    layers = range(config["num_hidden_layers"])
    return {"no_rope_layer_interval": 4, "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in layers]}


def _no_dense_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"mlp_only_layers": [], "decoder_sparse_step": 1}


# ------------------------------------------------------------------------------------------------------- the table

_SILU = {"hidden_act": ("silu",)}
_GELU = {"hidden_activation": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False, None)}

_LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    gguf="llama",
    roles=_ROLES,
    block_roles=(*_NORMS, *_attention("maybe", "maybe", rotate=True), *_mlp("maybe")),
    keys=_KEYS + _HEAD_DIM,
    defaults={"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000.0},
    fixed=_SILU,
    rope_types=("default", "dynamic", "linear", "yarn", "llama3"),
    rope_dims=True,
    bias_flags={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"},
    groups=_GROUPS,
    pairs=_PAIRS,
)

_MISTRAL = replace(
    _LLAMA, name="mistral", architecture="MistralForCausalLM", model_type="mistral", bias_flags={},
    block_roles=(*_NORMS, *_attention("no", "no", rotate=True), *_mlp()),
)  # fmt: skip

_MIXTRAL = replace(
    _MISTRAL,
    name="mixtral",
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    block_roles=(
        *_NORMS, *_attention("no", "no", rotate=True), *_experts("block_sparse_moe", gate="w1", up="w3", down="w2"),
    ),
    keys=(
        *_KEYS,
        *_HEAD_DIM,
        Key("expert_count", ("num_local_experts", "num_experts")),
        Key("expert_used_count", ("num_experts_per_tok",)),
    ),
    defaults={
        **_MISTRAL.defaults,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    groups=(_QKV, ("block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3")),
    pairs=_moe_pairs("block_sparse_moe", gate="w1", up="w3", down="w2"),
)  # fmt: skip

_SMOLLM3 = replace(
    _LLAMA,
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    gguf="smollm3",
    block_roles=(*_NORMS, *_attention("maybe", "no", rotate=True), *_mlp()),
    defaults={"tie_word_embeddings": True, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 2e6},
    rope_types=("default", "dynamic", "linear", "yarn"),
    bias_flags={},
    implied=_rope_in_three_of_four,
)

_QWEN2 = replace(
    _LLAMA,
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    gguf="qwen2",
    block_roles=(*_NORMS, *_attention("yes", "no", rotate=False), *_mlp()),
    keys=_KEYS,
    rope_types=("default", "dynamic", "linear", "yarn"),
    rope_dims=False,
    bias_flags={},
)

_QWEN3 = replace(
    _QWEN2,
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    gguf="qwen3",
    block_roles=(*_NORMS, *_norms("copy", **_QK_NORMS), *_attention("no", "no", rotate=False), *_mlp()),
    keys=_KEYS + _HEAD_DIM,
    defaults={**_QWEN2.defaults, "head_dim": 128},
)

_QWEN3_MOE = replace(
    _QWEN3,
    name="qwen3-moe",
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    gguf="qwen3moe",
    block_roles=(
        *_NORMS,
        *_norms("copy", **_QK_NORMS),
        *_attention("no", "no", rotate=False),
        *_experts("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
    keys=(
        *_KEYS,
        *_HEAD_DIM,
        Key("expert_count", ("num_experts", "num_local_experts")),
        Key("expert_used_count", ("num_experts_per_tok",)),
        Key("expert_feed_forward_length", ("moe_intermediate_size",)),
    ),
    defaults={**_QWEN2.defaults, "norm_topk_prob": False, "num_experts": 128, "num_experts_per_tok": 8},
    fixed={**_SILU, "norm_topk_prob": (True,)},
    implied=_no_dense_layers,
    groups=(_QKV, ("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj")),
    pairs=_moe_pairs("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
)

_GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    gguf="gemma2",
    roles=_ROLES_PLUS_ONE,
    block_roles=(*_norms("plus_one", **_SANDWICH_NORMS), *_attention("no", "no", rotate=False), *_mlp()),
    keys=(
        *_KEYS,
        *_HEAD_DIM,
        *_WINDOW,
        Key("attn_logit_softcapping", ("attn_logit_softcapping",), real=True),
        Key("final_logit_softcapping", ("final_logit_softcapping",), real=True),
    ),
    defaults={
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 10000.0,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    fixed={**_GELU, "tie_word_embeddings": (True,)},
    implied=_attention_scale(layers_of_27b=46),
    rope_types=("default", "dynamic"),
    swa_every=2,
    groups=_GROUPS,
    pairs=(
        ScalePair("input_layernorm", _QKV),
        _VALUE_OUT,
        ScalePair("pre_feedforward_layernorm", _GATE_UP),
        _UP_DOWN,
    ),
)

_GEMMA3 = replace(
    _GEMMA2,
    name="gemma3",
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    gguf="gemma3",
    block_roles=(
        *_norms("plus_one", **_SANDWICH_NORMS, **_QK_NORMS),
        *_attention("no", "no", rotate=False),
        *_mlp(),
    ),
    keys=(*_KEYS, *_HEAD_DIM, *_WINDOW, *_FINAL_CAP),
    defaults={
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "vocab_size": 262208,
    },
    fixed={**_GELU, "attn_logit_softcapping": (None,)},
    implied=_attention_scale(layers_of_27b=62),
    rope_types=("default", "linear"),
    rope_local=True,
    swa_every=6,
)

_PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    gguf="phi3",
    roles=_ROLES,
    block_roles=(
        *_NORMS,
        Role("self_attn.qkv_proj", "attn_qkv", "linear"),
        Role("self_attn.o_proj", "attn_output", "linear"),
        Role("mlp.gate_up_proj", "ffn_up", "linear"),
        Role("mlp.down_proj", "ffn_down", "linear"),
    ),
    keys=(*_KEYS, Key("attention.sliding_window", ("sliding_window",), null=0)),
    defaults={"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0},
    fixed=_SILU,
    rope_types=("default", "longrope"),
    rope_dims=True,
    pairs=(
        ScalePair("input_layernorm", ("self_attn.qkv_proj",)),
        ScalePair("self_attn.qkv_proj", ("self_attn.o_proj",), grouped=True),
        ScalePair("post_attention_layernorm", ("mlp.gate_up_proj",)),
        ScalePair("mlp.gate_up_proj", ("mlp.down_proj",)),
    ),
)

_BITNET = replace(
    _QWEN2,
    name="bitnet",
    architecture="BitNetForCausalLM",
    model_type="bitnet",
    gguf="bitnet",
    block_roles=(
        *_NORMS,
        *_norms("copy", attn_sub_norm="self_attn.attn_sub_norm", ffn_sub_norm="mlp.ffn_sub_norm"),
        *_attention("no", "no", rotate=False),
        *_mlp(),
    ),
    defaults={"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "hidden_act": "relu2", "rope_theta": 500000.0},
    # llama.cpp takes the embeddings for the head; 0c1e57098 knows SiLU alone, later ones a key for the activation
    fixed={**_SILU, "tie_word_embeddings": (True,)},
    pairs=(
        ScalePair("input_layernorm", _QKV),
        ScalePair("self_attn.attn_sub_norm", ("self_attn.o_proj",)),
        ScalePair("post_attention_layernorm", _GATE_UP),
        ScalePair("mlp.ffn_sub_norm", ("mlp.down_proj",)),
    ),
)

_GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    gguf="gpt2",
    roles=(
        Role("transformer.wte", "token_embd", "embedding"),
        Role("transformer.wpe", "position_embd", "position"),
        Role("transformer.ln_f", "output_norm", "norm", "yes"),
        _HEAD,
    ),
    block_roles=(
        Role("ln_1", "attn_norm", "norm", "yes"),
        Role("attn.c_attn", "attn_qkv", "linear", "yes", "transpose"),
        Role("attn.c_proj", "attn_output", "linear", "yes", "transpose"),
        Role("ln_2", "ffn_norm", "norm", "yes"),
        Role("mlp.c_fc", "ffn_up", "linear", "yes", "transpose"),
        Role("mlp.c_proj", "ffn_down", "linear", "yes", "transpose"),
    ),
    keys=(
        Key("block_count", ("n_layer", "num_hidden_layers")),
        Key("context_length", ("n_positions", "n_ctx", "max_position_embeddings")),
        Key("embedding_length", ("n_embd", "hidden_size")),
        Key("feed_forward_length", ("n_inner",)),
        Key("attention.head_count", ("n_head", "num_attention_heads")),
        Key("attention.layer_norm_epsilon", ("layer_norm_epsilon",), real=True),
        Key("vocab_size", ("vocab_size",), required=False),
    ),
    defaults={
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
    },
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        "scale_attn_by_inverse_layer_idx": (False, None),
        "scale_attn_weights": (True, None),
        "add_cross_attention": (False, None),
    },
    rope_types=(),
    block="transformer.h.{i}.",
    base="transformer.",
    dropped=(".attn.bias", ".attn.masked_bias"),
    pairs=(ScalePair("ln_1", ("attn.c_attn",)), ScalePair("ln_2", ("mlp.c_fc",))),
)

FAMILIES: tuple[Family, ...] = (
    _LLAMA, _MISTRAL, _MIXTRAL, _SMOLLM3, _QWEN2, _QWEN3, _QWEN3_MOE, _GEMMA2, _GEMMA3, _PHI3, _BITNET,
    _GPT2,
)  # fmt: skip


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face configuration, by ``architectures[0]``.

    Raises:
        FewbitsError: no or an unknown architecture; the message lists the known ones.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        names = ["(none)"]
    for family in FAMILIES:
        if family.architecture == names[0]:
            return family
    known = ", ".join(sorted(family.architecture for family in FAMILIES))
    raise FewbitsError(f"Architecture {names[0]} is not supported.", f"Known: {known}.")


def family_of_gguf(arch: str, experts: int = 0, architecture: str | None = None) -> Family:
    """The family of a GGUF file.

    Args:
        arch: ``general.architecture``. ``llama`` stands for several families with the same tensors.
        experts: ``<arch>.expert_count``.
        architecture: the Hugging Face architecture, where the file says it.

    Raises:
        FewbitsError: unknown; the message lists the known ones.
    """
    found = [family for family in FAMILIES if family.gguf == arch and family.moe == (experts > 0)]
    for family in found:
        if family.architecture == architecture:
            return family
    if found:
        return found[0]
    known = ", ".join(sorted({family.gguf for family in FAMILIES}))
    moe = " with experts" if experts else ""
    raise FewbitsError(f"GGUF architecture {arch}{moe} is not supported.", f"Known: {known}.")
