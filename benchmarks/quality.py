"""KL divergence of our files beside llama-quantize's, both measured in llama.cpp itself.

    python benchmarks/quality.py MODEL --bin DIR --text wiki.test.raw [--calibration wiki.valid.raw] [--levels Q4_K_M]

`--bin` is the folder with llama.cpp's tools. The reference is the model directory in float32; both files are made from
it (llama-quantize's from our unquantized conversion, so that only the quantizer differs). With `--calibration` each
side makes its own importance matrix of the same windows: ours by `fewbits calibrate`, the peer's by llama-imatrix.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import fewbits
from fewbits.measure.metrics import Comparison

LEVELS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")


def run(*command: str | Path | int) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--calibration-chunks", type=int, default=64)
    parser.add_argument("--levels", nargs="+", default=LEVELS)
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source, mine, theirs = folder / "source.gguf", folder / "ours.imatrix.gguf", folder / "peer.imatrix.gguf"
        fewbits.quantize(options.model, "COPY", source)
        ours_with: tuple[Path, ...] = ()
        peer_with: tuple[str | Path, ...] = ()
        if options.calibration:
            chunks, threads = options.calibration_chunks, options.threads
            fewbits.calibrate(
                options.model, options.calibration, mine, chunks=chunks, threads=threads, output_tensor=True
            )
            half = folder / "half.gguf"
            fewbits.quantize(options.model, "F16", half)
            tool = options.bin / "llama-imatrix"
            run(tool, "-m", half, "-f", options.calibration, "-c", 512, "--chunks", chunks, "--no-ppl", "-o", theirs,
                "-t", threads)  # fmt: skip
            half.unlink()
            ours_with, peer_with = (mine,), ("--imatrix", theirs)
        print("| level | bytes, ours | bytes, peer | KL, ours | KL, peer | ratio | same top, ours | same top, peer |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for level in options.levels:
            made = {"ours": folder / "ours.gguf", "peer": folder / "peer.gguf"}
            fewbits.quantize(options.model, level, made["ours"], overwrite=True, calibration=ours_with)
            run(options.bin / "llama-quantize", *peer_with, source, made["peer"], level, options.threads)
            ours, peer = (compared(path, options) for path in made.values())
            sizes = " | ".join(str(path.stat().st_size) for path in made.values())
            print(
                f"| {level} | {sizes} | {ours.kl.mean.value:.5f} ± {ours.kl.mean.high - ours.kl.mean.value:.5f} "
                f"| {peer.kl.mean.value:.5f} ± {peer.kl.mean.high - peer.kl.mean.value:.5f} "
                f"| {ours.kl.mean.value / peer.kl.mean.value:.3f} "
                f"| {ours.same_top.value:.2%} | {peer.same_top.value:.2%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
