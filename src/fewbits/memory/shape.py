"""What a model keeps of each token it has seen, layer by layer, and the sizes that its working memory depends on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

Kind = Literal["attention", "sliding", "chunked", "latent", "recurrent", "parallel", "shared", "none"]
"""attention: keys and values of every token. sliding, chunked: of a window. latent: one compressed vector a token
(MLA). recurrent: a state of fixed size. parallel: keys, values and a state. shared: another layer's cache. none:
nothing."""


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps, in elements.

    Attributes:
        keys: elements of the key vectors of one token: heads x length of a key; of a latent cache the latent vector.
        values: elements of the value vectors of one token; 0 for a latent cache.
        window: tokens that the layer can see, or None for all.
        indexer: elements of the indexer's key of one token (DeepSeek sparse attention).
        state: elements of the recurrent state of one sequence, convolution included.
        conv: how many of them are the convolution's.
        expanded: (keys, values) of engines that keep a latent layer's keys and values decompressed.
    """

    kind: Kind
    keys: int = 0
    values: int = 0
    window: int | None = None
    indexer: int = 0
    state: int = 0
    conv: int = 0
    expanded: tuple[int, int] | None = None

    def without_window(self) -> LayerCache:
        """The layer as an engine keeps it that has no use for windows."""
        return self if self.window is None else replace(self, kind="attention", window=None)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that its memory depends on.

    Attributes:
        architecture: ``general.architecture`` of a GGUF file, ``model_type`` of a config.json.
        layers: of the decoder, layers for multi-token prediction left out.
        stored_layers: layers in the file, those for multi-token prediction included.
        hidden, vocabulary, context_length: as configured; 0 where it is not told.
        heads: most query heads of a layer.
        queries: most elements of a token's query vectors in a layer.
        feed_forward: widest dense feed-forward layer.
        experts_used, expert_width: experts that run for each token, and the width of one.
        experts: experts of a layer; 0 for a dense model.
        latent: of MLA: (length of the latent vector, with its rotary part), (length of a key, of a value) before
            compression.
        inner: width of the recurrent layers, 0 without.
        per_layer: elements of the embeddings of a token that are handed to the layers (Gemma 3n, 4).
        certain: whether the layer table is known to be right; if not it is an upper bound.
        notes: what the user should know.
    """

    architecture: str
    layers: tuple[LayerCache, ...]
    stored_layers: int
    hidden: int
    vocabulary: int
    context_length: int
    heads: int
    queries: int
    feed_forward: int
    experts: int = 0
    experts_used: int = 0
    expert_width: int = 0
    latent: tuple[int, int, int, int] | None = None
    inner: int = 0
    per_layer: int = 0
    certain: bool = True
    notes: tuple[str, ...] = field(default=())

    @property
    def keys(self) -> int:
        """Most elements of a token's keys in a layer."""
        return max((layer.keys for layer in self.layers), default=0)

    @property
    def values(self) -> int:
        """Most elements of a token's values in a layer."""
        return max((layer.values for layer in self.layers), default=0)

    @property
    def windows(self) -> tuple[int, ...]:
        """The different windows of its layers, None left out."""
        return tuple(sorted({layer.window for layer in self.layers if layer.window is not None}))
