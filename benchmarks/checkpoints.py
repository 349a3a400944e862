"""Size, time and KL divergence of model directories: ours, and any that other tools have made of the same model.

    python benchmarks/checkpoints.py MODEL TARGET... --calibration c4.txt --text wiki.test.raw [--peer NAME=DIR]

Ours are made one after another in processes of their own, so that time and peak memory are theirs alone. Peers are only
measured: how long they took is for their own logs to say. All are measured block by block with decoded weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fewbits


def made(target: str, folder: Path, options: argparse.Namespace) -> tuple[float, int]:
    """Make a directory; returns seconds and peak memory."""
    method = target.partition("+")[2]
    words = ["quantize", options.model, target.partition("+")[0], "-o", folder, "--json"]
    words += ["--method", method] if method else []
    if options.calibration:
        words += ["--calibration", options.calibration, "--calibration-chunks", options.calibration_chunks]
    started = time.monotonic()
    command = [sys.executable, "-m", "fewbits", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{target}: {done.stderr[-2000:]}")
    return time.monotonic() - started, json.loads(done.stdout)["peak_memory"]


def row(name: str, folder: Path, seconds: str, memory: str, options: argparse.Namespace) -> str:
    found = fewbits.measure(folder, options.text, reference=options.model, chunks=options.chunks).comparison
    assert found is not None
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    mean, same = found.kl.mean, found.same_top.value
    spread = (mean.high - mean.low) / 2
    return f"| {name} | {size} | {seconds} | {memory} | {mean.value:.4f} ± {spread:.4f} | {same:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("targets", nargs="*", help="TARGET, or TARGET+METHOD")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--calibration-chunks", type=int, default=64)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=DIR")
    options = parser.parse_args()
    print("| made by | bytes | s | peak memory | KL divergence | same top |\n|---|---|---|---|---|---|")
    for peer in options.peer:
        name, _, folder = peer.partition("=")
        print(row(name, Path(folder), "", "", options), flush=True)
    with tempfile.TemporaryDirectory() as work:
        for number, target in enumerate(options.targets):
            folder = Path(work) / str(number)
            seconds, memory = made(target, folder, options)
            print(row(f"fewbits {target}", folder, f"{seconds:.0f}", f"{memory / 1e6:.0f} MB", options), flush=True)


if __name__ == "__main__":
    main()
