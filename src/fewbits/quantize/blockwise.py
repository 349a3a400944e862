"""Calibrated quantization, one decoder block after another: each is calibrated on what the quantized ones before it
give, and within it each set of linears that share an input on what the quantized sets before them give. Types that
have continuous parts are then tuned on the block's output (`tuning`).

All windows go through a block side by side: each stops in front of a set of linears until their common input is known
from all windows and the set is quantized, then goes on with the quantized weights. So every linear is computed once.
In memory: one block, the Hessian of one input, and the windows' activations at one place of the block. Where these take
too much, only some windows wait there; the others begin the block anew for each set, with the same results. Experts
have a Hessian each: where all of a set take too much, some are summed and their experts quantized at a time, and the
windows stop there once for each such round.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from greenlet import greenlet
from torch import nn

from fewbits.calibration.collect import ENERGY_CAP, BlockRecorder, Inputs
from fewbits.errors import FewbitsError
from fewbits.forward.streamed import Progress, Stream, StreamedModel, torch_threads
from fewbits.layouts import Layout
from fewbits.limits import HESSIANS
from fewbits.methods import Known, factorize
from fewbits.methods import method as method_named
from fewbits.methods.base import DAMPING, Effort
from fewbits.methods.gptq import choose_damping
from fewbits.quantize.matrices import Arrays, packed
from fewbits.quantize.rescaling import Rescaling
from fewbits.quantize.tuning import FEWEST, TunableLayout, Tuning, epochs_of
from fewbits.spill import Spill
from fewbits.workers import Deferred, Pending, Workers, in_order

Floats = npt.NDArray[np.float32]
ROWS_AT_ONCE = 1024


def rough_products(device: str) -> bool:
    """Whether a device takes bfloat16 products at least twice as fast as others, as processors with instructions for
    them do: what calibration needs of products is far less than that."""
    return device == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _products(device: str, rough: bool) -> torch.autocast:
    # without its cache, which would go on with the weights as they were before they were quantized
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=rough, cache_enabled=False)


@contextmanager
def _enough_memory(device: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise FewbitsError(
            f"The memory of {device} does not hold a decoder block, or the head, and what is computed with it.",
            "Pass --device cpu, or take fewer --calibration-chunks.",
        ) from None


def _wait(names: tuple[str, ...]) -> None:
    """Hand control back to the run until the weights with these names are quantized."""
    greenlet.getcurrent().parent.switch(names)


@dataclass
class BlockwiseRun:
    """The parts of one run.

    Attributes:
        layouts: stored name of each weight to be quantized -> layout.
        planned: the same names -> method.
        put: takes a finished weight's stored name and arrays.
        put_plain: takes a block's other parameters, which rescaling may change.
        rough: whether products are taken in bfloat16; see `rough_products`.
        effort: how much time methods that gain by it may take.
        norms: type in which a block's norms are stored, for `put_plain`, where tuning may change them.
        parked: how many batches of windows may wait within a block; None: all.
        workers: who quantizes the matrices of one input side by side, where these are as many as the pool has threads;
            fewer are done faster here, each by all threads.
        hessians: most bytes of experts' Hessians that are summed at once.
        tuned: of each block that was to be tuned, what is left of the held-out windows' square error.
    """

    streamed: StreamedModel
    stream: Stream
    layouts: Mapping[str, Layout]
    planned: Mapping[str, str]
    put: Callable[[str, Arrays], None]
    put_plain: Callable[[str, Floats], None]
    pool: ThreadPoolExecutor
    rescaling: Rescaling | None = None
    device: str = "cpu"
    rough: bool = False
    effort: Effort = "default"
    norms: torch.dtype | None = None
    parked: int | None = None
    workers: Workers | None = None
    hessians: int = HESSIANS
    without_data: list[str] = field(default_factory=list)
    tuned: list[float] = field(default_factory=list)
    _waiting: dict[str, Arrays] | None = None
    _work: _Work | None = None

    def run(self, first: int, done: Callable[[int], None], progress: Progress | None) -> None:
        """Quantize the blocks from `first` on.

        Args:
            done: called with the number of finished blocks, the windows having passed them, after each.

        Raises:
            FewbitsError: names the weight that cannot be quantized.
        """
        count = len(self.streamed.layers)
        # a block of these takes minutes: told by the weight
        self._work = _Work.of(self, first, progress) if progress and "whole" in hessians_of(self.methods) else None
        with torch.no_grad(), _products(self.device, self.rough), _enough_memory(self.device):
            for index in range(first, count):
                block = self.streamed.block(index).to(self.device)
                self._block(index, block)
                del block
                done(index + 1)
                if progress and self._work is None:
                    progress(index + 1, count, "decoder blocks")

    def _block(self, index: int, block: nn.Module) -> None:
        """Quantize a block and take the windows through it."""
        views = self.streamed.weights_of(index, block)
        if self.rescaling:
            with _products(self.device, False):
                self.rescaling(block, index, partial(self._watch, index, block))
        stages = self._stages(index, block)
        tuning = self._tuning(index, block)
        recorder = BlockRecorder(self.wants_hessians, ENERGY_CAP, self.rough, _wait, self.holds_out, self.hessians)
        # the first weight of each set listens for all of them
        self._attach(recorder, index, block, {names[0]: names for names in stages})
        waiting: dict[int, greenlet] = {}
        while names := self._pass(index, block, waiting):
            self._quantize(recorder.recorded(names), views)
            recorder.go_on(names)
        recorder.detach()
        if tuning:
            self._tune(tuning, views)
        if self.rescaling or self.norms is not None:
            self._put_plain(views)

    def _pass(self, index: int, block: nn.Module, waiting: dict[int, greenlet]) -> tuple[str, ...] | None:
        """Take every batch to the next set of linears that are not quantized, whose names this gives, or to the end.

        Args:
            waiting: the batches that wait in the block, by number; changed. The others begin anew.
        """
        reached = set()
        for number, batch in enumerate(self.stream.batches):
            run = waiting.pop(number, None) or greenlet(
                partial(self.streamed.run_batch, index, block, self.stream, batch, self.device)
            )
            reached.add(run.switch())
            if run.dead:
                continue
            if self.parked is None or number < self.parked:
                waiting[number] = run
            else:
                run.throw()
        if len(reached) != 1:
            raise FewbitsError(f"{self.streamed.block_path(index)}: windows go different ways through this block.")
        (names,) = reached
        return names

    def _put_plain(self, views: Mapping[str, torch.Tensor]) -> None:
        for name, values in views.items():
            if name not in self.planned:
                self.put_plain(name, values.cpu().numpy())

    def _tuning(self, index: int, block: nn.Module) -> Tuning | None:
        """For a block some of whose weights can be tuned, once quantized: these wait to be put until then."""
        names = self.streamed.weights_of(index, block)
        if not epochs_of((self.layouts.get(name) for name in names), self.effort):
            return None
        self._waiting = {}
        return Tuning(self.streamed, self.stream, index, block, self.device, self.norms)

    def _tune(self, tuning: Tuning, views: Mapping[str, torch.Tensor]) -> None:
        """Tune a quantized block, put its weights, and take the windows through it anew where that has changed it."""
        waiting, self._waiting = self._waiting or {}, None
        layouts = {name: self.layouts[name] for name in waiting}
        if self._work:
            self._work.tell(f"tuning decoder block {tuning.index + 1}")
        tunable = {name: layout for name, layout in layouts.items() if isinstance(layout, TunableLayout)}
        found = tuning(
            {name: layout.coded(waiting[name]) for name, layout in tunable.items()},
            epochs_of(tunable.values(), self.effort),
        )
        self.tuned.append(found.after / found.before if found else 1.0)
        if found:
            for name, coded in found.coded.items():
                waiting[name] = layouts[name].pack(coded)
                views[name].copy_(torch.from_numpy(self._decoded(name, waiting[name], views[name])))
            tuning.apply(found.plain)
        for name, arrays in waiting.items():
            self.put(name, arrays)
            if self._work:
                self._work.advance(name)

    @property
    def notes(self) -> list[str]:
        """What became of it, for those who read a report; of blocks that an interrupted run has done, nothing."""
        notes = []
        if self.without_data:
            many, first = len(self.without_data), self.without_data[0]
            notes.append(f"{many} matrices of experts saw no calibration text and are only searched: {first}, ...")
        better = [left for left in self.tuned if left < 1]
        if self.tuned and len(self.stream.batches) < FEWEST:
            notes.append("nothing is tuned: the text is too short for some of it to be held out; take more of it")
        elif self.tuned:
            mean = sum(self.tuned) / len(self.tuned)
            notes.append(
                f"tuning makes {len(better)} of {len(self.tuned)} decoder blocks better on windows held out; "
                f"{mean:.1%} of their square error are left"
            )
        return notes

    @property
    def wants_hessians(self) -> bool:
        return bool(hessians_of(self.methods))

    @property
    def holds_out(self) -> bool:
        return "factor" in hessians_of(self.methods)

    @property
    def methods(self) -> set[str]:
        return set(self.planned.values())

    def _watch(self, index: int, block: nn.Module) -> None:
        assert self.rescaling is not None
        with _products(self.device, self.rough):
            self.streamed.watch_block(index, block, self.stream, self.device, self.rescaling.batches)

    def _stages(self, index: int, block: nn.Module) -> list[list[str]]:
        """The planned weights of a block, those with one input together, in the order in which they are used."""
        recorder = BlockRecorder()
        self._attach(recorder, index, block, {name: [name] for name in self.planned})
        self.streamed.watch_block(index, block, self.stream, self.device, batches=1)
        recorder.detach()
        return [record.names for record in recorder.inputs()]

    def _attach(self, recorder: BlockRecorder, index: int, block: nn.Module, names: Mapping[str, list[str]]) -> None:
        recorder.attach(block, self.streamed.block_path(index), self.streamed, names)

    def _quantize(self, inputs: Inputs, views: Mapping[str, torch.Tensor]) -> None:
        """Quantize the weights that share an input, in the block, too; of experts those of this round."""
        count = len(inputs.names) * len(inputs.counts)
        workers = self.workers if self.workers and self.device == "cpu" and count >= self.pool._max_workers else None
        tasks = (task for expert in inputs.at_once for task in self._tasks(inputs, expert, views, workers))
        for name, arrays in in_order(tasks, workers.ahead if workers else 1):
            self._keep(name, arrays)
            views[name].copy_(torch.from_numpy(self._decoded(name, arrays, views[name])))
            self.streamed.spill.forget()

    def _tasks(
        self, inputs: Inputs, expert: int, views: Mapping[str, torch.Tensor], workers: Workers | None
    ) -> Iterator[tuple[str, Callable[[], Pending[Arrays]]]]:
        """The weights of one expert, and what hands each out."""
        names = inputs.of_expert(expert)
        # engines fuse what has the same input
        amax = max(self._amax(views[name]) for name in names)
        known = self._known(inputs, expert)
        known = replace(known, amax=amax)
        job = workers.job(StagePacker(known, self.rough)) if workers else None
        for name in names:
            weights = np.ascontiguousarray(views[name].cpu().numpy())
            if not inputs.counts[expert]:
                self.without_data.append(name)
            if job:
                yield name, partial(job.submit, name, name, weights, self.layouts[name], self.planned[name])
            else:
                yield name, partial(Deferred, partial(self._make, name, weights, known))

    def _amax(self, weights: torch.Tensor) -> float:
        low, high = weights.aminmax()
        self.streamed.spill.forget()
        return max(float(high), -float(low))

    def _known(self, inputs: Inputs, expert: int) -> Known:
        """What is known of one input, which is forgotten."""
        known = known_of(inputs, expert, self.methods, self.streamed.spill, last=True, device=self.device)
        return replace(known, effort=self.effort)

    def _make(self, name: str, weights: Floats, known: Known) -> Arrays:
        """Quantize one weight."""
        return _packed(name, weights, self.layouts[name], self.planned[name], known, self.pool)

    def _decoded(self, name: str, arrays: Arrays, weights: torch.Tensor) -> Floats:
        """What engines decode."""
        return self.layouts[name].unpack(arrays, (weights.shape[0], weights.shape[1]))

    def _keep(self, name: str, arrays: Arrays) -> None:
        if self._waiting is None:
            self.put(name, arrays)
        else:
            self._waiting[name] = arrays
        if self._work:
            self._work.advance(name)

    def head(self, name: str, weights: Floats) -> None:
        """Quantize the head, the windows having passed all blocks; they are normed in place."""
        self.streamed.norm(self.stream)
        options = (self.wants_hessians, ENERGY_CAP, self.rough, self.holds_out)
        inputs = Inputs.empty((name,), 1, self.stream.hidden[:1].to(self.device), *options)
        with _enough_memory(self.device):
            for batch in self.stream.batches:
                inputs.add(self.stream.hidden[batch].flatten(0, 1).to(self.device))
            self._keep(name, self._make(name, weights, self._known(inputs, 0)))


@dataclass(frozen=True)
class StagePacker:
    """Quantizes the weights of one input, wherever it is, just as a run would."""

    known: Known
    rough: bool

    def __call__(self, name: str, weights: Floats, layout: Layout, method: str) -> Arrays:
        # a pool of one thread, for the same parts as with many: sums of other parts differ in the last bit
        with torch_threads(1), torch.no_grad(), _products("cpu", self.rough), ThreadPoolExecutor(1) as pool:
            return _packed(name, weights, layout, method, self.known, pool)


def _packed(name: str, weights: Floats, layout: Layout, method: str, known: Known, pool: ThreadPoolExecutor) -> Arrays:
    try:
        return packed(weights, layout, method, known, pool)
    except FewbitsError as error:
        raise FewbitsError(f"{name}: {error.message}", error.hint) from None


@dataclass
class _Work:
    """What there is to do, counted in weights; a weight that is tuned counts twice.

    Attributes:
        sizes: stored name -> what a step of this weight counts.
    """

    sizes: Mapping[str, int]
    total: int
    progress: Progress
    done: int = 0

    @staticmethod
    def of(run: BlockwiseRun, first: int, progress: Progress) -> _Work:
        """Of a run of which the blocks up to `first` are done."""
        blocks = [run.streamed.weights_of(index, layer) for index, layer in enumerate(run.streamed.layers)]
        sizes = [{name: view.numel() for name, view in views.items() if name in run.planned} for views in blocks]
        times = 2 if epochs_of(run.layouts.values(), run.effort) else 1
        total, before = (times * sum(sum(each.values()) for each in part) for part in (sizes, sizes[:first]))
        return _Work({name: size for each in sizes for name, size in each.items()}, total, progress, before)

    def advance(self, name: str) -> None:
        self.done += self.sizes.get(name, 0)
        self.tell(name.removesuffix(".weight"))

    def tell(self, what: str) -> None:
        self.progress(self.done, self.total, what)


def hessians_of(methods: Collection[str]) -> set[str]:
    """What these methods use of a Hessian."""
    found: set[str] = {method_named(name).hessian for name in methods}
    return found - {""}


def known_of(
    inputs: Inputs,
    expert: int,
    methods: Collection[str],
    spill: Spill | None = None,
    last: bool = False,
    device: str = "cpu",
) -> Known:
    """What the windows say of one input, in the forms that these methods use.

    An expert that no token reached is left to the searched scales.

    Args:
        spill: where large matrices go.
        last: whether this is asked once, so that `inputs` need not keep the expert's Hessian.
        device: where Hessians are factored, and whatever is done with them.
    """
    spill = spill or Spill()
    count, hessian = inputs.counts[expert], inputs.hessians[expert]
    if not count:
        # activations have a scale all the same: that of the other experts
        return Known(peak=max(inputs.peaks), device=device)
    importance = (inputs.sums[expert] / count).float().cpu().numpy()
    if hessian is None:
        return Known(importance, peak=inputs.peaks[expert], device=device)
    held, held_count, damping = inputs.held[expert], inputs.held_counts[expert], None
    if last:
        inputs.held[expert] = None
    if held is not None and held_count >= len(held):
        # before the mean is taken: this needs most memory
        seen = ((hessian - held) / (count - held_count)).cpu().numpy()
        held = held.div_(held_count) if last else held / held_count
        damping = choose_damping(seen, held.cpu().numpy(), spill, device)
        del seen
    del held
    mean = _mean(hessian, count, spill)
    # the capped diagonal is what the feedback minimizes, so the scales are searched for the same
    capped = np.ascontiguousarray(mean.diagonal())
    known = Known(capped, hessian=mean, peak=inputs.peaks[expert], damping=damping, device=device)
    if count < len(mean):
        # too little for feedback of any kind
        return replace(known, hessian=None) if "whole" in hessians_of(methods) else known
    if last:
        del hessian
        inputs.hessians[expert] = None
    if "factor" not in hessians_of(methods):
        return known
    return replace(known, factor=factorize(mean, known.damping or DAMPING, spill=spill, device=device))


def _mean(hessian: torch.Tensor, count: int, spill: Spill) -> Floats:
    mean = spill.empty(tuple(hessian.shape))
    for rows in range(0, len(mean), ROWS_AT_ONCE):
        mean[rows : rows + ROWS_AT_ONCE] = (hessian[rows : rows + ROWS_AT_ONCE] / count).cpu().numpy()
        spill.forget()
    return mean
