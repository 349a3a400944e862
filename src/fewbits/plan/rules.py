"""Which type llama-quantize (llama.cpp 0c1e57098) gives which tensor, as tables.

They read: for this preset, tensors of this role take the first type whose conditions all hold, otherwise the preset's
base type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fewbits.plan.tensors import ATTN_OUT, DOWN, GATE, KEY, QUERY, UP, VALUE, ModelFacts


@dataclass(frozen=True)
class Site:
    """One tensor as the conditions see it: the index among its kind, how many there are, and the model."""

    index: int
    count: int
    facts: ModelFacts
    has_imatrix: bool


def _gqa4(site: Site) -> bool:
    return site.facts.gqa >= 4


def _four_experts(site: Site) -> bool:
    return site.facts.n_expert >= 4


def _eight_experts(site: Site) -> bool:
    return site.facts.n_expert == 8


def _falcon(site: Site) -> bool:
    return site.facts.arch == "falcon"


def _imatrix(site: Site) -> bool:
    return site.has_imatrix


def _no_imatrix(site: Site) -> bool:
    return not site.has_imatrix


def _first_two(site: Site) -> bool:
    return site.index < 2


def _first_four(site: Site) -> bool:
    return site.index < 4


def _first_16th(site: Site) -> bool:
    return site.index < site.count // 16


def _first_8th(site: Site) -> bool:
    return site.index < site.count // 8


def _middle(site: Site) -> bool:
    return site.count // 8 <= site.index < 7 * site.count // 8


def _more_bits(site: Site) -> bool:
    """The first and last eighth and every third layer between."""
    return not _middle(site) or (site.index - site.count // 8) % 3 == 2


BASE = ""
"""In a rule: the preset's base type."""

Rule = tuple[str, tuple[Callable[[Site], bool], ...]]


def _rule(choice: str, *conditions: Callable[[Site], bool]) -> Rule:
    return choice, conditions


def _low_bit(value: str, attn_out: str) -> dict[str, tuple[Rule, ...]]:
    """The 1- and 2-bit codebook presets differ in two types only."""
    return {
        VALUE: (_rule("Q4_K", _gqa4), _rule("Q4_K", _four_experts), _rule(value)),
        KEY: (_rule("Q4_K", _eight_experts),),
        DOWN: (_rule(value, _first_8th),),
        ATTN_OUT: (_rule("Q5_K", _eight_experts), _rule(attn_out)),
    }


_Q5_OF_EIGHT = _rule("Q5_K", _eight_experts)
_IQ4 = {
    VALUE: (_rule("Q5_K", _gqa4),),
    DOWN: (_rule("Q5_K", _first_8th, _no_imatrix),),
    ATTN_OUT: (_Q5_OF_EIGHT,),
}

