"""What each type would cost each tensor: some rows of it are encoded and decoded, and their errors weighed.

The cost is an estimate of the KL divergence in nats a token. With sensitivities it is the model's own. Without, it is
the squared error of the tensor's output over the squared output (with importances), or of its weights over the squared
weights (with nothing), times what that costs tensors of its role in a small model: a rough guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod

import numpy as np
import numpy.typing as npt

from fewbits.calibration.statistics import Sensitivities, Sensitivity
from fewbits.codecs import codec
from fewbits.codecs.fixed_scales import fixed_scales
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
        out: Losses = {}
        with ThreadPoolExecutor(threads, "appraise") as pool:
            for number, tensor in enumerate(tensors):
                samples = list(self._samples(tensor))
                parts = [[pool.submit(sample.loss, name) for sample in samples] for name in types[tensor.name]]
                out[tensor.name] = {
                    name: sum(part.result() for part in of) for name, of in zip(types[tensor.name], parts, strict=True)
                }
                if progress:
                    progress(number + 1, len(tensors), "appraised tensors")
        return out

    def _samples(self, tensor: SourceTensor) -> Iterator[_Sample]:
        """Rows of a tensor that stand for it."""
        experts = tensor.shape[-3] if len(tensor.shape) > 2 else 1
        each = prod(tensor.shape[:-1]) // experts
        chosen = sorted({int(place) for place in np.linspace(0, experts - 1, min(experts, EXPERTS))})
        known = self.sensitivities.get(tensor.name, [])
        by_token = next((one.rows for one in known if one.rows is not None and len(one.rows) == each), None)
        for expert in chosen:
            if by_token is None:
                rows = np.unique(np.linspace(0, each - 1, min(each, max(1, ROWS // len(chosen)))).astype(np.int64))
            else:
                total = np.sum([one.rows for one in known if one.rows is not None], axis=0)
                rows = np.sort(np.argsort(-total, kind="stable")[:TOKEN_ROWS])
            weights = self._read(tensor.name, expert * each + rows)
            importance = self.importances[tensor.name][expert] if tensor.name in self.importances else None
            yield _Sample(
                tensor.name,
                expert,
                weights,
                importance,
                [_weights(one, expert, rows, importance, self.learned, tensor.name) for one in known]
                or [_relative(weights, importance, self._nats(tensor.name) / experts)],
                experts / len(chosen),
                self.learned,
            )

    def _nats(self, name: str) -> float:
        """What a tensor of this role costs where nothing is known of it itself."""
        layer, last = layer_of(name), self.source.facts.n_layer - 1
        tied = role(name) == EMBEDDING and all(tensor.name != "output.weight" for tensor in self.source.tensors)
        usual = NATS.get(OUTPUT if tied else role(name), OTHERS)
        return usual * (AT_THE_ENDS if layer in (0, 1, last) else 1.0)

    def _read(self, name: str, rows: npt.NDArray[np.int64]) -> Floats:
        """Rows of a tensor, ascending; only runs that are near to each other are read at once."""
        columns = next(tensor.shape[-1] for tensor in self.source.tensors if tensor.name == name)
        step = max(1, SLAB // columns)
        out = np.empty((len(rows), columns), np.float32)
        starts = [0, *(i for i in range(1, len(rows)) if rows[i] - rows[i - 1] > step // 16), len(rows)]
        for first, last in pairwise(starts):
            low, high = int(rows[first]), int(rows[last - 1]) + 1
            for start in range(low, high, step):
                stop = min(start + step, high)
                inside = (rows >= start) & (rows < stop)
                if inside.any():
                    values = self.source.read[name](start, stop).reshape(stop - start, -1)
                    out[inside] = values[rows[inside] - start]
        if not np.isfinite(out).all():
            raise FewbitsError(f"{self.source.path}: tensor {name!r} holds NaN or infinite weights.")
        return out


@dataclass(frozen=True)
class _Weights:
    """How errors count: `rows` [rows] and either `columns` [columns] or a Hessian [columns, columns]."""

    rows: Floats
    columns: Floats
    hessian: Floats | None = None

    def of(self, error: Floats) -> float:
        squares = error * (error @ self.hessian) if self.hessian is not None else np.square(error) * self.columns
        return float(self.rows @ squares.sum(1, dtype=np.float64))


def _relative(weights: Floats, importance: Floats | None, nats: float) -> _Weights:
    columns = np.ones(weights.shape[1], np.float32) if importance is None else importance
    whole = float((np.square(weights, dtype=np.float64) @ columns).sum()) or 1.0
    return _Weights(np.full(len(weights), nats / whole, np.float32), columns)


def _weights(
    known: Sensitivity,
    expert: int,
    rows: npt.NDArray[np.int64],
    importance: Floats | None,
    learned: Learned,
    name: str,
) -> _Weights:
    columns = 0.5 * known.columns[min(expert, len(known.columns) - 1)]
    if known.rows is not None:
        share = known.rows[rows]
        return _Weights((share / max(float(share.sum()), 1e-30)).astype(np.float32), columns)
    share = np.full(len(rows), 1 / len(rows), np.float32)
    if learned.factors is None or importance is None or layer_of(name) < 0:
        return _Weights(share, columns)
    # feedback trades errors of one column for those of others: only the Hessian can tell what is left of them
    hessian = learned.factors.block(name).read(name, expert)
    return _Weights(share, columns, hessian * (float(columns.sum()) / max(float(hessian.trace()), 1e-30)))


@dataclass(frozen=True)
class _Sample:
    name: str
    expert: int
    weights: Floats
    importance: Floats | None
    known: list[_Weights]
    share: float
    learned: Learned

    def loss(self, type_name: str) -> float:
        kind = codec(type_name)
        fed = self.learned.factors is not None and layer_of(self.name) >= 0 and fixed_scales(kind) is not None
        factor = self.learned.factor(self.name, self.expert) if fed else None
        chosen = method("gptq" if factor is not None else "search")
        data = chosen.quantize(self.weights, kind, self.importance, factor)
        error = kind.decode(data) - self.weights
        return self.share * sum(one.of(error) for one in self.known)
