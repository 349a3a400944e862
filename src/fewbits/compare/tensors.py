"""What each matrix of a candidate is stored as, and how far its decoded weights are from the reference's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import numpy.typing as npt

from fewbits.checkpoint import GGUFCheckpoint, Model
from fewbits.checkpoint.moved_scales import EXPERT, LAYER, MovedScales
from fewbits.codecs import CODECS
from fewbits.compare.losses import Counted, ExpectedLosses
from fewbits.forward.streamed import Progress
from fewbits.report.schema import TensorRow

Floats = npt.NDArray[np.float32]


@dataclass
class _Sums:
    """What is added up over the matrices that share a row: one matrix, or those of all experts."""

    types: list[str] = field(default_factory=list)
    bits: float = 0.0
    n_weights: int = 0
    squared_error: float = 0.0
    squares: float = 0.0
    comparable: bool = True
    losses: list[float | None] = field(default_factory=list)

    def row(self, layer: int | None, role: str) -> TensorRow:
        error = self.squared_error / self.squares if self.comparable and self.squares else None
        known = [loss for loss in self.losses if loss is not None]
        return TensorRow(
            role=role,
            layer=layer,
            type="+".join(sorted(set(self.types))),
            bits=self.bits / self.n_weights,
            n_weights=self.n_weights,
            error=error,
            loss=sum(known) if error is not None and len(known) == len(self.types) else None,
        )


def tensor_rows(
    reference: Model,
    candidate: Model,
    errors: bool = True,
    progress: Progress | None = None,
    expected: ExpectedLosses | None = None,
) -> list[TensorRow]:
    """All matrices of a candidate, layer by layer, one read at a time.

    Where scales of channels were moved between the matrices (see `MovedScales`), they are fitted out first.

    Args:
        errors: False reads no weights and leaves the errors out.
        expected: tells what errors cost; None leaves the losses out.
    """
    sums: dict[tuple[int | None, str], _Sums] = {}
    scales = MovedScales(reference, candidate) if errors else None
    shared = set(reference.names)
    names = [name for name in candidate.names if len(candidate.shape(name)) == 2]
    for done, name in enumerate(names):
        layer, role = place(name)
        entry = sums.setdefault((layer, role), _Sums())
        count = prod(candidate.shape(name))
        entry.types.append(candidate.dtype(name))
        entry.bits += stored_bits(candidate, name) * count
        entry.n_weights += count
        if scales is None or name not in shared or reference.shape(name) != candidate.shape(name):
            entry.comparable = False
        elif entry.comparable:
            original = reference.read(name)
            counted = expected.counted(name) if expected else []
            error, squares, loss = _squares(original, scales.undone(name, original, candidate.read(name)), counted)
            entry.squared_error += error
            entry.squares += squares
            entry.losses.append(loss if counted else None)
        if progress:
            progress(done + 1, len(names), "matrices compared")
    return [entry.row(layer, role) for (layer, role), entry in sorted(sums.items(), key=_Order(candidate))]


def place(name: str) -> tuple[int | None, str]:
    """The layer number of a tensor, None outside the decoder blocks, and its name without it."""
    match = LAYER.match(name)
    if match is None:
        return None, name.removesuffix(".weight").removeprefix("model.").removeprefix("transformer.")
    return int(match["layer"]), EXPERT.sub("experts.", match["role"])


def stored_bits(model: Model, name: str) -> float:
    """Bits that the file spends on each weight of a matrix."""
    if isinstance(model.checkpoint, GGUFCheckpoint):
        return CODECS[model.dtype(name)].bits_per_weight()
    info = model.checkpoint.tensors[name]
    return 8 * info.nbytes / prod(info.shape)


class _Order:
    """Layer by layer in the order of the computation: the embedding first, the head last."""

    def __init__(self, model: Model) -> None:
        roles = [role.hf.replace("{e}.", "") for role in model.family.block_roles]
        self.rank = {role: number for number, role in enumerate(roles)}

    def __call__(self, item: tuple[tuple[int | None, str], _Sums]) -> tuple[int, int]:
        layer, role = item[0]
        if layer is None:
            return (-1 if "embed" in role or "wte" in role else 1 << 30), 0
        return layer, self.rank.get(role, len(self.rank))


def _squares(reference: Floats, candidate: Floats, counted: Sequence[Counted]) -> tuple[float, float, float]:
    """Squared error, the reference's sum of squares, and what the error costs; float64 sums of slabs."""
    error = squares = loss = 0.0
    for rows in _slabs(reference.shape):
        off = np.square(candidate[rows] - reference[rows])
        error += float(off.sum(dtype=np.float64))
        squares += float(np.square(reference[rows]).sum(dtype=np.float64))
        loss += sum(one.loss(off, rows) for one in counted)
    return error, squares, loss


def _slabs(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, (1 << 22) // shape[1])
    yield from (slice(start, start + step) for start in range(0, shape[0], step))
