"""GGUF tensors with error feedback, one decoder block after another, as model directories are made: each block is
calibrated on what the quantized ones before it give.

The weights are quantized as the model's own directory names them; what they become is kept in a folder beside the
output, in the order of rows that GGUF wants, until the file is written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
from fewbits.errors import FewbitsError
from fewbits.formats.atomic import check_room
from fewbits.formats.gguf.source import ReadBytes
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
STATE = "activations"
"""Within the folder of a run: what it goes on from."""


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

    def file(self, folder: Path) -> Path:
        return folder / f"{self.tensor.name}.{self.part}"


def planned_blockwise(plan: Plan, model: Model) -> Plan:
    """The plan with error feedback wherever a tensor's type allows, in decoder blocks and the head."""
    linears = linears_of(model)
    able = {t.name for t in plan.tensors if t.method == "search" and feedback_span(codec(t.codec))}
    tensors = [t.model_copy(update={"method": "gptq"}) if t.name in able & linears else t for t in plan.tensors]
    notes = [*plan.notes, f"{len(able & linears)} tensors are rounded with error feedback, block by block"]
    return plan.model_copy(update={"tensors": tensors, "notes": notes})


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


def quantize_blockwise(
    plan: Plan,
    model: Model,
    text: CalibrationText,
    folder: Path,
    identity: str,
    threads: int | None = None,
    progress: Progress | None = None,
    effort: Effort = "default",
    limits: Limits | None = None,
    workers: Workers | None = None,
) -> dict[str, ReadBytes]:
    """Quantize the linears of the decoder blocks, and the head.

    Args:
        text: what calibrates the model.
        folder: keeps the results until the file is there; what an interrupted run has left is gone on from.
        identity: of plan, model, text and whatever else the result follows from.
        limits: how to keep within memory.
        workers: see `BlockwiseRun`.

    Returns:
        By GGUF name, what reads a tensor's bytes.

    Raises:
        FewbitsError: a weight cannot be quantized, the text does not fit the model, or the disk is full.
    """
    import torch  # takes a second, which calibration by statistics does without

    from fewbits.calibration.collect import ENERGY_CAP
    from fewbits.calibration.resume import WorkFolder
    from fewbits.forward.streamed import StreamedModel, torch_threads
    from fewbits.quantize.blockwise import BlockwiseRun, rough_products
    from fewbits.quantize.rescaling import Rescaling

    written, linears = _places(model)
    planned = {tensor.name: tensor for tensor in plan.tensors}
    packings: dict[str, Any] = {
        source: Rows(Blocks(codec(planned[place.tensor.name].codec))) for source, place in linears.items()
    }
    methods = {source: _method(planned[place.tensor.name]) for source, place in linears.items()}
    work = WorkFolder(_begin(folder, identity), identity)
    check_room(folder, sum(planned[name].nbytes for name in {place.tensor.name for place in written.values()}))
    limits, cores = limits or Limits(threads), threads or os.cpu_count() or 1
    with torch_threads(cores), torch.no_grad(), ThreadPoolExecutor(limits.threads or cores, "quantize") as pool:
        streamed = StreamedModel(model, spill=limits.spill)
        text.check(streamed.n_vocab, model.path)
        stream = streamed.enter(text.inputs)
        first, _ = work.load(stream.hidden)
        inside = [list(streamed.weights_of(index, layer)) for index, layer in enumerate(streamed.layers)]
        if not all(written[n].file(folder).exists() for names in inside[:first] for n in names if n in written):
            stream, first = streamed.enter(text.inputs), 0

        def put(name: str, arrays: Arrays) -> None:
            order = linears[name].tensor.row_order()
            _write(linears[name].file(folder), arrays[DATA] if order is None else arrays[DATA][order])

        def put_plain(name: str, values: npt.NDArray[np.float32]) -> None:
            tensor = written[name].tensor

            def read(_: str, rows: Any = None) -> npt.NDArray[np.float32]:
                return values if rows is None else values[rows]

            lines = tensor.read(read, 0, prod(tensor.shape[:-1]))
            stored = method("convert").quantize(np.ascontiguousarray(lines), codec(planned[tensor.name].codec))
            _write(written[name].file(folder), stored)

        def done(blocks: int) -> None:
            if blocks < len(inside):
                work.save_if_due(blocks, stream.hidden, {})

        rough = rough_products("cpu")
        rescaling = None
        if written is not linears:
            kinds = {source: packing.type for source, packing in packings.items()}
            rescaling = Rescaling(streamed, kinds, "awq", None, rough, ENERGY_CAP)
        run = BlockwiseRun(
            *(streamed, stream, packings, methods, put, put_plain, pool, rescaling, "cpu", rough),
            effort=effort,
            norms=torch.float32 if rescaling else None,
            parked=limits.parked,
            workers=workers,
        )
        run.run(first, done, progress)
        for source, place in linears.items():
            if role(place.tensor.name) == OUTPUT:
                run.head(source, np.ascontiguousarray(model.read(source), np.float32))
    return {place.tensor.name: partial(_read, folder, place.tensor) for place in written.values()}


def _method(tensor: PlannedTensor) -> str:
    """A matrix that comes from a block is converted, even to the type that it was stored in."""
    return "convert" if tensor.method == "copy" else tensor.method


def unfinished(folder: Path) -> str | None:
    """The identity of the run that has left this folder; None where there is none."""
    try:
        return (folder / STATE / "identity").read_text()
    except OSError:
        return None


def _begin(folder: Path, identity: str) -> Path:
    """Make the folder, or make sure that it is of an earlier run; returns the place of the run's state."""
    state = folder / STATE
    found = unfinished(folder)
    if found is None and folder.exists():
        raise FewbitsError(f"{folder}: it is in the way of what an unfinished run keeps.", "Move it.")
    if found != identity:
        shutil.rmtree(state, ignore_errors=True)
        state.mkdir(parents=True)
        (state / "identity").write_text(identity)
    return state


def _write(path: Path, data: npt.NDArray[np.uint8]) -> None:
    """Whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    try:
        with open(fresh, "wb") as file:
            file.write(data.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        raise FewbitsError(f"{fresh}: cannot be written ({error.strerror}).", "Make room on the disk.") from None


def _read(folder: Path, tensor: GGUFTensor, start: int, stop: int) -> npt.NDArray[np.uint8]:
    """Bytes of a tensor, whose parts are files of one size."""
    files = [Place(tensor, part).file(folder) for part in range(len(tensor.sources))]
    size = files[0].stat().st_size
    parts = []
    for part in range(start // size, -(-stop // size)):
        first, last = max(start - part * size, 0), min(stop - part * size, size)
        parts.append(np.fromfile(files[part], np.uint8, last - first, offset=first))
    return np.concatenate(parts)
