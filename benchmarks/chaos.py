"""Runs of every target, killed at random moments, on full disks, with damaged work folders: each must end as one that
nothing has happened to, bit by bit.

    python benchmarks/chaos.py [--kills 200] [--targets Q4_K_M gptq:w4g128 ...] [--model MODEL] [--seed 0]

Each case is a command line of `python -m fewbits`. It runs once undisturbed, once on a disk that is full too soon (a
limit on the size of files, which the kernel enforces), and is killed and repeated until its share of the kills is
spent, then until it has ended. After one kill of four a file of the work folder is damaged.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from fewbits.capabilities import capabilities
from fewbits.cli import main as main_of_fewbits
from fewbits.demo import MODEL
from fewbits.formats.journal import Journal
from fewbits.formats.work import CHECKSUM

USED = (
    "numba", "torch", "transformers.models.llama.modeling_llama", "fewbits.quantize.blockwise",
    "fewbits.quantize.directory_job", "fewbits.quantize.gguf_job", "fewbits.quantize.tuning", "fewbits.calibration.run",
    "fewbits.quantize.exl2_measurement", "fewbits.verify.made", "fewbits.formats.directory",
)  # fmt: skip
"""What commands import."""
TEXT = Path(MODEL).parent / "held_out.txt"
DAMAGED_EVERY = 4
AFRESH_EVERY = 5
"""Of so many last runs of a case, one starts Python anew."""


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


@dataclass
class Run:
    """A command in a process of its own.

    Forked from one that has imported everything and computed nothing (threads do not survive a fork): imports take
    longer than what is to be killed. With `afresh` it starts anew.
    """

    case: Case
    model: Path
    folder: Path
    limit: int | None = None
    afresh: bool = False

    def __post_init__(self) -> None:
        self.told = self.folder.with_suffix(".stderr")
        self.pid = os.fork()
        if not self.pid:
            self._work()

    def _work(self) -> None:
        """What the process does; it ends here."""
        os.setsid()
        os.chdir(self.folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(self.told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        if self.limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))
        command = self.case.command(self.model)
        if self.afresh:
            os.execv(command[0], command)
        sys.argv = ["fewbits", *command[3:]]
        code: object = 1
        try:
            main_of_fewbits()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code, or less the signal that ended it; None where the time was up before."""
        stop = time.monotonic() + seconds if seconds is not None else None
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG if stop else 0)
            if done:
                return os.waitstatus_to_exitcode(status)
            if stop and time.monotonic() >= stop:
                return None
            time.sleep(0.002)

    @property
    def stderr(self) -> str:
        return self.told.read_text()


def killed(run: Run, seconds: float) -> bool:
    """Whether the run was still going on when its time had come."""
    if run.wait(seconds) is not None:
        return False
    os.killpg(run.pid, signal.SIGKILL)
    return run.wait() == -signal.SIGKILL


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


def torment(case: Case, model: Path, kills: int, rng: random.Random, afresh: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="fewbits-chaos-") as name:
        whole, folder = Path(name, "whole"), Path(name, "killed")
        whole.mkdir()
        folder.mkdir()
        started = time.monotonic()
        done = Run(case, model, whole, afresh=afresh)
        if done.wait():
            case.problems.append(f"refused: {done.stderr.strip().splitlines()[-1]}")
            return
        seconds = time.monotonic() - started
        truth = contents(whole)

        done = Run(case, model, folder, int(max(map(len, truth.values())) * rng.uniform(0.1, 0.9)), afresh)
        if done.wait() != 2 or done.stderr.count("\n") != 1:
            case.problems.append(f"full disk: {done.stderr.strip()[-200:]}")
        case.full_disks += 1

        while case.kills < kills:
            early = 0
            while early < 10 and not killed(Run(case, model, folder, None, afresh), rng.uniform(0, 1) * seconds):
                early += 1
                if (folder / "out").exists() and not (folder / "out.partial").exists():
                    compare(case, truth, folder)
                    shutil.rmtree(folder)
                    folder.mkdir()
                seconds *= 0.9
            case.kills += 1
            work = folder / "out.partial"
            case.going_on += any(CHECKSUM in entry for entry in Journal(work / "journal").entries)
            if rng.randrange(DAMAGED_EVERY) == 0 and work.exists():
                damage(work, rng)
                case.damaged += 1
        done = Run(case, model, folder, afresh=afresh or rng.randrange(AFRESH_EVERY) == 0)
        if done.wait():
            told_done = "the output exists" in done.stderr or "statistics already" in done.stderr
            if not (told_done and not (folder / "out.partial").exists()):
                case.problems.append(done.stderr.strip()[-200:])
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
    parser.add_argument("--afresh", action="store_true", help="start Python anew for every run, which takes hours")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    for module in USED:
        import_module(module)
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
        torment(case, options.model.resolve(), share, rng, options.afresh)
        kills += case.kills
        if not case.problems:
            identical += case.kills
        row = [case.name, case.kills, case.going_on, case.damaged, case.full_disks]
        print("|", " | ".join(map(str, row)), "|", "; ".join(case.problems) or "identical", "|", flush=True)
    print(f"\n{kills} kills, {identical} identical results")


if __name__ == "__main__":
    main()
