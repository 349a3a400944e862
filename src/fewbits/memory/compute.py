"""The working memory of one step: what llama.cpp prints as its compute buffer.

llama.cpp reserves a buffer for the largest moment of the graph of one batch of `ubatch` tokens (ggml-alloc.c lets
tensors share memory whose lives do not overlap). The moments below are those that were found to be the largest, by
comparing with what the engine of llama-cpp-python 0.3.36 (2026-10) reserves for 30 architectures at their real sizes;
tests/test_memory_engine.py holds the comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

from fewbits.memory.cache import padded
from fewbits.memory.shape import ModelShape

FLOAT = 4
"""Bytes of an activation in ggml."""


@dataclass(frozen=True)
class Batch:
    """What one step works on.

    Attributes:
        tokens: of one step (`ubatch`).
        outputs: tokens of it whose logits are computed.
        cells: tokens in the cache of a layer that keeps everything.
        window_cells: in the cache of a sliding layer; 0 where none slides.
        flash: whether attention is computed without its matrix (flash attention).
        staged: bytes of weights that are copied to the GPU for this step: the two largest that lie in RAM.
    """

    tokens: int
    outputs: int
    cells: int
    window_cells: int
    flash: bool
    staged: int = 0


def compute_buffer(shape: ModelShape, batch: Batch) -> int:
    """Bytes of the largest moment of a step."""
    attends = any(layer.kind not in ("recurrent", "none", "shared") for layer in shape.layers)
    masks = 0
    if attends:
        # attention masks are half floats for flash attention, floats without
        cells = batch.window_cells if _all_slide(shape) else batch.cells + batch.window_cells
        masks = cells * batch.tokens * (2 if batch.flash else FLOAT)
    moments = [_feed_forward(shape), _experts(shape), _latent(shape), _recurrent(shape)]
    if attends and not batch.flash:
        moments.append(_attention(shape, batch))
    always = 2 * shape.per_layer + _indexer(shape, batch)
    inside = (max(moments) + always) * batch.tokens * FLOAT + masks + batch.staged
    # logits come last, when the masks are no longer needed
    head = (batch.outputs * shape.vocabulary + batch.tokens * 2 * shape.hidden) * FLOAT
    return max(inside, head)


def _all_slide(shape: ModelShape) -> bool:
    return all(layer.window is not None for layer in shape.layers if layer.keys)


def _feed_forward(shape: ModelShape) -> int:
    """Gate, up and their product, beside the residual stream; what attention left does not always fit into the gaps."""
    return 3 * shape.feed_forward + 3 * shape.hidden + shape.queries


def _experts(shape: ModelShape) -> int:
    """The same for every expert that runs, or their outputs and the weighted copies of them."""
    inner = 3 * shape.experts_used * shape.expert_width + 3 * shape.hidden + shape.queries
    outer = 2 * shape.experts_used * shape.hidden + 4 * shape.hidden + shape.queries
    return max(inner, outer) if shape.experts else 0


def _attention(shape: ModelShape, batch: Batch) -> int:
    """The matrix of all heads against all cells, beside queries, keys and values."""
    cells = batch.window_cells if _all_slide(shape) else batch.cells
    wide = shape.latent is not None
    around = _latent(shape) if wide else 3 * shape.hidden + 3 * shape.queries + shape.keys + shape.values
    return shape.heads * padded(cells, 32) + around


def _latent(shape: ModelShape) -> int:
    """Queries before and after they are brought to the latent space, and what attention gives there."""
    if shape.latent is None:
        return 0
    compressed, with_rope, key, _ = shape.latent
    rope = with_rope - compressed
    return shape.heads * (with_rope + compressed + key + key - rope) + 4 * shape.hidden


def _recurrent(shape: ModelShape) -> int:
    """What goes into the convolution, comes out of it, its gate, and the scan's input and output."""
    return 5 * shape.inner + 3 * shape.hidden


def _indexer(shape: ModelShape, batch: Batch) -> int:
    """Sparse attention: scores and a mask of its own, and a second set of queries."""
    if shape.latent is None or not any(layer.indexer for layer in shape.layers):
        return 0
    compressed, with_rope, key, _ = shape.latent
    return 2 * batch.cells + shape.heads * (with_rope + compressed - key)
