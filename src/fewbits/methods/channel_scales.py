"""What AWQ and SmoothQuant share: scales of channels, and the error that rounding leaves in a linear layer's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fewbits.codecs.blocks import Blocks
from fewbits.codecs.scaled import Scaled
from fewbits.codecs.storage import StorageType
from fewbits.errors import FewbitsError

RoundTrip = Callable[[torch.Tensor], torch.Tensor]
"""Weights float32 [rows, columns] -> what they are once quantized; not in place."""
ROWS = 192
"""Rows of all readers together that errors are computed on: they are sums over rows, a sample does."""
FEWEST = 16
SUB_BLOCK = 32
"""Columns that share a scale in most types of GGUF."""
WIDEST = 1e4
"""Most that two scales of one place differ by: all must survive 16-bit storage."""


@dataclass(frozen=True)
class Scales:
    """What was found for one place.

    Attributes:
        values: float32 [channels], to multiply the readers' columns with.
        error: of the readers' outputs, as a share of the error without scales.
    """

    values: torch.Tensor
    error: float


def settled(scales: torch.Tensor) -> torch.Tensor:
    """The same scales with the smallest and the largest equally far from one, and not too far."""
    scales = scales / (scales.max() * scales.min()).sqrt()
    return scales.clamp(WIDEST**-0.5, WIDEST**0.5)


def evened(weights: Sequence[torch.Tensor], channel: torch.Tensor) -> torch.Tensor:
    """The scales that make a place's columns equally large, for types that share vectors among all columns.

    Of what the search of AQLM's codes leaves on text not seen, this leaves 0.92 to 0.93 (smollm2-768, query and
    output of the eleventh block); scales that look at the inputs leave more.

    Args:
        weights: float32 [rows, columns] of each reader.
        channel: int64 [columns], which channel each column reads.

    Returns:
        float32 [channels].
    """
    squares = torch.stack([weight.square().mean(0) / weight.square().mean().clamp(min=1e-30) for weight in weights])
    size = by_channel(squares.mean(0), channel).mean(1).sqrt()
    return settled(1 / torch.where(size > 0, size, 1))


def sample_rows(weight: torch.Tensor, readers: int) -> torch.Tensor:
    """Evenly spread rows of a weight [rows, columns] that shares its place with so many readers."""
    count = min(max(FEWEST, ROWS // readers), len(weight))
    return weight[torch.linspace(0, len(weight) - 1, count).long().to(weight.device)]


def by_channel(columns: torch.Tensor, channel: torch.Tensor) -> torch.Tensor:
    """The columns that read each channel side by side, each read by equally many: [columns] -> [channels, readings]."""
    return columns[channel.argsort(stable=True)].view(int(channel.max()) + 1, -1)


def group_of(kind: StorageType) -> int:
    """Columns that share a scale; 0 for the whole row."""
    return kind.block[1] if isinstance(kind, Scaled) else SUB_BLOCK


def round_trip_of(kind: StorageType) -> RoundTrip:
    """Rounding to nearest in a storage type, on the tensors' device where the type is one of integers in rows."""
    if isinstance(kind, Blocks):
        blocks = kind.codec
        return lambda weights: torch.from_numpy(blocks.decode(blocks.encode(weights.cpu().numpy()))).to(weights.device)
    if not isinstance(kind, Scaled):
        raise FewbitsError(f"No scales of channels are chosen for {kind.name}.", "Leave the method to the target.")
    if kind.levels == "INT" and kind.block[0] == 1 and kind.zero in ("middle", "integer") and not kind.strided:
        return _integers(kind)

    def settle(weights: torch.Tensor) -> torch.Tensor:
        rows = np.ascontiguousarray(weights.cpu().numpy())
        return torch.from_numpy(kind.settle(rows).decode()).to(weights.device)

    return settle


def _integers(kind: Scaled) -> RoundTrip:
    """`Scaled.settle` and back: the searches spend most of their time in it."""
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind.scale, torch.float32)
    smallest = {"F16": 2.0**-24}.get(kind.scale, 2.0**-126)
    ladder = kind.ladder()[0]
    lowest, highest = float(ladder[0]), float(ladder[-1])

    def minmax(weights: torch.Tensor) -> torch.Tensor:
        x = weights.reshape(-1, kind.block[1] or weights.shape[1])
        low, high = x.aminmax(dim=1, keepdim=True)
        if kind.zero == "integer":
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = ((high - low) / (highest - lowest)).to(dtype).float().clamp(min=smallest)
            zero = (-low / scale).round_().clamp_(lowest, highest)
            return (x / scale).round_().add_(zero).clamp_(lowest, highest).sub_(zero).mul_(scale).view(weights.shape)
        scale = (2 * torch.maximum(-low, high) / (highest - lowest)).to(dtype).float().clamp(min=smallest)
        return (x / scale).round_().clamp_(lowest, highest).mul_(scale).view(weights.shape)

    return minmax
