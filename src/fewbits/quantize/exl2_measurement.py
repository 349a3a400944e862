"""What each way of mixing bits costs each attention and MLP, as exllamav2's measuring pass finds it out.

Every mixture of a projection's menu is made once, with error feedback; every line of the menu, a mixture for each
projection, is then tried in its module, on what the unquantized model gives it. The result can be saved and serves for
every bit rate. Its file is exllamav2's measurement.json (0.3.2), either way; `loss` is our own addition.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from fewbits import arch
from fewbits.calibration.collect import ENERGY_CAP, BlockRecorder, Inputs, owners
from fewbits.calibration.resume import Activations
from fewbits.calibration.sensitivity import sensitivities
from fewbits.calibration.statistics import Sensitivities
from fewbits.calibration.texts import CalibrationText
from fewbits.checkpoint import Model
from fewbits.codecs.exl2_options import ATTENTION, MLP, for_inputs
from fewbits.codecs.row_groups import RowGroups
from fewbits.errors import FewbitsError
from fewbits.formats.atomic import AtomicFile
from fewbits.forward.streamed import Progress, Stream, StreamedModel, torch_threads
from fewbits.layouts.exl2 import EXL2
from fewbits.plan.budget import Alternative, Option
from fewbits.plan.schema import first_problem
from fewbits.quantize.blockwise import known_of, rough_products
from fewbits.quantize.losses import some_rows
from fewbits.quantize.matrices import quantize_matrix

WINDOWS = 4
"""Windows that every line of the menu is tried on."""
LEAST_ERROR = 1e-6
MENUS = {
    "self_attn": (("q_proj", "k_proj", "v_proj", "o_proj"), ATTENTION),
    "mlp": (("gate_proj", "up_proj", "down_proj"), MLP),
}
"""By the module's name: its projections, the last one giving its output, and the menu."""


class _Loose(BaseModel):
    # exllamav2's files hold more than is needed
    model_config = ConfigDict(extra="ignore", frozen=True)


class Mixed(_Loose):
    """`QParams` of exllamav2: bits, their shares of the rows, and the group size for each of the bits."""

    group_size: dict[int, Annotated[int, Field(ge=1, le=1 << 20)]]
    bits: Annotated[list[Annotated[int, Field(ge=2, le=8)]], Field(min_length=1, max_length=6)]
    bits_prop: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1, max_length=6)]
    scale_bits: int = 4

    def type(self) -> RowGroups:
        return RowGroups(tuple((b, self.group_size[b], p) for b, p in zip(self.bits, self.bits_prop, strict=True)))

    @staticmethod
    def of(kind: RowGroups) -> Mixed:
        bits, sizes, shares = zip(*kind.parts, strict=True)
        return Mixed(group_size=dict(zip(bits, sizes, strict=True)), bits=list(bits), bits_prop=list(shares))


class Line(_Loose):
    """A mixture for each projection of a module, and what was measured of it.

    Attributes:
        accuracy: 1 less the relative error of the module's output, residual included: the mean over windows.
        total_bits: of all projections.
        loss: estimate of the KL divergence in nats a token that it costs, from sensitivities; None in exllamav2's.
    """

    accuracy: Annotated[float, Field(allow_inf_nan=False, le=1)]
    total_bits: Annotated[int, Field(ge=1)]
    loss: Annotated[float, Field(allow_inf_nan=False, ge=0)] | None = None
    q_proj: Mixed | None = None
    k_proj: Mixed | None = None
    v_proj: Mixed | None = None
    o_proj: Mixed | None = None
    gate_proj: Mixed | None = None
    up_proj: Mixed | None = None
    down_proj: Mixed | None = None

    @property
    def error(self) -> float:
        return max(LEAST_ERROR, 1 - self.accuracy)

    def types(self) -> dict[str, RowGroups]:
        """By projection."""
        names = [name for projections, _ in MENUS.values() for name in projections]
        return {name: mixed.type() for name in names if (mixed := getattr(self, name)) is not None}


