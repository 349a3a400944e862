"""Weights as ONNX Runtime's operators take them (1.31, contrib operators MatMulNBits and DynamicQuantizeMatMul).

A module of in = K, out = N in blocks of `g` inputs has
- `weight_Q4` (or `_Q2`, `_Q8`) uint8 [N, K/g, g bits/8]: codes of a block, the first in the low bits of a byte;
- `weight_scales` float32 [N, K/g];
- `weight_zp` uint8 [N, ceil(K/g bits/8)], packed like the codes; without it the zero point is 2^(bits - 1).
With activations quantized as they come: `weight_U8` uint8 [N, K] about a zero point of 128, `weight_scale` float32 [N].
Unsigned, since ORT's kernels for signed weights saturate on CPUs without VNNI.

The tensors lie in safetensors files, which model.onnx refers to by offsets: one copy serves engine and checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from fewbits.codecs.base import Floats
from fewbits.codecs.packing import pack_columns, unpack_columns
from fewbits.codecs.scaled import Quantized, Scaled
from fewbits.codecs.storage import StorageType
from fewbits.errors import FewbitsError
from fewbits.layouts.base import Arrays, Layout, Part
from fewbits.layouts.values import compare, from_stored, get

BITS, BLOCKS = (2, 4, 8), (16, 32, 64, 128, 256)
DYNAMIC_ZERO = 128
"""Zero point of weights beside dynamic activations."""
_SPEC = re.compile(r"(?:int|w)(\d)(?:g(\d{1,3}))?((?:-(?:asym|exact))*)")
_ROW = Scaled("INT", 8, (1, 0), "middle", "F32")


@dataclass(frozen=True)
class Half(StorageType):
    """Plain float16."""

    bits: float = 16

    @property
    def name(self) -> str:
        return "F16"


@dataclass(frozen=True)
class ONNX(Layout):
    """Integers in blocks, or one scale a row with activations quantized as they come, or plain float16.

    Attributes:
        accuracy_level: of MatMulNBits: 4 rounds activations to 8 bits, block by block; 0 computes in float32, on CPUs
            three times as long with 4 bits, a hundred times with others, for which there is no such kernel (1.31).
    """

    name: ClassVar[str] = "onnx"
    quant_method: ClassVar[str] = "onnx"
    markers: ClassVar[tuple[str, ...]] = (*(f".weight_Q{bits}" for bits in BITS), ".weight_U8")
    open_specs: ClassVar[str] = r"g\d{1,3}(-asym|-exact)*"
    widths: ClassVar[tuple[int, ...]] = BITS
    rare_widths: ClassVar[tuple[int, ...]] = (2,)
    fuses: ClassVar[bool] = False
    float_dtype: ClassVar[str] = "F16"

    type: Scaled | Half
    accuracy_level: Literal[0, 4] = 4

    @property
    def engine_dtype(self) -> str:
        return "F16" if isinstance(self.type, Half) else ""

    @property
    def methods(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("convert",) if isinstance(self.type, Half) else ()

    @property
    def usual_head(self) -> int:  # type: ignore[override]
        return 8 if self.block and self.accuracy_level else 16

    @property
    def block(self) -> int:
        """Weights that share a scale; 0 where there are no blocks."""
        return self.type.block[1] if isinstance(self.type, Scaled) else 0

    @property
    def activations(self) -> Literal["float", "dynamic", "static"]:
        return "dynamic" if self.type == _ROW else "float"

    @classmethod
    def examples(cls) -> Mapping[str, str]:
        return {
            "int4": "ONNX for onnxruntime-genai, 4 bits in blocks of 32 (also int2)",
            "int4g64": "in blocks of 64 (16 to 256)",
            "int4-asym": "with zero points",
            "int4-exact": "computed in float32: slower",
            "int8": "8 bits in blocks of 32",
            "dynamic-int8": "8 bits, activations in 8 bits by scales found as they come",
            "fp16": "float16, computed in float32",
        }

    @classmethod
    def from_spec(cls, spec: str) -> ONNX:
        if spec == "fp16":
            return cls(Half())
        if spec == "dynamic-int8":
            return cls(_ROW)
        found = _SPEC.fullmatch(spec)
        if found:
            bits, block, flags = int(found[1]), int(found[2] or 32), found[3].split("-")[1:]
            if bits in BITS and block in BLOCKS and len(set(flags)) == len(flags):
                return cls(_blocks(bits, block, "asym" in flags), 0 if "exact" in flags else 4)
        raise FewbitsError(
            f"Unknown target 'onnx:{spec}'.",
            "Take onnx:int{2,4,8}g{16,32,64,128,256} with -asym or -exact behind it, onnx:dynamic-int8 or onnx:fp16.",
        )

    @classmethod
    def heads(cls) -> Mapping[int, ONNX]:
        return {bits: cls(_blocks(bits, 32, False)) for bits in BITS[1:]}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ONNX:
        return cls(_blocks(4, 32, False))  # modules say themselves what they are

    def check(self, shape: tuple[int, int]) -> None:
        if self.block and shape[1] % self.block:
            fitting = next((block for block in reversed(BLOCKS) if shape[1] % block == 0), 0)
            way_out = f"Take onnx:int{self.type.bits}g{fitting}." if fitting else "Keep this tensor as it is."
            raise FewbitsError(f"Rows of {shape[1]} are no multiple of the block {self.block}.", way_out)

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        rows, columns = shape
        if isinstance(self.type, Half):
            return {".weight": Part("F16", shape)}
        if not self.block:
            return {".weight_U8": Part("U8", shape), ".weight_scale": Part("F32", (rows,))}
        bits, blocks = self.type.bits, columns // self.block
        parts = {
            f".weight_Q{bits}": Part("U8", (rows, blocks, self.block * bits // 8)),
            ".weight_scales": Part("F32", (rows, blocks)),
        }
        if self.type.zero == "integer":
            parts[".weight_zp"] = Part("U8", (rows, -(-blocks * bits // 8)))
        return parts

    def pack(
        self, matrix: Quantized, g_idx: npt.NDArray[np.integer] | None = None, input_peak: float | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        self.check((matrix.codes.shape[0], matrix.codes.shape[1]))
        scales = np.ascontiguousarray(matrix.scales, np.float32)
        if not self.block:
            return {".weight_U8": matrix.codes, ".weight_scale": scales.reshape(-1)}
        assert isinstance(self.type, Scaled)
        rows, bits = matrix.codes.shape[0], self.type.bits
        codes = pack_columns(matrix.codes, bits).view(np.uint8).reshape(rows, scales.shape[1], -1)
        arrays: dict[str, npt.NDArray[Any]] = {f".weight_Q{bits}": codes, ".weight_scales": scales}
        if self.type.zero == "integer":
            assert matrix.zeros is not None
            words = pack_columns(matrix.zeros.astype(np.uint8), bits).view(np.uint8)
            arrays[".weight_zp"] = np.ascontiguousarray(words[:, : -(-scales.shape[1] * bits // 8)])
        return arrays

    def shape_of(self, parts: Mapping[str, Part]) -> tuple[int, int]:
        return self.identify(parts, {})[1]

    def identify(self, parts: Mapping[str, Part], values: Arrays) -> tuple[ONNX, tuple[int, int]]:
        if ".weight_U8" in parts:
            rows, columns = get(parts, ".weight_U8").shape
            found = ONNX(_ROW)
        else:
            bits = next((bits for bits in BITS if f".weight_Q{bits}" in parts), 4)
            rows, blocks, width = get(parts, f".weight_Q{bits}", 3).shape
            block = width * 8 // bits
            if block not in BLOCKS:
                raise FewbitsError(
                    f".weight_Q{bits} has blocks of {block}.", f"Known are {', '.join(map(str, BLOCKS))}."
                )
            columns = blocks * block
            found = replace(self, type=_blocks(bits, block, ".weight_zp" in parts))
        compare(parts, found.parts((rows, columns)))
        return found, (rows, columns)

    def unpack(self, arrays: Arrays, shape: tuple[int, int]) -> Floats:
        assert isinstance(self.type, Scaled)
        if not self.block:
            scales = from_stored(arrays[".weight_scale"], ".weight_scale")
            return Quantized(self.type, np.ascontiguousarray(arrays[".weight_U8"]), scales[:, None]).decode()
        bits, blocks = self.type.bits, shape[1] // self.block
        codes = unpack_columns(arrays[f".weight_Q{bits}"].reshape(shape[0], -1), bits, shape[1])
        zeros = None
        if self.type.zero == "integer":
            zeros = np.ascontiguousarray(unpack_columns(arrays[".weight_zp"], bits, blocks), np.float32)
        scales = from_stored(arrays[".weight_scales"], ".weight_scales")
        return Quantized(self.type, codes, scales, zeros).decode()

    def config(self, kept: Sequence[str], quantized: Sequence[str] = ()) -> dict[str, Any]:
        told: dict[str, Any] = {"quant_method": "onnx", "graph": "model.onnx", "bits": self.type.bits}
        if self.block:
            told |= {"block_size": self.block, "accuracy_level": self.accuracy_level}
        return {**told, "activations": self.activations, "modules_to_not_convert": list(kept)}


def _blocks(bits: int, block: int, zero_points: bool) -> Scaled:
    # float32 scales of symmetric integers would go without the lowest code: they are chosen in float16
    zero, scale = ("integer", "F32") if zero_points else ("middle", "F16")
    return Scaled("INT", bits, (1, block), zero, scale)  # type: ignore[arg-type]
