"""The trellis search in Triton, which needs a GPU, run step by step by Triton's interpreter."""

from __future__ import annotations

import pytest

from triton_interpreter import interpreted

pytest.importorskip("triton", reason="Triton is for Linux only")

SEARCH = """
import numpy as np, torch
from fewbits.codecs.trellis import Trellis, codebook
from fewbits.kernels.viterbi_triton import walk

values = codebook("mul1")
for bits in (1, 2):
    kind = Trellis(bits)
    tiles = np.random.default_rng(bits).normal(size=(2, 256)).astype(np.float32)
    steps = walk(torch.from_numpy(tiles), torch.from_numpy(values), bits, nodes_at_once=1 << 16).numpy()
    states = kind.states(steps.astype(np.uint16))
    # a walk that bites its tail: each state is the last one, less its oldest bits, with a step's bits behind it
    before = np.roll(states, 1, axis=1).astype(np.int64)
    assert (((before << bits) | steps) % (1 << 16) == states).all()
    ours, theirs = (np.square(values[found] - tiles).mean(1) for found in (kind.search(tiles), states))
    assert (np.abs(theirs / ours - 1) < 0.03).all(), (bits, ours, theirs)
print("done")
"""


def test_it_finds_walks_as_good_as_those_of_the_processor() -> None:
    assert interpreted(SEARCH) == "done"
