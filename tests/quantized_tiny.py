"""Tiny models in quantized layouts, as directories that each ecosystem's own loader takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from fewbits.codecs.scaled import Quantized
from fewbits.layouts import Layout
from tiny_models import tiny_model, tiny_tokenizer

TORCH_TYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Rows that every group size divides."""


def tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """A stored array as torch's tensor of this safetensors type."""
    bits = torch.from_numpy(np.array(array, order="C", copy=True))
    return bits if bits.dtype == TORCH_TYPES[dtype] else bits.view(TORCH_TYPES[dtype])


def packed(layout: Layout, matrix: Quantized) -> dict[str, torch.Tensor]:
    """What a layout stores, by suffix, checked to be what it said beforehand."""
    parts = layout.parts((matrix.codes.shape[0], matrix.codes.shape[1]))
    arrays = layout.pack(matrix)
    assert set(arrays) == set(parts)
    found = {suffix: tensor(array, parts[suffix].dtype) for suffix, array in arrays.items()}
    for suffix, part in parts.items():
        assert tuple(found[suffix].shape) == part.shape
    return found


def is_linear(name: str, value: torch.Tensor) -> bool:
    """Whether a tensor of a model is a linear layer of a decoder block."""
    return name.endswith("_proj.weight") and value.ndim == 2


def save_quantized(
    folder: Path,
    layout: Layout,
    dtype: str = "F16",
    model: str = "llama-bias",
    quantize: Callable[[np.ndarray], Quantized] | None = None,
    keep: tuple[str, ...] = (),
) -> transformers.PreTrainedModel:
    """Write a random model's directory in this layout.

    Args:
        dtype: of the tensors that stay floats.
        quantize: what chooses the codes; None rounds to nearest.
        keep: parts of names of modules that stay floats.

    Returns:
        The model in float32 with the weights as decoded.
    """
    layout = layout.for_floats(dtype)
    plain = tiny_model(model, WIDE)
    quantize = quantize or layout.type.settle
    tensors: dict[str, torch.Tensor] = {}
    decoded: dict[str, torch.Tensor] = {}
    for name, value in plain.state_dict().items():
        if is_linear(name, value) and not any(part in name for part in keep):
            matrix = quantize(value.numpy())
            decoded[name] = torch.from_numpy(matrix.decode())
            module = name.removesuffix(".weight")
            tensors |= {module + suffix: part for suffix, part in packed(layout, matrix).items()}
        else:
            tensors[name] = value.to(TORCH_TYPES[dtype]).contiguous()
            decoded[name] = tensors[name].float()
    config: dict[str, Any] = json.loads(plain.config.to_json_string(use_diff=False))
    config["architectures"] = [type(plain).__name__]
    config["dtype"] = str(TORCH_TYPES[dtype]).removeprefix("torch.")
    config["quantization_config"] = layout.config(["lm_head", *keep])
    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plain.load_state_dict(decoded)
    return plain.eval()


def logits(model: torch.nn.Module, length: int = 32) -> torch.Tensor:
    """float32 [length, vocabulary] for a fixed random text."""
    ids = torch.randint(1, 256, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits[0].float()


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative distance."""
    return float((found - wanted).norm() / wanted.norm())
