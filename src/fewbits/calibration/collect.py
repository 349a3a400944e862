"""Watches the inputs of every linear layer of a decoder block while text runs through it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fewbits import arch
from fewbits.calibration.statistics import TensorStatistics
from fewbits.checkpoint import Model
from fewbits.errors import FewbitsError
from fewbits.forward.streamed import StreamedModel

ENERGY_CAP = 8.0
"""Tokens count with at most so many times the median's energy where weights are chosen by them: without, a few tokens
with massive activations (the first of each window: specs, low-bit.md section 9) own a Hessian."""
HELD_OUT = 4
"""Of so many batches of windows one says what the others are worth, ..."""
HELD_COLUMNS = 8192
"""... of inputs with so many columns at most, and not of experts: it takes another Hessian's memory."""
ROWS = 128
"""Squares are summed in float32 over so many tokens, then in float64: fast, and exact to a few parts in 10 million."""


@dataclass
class Inputs:
    """What is known of the inputs that one or several weights share.

    Attributes:
        names: of the weights: GGUF names for an imatrix, stored names for directories.
        sums: float64 [experts, columns], sums of squares.
        counts: tokens that each expert saw.
        hessians: float32 [columns, columns] of each expert: X^T X, None where it saw no token or none is wanted.
        peaks: the largest absolute input of each expert.
        rough: see `BlockRecorder`.
        energy_cap: most squared norm of a token within X^T X, in medians of its batch; None for no limit.
        holds_out: whether a part of the batches is also counted apart.
        held: their part of the Hessians, None where there is none, ...
        held_counts: ... and their tokens.
        at_once: the experts whose Hessians are being summed.
    """

    names: list[str]
    sums: torch.Tensor
    counts: list[int]
    hessians: list[torch.Tensor | None]
    wants_hessians: bool = False
    peaks: list[float] = field(default_factory=list)
    energy_cap: float | None = None
    rough: bool = False
    holds_out: bool = False
    held: list[torch.Tensor | None] = field(default_factory=list)
    held_counts: list[int] = field(default_factory=list)
    at_once: range = range(0)
    _batches: list[int] = field(default_factory=list)

    @staticmethod
    def empty(
        names: tuple[str, ...],
        experts: int,
        like: torch.Tensor,
        hessians: bool,
        energy_cap: float | None = None,
        rough: bool = False,
        holds_out: bool = False,
    ) -> Inputs:
        sums = torch.zeros((experts, like.shape[-1]), dtype=torch.float64, device=like.device)
        return Inputs(
            list(names),
            sums,
            counts=[0] * experts,
            hessians=[None] * experts,
            wants_hessians=hessians,
            peaks=[0.0] * experts,
            energy_cap=energy_cap,
            rough=rough,
            holds_out=holds_out and experts == 1 and like.shape[-1] <= HELD_COLUMNS,
            held=[None] * experts,
            held_counts=[0] * experts,
            at_once=range(experts),
            _batches=[0] * experts,
        )

    def in_rounds(self, most: int | None) -> Inputs:
        """The same, beginning with as many experts as have Hessians of so many bytes, or with one; None: with all."""
        if most is not None and self.wants_hessians:
            self.at_once = range(min(len(self.counts), max(1, most // (4 * self.sums.shape[1] ** 2))))
        return self

    def next_round(self) -> bool:
        """Drop the Hessians of the experts at hand and go on to the next ones, if there are any."""
        for expert in self.at_once:
            self.hessians[expert] = self.held[expert] = None
        stop = self.at_once.stop
        self.at_once = range(stop, min(len(self.counts), stop + len(self.at_once)))
        return len(self.at_once) > 0

    def wants(self, expert: int) -> bool:
        """Whether there is anything to learn of an expert in this round: in the first one of all of them."""
        return not self.at_once.start or expert in self.at_once

    def add(self, x: torch.Tensor, expert: int = 0) -> None:
        """Count inputs [tokens, columns]."""
        if not self.at_once.start:
            self.counts[expert] += len(x)
        if not len(x):
            return
        if not self.at_once.start:
            self._add_squares(x, expert)
        if self.wants_hessians and expert in self.at_once:
            if self.energy_cap is not None:
                norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
                limit = (self.energy_cap**0.5 * norms.median()).clamp(min=1e-30)
                x = x * (limit / norms.clamp(min=limit)).to(x.dtype)[:, None]
            self._add_product(self.hessians, x, expert)
            if self.holds_out:
                self._batches[expert] += 1
                if self._batches[expert] % HELD_OUT == 0:
                    self._add_product(self.held, x, expert)
                    self.held_counts[expert] += len(x)

    def _add_squares(self, x: torch.Tensor, expert: int) -> None:
        low, high = torch.aminmax(x)
        self.peaks[expert] = max(self.peaks[expert], -float(low), float(high))
        if not (self.rough and self.wants_hessians):  # else the Hessian's diagonal says it
            for rows in x.float().split(ROWS):
                self.sums[expert] += rows.square().sum(0)

    def _add_product(self, hessians: list[torch.Tensor | None], x: torch.Tensor, expert: int) -> None:
        hessian = hessians[expert]
        if hessian is None:
            hessian = hessians[expert] = torch.zeros((x.shape[1], x.shape[1]), device=x.device)
        if self.rough:
            _add_rough(hessian, x.bfloat16())
        else:
            hessian.addmm_(x.T, x)

    def merge(self, other: Inputs) -> None:
        """Add what was seen of the same input elsewhere; `other` is not to be used any more."""
        self.sums += other.sums
        for expert, hessian in enumerate(other.hessians):
            self.counts[expert] += other.counts[expert]
            self.peaks[expert] = max(self.peaks[expert], other.peaks[expert])
            mine = self.hessians[expert]
            if mine is None:
                self.hessians[expert] = hessian
            elif hessian is not None:
                mine += hessian
                other.hessians[expert] = None

    def of_expert(self, expert: int) -> list[str]:
        """Stored names of an expert's weights, where `names` are those of the first one."""
        return [re.sub(r"\bexperts\.0\.", f"experts.{expert}.", name) for name in self.names]

    def statistics(self) -> dict[str, TensorStatistics]:
        """Of each weight.

        Raises:
            FewbitsError: an input was not finite, or too large to be squared.
        """
        sums = self.sums.float().cpu()
        if not bool(torch.isfinite(sums).all()):
            raise FewbitsError(
                f"{self.names[0]}: its inputs are not finite, or too large to be squared.",
                "The model is damaged or needs a wider type than float32.",
            )
        counts = np.asarray(self.counts, np.float32)
        return {name: TensorStatistics(sums.numpy().copy(), counts.copy()) for name in self.names}


def _add_rough(hessian: torch.Tensor, x: torch.Tensor) -> None:
    """Add X^T X, of which only the blocks on and above the diagonal are computed: the rest mirrors them."""
    step = max(256, -(-x.shape[1] // 6))
    for start in range(0, x.shape[1], step):
        here = slice(start, start + step)
        product = (x[:, here].T @ x[:, start:]).float()
        hessian[here, start:] += product
        hessian[start + step :, here] += product[:, step:].T


def owners(model: Model) -> dict[str, list[str]]:
    """Stored Hugging Face tensor -> GGUF names of the weights that are made from it."""
    out: dict[str, list[str]] = defaultdict(list)
    for tensor in arch.gguf_tensors(model.config, {name: model.shape(name) for name in model.names}):
        if tensor.name.endswith(".weight"):
            for source in tensor.sources:
                out[source].append(tensor.name)
    return dict(out)


def gguf_names(streamed: StreamedModel, owned: Mapping[str, list[str]], parameter: str) -> tuple[str, ...]:
    """GGUF names of the weights that a parameter of the transformers model becomes."""
    names = (name for source in streamed.sources(parameter) for name in owned.get(source, ()))
    return tuple(dict.fromkeys(names))


@dataclass
class BlockRecorder:
    """Statistics of all linear layers of one decoder block, whose modules call it.

    Layers that get the very same tensor (query, key and value; gate and up) share one record.

    Attributes:
        energy_cap: see `Inputs`.
        rough: sum Hessians in bfloat16 products, which is twice as fast where the processor has them.
        pause: called with the names of the weights whose input has just been recorded, before it is used.
        holds_out: see `Inputs`.
        most: bytes of the Hessians of experts that are summed at once, where there is a `pause`: windows wait there
            once for each round of experts. None: no limit.
    """

    hessians: bool = False
    energy_cap: float | None = None
    rough: bool = False
    pause: Callable[[tuple[str, ...]], None] | None = None
    holds_out: bool = False
    most: int | None = None
    _records: dict[tuple[str, ...], Inputs] = field(default_factory=dict)
    _sharing: set[tuple[str, ...]] = field(default_factory=set)
    _taken: set[tuple[str, ...]] = field(default_factory=set)
    _last: tuple[torch.Tensor, Inputs] | None = None
    _undo: list[Callable[[], object]] = field(default_factory=list)

    def attach(self, block: nn.Module, path: str, streamed: StreamedModel, owned: Mapping[str, list[str]]) -> None:
        """Listen to every layer of a block that has a weight in GGUF.

        Args:
            path: prefix of the block's tensors.
            owned: as `owners` gives it.

        Raises:
            FewbitsError: the block holds experts of a kind that is not known.
        """
        for name, module in block.named_modules():
            parameters = dict(module.named_parameters(recurse=False))
            if getattr(parameters.get("gate_up_proj"), "ndim", 0) == 3:
                self._attach_experts(
                    module,
                    gguf_names(streamed, owned, f"{path}.{name}.gate_up_proj"),
                    gguf_names(streamed, owned, f"{path}.{name}.down_proj"),
                )
            elif getattr(parameters.get("weight"), "ndim", 0) == 2:
                names = gguf_names(streamed, owned, f"{path}.{name}.weight")
                if names:
                    self._undo.append(module.register_forward_pre_hook(self._listener(names)).remove)

    def detach(self) -> None:
        """Leave the block as it was."""
        while self._undo:
            self._undo.pop()()

    def recorded(self, names: tuple[str, ...]) -> Inputs:
        """What was recorded for these weights: of experts, in this round."""
        return self._records[names]

    def go_on(self, names: tuple[str, ...]) -> None:
        """Listen to the next experts of these weights, or, after the last ones, to these weights no more."""
        if not self._records[names].next_round():
            self._taken.add(names)
            del self._records[names]

    def inputs(self) -> list[Inputs]:
        """What was recorded, one for each distinct input."""
        self._last = None
        return list({id(record): record for record in self._records.values()}.values())

    def _listener(self, names: tuple[str, ...]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def listen(_: nn.Module, args: tuple[Any, ...]) -> None:
            if names in self._taken:
                return
            x = args[0].reshape(-1, args[0].shape[-1])
            if names not in self._records:
                if self._last is not None and _same(self._last[0], x):
                    self._sharing.add(names)
                    self._last[1].names += names
                    self._records[names] = self._last[1]
                else:
                    self._records[names] = self._empty(names, 1, x)
            if names not in self._sharing:
                self._last = (x, self._records[names])
                self._records[names].add(x)
                if self.pause:
                    self.pause(names)

        return listen

    def _empty(self, names: tuple[str, ...], experts: int, like: torch.Tensor) -> Inputs:
        made = Inputs.empty(names, experts, like, self.hessians, self.energy_cap, self.rough, self.holds_out)
        return made.in_rounds(self.most if self.pause else None)

    def _listen(self, names: tuple[str, ...], reached: Sequence[int], given: Callable[[int], torch.Tensor]) -> None:
        """Record what experts get, round by round.

        Args:
            reached: the experts.
            given: what the n-th of these gets, [tokens, columns].
        """
        while names and names not in self._taken:
            record = self._records[names]
            for number, expert in enumerate(reached):
                if record.wants(expert):
                    record.add(given(number), expert)
            if not self.pause:
                return
            self.pause(names)

    def _attach_experts(self, module: Any, gate_up: tuple[str, ...], down: tuple[str, ...]) -> None:
        """Let a module with all experts in one tensor compute them one by one, recording what each gets."""
        if not (gate_up or down):
            return
        unusual = [
            what for what in ("has_bias", "is_transposed", "has_post_expert_norm") if getattr(module, what, False)
        ]
        if unusual or not hasattr(module, "_apply_gate"):
            kind = type(module).__name__
            raise FewbitsError(f"Experts of the kind {kind} cannot be calibrated.", "Quantize without calibration.")
        experts = module.gate_up_proj.shape[0]

        def forward(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            # hidden [tokens, columns]; chosen, weights [tokens, experts per token]
            first, then = (() if names in self._taken else names for names in (gate_up, down))
            for names, like in ((first, hidden), (then, module.down_proj[:1, 0])):
                if names and names not in self._records:
                    self._records[names] = self._empty(names, experts, like)
            out = torch.zeros_like(hidden)
            by_expert = chosen.reshape(-1).argsort(stable=True)
            seen = torch.bincount(chosen.reshape(-1), minlength=experts).tolist()
            reached = [expert for expert, count in enumerate(seen) if count]
            places = [part for part in by_expert.split(seen) if len(part)]
            tokens = [part // chosen.shape[-1] for part in places]
            self._listen(first, reached, lambda number: hidden[tokens[number]])
            gated = []
            for expert, rows in zip(reached, tokens, strict=True):
                x = nn.functional.linear(hidden[rows], module.gate_up_proj[expert])
                gated.append(module._apply_gate(x))
            self._listen(then, reached, gated.__getitem__)
            for expert, part, rows, x in zip(reached, places, tokens, gated, strict=True):
                x = nn.functional.linear(x, module.down_proj[expert])
                out.index_add_(0, rows, (x * weights.reshape(-1)[part, None]).to(out.dtype))
            return out

        module.forward = forward
        self._undo.append(partial(delattr, module, "forward"))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors that are both alive are the same memory."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
