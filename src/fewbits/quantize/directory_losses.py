"""What each type of an open target would cost each linear of a model directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fewbits import arch
from fewbits.calibration.statistics import Sensitivity
from fewbits.checkpoint import Model
from fewbits.codecs.trellis import Trellis
from fewbits.errors import FewbitsError
from fewbits.methods import Known, method
from fewbits.methods.ldlq import expected_errors
from fewbits.plan.directory import Target
from fewbits.quantize.directory import linears_of
from fewbits.quantize.importances import Progress
from fewbits.quantize.losses import Losses, Sample, Weighing, appraise, some_experts, some_rows, usual_cost
from fewbits.quantize.matrices import Floats

if TYPE_CHECKING:
    from fewbits.calibration.texts import CalibrationText


def guessed(model: Model, target: Target, types: Mapping[str, Sequence[str]], threads: int) -> Iterator[Losses]:
    """Losses by the linears' roles, one linear after another."""
    views = arch.gguf_tensors(model.config, {name: model.shape(name) for name in model.names})
    stands_for = {source: view for view in views for source in view.sources}
    n_layer = 1 + max(linear.block for linear in linears_of(model))
    for name, tried in types.items():
        experts = stands_for[name].sources
        chosen = [experts[index] for index in some_experts(len(experts))]

        def samples(name: str, experts: Sequence[str] = experts, chosen: Sequence[str] = chosen) -> Iterator[Sample]:
            if name in chosen:
                weights, _ = _rows(model, name, target, len(chosen))
                nats = usual_cost(stands_for[name].name, n_layer) / len(experts)
                weighing = [Weighing.relative(weights, None, nats)]
                yield Sample(weights, weighing, len(experts) / len(chosen), partial(_decoded, target, weights, Known()))

        yield appraise(samples, {name: tried}, threads)


def calibrated(
    model: Model,
    target: Target,
    types: Mapping[str, Sequence[str]],
    text: CalibrationText,
    threads: int,
    progress: Progress | None,
    folder: Path | None = None,
) -> Iterator[Losses]:
    """Losses by what text makes of the unquantized model, one decoder block after another.

    Args:
        folder: keeps the state that an interrupted run goes on from.

    Codes are chosen as they will be, with error feedback if that is the method, and their errors weighed with the
    Hessian of the inputs: coarse symmetric codes shrink weights, so that errors are not independent of each other,
    and a diagonal alone would make 2 bits look half as bad as they are.
    """
    import torch

    from fewbits.calibration.collect import ENERGY_CAP, BlockRecorder, owners
    from fewbits.calibration.resume import Activations
    from fewbits.calibration.sensitivity import sensitivities
    from fewbits.forward.streamed import StreamedModel, torch_threads
    from fewbits.quantize.blockwise import known_of, rough_products

    with torch_threads(threads):
        known = sensitivities(model, text, progress=progress)
    owned, rough = owners(model), rough_products("cpu")
    with torch_threads(threads), torch.no_grad():
        streamed = StreamedModel(model)
        stream = streamed.enter(text.inputs)
        state = Activations(folder) if folder else None
        first = state.load(stream.hidden)[0] if state else 0
        before: list[Losses] = state.found if state and first else []
        yield from before
        for index in range(first, len(streamed.layers)):
            block = streamed.block(index)
            recorder = BlockRecorder(True, ENERGY_CAP, rough)
            recorder.attach(block, streamed.block_path(index), streamed, {name: [name] for name in types})
            with torch.autocast("cpu", torch.bfloat16, enabled=rough):
                streamed.run_block(index, block, stream)
            recorder.detach()
            found: Losses = {}
            for inputs in recorder.inputs():
                chosen = some_experts(len(inputs.counts))
                for expert in range(len(inputs.counts)):
                    names = inputs.of_expert(expert)
                    if expert not in chosen:
                        found |= {name: dict.fromkeys(types[name], 0.0) for name in names}
                        continue
                    told = known_of(inputs, expert, {target.method})
                    share = len(inputs.counts) / len(chosen)
                    if isinstance(target.layout.type, Trellis):
                        for name in names:
                            found[name] = _foretold(
                                model, name, expert, known[owned[name][0]], target, types[name], told
                            )
                            found[name] = {to: share * loss for to, loss in found[name].items()}
                        continue

                    def samples(
                        name: str,
                        told: Known = told,
                        share: float = share,
                        expert: int = expert,
                        count: int = len(chosen),
                    ) -> Iterator[Sample]:
                        weights, rows = _rows(model, name, target, count)
                        weighing = [_by_hessian(one, expert, rows, told) for one in known[owned[name][0]]]
                        yield Sample(weights, weighing, share, partial(_decoded, target, weights, told))

                    found |= appraise(samples, {name: types[name] for name in names}, threads)
            before.append(found)
            if state and state.due():
                state.save(index + 1, stream.hidden, found=before)
            yield found


def _foretold(
    model: Model,
    name: str,
    expert: int,
    known: Sequence[Sensitivity],
    target: Target,
    types: Sequence[str],
    told: Known,
) -> dict[str, float]:
    """The losses of trellis codes, which need not be made: their errors follow from the bits alone."""
    weights = np.ascontiguousarray(model.read(name), np.float32)
    if told.hessian is None:
        raise FewbitsError(f"{name}: no text reaches it.", "Calibrate with more text.")
    columns = sum(float(one.columns[min(expert, len(one.columns) - 1)].sum()) for one in known)
    scale = 0.5 * columns / max(float(told.hessian.trace()), 1e-30) / len(weights)
    bits = {to: int(target.layout_of(to).type.bits) for to in types}
    errors = expected_errors(weights, told.hessian, bits.values())
    return {to: scale * float(errors[k].sum()) for to, k in bits.items()}


def _by_hessian(known: Sensitivity, expert: int, rows: npt.NDArray[np.int64], told: Known) -> Weighing:
    plain = Weighing.sensitive(known, expert, rows)
    if told.hessian is None:
        return plain
    scale = float(plain.columns.sum()) / max(float(told.hessian.trace()), 1e-30)
    return Weighing(plain.rows, plain.columns, told.hessian * np.float32(scale))


def _rows(model: Model, name: str, target: Target, matrices: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Rows that stand for a linear, where so many linears stand for the experts of a block, and their numbers."""
    whole = model.read(name)
    # groups that go along the outputs need all of them
    rows = np.arange(len(whole)) if target.layout.type.needs_all_rows else some_rows(len(whole), matrices)
    weights = np.ascontiguousarray(whole[rows], np.float32)
    if not np.isfinite(weights).all():
        raise FewbitsError(f"{model.path}: tensor {name!r} holds NaN or infinite weights.")
    return weights, rows


def _decoded(target: Target, weights: Floats, known: Known, to: str) -> Floats:
    return method(target.method).make(weights, target.layout_of(to).type, known).decode()
