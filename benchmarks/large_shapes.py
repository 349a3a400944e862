"""Peak memory of jobs on the shapes of a large Llama, whose weights are sparse files.

    python benchmarks/large_shapes.py --work DIR [--target Q4_K_M] [--layers 2] [--max-memory 1.5GB]
    python benchmarks/large_shapes.py --work DIR --target gptq:w4g128 --calibration TEXT [--chunks 60]

The usual shapes are those of a 70B. A sparse file reads as zeros, with some rows of random weights in every matrix; it
takes hardly any room, the result takes all of its own. Each job runs in a process of its own, whose peak is what Linux
calls VmHWM: what was resident at most, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

import fewbits

DEMO = Path(str(fewbits.__file__)).parent / "demo" / "model"
RANDOM_ROWS = 64
"""Of each matrix, where weights are drawn; the rest is zeros."""


def make_sparse(folder: Path, shape: argparse.Namespace, random_rows: int = RANDOM_ROWS) -> Path:
    """A Llama of these shapes as one sparse safetensors file a layer, with the demo model's tokenizer."""
    folder.mkdir(parents=True)
    for file in DEMO.glob("*.json"):
        shutil.copy(file, folder)
    head = shape.hidden // shape.heads
    config = json.loads((DEMO / "config.json").read_text()) | {
        "hidden_size": shape.hidden, "intermediate_size": shape.ff, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": head,
        "vocab_size": shape.vocabulary, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words |= {f"<unused{number}>": number for number in range(len(words), shape.vocabulary)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    outside = {
        "model.embed_tokens.weight": (shape.vocabulary, shape.hidden),
        "lm_head.weight": (shape.vocabulary, shape.hidden),
        "model.norm.weight": (shape.hidden,),
    }
    files = {"outside": outside} | {f"layer{i}": layer_shapes(i, shape, head) for i in range(shape.layers)}
    rng = np.random.default_rng(0)
    for name, tensors in files.items():
        write_sparse(folder / f"{name}.safetensors", tensors, rng, random_rows)
    weight_map = {tensor: f"{name}.safetensors" for name, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def layer_shapes(index: int, shape: argparse.Namespace, head: int) -> dict[str, tuple[int, ...]]:
    attention, kv = shape.heads * head, shape.kv_heads * head
    inside = {
        "self_attn.q_proj": (attention, shape.hidden), "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden), "self_attn.o_proj": (shape.hidden, attention),
        "mlp.gate_proj": (shape.ff, shape.hidden), "mlp.up_proj": (shape.ff, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.ff),
        "input_layernorm": (shape.hidden,), "post_attention_layernorm": (shape.hidden,),
    }  # fmt: skip
    return {f"model.layers.{index}.{name}.weight": each for name, each in inside.items()}


def write_sparse(file: Path, tensors: dict[str, tuple[int, ...]], rng: np.random.Generator, rows: int) -> None:
    """bfloat16 tensors: norms are ones, of matrices the first rows are random, the rest is a hole."""
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)
        for name, shape in tensors.items():
            stream.seek(8 + len(text) + header[name]["data_offsets"][0])
            some = (min(rows, shape[0]), shape[1]) if len(shape) == 2 else shape
            values = rng.normal(0, 0.02, some) if len(shape) == 2 else np.ones(some)
            stream.write((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes())


def job(model: Path, options: argparse.Namespace, output: Path) -> dict[str, float]:
    """The report of `fewbits quantize` in a process of its own."""
    words = ["quantize", model, options.target, "-o", output, "--threads", options.threads, "--json"]
    if options.calibration:
        words += ["--calibration", options.calibration, "--calibration-chunks", options.chunks]
    words += ["--max-memory", options.max_memory] if options.max_memory else []
    command = [sys.executable, "-m", "fewbits", *map(str, words)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder with room for the result")
    parser.add_argument("--target", default="Q4_K_M")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--chunks", type=int, default=60, help="windows of 512 tokens: at least as many tokens as --ff")
    parser.add_argument("--max-memory")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--ff", type=int, default=28672)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128256)
    options = parser.parse_args()
    model, output = options.work / "large-model", options.work / "large-result"
    for old in (model, output):
        shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
    make_sparse(model, options)
    block = 2 * sum(int(np.prod(shape)) for shape in layer_shapes(0, options, options.hidden // options.heads).values())
    told = job(model, options, output)
    asked = f"{(4 * block + 2e9) / 1e9:.2f} (4 x block + 2)" if options.calibration else "1.50"
    print("| target | layers | block GB, bf16 | block GB, float32 | peak GB | asked GB | written GB | s |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {options.target} | {options.layers} | {block / 1e9:.2f} | {2 * block / 1e9:.2f} "
        f"| {told['peak_memory'] / 1e9:.2f} | {asked} | {told['size'] / 1e9:.2f} | {told['seconds']:.0f} |"
    )


if __name__ == "__main__":
    main()
