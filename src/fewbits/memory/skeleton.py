"""Names and shapes of a model's tensors from config.json alone: transformers builds it on torch's meta device.

No weight is made or read. The same tensors under their GGUF names come from `arch` for its families, else from the
name map of the gguf package and the few rules that llama.cpp's converter adds (experts stacked, MLA's decompression in
two parts).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

from fewbits import arch
from fewbits.errors import FewbitsError
from fewbits.memory.config_shape import GGUF_NAMES, load_config
from fewbits.memory.shape import ModelShape
from fewbits.plan import ModelFacts, SourceTensor, converted_dtype

Shapes = dict[str, tuple[int, ...]]
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
EXPERTS = re.compile(r"^(?P<block>.*\.layers\.\d+)\..*experts\.(?P<what>gate_up_proj|down_proj)(?P<bias>_bias)?$")
LATENT = re.compile(r"^(?P<block>.*\.layers\.\d+)\.self_attn\.kv_b_proj\.weight$")
LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Skeleton:
    """The tensors that a config.json implies.

    Attributes:
        tensors: transformers' names and shapes, tied ones once.
        dtype: of the weights, e.g. `BF16`.
    """

    config: Mapping[str, Any]
    tensors: Shapes
    dtype: str


def skeleton_of(config: Mapping[str, Any]) -> Skeleton | None:
    """The tensors of the language model, or None where transformers cannot build it.

    Raises:
        FewbitsError: a configuration that transformers refuses.
    """
    loaded = load_config(config)
    if loaded is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM

    name = str(loaded.dtype or config.get("torch_dtype") or config.get("dtype") or "bfloat16").removeprefix("torch.")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(loaded)
    except ValueError:
        return None  # not a causal language model
    except Exception as error:  # a configuration may be wrong in any way
        reason = " ".join(str(error).split())[:200]
        raise FewbitsError(f"config.json: transformers cannot build the model ({reason}).", "Check the file.") from None
    tied = {id(p): n for n, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    tensors = {n: tuple(p.shape) for n, p in model.named_parameters() if tied[id(p)] == n}
    if loaded.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return Skeleton(loaded.to_dict() | _spelled(config), tensors, DTYPES.get(name, "BF16"))


def _spelled(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says itself goes before transformers' defaults."""
    from fewbits.memory.config_shape import text_config

    return {key: value for key, value in text_config(config).items() if value is not None}


def gguf_skeleton(skeleton: Skeleton, shape: ModelShape) -> tuple[ModelFacts, list[SourceTensor], list[str]]:
    """The same model as the tensors of a GGUF file, as a plain conversion types them.

    Returns:
        What a plan needs, the tensors, and notes on tensors whose GGUF name is not known.
    """
    name = GGUF_NAMES.get(shape.architecture, shape.architecture)
    try:
        config = {**skeleton.config, "architectures": [_family(skeleton.config.get("model_type")).architecture]}
        views = [(view.name, view.shape) for view in arch.gguf_tensors(config, skeleton.tensors)]
        notes: list[str] = []
    except FewbitsError:
        views, notes = _mapped(skeleton, name, shape)
    facts = ModelFacts(
        arch=name,
        n_layer=shape.stored_layers,
        n_head=shape.heads,
        n_head_kv=_kv_heads(skeleton, shape),
        n_expert=shape.experts,
    )
    tensors = [SourceTensor(n, s, converted_dtype(n, s, skeleton.dtype, name)) for n, s in views]
    return facts, tensors, notes


def _family(model_type: object) -> arch.Family:
    for family in arch.FAMILIES:
        if family.model_type == model_type:
            return family
    raise FewbitsError(f"{model_type} is none of the families of `arch`.")


def _kv_heads(skeleton: Skeleton, shape: ModelShape) -> int:
    value = skeleton.config.get("num_key_value_heads")
    return 1 if shape.latent else value if isinstance(value, int) else shape.heads


def _mapped(skeleton: Skeleton, name: str, shape: ModelShape) -> tuple[list[tuple[str, tuple[int, ...]]], list[str]]:
    """By the gguf package's name map."""
    number = next((key for key, value in MODEL_ARCH_NAMES.items() if value == name), MODEL_ARCH.LLAMA)
    names = get_tensor_name_map(number, shape.stored_layers)
    views, unknown = [], []
    for hf, tensor in skeleton.tensors.items():
        for part, sizes in _parts(hf, tensor, shape):
            found = part if part.startswith("blk.") else names.get_name(part, try_suffixes=(".weight", ".bias"))
            if found is None and len(sizes) > 1:  # vectors keep their type whatever they are called
                unknown.append(part)
            views.append((found or part, sizes))
    if not unknown:
        return views, []
    return views, [f"{len(unknown)} tensors have no GGUF name that is known here ({unknown[0]}): counted as they are"]


def _parts(name: str, tensor: tuple[int, ...], shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What a transformers tensor becomes in a GGUF file, where that is not one tensor of the same shape."""
    block = LAYER.search(name)
    if (found := EXPERTS.match(name)) and block:
        ending = ".bias" if found["bias"] else ".weight"
        width = prod(tensor[1:]) // (1 if found["bias"] else shape.hidden)
        halves = ("gate", "up") if found["what"] == "gate_up_proj" else ("down",)
        for half in halves:
            rows = width // len(halves) if half != "down" else shape.hidden
            columns = () if found["bias"] else (shape.hidden if half != "down" else width,)
            yield f"blk.{block[1]}.ffn_{half}_exps{ending}", (tensor[0], rows, *columns)
    elif LATENT.match(name) and block and shape.latent:
        rank, with_rope, key, value = shape.latent
        yield f"blk.{block[1]}.attn_k_b.weight", (shape.heads, rank, key - (with_rope - rank))
        yield f"blk.{block[1]}.attn_v_b.weight", (shape.heads, value, rank)
    elif len(tensor) == 3 and tensor[1] == 1:  # convolutions lose the axis of length one
        yield name, (tensor[0], tensor[2])
    else:
        yield name, tensor


def bound_tensors(shape: ModelShape) -> list[SourceTensor]:
    """What a model of these sizes has at most, where transformers does not know it: for a bound, nothing else."""
    hidden, wide = shape.hidden, max(shape.queries, shape.hidden)
    keys = max(shape.keys, 1)
    tensors = [
        SourceTensor("token_embd.weight", (shape.vocabulary, hidden), "BF16"),
        SourceTensor("output.weight", (shape.vocabulary, hidden), "BF16"),
    ]
    inner = shape.expert_width or shape.feed_forward
    for index in range(shape.stored_layers):
        block = f"blk.{index}."
        parts: dict[str, tuple[int, ...]] = {
            "attn_q": (wide, hidden),
            "attn_k": (keys, hidden),
            "attn_v": (max(shape.values, keys), hidden),
            "attn_output": (hidden, wide),
            "ffn_gate": (shape.feed_forward, hidden),
            "ffn_up": (shape.feed_forward, hidden),
            "ffn_down": (hidden, shape.feed_forward),
        }
        if shape.experts:
            parts |= {
                "ffn_gate_exps": (shape.experts, inner, hidden),
                "ffn_up_exps": (shape.experts, inner, hidden),
                "ffn_down_exps": (shape.experts, hidden, inner),
            }
        tensors += [SourceTensor(f"{block}{name}.weight", sizes, "BF16") for name, sizes in parts.items()]
    return tensors
