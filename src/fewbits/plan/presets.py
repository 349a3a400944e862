"""The named presets of llama-quantize, as data: base type, file type and what a person should expect."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from fewbits.errors import FewbitsError
from fewbits.plan.rules import types_of


@dataclass(frozen=True)
class Preset:
    """One name that a user can ask for.

    Attributes:
        name: canonical, as llama-quantize prints it.
        base: storage type of most tensors; empty for COPY.
        file_type: value of `general.file_type` (llama.h, LLAMA_FTYPE_*); None keeps the source's.
        bits_per_weight: of a whole file for the shapes of Llama 3 8B with an imatrix: what the name means in practice.
            A model whose rows are no multiple of 256 gets more. None where it depends on the source.
        needs_imatrix: llama-quantize refuses to make it without an imatrix.
        summary: one line for humans.
    """

    name: str
    base: str
    file_type: int | None
    bits_per_weight: float | None
    needs_imatrix: bool
    summary: str

    @property
    def quantized(self) -> bool:
        """Whether the base type has blocks, so that the mixture rules apply."""
        return self.base != "" and self.base not in FLOAT_TYPES

    @property
    def types(self) -> tuple[str, ...]:
        """Every type that some tensor gets from it, shape fallbacks apart."""
        return types_of(self.name, self.base)


FLOAT_TYPES = ("F32", "F16", "BF16")
"""Types that hold any row and are plain numbers."""

TENSOR_TYPES = (
    *FLOAT_TYPES,
    *("Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "NVFP4"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0"),
)
"""Types that a weight in a GGUF file may have."""

_PRESETS = (
    # name, base, file type, bits per weight, needs imatrix, summary
    Preset("F32", "F32", 0, 32.0, False, "32-bit floating point: a working format, not for distribution"),
    Preset("F16", "F16", 1, 16.0, False, "half precision; bfloat16 weights beyond +-65504 would overflow"),
    Preset("BF16", "BF16", 32, 16.0, False, "bfloat16: what most models are published in, unchanged"),
    Preset("Q8_0", "Q8_0", 7, 8.5, False, "practically lossless, half the size of bfloat16"),
    Preset("Q6_K", "Q6_K", 18, 6.56, False, "very close to lossless"),
    Preset("Q5_K_M", "Q5_K", 17, 5.7, False, "small loss; more bits for attention values and half of ffn_down"),
    Preset("Q5_K_S", "Q5_K", 16, 5.57, False, "small loss, 5 bits throughout"),
    Preset("Q5_1", "Q5_1", 9, 6.04, False, "old 5-bit type with offset; Q5_K is better at the same size"),
    Preset("Q5_0", "Q5_0", 8, 5.59, False, "old 5-bit type; takes rows that are only a multiple of 32"),
    Preset("Q4_K_M", "Q4_K", 15, 4.89, False, "the usual choice; 6 bits for attention values and half of ffn_down"),
    Preset("Q4_K_S", "Q4_K", 14, 4.67, False, "4 bits nearly throughout, a little smaller than Q4_K_M"),
    Preset("Q4_1", "Q4_1", 3, 5.1, False, "old 4-bit type with offset; Q4_K is better at a smaller size"),
    Preset("Q4_0", "Q4_0", 2, 4.65, False, "old 4-bit type; simple and fast, more loss than Q4_K_S at the same size"),
    Preset("IQ4_NL", "IQ4_NL", 25, 4.65, False, "4 bits on a non-uniform grid; takes rows that are a multiple of 32"),
    Preset("IQ4_XS", "IQ4_XS", 30, 4.42, False, "4 bits on a non-uniform grid, smaller than Q4_K_S at similar loss"),
    Preset("MXFP4_MOE", "MXFP4", 38, 8.5, False, "for mixtures of experts: experts in MXFP4, everything else in Q8_0"),
    Preset("Q3_K_L", "Q3_K", 13, 4.3, False, "3 bits, 5 for attention values, outputs and ffn_down"),
    Preset("Q3_K_M", "Q3_K", 12, 4.0, False, "3 bits, 4 to 5 for attention values, outputs and ffn_down"),
    Preset("Q3_K_S", "Q3_K", 11, 3.64, False, "3 bits throughout: visible loss"),
    Preset("IQ3_M", "IQ3_S", 27, 3.76, False, "3 bits from a codebook, 4 for sensitive tensors"),
    Preset("IQ3_S", "IQ3_S", 26, 3.66, False, "3 bits from a codebook"),
    Preset("IQ3_XS", "IQ3_S", 22, 3.5, True, "3 bits from a codebook, fewer in the middle layers"),
    Preset("IQ3_XXS", "IQ3_XXS", 23, 3.25, True, "3 bits from a small codebook"),
    Preset("Q2_K", "Q2_K", 10, 3.16, False, "2 bits with 3 to 4 in sensitive tensors: strong loss"),
    Preset("Q2_K_S", "Q2_K", 21, 2.97, True, "2 bits nearly throughout: strong loss"),
    Preset("IQ2_M", "IQ2_S", 29, 2.93, True, "2 bits from a codebook, more for sensitive tensors"),
    Preset("IQ2_S", "IQ2_XS", 28, 2.74, True, "2 bits from a codebook, more for sensitive tensors"),
    Preset("IQ2_XS", "IQ2_XS", 20, 2.59, True, "2 bits from a codebook: heavy loss"),
    Preset("IQ2_XXS", "IQ2_XXS", 19, 2.38, True, "2 bits from a small codebook: heavy loss"),
    Preset("IQ1_M", "IQ1_M", 31, 2.15, True, "under 2 bits: only for very large models"),
    Preset("IQ1_S", "IQ1_S", 24, 2.0, True, "about 1.6 bits: only for very large models"),
    Preset("Q2_0", "Q2_0", 41, 2.68, False, "groups of 64 at four levels: for models trained to them"),
    Preset("Q1_0", "Q1_0", 40, 1.48, False, "groups of 128 signs: for models trained to one bit"),
    Preset("TQ2_0", "TQ2_0", 37, 2.52, False, "ternary in 2 bits: for models trained to three levels"),
    Preset("TQ1_0", "TQ1_0", 36, 2.19, False, "ternary in 1.7 bits: for models trained to three levels"),
    Preset("GGUF", "", None, None, False, "any mixture of types: the least loss within --size, --bpw or --fit"),
    Preset("COPY", "", None, None, False, "every tensor as it is in the source; only overrides change a type"),
)

PRESETS: MappingProxyType[str, Preset] = MappingProxyType({p.name: p for p in _PRESETS})
ALIASES: MappingProxyType[str, str] = MappingProxyType({"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"})

_BY_FILE_TYPE = {str(p.file_type): p for p in _PRESETS if p.file_type is not None}


def preset(name: str) -> Preset:
    """The preset of this name, alias or LLAMA_FTYPE number, whatever the case.

    Raises:
        FewbitsError: unknown; the message lists the known ones.
    """
    wanted = name.strip().upper()
    wanted = ALIASES.get(wanted, wanted)
    found = PRESETS.get(wanted) or _BY_FILE_TYPE.get(wanted)
    if found is None:
        raise FewbitsError(f"Unknown target {name!r}.", f"Known: {', '.join((*PRESETS, *ALIASES))}.")
    return found


def tensor_type(name: str, what: str) -> str:
    """The canonical name of a type that a tensor in a GGUF file may have.

    Args:
        what: what asked for it, for the message, e.g. "the output tensor".

    Raises:
        FewbitsError: unknown; the message lists the known ones.
    """
    wanted = name.strip().upper()
    if wanted not in TENSOR_TYPES:
        more = " (a mixture, not a type)" if wanted in PRESETS or wanted in ALIASES else ""
        raise FewbitsError(f"Unknown type {name!r}{more} for {what}.", f"Known: {', '.join(TENSOR_TYPES)}.")
    return wanted
