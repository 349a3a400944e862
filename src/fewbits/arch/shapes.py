"""What shape each tensor must have, from the configuration alone: a wrong one is found before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewbits.arch.tensors import GGUFTensor
from fewbits.errors import FewbitsError

EXPECTED: dict[str, tuple[str, ...]] = {
    "token_embd.weight": ("vocabulary", "hidden"),
    "output.weight": ("vocabulary", "hidden"),
    "output_norm.weight": ("hidden",),
    "attn_norm.weight": ("hidden",),
    "ffn_norm.weight": ("hidden",),
    "attn_q.weight": ("queries", "hidden"),
    "attn_k.weight": ("keys", "hidden"),
    "attn_v.weight": ("values", "hidden"),
    "attn_qkv.weight": ("queries + keys + values", "hidden"),
    "attn_output.weight": ("hidden", "outputs"),
    "ffn_gate.weight": ("ff", "hidden"),
    "ffn_up.weight": ("ff", "hidden"),
    "ffn_down.weight": ("hidden", "ff"),
    "ffn_gate_inp.weight": ("experts", "hidden"),
    "ffn_gate_exps.weight": ("experts", "expert ff", "hidden"),
    "ffn_up_exps.weight": ("experts", "expert ff", "hidden"),
    "ffn_down_exps.weight": ("experts", "hidden", "expert ff"),
}
"""GGUF name, without the block's prefix -> sizes, row-major."""
FUSED_GATE_UP = ("phi3",)
"""Architectures whose `ffn_up` holds gate and up together."""


def check_shapes(metadata: Mapping[str, Any], tensors: Sequence[GGUFTensor]) -> None:
    """Compare the tensors' shapes with the configuration.

    Args:
        metadata: as `gguf_metadata` makes it.

    Raises:
        FewbitsError: names the tensor as the checkpoint calls it, with both shapes.
    """
    sizes = _sizes(metadata)
    for tensor in tensors:
        names = EXPECTED.get(tensor.name.split(".", 2)[-1] if tensor.name.startswith("blk.") else tensor.name)
        if names is None or any(name not in sizes for name in names):
            continue
        wanted = tuple(sizes[name] for name in names)
        if tensor.name.endswith("ffn_up.weight") and metadata["general.architecture"] in FUSED_GATE_UP:
            wanted = (2 * wanted[0], *wanted[1:])
        if tensor.shape != wanted:
            source = tensor.sources[0] if tensor.sources else tensor.name
            raise FewbitsError(
                f"tensor {source!r} makes {tensor.name} {list(tensor.shape)}, config.json says {list(wanted)}.",
                "The files do not belong together: fetch the model again.",
            )


def _sizes(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Sizes by name, as far as the metadata gives them as single numbers."""
    arch = str(metadata["general.architecture"])

    def number(key: str) -> int | None:
        value = metadata.get(f"{arch}.{key}")
        return value if isinstance(value, int) else None

    heads, hidden, ff = number("attention.head_count"), number("embedding_length"), number("feed_forward_length")
    kv_heads = number("attention.head_count_kv") or heads
    found = {
        "vocabulary": number("vocab_size"),
        "hidden": hidden,
        "ff": ff,
        "experts": number("expert_count"),
        "expert ff": number("expert_feed_forward_length") or ff,
    }
    if heads and kv_heads and hidden:
        key = number("attention.key_length") or hidden // heads
        value = number("attention.value_length") or key
        found |= {"queries": heads * key, "keys": kv_heads * key, "values": kv_heads * value, "outputs": heads * value}
        found["queries + keys + values"] = heads * key + kv_heads * (key + value)
    return {name: size for name, size in found.items() if size is not None}
