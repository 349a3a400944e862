"""Model directories of a given size: each set of linears that engines fuse gets the bits with which the whole loses
least.

What counts as bits per weight are the quantized linears with everything that is stored of them: codes, scales, zero
points, indices. Embeddings, norms and the head stay as they are and are not counted; a size counts all of the
safetensors files.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fewbits import arch
from fewbits.calibration.statistics import Sensitivity
from fewbits.checkpoint import Model
from fewbits.errors import FewbitsError
from fewbits.layouts import Layout
from fewbits.memory import GPU, Hardware, memory
from fewbits.memory.hardware import USABLE
from fewbits.methods import Known, method
from fewbits.plan import Plan, PlannedTensor
from fewbits.plan.budget import Option, Spent, spend
from fewbits.plan.directory import Target, alike, in_layout
from fewbits.quantize.budget import Budget
from fewbits.quantize.directory import DirectoryRequest, laid_out, linears_of, quantized_tensors
from fewbits.quantize.importances import Progress
from fewbits.quantize.losses import Losses, Sample, Weighing, appraise, some_experts, some_rows, usual_cost
from fewbits.quantize.matrices import Floats

if TYPE_CHECKING:
    from fewbits.calibration.texts import CalibrationText

ENGINE_BITS = {"gptq": (4, 8), "ct": (4, 8)}
"""What vLLM runs of each ecosystem, whose memory is then reckoned with for `--fit`; else that of transformers."""


@dataclass(frozen=True)
class Mixture:
    """What a plan's linears have become, in the terms of a checkpoint's configuration.

    Attributes:
        layout: of most weights; its configuration names the modules with another.
        types: storage types, of most weights first.
        loader: what `formats.directory.snippets` calls the way to load it.
    """

    layout: Layout
    types: tuple[str, ...]

    @property
    def loader(self) -> str:
        # transformers' loader of GPTQ gives all modules the same bits
        mixed = len(self.types) > 1 and self.layout.name == "gptq"
        return "gptq-mixed" if mixed else self.layout.quant_method


def mixture_of(plan: Plan, model: Model, target: Target) -> Mixture:
    """What the linears of a plan have become."""
    types = {tensor.name: tensor.codec for tensor in quantized_tensors(plan)}
    sizes: Counter[str] = Counter()
    for tensor in quantized_tensors(plan):
        sizes[tensor.codec] += tensor.n_weights
    ordered = tuple(name for name, _ in sizes.most_common())
    others = tuple(
        (target.layout_of(types[names[0]]), tuple(name.removesuffix(".weight") for name in names))
        for names in (_sets(model, types) if len(ordered) > 1 else [])
        if types[names[0]] != ordered[0]
    )
    return Mixture(target.layout_of(ordered[0]).beside(others), ordered)


def _sets(model: Model, among: Mapping[str, object]) -> list[list[str]]:
    """The linears that engines keep in one type, of those that are quantized."""
    every = alike(model.config, linears_of(model))
    return [kept for names in every if (kept := [name for name in names if name in among])]


def as_size(budget: Budget, path: Path, target: Target) -> Budget:
    """The budget with what else an engine keeps in memory taken off; bits per weight stay as they are.

    Raises:
        FewbitsError: nothing is left for weights, or the model's needs are not known.
    """
    if budget.fit is None:
        return budget
    served = all(layout.type.bits in ENGINE_BITS.get(layout.name, ()) for layout in target.members)
    engine = "vllm" if served else "transformers"
    hardware = Hardware("", 1, "", 0, (GPU("the budget", "unknown", round(budget.fit / USABLE)),))
    family, _, spec = target.name.partition(":")
    alike = f"{family}:w{target.layout.type.bits}{spec}"
    needs = memory(path, target=alike, context=budget.context, kv=budget.kv, engine=engine, hardware=hardware)
    device = needs.device("GPU")
    assert device is not None
    rest = device.needed - device.weights
    if rest >= budget.fit:
        raise FewbitsError(
            f"{path}: KV cache, buffers and margin of {engine} alone take {rest} bytes at a context of "
            f"{needs.context}.",
            "Take a shorter --context, or another --kv.",
        )
    return Budget(size=budget.fit - rest, types=budget.types)


@dataclass(frozen=True)
class _Choice:
    """Linears that engines keep in one type, and the layouts that can hold them."""

    tensors: list[PlannedTensor]
    layouts: list[Layout]

    def nbytes(self, layout: Layout) -> int:
        shapes = ((tensor.shape[0], tensor.shape[1]) for tensor in self.tensors)
        return sum(part.nbytes for shape in shapes for part in layout.parts(shape).values())

    def options(self, losses: Losses) -> list[Option]:
        names = [(layout, layout.type.name) for layout in self.layouts]
        return [
            Option(name, self.nbytes(layout), sum(losses[tensor.name][name] for tensor in self.tensors))
            for layout, name in names
        ]


def _choices(plan: Plan, model: Model, target: Target) -> list[_Choice]:
    tensors = {tensor.name: tensor for tensor in quantized_tensors(plan)}
    sets = [[tensors[name] for name in names] for names in _sets(model, tensors)]
    # the target's usual layout can hold all, or there would be no plan
    return [_Choice(some, [one for one in target.members if _holds(one, some)]) for some in sets]


def _holds(layout: Layout, tensors: Sequence[PlannedTensor]) -> bool:
    try:
        for tensor in tensors:
            layout.check((tensor.shape[0], tensor.shape[1]))
    except FewbitsError:
        return False
    return True


def check_room(plan: Plan, model: Model, target: Target, budget: Budget) -> None:
    """Refuse a budget that the smallest mixture exceeds, before any text is run.

    Args:
        plan: as for `within_budget`.
        budget: a size or bits per weight.

    Raises:
        FewbitsError: it does; says what the smallest mixture takes.
    """
    choices = _choices(plan, model, target)
    least = sum(min(choice.nbytes(layout) for layout in choice.layouts) for choice in choices)
    n_weights, fixed = _n_weights(plan), _fixed(plan)
    if budget.bpw is not None and least * 8 > n_weights * budget.bpw:
        raise FewbitsError(
            f"{target.name}: the fewest bits a weight are {least * 8 / n_weights:.3f}, the budget has {budget.bpw}.",
            "Allow more, more --types, or a larger group.",
        )
    if budget.size is not None and fixed + least > budget.size:
        raise FewbitsError(
            f"{target.name}: the smallest mixture takes {fixed + least} bytes, {fixed} of them for embeddings, norms "
            f"and head, which stay as they are; the budget has {budget.size}.",
            "Allow more, more --types, or make a GGUF, which has few bits for embeddings, too.",
        )


def _n_weights(plan: Plan) -> int:
    return sum(tensor.n_weights for tensor in quantized_tensors(plan))


def _fixed(plan: Plan) -> int:
    """Bytes of the files that are not of quantized linears."""
    return plan.file_size - sum(tensor.nbytes for tensor in quantized_tensors(plan))


def within_budget(
    plan: Plan,
    model: Model,
    request: DirectoryRequest,
    budget: Budget,
    text: CalibrationText | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Choose the bits of every linear.

    Args:
        plan: of an open target, as `make_directory_plan` makes it.
        budget: a size or bits per weight.
        text: tells how much each linear matters; None guesses from their roles.
        threads: None takes every core.

    Raises:
        FewbitsError: the budget is too small, a weight is NaN or infinite.
    """
    target, choices = request.target, _choices(plan, model, request.target)
    types = {tensor.name: [one.type.name for one in choice.layouts] for choice in choices for tensor in choice.tensors}
    cores = threads or os.cpu_count() or 1
    if text is None:
        parts = _guessed(model, target, types, cores)
    else:
        parts = _calibrated(model, target, types, text, cores, progress)
    losses: Losses = {}
    for part in parts:
        losses |= part
        if progress:
            progress(len(losses), len(types), "appraised linears")
    options = [choice.options(losses) for choice in choices]
    room = int(_n_weights(plan) * budget.bpw / 8) if budget.bpw is not None else (budget.size or 0) - _fixed(plan)
    while True:
        spent = spend(options, room)
        picked = zip(choices, spent.picks, strict=True)
        chosen = {tensor.name: choice.layouts[pick] for choice, pick in picked for tensor in choice.tensors}
        made = laid_out(_typed(plan, chosen, target), request)
        over = made.file_size - budget.size if budget.size is not None else 0
        if over <= 0:
            break
        room -= over  # headers grow a little with the numbers in them
    notes = [*made.notes, *_notes(made, spent, room, target, text is not None)]
    return made.model_copy(update={"notes": notes})


