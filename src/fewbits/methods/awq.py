"""AWQ (Lin et al., arXiv 2306.00978): channels that activations make important are scaled up before rounding.

The paper measures a whole attention or feed-forward module's output on sampled tokens; here the error is that of the
linear layers' own outputs over all tokens, tr(D X^T X D^T) with D the weights' error, which needs no forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fewbits.methods.channel_scales import RoundTrip, Scales, by_channel, sample_rows, settled

COARSE = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
FINE = (0.1, 0.05)
"""Ratios that are tried, then steps to both sides of the best one."""


@dataclass(frozen=True)
class Reader:
    """A linear layer whose columns are scaled.

    Attributes:
        weight: float32 [rows, columns].
        hessian: float32 [columns, columns], the sum of x x^T over its inputs; readers of one input share the object.
    """

    weight: torch.Tensor
    hessian: torch.Tensor


def choose_scales(readers: Sequence[Reader], channel: torch.Tensor, group: int, round_trip: RoundTrip) -> Scales | None:
    """Search s = x^ratio / w^(1 - ratio) and s = x^ratio for the least error of the readers' outputs.

    x is the root mean square of a channel's activations (the paper's mean magnitude was found to do a little worse),
    w the mean magnitude of its weights, each relative to its group's largest.

    Args:
        readers: at least one.
        channel: int64 [columns], which channel each column reads.
        group: columns that share a scale of the storage type; 0 for the whole row.
        round_trip: by plain rounding to nearest, which is what the search can afford.

    Returns:
        None where no scales are better than none.
    """
    inputs = {id(reader.hessian): reader.hessian for reader in readers}
    squares = torch.stack([hessian.diagonal() for hessian in inputs.values()]).sum(0)
    x = by_channel(squares, channel).mean(1).sqrt()
    if not bool(x.max() > 0):
        return None
    x = (x / x.mean()).clamp(min=1e-4)
    w = by_channel(_relative_magnitude([reader.weight for reader in readers], group), channel).mean(1)
    sampled = [
        (torch.cat([sample_rows(r.weight, len(readers)) for r in readers if r.hessian is hessian]), hessian)
        for hessian in inputs.values()
    ]

    def error(scales: torch.Tensor) -> float:
        each = scales[channel]
        total = 0.0
        for rows, hessian in sampled:
            wrong = round_trip(rows * each).div_(each).sub_(rows)
            total += float(((wrong @ hessian) * wrong).sum())
        return total

    before = error(torch.ones_like(x))
    tried: dict[tuple[bool, float], tuple[float, torch.Tensor]] = {}

    def attempt(duo: bool, ratio: float) -> None:
        ratio = round(min(max(ratio, 0.0), 1.0), 4)
        if (duo, ratio) not in tried:
            scales = x.pow(ratio) / (w.pow(1 - ratio) + 1e-4) if duo else x.pow(ratio)
            scales = settled(scales)
            tried[duo, ratio] = error(scales), scales

    for duo in (True, False):
        for ratio in COARSE:
            attempt(duo, ratio)
    for step in FINE:
        duo, ratio = min(tried, key=lambda key: tried[key][0])
        attempt(duo, ratio - step)
        attempt(duo, ratio + step)
    least, scales = min(tried.values(), key=lambda found: found[0])
    return Scales(scales, least / before) if least < before else None


def _relative_magnitude(weights: Sequence[torch.Tensor], group: int) -> torch.Tensor:
    """Mean over all rows of |w| / (largest |w| of its group), [columns]."""
    sums = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for weight in weights:
        size = weight.abs().view(weight.shape[0], -1, group or weight.shape[1])
        sums += (size / size.amax(2, keepdim=True).clamp(min=1e-30)).sum(0).view(-1)
    return sums / sum(len(weight) for weight in weights)
