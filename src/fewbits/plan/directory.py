"""Plans of model directories: linears of the decoder blocks in few bits, everything else as it is.

A target names one storage type for all of them (`gptq:w4g128`) or leaves the bits open (`gptq:g128`): then each set of
linears that engines fuse may have bits of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from fewbits import arch
from fewbits.codecs.scaled import Scaled
from fewbits.errors import FewbitsError
from fewbits.layouts import LAYOUTS, Layout
from fewbits.layouts.base import ANY
from fewbits.plan.schema import Plan, PlannedTensor

HEAD, HEAD_WEIGHT = "head", "lm_head.weight"
UNQUANTIZED = 16
CALIBRATED = ("gptq", "awq", "awq+gptq", "smoothquant", "ldlq", "quip", "aqlm")
"""Methods that look at what text makes of a model."""
USUAL = {"bitnet": "autobitlinear"}
"""What an ecosystem's name alone stands for, where one target is what nearly everybody wants."""
LINEARS_ALONE = ("bnb", "bitnet", "aqlm")
"""Ecosystems whose loader in transformers replaces linear modules, which its experts are not."""


@dataclass(frozen=True)
class Target:
    """What was asked for: an ecosystem's layout, and how codes are chosen.

    Attributes:
        name: e.g. `gptq:w4g128`.
        layout: of every quantized linear; of an open target, what its members have in common.
        method: of the weights.
        members: of an open target, the layouts to choose among, fewest bits first.
        rate: of an open target that names it, the mean of the bits per weight.
        head: layout of the head, where it is quantized, too.
    """

    name: str
    layout: Layout
    method: str
    members: tuple[Layout, ...] = ()
    rate: float | None = None
    head: Layout | None = None

    @property
    def open(self) -> bool:
        """Whether the bits are still to be chosen."""
        return bool(self.members)

    def layout_of(self, storage: str) -> Layout:
        """The layout of a storage type, as planned tensors name it.

        Raises:
            FewbitsError: this target has no such type.
        """
        heads = (self.head,) if self.head else ()
        for layout in (self.layout, *self.members, *heads):
            if layout.type.name == storage:
                return layout
        if (found := self.layout.of_type(storage)) is not None and self.members:
            return found
        known = ", ".join(dict.fromkeys(layout.type.name for layout in (self.members or (self.layout,))))
        raise FewbitsError(f"{self.name} has no type {storage!r}.", f"It has {known}.")

    def for_floats(self, dtype: str) -> Target:
        """This target in a directory whose other tensors are of this type; see `Layout.for_floats`."""
        members = tuple(layout.for_floats(dtype) for layout in self.members)
        head = self.head.for_floats(dtype) if self.head else None
        return replace(self, layout=self.layout.for_floats(dtype), members=members, head=head)

    def among(self, types: Sequence[str]) -> Target:
        """An open target with these types alone: `w4`, `4`, or names such as `INT4_G128`; none for the usual ones.

        Raises:
            FewbitsError: a type that the target has not.
        """
        wanted = [str(name).strip().upper().removeprefix("W") for name in types]
        rare = self.layout.rare_widths
        known = {layout: (str(layout.type.bits), layout.type.name) for layout in self.members}
        for name, asked in zip(types, wanted, strict=True):
            if not any(asked in names for names in known.values()):
                every = ", ".join(f"w{layout.type.bits}" for layout in self.members)
                raise FewbitsError(f"{self.name} has no type {name!r}.", f"Choose among {every}.")
        members = tuple(
            layout
            for layout, names in known.items()
            if (any(asked in names for asked in wanted) if wanted else layout.type.bits not in rare)
        )
        return replace(self, layout=nearest(members), members=members)

    @property
    def calibrated(self) -> bool:
        """Whether text runs through the model: for the method, or for scales of activations."""
        return self.method in CALIBRATED or self.layout.activations == "static"


