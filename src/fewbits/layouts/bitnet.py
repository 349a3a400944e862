"""BitNet b1.58 checkpoints (transformers 5.23, integrations/bitnet.py): weights of -1, 0 and 1, one scale a matrix.

A module of out = N and in = K has `weight` uint8 [N/4, K] and `weight_scale` [1]. Byte row r holds rows r, r + N/4,
r + N/2 and r + 3N/4 in bits 0-1, 2-3, 4-5 and 6-7, as level + 1. The two linear classes of transformers take the scale
for different things: `autobitlinear` multiplies by it, `bitlinear` divides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from fewbits.codecs.base import Floats
from fewbits.codecs.scaled import Quantized, Scaled
from fewbits.errors import FewbitsError
from fewbits.layouts.base import Arrays, Layout, Part
from fewbits.layouts.values import DAMAGED, FLOAT_TYPES, from_stored, get

PER_BYTE = 4
CLASSES = {
    "autobitlinear": "levels -1, 0, 1 and one scale a matrix: for models trained so (BitNet b1.58)",
    "bitlinear": "the same for transformers' older class, which divides by the scale",
}
TERNARY = Scaled("INT", 2, (0, 0), "middle", "F32")
"""Symmetric integers of two bits with a float32 scale do without the lowest code: -1, 0 and 1 are left."""


@dataclass(frozen=True)
class BitNet(Layout):
    """One of the two conventions.

    Attributes:
        linear_class: a key of `CLASSES`.
    """

    name: ClassVar[str] = "bitnet"
    quant_method: ClassVar[str] = "bitnet"
    markers: ClassVar[tuple[str, ...]] = (".weight_scale",)
    methods: ClassVar[tuple[str, ...]] = ("absmean",)

    linear_class: str = "autobitlinear"
    type: Scaled = TERNARY

    @property
    def activations(self) -> Literal["float", "dynamic", "static"]:
        return "dynamic"

    @classmethod
    def examples(cls) -> Mapping[str, str]:
        return CLASSES

    @classmethod
    def from_spec(cls, spec: str) -> BitNet:
        if spec not in CLASSES:
            raise FewbitsError(f"Unknown target 'bitnet:{spec}'.", f"Take bitnet:{' or bitnet:'.join(CLASSES)}.")
        return cls(spec)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BitNet:
        if config.get("quantization_mode", "offline") != "offline":
            raise FewbitsError(
                "quantization_config: the weights are floats, and engines round them to three levels at every pass "
                f"(quantization_mode {config['quantization_mode']!r}).",
                "Delete quantization_config from config.json and quantize with the target bitnet, which rounds alike.",
            )
        if config.get("use_rms_norm"):
            raise FewbitsError(
                "quantization_config: use_rms_norm adds norms to the linears, which is not supported.",
                "Take a model whose own code has the norms.",
            )
        linear_class = config.get("linear_class", "bitlinear")
        if not isinstance(linear_class, str) or linear_class not in CLASSES:
            raise FewbitsError(f"quantization_config: linear_class is {linear_class!r}.", "Mend config.json.")
        return cls(linear_class)

    def check(self, shape: tuple[int, int]) -> None:
        # transformers makes room for N // 4 rows of bytes, its packing makes ceil(N / 4): such files do not load
        if shape[0] % PER_BYTE or min(shape) < 1:
            raise FewbitsError(
                f"BitNet packs {PER_BYTE} outputs in a byte, and these are {shape[0]}.",
                "Leave this tensor as it is (--keep), or take the GGUF preset TQ2_0.",
            )

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        return {".weight": Part("U8", (shape[0] // PER_BYTE, shape[1])), ".weight_scale": Part("F32", (1,))}

    def pack(
        self, matrix: Quantized, g_idx: npt.NDArray[np.integer] | None = None, input_peak: float | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        rows, columns = matrix.codes.shape
        self.check((rows, columns))
        quarters = (matrix.codes - np.uint8(1)).reshape(PER_BYTE, rows // PER_BYTE, columns)
        packed = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
        scale = matrix.scales.reshape(1).astype(np.float32)
        return {".weight": packed, ".weight_scale": scale if self._multiplies else np.float32(1) / scale}

    @property
    def _multiplies(self) -> bool:
        return self.linear_class == "autobitlinear"

    def holds(self, parts: Mapping[str, Part]) -> bool:
        return super().holds(parts) and ".weight" in parts

    def shape_of(self, parts: Mapping[str, Part]) -> tuple[int, int]:
        weight = get(parts, ".weight")
        scale = get(parts, ".weight_scale", len(parts[".weight_scale"].shape) if ".weight_scale" in parts else 1)
        if weight.dtype != "U8" or scale.dtype not in FLOAT_TYPES or prod(scale.shape) != 1:
            raise FewbitsError(
                f".weight is {weight.dtype} {list(weight.shape)} and .weight_scale {scale.dtype} {list(scale.shape)}, "
                "where bytes and one number belong.",
                DAMAGED,
            )
        return PER_BYTE * weight.shape[0], weight.shape[1]

    def unpack(self, arrays: Arrays, shape: tuple[int, int]) -> Floats:
        packed = arrays[".weight"]
        if (packed & packed >> 1 & 0x55).any():
            raise FewbitsError(".weight holds the code 3, which stands for no level.", DAMAGED)
        scale = from_stored(arrays[".weight_scale"], ".weight_scale").reshape(1)
        with np.errstate(divide="ignore"):
            scale = scale if self._multiplies else np.float32(1) / scale
        if not np.isfinite(scale[0]):
            raise FewbitsError(".weight_scale is 0, and weights are divided by it.", DAMAGED)
        quarters = [packed >> shift & 3 for shift in (0, 2, 4, 6)]
        return Quantized(self.type, np.concatenate(quarters) + np.uint8(1), scale.reshape(1, 1)).decode()

    def config(self, kept: Sequence[str], quantized: Sequence[str] = ()) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "linear_class": self.linear_class,
            "quantization_mode": "offline",
            "modules_to_not_convert": list(kept),
        }
