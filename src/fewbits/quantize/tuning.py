"""Tuning of what is continuous in a quantized decoder block, codebooks, scales and norms, on the block's output.

After AQLM (Egiazarian et al., arXiv 2401.06118, section 3.4): Adam on the squared difference from what the block gave
before it was quantized, with the inputs that the quantized blocks before it give. Here a step is as large as a tensor's
values are, some windows are held out, and what does best on those is kept: maybe what there was before.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from math import cos, pi
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from fewbits.calibration.collect import ENERGY_CAP
from fewbits.forward.streamed import Stream, StreamedModel
from fewbits.layouts.base import Arrays
from fewbits.methods.base import Effort

RATE = 3e-3
"""How far the first steps of Adam move a tensor at most, in its root mean square; it falls to zero along a cosine."""
RATE_BY_ERROR = 0.02
"""The same as a share of the output's relative error (root mean square): Adam's steps are as large where little is to
be gained, and steps that help Q4_0 do nothing but harm where types have 5 bits."""
BETAS = (0.9, 0.95)
HELD_OUT = 8
"""One of so many batches of windows is held out, ..."""
FEWEST = HELD_OUT // 2 + 1
"""... the first of them the fifth: with fewer batches than this, nothing is tuned."""
Self = TypeVar("Self", bound="Tunable")


class Tunable(Protocol):
    """A coded matrix some of whose parts are continuous."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """These parts, float32, by name."""

    def decode_torch(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weights, float32 [out, in], with such parts, which gradients reach."""

    def with_tensors(self: Self, tensors: Mapping[str, torch.Tensor]) -> Self:
        """The same codes with such parts, as they can be stored."""


@runtime_checkable
class TunableLayout(Protocol):
    """A layout of such matrices.

    Attributes:
        epochs: how often text runs through a block at most, by effort.
    """

    @property
    def epochs(self) -> Mapping[Effort, int]: ...

    def coded(self, arrays: Arrays) -> Tunable:
        """What stored tensors hold."""


def epochs_of(layouts: Iterable[object], effort: Effort) -> int:
    """Of a block whose weights are in such layouts; 0 where none can be tuned."""
    return max((layout.epochs[effort] for layout in layouts if isinstance(layout, TunableLayout)), default=0)