def is_directory_target(name: str) -> bool:
    """Whether a target names an ecosystem's directory (`gptq:w4g128`, `bitnet`) rather than a preset of GGUF."""
    return ":" in name or name.strip().lower() in USUAL


def directory_targets() -> dict[str, str]:
    """Every target that is worth naming, and what it is."""
    return {
        f"{name}:{spec}": summary for name, layout in LAYOUTS.items() for spec, summary in layout.examples().items()
    }


def target(
    name: str, method: str | None, calibrated: bool, decided: bool = False, head_bits: int | None = None
) -> Target:
    """Find out what a target asks for.

    Args:
        name: e.g. `ct:w4a16g128`.
        method: None for what the ecosystem's own tools would do, or what comes nearest without calibration.
        calibrated: whether there is text to calibrate with.
        decided: whether there is a budget or a saved plan, by which an open target chooses its types.
        head_bits: for ecosystems that quantize the head; None for the usual 6, 16 to leave it as it is.

    Raises:
        FewbitsError: unknown target or method, a method that does not make this type, or one that needs calibration;
            an open target without a budget.
    """
    family, _, spec = name.strip().lower().partition(":")
    spec = spec or USUAL.get(family, "")
    if family not in LAYOUTS:
        raise FewbitsError(f"Unknown target {name!r}.", f"Known: {', '.join(directory_targets())}.")
    rate, members = LAYOUTS[family].rate(spec), LAYOUTS[family].members(spec)
    if members and not decided and rate is None:
        raise FewbitsError(
            f"{name}: the target leaves the bits open.",
            f"Pass --bpw, --size, --fit or a saved --plan, or name them: {named_alike(family, spec, 4)}.",
        )
    layout = nearest(members, rate or 4) if members else LAYOUTS[family].from_spec(spec)
    fitting = methods_for(layout)
    if method is None:
        free = (known for known in fitting if calibrated or known not in CALIBRATED or _needs(family))
        method = next(free, fitting[0])
    if method not in fitting:
        raise FewbitsError(f"{name}: {method!r} does not make it.", f"Choose one of: {', '.join(fitting)}.")
    if getattr(layout, "act_order", False) and method not in CALIBRATED:
        raise FewbitsError(
            f"{name}: groups by activity need a method that looks at activations.",
            f"Take {name.replace('-actorder', '')}, or --method gptq with --calibration TEXT.",
        )
    if method in CALIBRATED and not calibrated:
        others = [known for known in fitting if known not in CALIBRATED]
        way_out = f"; or do without: --method {others[0]}" if others else ""
        raise FewbitsError(f"{name}: {method} needs calibration.", f"Pass --calibration TEXT{way_out}.")
    head = _head(layout, head_bits)
    found = Target(f"{family}:{spec}", layout, method, members, rate if members else None, head)
    if found.calibrated and not calibrated:
        raise FewbitsError(f"{name}: the scales of its activations need calibration.", "Pass --calibration TEXT.")
    return found


def named_alike(family: str, spec: str, bits: float) -> str:
    """The target that is like an open one, but has these bits."""
    return f"{family}:{float(bits):g}" if spec == ANY else f"{family}:w{bits:g}{spec}"


def nearest(members: Sequence[Layout], bits: float = 4) -> Layout:
    """The one that stands for all of them where they are alike: of so many bits, or the nearest to that."""
    return min(members, key=lambda layout: abs(layout.type.bits - bits))


def _head(layout: Layout, bits: int | None) -> Layout | None:
    """The layout of the head.

    Raises:
        FewbitsError: the ecosystem leaves it as it is, or has no such bits.
    """
    heads, family = layout.heads(), layout.name
    if bits is None and not heads:
        return None
    if not heads:
        raise FewbitsError(f"{family}: the head stays as it is.", "Leave out --head-bits.")
    if bits not in (None, UNQUANTIZED, *heads):
        known = ", ".join(map(str, heads))
        raise FewbitsError(f"{family}: a head of {bits} bits is not known.", f"Take {known}, or 16 to leave it.")
    wanted = bits or layout.usual_head
    return None if wanted == UNQUANTIZED else heads[wanted]


