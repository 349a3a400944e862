"""Classes of models by size, each with one whose shapes stand for it. Shapes from the published config.json's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewbits.memory import Described


@dataclass(frozen=True)
class SizeClass:
    """A class of models.

    Attributes:
        billions: weights.
        example: the model whose shapes are taken.
        usual: levels that guides name for it, the usual one first.
    """

    name: str
    billions: float
    example: str
    usual: tuple[str, ...]
    config: Mapping[str, Any]

    @property
    def least_bytes(self) -> float:
        """Of a file at Q2_K or so: no machine with less memory than that runs it."""
        return self.billions * 1e9 * 2.7 / 8

    def described(self) -> Described:
        return Described(
            f"{'an' if self.name[0] == '8' else 'a'} {self.name} model (as {self.example})", "config", self.config
        )


def _llama(hidden: int, wide: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": hidden,
        "intermediate_size": wide, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }  # fmt: skip


def _qwen(hidden: int, wide: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": hidden,
        "intermediate_size": wide, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }  # fmt: skip


_SMALL, _MIDDLE, _LARGE = ("Q5_K_M", "Q4_K_M"), ("Q4_K_M",), ("Q4_K_M", "Q3_K_M")

SIZE_CLASSES = (
    SizeClass("1B", 1.2, "Llama 3.2 1B", _SMALL, _llama(2048, 8192, 16, 32, True)),
    SizeClass("3B", 3.2, "Llama 3.2 3B", _SMALL, _llama(3072, 8192, 28, 24, True)),
    SizeClass("8B", 8.0, "Llama 3.1 8B", _SMALL, _llama(4096, 14336, 32, 32, False)),
    SizeClass("14B", 14.8, "Qwen3 14B", _MIDDLE, _qwen(5120, 17408, 40, 40)),
    SizeClass("32B", 32.8, "Qwen3 32B", _MIDDLE, _qwen(5120, 25600, 64, 64)),
    SizeClass("70B", 70.6, "Llama 3.3 70B", _LARGE, _llama(8192, 28672, 80, 64, False)),
)
"""The field guide: 7B Q5_K_M or Q4_K_M; 13B and up Q4_K_M; 70B Q3_K_M or Q4_K_M."""
