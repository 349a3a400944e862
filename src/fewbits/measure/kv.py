"""A quantized KV cache, as an engine would keep it: what attention reads of earlier tokens is rounded.

llama.cpp: `type_k` and `type_v` of its context, in blocks of 32 along a head (src/llama-kv-cache.cpp).
Where the size of a head is a multiple of 64 it rotates keys and values by a Hadamard matrix first and undoes that after
attention (ggml-org/llama.cpp #21038, April 2026; LLAMA_ATTN_ROT_DISABLE turns it off); the simulation does the same.
vLLM: `kv_cache_dtype="fp8"`, E4M3 with a scale of one.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from fewbits.codecs import CODECS
from fewbits.errors import FewbitsError
from fewbits.forward.streamed import Stream, StreamedModel

if TYPE_CHECKING:
    from fewbits.checkpoint import Model

BLOCK = 32
ROTATED_MULTIPLE = 64
"""llama.cpp rotates heads whose size is a multiple of this, values by a matrix of this size."""
E4M3_MAX = 448.0


def _symmetric(levels: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """ggml's Q4_0 and Q5_0 (levels 8 and 16): the largest value in size, with its sign, takes the lowest code."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        step = peak / -levels
        codes = torch.floor(x * _inverse(step) + levels + 0.5).clamp_(0, 2 * levels - 1)
        return (codes - levels) * step.half().float()

    return rounded


def _affine(top: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """ggml's Q4_1 and Q5_1 (codes 0..top): from the least value to the largest."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        low = x.amin(-1, keepdim=True)
        step = (x.amax(-1, keepdim=True) - low) / top
        codes = torch.floor((x - low) * _inverse(step) + 0.5).clamp_(0, top)
        return codes * step.half().float() + low.half().float()

    return rounded


def _q8_0(x: torch.Tensor) -> torch.Tensor:
    step = x.abs().amax(-1, keepdim=True) / 127
    scaled = x * _inverse(step)
    # C's roundf: halves away from zero
    return torch.sign(scaled) * torch.floor(scaled.abs() + 0.5) * step.half().float()


def _iq4_nl(x: torch.Tensor) -> torch.Tensor:
    codec = CODECS["IQ4_NL"]
    return torch.from_numpy(codec.decode(codec.encode(x.reshape(-1, BLOCK).numpy()))).view(x.shape)


def _inverse(step: torch.Tensor) -> torch.Tensor:
    return torch.where(step == 0, torch.zeros_like(step), 1 / step)


BLOCK_TYPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "q8_0": _q8_0,
    "q5_1": _affine(31),
    "q5_0": _symmetric(16),
    "q4_1": _affine(15),
    "q4_0": _symmetric(8),
    "iq4_nl": _iq4_nl,
}
"""Types of ggml with a scale for 32 values: rounding of blocks [..., 32]."""
FLOAT_TYPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "f16": lambda x: x.half().float(),
    "bf16": lambda x: x.bfloat16().float(),
    "fp8": lambda x: x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float(),
}
KV_TYPES = (*FLOAT_TYPES, *BLOCK_TYPES)


def check_kv(kv: str | None, engine: str) -> None:
    """Refuse a type of the KV cache that there is not.

    Raises:
        FewbitsError: with the types that there are.
    """
    if kv is not None and kv not in KV_TYPES:
        raise FewbitsError(f"There is no KV cache type {kv!r}.", f"Choose one of: {', '.join(KV_TYPES)}.")
    if kv == "fp8" and engine == "llama.cpp":
        raise FewbitsError("llama.cpp has no fp8 KV cache.", "Choose q8_0, or simulate fp8 with --engine torch.")


def round_head(x: torch.Tensor, kv: str, rotation: int = 0) -> torch.Tensor:
    """Keys or values as they come back from a cache.

    Args:
        x: float32 [..., head size].
        rotation: size of the Hadamard matrix that llama.cpp applies before; 0 for none.

    Raises:
        FewbitsError: a block type and a head size that is no multiple of 32.
    """
    if kv in FLOAT_TYPES:
        return FLOAT_TYPES[kv](x)
    if x.shape[-1] % BLOCK:
        raise FewbitsError(
            f"A head of {x.shape[-1]} values does not divide into blocks of {BLOCK}, which {kv} needs.",
            "Choose f16, bf16 or fp8.",
        )
    if rotation:
        matrix = hadamard(rotation)
        return _rotate(round_head(_rotate(x, matrix), kv), matrix)
    return BLOCK_TYPES[kv](x.contiguous().view(*x.shape[:-1], -1, BLOCK)).view(x.shape)


def hadamard(size: int) -> torch.Tensor:
    """The orthonormal Hadamard matrix of a power of two: symmetric, its own inverse."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / size**0.5


def rotations(head: int) -> tuple[int, int]:
    """Sizes of llama.cpp's rotation of keys and of values for a size of heads; 0 for none."""
    if head % ROTATED_MULTIPLE or int(os.environ.get("LLAMA_ATTN_ROT_DISABLE", "0") or 0):
        return 0, 0
    return head & -head, ROTATED_MULTIPLE  # keys: the largest power of two that divides the head


def _rotate(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    size = matrix.shape[0]
    return (x.reshape(*x.shape[:-1], -1, size) @ matrix).view(x.shape)


class RoundingCache:
    """Stands where transformers' attention expects its cache: gives back what it is given, rounded."""

    def __init__(self, kv: str) -> None:
        self.kv = kv

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (after rotary embedding) and values [windows, heads, tokens, head size], rounded."""
        of_keys, of_values = rotations(keys.shape[-1])[0], rotations(values.shape[-1])[1]
        return round_head(keys, self.kv, of_keys), round_head(values, self.kv, of_values)


class CachedModel(StreamedModel):
    """A streamed model whose attention reads keys and values from a rounded cache.

    Raises:
        FewbitsError: also for blocks that take no cache.
    """

    def __init__(self, model: Model, kv: str) -> None:
        super().__init__(model)
        self.cache = RoundingCache(kv)

    def enter(self, inputs: npt.NDArray[np.int64], together: int | None = None) -> Stream:
        stream = super().enter(inputs, together)
        for calls in stream.calls.values():
            calls[:] = [self._with_cache(block, call) for block, call in zip(self.layers, calls, strict=True)]
        return stream

    def _with_cache(self, block: torch.nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        args, kwargs = call
        names = [name for name in inspect.signature(block.forward).parameters if name != "hidden_states"]
        if "past_key_values" not in names:
            kind = type(block).__name__
            raise FewbitsError(f"{self.model.path}: {kind} takes no KV cache, so none can be simulated.")
        place = names.index("past_key_values")
        if place < len(args):
            return (*args[:place], self.cache, *args[place + 1 :]), kwargs
        return args, kwargs | {"past_key_values": self.cache}
