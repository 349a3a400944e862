"""Model families: the same model in Hugging Face's and in GGUF's terms, from headers alone."""

from fewbits.arch.config import REST, canonical, config_from_gguf, gguf_metadata, gguf_notes
from fewbits.arch.families import FAMILIES, Family, Key, Role, ScalePair, family_of, family_of_gguf
from fewbits.arch.shapes import check_shapes
from fewbits.arch.tensors import (
    DecoderLinear,
    GGUFTensor,
    HFTensor,
    decoder_linears,
    gguf_tensors,
    head_source,
    hf_tensors,
)

__all__ = [
    "FAMILIES",
    "REST",
    "DecoderLinear",
    "Family",
    "GGUFTensor",
    "HFTensor",
    "Key",
    "Role",
    "ScalePair",
    "canonical",
    "check_shapes",
    "config_from_gguf",
    "decoder_linears",
    "family_of",
    "family_of_gguf",
    "gguf_metadata",
    "gguf_notes",
    "gguf_tensors",
    "head_source",
    "hf_tensors",
]
