"""Making model directories: GPTQ, AWQ, bitsandbytes, compressed-tensors, HQQ and FP8 checkpoints."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fewbits import arch
from fewbits.calibration.texts import CalibrationText
from fewbits.checkpoint import Model, SafetensorsCheckpoint
from fewbits.codecs import codec
from fewbits.errors import FewbitsError, about
from fewbits.formats.directory.writer import MAX_SHARD_SIZE, DirectoryWriter, Entry, lay_out
from fewbits.formats.work import WorkFolder
from fewbits.layouts import Layout
from fewbits.limits import Limits
from fewbits.methods import Known
from fewbits.methods import method as method_named
from fewbits.methods.base import Effort
from fewbits.plan import Plan, PlannedFile, PlannedTensor
from fewbits.plan.directory import HEAD, Target, alike, follow, methods_for, plan_directory, siblings
from fewbits.quantize.execute import QuantizeReport, peak_memory
from fewbits.quantize.importances import Progress
from fewbits.quantize.matrices import Arrays, Floats, goes_by_rows, packed, packed_by_rows
from fewbits.quantize.memory_need import matrix_bytes
from fewbits.quantize.three_levels import three_levels_notes
from fewbits.version import __version__
from fewbits.workers import Pending, Threads, Workers

if TYPE_CHECKING:
    import torch

    from fewbits.forward.streamed import StreamedModel
    from fewbits.quantize.rescaling import Rescaling

COPIED_BYTES = 1 << 26
ENCODED_WEIGHTS = 1 << 23
WEIGHTS_AT_ONCE = 1 << 27
"""Weights that are worked on at once, where no single tensor has more: half a gigabyte as float32."""


@dataclass(frozen=True)
class DirectoryRequest:
    """What the user asked for.

    Attributes:
        keep: regular expressions of linears that stay as they are.
        max_shard_size: most bytes of one file.
        text: what to calibrate with, if the method wants it.
        edited: a saved plan whose types are to be taken.
        effort: how much time methods may take that gain by it.
    """

    target: Target
    keep: tuple[str, ...] = ()
    max_shard_size: int = MAX_SHARD_SIZE
    text: CalibrationText | None = None
    edited: Plan | None = None
    effort: Effort = "default"


def make_directory_plan(model: Model, request: DirectoryRequest) -> Plan:
    """Choose a type for every tensor and predict the weight files to the byte.

    An open target's linears all have the same bits here, until a budget is spent or an edited plan says otherwise.

    Raises:
        FewbitsError: see `plan_directory` and `follow`; or the text is too short for the method.
    """
    chosen = request.target
    stored = {name: (model.shape(name), model.dtype(name)) for name in model.names}
    with about(model.path):
        tensors, notes = plan_directory(model.config, stored, chosen, request.keep)
    plan = Plan(
        tool=f"fewbits {__version__}",
        target=chosen.name,
        format=chosen.layout.name,
        model=str(model.path),
        architecture=model.family.architecture,
        tensors=tensors,
        split_max_size=request.max_shard_size,
        notes=notes,
    )
    if request.edited is not None:
        sets = alike(model.config, linears_of(model), chosen.layout.fuses)
        with about(model.path):
            plan = follow(plan, request.edited, chosen, sets)
    if request.text is not None:
        _check_text(plan, request)
        longest = model.config.get("max_position_embeddings") or model.config.get("n_positions")
        if isinstance(longest, int) and longest < request.text.inputs.shape[1]:
            raise FewbitsError(
                f"{model.path}: the model was made for {longest} positions, calibration takes windows of "
                f"{request.text.inputs.shape[1]}.",
                "Choose --method search, which needs no text." if _has_search(chosen) else "Take a GGUF preset.",
            )
        request.text.check(int(model.config.get("vocab_size") or 2**31), model.path)
    lossy = sorted({t.source_dtype for t in quantized_tensors(plan)} - {"F32", "F16", "BF16", "F64"})
    notes = [*notes, *three_levels_notes(model, plan)]
    if lossy and chosen.method != "absmean":
        notes = [*notes, f"the source is already quantized ({', '.join(lossy)}): its loss adds to this one's"]
    return laid_out(plan.model_copy(update={"notes": notes}), request)


def laid_out(plan: Plan, request: DirectoryRequest) -> Plan:
    """The plan with its weight files."""
    shards = lay_out(entries_of(plan, request.target), request.max_shard_size)
    return plan.model_copy(update={"files": [PlannedFile(name=s.name, size=s.nbytes) for s in shards]})


def linears_of(model: Model) -> list[arch.DecoderLinear]:
    """The linears of a model's decoder blocks."""
    return arch.decoder_linears(model.config, {name: model.shape(name) for name in model.names})


