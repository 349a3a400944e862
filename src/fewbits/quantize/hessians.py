"""Hessians for error feedback: which tensors can use them, and their factors when a tensor's turn comes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from fewbits.codecs import codec
from fewbits.errors import FewbitsError, about
from fewbits.methods import Factor, factorize
from fewbits.methods.gptq import feedback_span
from fewbits.plan import Plan, PlannedTensor
from fewbits.plan.tensors import layer_of

if TYPE_CHECKING:
    from fewbits.calibration.hessians import BlockHessians

KEPT = 4
"""Factors in memory: slabs of a few tensors may be under way, and weights with the same input follow one another."""


class Factors:
    """The factors of the Hessians in a folder, made when they are first asked for, by any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = Lock()
        self.blocks: dict[int, BlockHessians] = {}
        self.made: OrderedDict[tuple[str, int, int], Factor | None] = OrderedDict()

    def __reduce__(self) -> tuple[type[Factors], tuple[Path]]:
        """Pickled, they are a path, as the model is."""
        return Factors, (self.folder.absolute(),)

    def block(self, tensor: str) -> BlockHessians:
        """The Hessians of the decoder block that a tensor is in.

        Raises:
            FewbitsError: there are none of this tensor.
        """
        from fewbits.calibration.hessians import open_block  # imports torch, which most runs do without

        layer = layer_of(tensor)
        if layer not in self.blocks:
            self.blocks[layer] = open_block(self.folder, layer)
        if tensor not in self.blocks[layer].same:
            path = self.blocks[layer].path
            raise FewbitsError(f"{path}: there is no Hessian of {tensor}.", "It was made from another model.")
        return self.blocks[layer]

    def check(self, tensor: PlannedTensor, texts: Sequence[str]) -> int:
        """How many experts of a tensor saw too little text for error feedback.

        Args:
            texts: SHA-256 of what the statistics were made of, empty where unknown.

        Raises:
            FewbitsError: the Hessian is missing, of other sizes, or of other texts than the statistics.
        """
        known = self.block(tensor.name)
        stored = known.same[tensor.name]
        experts, columns = experts_of(tensor), tensor.shape[-1]
        if known.shapes[stored][-1] != columns or len(known.counts[stored]) != experts:
            raise FewbitsError(
                f"{known.path}: the Hessian of {tensor.name} has the shape {known.shapes[stored]}, which does not fit "
                f"{experts} x {columns} columns.",
                "It was made from another model.",
            )
        if texts and not set(known.texts) <= set(texts):
            raise FewbitsError(
                f"{known.path}: the Hessians were made of other texts than the statistics.",
                "Pass the statistics that the same calibration made.",
            )
        return int((known.counts[stored] < columns).sum())

    def of(self, name: str, expert: int, span: int = 1) -> Factor | None:
        """The factor of a weight; None where the Hessian says too little: fewer tokens than columns.

        Args:
            span: how many neighbouring columns stay together: `feedback_span` of the type.
        """
        with self.lock:
            block = self.block(name)
            stored = block.same[name]
            key = stored, expert, span
            if key not in self.made:
                self.made[key] = None
                if block.counts[stored][expert] >= block.shapes[stored][-1]:
                    with about(block.path):
                        self.made[key] = factorize(block.read(name, expert), span=span)
            self.made.move_to_end(key)
            while len(self.made) > KEPT:
                self.made.popitem(last=False)
            return self.made[key]


def experts_of(tensor: PlannedTensor) -> int:
    """How many matrices are stacked in a tensor."""
    return tensor.shape[-3] if len(tensor.shape) > 2 else 1


def with_feedback(plan: Plan, factors: Factors, texts: Sequence[str]) -> Plan:
    """The plan with error feedback wherever a tensor is in a decoder block and its type allows.

    Raises:
        FewbitsError: as for `Factors.check`.
    """
    tensors, fed, silent = [], 0, 0
    for tensor in plan.tensors:
        if tensor.method in ("search", "gptq") and layer_of(tensor.name) >= 0 and feedback_span(codec(tensor.codec)):
            silent += factors.check(tensor, texts)
            fed += 1
            tensors.append(tensor.model_copy(update={"method": "gptq"}))
        else:
            tensors.append(tensor)
    notes = [f"{fed} tensors are rounded with error feedback"]
    if silent:
        notes.append(f"{silent} matrices among them saw fewer tokens than they have columns and are only searched")
    return plan.model_copy(update={"tensors": tensors, "notes": [*plan.notes, *notes]})
