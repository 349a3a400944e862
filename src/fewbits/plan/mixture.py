"""Which tensor gets which type: llama-quantize's choice (llama.cpp 0c1e57098), by the tables in `rules`.

What deviates from llama-quantize, always towards doing what was asked:

- an override is obeyed for F32, F16, BF16 and COPY too (llama-quantize drops it without a word), and its pattern
  keeps its case;
- a type for the output or the embeddings that does not divide the row falls back like any other (it aborts);
- Q1_0 and NVFP4 have a fallback (it aborts).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from fewbits.codecs.base import codec
from fewbits.errors import FewbitsError
from fewbits.plan.presets import Preset, tensor_type
from fewbits.plan.presets import preset as find_preset
from fewbits.plan.rules import BASE, EMBEDDING_TYPES, FALLBACKS, LOW_BIT, MIXTURE, OUTPUT_TYPES, Site
from fewbits.plan.tensors import (
    ATTN_OUT,
    DOWN,
    EMBEDDING,
    EMBEDDINGS,
    GATE,
    KEY,
    OUTPUT,
    Q8_OF_ARCH,
    UP,
    VALUE,
    ModelFacts,
    SourceTensor,
    layer_of,
    quantizable,
    role,
)


@dataclass(frozen=True)
class MixtureOptions:
    """What the user can ask for; the names are llama-quantize's.

    Attributes:
        has_imatrix: an importance matrix will be used; some rules ask.
        pure: the preset's base type everywhere.
        tensor_types: (regular expression, type): the first that is found in the name decides.
        output_type: type of output.weight, or of token_embd.weight where it serves as both.
        token_embedding_type: type of token_embd.weight and per_layer_token_embd.weight.
        leave_output: keep output.weight as it is.
        no_fallback: refuse rather than give a tensor another type because its rows do not divide.
    """

    has_imatrix: bool = False
    pure: bool = False
    tensor_types: Sequence[tuple[str, str]] = ()
    output_type: str | None = None
    token_embedding_type: str | None = None
    leave_output: bool = False
    no_fallback: bool = False


@dataclass(frozen=True)
class Choice:
    """The type of one tensor.

    Attributes:
        wanted: the type that its rows do not divide by, where there was one; None without fallback.
        reason: why this type.
    """

    name: str
    codec: str
    wanted: str | None
    reason: str


_COUNTED = (VALUE, DOWN, GATE, UP)


def fallback(wanted: str, columns: int) -> str:
    """The type that a row of this many columns gets when `wanted` is asked for."""
    for candidate in (wanted, FALLBACKS.get(wanted)):
        if candidate is not None and codec(candidate).fits(columns):
            return candidate
    return "F16"


def requires_imatrix(name: str, codec_name: str, preset: str) -> bool:
    """Whether llama-quantize refuses to give this tensor this type without an importance matrix."""
    if name == "output.weight" or name in EMBEDDINGS:
        return False
    if codec_name == "Q2_K":
        return find_preset(preset).name == "Q2_K_S"
    return codec_name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")


class _Mixture:
    """The tables applied to one model; counts the tensors of each role as it goes along."""

    def __init__(self, facts: ModelFacts, names: Sequence[str], preset: Preset, options: MixtureOptions) -> None:
        self.facts = facts
        self.preset = preset
        self.has_imatrix = options.has_imatrix
        self.output_type = options.output_type
        self.tied = "output.weight" not in names
        self.values = sum(role(name) == VALUE for name in names)
        self.seen: Counter[str] = Counter()

    def choose(self, tensor: SourceTensor) -> str:
        """The type this tensor should have, were it for its shape."""
        base, name, what = self.preset.base, self.preset.name, role(tensor.name)
        if any(mark in tensor.name for mark in Q8_OF_ARCH.get(self.facts.arch, ())):
            return "Q8_0"
        if what == OUTPUT or (what == EMBEDDING and self.tied):
            if self.output_type is not None:
                return tensor_type(self.output_type, "the output tensor")
            if self.facts.arch == "falcon" or not codec(base).fits(tensor.shape[-1]):
                return "Q8_0"
            return OUTPUT_TYPES.get(name, "Q6_K")
        if name == "MXFP4_MOE":
            expert = len(tensor.shape) > 2 and tensor.shape[-3] > 1
            if self.facts.arch == "bailingmoe3":  # its latent attention has 3-D tensors too
                expert = expert and what in (UP, GATE, DOWN)
            return "MXFP4" if expert else "Q8_0"
        if what == EMBEDDING:
            return EMBEDDING_TYPES.get(name, base)
        return self._from_table(tensor, what) or base

    def _from_table(self, tensor: SourceTensor, what: str) -> str:
        """The first rule that holds, or BASE."""
        low_bit = self.preset.name in LOW_BIT
        site = self._site(tensor, what, low_bit)
        if what in (VALUE, KEY) and site.facts.n_expert == 8 and not low_bit:
            return "Q8_0"
        if what == ATTN_OUT and self.facts.arch == "falcon" and not low_bit:
            return "Q4_K" if self.preset.name == "Q3_K_L" else BASE
        rules = MIXTURE.get(self.preset.name, {}).get(what, ())
        found = next((choice for choice, conditions in rules if all(holds(site) for holds in conditions)), BASE)
        if what == VALUE and not low_bit and self.facts.is_70b and (found or self.preset.base) in ("Q3_K", "Q4_K"):
            return "Q5_K"  # its 8 query heads share a value: a fifth bit costs next to nothing
        return found

    def _site(self, tensor: SourceTensor, what: str, low_bit: bool) -> Site:
        index = self.seen[what]
        if what in _COUNTED:
            self.seen[what] += 1
        if what in (DOWN, GATE, UP) and self.facts.n_expert > 1 and not low_bit:
            index = layer_of(tensor.name)  # with experts, several tensors of a role share a layer
            if not 0 <= index < self.facts.n_layer:
                raise FewbitsError(
                    f"Tensor {tensor.name!r} is in no layer of a model of {self.facts.n_layer}.",
                    "Check the model's block_count.",
                )
        return Site(index, self.values if what == VALUE else self.facts.n_layer, self.facts, self.has_imatrix)


def choose_types(
    facts: ModelFacts, tensors: Sequence[SourceTensor], preset: str, options: MixtureOptions | None = None
) -> list[Choice]:
    """Choose every tensor's type, as llama-quantize would.

    Args:
        facts: of the model.
        tensors: all of the model's, in any order.
        preset: name, alias or number of a preset, e.g. `Q4_K_M`.
        options: what the user asked for besides.

    Returns:
        One choice a tensor, in the order of `tensors`.

    Raises:
        FewbitsError: unknown preset or type, bad regular expression, two tensors of one name, or a fallback
            where `options.no_fallback` forbids it.
    """
    options = options or MixtureOptions()
    chosen_preset = find_preset(preset)
    overrides = compile_overrides(options.tensor_types)
    by_name = {tensor.name: tensor for tensor in tensors}
    if len(by_name) != len(tensors):
        twice = next(name for name, n in Counter(t.name for t in tensors).items() if n > 1)
        raise FewbitsError(f"There are two tensors named {twice!r}.", "The model is damaged: fetch it again.")
    mixture = _Mixture(facts, list(by_name), chosen_preset, options)
    choices = {
        name: _choose(by_name[name], facts, chosen_preset, options, overrides, mixture)
        for name in sorted(by_name, key=lambda name: (layer_of(name), name.encode()))
    }
    in_order = [choices[tensor.name] for tensor in tensors]
    if options.no_fallback:
        _refuse_fallbacks(tensors, in_order)
    return in_order


Overrides = Sequence[tuple[re.Pattern[str], str]]


def compile_overrides(tensor_types: Sequence[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    """Check the user's (regular expression, type) pairs.

    Raises:
        FewbitsError: names the pair.
    """
    compiled = []
    for pattern, wanted in tensor_types:
        if not pattern:
            raise FewbitsError(f"The override '={wanted}' has no pattern.", "Write REGEX=TYPE, e.g. ffn_down=Q6_K.")
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise FewbitsError(
                f"The override {pattern!r} is not a regular expression: {error}.",
                r"Escape special characters with a backslash, e.g. blk\.0\.attn_q.",
            ) from None
        compiled.append((regex, tensor_type(wanted, f"the override {pattern!r}")))
    return compiled


def _choose(
    tensor: SourceTensor,
    facts: ModelFacts,
    preset: Preset,
    options: MixtureOptions,
    overrides: Overrides,
    mixture: _Mixture,
) -> Choice:
    what = role(tensor.name)
    if not quantizable(tensor.name, tensor.shape, facts.arch):
        return Choice(tensor.name, tensor.dtype, None, "never quantized")
    if options.leave_output and what == OUTPUT:
        return Choice(tensor.name, tensor.dtype, None, "output left as it is")
    wanted, reason = _wanted(tensor, what, preset, options, overrides, mixture)
    got = fallback(wanted, tensor.shape[-1]) if wanted != tensor.dtype else wanted
    if got == wanted:
        return Choice(tensor.name, got, None, reason)
    return Choice(tensor.name, got, wanted, f"shape fallback from {wanted} ({reason})")


def _wanted(
    tensor: SourceTensor, what: str, preset: Preset, options: MixtureOptions, overrides: Overrides, mixture: _Mixture
) -> tuple[str, str]:
    """The type to give a quantizable tensor if its shape allows, and why."""
    override = next(((regex, to) for regex, to in overrides if regex.search(tensor.name)), None)
    # per_layer_token_embd is a large table of its own: an override that names it goes before the embeddings' type
    named = override is not None and tensor.name == "per_layer_token_embd.weight"
    if options.token_embedding_type is not None and what == EMBEDDING and not named:
        return tensor_type(options.token_embedding_type, "the token embeddings"), "token embedding type"
    if options.output_type is not None and what == OUTPUT:
        return tensor_type(options.output_type, "the output tensor"), "output type"
    if override is not None:
        return override[1], f"override {override[0].pattern!r}"
    if not preset.quantized:
        return preset.base or tensor.dtype, "base type" if preset.base else "copied"
    if options.pure:
        return preset.base, "base type"
    chosen = mixture.choose(tensor)
    return chosen, "base type" if chosen == preset.base else "mixture"


def _refuse_fallbacks(tensors: Sequence[SourceTensor], choices: Sequence[Choice]) -> None:
    hit = [(tensor, choice) for tensor, choice in zip(tensors, choices, strict=True) if choice.wanted is not None]
    if not hit:
        return
    share = sum(prod(tensor.shape) for tensor, _ in hit) / max(1, sum(prod(tensor.shape) for tensor in tensors))
    some = ", ".join(f"{t.name} ({t.shape[-1]} columns: {c.wanted} -> {c.codec})" for t, c in hit[:3])
    raise FewbitsError(
        f"{len(hit)} of {len(tensors)} tensors, {share:.1%} of the weights, do not fit the wanted type: {some}"
        f"{', ...' if len(hit) > 3 else ''}.",
        "Choose a target with blocks of 32 (Q8_0, Q5_0, IQ4_NL, Q4_0), override these tensors' types, "
        "or allow the fallback.",
    )
