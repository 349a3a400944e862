"""HQQ's speed and result beside the hqq package's, in one run, on the linears of a model's decoder block.

    python benchmarks/half_quadratic.py [--model DIR] [--bits 4 3 2] [--axes 1 0] [--group 64] [--threads 1] [--json]

The weights are those of the first block; without --model, normal ones in the shapes of SmolLM2-135M. Seconds for
the block, ours and theirs turn about, medians: with one thread of thread CPU time, else of wall time, where theirs uses
torch's threads and ours works on several matrices at once. Needs `pip install hqq`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from fewbits.checkpoint import open_checkpoint
from fewbits.codecs.scaled import Quantized, Scaled
from fewbits.methods.hqq import hqq

BLOCK = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
BLOCK |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
Matrices = dict[str, np.ndarray]


def block(model: str | None) -> Matrices:
    if model is None:
        rng = np.random.default_rng(0)
        return {name: (rng.normal(size=shape) * 0.05).astype(np.float32) for name, shape in BLOCK.items()}
    checkpoint = open_checkpoint(model)
    wanted = [i.name for i in checkpoint.tensors.values() if ".layers.0." in i.name and len(i.shape) == 2]
    return {name: np.ascontiguousarray(checkpoint.read(name, slice(None)), np.float32) for name in wanted}


def theirs(matrices: Matrices, bits: int, group: int, axis: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Codes and zero points."""
    from hqq.core.quantize import Quantizer

    found = {}
    for name, weights in matrices.items():
        codes, meta = Quantizer.quantize(
            torch.from_numpy(weights), nbits=bits, group_size=group, axis=axis, device="cpu", bitpack=False
        )
        found[name] = (codes.numpy().reshape(weights.shape), meta["zero"].numpy())
    return found


def ours(matrices: Matrices, kind: Scaled, pool: ThreadPoolExecutor | None) -> dict[str, Quantized]:
    run: Callable[..., object] = map if pool is None else pool.map
    return dict(zip(matrices, run(lambda weights: hqq(weights, kind), matrices.values()), strict=True))  # type: ignore[call-overload]


def compare(matrices: Matrices, bits: int, group: int, axis: int, threads: int, repeats: int) -> dict[str, float]:
    kind = Scaled("INT", bits, (group, 1) if axis == 0 else (1, group), "float", "F32", strided=axis == 0)
    clock = time.thread_time if threads == 1 else time.perf_counter
    pool = ThreadPoolExecutor(threads) if threads > 1 else None
    mine, peers = ours(matrices, kind, pool), theirs(matrices, bits, group, axis)
    seconds: dict[str, list[float]] = {"ours": [], "hqq": []}
    for _ in range(repeats):
        started = clock()
        ours(matrices, kind, pool)
        between = clock()
        theirs(matrices, bits, group, axis)
        seconds["ours"].append(between - started)
        seconds["hqq"].append(clock() - between)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **medians,
        "part": medians["ours"] / medians["hqq"],
        "codes that differ": sum(int((mine[name].codes != codes).sum()) for name, (codes, _) in peers.items()),
        "zero points that differ": sum(
            int((np.asarray(mine[name].zeros).reshape(-1) != zeros.reshape(-1)).sum())
            for name, (_, zeros) in peers.items()
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--axes", type=int, nargs="+", default=[1, 0])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    matrices = block(args.model)
    rows = {
        f"{bits} bits, axis {axis}": compare(matrices, bits, args.group, axis, args.threads, args.repeats)
        for bits in args.bits
        for axis in args.axes
    }
    if args.json:
        print(json.dumps(rows))
        return
    for name, row in rows.items():
        print(name + ": " + ", ".join(f"{key} {value:.3g}" for key, value in row.items()))


if __name__ == "__main__":
    main()
