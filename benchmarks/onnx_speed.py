"""Tokens per second of onnxruntime-genai beside llama.cpp's, from the same model at like size, in one run.

    python benchmarks/onnx_speed.py MODEL [--targets onnx:int4 onnx:int4-exact Q4_0] [--text FILE] [--threads 1]

Every target is made (into --folder, where it stays), loaded, and run in turn: a prompt, then greedy tokens; medians of
--repeats rounds after one that is not counted, and the ratio to the last target. With --text the logits of each ONNX
target's graph in plain onnxruntime are compared with those of the exact one, on its first 512 tokens.
Needs `pip install 'fewbits[onnx,llama]'`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fewbits

PROMPT, NEW = 128, 32
Timing = tuple[float, float]
"""Tokens per second: of the prompt, and made."""


def onnx_runner(folder: Path, threads: int) -> Callable[[list[int]], Timing]:
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = og.Model(config)

    def run(ids: list[int]) -> Timing:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + NEW, min_length=len(ids) + NEW, do_sample=False)
        generator = og.Generator(model, params)
        started = time.perf_counter()
        generator.append_tokens(np.array(ids, np.int32))
        generator.generate_next_token()
        read = time.perf_counter()
        for _ in range(NEW - 1):
            generator.generate_next_token()
        return len(ids) / (read - started), (NEW - 1) / (time.perf_counter() - read)

    return run


def llama_runner(file: Path, threads: int) -> Callable[[list[int]], Timing]:
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=PROMPT + NEW, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(ids: list[int]) -> Timing:
        model.reset()
        started = time.perf_counter()
        model.eval(ids)
        token = model.sample(temp=0.0)
        read = time.perf_counter()
        for _ in range(NEW - 1):
            model.eval([token])
            token = model.sample(temp=0.0)
        return len(ids) / (read - started), (NEW - 1) / (time.perf_counter() - read)

    return run


def logits(folder: Path, ids: list[int]) -> np.ndarray:
    """Of plain onnxruntime, float64 log probabilities [n, vocabulary]."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    config = json.loads((folder / "config.json").read_text())
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    feeds: dict[str, Any] = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    for entry in session.get_inputs():
        if entry.name.startswith("past"):
            feeds[entry.name] = np.zeros((1, config["num_key_value_heads"], 0, size), np.float32)
    found = session.run(["logits"], feeds)[0][0].astype(np.float64)
    found -= found.max(axis=1, keepdims=True)
    return found - np.log(np.exp(found).sum(axis=1, keepdims=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--targets", nargs="+", default=["onnx:int4", "onnx:int4-exact", "Q4_0"])
    parser.add_argument("--folder", type=Path, default=Path("onnx-speed"))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    runners, sizes, folders = {}, {}, {}
    tokenizer = fewbits.open(options.model).tokenizer()
    for target in options.targets:
        made = options.folder / (target.replace(":", "-") if ":" in target else f"{target}.gguf")
        if not made.exists():
            fewbits.quantize(options.model, target, made, threads=options.threads)
        files = [made] if made.is_file() else [made / "model.safetensors", made / "model.onnx"]
        sizes[target] = sum(file.stat().st_size for file in files)
        runners[target] = (llama_runner if made.is_file() else onnx_runner)(made, options.threads)
        if not made.is_file():
            folders[target] = made
    text = options.text.read_text() if options.text else "The river that runs through the old town is " * 60
    ids = tokenizer.encode(text[:20000])
    times: dict[str, list[Timing]] = {target: [] for target in runners}
    for _ in range(options.repeats + 1):
        for target, run in runners.items():
            times[target].append(run(ids[:PROMPT]))
    last = options.targets[-1]
    found = {}
    for target in runners:
        prompt, made_ = (statistics.median(each[i] for each in times[target][1:]) for i in (0, 1))
        found[target] = {"MB": sizes[target] / 1e6, "prompt tokens/s": prompt, "new tokens/s": made_}
    for target in runners:
        found[target]["ratio of new"] = found[target]["new tokens/s"] / found[last]["new tokens/s"]
    exact = next((target for target in folders if target.endswith("-exact")), None)
    if options.text and exact:
        base = logits(folders[exact], ids[:512])
        for target, folder in folders.items():
            other = logits(folder, ids[:512])
            found[target][f"KL to {exact}"] = float((np.exp(base) * (base - other)).sum(axis=1).mean())
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for target, figures in found.items():
        print(f"{target:18}", "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
