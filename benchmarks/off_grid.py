"""Take a model whose weights were dequantized off their grid: quantizing it again would flatter otherwise.

    python benchmarks/off_grid.py MODEL.gguf OUT.gguf

Channels are scaled by random factors out of norms and linears into what reads them, which changes no output: each
weight of a block gets another factor, so the block's levels are no longer evenly spaced. For decoder blocks of Llama's
and Gemma's kind. Embedding and head stay as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import fewbits
from fewbits.checkpoint import GGUFCheckpoint
from fewbits.formats.gguf.source import gguf_source

SPREAD = (0.75, 1.33)
PLACES = (
    ("attn_norm", ("attn_q", "attn_k", "attn_v")),
    ("ffn_norm", ("ffn_gate", "ffn_up")),
    ("attn_v", ("attn_output",)),
    ("ffn_up", ("ffn_down",)),
)
"""Where a scale leaves, and where it goes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    fewbits.quantize(options.model, "F16", options.out)
    made, facts = GGUFCheckpoint(options.out), gguf_source(GGUFCheckpoint(options.out)).facts
    random = np.random.default_rng(0)

    def stored(name: str) -> np.memmap:
        info = made.tensors[name]
        dtype = {"F16": np.float16, "F32": np.float32}[info.dtype]
        return np.memmap(options.out, dtype, "r+", info.offset, info.shape)

    for layer in range(facts.n_layer):
        for source, readers in PLACES:
            values = stored(f"blk.{layer}.{source}.weight")
            scales = random.uniform(*SPREAD, len(values)).astype(np.float32)
            values[:] = values / scales.reshape(-1, *(1,) * (values.ndim - 1))
            for reader in readers:
                matrix = stored(f"blk.{layer}.{reader}.weight")
                # query heads of a group read one value head
                head = facts.n_head_kv and len(scales) // facts.n_head_kv
                groups = scales.reshape(-1, head) if source == "attn_v" else scales[None]
                matrix *= np.repeat(groups, matrix.shape[1] // scales.size, axis=0).reshape(-1)


if __name__ == "__main__":
    main()
