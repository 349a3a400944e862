"""Scales of channels that were moved between the layers of a block, fitted out of a comparison of weights."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from fewbits.checkpoint.model import Model

Floats = npt.NDArray[np.float32]
LAYER = re.compile(r"^(?P<prefix>.*?)\.(?P<layer>\d+)\.(?P<role>.+)\.weight$")
EXPERT = re.compile(r"\bexperts\.\d+\.")
MOVED = 1e-3
"""A norm whose weights changed by more than this share of the largest has given scales to the matrices behind it."""
FIT_ROUNDS = 8


class MovedScales:
    """Scales of channels that AWQ or SmoothQuant moved from one tensor of a block into the next.

    Attributes:
        found: whether any norm's weights have changed, which plain quantization leaves as they are.
    """

    def __init__(self, reference: Model, candidate: Model) -> None:
        pairs = candidate.family.pairs
        self.columns = {target for pair in pairs for target in pair.targets}
        self.rows = {pair.source for pair in pairs if "norm" not in pair.source and "ln_" not in pair.source}
        known = set(reference.names)
        norms = [name for name in candidate.names if name in known and ("norm" in name or "ln_" in name)]
        self.found = any(_moved(reference, candidate, name) for name in norms)

    def undone(self, name: str, reference: Floats, candidate: Floats) -> Floats:
        """The candidate's matrix with scales of rows and columns fitted to the reference, where they may have moved."""
        match = LAYER.match(name)
        if not self.found or match is None:
            return candidate
        role = EXPERT.sub("experts.{e}.", match["role"])
        axes = [axis for axis, roles in ((0, self.columns), (1, self.rows)) if role in roles]
        # where both rows and columns carry scales, each fit disturbs the other: a few rounds settle them
        for axis in axes * (FIT_ROUNDS if len(axes) > 1 else 1):
            squares = np.square(candidate).sum(axis, keepdims=True)
            products = (candidate * reference).sum(axis, keepdims=True)
            candidate = candidate * (products / np.where(squares == 0, 1, squares))
        return candidate


def _moved(reference: Model, candidate: Model, name: str) -> bool:
    if len(candidate.shape(name)) != 1 or not name.endswith(".weight"):
        return False
    before, after = reference.read(name), candidate.read(name)
    return before.shape == after.shape and float(np.abs(after - before).max()) > MOVED * float(np.abs(before).max())
