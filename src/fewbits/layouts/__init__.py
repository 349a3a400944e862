"""How ecosystems store quantized weights. Importing this package fills the registry."""

from fewbits.layouts import aqlm, awq, bitnet, bitsandbytes, compressed_tensors, exl2, exl3, fp8, gptq, hqq, onnx, quip
from fewbits.layouts.base import LAYOUTS, Arrays, Layout, Made, Part

__all__ = [
    "LAYOUTS",
    "Arrays",
    "Layout",
    "Made",
    "Part",
    "aqlm",
    "awq",
    "bitnet",
    "bitsandbytes",
    "compressed_tensors",
    "exl2",
    "exl3",
    "fp8",
    "gptq",
    "hqq",
    "onnx",
    "quip",
]
