"""Encoding speed and error of every type beside libggml's, in one run on one thread.

    python benchmarks/encode.py [--types Q4_K Q2_K] [--model DIR] [--json]

Speed: thread CPU time, ours and `ggml_quantize_chunk` (importance given: its best error) turn about, medians.
Error: sum of importance x squared error, ours over libggml's (ones: the better of its two paths). Data: normal and
heavy-tailed weights, and rows of a real model where --model names a directory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import ggml
from fewbits.checkpoint import open_checkpoint
from fewbits.codecs import CODECS

ROWS, COLUMNS = 512, 4096
EXACT = ("F32",)


def real_rows(model: str) -> np.ndarray:
    """Rows of the model's largest linear whose length is a multiple of 256, as [rows, columns]."""
    checkpoint = open_checkpoint(model)
    fitting = [i for i in checkpoint.tensors.values() if len(i.shape) == 2 and i.shape[1] % 256 == 0]
    largest = max((i for i in fitting if "embed" not in i.name and "head" not in i.name), key=lambda i: i.nbytes)
    return checkpoint.read(largest.name, slice(0, 1024))


def weights(model: str | None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {
        "normal": rng.normal(size=(ROWS, COLUMNS)) * 0.02,
        "heavy-tailed": rng.standard_t(3, size=(ROWS, COLUMNS)) * 0.02,
    }
    if model:
        made["model"] = real_rows(model)
    return {name: np.ascontiguousarray(x, np.float32) for name, x in made.items()}


def timed(call: Callable[[], object]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


def error(x: np.ndarray, decoded: np.ndarray, importance: np.ndarray) -> float:
    return float((importance * (x.astype(np.float64) - decoded) ** 2).sum())


def ratio(ours: float, theirs: float) -> float:
    """Ours over theirs; 1 where neither loses anything."""
    return ours / theirs if theirs else (1.0 if not ours else float("inf"))


def compare(name: str, x: np.ndarray, repeats: int) -> dict[str, float]:
    codec = CODECS[name]
    importance = np.random.default_rng(1).lognormal(size=x.shape[1]).astype(np.float32)
    ones = np.ones(x.shape[1], np.float32)
    codec.encode(x[:1], importance)
    ggml.quantize_chunk(name, x[:1], importance)
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(timed(lambda: codec.encode(x, importance)))
        theirs.append(timed(lambda: ggml.quantize_chunk(name, x, importance)))
    mine = error(x, codec.decode(codec.encode(x, importance)), importance)
    peers = error(x, ggml.to_float(name, ggml.quantize_chunk(name, x, importance)), importance)
    paths = [ggml.quantize_chunk(name, x), ggml.quantize_chunk(name, x, ones)]
    best = min(error(x, ggml.to_float(name, p), ones) for p in paths)
    return {
        "ours": x.size / statistics.median(ours) / 1e6,
        "ggml": x.size / statistics.median(theirs) / 1e6,
        "speed_ratio": statistics.median(t / o for t, o in zip(theirs, ours, strict=True)),
        "error_ratio": ratio(mine, peers),
        "error_ratio_ones": ratio(error(x, codec.decode(codec.encode(x)), ones), best),
    }


def main() -> None:
    made = [name for name, codec in CODECS.items() if name not in EXACT]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", default=made)
    parser.add_argument("--model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [
        {"type": name, "weights": kind, **compare(name, x, options.repeats)}
        for name in options.types
        for kind, x in weights(options.model).items()
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print("| type | weights | ours Mw/s | libggml Mw/s | speed | error, importance | error, ones |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['type']} | {r['weights']} | {r['ours']:.1f} | {r['ggml']:.1f} | {r['speed_ratio']:.2f}x "
            f"| {r['error_ratio']:.4f} | {r['error_ratio_ones']:.4f} |"
        )


if __name__ == "__main__":
    main()
