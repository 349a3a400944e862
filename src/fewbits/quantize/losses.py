"""What each type would cost each tensor: some rows of it are encoded and decoded, and their errors weighed.

The cost is an estimate of the KL divergence in nats a token. With sensitivities it is the model's own. Without, it is
the squared error of the tensor's output over the squared output (with importances), or of its weights over the squared
weights (with nothing), times what that costs tensors of its role in a small model: a rough guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import prod

import numpy as np
import numpy.typing as npt

from fewbits.calibration.statistics import Sensitivities, Sensitivity
from fewbits.codecs import codec
from fewbits.errors import FewbitsError
from fewbits.formats.gguf.source import GGUFSource
from fewbits.methods import method
from fewbits.plan.tensors import (
    ATTN_OUT,
    DOWN,
    EMBEDDING,
    GATE,
    KEY,
    OUTPUT,
    QUERY,
    UP,
    VALUE,
    SourceTensor,
    layer_of,
    role,
)
from fewbits.quantize.importances import Importances, Progress
from fewbits.quantize.learned import Learned

ROWS = 128
"""Rows of a matrix whose errors stand for all."""
TOKEN_ROWS = 512
"""Of an embedding or head: those of the tokens that matter most."""
EXPERTS = 8
SLAB = 1 << 21
NATS = {
    EMBEDDING: 1.6,
    OUTPUT: 15.0,
    QUERY: 0.05,
    KEY: 0.05,
    VALUE: 0.12,
    ATTN_OUT: 0.05,
    GATE: 0.12,
    UP: 0.16,
    DOWN: 0.1,
}
"""What an error as large as the weights would cost, were costs proportional: median over the layers of smollm2-768,
from its sensitivities (2026-11-21; the first two layers and the last cost about three times that)."""
OTHERS, AT_THE_ENDS = 0.1, 3.0
Floats = npt.NDArray[np.float32]
Losses = dict[str, dict[str, float]]
"""Tensor -> type -> loss."""


@dataclass(frozen=True)
class Appraisal:
    """What losses are made from.

    Attributes:
        importances: by tensor; the codes are searched with them.
        sensitivities: by tensor; empty for guesses from the tensors' roles.
        learned: with the Hessians' factors where codes will be chosen with error feedback.
    """

    source: GGUFSource
    importances: Importances = field(default_factory=dict)
    sensitivities: Sensitivities = field(default_factory=dict)
    learned: Learned = field(default_factory=Learned)

    def losses(
        self,
        tensors: Sequence[SourceTensor],
        types: Mapping[str, Sequence[str]],
        threads: int,
        progress: Progress | None = None,
    ) -> Losses:
        """Appraise the types of each tensor.

        Args:
            types: by tensor name.
        """
        known = {tensor.name: tensor for tensor in tensors}
        return appraise(lambda name: self._samples(known[name]), {n: types[n] for n in known}, threads, progress)

    def _samples(self, tensor: SourceTensor) -> Iterator[Sample]:
        """Rows of a tensor that stand for it."""
        experts = tensor.shape[-3] if len(tensor.shape) > 2 else 1
        each = prod(tensor.shape[:-1]) // experts
        chosen = some_experts(experts)
        known = self.sensitivities.get(tensor.name, [])
        by_token = next((one.rows for one in known if one.rows is not None and len(one.rows) == each), None)
        for expert in chosen:
            if by_token is None:
                rows = some_rows(each, len(chosen))
            else:
                total = np.sum([one.rows for one in known if one.rows is not None], axis=0)
                rows = np.sort(np.argsort(-total, kind="stable")[:TOKEN_ROWS])
            weights = self._read(tensor, expert * each + rows)
            importance = self.importances[tensor.name][expert] if tensor.name in self.importances else None
            yield Sample(
                weights,
                [_weights(one, expert, rows, importance, self.learned, tensor.name) for one in known]
                or [Weighing.relative(weights, importance, self._nats(tensor.name) / experts)],
                experts / len(chosen),
                partial(self._decoded, tensor.name, expert, weights, importance),
            )

    def _nats(self, name: str) -> float:
        tied = role(name) == EMBEDDING and all(tensor.name != "output.weight" for tensor in self.source.tensors)
        return usual_cost("output.weight" if tied else name, self.source.facts.n_layer)

    def _decoded(self, name: str, expert: int, weights: Floats, importance: Floats | None, to: str) -> Floats:
        kind = codec(to)
        factor = self.learned.factor(name, expert, kind) if layer_of(name) >= 0 else None
        chosen = method("gptq" if factor is not None else "search")
        return kind.decode(chosen.quantize(weights, kind, importance, factor))

    def _read(self, tensor: SourceTensor, rows: npt.NDArray[np.int64]) -> Floats:
        """Rows of a tensor, ascending; only runs that are near to each other are read at once."""
        columns, read = tensor.shape[-1], self.source.read[tensor.name]
        step = max(1, SLAB // columns)
        out = np.empty((len(rows), columns), np.float32)
        starts = [0, *(i for i in range(1, len(rows)) if rows[i] - rows[i - 1] > step // 16), len(rows)]
        for first, last in pairwise(starts):
            low, high = int(rows[first]), int(rows[last - 1]) + 1
            for start in range(low, high, step):
                stop = min(start + step, high)
                inside = (rows >= start) & (rows < stop)
                if inside.any():
                    values = read(start, stop).reshape(stop - start, -1)
                    out[inside] = values[rows[inside] - start]
        if not np.isfinite(out).all():
            raise FewbitsError(f"{self.source.path}: tensor {tensor.name!r} holds NaN or infinite weights.")
        return out


@dataclass(frozen=True)
class Weighing:
    """How errors count: `rows` [rows] and either `columns` [columns] or a Hessian [columns, columns]."""

    rows: Floats
    columns: Floats
    hessian: Floats | None = None

    @staticmethod
    def relative(weights: Floats, importance: Floats | None, nats: float) -> Weighing:
        """Of a tensor that is known by its role: an error as large as the weights costs `nats`."""
        columns = np.ones(weights.shape[1], np.float32) if importance is None else importance
        whole = float((np.square(weights, dtype=np.float64) @ columns).sum()) or 1.0
        return Weighing(np.full(len(weights), nats / whole, np.float32), columns)

    @staticmethod
    def sensitive(known: Sensitivity, expert: int, rows: npt.NDArray[np.int64]) -> Weighing:
        """Of a tensor whose sensitivity is known, by some of its rows that stand for all."""
        columns = 0.5 * known.columns[min(expert, len(known.columns) - 1)]
        if known.rows is None:
            return Weighing(np.full(len(rows), 1 / len(rows), np.float32), columns)
        share = known.rows[rows]
        return Weighing((share / max(float(share.sum()), 1e-30)).astype(np.float32), columns)

    def of(self, error: Floats) -> float:
        squares = error * (error @ self.hessian) if self.hessian is not None else np.square(error) * self.columns
        return float(self.rows @ squares.sum(1, dtype=np.float64))


def _weights(
    known: Sensitivity,
    expert: int,
    rows: npt.NDArray[np.int64],
    importance: Floats | None,
    learned: Learned,
    name: str,
) -> Weighing:
    plain = Weighing.sensitive(known, expert, rows)
    if known.rows is not None or learned.factors is None or importance is None or layer_of(name) < 0:
        return plain
    # feedback trades errors of one column for those of others: only the Hessian can tell what is left of them
    hessian = learned.factors.block(name).read(name, expert)
    scale = float(plain.columns.sum()) / max(float(hessian.trace()), 1e-30)
    return Weighing(plain.rows, plain.columns, hessian * scale)


@dataclass(frozen=True)
class Sample:
    """Rows that stand for a matrix.

    Attributes:
        known: how their errors count; the costs add up.
        share: by what their cost is multiplied, where they stand for other matrices, too.
        decoded: what a type, by name, makes of them.
    """

    weights: Floats
    known: list[Weighing]
    share: float
    decoded: Callable[[str], Floats]

    def loss(self, type_name: str) -> float:
        error = self.decoded(type_name) - self.weights
        return self.share * sum(one.of(error) for one in self.known)


def appraise(
    samples: Callable[[str], Iterable[Sample]],
    types: Mapping[str, Sequence[str]],
    threads: int,
    progress: Progress | None = None,
) -> Losses:
    """What each type would cost each tensor.

    Args:
        samples: those of a tensor, by name.
        types: of each tensor, by name.
    """
    out: Losses = {}
    with ThreadPoolExecutor(threads, "appraise") as pool:
        for number, (name, tried) in enumerate(types.items()):
            here = list(samples(name))
            parts = [[pool.submit(sample.loss, to) for sample in here] for to in tried]
            out[name] = {to: sum(part.result() for part in of) for to, of in zip(tried, parts, strict=True)}
            if progress:
                progress(number + 1, len(types), "appraised tensors")
    return out


def some_experts(count: int) -> list[int]:
    """The experts that stand for all."""
    return sorted({int(place) for place in np.linspace(0, count - 1, min(count, EXPERTS))})


def some_rows(count: int, matrices: int = 1) -> npt.NDArray[np.int64]:
    """The rows that stand for all of a matrix, where so many matrices stand for a tensor."""
    return np.unique(np.linspace(0, count - 1, min(count, max(1, ROWS // matrices))).astype(np.int64))


def usual_cost(name: str, n_layer: int) -> float:
    """What an error as large as its weights would cost a tensor, by GGUF name, of which nothing else is known; nats."""
    return NATS.get(role(name), OTHERS) * (AT_THE_ENDS if layer_of(name) in (0, 1, n_layer - 1) else 1.0)
