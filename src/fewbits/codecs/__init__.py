"""Storage types: numbers <-> bits. Importing this package fills the registry."""

from fewbits.codecs import (
    few_levels,
    floats,
    iquants_codebook,
    iquants_ternary,
    kquants_asymmetric,
    kquants_symmetric,
    legacy_asymmetric,
    legacy_symmetric,
    nonuniform,
)
from fewbits.codecs.base import CODECS, Bytes, Codec, Floats, codec

__all__ = [
    "CODECS",
    "Bytes",
    "Codec",
    "Floats",
    "codec",
    "few_levels",
    "floats",
    "iquants_codebook",
    "iquants_ternary",
    "kquants_asymmetric",
    "kquants_symmetric",
    "legacy_asymmetric",
    "legacy_symmetric",
    "nonuniform",
]