class Measurement(_Loose):
    """The lines of every module, by its name (`model.layers.0.self_attn`)."""

    measurement: dict[str, Annotated[list[Line], Field(min_length=1)]]
    last_module_idx: int = 0

    @staticmethod
    def load(path: Path) -> Measurement:
        """Read a measurement.json, ours or exllamav2's.

        Raises:
            FewbitsError: it cannot be read or says what cannot be.
        """
        try:
            return Measurement.model_validate_json(path.read_bytes())
        except OSError as error:
            raise FewbitsError(f"{path}: {error.strerror or error}.", "Name a measurement.json.") from None
        except ValidationError as error:
            raise FewbitsError(f"{path}: {first_problem(error)}.", "Measure anew, to another file.") from None

    def to_json(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json", exclude_none=True), indent=1) + "\n").encode()

    def save(self, path: Path) -> None:
        with AtomicFile(path, overwrite=True) as file:
            file.write(self.to_json())


@dataclass(frozen=True)
class _Module:
    """An attention or MLP of a block.

    Attributes:
        name: as in the file.
        weights: stored names by projection.
    """

    name: str
    weights: dict[str, str]
    menu: Sequence[tuple[RowGroups, ...]]


def modules_of(model: Model) -> list[_Module]:
    """The modules that are measured, two for each block.

    Raises:
        FewbitsError: a model of another build than exllamav2's menu is for.
    """
    linears = arch.decoder_linears(model.config, {name: model.shape(name) for name in model.names})
    found: dict[tuple[int, str], dict[str, str]] = {}
    for linear in linears:
        parent, _, projection = linear.module.rpartition(".")
        if parent not in MENUS or projection not in MENUS[parent][0]:
            raise FewbitsError(
                f"{model.path}: {linear.weight}: exl2 knows q, k, v, o, gate, up and down projections only.",
                "Take another target, e.g. exl3:4.0 or gptq:w4g128.",
            )
        found.setdefault((linear.block, parent), {})[projection] = linear.weight
    out = []
    for (_, parent), weights in found.items():
        projections, menu = MENUS[parent]
        name = next(iter(weights.values())).removesuffix(".weight").rpartition(".")[0]
        places = [number for number, projection in enumerate(projections) if projection in weights]
        chosen = tuple(tuple(line[place] for place in places) for line in menu)
        named = {projections[place]: weights[projections[place]] for place in places}
        out.append(_Module(name, named, for_inputs(chosen, tuple(model.shape(weight)[1] for weight in named.values()))))
    return out


def measure_lines(
    model: Model,
    text: CalibrationText,
    threads: int,
    device: str = "cpu",
    progress: Progress | None = None,
    folder: Path | None = None,
) -> Measurement:
    """Try every line of the menu in every module.

    Args:
        folder: keeps the state that an interrupted run goes on from.

    Raises:
        FewbitsError: as for `modules_of` and `StreamedModel`; a weight is NaN or infinite.
    """
    modules = modules_of(model)
    with torch_threads(threads), ThreadPoolExecutor(threads, "measure") as pool:
        known = sensitivities(model, text, progress=progress)
        return _Measuring(model, modules, known, text, pool, device).run(progress, folder)


class _Measuring:
    """The parts of one run."""

    def __init__(
        self,
        model: Model,
        modules: Sequence[_Module],
        known: Sensitivities,
        text: CalibrationText,
        pool: ThreadPoolExecutor,
        device: str,
    ) -> None:
        self.modules, self.pool, self.device = modules, pool, device
        owned = owners(model)
        self.columns = {
            weight: sum(float(one.columns.sum()) for one in known.get(owned[weight][0], []))
            for module in modules
            for weight in module.weights.values()
        }
        self.streamed = StreamedModel(model)
        self.stream = self.streamed.enter(text.inputs)
        self.rough = rough_products(device)

    def run(self, progress: Progress | None, folder: Path | None) -> Measurement:
        lines: dict[str, list[Line]] = {}
        state = Activations(folder) if folder else None
        first = state.load(self.stream.hidden)[0] if state else 0
        if state and first:
            lines = Measurement.model_validate(state.found).measurement
        count = len(self.streamed.layers)
        every = {weight: [weight] for module in self.modules for weight in module.weights.values()}
        with torch.no_grad():
            for index in range(first, count):
                block = self.streamed.block(index).to(self.device)
                path = f"{self.streamed.block_path(index)}."
                here = [m for m in self.modules if all(w.startswith(path) for w in m.weights.values())]
                tested = self._tested()
                recorder = BlockRecorder(True, ENERGY_CAP, self.rough)
                recorder.attach(block, self.streamed.block_path(index), self.streamed, every)
                with torch.autocast(self.device, torch.bfloat16, enabled=self.rough):
                    self.streamed.run_block(index, block, self.stream, self.device)
                recorder.detach()
                inputs = {name: one for one in recorder.inputs() for name in one.names}
                parts = {module.name: block.get_submodule(module.name.removeprefix(path)) for module in here}
                with _watched(parts, tested) as calls:
                    for batch in tested.batches:
                        self.streamed.run_batch(index, block, tested, batch, self.device)
                for module in here:
                    lines[module.name] = self._lines(index, block, module, calls[module.name], inputs)
                if state and state.due():
                    found = Measurement(measurement=lines).model_dump(mode="json")
                    state.save(index + 1, self.stream.hidden, found=found)
                if progress:
                    progress(index + 1, count, "measured blocks")
        return Measurement(measurement=lines, last_module_idx=len(lines))

    def _tested(self) -> Stream:
        """Some windows in front of a block, as they are now."""
        every = self.stream.batches
        count = max(1, WINDOWS // every[0].stop)
        chosen = [every[place] for place in np.unique(np.linspace(0, len(every) - 1, count).astype(np.int64))]
        ends = np.cumsum([0, *(batch.stop - batch.start for batch in chosen)]).tolist()
        hidden = torch.cat([self.stream.hidden[batch] for batch in chosen])
        return Stream(hidden, [slice(*pair) for pair in pairwise(ends)], self.stream.calls)

    def _lines(
        self, index: int, block: nn.Module, module: _Module, calls: Sequence[_Call], inputs: Mapping[str, Inputs]
    ) -> list[Line]:
        views = self.streamed.weights_of(index, block)
        plain = {name: views[name].clone() for name in module.weights.values()}
        made = {
            name: self._made(name, plain[name], inputs[name], dict.fromkeys(line[place] for line in module.menu))
            for place, name in enumerate(module.weights.values())
        }
        part = block.get_submodule(module.name.removeprefix(f"{self.streamed.block_path(index)}."))
        lines = []
        for line in module.menu:
            chosen = dict(zip(module.weights, line, strict=True))
            found = {projection: made[module.weights[projection]][kind] for projection, kind in chosen.items()}
            for projection, name in module.weights.items():
                views[name].copy_(found[projection].weights)
            errors = [error for call in calls for error in call.errors(part)]
            lines.append(
                Line(
                    accuracy=1 - max(LEAST_ERROR, float(np.mean(errors))),
                    total_bits=sum(one.nbytes for one in found.values()) * 8,
                    loss=sum(one.loss for one in found.values()),
                    **{projection: Mixed.of(kind) for projection, kind in chosen.items()},
                )
            )
        for name, weights in plain.items():
            views[name].copy_(weights)
        return lines

    def _made(
        self, name: str, weights: torch.Tensor, inputs: Inputs, kinds: Mapping[RowGroups, object]
    ) -> dict[RowGroups, _Made]:
        """A weight in each of these types."""
        known = known_of(inputs, 0, {"gptq"}, device=self.device)
        assert known.hessian is not None
        hessian = torch.from_numpy(known.hessian)
        scale = 0.5 * self.columns[name] / max(float(hessian.trace()), 1e-30)
        rows = torch.from_numpy(some_rows(len(weights)))
        matrix = np.ascontiguousarray(weights.cpu().numpy())
        out = {}
        for kind in kinds:
            layout = EXL2(kind)
            arrays, decoded = quantize_matrix(matrix, layout, "gptq", known, self.pool)
            error = torch.from_numpy(decoded)[rows] - weights.cpu()[rows]
            loss = scale * float((error @ hessian * error).sum()) / len(rows)
            nbytes = sum(array.nbytes for array in arrays.values())
            out[kind] = _Made(torch.from_numpy(decoded).half(), nbytes, max(loss, 0.0))
        return out


@dataclass(frozen=True)
class _Made:
    """A weight in some type, decoded to float16, which is what the engine decodes to."""

    weights: torch.Tensor
    nbytes: int
    loss: float


@dataclass(frozen=True)
class _Call:
    """A module's forward pass on some windows, to be repeated with other weights.

    Attributes:
        before: what its output was added to.
        after: the sum.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    before: torch.Tensor
    after: torch.Tensor

    def errors(self, module: nn.Module) -> list[float]:
        """Of each window, relative to what it was with the unquantized weights."""
        now = self.before + _first(module(*self.args, **self.kwargs))
        return [float((new - old).norm() / old.norm()) for new, old in zip(now, self.after, strict=True)]


def _first(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]


@contextmanager
def _watched(modules: Mapping[str, nn.Module], stream: Stream) -> Iterator[dict[str, list[_Call]]]:
    """The forward passes of a block's modules, which add to the windows one after the other."""
    calls: dict[str, list[_Call]] = {name: [] for name in modules}
    # run_batch puts its result in place of what it was given
    given = [stream.hidden[batch].clone() for batch in stream.batches]

    def listener(name: str) -> Callable[..., None]:
        def listen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            earlier = [of[len(calls[name])].after for other, of in calls.items() if len(of) > len(calls[name])]
            before = earlier[-1] if earlier else given[len(calls[name])].to(_first(out).device)
            calls[name].append(_Call(args, kwargs, before, before + _first(out)))

        return listen

    handles = [module.register_forward_hook(listener(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def alternatives(measured: Measurement, model: Model) -> list[list[Alternative]]:
    """What each module could become.

    What is minimized is the estimated loss; of exllamav2's own files, which know none, the sum of squared errors.

    Raises:
        FewbitsError: the measurement is of another model.
    """
    estimated = all(line.loss is not None for lines in measured.measurement.values() for line in lines)
    out = []
    for module in modules_of(model):
        lines = measured.measurement.get(module.name)
        if lines is None or any(line.types().keys() != module.weights.keys() for line in lines):
            raise FewbitsError(
                f"{module.name}: the measurement does not know it.", "It is of another model: measure anew."
            )
        out.append([_alternative(line, module, estimated, model) for line in lines])
    return out


def _alternative(line: Line, module: _Module, estimated: bool, model: Model) -> Alternative:
    layouts = {module.weights[projection]: EXL2(kind) for projection, kind in line.types().items()}
    shapes = {name: model.shape(name) for name in layouts}
    nbytes = sum(layout.type.nbytes((shapes[name][0], shapes[name][1])) for name, layout in layouts.items())
    loss = line.loss if estimated and line.loss is not None else line.error**2
    return Alternative(Option(", ".join(layout.type.name for layout in layouts.values()), nbytes, loss), layouts)
