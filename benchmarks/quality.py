"""KL divergence of our files beside llama-quantize's (without imatrix), both measured in llama.cpp itself.

    python benchmarks/quality.py MODEL --bin DIR --text wiki.test.raw [--levels Q8_0 Q4_K_M] [--chunks 24]

`--bin` is the folder with llama-quantize. The reference is the model directory in float32; both files are made from it
(llama-quantize's from our unquantized conversion, so that only the quantizer differs).
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import fewbits

LEVELS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--levels", nargs="+", default=LEVELS)
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print("| level | bytes, ours | bytes, peer | KL, ours | KL, peer | ratio | same top, ours | same top, peer |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        fewbits.quantize(options.model, "COPY", folder / "source.gguf")
        for level in options.levels:
            made = {"ours": folder / "ours.gguf", "peer": folder / "peer.gguf"}
            fewbits.quantize(options.model, level, made["ours"], overwrite=True)
            command = [str(options.bin / "llama-quantize"), str(folder / "source.gguf"), str(made["peer"]), level]
            subprocess.run([*command, str(options.threads)], check=True, capture_output=True)
            found = {}
            for name, path in made.items():
                report = fewbits.measure(
                    path,
                    options.text,
                    reference=options.model,
                    chunks=options.chunks,
                    engine="llama.cpp",
                    threads=options.threads,
                )
                assert report.comparison is not None
                found[name] = report.comparison
            ours, peer = found["ours"], found["peer"]
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
