"""What errors of the weights are expected to cost, by sensitivities that calibration has measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fewbits import arch
from fewbits.calibration.imatrix_files import read_statistics
from fewbits.calibration.statistics import Sensitivity
from fewbits.checkpoint import Model
from fewbits.errors import FewbitsError

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Counted:
    """How the squared errors of one matrix count, in its Hugging Face orientation: the outer product of two vectors.

    Attributes:
        rows, columns: float32, one value for each; their product is in nats a token.
    """

    rows: Floats
    columns: Floats

    def loss(self, squares: Floats, rows: slice) -> float:
        """What squared errors in some rows cost, in nats a token."""
        return float(self.rows[rows] @ (squares @ self.columns).astype(np.float64))


class ExpectedLosses:
    """The sensitivities of a model's matrices, by Hugging Face name.

    The KL divergence that an error D of a matrix costs is estimated by half of the sum of F * D^2, where F is the
    diagonal of the Fisher information (see `calibration.sensitivity`). Errors add up as if they were independent.

    Attributes:
        datasets: names of the texts that they were measured on.

    Args:
        reference: the model that the statistics are of.
        path: an importance matrix of `fewbits calibrate --sensitivity`.

    Raises:
        FewbitsError: there are no sensitivities in it, or they are of another model.
    """

    def __init__(self, reference: Model, path: Path) -> None:
        statistics = read_statistics(path)
        if not statistics.sensitivities:
            raise FewbitsError(
                f"{path}: there are no sensitivities in it.", "Make them with `fewbits calibrate --sensitivity`."
            )
        self.path, self.datasets = path, statistics.datasets
        self._of: dict[str, list[Counted]] = {}
        shapes = {name: reference.shape(name) for name in reference.names}
        for tensor in arch.gguf_tensors(reference.config, shapes):
            for expert, source in enumerate(tensor.sources if tensor.fused is None else ()):
                for known in statistics.sensitivities.get(tensor.name, []):
                    if known.columns.shape[1] != tensor.shape[-1] or len(known.columns) not in (1, len(tensor.sources)):
                        raise FewbitsError(
                            f"{path}: {tensor.name} has sensitivities {known.columns.shape}, the model's has the shape "
                            f"{tensor.shape}.",
                            "Take statistics of the same model.",
                        )
                    counted = _counted(known, expert, tensor.shape[-2])
                    turned = tensor.change == "transpose"
                    self._of.setdefault(source, []).append(
                        Counted(counted.columns, counted.rows) if turned else counted
                    )
        if not self._of:
            raise FewbitsError(f"{path}: it has no tensor of this model.", "Take statistics of the same model.")

    def counted(self, name: str) -> list[Counted]:
        """How errors of a matrix count; the losses add up, none where nothing is known."""
        return self._of.get(name, [])


def _counted(known: Sensitivity, expert: int, rows: int) -> Counted:
    by_row = np.full(rows, 1 / rows, np.float32) if known.rows is None else known.rows
    if len(by_row) != rows:
        raise FewbitsError(f"There are sensitivities of {len(by_row)} rows, the matrix has {rows}.")
    return Counted(by_row, 0.5 * known.columns[min(expert, len(known.columns) - 1)])
