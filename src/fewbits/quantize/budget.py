"""A GGUF of a given size: each tensor gets the type that makes the whole lose least within the budget."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewbits.calibration.statistics import Statistics
from fewbits.codecs import codec
from fewbits.errors import FewbitsError
from fewbits.formats.gguf.source import GGUFSource
from fewbits.formats.gguf.writer import padded
from fewbits.memory import memory
from fewbits.memory.weights import EMBEDDINGS
from fewbits.methods.gptq import feedback_span
from fewbits.plan import Plan, PlannedFile, PlannedTensor, default_method, tensor_type
from fewbits.plan.budget import Option, Spent, spend
from fewbits.plan.presets import FLOAT_TYPES
from fewbits.quantize.importances import Progress, importances_of, uses_importances
from fewbits.quantize.learned import Learned
from fewbits.quantize.losses import Appraisal
from fewbits.quantize.planning import shards_of

TARGET = "GGUF"
"""The preset under which a plan of free types goes."""
K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
CODEBOOKS = ("IQ4_XS", "IQ4_NL", "IQ3_S", "IQ3_XXS", "IQ2_S")
WITH_CALIBRATION = ("IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
"""What is too coarse to be chosen without knowing which columns matter."""
FED_BACK = 0.4
"""What error feedback leaves of the loss that a search of scales leaves."""
HEAD = "output.weight"
IN_RAM = "stays in RAM, beside the card"
SHORT_ROWS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q8_0")
"""For rows that are no multiple of 256."""


@dataclass(frozen=True)
class Budget:
    """How much a file may take: exactly one of `size`, `like`, `bpw` and `fit` is given.

    Attributes:
        size: most bytes of all files together.
        bpw: most bits per weight: over all tensors of a GGUF, embeddings included; over the quantized linears of a
            directory.
        fit: bytes of a graphics card's memory that the model has to run in with all layers: in llama.cpp, or for a
            directory in vLLM or transformers.
        context: for `fit`: tokens of the KV cache; None means the engine's default.
        kv: for `fit`: type of the KV cache.
        types: only these; empty for all that are worth having.
        on_card: whether `size` counts only what llama.cpp loads onto a card that has all layers; see `as_size`.
        like: a preset of GGUF: as many bytes as its files have.
    """

    size: int | None = None
    bpw: float | None = None
    fit: int | None = None
    context: int | None = None
    kv: str = "f16"
    types: tuple[str, ...] = ()
    on_card: bool = False
    like: str | None = None

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.size, self.like, self.bpw, self.fit)) != 1:
            raise FewbitsError(
                "A budget is either a size, a number of bits per weight, or memory to fit into.",
                "Pass one of --size, --bpw and --fit.",
            )
        if self.fit is None and (self.context is not None or self.kv != "f16"):
            raise FewbitsError(
                "A context and a type of KV cache say nothing without memory to fit into.", "Pass --fit."
            )

    def as_size(self, model: str | Path) -> Budget:
        """The budget with what else is kept in memory taken off: what is left for weights on the card.

        llama.cpp leaves the embeddings in RAM, and makes a copy on the card where they are the head as well.

        Raises:
            FewbitsError: nothing is left for weights, or the model's needs are not known.
        """
        if self.fit is None:
            return self
        needs = memory(model, target="Q4_K_M", context=self.context, kv=self.kv)
        device = needs.device("GPU")
        assert device is not None  # where no hardware is named, all layers are on a GPU
        rest = device.needed - device.weights
        if rest >= self.fit:
            raise FewbitsError(
                f"{model}: KV cache, buffers and margin alone take {rest} bytes at a context of {needs.context}.",
                "Take a shorter --context, or --kv q8_0.",
            )
        return Budget(size=self.fit - rest, types=self.types, on_card=True)

    def bytes_for_tensors(self, skeleton: Plan, overhead: int) -> int:
        """What the tensors that count may take together, padding included."""
        if self.bpw is not None:
            return int(skeleton.n_weights * self.bpw / 8)
        return (self.size or 0) - (0 if self.on_card else overhead)

    def beside(self, tensors: Sequence[PlannedTensor]) -> set[str]:
        """The tensors that do not count."""
        names = {tensor.name for tensor in tensors}
        return names & set(EMBEDDINGS) if self.on_card and HEAD in names else set()


def plan_budget(
    source: GGUFSource,
    skeleton: Plan,
    budget: Budget,
    output: Path,
    statistics: Statistics | None = None,
    file: Path | None = None,
    learned: Learned | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    fed_back: Collection[str] = (),
) -> Plan:
    """Choose types within a budget.

    Args:
        skeleton: of the target `TARGET`: the tensors that are free to choose stay as they are there.
        output: final name, for the files' names.
        statistics: from calibration; with sensitivities the choice is worth most.
        file: where they are from, for messages.
        learned: with the Hessians' factors, if codes will be chosen with error feedback.
        threads: None takes every core.
        fed_back: the tensors whose codes will be chosen with error feedback while text runs, of which no Hessian is
            known yet.

    Raises:
        FewbitsError: the budget is too small, an unknown type, or statistics of another model.
    """
    free = [tensor for tensor in skeleton.tensors if tensor.reason == "copied"]
    types = {tensor.name: _types(tensor, budget, statistics is not None) for tensor in free}
    probe = [_weighted(tensor, types[tensor.name]) for tensor in free]
    known = (
        importances_of(skeleton.model_copy(update={"tensors": probe}), statistics, file or output)[0]
        if statistics
        else {}
    )
    appraisal = Appraisal(source, known, statistics.sensitivities if statistics else {}, learned or Learned())
    by_name = {tensor.name: tensor for tensor in source.tensors}
    losses = appraisal.losses([by_name[t.name] for t in free], types, threads or os.cpu_count() or 1, progress)
    for name in losses.keys() & set(fed_back):
        losses[name] = {to: loss * (FED_BACK if feedback_span(codec(to)) else 1) for to, loss in losses[name].items()}
    shards = shards_of(skeleton, source.metadata, output)
    beside = budget.beside(skeleton.tensors)
    fixed = sum(padded(t.nbytes) for t in skeleton.tensors if t.reason != "copied" and t.name not in beside)
    headers = sum(len(shard.header) for shard in shards)
    room = budget.bytes_for_tensors(skeleton, headers) - fixed
    options = [
        [_best(losses[tensor.name])] if tensor.name in beside else _options(tensor, losses[tensor.name])
        for tensor in free
    ]
    spent = spend(options, room)
    chosen = {
        tensor.name: _typed(tensor, of[pick].name, IN_RAM if tensor.name in beside else "least loss within the budget")
        for tensor, of, pick in zip(free, options, spent.picks, strict=True)
    }
    tensors = [chosen.get(tensor.name, tensor) for tensor in skeleton.tensors]
    plan = skeleton.model_copy(update={"tensors": tensors})
    files = [PlannedFile(name=s.path.name, size=s.nbytes) for s in shards_of(plan, source.metadata, output)]
    notes = [f"{name} {IN_RAM}: {chosen[name].nbytes} bytes" for name in sorted(beside & chosen.keys())]
    return plan.model_copy(update={"files": files, "notes": [*plan.notes, *_notes(spent, room, statistics), *notes]})


def _types(tensor: PlannedTensor, budget: Budget, calibrated: bool) -> list[str]:
    """The types that a tensor may get."""
    columns = tensor.shape[-1]
    if budget.types:
        wanted: tuple[str, ...] = tuple(tensor_type(name, "the budget") for name in budget.types)
    else:
        wanted = (*K_TYPES, *CODEBOOKS, *(WITH_CALIBRATION if calibrated else ()))
    fitting = [name for name in wanted if codec(name).fits(columns)]
    if not fitting or (columns % 256 and not budget.types):
        fitting += [name for name in SHORT_ROWS if codec(name).fits(columns) and name not in fitting]
    stays = [tensor.source_dtype] if tensor.source_dtype in FLOAT_TYPES[1:] or not fitting else []
    return [*fitting, *(name for name in stays if name not in fitting)]


def _typed(tensor: PlannedTensor, to: str, reason: str) -> PlannedTensor:
    update = {
        "codec": to,
        "method": default_method(tensor.source_dtype, to),
        "nbytes": codec(to).nbytes(tensor.shape),
        "reason": reason or tensor.reason,
    }
    return tensor.model_copy(update=update)


def _weighted(tensor: PlannedTensor, types: Sequence[str]) -> PlannedTensor:
    """The tensor in the first of these types that has use for importances; where there is none, in the last."""
    typed = [_typed(tensor, name, "") for name in types]
    return next(filter(uses_importances, typed), typed[-1])


def _options(tensor: PlannedTensor, losses: Mapping[str, float]) -> list[Option]:
    return [Option(name, padded(codec(name).nbytes(tensor.shape)), loss) for name, loss in losses.items()]


def _best(losses: Mapping[str, float]) -> Option:
    """The few-bit type that loses least, for a tensor that takes nothing of the budget."""
    known = {name: loss for name, loss in losses.items() if name not in FLOAT_TYPES} or losses
    name = min(known, key=lambda name: known[name])
    return Option(name, 0, known[name])


def _notes(spent: Spent, room: int, statistics: Statistics | None) -> list[str]:
    notes = [spent.note(room)]
    if statistics is None:
        return [
            *notes,
            "without calibration, how much a tensor matters is guessed from its role: pass --calibration TEXT",
        ]
    if not statistics.sensitivities:
        return [
            *notes,
            "the statistics hold no sensitivities, so how much a tensor matters is guessed from its role: pass a text, "
            "or make them with `fewbits calibrate --sensitivity`",
        ]
    return [*notes, f"expected KL divergence from the source: about {spent.loss:.2g} nats a token"]