class _Replaced(nn.Module):
    """A block with other weights; keeps what it gives, of which gradients know."""

    def __init__(self, block: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.block, self.weights = block, dict(weights)
        self.out = torch.empty(0)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = torch.func.functional_call(self.block, self.weights, args, kwargs)
        self.out = (out if isinstance(out, torch.Tensor) else out[0]).float()
        return self.out


@dataclass(frozen=True)
class Tuned:
    """What became of a block.

    Attributes:
        coded: by stored name.
        plain: other parameters, by name within the block.
        before, after: mean square error of the held-out windows' outputs, as a share of what the block adds to them.
    """

    coded: Mapping[str, Tunable]
    plain: Mapping[str, torch.Tensor]
    before: float
    after: float


class Tuning:
    """One block's: made before the block is quantized, and called afterwards.

    Args:
        dtype: in which the norms are stored; None: they are not tuned.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        stream: Stream,
        index: int,
        block: nn.Module,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.streamed, self.stream, self.index, self.block = streamed, stream, index, block
        self.device, self.dtype = device, dtype
        self.inputs = streamed.copied(stream.hidden)
        streamed.run_block(index, block, stream, device)
        self.targets = streamed.copied(stream.hidden)
        streamed.copied(self.inputs, stream.hidden)

    @property
    def held_out(self) -> list[slice]:
        return self.stream.batches[HELD_OUT // 2 :: HELD_OUT]

    def __call__(self, coded: Mapping[str, Tunable], epochs: int) -> Tuned | None:
        """Tune a quantized block.

        Args:
            coded: its weights by stored name, of those that can be tuned; the block's own parameters are as they
                decode. Nothing is changed in place.
            epochs: how often text runs through it.

        Returns:
            None where nothing is gained.
        """
        places = self._places(coded)
        training = [batch for batch in self.stream.batches if batch not in self.held_out]
        if not epochs or len(self.stream.batches) < FEWEST or not places:
            return None
        inner = {
            name: {part: tensor.to(self.device) for part, tensor in coded[stored].tensors().items()}
            for name, stored in places.items()
        }
        plain = {
            name: parameter.detach().clone()
            for name, parameter in self.block.named_parameters()
            if parameter.ndim == 1 and self.dtype is not None
        }
        leaves = [*plain.values(), *(tensor for tensors in inner.values() for tensor in tensors.values())]
        groups = [{"params": [leaf], "size": float(leaf.square().mean().sqrt())} for leaf in leaves]
        for leaf in leaves:
            leaf.requires_grad_(True)
        adam = torch.optim.Adam(groups, betas=BETAS)
        random = torch.Generator().manual_seed(self.index)

        def weights() -> dict[str, torch.Tensor]:
            # what nothing of can be changed is decoded here
            made = {name: coded[places[name]].decode_torch(tensors) for name, tensors in inner.items()}
            return plain | {name: weight.to(self.device) for name, weight in made.items()}

        before = least = self._error(weights(), self.held_out)
        rate = min(RATE, RATE_BY_ERROR * before**0.5)
        best = None
        total = epochs * len(training)
        for epoch in range(epochs):
            for step, chosen in enumerate(torch.randperm(len(training), generator=random).tolist()):
                along = (epoch * len(training) + step) / total
                for group in adam.param_groups:
                    group["lr"] = rate * group["size"] * (1 + cos(pi * along)) / 2
                with torch.enable_grad():
                    self._loss(weights(), training[chosen])[0].backward()
                adam.step()
                adam.zero_grad()
            error = self._error(weights(), self.held_out)
            if error < least:
                least, best = error, copy.deepcopy((plain, inner))
        if best is None:
            return None
        plain, inner = best
        return Tuned(
            {places[name]: coded[places[name]].with_tensors(tensors) for name, tensors in inner.items()},
            {name: tensor.detach().to(self.dtype).float() for name, tensor in plain.items()},
            before,
            least,
        )

    def apply(self, plain: Mapping[str, torch.Tensor]) -> None:
        """Put other parameters into the block and take the windows through it anew, whose weights are in it."""
        for name, parameter in self.block.named_parameters():
            if name in plain:
                parameter.data.copy_(plain[name])
        self.streamed.copied(self.inputs, self.stream.hidden)
        self.streamed.run_block(self.index, self.block, self.stream, self.device)

    def _places(self, coded: Collection[str]) -> dict[str, str]:
        """Name within the block -> stored name, of parameters that are one coded weight each."""
        views = self.streamed.weights_of(self.index, self.block)
        stored = {(view.data_ptr(), view.shape): name for name, view in views.items() if name in coded}
        found = {name: stored.get((p.data_ptr(), p.shape)) for name, p in self.block.named_parameters()}
        return {name: weight for name, weight in found.items() if weight is not None}

    def _loss(self, weights: Mapping[str, torch.Tensor], batch: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over a batch, of squared errors and of what the block adds, squared; both capped by token."""
        replaced = _Replaced(self.block, weights)
        self.streamed.watch_block(
            self.index, replaced, replace(self.stream, hidden=self.inputs, batches=[batch]), self.device
        )
        given, wanted = self.inputs[batch].to(self.device), self.targets[batch].to(self.device)
        energy = wanted.square().mean(-1)
        share = (ENERGY_CAP * energy.median() / energy.clamp(min=1e-30)).clamp(max=1)
        missed = ((replaced.out - wanted).square().mean(-1) * share).sum()
        return missed, ((wanted - given).square().mean(-1) * share).sum()

    def _error(self, weights: Mapping[str, torch.Tensor], batches: list[slice]) -> float:
        with torch.no_grad():
            sums = torch.stack([torch.stack(self._loss(weights, batch)) for batch in batches]).double().sum(0)
        return float(sums[0] / sums[1].clamp(min=1e-30))
