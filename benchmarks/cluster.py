"""How encoding scales: threads, Ray workers, and what the machine itself allows.

    python benchmarks/cluster.py MODEL [--type IQ2_XS] [--runs 5] [--tensors N] [--json]

Each run quantizes the same tensors of MODEL by 1 and 2 threads, by 1 and 2 Ray workers, and by two processes that know
nothing of each other (the ceiling: two cores that are threads of one reach less than twice one). Ways take turns;
start-up and compilation are not counted; medians. In the end one of two Ray workers is killed in the middle; all files
are compared byte by byte.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from fewbits.checkpoint import open_checkpoint
from fewbits.cluster import workers_at
from fewbits.formats.gguf.source import gguf_source
from fewbits.formats.work import WorkFolder
from fewbits.plan import MixtureOptions, Plan
from fewbits.plan.tensors import layer_of
from fewbits.quantize import PlanRequest, execute
from fewbits.quantize.importances import Progress
from fewbits.quantize.planning import make_plan
from fewbits.workers import Workers

WAYS = {"1 thread": (1, False), "2 threads": (2, False), "1 Ray worker": (1, True), "2 Ray workers": (2, True)}
ALONE = "two separate processes"


@dataclass
class Work:
    """The tensors to encode, and where to."""

    model: str
    type: str
    tensors: int | None
    folder: Path

    def __post_init__(self) -> None:
        self.source = gguf_source(open_checkpoint(self.model))
        request = PlanRequest(self.type, MixtureOptions(pure=True), output=self.folder / "out.gguf")
        whole = make_plan(self.source, request)
        blocks = [t for t in whole.tensors if layer_of(t.name) >= 0 and len(t.shape) > 1]
        self.plan = self.of(whole, blocks[: self.tensors])
        self.first = self.of(whole, blocks[:8])

    @staticmethod
    def of(plan: Plan, tensors: list) -> Plan:
        return plan.model_copy(update={"tensors": tensors})

    @property
    def weights(self) -> float:
        return self.plan.n_weights / 1e6

    def run(
        self, name: str, threads: int, workers: Workers | None = None, progress: Progress | None = None
    ) -> tuple[float, Path]:
        """Seconds, and the file."""
        out = self.folder / f"{name}.gguf"
        self.make(self.first, out, threads, workers)
        started = time.perf_counter()
        self.make(self.plan, out, threads, workers, progress)
        return time.perf_counter() - started, out

    def make(
        self, plan: Plan, out: Path, threads: int, workers: Workers | None = None, progress: Progress | None = None
    ) -> None:
        with WorkFolder(out, {"tensors": len(plan.tensors)}, overwrite=True) as folder:
            execute(plan, self.source, folder, threads, True, progress, workers=workers)


def one_way(work: Work, way: str) -> tuple[float, Path]:
    count, remote = WAYS[way]
    with workers_at("local" if remote else None, count) as workers:
        return work.run(way.replace(" ", "-"), count, workers)


def separate(work: Work) -> float:
    """Two processes that begin together; seconds of the slower one."""
    command = [sys.executable, __file__, work.model, "--type", work.type, "--alone"]
    command += ["--tensors", str(work.tensors)] if work.tensors else []
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return max(float(process.communicate()[0]) for process in both)


def alone(work: Work) -> None:
    work.make(work.first, work.folder / "x.gguf", 1)
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    work.make(work.plan, work.folder / "x.gguf", 1)
    print(time.perf_counter() - started)


def dead_worker(work: Work) -> tuple[float, Path, int]:
    """Two Ray workers, one of which is killed when a third is done."""
    killed: list[int] = []

    def kill(done: int, total: int, what: str) -> None:
        # a worker at work is called after its task
        children = {child.pid: " ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)}
        busy = [pid for pid, name in children.items() if name.startswith(("ray::blk.", "ray::output"))]
        if 3 * done > total and not killed and busy:
            os.kill(busy[0], signal.SIGKILL)
            killed.append(busy[0])

    with workers_at("local", 2) as workers:
        seconds, out = work.run("dead", 2, workers, kill)
    return seconds, out, len(killed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--type", default="IQ2_XS")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tensors", type=int, help="only so many matrices of the decoder blocks")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fewbits-cluster-") as folder:
        work = Work(args.model, args.type, args.tensors, Path(folder))
        if args.alone:
            alone(work)
            return
        seconds: dict[str, list[float]] = {name: [] for name in (*WAYS, ALONE)}
        made: set[bytes] = set()
        for _ in range(args.runs):
            for way in WAYS:
                taken, out = one_way(work, way)
                seconds[way].append(taken)
                made.add(out.read_bytes())
            seconds[ALONE].append(separate(work))
        lost, out, killed = dead_worker(work)
        made.add(out.read_bytes())
    rates = {way: (2 if way == ALONE else 1) * work.weights / statistics.median(all_) for way, all_ in seconds.items()}
    gains = {
        "2 threads": rates["2 threads"] / rates["1 thread"],
        "2 Ray workers": rates["2 Ray workers"] / rates["1 Ray worker"],
        ALONE: rates[ALONE] / rates["1 thread"],
    }
    if args.json:
        told = {"weights_m": work.weights, "seconds": seconds, "rates": rates, "gains": gains, "killed": killed}
        print(json.dumps({**told, "dead_worker_seconds": lost, "identical": len(made) == 1}, indent=2))
        return
    print(f"{args.type}, {work.weights:.1f} M weights, medians of {args.runs} runs")
    for way, rate in rates.items():
        gain = f"  {gains[way]:.2f} x one" if way in gains else ""
        print(f"  {way:24} {rate:8.2f} M weights/s{gain}")
    usual = statistics.median(seconds["2 Ray workers"])
    print(f"  {killed} of 2 Ray workers killed in the middle: {lost:.1f} s instead of {usual:.1f} s")
    print("  all files are the same" if len(made) == 1 else "  THE FILES DIFFER")


if __name__ == "__main__":
    main()
