"""QuIP#'s search and feedback on a GPU, all outputs of a matrix at a time. Importing this needs torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fewbits.codecs.lattice import INPUTS_TOGETHER, Codes, LatticeE8, e8p
from fewbits.kernels.lattice import DIMENSIONS
from fewbits.methods.ldlq import Floats, feed_back
from fewbits.methods.nearest_torch import Words
from fewbits.methods.quip import Feedback


@dataclass(frozen=True)
class Points:
    """What the indices of each stage stand for, on the device."""

    stages: list[Words]

    @staticmethod
    def of(kind: LatticeE8, device: str) -> Points:
        tables = [e8p()] if kind.stages == 1 else [e8p(), kind.second]
        return Points([Words(torch.from_numpy(table).to(device)) for table in tables])

    def search(self, vectors: torch.Tensor) -> torch.Tensor:
        """The nearest points to vectors [count, 8], each stage's to what those before it miss: int64 [stages, count].

        All are compared: the table's order in signs and magnitudes is worth nothing to matrix products.
        """
        found, left = [], vectors
        for points in self.stages:
            found.append(points.nearest(left))
            left = left - points.values[found[-1]]
        return torch.stack(found)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What indices [stages, count] stand for, float32 [count, 8]."""
        return torch.stack([points.values[each] for points, each in zip(self.stages, codes, strict=True)]).sum(0)


def coded(noise: Floats, kind: LatticeE8, feedback: Feedback | None, device: str) -> tuple[Codes, Floats]:
    """Codes [stages, out, in / 8] of a matrix [out, in], and what they stand for, [out, in]."""
    points, wanted = Points.of(kind, device), torch.from_numpy(noise).to(device)
    rows, columns = noise.shape
    codes = torch.empty((kind.stages, rows, columns // DIMENSIONS), dtype=torch.int64, device=device)

    def code(first: int, now: torch.Tensor) -> torch.Tensor:
        found = codes[:, :, first // DIMENSIONS] = points.search(now)
        return points.values(found)

    if feedback is None:
        made = feed_back(wanted, None, code, DIMENSIONS, INPUTS_TOGETHER)
        return codes.cpu().numpy().astype(np.uint16), made.cpu().numpy()
    own, others = None, None
    if feedback.sweeps:
        own, others = (torch.from_numpy(part).to(device) for part in (feedback.own, feedback.others))

    def improve(first: int, now: torch.Tensor) -> torch.Tensor:
        assert own is not None
        block = first // DIMENSIONS
        pair = torch.stack([codes[:, :, block], points.search(now)])
        values = torch.stack([points.values(each) for each in pair])
        wrong = values - now
        cost = ((wrong @ own[block]) * wrong).sum(2)
        better = cost[1] < cost[0]
        codes[:, :, block] = torch.where(better, pair[1], pair[0])
        return torch.where(better[:, None], values[1], values[0])

    made = feed_back(wanted, torch.from_numpy(feedback.first).to(device), code, DIMENSIONS, INPUTS_TOGETHER)
    for _ in range(feedback.sweeps):
        made = feed_back(wanted, others, improve, DIMENSIONS, INPUTS_TOGETHER, made)
    return codes.cpu().numpy().astype(np.uint16), made.cpu().numpy()
