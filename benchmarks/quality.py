"""What GGUF files lose, ours beside llama-quantize's, level by level and at the same bytes, all measured in llama.cpp.

    python benchmarks/quality.py MODEL --bin DIR --work DIR --text wiki.test.raw --text code.txt \
        --calibration wiki.valid.raw --calibration c4.txt --levels Q4_0 Q4_K_M

`--bin` is the folder with llama-quantize. The reference is the model in float32; all files are made from it
(llama-quantize's from our unquantized conversion, so that only the quantizer differs). One importance matrix of the
calibration texts serves both sides; what each side makes of it, and we of the texts, are the rows: see `MAKERS`. Of a
text that is named both ways the second half is kept out of the calibration, and measures. Rows that are in `--work`
already are not made again; a folder serves one model, one calibration and one `--chunks`. The tables of docs/quality.md
come out at the end: the first text in full, then all texts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fewbits
from fewbits.methods.base import Effort
from fewbits.quantize.budget import Budget

LEVELS = ("Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")


@dataclass(frozen=True)
class Maker:
    """Who makes a file, and how.

    Attributes:
        effort: ours; None for llama-quantize.
        imatrix: whether inputs are weighed.
        budget: whether types are chosen freely, for a file no larger than the level's.
    """

    effort: Effort | None = None
    imatrix: bool = True
    budget: bool = False


MAKERS = {
    "llama.cpp": Maker(imatrix=False),
    "llama.cpp, imatrix": Maker(),
    "no text": Maker("fast", imatrix=False),
    "fast": Maker("fast"),
    "default": Maker("default"),
    "thorough": Maker("thorough"),
    "size, fast": Maker("fast", budget=True),
    "size, default": Maker("default", budget=True),
    "size, thorough": Maker("thorough", budget=True),
}
PEERS = ("llama.cpp", "llama.cpp, imatrix")
ONE_TYPE = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"}
"""Levels that name one type, which ours keep; of other levels ours keep the size."""


def makers_of(level: str) -> list[str]:
    """The rows of a level."""
    efforts = ("fast", "default", "thorough")
    return [*PEERS, *(effort if level in ONE_TYPE else f"size, {effort}" for effort in efforts)]


class RefusedError(Exception):
    """llama-quantize makes no such file without an importance matrix."""


def run(*command: str | Path | int) -> None:
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)
    if done.returncode:
        told = done.stdout + done.stderr
        if "importance matrix" in told:
            raise RefusedError(told[-2000:])
        raise SystemExit(f"{command[0]}: {told[-2000:]}")


def used() -> float:
    """Seconds of processor time, of this process and those it waited for."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    options: argparse.Namespace
    texts: list[Path]
    calibration: list[Path]

    @staticmethod
    def of(options: argparse.Namespace) -> Bench:
        """Split the texts that both calibrate and measure."""
        options.work.mkdir(parents=True, exist_ok=True)
        texts, calibration = list(options.text), list(options.calibration)
        for path in {*texts} & {*calibration}:
            whole = path.read_text(encoding="utf-8")
            seen, kept = (options.work / f"{path.stem}.{part}.txt" for part in ("calibration", "held-out"))
            seen.write_text(whole[: len(whole) // 2], encoding="utf-8")
            kept.write_text(whole[len(whole) // 2 :], encoding="utf-8")
            texts[texts.index(path)], calibration[calibration.index(path)] = kept, seen
        bench = Bench(options, texts, calibration)
        bench.check_folder()
        return bench

    def check_folder(self) -> None:
        """Refuse a folder with rows of something else."""
        options, kept = self.options, self.options.work / "settings.json"
        settings = {
            "model": str(options.model.resolve()),
            "calibration": [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.calibration],
            "windows": [options.calibration_chunks, options.chunks],
        }
        if kept.exists() and json.loads(kept.read_text()) != settings:
            raise SystemExit(f"{options.work}: its rows are of another model, calibration or --chunks. Name another.")
        kept.write_text(json.dumps(settings))

    @property
    def statistics(self) -> Path:
        """The importance matrix, made once."""
        path: Path = self.options.work / "statistics.gguf"
        if not path.exists():
            fewbits.calibrate(
                *(self.options.model, self.calibration, path),
                chunks=self.options.calibration_chunks,
                output_tensor=True,
                sensitivity=True,
                threads=self.options.threads,
            )
        return path

    @property
    def source(self) -> Path:
        """The model as llama-quantize wants it."""
        path: Path = self.options.work / "source.gguf"
        if not path.exists():
            fewbits.quantize(self.options.model, "COPY", path)
        return path

    def make(self, maker: Maker, level: str, out: Path) -> None:
        if maker.effort is None:
            imatrix = ["--imatrix", self.statistics] if maker.imatrix else []
            run(self.options.bin / "llama-quantize", *imatrix, self.source, out, level, self.options.threads)
            return
        texts = self.calibration if maker.effort != "fast" else []
        statistics = [self.statistics] if maker.imatrix else []
        fewbits.quantize(
            *(self.options.model, "gguf" if maker.budget else level, out),
            calibration=[*statistics, *texts],
            calibration_chunks=self.options.calibration_chunks if texts else None,
            budget=Budget(like=level) if maker.budget else None,
            effort=maker.effort,
            threads=self.options.threads,
            overwrite=True,
        )

    def row(self, name: str, level: str, variant: str = "") -> dict[str, Any]:
        """What a maker's file takes and loses; `variant` tells rows of one maker apart."""
        kept = self.options.work / f"{level}.{name.replace(', ', '-')}{variant}.json"
        found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
        missing = [text for text in self.texts if text.name not in found.get("texts", {})]
        if not missing:
            return found
        out = kept.with_suffix(".gguf")
        _, _, started, before = self.statistics, self.source, time.monotonic(), used()
        try:
            self.make(MAKERS[name], level, out)
        except RefusedError as error:
            return {"refused": str(error)}
        if not found:
            found = {"bytes": out.stat().st_size, "seconds": time.monotonic() - started, "used": used() - before}
            found["texts"] = {}
        for text in missing:
            found["texts"][text.name] = self.measured(out, text)
        out.unlink()
        kept.write_text(json.dumps(found))
        return found

    def measured(self, path: Path, text: Path) -> dict[str, float]:
        options = self.options
        measuring = {"chunks": options.chunks, "engine": "llama.cpp", "threads": options.threads}
        report = fewbits.measure(path, text, reference=options.model, **measuring)
        assert report.comparison is not None
        kl = report.comparison.kl.mean
        return {
            "kl": kl.value,
            "spread": (kl.high - kl.low) / 2,
            "perplexity": report.perplexity.value,
            "top": report.comparison.same_top.value,
        }


Rows = list[tuple[str, str, dict[str, Any]]]


def peers(rows: Rows, text: str) -> dict[str, float]:
    """By level: what llama.cpp with an importance matrix loses."""
    return {level: row["texts"][text]["kl"] for level, maker, row in rows if maker == PEERS[1] and "texts" in row}


def share(kl: float, whole: float | None) -> str:
    """A KL divergence, and in brackets what share of another it is."""
    return f"{kl:.4f}" + (f" ({kl / whole:.2f})" if whole else "")


def print_first(rows: Rows, text: str) -> None:
    print("| level | made by | bytes | processor seconds | perplexity | KL divergence | ratio |")
    print("|---|---|---|---|---|---|---|")
    peer = peers(rows, text)
    for level, maker, row in rows:
        if "refused" in row:
            print(f"| {level} | {maker} | - | - | - | refused | |")
            continue
        one = row["texts"][text]
        ratio = f"{one['kl'] / peer[level]:.2f}" if level in peer else ""
        kl = f"{one['kl']:.4f} ± {one['spread']:.4f}"
        print(f"| {level} | {maker} | {row['bytes']} | {row['used']:.0f} | {one['perplexity']:.2f} | {kl} | {ratio} |")


def print_all(rows: Rows, texts: list[str]) -> None:
    print(f"\n| level | made by | {' | '.join(texts)} |")
    print("|---|---|" + "---|" * len(texts))
    by_text = {text: peers(rows, text) for text in texts}
    for level, maker, row in rows:
        if "refused" in row:
            continue
        cells = [share(row["texts"][text]["kl"], peer.get(level)) for text, peer in by_text.items()]
        print(f"| {level} | {maker} | {' | '.join(cells)} |")


def arguments(description: str) -> argparse.ArgumentParser:
    """What a `Bench` needs to be told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path)
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--calibration", type=Path, action="append", required=True)
    parser.add_argument("--calibration-chunks", type=int, default=64)
    parser.add_argument("--levels", nargs="+", default=LEVELS)
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--makers", nargs="+", choices=[*MAKERS])
    options = parser.parse_args()
    bench = Bench.of(options)
    rows = []
    for level in options.levels:
        for maker in options.makers or makers_of(level):
            rows.append((level, maker, bench.row(maker, level)))
            print(level, maker, rows[-1][2], file=sys.stderr, flush=True)
    names = [text.name for text in bench.texts]
    print_first(rows, names[0])
    if len(names) > 1:
        print_all(rows, names)


if __name__ == "__main__":
    main()
