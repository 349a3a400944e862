"""One table of what about two bits per weight lose by every method: the linears of the decoder blocks quantized, all
else as it was.

    python benchmarks/two_bits.py MODEL --calibration c4.txt --text wiki.test.raw --work DIR [TARGET ...]

Bits per weight are all bytes that a format stores of these linears (codes, scales, codebooks, signs), whatever each
method's own paper counts. Rows that are in DIR already are not made again.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fewbits
from fewbits.plan import Plan
from fewbits.plan.tensors import layer_of

TARGETS = (
    *("exl3:2", "aqlm:2x8g8", "quip:2", "exl2:2.4", "IQ2_XXS", "IQ2_XS", "Q2_K"),
    *("gptq:w2g128", "hqq:w2g64", "bitnet"),
)
UNCALIBRATED = ("hqq:", "bitnet")
REST = {"exl": ["--head-bits", "16"], "gguf": ["--pure", "--token-embedding-type", "F16", "--leave-output-tensor"]}


def words_of(target: str, options: argparse.Namespace) -> list[str]:
    """Everything behind `fewbits quantize MODEL TARGET`."""
    directory = ":" in target or target == "bitnet"
    words = REST["exl"] if target.startswith("exl") else [] if directory else REST["gguf"]
    if target.startswith(UNCALIBRATED):
        return words
    texts = [word for text in options.calibration for word in ("--calibration", str(text))]
    return [*words, *texts, "--calibration-chunks", str(options.calibration_chunks)]


def bits(plan: Plan) -> float:
    """Per weight of the decoder blocks' linears."""
    linears = [
        t for t in plan.tensors
        if len(t.shape) > 1 and (".layers." in t.name or layer_of(t.name) >= 0) and t.method not in ("copy", "convert")
    ]  # fmt: skip
    return 8 * sum(t.nbytes for t in linears) / sum(t.n_weights for t in linears)


def run(words: list[str]) -> str:
    done = subprocess.run([sys.executable, "-m", "fewbits", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr[-2000:]}")
    return done.stdout


def processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def row(target: str, options: argparse.Namespace) -> dict[str, float | str]:
    out = options.work / target.replace(":", "-")
    out = out if ":" in target or target == "bitnet" else out.with_suffix(".gguf")
    words = [str(options.model), target, *words_of(target, options)]
    plan = Plan.model_validate_json(run(["plan", *words, "--json"])) if "exl2" not in target else None
    started, used = time.monotonic(), processor_time()
    threads = ["--threads", str(options.threads)] if options.threads else []
    made = json.loads(run(["quantize", *words, "-o", str(out), *threads, "--overwrite", "--json"]))
    seconds, used = time.monotonic() - started, processor_time() - used
    found = fewbits.measure(out, options.text, reference=options.model, chunks=options.chunks, threads=options.threads)
    assert found.comparison is not None
    kl = found.comparison.kl.mean
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return {
        "target": target,
        "bits": bits(plan) if plan else float(target.partition(":")[2]),
        "bytes": made["size"],
        "kl": kl.value,
        "spread": (kl.high - kl.low) / 2,
        "perplexity": found.perplexity.value,
        "seconds": seconds,
        "processor": used,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("targets", nargs="*", default=TARGETS)
    parser.add_argument("--calibration", type=Path, action="append", required=True)
    parser.add_argument("--calibration-chunks", type=int, default=64)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_intermixed_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print("| target | bits per weight | KL divergence | perplexity | seconds | of processor time |")
    print("|---|---|---|---|---|---|")
    rows = []
    for target in options.targets:
        kept = options.work / f"{target.replace(':', '-')}.json"
        if not kept.exists():
            kept.write_text(json.dumps(row(target, options)))
        rows.append(json.loads(kept.read_text()))
    for r in sorted(rows, key=lambda r: r["kl"]):
        print(
            f"| `{r['target']}` | {r['bits']:.3f} | {r['kl']:.4f} ± {r['spread']:.4f} | {r['perplexity']:.2f} | "
            f"{r['seconds']:.0f} | {r['processor']:.0f} |"
        )


if __name__ == "__main__":
    main()
