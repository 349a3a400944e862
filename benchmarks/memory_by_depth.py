"""Peak memory of making a model directory, for a model and one of twice the layers: it should hardly grow.

    python benchmarks/memory_by_depth.py --tokenizer MODEL --calibration c4.txt [--targets gptq:w4g64 ...] [--layers 8]

The models are synthetic (Llama's shapes, random weights, the test model's tokenizer): their values do not matter here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

DATA_FREE = ("ct:", "bnb:", "hqq:", "fp8:")


def make_model(folder: Path, layers: int, hidden: int, tokenizer: Path) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).half().save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def peak(model: Path, target: str, out: Path, options: argparse.Namespace) -> tuple[float, float]:
    """Peak resident MB and seconds of one run in a process of its own."""
    words = ["quantize", model, target, "-o", out, "--json"]
    if not target.startswith(DATA_FREE):
        words += ["--calibration", options.calibration, "--calibration-chunks", options.chunks]
    command = [sys.executable, "-m", "fewbits", *map(str, words)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return told["peak_memory"] / 1e6, told["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="a model directory with a tokenizer")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=["gptq:w4g64", "awq:w4g64", "ct:fp8"])
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    options = parser.parse_args()
    print("| target | layers | weights, MB | peak memory, MB | s | ratio |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        models = {
            layers: make_model(Path(work) / str(layers), layers, options.hidden, options.tokenizer)
            for layers in (options.layers, 2 * options.layers)
        }
        for target in options.targets:
            first = 0.0
            for layers, model in models.items():
                memory, seconds = peak(model, target, Path(work) / f"{target.replace(':', '-')}-{layers}", options)
                first = first or memory
                size = (model / "model.safetensors").stat().st_size / 1e6
                ratio = f"{memory / first:.3f}"
                print(f"| {target} | {layers} | {size:.0f} | {memory:.0f} | {seconds:.0f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
