"""A plan on paper: one 405B model, and a hub of 10,000 models a day. docs/scale.md shows what it prints.

    python tools/scale/simulate.py [--rates rates.json] [--models-a-day 10000] [--machines N]

Rates were measured on one core (`rates.json` says how), prices and bandwidths are assumptions. Work is counted in
weights encoded and in operations of matrix products; that such rates hold for larger matrices is an assumption, too.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BF16, STATISTICS = 2, "imatrix"
GGUF = {"Q4_K_M": ("Q4_K", 4.89), "Q8_0": ("Q8_0", 8.5), "IQ2_XS": ("IQ2_XS", 2.59)}
"""Target -> the type that most weights get, bits per weight."""
BITS = {"gptq:w4g128": 4.16, STATISTICS: 0.0} | {target: bits for target, (_, bits) in GGUF.items()}
WINDOWS, CONTEXT = 128, 512


@dataclass(frozen=True)
class Shape:
    """A dense Llama.

    Attributes:
        layers, hidden, ff: as in config.json.
        kv: columns of keys, and of values.
    """

    name: str
    layers: int
    hidden: int
    ff: int
    kv: int
    vocabulary: int = 128256

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """[out, in] of the linears of a block."""
        h, f = self.hidden, self.ff
        return [(h, h), (self.kv, h), (self.kv, h), (h, h), (f, h), (f, h), (h, f)]

    @property
    def inputs(self) -> list[int]:
        """Columns of each distinct input of a block's linears."""
        return [self.hidden, self.hidden, self.hidden, self.ff]

    @property
    def block(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def weights(self) -> int:
        return self.layers * self.block + 2 * self.vocabulary * self.hidden


LARGE = Shape("405B", 126, 16384, 53248, 1024)


def shape_of(billions: float) -> Shape:
    """A model of about so many weights, in the proportions that such models have."""
    hidden = 64 * round(2048 * (billions / 1.2) ** 0.36 / 64)
    ff = 7 * hidden // 2
    each = 2 * hidden * hidden + hidden * hidden // 2 + 3 * hidden * ff
    layers = max(8, round(max(0.2e9, billions * 1e9 - 2 * 128256 * hidden) / each))
    return Shape(f"{billions:g}B", layers, hidden, ff, hidden // 4)


@dataclass(frozen=True)
class Work:
    """What a job takes.

    Attributes:
        core_seconds: by what they are for.
        read, written: bytes.
        apart: core-seconds that more machines do not shorten, since one matrix is on one machine.
        exchanged: bytes that each of several machines sends.
    """

    core_seconds: dict[str, float]
    read: float
    written: float
    apart: float = 0.0
    exchanged: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.core_seconds.values())

    def seconds(self, machines: int, assumed: dict[str, float]) -> float:
        """Wall time: disks, network and cores overlap, so the slowest counts."""
        cores = assumed["cores_of_a_machine"]
        computing = ((self.total - self.apart) / machines + self.apart) / cores
        moving = (self.read + self.written) / machines / (assumed["disk_gb_per_second"] * 1e9)
        network = (self.read + self.written) / machines / (assumed["network_gb_per_second"] * 1e9)
        sending = self.exchanged / (assumed["network_gb_per_second"] * 1e9) if machines > 1 else 0.0
        return max(computing, moving, network) + sending


def work(shape: Shape, target: str, rates: dict[str, Any]) -> Work:
    """Of one model and one target."""
    encode, speed = (
        rates["encode_mweights_per_core_second"],
        {k: v for k, v in rates["core_gflops"].items() if k != "from"},
    )
    read, written = BF16 * shape.weights, shape.weights * BITS[target] / 8
    if target in GGUF:
        return Work({"search": shape.weights / encode[GGUF[target][0]] / 1e6}, read, written)
    tokens, blocks, apart, exchanged = WINDOWS * CONTEXT, shape.layers, 0.0, 0.0
    if target == STATISTICS:
        return Work({"forward": 2 * shape.block * blocks * tokens / speed["float32 products"] / 1e9}, read, 0.0)
    parts = {
        "forward": 2 * shape.block * blocks * tokens / speed["bfloat16 products"],
        "Hessians": blocks * sum(n * n for n in shape.inputs) * tokens / speed["sums of x x^T, columns^2 x tokens"],
        "factors": blocks * sum(2 / 3 * n**3 for n in shape.inputs) / speed["float64 factor, 2/3 columns^3"],
        "feedback": blocks * sum(r * c * c for r, c in shape.matrices) / speed["error feedback, weights x columns"],
    }
    parts = {name: operations / 1e9 for name, operations in parts.items()}
    parts["search"] = shape.block * blocks / encode["Q4_K"] / 1e6
    apart = parts["factors"]
    # each machine's sums go to the one that factors, and the block's new weights come back
    exchanged = blocks * (4 * sum(n * n for n in shape.inputs) + BF16 * shape.block)
    return Work(parts, read, written, apart, exchanged)


def hessian_gb(columns: int) -> float:
    """The sum in float32, and the float64 matrix that is factored, which may lie in a file."""
    return 12 * columns * columns / 1e9


# the hub


@dataclass(frozen=True)
class Hub:
    """What a simulation found; hours."""

    machines: int
    done: int
    failures: int
    utilisation: float
    median_wait: float
    p99_wait: float


def hub(
    services: list[tuple[float, float]],
    a_day: int,
    machines: int,
    hours_between_failures: float,
    days: float = 3.0,
    lost: float = 0.02,
    seed: int = 0,
) -> Hub:
    """Jobs arrive by a Poisson process, busier by day than by night, wait in the order of their arrival, and run on one
    machine each; a machine that fails gives its job back to the front of the queue, which has lost a part of itself.

    Args:
        services: (share, hours) of each kind of model.
        lost: of a job's time, where it fails: with a journal what was done since the last block; 1: all of it.
    """
    rng, now = random.Random(seed), 0.0
    ends: list[tuple[float, int, float, float]] = []
    queue: list[tuple[float, int, float]] = []
    free, busy, failures, number, waits = machines, 0.0, 0, 0, []
    shares, hours = [share for share, _ in services], [each for _, each in services]

    def next_arrival(after: float) -> float:
        while True:  # thinning: the rate swings by 40 % with the hour
            after += rng.expovariate(1.4 * a_day / 24)
            if rng.random() * 1.4 < 1 + 0.4 * math.sin(2 * math.pi * after / 24):
                return after

    arrival, last = next_arrival(0.0), 24 * days
    while arrival < last or queue or ends:
        while free and queue:
            came, which, left = heapq.heappop(queue)
            waits.append(max(0.0, now - came))
            fails = rng.expovariate(1 / hours_between_failures)
            spent = min(left, fails)
            # 0.0: done; else what is left to do, and again what was lost
            again = 0.0 if fails >= left else left - spent + min(spent, lost * left)
            heapq.heappush(ends, (now + spent, which, again, spent))
            free -= 1
        if arrival < last and (not ends or arrival <= ends[0][0]):
            now = arrival
            heapq.heappush(queue, (now, number, rng.choices(hours, shares)[0]))
            number += 1
            arrival = next_arrival(now)
        else:
            now, which, again, spent = heapq.heappop(ends)
            busy, free = busy + spent, free + 1
            if again:
                failures += 1
                heapq.heappush(queue, (now, which, again))
    waits.sort()
    pick = [waits[int(share * (len(waits) - 1))] for share in (0.5, 0.99)]
    return Hub(machines, number, failures, busy / (machines * max(now, last)), *pick)


def machines_needed(services: list[tuple[float, float]], a_day: int, between: float, most_wait: float) -> Hub:
    """The fewest machines with which 99 of 100 jobs wait no longer than so many hours."""
    least = math.ceil(a_day / 24 * sum(share * hours for share, hours in services))
    low, high = least, 2 * least
    while low < high:
        middle = (low + high) // 2
        if hub(services, a_day, middle, between).p99_wait <= most_wait:
            high = middle
        else:
            low = middle + 1
    return hub(services, a_day, low, between)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=Path, default=Path(__file__).parent / "rates.json")
    parser.add_argument("--models-a-day", type=int, default=10_000)
    parser.add_argument("--machines", type=int, nargs="+", default=[1, 4, 16])
    options = parser.parse_args()
    rates = json.loads(options.rates.read_text())
    assumed = rates["assumed"]
    price = assumed["core_hour_usd"]

    print(f"One {LARGE.name}: {LARGE.weights / 1e9:.0f} billion weights, {BF16 * LARGE.weights / 1e9:.0f} GB\n")
    walls = " | ".join(f"h on {count}" for count in options.machines)
    print(f"| target | read GB | written GB | core-hours | {walls} | USD |")
    print(f"|---|---|---|---|{'---|' * len(options.machines)}---|")
    for target in BITS:
        one = work(LARGE, target, rates)
        hours = " | ".join(f"{one.seconds(count, assumed) / 3600:.2f}" for count in options.machines)
        cost = one.total / 3600 * price
        print(
            f"| {target} | {one.read / 1e9:.0f} | {one.written / 1e9:.0f} | {one.total / 3600:,.2f} | {hours} "
            f"| {cost:,.2f} |"
        )
    calibrated = work(LARGE, "gptq:w4g128", rates)
    shares = ", ".join(f"{name} {value / calibrated.total:.0%}" for name, value in calibrated.core_seconds.items())
    print(f"\ngptq:w4g128 is {shares}.")
    block, widest = 4 * LARGE.block / 1e9, max(LARGE.inputs)
    print(
        f"One block as float32: {block:.1f} GB. A Hessian of {widest} columns and its factor: {hessian_gb(widest):.1f} "
        f"GB, {4 * widest * widest / 1e9:.1f} of them in memory if the rest lies in a file. Activations: "
        f"{4 * WINDOWS * CONTEXT * LARGE.hidden / 1e9:.1f} GB."
    )

    targets = ("Q4_K_M", "Q8_0", STATISTICS, "IQ2_XS")
    services, rows = [], []
    for size, share in ((float(k), v) for k, v in rates["hub_sizes"].items() if k != "from"):
        jobs = [work(shape_of(size), target, rates) for target in targets]
        # read once
        whole = Work({"all": sum(job.total for job in jobs)}, jobs[0].read, sum(job.written for job in jobs))
        services.append((share, whole.seconds(1, assumed) / 3600))
        rows.append((size, share, whole))
    print(f"\nA hub of {options.models_a_day} models a day, each as {', '.join(targets)}\n")
    print("| B weights | share | core-hours each | GB read | GB written | h on a machine |\n|---|---|---|---|---|---|")
    for (size, share, whole), (_, hours) in zip(rows, services, strict=True):
        print(
            f"| {size:g} | {share:.1%} | {whole.total / 3600:.2f} | {whole.read / 1e9:.1f} | {whole.written / 1e9:.1f} "
            f"| {hours:.2f} |"
        )
    daily = [(share * options.models_a_day, whole) for _, share, whole in rows]
    core_hours = sum(count * whole.total for count, whole in daily) / 3600
    moved = sum(count * (whole.read + whole.written) for count, whole in daily)
    print(
        f"\nA day: {core_hours:,.0f} core-hours, {core_hours * price:,.0f} USD; {moved / 1e12:,.0f} TB moved, "
        f"{moved / 86400 / 1e9:.1f} GB/s on average.\n"
    )
    print("| machines | jobs | failures | utilisation | wait h, median | wait h, 99 % |\n|---|---|---|---|---|---|")
    between = assumed["machine_hours_between_failures"]
    enough = machines_needed(services, options.models_a_day, between, 1.0)
    counts = [enough.machines * 9 // 10, enough.machines, enough.machines * 6 // 5]
    found = [hub(services, options.models_a_day, count, between) for count in counts]
    for one in found:
        print(
            f"| {one.machines} | {one.done} | {one.failures} | {one.utilisation:.0%} | {one.median_wait:.2f} "
            f"| {one.p99_wait:.2f} |"
        )
    print("\nGPU: " + rates["gpu"]["from"])


if __name__ == "__main__":
    main()
