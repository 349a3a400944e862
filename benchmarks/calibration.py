"""Making an importance matrix, beside llama-imatrix on the same text: time, memory, and how far the sums are apart.

    python benchmarks/calibration.py MODEL --text wiki.valid.raw --bin llama.cpp/build/bin [--chunks 16] [--threads 1]

Turn about, medians. The peer runs the F16 GGUF that `fewbits quantize MODEL F16` makes, with --no-ppl: without it, it
computes the head too. How far apart: the median over the columns of a tensor of the relative difference of their sums;
of that the median and the worst tensor. With --quantize TYPE llama-quantize must take the file, for every weight.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import fewbits
from fewbits.calibration import Statistics, read_statistics


def timed(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak resident MB of a command, start included."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"failed: {' '.join(command)}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def apart(ours: Statistics, theirs: Statistics) -> tuple[float, float]:
    """Relative difference of the column sums: median of a tensor, of those the median and the worst."""
    assert ours.tensors.keys() == theirs.tensors.keys(), "other tensors"
    medians = [
        float(np.median(np.abs(ours.tensors[name].importance() / theirs.tensors[name].importance() - 1)))
        for name in theirs.tensors
    ]
    return statistics.median(medians), max(medians)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory")
    parser.add_argument("--text", required=True)
    parser.add_argument("--bin", type=Path, required=True, help="folder of llama-imatrix and llama-quantize")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quantize", metavar="TYPE", help="let llama-quantize use the result")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        gguf, ours, theirs = (f"{folder}/{name}.gguf" for name in ("model", "ours", "theirs"))
        fewbits.quantize(options.model, "F16", gguf)
        common = ["--chunks", str(options.chunks)]
        threads = str(options.threads)
        commands = {
            "fewbits": [
                *(sys.executable, "-m", "fewbits", "calibrate", options.model, "--text", options.text, "-o", ours),
                *(*common, "--threads", threads, "--overwrite", "--device", "cpu"),
            ],
            "llama-imatrix": [
                *(str(options.bin / "llama-imatrix"), "-m", gguf, "-f", options.text, "-o", theirs),
                *(*common, "-c", "512", "--no-ppl", "-t", threads),
            ],
        }
        runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        for _ in range(options.turns):
            for name, command in commands.items():
                runs[name].append(timed(command))
        found = {
            name: dict(zip(("wall", "cpu", "megabytes"), map(statistics.median, zip(*turns, strict=True)), strict=True))
            for name, turns in runs.items()
        }
        median, worst = apart(read_statistics(ours), read_statistics(theirs))
        if options.quantize:
            command = [options.bin / "llama-quantize", "--imatrix", ours, gguf, f"{folder}/q.gguf", options.quantize]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            assert "did not find weights for blk." not in done.stdout + done.stderr
    ratio = found["fewbits"]["wall"] / found["llama-imatrix"]["wall"]
    if options.json:
        print(json.dumps({"runs": found, "wall_ratio": ratio, "median_apart": median, "worst_apart": worst}, indent=2))
        return
    print("| tool | wall s | CPU s | peak MB |\n|---|---|---|---|")
    for name, run in found.items():
        print(f"| {name} | {run['wall']:.1f} | {run['cpu']:.1f} | {run['megabytes']:.0f} |")
    print(f"\n{512 * options.chunks} tokens, wall time {ratio:.2f}x; apart {median:.1e}, worst {worst:.1e}")


if __name__ == "__main__":
    main()
