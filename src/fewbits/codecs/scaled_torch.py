"""Searches of scales on a GPU. Importing this needs torch, and what searches Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from fewbits.codecs.base import Floats
from fewbits.codecs.scaled_scales import store
from fewbits.codecs.scaled_search import KINDS, candidates, pair_candidates

if TYPE_CHECKING:
    from fewbits.codecs.scaled import Scaled

LONGEST = 8192
"""Elements of a group that a program of the search keeps in registers; longer ones are searched by the processor."""


def searches(kind: Scaled, elements: int) -> bool:
    """Whether the scales of a type of integers are searched here, in groups of so many elements."""
    return kind.scale in ("F32", "F16", "BF16") and elements <= LONGEST


def search_scales(
    kind: Scaled, weights: Floats, importance: Floats, scales: Floats, zeros: Floats | None, device: str
) -> tuple[Floats, Floats | None]:
    """`scaled_search.search_scales` of a type that this `searches`.

    Args:
        weights: float32, flat, row-major [rows, columns].
        importance: float32 [columns], as `usable_importance` gives it.
        scales, zeros: float32 [grid], where to begin.
        device: of torch.
    """
    from fewbits.kernels import groups_triton  # needs Triton, which comes with torch for GPUs

    def there(values: Floats) -> torch.Tensor:
        return torch.from_numpy(values.reshape(-1).copy()).to(device)

    elements = weights.size // scales.size
    found, stored_as = there(scales), KINDS[kind.scale]
    given = (there(weights), there(importance), elements)
    if zeros is not None:
        points, most = there(zeros), float((1 << kind.bits) - 1)
        tried = torch.from_numpy(pair_candidates(kind.bits)).to(device)
        groups_triton.search_pairs(*given, most, tried, stored_as, found, points)
        made = found.cpu().numpy().reshape(scales.shape)
        return store(kind.scale, made), points.cpu().numpy().reshape(scales.shape)
    values, _ = kind.ladder()
    tried = there(candidates(kind))
    ends = (float(values[0]), float(values[-1]))
    groups_triton.search_scales(*given, ends, tried, kind.signed, stored_as, found)
    made = found.cpu().numpy().reshape(scales.shape)
    return np.copysign(store(kind.scale, np.abs(made)), made), None