def _typed(plan: Plan, chosen: Mapping[str, Layout], target: Target) -> Plan:
    why = "least loss within the budget"
    tensors = [
        in_layout(tensor, chosen[tensor.name], target.method, why) if tensor.name in chosen else tensor
        for tensor in plan.tensors
    ]
    return plan.model_copy(update={"tensors": tensors, "files": []})


def _guessed(model: Model, target: Target, types: Mapping[str, Sequence[str]], threads: int) -> Iterator[Losses]:
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


def _calibrated(
    model: Model,
    target: Target,
    types: Mapping[str, Sequence[str]],
    text: CalibrationText,
    threads: int,
    progress: Progress | None,
) -> Iterator[Losses]:
    """Losses by what text makes of the unquantized model, one decoder block after another.

    Codes are chosen as they will be, with error feedback if that is the method, and their errors weighed with the
    Hessian of the inputs: coarse symmetric codes shrink weights, so that errors are not independent of each other,
    and a diagonal alone would make 2 bits look half as bad as they are.
    """
    import torch

    from fewbits.calibration.collect import BlockRecorder, owners
    from fewbits.calibration.sensitivity import sensitivities
    from fewbits.forward.streamed import StreamedModel, torch_threads
    from fewbits.quantize.blockwise import ENERGY_CAP, known_of

    with torch_threads(threads):
        known = sensitivities(model, text, progress=progress)
    owned = owners(model)
    with torch_threads(threads), torch.no_grad():
        streamed = StreamedModel(model)
        stream = streamed.enter(text.inputs)
        for index in range(len(streamed.layers)):
            block = streamed.block(index)
            recorder = BlockRecorder(True, ENERGY_CAP)
            recorder.attach(block, streamed.block_path(index), streamed, {name: [name] for name in types})
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
                    told = known_of(inputs, expert, target.method.endswith("gptq"))
                    share = len(inputs.counts) / len(chosen)

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
            yield found


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


def _notes(plan: Plan, spent: Spent, room: int, target: Target, calibrated: bool) -> list[str]:
    linears = quantized_tensors(plan)
    bits = sum(tensor.nbytes for tensor in linears) * 8 / _n_weights(plan)
    notes = [
        f"{bits:.3f} bits per weight over the {len(linears)} quantized linears, scales and zero points included",
        spent.note(room),
    ]
    used = {target.layout_of(tensor.codec).type.bits for tensor in linears}
    if target.layout.name == "gptq" and len(used) > 1:
        served = ", or with vLLM on a GPU" if used <= set(ENGINE_BITS["gptq"]) else ""
        notes.append(
            f"transformers gives all layers of a GPTQ checkpoint the same bits: load it with gptqmodel{served}"
        )
    if not calibrated:
        guessed = (
            "without calibration, how much a linear matters is guessed from its role, and the mixture may lose more "
            "than the same bits everywhere: pass --calibration TEXT"
        )
        return [*notes, guessed]
    return notes
