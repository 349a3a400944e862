"""What a calibration saw, as data."""

from __future__ import annotations

import re
from collections import defaultdict

import numpy as np
from pydantic import BaseModel, ConfigDict

from fewbits.calibration.statistics import Statistics

TOP_SHARE = 0.01
MOST_NAMED = 32


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TensorSeen(_Record):
    """One weight.

    Attributes:
        mean_square: of all its inputs.
        top_share: share of the sum of squares that the largest 1 % of the columns hold: how uneven the inputs are.
    """

    name: str
    experts: int
    columns: int
    tokens: float
    mean_square: float
    top_share: float


class ExpertsSeen(_Record):
    """How many tokens the experts of one layer saw."""

    name: str
    experts: int
    least: int
    median: float
    most: int
    counts: list[int]
    without_data: list[int]


class CalibrateReport(_Record):
    """One calibration.

    Attributes:
        output: the importance matrix; None if it was not written.
        hessians: folder of the Hessians, likewise.
        windows: of `context` tokens each, that went through the model in this run.
        resumed_after: blocks that an interrupted run had done already.
        seconds: wall time by step.
        warnings: what to keep in mind.
    """

    model: str
    output: str | None
    hessians: str | None
    texts: list[str]
    merged: list[str]
    device: str
    context: int
    windows: int
    tokens: int
    resumed_after: int
    tensors: list[TensorSeen]
    experts: list[ExpertsSeen]
    seconds: dict[str, float]
    warnings: list[str]

    def rows(self) -> list[list[str]]:
        """For each kind of weight: how many, columns, median mean square and unevenness."""
        kinds: dict[str, list[TensorSeen]] = defaultdict(list)
        for tensor in self.tensors:
            kinds[re.sub(r"^blk\.\d+\.|\.weight$", "", tensor.name)].append(tensor)
        return [
            [
                kind,
                str(len(seen)),
                str(seen[0].experts),
                str(seen[0].columns),
                f"{np.median([t.mean_square for t in seen]):.4g}",
                f"{100 * np.median([t.top_share for t in seen]):.1f} %",
            ]
            for kind, seen in kinds.items()
        ]

    def expert_rows(self) -> list[list[str]]:
        """For each layer of experts: tokens of the least, the median and the most used one, and those without any."""
        return [
            [e.name, str(e.experts), str(e.least), f"{e.median:g}", str(e.most), _listed(e.without_data)]
            for e in self.experts
        ]


def tensors_seen(statistics: Statistics) -> list[TensorSeen]:
    out = []
    for name, tensor in statistics.tensors.items():
        importance = tensor.importance()
        columns = np.sort(importance.mean(0, dtype=np.float64))[::-1]
        total = float(columns.sum())
        top = float(columns[: max(1, round(TOP_SHARE * len(columns)))].sum())
        out.append(
            TensorSeen(
                name=name,
                experts=tensor.shape[0],
                columns=tensor.shape[1],
                tokens=float(tensor.counts.sum()),
                mean_square=float(columns.mean()),
                top_share=top / total if total else 0.0,
            )
        )
    return out


def experts_seen(statistics: Statistics) -> list[ExpertsSeen]:
    """The mixture-of-experts layers, once each: all weights of an expert see the same tokens."""
    out: dict[str, ExpertsSeen] = {}
    for name, tensor in statistics.tensors.items():
        layer = re.match(r"blk\.\d+", name)
        if tensor.shape[0] > 1 and layer and layer[0] not in out:
            out[layer[0]] = ExpertsSeen(
                name=layer[0],
                experts=tensor.shape[0],
                least=int(tensor.counts.min()),
                median=float(np.median(tensor.counts)),
                most=int(tensor.counts.max()),
                counts=[int(count) for count in tensor.counts],
                without_data=tensor.without_data,
            )
    return list(out.values())


def _listed(numbers: list[int]) -> str:
    more = f" and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else ""
    return ", ".join(map(str, numbers[:MOST_NAMED])) + more or "none"
