"""How ecosystems store quantized weights. Importing this package fills the registry."""

from fewbits.layouts import awq, bitsandbytes, compressed_tensors, fp8, gptq, hqq
from fewbits.layouts.base import LAYOUTS, Arrays, Layout, Part

__all__ = [
    "LAYOUTS",
    "Arrays",
    "Layout",
    "Part",
    "awq",
    "bitsandbytes",
    "compressed_tensors",
    "fp8",
    "gptq",
    "hqq",
]
