"""SmoothQuant (Xiao et al., arXiv 2211.10438): where activations are quantized too, part of their outliers moves into
the weights.

s = max|x|^alpha / max|w|^(1 - alpha) divides a channel of the activations and multiplies the weights that read it. The
paper fixes alpha for a whole model; here each place takes the one with the least error, or stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fewbits.methods.channel_scales import RoundTrip, Scales, by_channel, sample_rows, settled

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TOKENS = 512
"""Inputs that are kept of each place to measure errors on."""


@dataclass(frozen=True)
class SmoothReader:
    """A linear layer whose inputs are quantized, and whose columns are scaled.

    Attributes:
        weight: float32 [rows, columns].
        peaks: float32 [columns], the largest absolute value of each input column.
        inputs: float32 [tokens, columns], a sample.
    """

    weight: torch.Tensor
    peaks: torch.Tensor
    inputs: torch.Tensor


def round_tokens(x: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """Each token's inputs [tokens, columns] in integers with one scale, as engines round them while they run."""
    top = 2 ** (bits - 1) - 1
    scale = (x.abs().amax(1, keepdim=True) / top).clamp(min=1e-30)
    return (x / scale).round_().clamp_(-top - 1, top).mul_(scale)


def smooth(
    readers: Sequence[SmoothReader],
    channel: torch.Tensor,
    round_trip: RoundTrip,
    alphas: Sequence[float] = ALPHAS,
) -> Scales | None:
    """Choose the scales of one place.

    Args:
        readers: at least one.
        channel: int64 [columns], which channel each column reads.
        round_trip: of the weights.
        alphas: to choose among.

    Returns:
        None where none is better than no scales.
    """
    x = by_channel(torch.stack([reader.peaks for reader in readers]).amax(0), channel).amax(1)
    if not bool(x.max() > 0):
        return None
    x = x.clamp(min=float(x.mean()) * 1e-4)
    w = by_channel(torch.stack([reader.weight.abs().amax(0) for reader in readers]).amax(0), channel).amax(1)
    w = w.clamp(min=max(float(w.mean()) * 1e-4, 1e-30))
    sampled = [(reader.inputs, sample_rows(reader.weight, len(readers))) for reader in readers]
    exact = [inputs @ rows.T for inputs, rows in sampled]

    def error(scales: torch.Tensor) -> float:
        each = scales[channel]
        return sum(
            float((round_tokens(inputs / each) @ round_trip(rows * each).T - output).square().sum())
            for (inputs, rows), output in zip(sampled, exact, strict=True)
        )

    before = error(torch.ones_like(x))
    tried = [settled(x.pow(alpha) / w.pow(1 - alpha)) for alpha in alphas]
    errors = [error(scales) for scales in tried]
    best = min(range(len(tried)), key=errors.__getitem__)
    return Scales(tried[best], errors[best] / before) if errors[best] < before else None
