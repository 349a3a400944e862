"""Hessians for error feedback: which tensors can use them, and their factors when a tensor's turn comes."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from threading import Lock

from fewbits.codecs import Floats, codec
from fewbits.codecs.fixed_scales import fixed_scales
from fewbits.errors import FewbitsError, about
from fewbits.methods.feedback import Factor, factorize
from fewbits.plan import Plan

KEPT = 4
"""Factors in memory: slabs of a few tensors may be under way, and weights with the same input follow one another."""


class Factors:
    """The factors of the Hessians in a folder, made when they are first asked for, by any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = Lock()
        self.made: OrderedDict[tuple[str, int], Factor | None] = OrderedDict()

    def of(self, name: str, expert: int, columns: int) -> Factor | None:
        """The factor of a weight; None for an expert that saw no token.

        Raises:
            FewbitsError: there is none, or it is of other columns.
        """
        from fewbits.calibration.hessians import read_hessian, stored_under  # imports torch, which most runs do without

        with self.lock:
            key = (stored_under(self.folder, name)[1], expert)
            if key not in self.made:
                self.made[key] = self._make(*read_hessian(self.folder, name), name, expert, columns)
            self.made.move_to_end(key)
            while len(self.made) > KEPT:
                self.made.popitem(last=False)
            return self.made[key]

    def _make(self, hessians: Floats, counts: Floats, name: str, expert: int, columns: int) -> Factor | None:
        if hessians.shape[-1] != columns or expert >= len(counts):
            raise FewbitsError(
                f"{self.folder}: the Hessian of {name} is {len(hessians)} x {hessians.shape[-1]} columns.",
                "It was made from another model.",
            )
        if not counts[expert]:
            return None
        with about(self.folder):
            return factorize(hessians[expert])


def with_feedback(plan: Plan) -> Plan:
    """The plan with error feedback wherever a tensor is in a decoder block and its type allows."""
    tensors = [
        tensor.model_copy(update={"method": "feedback"})
        if tensor.method == "search" and tensor.name.startswith("blk.") and fixed_scales(codec(tensor.codec))
        else tensor
        for tensor in plan.tensors
    ]
    count = sum(tensor.method == "feedback" for tensor in tensors)
    note = f"{count} tensors are rounded with error feedback"
    return plan.model_copy(update={"tensors": tensors, "notes": [*plan.notes, note]})
