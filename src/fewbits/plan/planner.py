"""From a model's headers to planned tensors, and back from a plan that someone edited."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from math import prod

from pydantic import ValidationError

from fewbits.codecs.base import codec
from fewbits.errors import FewbitsError
from fewbits.plan.mixture import Choice, MixtureOptions, choose_types, compile_overrides, requires_imatrix
from fewbits.plan.presets import FLOAT_TYPES, TENSOR_TYPES, tensor_type
from fewbits.plan.presets import preset as find_preset
from fewbits.plan.schema import Plan, PlannedTensor, first_problem
from fewbits.plan.tensors import EMBEDDINGS, ModelFacts, SourceTensor, quantizable

_PLAIN = {"I8": 1, "I16": 2, "I32": 4, "I64": 8, "F64": 8}
"""Bytes of a number in types that GGUF has but that no weight is given."""


def plan_tensors(
    facts: ModelFacts, tensors: Sequence[SourceTensor], preset: str, options: MixtureOptions | None = None
) -> tuple[list[PlannedTensor], list[str]]:
    """Plan every tensor of a model: type, method, exact size.

    Args:
        facts: of the model.
        tensors: all of the model's; the plan keeps their order.
        preset: name, alias or number of a preset, e.g. `Q4_K_M`.
        options: what the user asked for besides.

    Returns:
        The planned tensors, and notes for the user.

    Raises:
        FewbitsError: see `choose_types`; or a tensor has a type whose size is not known.
    """
    options = options or MixtureOptions()
    choices = choose_types(facts, tensors, preset, options)
    planned = [_planned(tensor, choice) for tensor, choice in zip(tensors, choices, strict=True)]
    notes = [
        *_override_notes(facts, tensors, choices, options),
        *_option_notes(tensors, options),
        *_imatrix_notes(planned, find_preset(preset).name, options),
    ]
    return planned, notes


def _planned(tensor: SourceTensor, choice: Choice) -> PlannedTensor:
    try:
        return PlannedTensor(
            name=tensor.name,
            shape=tensor.shape,
            source_dtype=tensor.dtype,
            codec=choice.codec,
            method=default_method(tensor.dtype, choice.codec),
            nbytes=_nbytes(choice.codec, tensor.shape),
            reason=choice.reason,
            wanted=choice.wanted,
        )
    except ValidationError as error:
        raise FewbitsError(
            f"Tensor {tensor.name!r} cannot be planned: {first_problem(error)}.", "Check the model's header."
        ) from None


def _nbytes(codec_name: str, shape: tuple[int, ...]) -> int:
    # tables of integers are copied only, and have no codec
    return prod(shape) * _PLAIN[codec_name] if codec_name in _PLAIN else codec(codec_name).nbytes(shape)


def default_method(source_dtype: str, codec_name: str) -> str:
    """How a tensor gets its codes where nothing else is said: `copy`, `convert` or `search`."""
    if source_dtype == codec_name:
        return "copy"
    return "convert" if codec_name in FLOAT_TYPES else "search"


def apply_edits(made: Plan, edited: Plan) -> Plan:
    """Take over the types and methods of a plan that was edited by hand.

    Names, shapes and source types must be the model's; sizes are computed anew, whatever the edited plan says.

    Args:
        made: a fresh plan of the same model and target.
        edited: as read from a file.

    Returns:
        `made` with the edits. `files` is empty where a size changed, for the format to lay out again.

    Raises:
        FewbitsError: names the tensor: unknown, missing, of another shape, or of a type that it cannot have;
            or the plan is for another target, format or architecture.
    """
    edited.check_made_for(made)
    edits = {tensor.name: tensor for tensor in edited.tensors}
    names = {tensor.name for tensor in made.tensors}
    for name in edits.keys() - names:
        near = get_close_matches(name, names - edits.keys() or names, n=1)
        raise FewbitsError(
            f"The edited plan has a tensor {name!r} that the model does not have.",
            f"Did you mean {near[0]!r}?" if near else "Remove it, or use the model that the plan was made for.",
        )
    missing = [tensor.name for tensor in made.tensors if tensor.name not in edits]
    if missing:
        raise FewbitsError(
            f"The edited plan lacks {len(missing)} of the model's tensors, the first is {missing[0]!r}.",
            "Every tensor is needed: make the plan anew and change only types.",
        )
    tensors = [_edited(tensor, edits[tensor.name]) for tensor in made.tensors]
    changed = sum(new != old for new, old in zip(tensors, made.tensors, strict=True))
    split = made.split_max_size or edited.split_max_size
    if not changed and split == made.split_max_size:
        return made
    notes = [*made.notes, *([f"{changed} tensors take their type from the edited plan."] if changed else [])]
    return made.model_copy(update={"tensors": tensors, "files": [], "notes": notes, "split_max_size": split})


def _edited(made: PlannedTensor, edit: PlannedTensor) -> PlannedTensor:
    """One tensor with its edit."""
    name, columns = made.name, made.shape[-1]
    for field, what in (("shape", "shape"), ("source_dtype", "source type")):
        planned, true = getattr(edit, field), getattr(made, field)
        if planned != true:
            raise FewbitsError(
                f"Tensor {name!r} has the {what} {_plain(planned)} in the edited plan and {_plain(true)} in the model.",
                "Use the model that the plan was made for.",
            )
    to = edit.codec.upper()
    if to != made.source_dtype:  # staying as it is, is always possible
        to = tensor_type(edit.codec, f"tensor {name!r}")
        if prod(made.shape[:-1]) <= 1 and to != "F32":
            raise FewbitsError(
                f"Tensor {name!r} is a vector and cannot be {to}.", f"Leave it {made.source_dtype}, or make it F32."
            )
        if not codec(to).fits(columns):
            fitting = [known for known in TENSOR_TYPES if codec(known).fits(columns)]
            raise FewbitsError(
                f"Tensor {name!r} has rows of {columns} weights, no multiple of the {codec(to).block} that {to} needs.",
                f"Types that fit: {', '.join(fitting)}.",
            )
    method = default_method(made.source_dtype, to)
    if method == "search" and edit.method not in ("copy", "convert"):
        method = edit.method
    if (to, method) == (made.codec, made.method):
        return made
    update = {"codec": to, "method": method, "nbytes": _nbytes(to, made.shape), "reason": "edited plan"}
    return made.model_copy(update={**update, "wanted": None})


def _plain(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _override_notes(
    facts: ModelFacts, tensors: Sequence[SourceTensor], choices: Sequence[Choice], options: MixtureOptions
) -> list[str]:
    """Overrides that do nothing: usually a typing error."""
    notes = []
    for regex, to in compile_overrides(options.tensor_types):
        hit = [(t, c) for t, c in zip(tensors, choices, strict=True) if regex.search(t.name)]
        used = f"override {regex.pattern!r}"
        if not hit:
            notes.append(f"The override {regex.pattern!r}={to} matches no tensor.")
        elif not any(used in choice.reason for _, choice in hit):
            why = "other options decide before it"
            if not any(quantizable(t.name, t.shape, facts.arch) for t, _ in hit):
                why = "what it matches is never quantized"
            notes.append(f"The override {regex.pattern!r}={to} has no effect: {why}.")
    return notes


def _option_notes(tensors: Sequence[SourceTensor], options: MixtureOptions) -> list[str]:
    names = {tensor.name for tensor in tensors}
    notes = []
    if "output.weight" not in names and options.leave_output:
        notes.append("There is no output.weight to leave as it is: token_embd.weight serves as both.")
    if not names.intersection(EMBEDDINGS) and options.token_embedding_type is not None:
        notes.append("There are no token embeddings to give a type.")
    return notes


def _imatrix_notes(planned: Sequence[PlannedTensor], preset: str, options: MixtureOptions) -> list[str]:
    if options.has_imatrix:
        return []
    hit = [t for t in planned if t.method == "search" and requires_imatrix(t.name, t.codec, preset)]
    if not hit:
        return []
    kinds = ", ".join(sorted({t.codec for t in hit}))
    return [
        f"WARNING: {len(hit)} tensors get a type ({kinds}) for which llama-quantize refuses to go without an "
        "importance matrix: all columns weigh the same, and the loss will be much larger. Pass --calibration TEXT."
    ]
