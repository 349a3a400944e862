"""GGUF tensors with error feedback, one decoder block after another, as model directories are made: each block is
calibrated on what the quantized ones before it give.

The weights are quantized as the model's own directory names them, and written into the file in the order of rows that
GGUF wants.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from fewbits import arch
from fewbits.arch.tensors import GGUFTensor
from fewbits.checkpoint import Model
from fewbits.codecs import codec
from fewbits.codecs.blocks import Blocks, BlocksCoded
from fewbits.formats.tensor_files import TensorFiles
from fewbits.limits import Limits
from fewbits.methods import method
from fewbits.methods.base import Effort
from fewbits.methods.gptq import feedback_span
from fewbits.plan import Plan, PlannedTensor
from fewbits.plan.tensors import OUTPUT, layer_of, role
from fewbits.quantize.importances import Progress

if TYPE_CHECKING:
    from fewbits.calibration.texts import CalibrationText
    from fewbits.workers import Workers

Arrays = Mapping[str, npt.NDArray[Any]]
DATA = ".weight"


@dataclass(frozen=True)
class Rows:
    """How a run keeps a matrix: its rows' bytes, as they are."""

    type: Blocks
    epochs: ClassVar[Mapping[Effort, int]] = {"fast": 0, "default": 0, "thorough": 3}
    """Of tuning, by effort: see `quantize.tuning`."""

    def pack(
        self, matrix: BlocksCoded, g_idx: npt.NDArray[np.integer] | None = None, input_peak: float | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        return {DATA: matrix.data}

    def unpack(self, arrays: Arrays, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
        return self.coded(arrays).decode()

    def coded(self, arrays: Arrays) -> BlocksCoded:
        return BlocksCoded(self.type, arrays[DATA])


@dataclass(frozen=True)
class Place:
    """Where a stored tensor stands in the file: as which part of which GGUF tensor."""

    tensor: GGUFTensor
    part: int

    @property
    def name(self) -> str:
        """What `spans_of` calls it."""
        return f"{self.tensor.name}.{self.part}"


def planned_blockwise(plan: Plan, model: Model, tokens: int) -> Plan:
    """The plan with error feedback wherever a tensor's type allows, in decoder blocks and the head, and text of so many
    tokens says enough: fewer than it has columns fit the text and not the model."""
    linears = linears_of(model)
    methods = {
        tensor.name: "gptq" if tokens >= tensor.shape[-1] else "search"
        for tensor in plan.tensors
        if tensor.name in linears and tensor.method in ("search", "gptq") and feedback_span(codec(tensor.codec))
    }
    tensors = [t.model_copy(update={"method": methods.get(t.name, t.method)}) for t in plan.tensors]
    fed = [*methods.values()].count("gptq")
    notes = [f"{fed} tensors are rounded with error feedback, block by block"]
    if fed < len(methods):
        notes.append(
            f"{len(methods) - fed} tensors have more columns than the text has tokens ({tokens}) and are "
            "only searched: take a longer text or more --calibration-chunks"
        )
    return plan.model_copy(update={"tensors": tensors, "notes": [*plan.notes, *notes]})


def linears_of(model: Model) -> set[str]:
    """The GGUF tensors whose codes are chosen with error feedback, where their types allow."""
    return {place.tensor.name for place in _places(model)[1].values()}


def _places(model: Model) -> tuple[dict[str, Place], dict[str, Place]]:
    """By stored name, all tensors in decoder blocks and the head, and those of them that are the weights of linear
    modules of their own; a head that is the embeddings, too, is none.

    Where a block has linears that are not, scales cannot move: then both are the same.
    """
    shapes = {name: model.shape(name) for name in model.names}
    every = {
        source: Place(tensor, part)
        for tensor in arch.gguf_tensors(model.config, shapes)
        if layer_of(tensor.name) >= 0 or role(tensor.name) == OUTPUT
        for part, source in enumerate(tensor.sources)
    }
    linears = arch.decoder_linears(model.config, shapes)
    plain = {linear.weight: every[linear.weight] for linear in linears if linear.plain}
    movable = len(plain) == len(linears)
    plain |= {source: place for source, place in every.items() if role(place.tensor.name) == OUTPUT}
    return (every if movable else plain), plain


@dataclass(frozen=True)
class GGUFBlockwise:
    """Quantizes the linears of the decoder blocks, and the head, while text runs through the model.

    Attributes:
        text: what calibrates the model.
        state: a folder for the activations that an interrupted run goes on from.
        limits: how to keep within memory.
        workers, device: see `BlockwiseRun`.
    """

    plan: Plan
    model: Model
    text: CalibrationText
    state: Path
    threads: int | None = None
    progress: Progress | None = None
    effort: Effort = "default"
    limits: Limits = field(default_factory=Limits)
    workers: Workers | None = None
    device: str = "cpu"

    @cached_property
    def parts(self) -> dict[str, int]:
        """By name of the tensors that are made: of how many parts they are put together."""
        return {place.tensor.name: len(place.tensor.sources) for place in _places(self.model)[0].values()}

    def run(self, files: TensorFiles) -> list[str]:
        """Write the tensors.

        Returns:
            Notes on what became of them.

        Raises:
            FewbitsError: a weight cannot be quantized, the text does not fit the model, or the disk is full.
        """
        import torch  # takes a second, which calibration by statistics does without

        from fewbits.calibration.collect import ENERGY_CAP
        from fewbits.calibration.resume import Activations
        from fewbits.forward.streamed import StreamedModel, torch_threads
        from fewbits.quantize.blockwise import BlockwiseRun, rough_products
        from fewbits.quantize.rescaling import Rescaling

        written, linears = _places(self.model)
        if all(files.has(place.name) for place in written.values()):
            return []
        planned = {tensor.name: tensor for tensor in self.plan.tensors}
        packings: dict[str, Any] = {
            source: Rows(Blocks(codec(planned[place.tensor.name].codec))) for source, place in linears.items()
        }
        methods = {source: _method(planned[place.tensor.name]) for source, place in linears.items()}
        limits, cores = self.limits, self.threads or os.cpu_count() or 1
        with torch_threads(cores), torch.no_grad(), ThreadPoolExecutor(limits.threads or cores, "quantize") as pool:
            streamed = StreamedModel(self.model, spill=limits.spill)
            self.text.check(streamed.n_vocab, self.model.path)
            stream = streamed.enter(self.text.inputs)
            state = Activations(self.state)
            first, _ = state.load(stream.hidden)
            inside = [list(streamed.weights_of(index, layer)) for index, layer in enumerate(streamed.layers)]
            if not all(files.has(written[n].name) for names in inside[:first] for n in names if n in written):
                stream, first = streamed.enter(self.text.inputs), 0

            def write(place: Place, data: npt.NDArray[np.uint8]) -> None:
                if not files.has(place.name):
                    files.put(place.name, [np.ascontiguousarray(data).reshape(-1).data])

            def put(name: str, arrays: Arrays) -> None:
                order = linears[name].tensor.row_order()
                write(linears[name], arrays[DATA] if order is None else arrays[DATA][order])

            def put_plain(name: str, values: npt.NDArray[np.float32]) -> None:
                tensor = written[name].tensor

                def read(_: str, rows: Any = None) -> npt.NDArray[np.float32]:
                    return values if rows is None else values[rows]

                lines = tensor.read(read, 0, prod(tensor.shape[:-1]))
                kind = codec(planned[tensor.name].codec)
                write(written[name], method("convert").quantize(np.ascontiguousarray(lines), kind))

            def done(blocks: int) -> None:
                if blocks < len(inside) and state.due():
                    files.flush()
                    state.save(blocks, stream.hidden)

            rough = rough_products(self.device)
            rescaling = None
            if written is not linears:
                kinds = {source: packing.type for source, packing in packings.items()}
                rescaling = Rescaling(streamed, kinds, "awq", None, rough, ENERGY_CAP)
            run = BlockwiseRun(
                *(streamed, stream, packings, methods, put, put_plain, pool, rescaling, self.device, rough),
                effort=self.effort,
                norms=torch.float32 if rescaling else None,
                parked=limits.parked,
                workers=self.workers,
                hessians=limits.hessians,
            )
            run.run(first, done, self.progress)
            for source, place in linears.items():
                if role(place.tensor.name) == OUTPUT:
                    run.head(source, np.ascontiguousarray(self.model.read(source), np.float32))
        return run.notes


def _method(tensor: PlannedTensor) -> str:
    """A matrix that comes from a block is converted, even to the type that it was stored in."""
    return "convert" if tensor.method == "copy" else tensor.method