def _needs(family: str) -> bool:
    """Whether an ecosystem is named after a method that needs text: leaving it out silently would mislead."""
    return family in CALIBRATED


def methods_for(layout: Layout) -> tuple[str, ...]:
    """The methods that make a layout's type, the one taken first."""
    kind, own = layout.type, layout.name
    if layout.methods or not isinstance(kind, Scaled):
        return layout.methods
    if kind.zero == "float":
        return ("hqq", "rtn")
    if kind.levels == "E4M3":
        return ("rtn", "search")
    if layout.name == "bnb":
        return ("rtn", "search") if kind.scale == "NESTED" or kind.levels == "INT" else ("rtn", "search", "gptq")
    if kind.levels == "INT" and kind.bits == 8 and layout.activations != "float":
        return ("smoothquant", "rtn", "search", "gptq")
    if kind.levels == "INT":
        first, last = ("awq", "gptq") if own == "awq" else ("gptq", "awq")
        return (first, "search", "rtn", last, "awq+gptq")
    return ("search", "rtn", "gptq")


def plan_directory(
    config: Mapping[str, Any],
    stored: Mapping[str, tuple[tuple[int, ...], str]],
    chosen: Target,
    keep: Sequence[str] = (),
) -> tuple[list[PlannedTensor], list[str]]:
    """Plan every tensor of a model directory.

    Args:
        config: config.json.
        stored: Hugging Face name -> shape and storage type.
        keep: regular expressions; linears whose name one of them finds stay as they are.

    Returns:
        The planned tensors, and notes.

    Raises:
        FewbitsError: a group that does not divide a row, a fused sibling left out, nothing left to quantize, an
            expression that is none.
    """
    linears = arch.decoder_linears(config, {name: shape for name, (shape, _) in stored.items()})
    odd = next((linear.weight for linear in linears if not linear.plain), None)
    if odd:
        raise FewbitsError(
            f"{odd}: not a plain linear layer, which engines of {chosen.layout.name} checkpoints expect.",
            "Make a GGUF instead, e.g. Q4_K_M.",
        )
    if chosen.layout.name in LINEARS_ALONE and any(re.search(r"\.\d+\.", linear.module) for linear in linears):
        raise FewbitsError(
            f"transformers keeps all experts of a block in one tensor, which {chosen.layout.quant_method} cannot hold.",
            "Take ct:w4a16g128 or a GGUF preset.",
        )
    kept = _kept(linears, keep)
    _check_siblings(config, linears, kept)
    quantized = {linear.weight for linear in linears} - kept
    if not quantized:
        raise FewbitsError("Every linear layer is kept: nothing would be quantized.", "Keep fewer with --keep.")
    tensors = [
        _quantized(name, shape, dtype, chosen)
        if name in quantized
        else _as_it_is(name, shape, dtype, chosen.layout, name in kept)
        for name, (shape, dtype) in stored.items()
    ]
    if chosen.head is not None:
        source = arch.head_source(config, {name: shape for name, (shape, _) in stored.items()})
        tensors = _with_head(tensors, chosen.head, chosen.method, source)
    notes = [f"{len(kept)} linear layers stay as they are"] if kept else []
    if chosen.layout.type.shares_a_scale and any(re.search(r"\.\d+\.", linear.module) for linear in linears):
        notes.append("transformers 5.23 loads NVFP4 experts wrongly, without their global scale: for vLLM only")
    return tensors, notes


