"""The whole job beside llama.cpp's: a synthetic bf16 Llama, convert + llama-quantize against `fewbits quantize`.

    python benchmarks/whole_job.py --llama-cpp DIR --bin DIR [--target Q4_K_M] [--layers 16 32]

`--llama-cpp` is a llama.cpp source tree (for convert_hf_to_gguf.py), `--bin` the folder with its llama-quantize. Each
size is run turn about `--repeats` times; wall seconds are medians, memory is the largest resident set of any process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fewbits

MODEL = Path(str(fewbits.__file__)).parent / "demo" / "model"
HIDDEN, FF, HEADS, KV_HEADS, VOCABULARY = 2048, 8192, 32, 8, 32000


def synthetic(folder: Path, layers: int) -> Path:
    """A random Llama of the shape of a 1.1B (16 layers) with the demo model's tokenizer."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for file in MODEL.glob("*.json"):
        shutil.copy(file, folder)
    config = json.loads((MODEL / "config.json").read_text())
    config |= {
        "hidden_size": HIDDEN, "intermediate_size": FF, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HIDDEN // HEADS, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(torch.bfloat16)

    kv = HIDDEN // HEADS * KV_HEADS
    shards: dict[str, dict[str, torch.Tensor]] = {
        "embed": {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "lm_head.weight": random(VOCABULARY, HIDDEN)}
    }
    shards["embed"]["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shards[f"layer{layer}"] = {
            prefix + "self_attn.q_proj.weight": random(HIDDEN, HIDDEN),
            prefix + "self_attn.k_proj.weight": random(kv, HIDDEN),
            prefix + "self_attn.v_proj.weight": random(kv, HIDDEN),
            prefix + "self_attn.o_proj.weight": random(HIDDEN, HIDDEN),
            prefix + "mlp.gate_proj.weight": random(FF, HIDDEN),
            prefix + "mlp.up_proj.weight": random(FF, HIDDEN),
            prefix + "mlp.down_proj.weight": random(HIDDEN, FF),
            prefix + "input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            prefix + "post_attention_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        }
    weight_map = {}
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def run(command: list[str], env: dict[str, str] | None = None) -> tuple[float, int]:
    """Wall seconds and largest resident bytes of one command."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **(env or {})}
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--bin", type=Path)
    parser.add_argument("--make", type=Path, help="only make the synthetic model in this folder")
    parser.add_argument("--target", default="Q4_K_M")
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.make:
        synthetic(options.make, options.layers[0])
        return
    if not options.llama_cpp or not options.bin:
        parser.error("--llama-cpp and --bin are needed")
    print("| layers | target | convert s | llama-quantize s | fewbits s | ratio | fewbits MB | peers' MB |")
    print("|---|---|---|---|---|---|---|---|")
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            model = folder / "model"
            # in a process of its own: a child's largest resident set counts its parent's at the fork
            subprocess.run([sys.executable, __file__, "--make", str(model), "--layers", str(layers)], check=True)
            # the official converter knows pre-tokenizers by hash only; an unknown one is the demo tokenizer's fate
            script = str(Path(__file__).parent / "convert_any.py")
            converter = [sys.executable, script, str(options.llama_cpp), str(model)]
            paths = {"PYTHONPATH": str(options.llama_cpp / "gguf-py")}
            figures: list[tuple[float, float, float]] = []
            memory, peers = 0, 0
            for _ in range(options.repeats):
                for name in ("x.gguf", "y.gguf", "z.gguf"):
                    (folder / name).unlink(missing_ok=True)
                convert, used = run([*converter, str(folder / "x.gguf")], paths)
                peers = max(peers, used)
                quantize = [str(options.bin / "llama-quantize"), str(folder / "x.gguf"), str(folder / "y.gguf")]
                quantized, used = run([*quantize, options.target, str(options.threads)])
                peers = max(peers, used)
                command = [sys.executable, "-m", "fewbits", "quantize", str(model), options.target]
                ours, used = run([*command, "-o", str(folder / "z.gguf"), "--threads", str(options.threads)])
                memory = max(memory, used)
                figures.append((convert, quantized, ours))
            convert, quantized, ours = (statistics.median(column) for column in zip(*figures, strict=True))
            ratio = statistics.median(o / (c + q) for c, q, o in figures)
            print(
                f"| {layers} | {options.target} | {convert:.1f} | {quantized:.1f} | {ours:.1f} | {ratio:.2f} "
                f"| {memory / 1e6:.0f} | {peers / 1e6:.0f} |"
            )


if __name__ == "__main__":
    main()