def _check_text(plan: Plan, request: DirectoryRequest) -> None:
    """Error feedback with fewer tokens than columns fits the text and not the model."""
    assert request.text is not None
    tokens = request.text.inputs.size
    columns, name, method = max((t.shape[1], t.name, t.method) for t in quantized_tensors(plan))
    if any(method_named(t.method).feeds_back() for t in quantized_tensors(plan)) and tokens < columns:
        other = ", or choose --method search" if _has_search(request.target) else ""
        raise FewbitsError(
            f"The text has {tokens} tokens, {name} has {columns} columns: too few for {method}.",
            f"Take a longer text or more --calibration-chunks{other}.",
        )


def _has_search(chosen: Target) -> bool:
    """Whether a target can be made without text by searching scales."""
    return chosen.layout.activations != "static" and "search" in methods_for(chosen.layout)


def quantized_tensors(plan: Plan) -> list[PlannedTensor]:
    """The tensors that get a few-bit type."""
    return [tensor for tensor in plan.tensors if tensor.method not in ("copy", "convert")]


def block_linears(plan: Plan) -> list[PlannedTensor]:
    """Those of them that are linears of decoder blocks: what bits per weight are counted over."""
    return [tensor for tensor in quantized_tensors(plan) if tensor.reason != HEAD]


def entries_of(plan: Plan, target: Target) -> list[Entry]:
    """Every tensor that will be stored."""
    return [entry for tensor in plan.tensors for entry in stored_as(tensor, target)]


def stored_as(tensor: PlannedTensor, target: Target) -> list[Entry]:
    """What is stored of a planned tensor."""
    if tensor.method in ("copy", "convert"):
        return [Entry(tensor.name, tensor.codec, tensor.shape)]
    module = tensor.name.removesuffix(".weight")
    parts = target.layout_of(tensor.codec).parts((tensor.shape[0], tensor.shape[1]))
    return [Entry(module + suffix, part.dtype, part.shape, module) for suffix, part in parts.items()]


def execute_directory(
    plan: Plan,
    model: Model,
    request: DirectoryRequest,
    work: WorkFolder,
    files: Mapping[str, bytes],
    threads: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
    finish: Callable[[DirectoryWriter], Mapping[str, bytes]] | None = None,
    limits: Limits | None = None,
    workers: Workers | None = None,
) -> QuantizeReport:
    """Make the model directory of a plan.

    Args:
        work: of this run: its output is the directory, and it is gone on from what an interrupted run has left.
        files: what stands beside the weights, by name: config.json, the tokenizer's files, the model card.
        threads: None takes every core. Without calibration the bytes do not depend on it.
        progress: called with what is done, what there is to do and the part at hand.
        finish: gives further files once all weights are written.
        limits: how to keep within memory.
        workers: who quantizes matrices, instead of threads.

    Raises:
        FewbitsError: the output exists, the disk is full, a weight is NaN or infinite; nothing is left under the final
            name.
    """
    started = time.monotonic()
    limits = limits or Limits(threads)
    shards = lay_out(entries_of(plan, request.target), request.max_shard_size)
    notes = list(plan.notes)
    with (
        ThreadPoolExecutor(limits.threads or os.cpu_count() or 1, "quantize") as pool,
        DirectoryWriter(work, shards, files, overwrite, model.path) as writer,
    ):
        run = _Run(plan, model, request, writer, pool, workers or Threads(pool), progress, limits)
        try:
            if request.text is None:
                run.plain(lambda name: True)
                run.one_by_one()
            else:
                notes += run.blockwise(request.text, threads, device)
            added = finish(writer) if finish else {}
            for name, data in added.items():
                writer.add_file(name, data)
            result = writer.finish()
        finally:
            pool.shutdown(cancel_futures=True)
    names = [*(shard.name for shard in shards), *added]
    sizes = [PlannedFile(name=name, size=(result / name).stat().st_size) for name in names]
    report = QuantizeReport(
        model=str(model.path),
        target=plan.target,
        files=sizes,
        size=sum(file.size for file in sizes),
        n_weights=plan.n_weights,
        bits_per_weight=plan.bits_per_weight,
        n_fallbacks=0,
        notes=notes,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
    )
    work.publish({result: work.output}, report.model_dump(mode="json"))
    return report


