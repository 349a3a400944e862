"""Weights and statistics -> codes. A method takes weights and a storage type; it knows no files."""

from fewbits.methods.base import METHODS, Factor, Known, Method, method
from fewbits.methods.direct import Convert, RoundToNearest, Search
from fewbits.methods.gptq import GPTQ, factorize
from fewbits.methods.hqq import HQQ
from fewbits.methods.ldlq import LDLQ
from fewbits.methods.rescaled import AWQ, RescaledGPTQ, SmoothQuant

__all__ = [
    "AWQ",
    "GPTQ",
    "HQQ",
    "LDLQ",
    "METHODS",
    "Convert",
    "Factor",
    "Known",
    "Method",
    "RescaledGPTQ",
    "RoundToNearest",
    "Search",
    "SmoothQuant",
    "factorize",
    "method",
]
