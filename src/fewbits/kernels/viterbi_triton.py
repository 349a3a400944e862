"""The search of `kernels.viterbi` on a GPU, in Triton: one program for each tile, costs in float32.

Costs of two steps and the ways into every node lie in global memory, where the caches hold what a tile works on.
Importing this module needs Triton, which comes with torch's CUDA builds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fewbits.kernels.viterbi import MEMORY, REACH, STEPS

NODES_AT_ONCE = 1024
WORK_BYTES = 1 << 30
"""Ways that are kept at a time."""


@triton.jit
def _forward(
    tiles: tl.tensor, values: tl.tensor, wraps: tl.tensor, costs: tl.tensor, ways: tl.tensor, begin: tl.tensor,
    length: tl.tensor, tied: tl.constexpr, bits: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """The cheapest walks to every node: of one tile [256], values [65536] by state, wraps [tiles], costs [tiles, 2,
    nodes], ways [tiles, steps, nodes]; `tied` walks begin at the wrap's node, others anywhere."""
    tile = tl.program_id(0).to(tl.int64)
    nodes: tl.constexpr = 1 << (16 - bits)
    cost, way_at = costs + tile * 2 * nodes, ways + tile * 256 * nodes
    wrap = tl.load(wraps + tile)
    for base in range(0, nodes, block):
        node = base + tl.arange(0, block)
        first = tl.zeros([block], tl.float32)
        if tied:
            first = tl.where(node == wrap, first, float("inf"))
        tl.store(cost + node, first)
    tl.debug_barrier()
    for i in range(length):
        wanted = tl.load(tiles + tile * 256 + (begin + i) % 256)
        before, after = cost + (i % 2) * nodes, cost + ((i + 1) % 2) * nodes
        for base in range(0, nodes, block):
            node = base + tl.arange(0, block)
            best = tl.full([block], float("inf"), tl.float32)
            chosen = tl.zeros([block], tl.int32)
            for way in range(1 << bits):
                miss = wanted - tl.load(values + ((way << (16 - bits)) | node))
                total = tl.load(before + ((way << (16 - 2 * bits)) | (node >> bits))) + miss * miss
                better = total < best
                best = tl.where(better, total, best)
                chosen = tl.where(better, way, chosen)
            tl.store(after + node, best)
            tl.store(way_at + i * nodes + node, chosen.to(tl.uint8))
        tl.debug_barrier()


@triton.jit
def _back(
    ways: tl.tensor, ends: tl.tensor, wraps: tl.tensor, steps: tl.tensor, begin: tl.tensor, length: tl.tensor,
    stop: tl.tensor, tied: tl.constexpr, bits: tl.constexpr,
) -> None:  # fmt: skip
    """Walk back from the nodes `ends` [tiles], through `stop` steps: to the wrap's node, or all the way, keeping the
    bits that each step adds, steps [tiles, 256]."""
    tile = tl.program_id(0).to(tl.int64)
    nodes: tl.constexpr = 1 << (16 - bits)
    way_at = ways + tile * 256 * nodes
    node = tl.load(ends + tile)
    for back in range(stop):
        i = length - 1 - back
        if tied:
            tl.store(steps + tile * 256 + (begin + i) % 256, (node & ((1 << bits) - 1)).to(tl.uint8))
        way = tl.load(way_at + i * nodes + node).to(tl.int64)
        node = (way << (16 - 2 * bits)) | (node >> bits)
    tl.store(wraps + tile, node)


def walk(tiles: torch.Tensor, values: torch.Tensor, bits: int, nodes_at_once: int = NODES_AT_ONCE) -> torch.Tensor:
    """The walks that come closest to tiles.

    Args:
        tiles: float32 [tiles, 256], in the order of the steps.
        values: float32 [65536], of each state; on the same device.
        bits: of a step, 1 to 8.
        nodes_at_once: nodes that a program works on at a time, a power of two.

    Returns:
        uint8 [tiles, 256], the bits that each step adds.
    """
    nodes = 1 << (MEMORY - bits)
    together = max(1, WORK_BYTES // (STEPS * nodes))
    block = min(nodes, nodes_at_once)
    parts = [_walk(part.contiguous(), values.contiguous(), bits, block) for part in tiles.split(together)]
    return torch.cat(parts)


def _walk(tiles: torch.Tensor, values: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    count, device, nodes = len(tiles), tiles.device, 1 << (MEMORY - bits)
    steps = torch.empty((count, STEPS), dtype=torch.uint8, device=device)
    ways = torch.empty((count, STEPS, nodes), dtype=torch.uint8, device=device)
    costs = torch.empty((count, 2, nodes), device=device)
    wraps = torch.zeros(count, dtype=torch.int64, device=device)
    # first the node at the wrap, from the steps around it; then the walk from this node to this node
    _forward[(count,)](tiles, values, wraps, costs, ways, STEPS - REACH, 2 * REACH, False, bits, block)
    _back[(count,)](ways, costs[:, 0].argmin(1), wraps, steps, STEPS - REACH, 2 * REACH, REACH, False, bits)
    _forward[(count,)](tiles, values, wraps, costs, ways, 0, STEPS, True, bits, block)
    _back[(count,)](ways, wraps.clone(), wraps, steps, 0, STEPS, STEPS, True, bits)
    return steps
