"""What calibration learns of a model: for each weight, how large the inputs of its columns are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fewbits.errors import FewbitsError

DATASET_KEY = "quantize.imatrix.dataset"
"""GGUF key that names the texts a quantized file was calibrated with."""
Floats = npt.NDArray[np.float32]


def text_mark(sha256: str) -> str:
    """How `DATASET_KEY` names a text besides its file name."""
    return f"sha256:{sha256[:16]}"


@dataclass
class TensorStatistics:
    """Of one weight [experts, rows, columns] or, with one expert, [rows, columns].

    Attributes:
        sums: float32 [experts, columns], sum of the squares of each input column over the tokens.
        counts: float32 [experts], how many tokens each expert saw.
    """

    sums: Floats
    counts: Floats

    @property
    def shape(self) -> tuple[int, int]:
        """(experts, columns)."""
        return self.sums.shape[0], self.sums.shape[1]

    @property
    def without_data(self) -> list[int]:
        """The experts that no token was routed to."""
        return [int(expert) for expert in np.flatnonzero(self.counts == 0)]

    def importance(self) -> Floats:
        """Mean square of each input column, float32 [experts, columns].

        Nothing is known of an expert that saw no token: all its columns weigh the same, as for llama-quantize, and as
        much as the mean column of the other experts.
        """
        seen = self.counts > 0
        out = np.ones(self.sums.shape, np.float32)
        if seen.any():
            out[seen] = self.sums[seen] / self.counts[seen, None]
            out[~seen] = out[seen].mean(dtype=np.float64)
        return out

    def split(self, experts: int, columns: int) -> TensorStatistics:
        """The same with so many experts: the older files keep all experts' columns in one row with one count.

        Raises:
            FewbitsError: the sizes do not match.
        """
        if self.shape == (experts, columns):
            return self
        if self.shape[0] == 1 and self.sums.size == experts * columns:
            return TensorStatistics(self.sums.reshape(experts, columns), np.repeat(self.counts, experts))
        raise FewbitsError(f"there are {self.shape[0]} x {self.shape[1]} input sums, not {experts} x {columns}.")


@dataclass(frozen=True)
class Sensitivity:
    """How much errors in a weight [experts, rows, columns] or, with one expert, [rows, columns] change what is said.

    The KL divergence in nats a token that an error D costs is estimated as the sum over experts, rows and columns of
    rows[row] * columns[expert, column] * D[expert, row, column]^2 / 2.

    Attributes:
        columns: float32 [experts, columns].
        rows: float32 [rows] with the sum 1, or None where each row counts 1 / rows.
    """

    columns: Floats
    rows: Floats | None = None


Sensitivities = dict[str, list[Sensitivity]]
"""By GGUF name of the weight; an embedding that is the head as well has two."""


@dataclass
class Statistics:
    """The statistics of a model, and what they were made from.

    Attributes:
        tensors: GGUF name of the weight (`blk.0.attn_q.weight`) -> its statistics.
        datasets: names of the texts.
        chunk_count: windows of text that went through the model.
        chunk_size: tokens of a window.
        texts_sha256: of each text file, where known; what calibrated a model must not measure it.
        tokens: tokens that went through the model, where known, else 0.
        sensitivities: empty where none were taken.
    """

    tensors: dict[str, TensorStatistics]
    datasets: list[str] = field(default_factory=list)
    chunk_count: int = 0
    chunk_size: int = 512
    texts_sha256: list[str] = field(default_factory=list)
    tokens: int = 0
    sensitivities: Sensitivities = field(default_factory=dict)

    def without_data(self) -> dict[str, list[int]]:
        """Weights with experts that saw no token -> those experts."""
        return {name: t.without_data for name, t in self.tensors.items() if t.without_data}

    def merged(self, others: Sequence[Statistics]) -> Statistics:
        """These statistics and others of the same model, as if all texts had gone through it in one run.

        Raises:
            FewbitsError: a weight has other sizes in the others.
        """
        tensors = {name: TensorStatistics(t.sums.copy(), t.counts.copy()) for name, t in self.tensors.items()}
        for other in others:
            for name, added in other.tensors.items():
                tensors[name] = _added(name, tensors[name], added) if name in tensors else added
        every = [self, *others]
        longest = max(tensors.values(), key=lambda t: float(t.counts.max(initial=0)), default=None)
        tokens = float(longest.counts.max(initial=0)) if longest else 0.0
        same_size = len({s.chunk_size for s in every}) == 1
        return Statistics(
            tensors,
            list(dict.fromkeys(name for s in every for name in s.datasets)),
            # windows of different lengths have no common count: count in windows of the first length, as llama.cpp does
            sum(s.chunk_count for s in every) if same_size else int(tokens) // self.chunk_size,
            self.chunk_size,
            list(dict.fromkeys(digest for s in every for digest in s.texts_sha256)),
            sum(s.tokens for s in every),
            # estimates from few windows in any case: the first are as good as a mean
            next((s.sensitivities for s in every if s.sensitivities), {}),
        )


def _added(name: str, first: TensorStatistics, second: TensorStatistics) -> TensorStatistics:
    experts = max(first.shape[0], second.shape[0])
    columns = min(first.shape[1], second.shape[1])
    try:
        first, second = first.split(experts, columns), second.split(experts, columns)
    except FewbitsError:
        raise FewbitsError(
            f"{name}: {first.shape[0]} x {first.shape[1]} input sums cannot be added to "
            f"{second.shape[0]} x {second.shape[1]}.",
            "Merge statistics of one model only.",
        ) from None
    return TensorStatistics(first.sums + second.sums, first.counts + second.counts)
