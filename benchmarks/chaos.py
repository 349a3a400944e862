"""Runs of every target, killed at random moments, on full disks, with damaged work folders: each must end as one that
nothing has happened to, bit by bit.

    python benchmarks/chaos.py [--kills 200] [--targets Q4_K_M gptq:w4g128 ...] [--model MODEL] [--seed 0]

Each case is a command line of `python -m fewbits`. It runs once undisturbed, once on a disk that is full too soon (a
limit on the size of files, which the kernel enforces), and is killed and repeated until its share of the kills is
spent, then until it has ended. After every fourth kill a file of the work folder is damaged.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fewbits.capabilities import capabilities
from fewbits.demo import MODEL
from fewbits.formats.journal import Journal
from fewbits.formats.work import CHECKSUM

TEXT = Path(MODEL).parent / "held_out.txt"
DAMAGED_EVERY = 4


@dataclass
class Case:
    """A command, without model and output, and what has happened to it.

    Attributes:
        going_on: kills that left something in the journal to go on from.
    """

    words: list[str]
    verb: str = "quantize"
    kills: int = 0
    going_on: int = 0
    damaged: int = 0
    full_disks: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return " ".join([self.verb, *(Path(word).name for word in self.words)])

    def command(self, model: Path) -> list[str]:
        return [sys.executable, "-m", "fewbits", self.verb, str(model), *self.words, "-o", "out"]


def cases(wanted: list[str]) -> list[Case]:
    """Every target of `fewbits list`, as it is usually made, and the ways that jobs differ in."""
    text = ["--calibration", str(TEXT), "--calibration-chunks", "8"]
    known = capabilities()
    found = {
        "calibrate": [Case(["--text", str(TEXT), "--chunks", "8", "--sensitivity"], "calibrate")],
        "calibrate --hessians": [
            Case(["--text", str(TEXT), "--chunks", "8", "--hessians", "hessians"], "calibrate"),
        ],
        "gguf": [Case(["gguf", "--bpw", "4.5", *text]), Case(["gguf", "--bpw", "5"])],
        "split": [Case(["Q4_0", "--split-max-size", "500K"]), Case(["Q4_0", "--split-max-size", "500K", *text])],
    }
    for preset in known.presets:
        if preset.name != "GGUF":
            found[preset.name] = [Case([preset.name]), Case([preset.name, *text])]
    for row in known.directories:
        found[row.name] = [Case([row.name, *text])]
        if "search" in row.methods:
            found[row.name].append(Case([row.name, "--method", "search"]))
    for row in known.open_directories:
        found[row.name] = [Case([row.name, "--bpw", f"{(row.least + row.most) / 2:.2f}", *text])]
    return [case for name, some in found.items() if not wanted or name in wanted for case in some]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def run(case: Case, model: Path, folder: Path, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def limited() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        case.command(model), cwd=folder, capture_output=True, text=True, check=False, preexec_fn=limited
    )


def killed(case: Case, model: Path, folder: Path, seconds: float) -> bool:
    """Whether the run was still going on when its time had come."""
    process = subprocess.Popen(
        case.command(model),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait() == -signal.SIGKILL


def damage(work: Path, rng: random.Random) -> None:
    """Flip a bit of a file, cut it off, or add to it."""
    files = sorted(file for file in work.rglob("*") if file.is_file() and file.stat().st_size)
    if not files:
        return
    data = bytearray((file := rng.choice(files)).read_bytes())
    place = rng.randrange(len(data))
    kind = rng.choice(["flip", "cut", "add"])
    if kind == "flip":
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[place:]
    else:
        data += rng.randbytes(100)
    file.write_bytes(data)


def torment(case: Case, model: Path, kills: int, rng: random.Random) -> Iterator[None]:
    """Yields after each kill."""
    with tempfile.TemporaryDirectory(prefix="fewbits-chaos-") as name:
        whole, folder = Path(name, "whole"), Path(name, "killed")
        whole.mkdir()
        folder.mkdir()
        run(case, model, whole)  # kernels are compiled
        shutil.rmtree(whole)
        whole.mkdir()
        started = time.monotonic()
        done = run(case, model, whole)
        seconds = time.monotonic() - started
        if done.returncode:
            case.problems.append(f"refused: {done.stderr.strip().splitlines()[-1]}")
            return
        truth = contents(whole)

        done = run(case, model, folder, int(max(map(len, truth.values())) * rng.uniform(0.1, 0.9)))
        if done.returncode != 2 or done.stderr.count("\n") != 1:
            case.problems.append(f"full disk: exit {done.returncode}, {done.stderr.strip()[-200:]}")
        case.full_disks += 1

        while case.kills < kills:
            early = 0
            while early < 10 and not killed(case, model, folder, rng.uniform(0.1, 1) * seconds):
                early += 1
                if (folder / "out").exists() and not (folder / "out.partial").exists():
                    compare(case, truth, folder)
                    shutil.rmtree(folder)
                    folder.mkdir()
                seconds *= 0.9
            case.kills += 1
            work = folder / "out.partial"
            case.going_on += any(CHECKSUM in entry for entry in Journal(work / "journal").entries)
            if case.kills % DAMAGED_EVERY == 0 and work.exists():
                damage(work, rng)
                case.damaged += 1
            yield
        done = run(case, model, folder)
        told_done = "the output exists" in done.stderr or "statistics already" in done.stderr
        if done.returncode and not (told_done and not (folder / "out.partial").exists()):
            case.problems.append(f"exit {done.returncode}: {done.stderr.strip()[-200:]}")
        compare(case, truth, folder)


def compare(case: Case, truth: dict[str, bytes], folder: Path) -> None:
    found = contents(folder)
    if found != truth:
        differing = [file for file in {**found, **truth} if found.get(file) != truth.get(file)]
        case.problems.append(f"differs: {', '.join(differing[:3])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(MODEL))
    parser.add_argument("--targets", nargs="+", default=[], help="names as `fewbits list` has them; default: all")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    every = cases(options.targets)
    rng.shuffle(every)
    kills = identical = 0
    print(
        "| target | kills | with something to go on from | damaged | full disks | result |\n|---|---|---|---|---|---|"
    )
    for number, case in enumerate(every):
        # what is left, dealt out evenly
        share = -(-(options.kills - kills) // (len(every) - number))
        if share <= 0:
            break
        kills += sum(1 for _ in torment(case, options.model.resolve(), share, rng))
        if not case.problems:
            identical += case.kills
        row = [case.name, case.kills, case.going_on, case.damaged, case.full_disks]
        print("|", " | ".join(map(str, row)), "|", "; ".join(case.problems) or "identical", "|", flush=True)
    print(f"\n{kills} kills, {identical} identical results")


if __name__ == "__main__":
    main()
