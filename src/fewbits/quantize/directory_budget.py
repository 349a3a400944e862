"""Model directories of a given size: each set of linears that engines fuse gets the bits with which the whole loses
least.

What counts as bits per weight are the quantized linears with everything that is stored of them: codes, scales, zero
points, indices (of EXL3 the codes alone). Embeddings, norms and the head are not counted; a size counts all of the
safetensors files.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fewbits.checkpoint import Model
from fewbits.errors import FewbitsError
from fewbits.layouts import Layout
from fewbits.memory import GPU, Hardware, memory
from fewbits.memory.hardware import USABLE
from fewbits.plan import Plan, PlannedTensor
from fewbits.plan.budget import Alternative, Option, Spent, spend
from fewbits.plan.directory import Target, alike, in_layout, named_alike
from fewbits.quantize.budget import Budget
from fewbits.quantize.directory import DirectoryRequest, block_linears, laid_out, linears_of
from fewbits.quantize.directory_losses import calibrated, guessed
from fewbits.quantize.importances import Progress
from fewbits.quantize.losses import Losses

if TYPE_CHECKING:
    from fewbits.calibration.texts import CalibrationText

ENGINE_BITS = {"gptq": (4, 8), "ct": (4, 8)}
"""What vLLM runs of each ecosystem, whose memory is then reckoned with for `--fit`; else that of transformers ..."""
EXLLAMA = ("exl2", "exl3")
"""... or, of these, of exllamav2."""


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
    types = {tensor.name: tensor.codec for tensor in block_linears(plan)}
    sizes: Counter[str] = Counter()
    for tensor in block_linears(plan):
        sizes[tensor.codec] += tensor.n_weights
    ordered = tuple(name for name, _ in sizes.most_common())
    if not ordered:  # only another type of floats
        return Mixture(target.layout, (target.layout.type.name,))
    others = tuple(
        (target.layout_of(types[names[0]]), tuple(name.removesuffix(".weight") for name in names))
        for names in (_sets(model, target, types) if len(ordered) > 1 else [])
        if types[names[0]] != ordered[0]
    )
    return Mixture(target.layout_of(ordered[0]).beside(others), ordered)


def _sets(model: Model, target: Target, among: Mapping[str, object]) -> list[list[str]]:
    """The linears that engines keep in one type, of those that are quantized."""
    every = alike(model.config, linears_of(model), target.layout.fuses)
    return [kept for names in every if (kept := [name for name in names if name in among])]


def as_size(budget: Budget, path: Path, target: Target) -> Budget:
    """The budget with what else an engine keeps in memory taken off; bits per weight stay as they are.

    Raises:
        FewbitsError: nothing is left for weights, or the model's needs are not known.
    """
    if budget.like:
        raise FewbitsError(f"--size {budget.like}: a GGUF type is no size of model directories.", "Name bytes.")
    if budget.fit is None:
        return budget
    served = all(layout.type.bits in ENGINE_BITS.get(layout.name, ()) for layout in target.members)
    engine = "exllamav2" if target.layout.name in EXLLAMA else "vllm" if served else "transformers"
    hardware = Hardware("", 1, "", 0, (GPU("the budget", "unknown", round(budget.fit / USABLE)),))
    family, _, spec = target.name.partition(":")
    like = named_alike(family, spec, target.layout.type.bits)
    needs = memory(path, target=like, context=budget.context, kv=budget.kv, engine=engine, hardware=hardware)
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

    def alternatives(self, losses: Losses) -> list[Alternative]:
        names = [(layout, layout.type.name) for layout in self.layouts]
        return [
            Alternative(
                Option(name, self.nbytes(layout), sum(losses[tensor.name][name] for tensor in self.tensors)),
                {tensor.name: layout for tensor in self.tensors},
            )
            for layout, name in names
        ]


def _choices(plan: Plan, model: Model, target: Target) -> list[_Choice]:
    tensors = {tensor.name: tensor for tensor in block_linears(plan)}
    sets = [[tensors[name] for name in names] for names in _sets(model, target, tensors)]
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
    if budget.bpw is not None and least > _room(plan, target, budget):
        raise FewbitsError(
            f"{target.name}: the fewest bits a weight are {least * 8 / n_weights:.3f}, the budget has {budget.bpw}.",
            "Allow more, more --types, or a larger group.",
        )
    if budget.size is not None and fixed + least > budget.size:
        raise FewbitsError(
            f"{target.name}: the smallest mixture takes {fixed + least} bytes, {fixed} of them for embeddings, norms "
            f"and head; the budget has {budget.size}.",
            "Allow more, more --types, or make a GGUF, which has few bits for embeddings, too.",
        )


def _room(plan: Plan, target: Target, budget: Budget) -> int:
    """Bytes that the linears of the blocks may take."""
    if budget.bpw is None:
        return (budget.size or 0) - _fixed(plan)
    room = int(_n_weights(plan) * budget.bpw / 8)
    if target.layout.mean_counts_scales:
        return room
    codes = (target.layout_of(tensor.codec).type.bits * tensor.n_weights / 8 for tensor in block_linears(plan))
    return room + sum(tensor.nbytes for tensor in block_linears(plan)) - round(sum(codes))


def _n_weights(plan: Plan) -> int:
    return sum(tensor.n_weights for tensor in block_linears(plan))


def _fixed(plan: Plan) -> int:
    """Bytes of the files that are not of quantized linears."""
    return plan.file_size - sum(tensor.nbytes for tensor in block_linears(plan))


def within_budget(
    plan: Plan,
    model: Model,
    request: DirectoryRequest,
    budget: Budget,
    text: CalibrationText | None = None,
    measured: Sequence[Sequence[Alternative]] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> Plan:
    """Choose the bits of every linear.

    Args:
        plan: of an open target, as `make_directory_plan` makes it.
        budget: a size or bits per weight.
        text: tells how much each linear matters; None guesses from their roles.
        measured: what linears could become, where that is known already.
        threads: None takes every core.
        folder: keeps the state that an interrupted run goes on from.

    Raises:
        FewbitsError: the budget is too small, a weight is NaN or infinite.
    """
    target, cores = request.target, threads or os.cpu_count() or 1
    alternatives = measured or _appraised(plan, model, target, text, cores, progress, folder)
    options = [[one.option for one in each] for each in alternatives]
    room = _room(plan, target, budget)
    while True:
        spent = spend(options, room)
        picked = (each[pick] for each, pick in zip(alternatives, spent.picks, strict=True))
        chosen = {name: layout for one in picked for name, layout in one.layouts.items()}
        made = laid_out(_typed(plan, chosen, target), request)
        over = made.file_size - budget.size if budget.size is not None else 0
        if over <= 0:
            break
        room -= over  # headers grow a little with the numbers in them
    notes = [*made.notes, *_notes(made, spent, room, target, text is not None)]
    return made.model_copy(update={"notes": notes})


def _appraised(
    plan: Plan,
    model: Model,
    target: Target,
    text: CalibrationText | None,
    threads: int,
    progress: Progress | None,
    folder: Path | None,
) -> list[list[Alternative]]:
    """What each set of linears could become."""
    choices = _choices(plan, model, target)
    types = {tensor.name: [one.type.name for one in choice.layouts] for choice in choices for tensor in choice.tensors}
    if text is None:
        parts = guessed(model, target, types, threads)
    else:
        parts = calibrated(model, target, types, text, threads, progress, folder)
    losses: Losses = {}
    for part in parts:
        losses |= part
        if progress:
            progress(len(losses), len(types), "appraised linears")
    return [choice.alternatives(losses) for choice in choices]


def _typed(plan: Plan, chosen: Mapping[str, Layout], target: Target) -> Plan:
    why = "least loss within the budget"
    tensors = [
        in_layout(tensor, chosen[tensor.name], target.method, why) if tensor.name in chosen else tensor
        for tensor in plan.tensors
    ]
    return plan.model_copy(update={"tensors": tensors, "files": []})


def _notes(plan: Plan, spent: Spent, room: int, target: Target, calibrated: bool) -> list[str]:
    linears = block_linears(plan)
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
        warning = (
            "without calibration, how much a linear matters is guessed from its role, and the mixture may lose more "
            "than the same bits everywhere: pass --calibration TEXT"
        )
        return [*notes, warning]
    return notes