def _with_head(tensors: list[PlannedTensor], layout: Layout, method: str, source: str) -> list[PlannedTensor]:
    """The head quantized as well; where it shares the embeddings' matrix, it gets codes of its own beside them."""
    plain = next(tensor for tensor in tensors if tensor.name == source)
    tied = source != HEAD_WEIGHT
    head = in_layout(plain.model_copy(update={"name": HEAD_WEIGHT}), layout, method, HEAD)
    return [*tensors, head] if tied else [head if tensor is plain else tensor for tensor in tensors]


def _kept(linears: Sequence[arch.DecoderLinear], keep: Sequence[str]) -> set[str]:
    kept = set()
    for expression in keep:
        try:
            found = re.compile(expression)
        except re.error as error:
            raise FewbitsError(f"--keep {expression!r} is no regular expression ({error}).") from None
        hit = {linear.weight for linear in linears if found.search(linear.weight)}
        if not hit:
            raise FewbitsError(f"--keep {expression!r} finds no linear layer.", f"One is {linears[0].weight}.")
        kept |= hit
    return kept


def siblings(config: Mapping[str, Any], linears: Sequence[arch.DecoderLinear]) -> list[list[str]]:
    """The weights that engines fuse into one: q, k and v; gate and up, of each expert."""
    sets: dict[tuple[int, str], list[str]] = {}
    groups = arch.family_of(config).groups
    for linear in linears:
        number = re.search(r"(?<=\.)\d+(?=\.)", linear.module)
        plain = re.sub(r"\.\d+\.", ".{e}.", linear.module)
        group = next((members for members in groups if plain in members), (plain,))
        sets.setdefault((linear.block, f"{group[0]} {number[0] if number else ''}"), []).append(linear.weight)
    return list(sets.values())


def alike(config: Mapping[str, Any], linears: Sequence[arch.DecoderLinear], fuses: bool = True) -> list[list[str]]:
    """The weights that engines keep in one type: what they fuse, and all experts of a block.

    Args:
        fuses: see `Layout.fuses`; without, every weight is for itself.
    """
    if not fuses:
        return [[linear.weight] for linear in linears]
    experts: dict[int, list[str]] = {}
    for linear in linears:
        if re.search(r"\.\d+\.", linear.module):
            experts.setdefault(linear.block, []).append(linear.weight)
    among = {name for names in experts.values() for name in names}
    return [*(names for names in siblings(config, linears) if names[0] not in among), *experts.values()]


def _check_siblings(config: Mapping[str, Any], linears: Sequence[arch.DecoderLinear], kept: set[str]) -> None:
    for members in alike(config, linears):
        split = [name for name in members if name in kept]
        if split and len(split) < len(members):
            other = next(name for name in members if name not in kept)
            raise FewbitsError(
                f"{split[0]} would be kept and {other} quantized, but engines fuse the two.",
                "Keep both or neither.",
            )


def _quantized(name: str, shape: tuple[int, ...], dtype: str, chosen: Target) -> PlannedTensor:
    plain = PlannedTensor(
        name=name, shape=shape, source_dtype=dtype, codec=dtype, method=chosen.method, nbytes=0, reason="-"
    )
    return in_layout(plain, chosen.layout, chosen.method, f"target {chosen.name}")


def in_layout(tensor: PlannedTensor, layout: Layout, method: str, reason: str) -> PlannedTensor:
    """A linear in the type of a layout.

    Raises:
        FewbitsError: the layout cannot hold a matrix of this shape.
    """
    matrix = (tensor.shape[0], tensor.shape[1])
    try:
        layout.check(matrix)
    except FewbitsError as error:
        raise FewbitsError(f"{tensor.name}: {error.message}", error.hint) from None
    nbytes = sum(part.nbytes for part in layout.parts(matrix).values())
    update = {"codec": layout.type.name, "method": method, "nbytes": nbytes, "reason": reason}
    return tensor.model_copy(update=update)