MIXTURE: Mapping[str, Mapping[str, tuple[Rule, ...]]] = MappingProxyType(
    {
        "IQ1_S": _low_bit("Q2_K", "IQ2_XXS"),
        "IQ1_M": _low_bit("Q2_K", "IQ2_XXS"),
        "IQ2_XXS": _low_bit("Q2_K", BASE),
        "IQ2_XS": _low_bit("Q2_K", BASE),
        "IQ2_S": _low_bit("IQ3_S", "IQ3_S"),
        "IQ2_M": _low_bit("IQ3_S", "IQ3_S"),
        "Q2_K": {
            VALUE: (_rule("Q4_K", _gqa4), _rule("Q3_K")),
            DOWN: (_rule("Q3_K"),),
            ATTN_OUT: (_Q5_OF_EIGHT, _rule("Q3_K")),
        },
        "Q2_K_S": {VALUE: (_rule("Q4_K", _gqa4),), DOWN: (_rule("Q4_K", _first_8th),)},
        "IQ3_XXS": {
            VALUE: (_rule("Q4_K", _gqa4), _rule("IQ3_S", _no_imatrix)),
            KEY: (_rule("IQ2_S"),),
            QUERY: (_rule("IQ2_S"),),
            DOWN: (_rule("Q4_K", _first_8th, _no_imatrix), _rule("Q3_K", _no_imatrix)),
            ATTN_OUT: (_Q5_OF_EIGHT, _rule("IQ3_S")),
        },
        "IQ3_XS": {
            VALUE: (_rule("Q4_K", _gqa4),),
            KEY: (_rule("IQ3_XXS"),),
            QUERY: (_rule("IQ3_XXS"),),
            GATE: (_rule("IQ3_XXS", _middle),),
            UP: (_rule("IQ3_XXS", _middle),),
            ATTN_OUT: (_Q5_OF_EIGHT,),
        },
        "IQ3_S": {VALUE: (_rule("Q4_K", _gqa4),), ATTN_OUT: (_Q5_OF_EIGHT,)},
        "IQ3_M": {
            VALUE: (_rule("Q4_K"),),
            DOWN: (_rule("Q4_K", _first_8th), _rule("Q4_K", _eight_experts, _more_bits)),
            ATTN_OUT: (_Q5_OF_EIGHT, _rule("Q4_K")),
        },
        "Q3_K_S": {ATTN_OUT: (_Q5_OF_EIGHT,)},
        "Q3_K_M": {
            VALUE: (_rule("Q5_K", _first_two), _rule("Q4_K")),
            DOWN: (
                _rule("Q5_K", _first_16th),
                _rule("Q4_K", _more_bits),
                _rule(BASE, _falcon),
                _rule("Q4_K"),
            ),
            ATTN_OUT: (_Q5_OF_EIGHT, _rule("Q4_K")),
        },
        "Q3_K_L": {
            VALUE: (_rule("Q5_K"),),
            DOWN: (_rule("Q4_K", _falcon), _rule("Q5_K")),
            ATTN_OUT: (_rule(BASE, _eight_experts), _rule("Q5_K")),
        },
        "Q4_K_S": {
            VALUE: (_rule("Q5_K", _first_four),),
            DOWN: (_rule(BASE, _falcon), _rule("Q5_K", _first_8th)),
            ATTN_OUT: (_Q5_OF_EIGHT,),
        },
        "Q4_K_M": {
            VALUE: (_rule("Q6_K", _more_bits),),
            DOWN: (
                _rule("Q6_K", _falcon, _first_16th),
                _rule("Q5_K", _falcon, _more_bits),
                _rule(BASE, _falcon),
                _rule("Q6_K", _more_bits),
            ),
            ATTN_OUT: (_Q5_OF_EIGHT,),
        },
        "Q5_K_M": {VALUE: (_rule("Q6_K", _more_bits),), DOWN: (_rule("Q6_K", _more_bits),)},
        "IQ4_NL": _IQ4,
        "IQ4_XS": _IQ4,
        "Q4_0": {DOWN: (_rule("Q4_1", _first_8th, _imatrix),)},
        "Q5_0": {DOWN: (_rule("Q5_1", _first_8th, _imatrix),)},
    }
)

LOW_BIT = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
OUTPUT_TYPES = {**dict.fromkeys((*LOW_BIT, "IQ3_XXS"), "Q5_K"), "Q8_0": "Q8_0", "MXFP4_MOE": "Q8_0"}
EMBEDDING_TYPES = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), "Q2_K"),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "IQ3_S"),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), "Q4_K"),
}

FALLBACKS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
        **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
        **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
        **{"Q1_0": "Q4_0", "NVFP4": "IQ4_NL"},
    }
)
"""The type with smaller blocks that stands in where a row is no multiple of the wanted one's; then F16."""


def types_of(preset: str, base: str) -> tuple[str, ...]:
    """Every type that a preset gives to some tensor of some model whose rows divide."""
    if not base or base in ("F32", "F16", "BF16"):
        return (base,) if base else ()
    named = {base, OUTPUT_TYPES.get(preset, "Q6_K"), EMBEDDING_TYPES.get(preset, base)}
    for rules in MIXTURE.get(preset, {}).values():
        named.update(choice for choice, _ in rules if choice != BASE)
    return tuple(sorted(named))
