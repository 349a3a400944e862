"""Weights and statistics -> codes. A method takes weights and a storage type; it knows no files."""

from fewbits.methods.absmean import AbsMean
from fewbits.methods.aqlm import AQLM
from fewbits.methods.base import METHODS, Factor, Known, Method, method
from fewbits.methods.direct import Convert, RoundToNearest, Search
from fewbits.methods.gptq import GPTQ, factorize
from fewbits.methods.hqq import HQQ
from fewbits.methods.ldlq import LDLQ
from fewbits.methods.quip import QuIP
from fewbits.methods.rescaled import AWQ, RescaledGPTQ, SmoothQuant

__all__ = [
    "AQLM",
    "AWQ",
    "GPTQ",
    "HQQ",
    "LDLQ",
    "METHODS",
    "AbsMean",
    "Convert",
    "Factor",
    "Known",
    "Method",
    "QuIP",
    "RescaledGPTQ",
    "RoundToNearest",
    "Search",
    "SmoothQuant",
    "factorize",
    "method",
]