def nbytes_on_average(tensor: PlannedTensor, chosen: Target) -> int:
    """What a planned tensor takes where its target names a mean of bits: of a linear, what that mean comes to."""
    if chosen.rate is None or tensor.method in ("copy", "convert") or tensor.reason == HEAD:
        return tensor.nbytes
    codes = chosen.layout_of(tensor.codec).type.bits * tensor.n_weights / 8
    beside = 0 if chosen.layout.mean_counts_scales else tensor.nbytes - codes
    return round(chosen.rate * tensor.n_weights / 8 + beside)


def _as_it_is(name: str, shape: tuple[int, ...], dtype: str, layout: Layout, kept: bool) -> PlannedTensor:
    to = _plain_type(dtype, layout)
    return PlannedTensor(
        name=name,
        shape=shape or (1,),
        source_dtype=dtype,
        codec=to,
        method="copy" if to == dtype else "convert",
        nbytes=2 * prod(shape),
        reason="kept" if kept else "not a linear layer of a block",
    )


def follow(made: Plan, edited: Plan, chosen: Target, sets: Sequence[Sequence[str]]) -> Plan:
    """Take over the types of a plan that was edited by hand: linears may get another type of the target, or stay.

    Args:
        made: a fresh plan of the same model and target.
        sets: the linears that engines keep in one type.

    Returns:
        `made` with the edits, without files.

    Raises:
        FewbitsError: a plan of something else, or a type that a tensor cannot have.
    """
    edited.check_made_for(made)
    shapes = [{tensor.name: tensor.shape for tensor in plan.tensors} for plan in (made, edited)]
    if shapes[0] != shapes[1]:
        odd = next(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise FewbitsError(
            f"The edited plan and the model do not have the same tensors, the first such is {odd!r}.",
            "Make the plan anew and change only types.",
        )
    linears = {name for names in sets for name in names}
    wanted = {tensor.name: tensor.codec for tensor in edited.tensors}
    tensors = [_followed(tensor, wanted[tensor.name], chosen, tensor.name in linears) for tensor in made.tensors]
    types = {tensor.name: tensor.codec for tensor in tensors}
    for names in sets:
        other = next((name for name in names if types[name] != types[names[0]]), None)
        if other is not None:
            raise FewbitsError(
                f"The edited plan has {names[0]} as {types[names[0]]} and {other} as {types[other]}, but engines fuse "
                "the two.",
                "Give them one type.",
            )
    if not any(tensor.method not in ("copy", "convert") for tensor in tensors):
        raise FewbitsError("The edited plan keeps every linear layer: nothing would be quantized.")
    return made.model_copy(update={"tensors": tensors, "files": []})


def _followed(tensor: PlannedTensor, to: str, chosen: Target, linear: bool) -> PlannedTensor:
    if to == tensor.codec:
        return tensor
    plain = _plain_type(tensor.source_dtype, chosen.layout)
    if not linear:
        raise FewbitsError(f"{tensor.name} is no linear of a block and cannot be {to}.", f"Leave it {tensor.codec}.")
    if to in (plain, tensor.source_dtype):
        return _as_it_is(tensor.name, tensor.shape, tensor.source_dtype, chosen.layout, True)
    return in_layout(tensor, chosen.layout_of(to), chosen.method, "edited plan")


def plain_dtype(stored: Mapping[str, tuple[tuple[int, ...], str]], layout: Layout) -> str:
    """The type that most of the weights outside of the decoder's linears get: F16 or BF16.

    Args:
        stored: Hugging Face name -> shape and storage type.
    """
    sizes = dict.fromkeys(("F16", "BF16"), 0)
    for name, (shape, dtype) in stored.items():
        if not (re.search(r"\.\d+\..*\.weight$", name) and len(shape) == 2):
            sizes[_plain_type(dtype, layout)] += prod(shape)
    return max(sizes, key=lambda dtype: sizes[dtype])


def _plain_type(dtype: str, layout: Layout) -> str:
    return layout.engine_dtype or (dtype if dtype in ("F16", "BF16") else layout.float_dtype or "BF16")
