"""Bytes of the KV cache and of recurrent states, layer by layer, by the rules of each engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fewbits.errors import FewbitsError
from fewbits.memory.shape import LayerCache


@dataclass(frozen=True)
class CacheType:
    """How cached elements are stored: `nbytes` for every `block` of them."""

    block: int
    nbytes: int

    def of(self, elements: int) -> int:
        """Bytes of a row of elements; a last block that is not full takes a whole one."""
        return -(-elements // self.block) * self.nbytes


CACHE_TYPES: dict[str, CacheType] = {
    "f32": CacheType(1, 4),
    "f16": CacheType(1, 2),
    "bf16": CacheType(1, 2),
    "fp8": CacheType(1, 1),
    "q8_0": CacheType(32, 34),
    "q5_1": CacheType(32, 24),
    "q5_0": CacheType(32, 22),
    "q4_1": CacheType(32, 20),
    "q4_0": CacheType(32, 18),
    "iq4_nl": CacheType(32, 18),
    "q8": CacheType(32, 34),
    "q6": CacheType(32, 26),
    "q4": CacheType(32, 18),
}
"""ggml's types (ggml-common.h), vLLM's fp8 and ExLlama's q8, q6 and q4: so many bits and one 16-bit scale for 32."""


@dataclass(frozen=True)
class CacheRule:
    """How an engine lays out its cache.

    Attributes:
        pad: tokens are rounded up to a multiple of this.
        windows: whether sliding layers keep no more than they see.
        step: tokens that a sliding layer keeps beyond its window: those of one batch.
        window_pad: what the tokens of a sliding layer are rounded up to.
        expands: whether the keys and values of latent layers are kept decompressed.
        state_bytes: bytes of an element of recurrent states.
    """

    pad: int = 1
    windows: bool = True
    step: int = 0
    window_pad: int = 1
    expands: bool = False
    state_bytes: int = 4


@dataclass(frozen=True)
class CacheUse:
    """What one layer keeps.

    Attributes:
        cells: tokens kept for each sequence.
        nbytes: of keys, values and indexer keys, all sequences together.
        state_bytes: of recurrent states, all sequences together.
    """

    kind: str
    cells: int
    nbytes: int
    state_bytes: int


def cache_of(
    layers: Sequence[LayerCache], rule: CacheRule, kind: str, context: int, sequences: int = 1
) -> list[CacheUse]:
    """What each layer keeps.

    Args:
        kind: key of `CACHE_TYPES`.
        context: tokens of each sequence.
        sequences: how many are under way side by side, each with a cache of its own.
    """
    if kind not in CACHE_TYPES:
        raise FewbitsError(f"Unknown type of KV cache {kind!r}.", f"Known: {', '.join(CACHE_TYPES)}.")
    stored = CACHE_TYPES[kind]
    full = padded(context, rule.pad)
    uses = []
    for layer in layers:
        cells = full
        if layer.window is not None and rule.windows:
            cells = padded(min(full, layer.window + rule.step), rule.window_pad)
        keys, values = layer.expanded if rule.expands and layer.expanded else (layer.keys, layer.values)
        token = stored.of(keys) + stored.of(values) + stored.of(layer.indexer)
        state = layer.state * rule.state_bytes * sequences
        uses.append(CacheUse(layer.kind, cells if token else 0, cells * token * sequences, state))
    return uses


def padded(count: int, multiple: int) -> int:
    """Rounded up to a multiple."""
    return -(-count // multiple) * multiple