@dataclass(frozen=True)
class MatrixPacker:
    """Quantizes a matrix without calibration, wherever it is.

    Attributes:
        fused: the weights that engines fuse, set by set.
    """

    model: Model
    target: Target
    fused: list[list[str]]

    def __call__(self, tensor: PlannedTensor) -> Arrays:
        """The arrays to be stored, by suffix.

        Raises:
            FewbitsError: a weight is NaN or infinite, or the layout cannot hold the result.
        """
        layout, shape = self.target.layout_of(tensor.codec), (tensor.shape[0], tensor.shape[1])
        try:
            if goes_by_rows(layout, tensor.method):
                return packed_by_rows(partial(self.weights, tensor), shape, layout, tensor.method)
            weights = self.weights(tensor)
            return packed(weights, layout, tensor.method, Known(amax=self._amax(tensor, weights, layout)))
        except FewbitsError as error:
            raise FewbitsError(f"{self.model.path}: {tensor.name}: {error.message}", error.hint) from None

    def weights(self, tensor: PlannedTensor, rows: slice | None = None) -> Floats:
        """A weight as it is, or some rows; a head that shares the embeddings' matrix has no tensor of its own."""
        name = tensor.name
        if tensor.reason == HEAD:
            name = arch.head_source(self.model.config, {name: self.model.shape(name) for name in self.model.names})
        return np.ascontiguousarray(self.model.read(name, rows), np.float32)

    def _amax(self, tensor: PlannedTensor, weights: Floats, layout: Layout) -> float | None:
        """Largest magnitude of a weight and those that engines fuse with it, for types with one global scale."""
        if not layout.type.shares_a_scale:
            return None
        others = next(names for names in self.fused if tensor.name in names)
        matrices = (weights if name == tensor.name else self.model.read(name) for name in others)
        return max(float(np.abs(matrix).max()) for matrix in matrices)


