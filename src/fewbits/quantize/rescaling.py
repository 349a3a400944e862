"""What AWQ, SmoothQuant and AQLM do before the weights of a decoder block are quantized: channels rescaled wherever the
family allows it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from fewbits import arch
from fewbits.calibration.collect import BlockRecorder, Inputs
from fewbits.codecs.storage import StorageType
from fewbits.forward.streamed import StreamedModel
from fewbits.methods.awq import Reader, choose_scales
from fewbits.methods.channel_scales import Scales, evened, group_of, round_trip_of
from fewbits.methods.smoothquant import TOKENS, SmoothReader, smooth
from fewbits.quantize.folding import Place, places

BATCHES = 6
"""For AWQ's scales, of 2048 tokens each: one of some ten ratios is chosen by an error over thousands of columns, and
all windows would take as long as the quantizing."""
PER_BATCH = 64
"""Tokens of a batch that are kept as samples: of many batches, so that they are of many texts."""


Way = Literal["awq", "smoothquant", "even"]
WAYS: dict[str, Way] = {"awq": "awq", "awq+gptq": "awq", "smoothquant": "smoothquant", "aqlm": "even"}
"""By method."""


@dataclass
class _Sampled(Inputs):
    """Also the largest input of each column, and some inputs themselves.

    Attributes:
        tops: float32 [experts, columns].
        samples: of each expert, float32 [tokens, columns] each.
    """

    tops: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    samples: list[list[torch.Tensor]] = field(default_factory=list)

    def add(self, x: torch.Tensor, expert: int = 0) -> None:
        super().add(x, expert)
        if not len(x):
            return
        self.tops[expert] = torch.maximum(self.tops[expert], x.abs().amax(0).float())
        if sum(map(len, self.samples[expert])) < TOKENS:
            self.samples[expert].append(x[:: max(1, len(x) // PER_BATCH)].float())


class _SampleRecorder(BlockRecorder):
    def _empty(self, names: tuple[str, ...], experts: int, like: torch.Tensor) -> Inputs:
        plain = super()._empty(names, experts, like)
        tops = torch.zeros(plain.sums.shape, device=like.device)
        return _Sampled(**vars(plain), tops=tops, samples=[[] for _ in range(experts)])


@dataclass
class Rescaling:
    """A block's step; called with the block, its index and what runs the calibration windows through it.

    Attributes:
        kinds: stored name -> storage type of the weights that will be quantized.
        way: whose scales; `even` makes columns equally large, whatever the inputs.
        dtype: in which norms will be stored: scales are such that this rounds nothing. None: float32.
        rough: as `BlockRecorder` has it.
        energy_cap: as `BlockRecorder` has it.
        found: block and source of each place -> the readers' error as a share of the error without scales.
    """

    streamed: StreamedModel
    kinds: Mapping[str, StorageType]
    way: Way
    dtype: torch.dtype | None = None
    rough: bool = False
    energy_cap: float | None = None
    found: dict[str, float] = field(default_factory=dict)

    @property
    def batches(self) -> int | None:
        """How many batches of windows the scales are chosen by; None: all, since largest values are rare."""
        return BATCHES if self.way == "awq" else None

    def __call__(self, block: nn.Module, index: int, run: Callable[[], None]) -> None:
        with torch.no_grad():
            views = self.streamed.weights_of(index, block)
            prefix = block_prefix(self.streamed.model.family, index, views)
            heads = self.streamed.config.num_attention_heads
            here = places(self.streamed.model.family, heads, prefix, views)
            if self.way == "even":
                for place in here:
                    place.fold(evened([*place.targets.values()], place.channel), self.dtype)
                return
            inputs = self._inputs(index, block, run, {name for place in here for name in place.targets})
            choose = self._awq if self.way == "awq" else self._smooth
            for place in here:
                scales = choose(place, inputs)
                if scales is not None:
                    place.fold(scales.values, self.dtype)
                    self.found[place.source] = scales.error

    def _inputs(
        self, index: int, block: nn.Module, run: Callable[[], None], names: Collection[str]
    ) -> dict[str, tuple[Inputs, int]]:
        """What is known of each planned weight's input: the record and the expert in it."""
        path = self.streamed.block_path(index)
        listened = {name: [name] for name in names if name in self.kinds}
        awq = self.way == "awq"
        recorder = (BlockRecorder if awq else _SampleRecorder)(awq, self.energy_cap, self.rough)
        recorder.attach(block, path, self.streamed, listened)
        try:
            run()
        finally:
            recorder.detach()
        return {
            re.sub(r"\bexperts\.0\.", f"experts.{expert}.", name): (record, expert)
            for record in recorder.inputs()
            for name in record.names
            for expert in range(len(record.counts))
            if record.counts[expert]
        }

    def _awq(self, place: Place, inputs: dict[str, tuple[Inputs, int]]) -> Scales | None:
        readers = []
        for name, weight in place.targets.items():
            record, expert = inputs.get(name, (None, 0))
            hessian = record.hessians[expert] if record else None
            if hessian is not None:
                readers.append(Reader(weight, hessian))
        if not readers:
            return None
        kind = self._coarsest(place)
        return choose_scales(readers, place.channel, group_of(kind), round_trip_of(kind))

    def _smooth(self, place: Place, inputs: dict[str, tuple[Inputs, int]]) -> Scales | None:
        readers = []
        for name, weight in place.targets.items():
            record, expert = inputs.get(name, (None, 0))
            if isinstance(record, _Sampled):
                readers.append(SmoothReader(weight, record.tops[expert], torch.cat(record.samples[expert])))
        return smooth(readers, place.channel, round_trip_of(self._coarsest(place))) if readers else None

    def _coarsest(self, place: Place) -> StorageType:
        """The type that a place's scales matter most to: what reads one source may have several."""
        planned = (name for name in place.targets if name in self.kinds)
        return min((self.kinds[name] for name in planned), key=lambda kind: kind.bits)


def block_prefix(family: arch.Family, index: int, names: Collection[str]) -> str:
    """What the stored names of a block's tensors begin with."""
    end = "." + family.block.split(".", 1)[1].format(i=index)
    first = next(iter(names))
    return first[: first.index(end) + len(end)]
