"""KL divergence of our files beside llama-quantize's, all measured in llama.cpp itself.

    python benchmarks/quality.py MODEL --bin DIR --text wiki.test.raw [--calibration wiki.valid.raw] [--levels Q4_K_M]

`--bin` is the folder with llama.cpp's tools. The reference is the model directory in float32; all files are made from
it (llama-quantize's from our unquantized conversion, so that only the quantizer differs). With `--calibration` each
side makes its own importance matrix of the same windows: ours by `fewbits calibrate`, the peer's by llama-imatrix; and
ours is also made with the Hessians of these windows ("feedback"). With `--budget` ours are made once more as
`gguf` with the size of the peer's file as budget.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import fewbits
from fewbits.measure.metrics import Comparison
from fewbits.quantize.budget import Budget

LEVELS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")


def run(*command: str | Path | int) -> None:
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]}: {done.stderr[-2000:]}")


def compared(path: Path, options: argparse.Namespace) -> Comparison:
    report = fewbits.measure(
        path,
        options.text,
        reference=options.model,
        chunks=options.chunks,
        engine="llama.cpp",
        threads=options.threads,
    )
    assert report.comparison is not None
    return report.comparison


def calibrated(folder: Path, options: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], list[str | Path]]:
    """What each of our files is made with, and the peer's arguments."""
    mine, theirs, hessians, half = (folder / n for n in ("ours.dat.gguf", "peer.gguf", "hessians", "half.gguf"))
    text, chunks, threads = options.calibration, options.calibration_chunks, options.threads
    fewbits.calibrate(
        *(options.model, text, mine),
        chunks=chunks,
        hessians=hessians,
        output_tensor=True,
        sensitivity=options.budget,
        threads=threads,
    )
    fewbits.quantize(options.model, "F16", half)
    tool = options.bin / "llama-imatrix"
    run(tool, "-m", half, "-f", text, "-c", 512, "--chunks", chunks, "--no-ppl", "-o", theirs, "-t", threads)
    half.unlink()
    ours: dict[str, dict[str, Any]] = {"fewbits": {"calibration": [mine]}}
    ours["fewbits, feedback"] = {"calibration": [mine], "hessians": hessians}
    return ours, ["--imatrix", theirs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--calibration-chunks", type=int, default=64)
    parser.add_argument("--levels", nargs="+", default=LEVELS)
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--budget", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source, out = folder / "source.gguf", folder / "made.gguf"
        fewbits.quantize(options.model, "COPY", source)
        ours: dict[str, dict[str, Any]] = {"fewbits": {}}
        peer_with: list[str | Path] = []
        if options.calibration:
            ours, peer_with = calibrated(folder, options)
        print("| level | made by | bytes | seconds | KL divergence | ratio | same top |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for level in options.levels:
            peer, size = None, 0
            mixtures = {f"{maker}, budget": given for maker, given in ours.items() if options.budget}
            for maker in ("llama-quantize", *ours, *mixtures):
                started = time.perf_counter()
                common: dict[str, Any] = {"threads": options.threads, "overwrite": True}
                if maker in ours:
                    fewbits.quantize(options.model, level, out, **common, **ours[maker])
                elif maker in mixtures:
                    fewbits.quantize(options.model, "gguf", out, budget=Budget(size=size), **common, **mixtures[maker])
                else:
                    run(options.bin / "llama-quantize", *peer_with, source, out, level, options.threads)
                seconds = time.perf_counter() - started
                size = size or out.stat().st_size
                found = compared(out, options)
                mean = found.kl.mean
                peer = peer or mean.value
                print(
                    f"| {level} | {maker} | {out.stat().st_size} | {seconds:.1f} "
                    f"| {mean.value:.5f} ± {mean.high - mean.value:.5f} | {mean.value / peer:.3f} "
                    f"| {found.same_top.value:.2%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