@dataclass
class _Run:
    """What the two ways of executing share."""

    plan: Plan
    model: Model
    request: DirectoryRequest
    writer: DirectoryWriter
    pool: ThreadPoolExecutor
    workers: Workers
    progress: Progress | None
    limits: Limits

    @cached_property
    def packer(self) -> MatrixPacker:
        return MatrixPacker(self.model, self.request.target, siblings(self.model.config, linears_of(self.model)))

    def plain(self, wanted: Callable[[str], bool]) -> None:
        """Write the tensors that stay as they are."""
        for tensor in self.plan.tensors:
            if tensor.method not in ("copy", "convert") or self.writer.has(tensor.name) or not wanted(tensor.name):
                continue
            self.writer.put_pieces(tensor.name, self._pieces(tensor))

    def _pieces(self, tensor: PlannedTensor) -> Iterator[npt.NDArray[np.uint8]]:
        if tensor.method == "copy" and isinstance(self.model.checkpoint, SafetensorsCheckpoint):
            size = self.model.checkpoint.info(tensor.name).nbytes
            for start in range(0, size, COPIED_BYTES):
                yield self.model.checkpoint.raw(tensor.name, start, start + COPIED_BYTES)
        else:
            step = max(1, ENCODED_WEIGHTS // max(1, prod(tensor.shape[1:])))
            for start in range(0, tensor.shape[0], step):
                yield encoded(tensor, self.model.read(tensor.name, slice(start, start + step)))

    def one_by_one(self) -> None:
        """Without calibration no weight depends on another: several at once, as many as fit into the budget."""
        todo = [tensor for tensor in quantized_tensors(self.plan) if not self._is_written(tensor)]
        total = sum(tensor.nbytes for tensor in self.plan.tensors)
        done = total - sum(tensor.nbytes for tensor in todo)
        packing = self.workers.job(self.packer)
        ahead: deque[tuple[PlannedTensor, Pending[Arrays]]] = deque()
        waiting = deque(todo)
        while waiting or ahead:
            if waiting and self._may_start(waiting[0], [tensor for tensor, _ in ahead]):
                tensor = waiting.popleft()
                ahead.append((tensor, packing.submit(tensor.name, tensor)))
                continue
            tensor, pending = ahead.popleft()
            self.put(tensor.name, pending.result())
            done += tensor.nbytes
            if self.progress:
                self.progress(done, total, tensor.name)

    def _may_start(self, tensor: PlannedTensor, ahead: list[PlannedTensor]) -> bool:
        """Of threads the weights of all matrices under way are here; of others only what they send back."""
        if self.workers.remote:
            return len(ahead) < self.workers.ahead
        if not ahead or self.limits.at_once is None:
            return not ahead or sum(other.n_weights for other in ahead) + tensor.n_weights <= WEIGHTS_AT_ONCE
        layout_of = self.request.target.layout_of
        taken = sum(matrix_bytes(other, layout_of(other.codec)) for other in [tensor, *ahead])
        return taken <= self.limits.at_once

    def _is_written(self, tensor: PlannedTensor) -> bool:
        return all(self.writer.has(entry.name) for entry in stored_as(tensor, self.request.target))

    def put(self, name: str, arrays: Arrays) -> None:
        """Write a quantized weight's tensors."""
        module = name.removesuffix(".weight")
        for suffix, array in arrays.items():
            if not self.writer.has(module + suffix):
                self.writer.put(module + suffix, array)

    def blockwise(self, text: CalibrationText, threads: int | None, device: str) -> list[str]:
        """Calibrated, block by block; returns notes."""
        import torch  # takes a second, which data-free targets do without

        from fewbits.calibration.resume import Activations
        from fewbits.forward.streamed import StreamedModel, torch_threads
        from fewbits.quantize.blockwise import BlockwiseRun, rough_products
        from fewbits.quantize.tuning import epochs_of

        todo = quantized_tensors(self.plan)
        planned = {tensor.name: tensor.method for tensor in todo}
        layouts = {tensor.name: self.request.target.layout_of(tensor.codec) for tensor in todo}
        by_name = {tensor.name: tensor for tensor in self.plan.tensors}
        with torch_threads(threads or os.cpu_count() or 1), torch.no_grad():
            streamed = StreamedModel(self.model, spill=self.limits.spill)
            text.check(streamed.n_vocab, self.model.path)
            rough = rough_products(device)
            rescaling = self._rescaling(streamed, layouts, rough)
            inside = [list(streamed.weights_of(index, layer)) for index, layer in enumerate(streamed.layers)]
            tunes = epochs_of(layouts.values(), self.request.effort) > 0
            norms = self._norms_dtype() if tunes else None
            moved = {name for names in inside for name in names} if rescaling or tunes else set()
            self.plain(lambda name: name not in moved)
            stream = streamed.enter(text.inputs)
            state = Activations(self.writer.work.path / "activations")
            first, _ = state.load(stream.hidden)
            target = self.request.target
            stored = [[entry.name for name in names for entry in stored_as(by_name[name], target)] for names in inside]
            if not all(self.writer.has(name) for names in stored[:first] for name in names):
                stream, first = streamed.enter(text.inputs), 0

            def put_plain(name: str, values: Floats) -> None:
                if not self.writer.has(name):
                    self.writer.put_pieces(name, [encoded(by_name[name], values)])

            def done(blocks: int) -> None:
                if blocks < len(inside) and state.due():
                    self.writer.tensors.flush()
                    state.save(blocks, stream.hidden)

            run = BlockwiseRun(
                *(streamed, stream, layouts, planned, self.put, put_plain, self.pool, rescaling, device, rough),
                *(self.request.effort, norms, self.limits.parked, self.workers if self.workers.remote else None),
                hessians=self.limits.hessians,
            )
            run.run(first, done, self.progress)
            head = next((tensor for tensor in todo if tensor.reason == HEAD), None)
            if head is not None and not self._is_written(head):
                run.head(head.name, self.packer.weights(head))
        return run.notes

    def _rescaling(self, streamed: StreamedModel, layouts: Mapping[str, Layout], rough: bool) -> Rescaling | None:
        """What a method does to a block beforehand, if it does anything."""
        from fewbits.calibration.collect import ENERGY_CAP
        from fewbits.quantize.rescaling import WAYS, Rescaling

        way = WAYS.get(self.request.target.method)
        if way is None:
            return None
        kinds = {name: layout.type for name, layout in layouts.items()}
        return Rescaling(streamed, kinds, way, self._norms_dtype(), rough, ENERGY_CAP)

    def _norms_dtype(self) -> torch.dtype:
        """In which norms are stored: the coarser of the two, where a model holds both."""
        import torch

        plain = {tensor.codec for tensor in self.plan.tensors if tensor.method in ("copy", "convert")}
        return torch.bfloat16 if "BF16" in plain else torch.float16


def encoded(tensor: PlannedTensor, values: Floats) -> npt.NDArray[np.uint8]:
    """An unquantized tensor's bytes.

    Raises:
        FewbitsError: a value does not fit its type.
    """
    data = codec(tensor.codec).encode(np.ascontiguousarray(values, np.float32).reshape(1, -1))
    if tensor.codec == "F16" and not np.isfinite(data.view(np.float16)).all():
        raise FewbitsError(
            f"{tensor.name}: it holds values beyond what float16 holds, or NaN.",
            "Choose a compressed-tensors target (ct:), which keeps bfloat16.",
        )
    return data
