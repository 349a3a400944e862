"""Native FP8 checkpoints: what DeepSeek-V3 and transformers' `quant_method: fp8` hold.

A module of out = N and in = K has `weight` E4M3 [N, K] and `weight_scale_inv` float32 [N/128, K/128] (rounded up),
which despite its name is multiplied: weight = code * scale of its 128x128 block. Others write one scale or one a row,
or name it `weight_scale`; all of these are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from fewbits.codecs.base import Floats
from fewbits.codecs.scaled import Quantized, Scaled
from fewbits.codecs.scaled_levels import E4M3
from fewbits.errors import FewbitsError
from fewbits.layouts.base import Arrays, Layout, Part
from fewbits.layouts.values import DAMAGED, FLOAT_TYPES, from_stored, get

BLOCK = (128, 128)
SCALES = (".weight_scale_inv", ".weight_scale")


@dataclass(frozen=True)
class FP8(Layout):
    """E4M3 with a scale for each block of 128x128 weights."""

    name: ClassVar[str] = "fp8"
    quant_method: ClassVar[str] = "fp8"
    markers: ClassVar[tuple[str, ...]] = SCALES
    self_describing: ClassVar[bool] = True

    type: Scaled

    @property
    def activations(self) -> Literal["float", "dynamic", "static"]:
        return "dynamic"

    @classmethod
    def examples(cls) -> Mapping[str, str]:
        return {"block128": "E4M3 in blocks of 128x128, as DeepSeek-V3"}

    @classmethod
    def from_spec(cls, spec: str) -> FP8:
        if spec != "block128":
            raise FewbitsError(f"Unknown target 'fp8:{spec}'.", "Take fp8:block128, or ct:fp8 for a scale a row.")
        return cls(Scaled("E4M3", 8, BLOCK, "none", "F32"))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FP8:
        block = config.get("weight_block_size") or BLOCK
        sound = isinstance(block, list | tuple) and len(block) == 2
        if not sound or any(type(n) is not int or n < 1 for n in block):
            raise FewbitsError(f"quantization_config: weight_block_size is {block!r}.", "Mend config.json.")
        return cls(Scaled("E4M3", 8, (block[0], block[1]), "none", "F32"))

    def check(self, shape: tuple[int, int]) -> None:
        # transformers 5.23, where it decodes, takes all blocks for equally large: cut ones at the edges (which are read
        # here, and by vLLM) it refuses or, at 192 rows, silently reads as two blocks of 96
        if shape[0] % BLOCK[0] or shape[1] % BLOCK[1]:
            raise FewbitsError(
                f"{shape[0]} x {shape[1]} weights are no whole blocks of {BLOCK[0]}x{BLOCK[1]}.",
                "Take ct:fp8, which has one scale a row.",
            )

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        return {".weight": Part("F8_E4M3", shape), SCALES[0]: Part("F32", self.type.grid(shape))}

    def pack(
        self, matrix: Quantized, g_idx: npt.NDArray[np.integer] | None = None, input_peak: float | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        return {".weight": matrix.codes, SCALES[0]: np.ascontiguousarray(matrix.scales, np.float32)}

    def shape_of(self, parts: Mapping[str, Part]) -> tuple[int, int]:
        return self.identify(parts, {})[1]

    def identify(self, parts: Mapping[str, Part], values: Arrays) -> tuple[FP8, tuple[int, int]]:
        weight = get(parts, ".weight")
        rows, columns = weight.shape
        suffix = next((name for name in SCALES if name in parts), SCALES[0])
        scale = get(parts, suffix, len(parts[suffix].shape) if suffix in parts else 2)
        blocks = self.type.grid((rows, columns))
        alike = {(1, 1): (0, 0), (rows, 1): (1, 0), blocks: self.type.block}
        # one scale may be of any shape, and one a row may lack its second axis
        grid = (1, 1) if prod(scale.shape) == 1 else (rows, 1) if scale.shape == (rows,) else scale.shape
        if weight.dtype != "F8_E4M3" or scale.dtype not in FLOAT_TYPES or grid not in alike:
            raise FewbitsError(
                f".weight is {weight.dtype} {list(weight.shape)} and {suffix} {scale.dtype} {list(scale.shape)}; "
                f"blocks of {list(self.type.block)} need {list(blocks)}.",
                DAMAGED,
            )
        kind = replace(self.type, block=alike[grid], scale=scale.dtype)  # type: ignore[arg-type]
        return replace(self, type=kind), (rows, columns)

    def unpack(self, arrays: Arrays, shape: tuple[int, int]) -> Floats:
        suffix = next(name for name in SCALES if name in arrays)
        scales = from_stored(arrays[suffix], suffix).reshape(self.type.grid(shape))
        values = E4M3[arrays[".weight"]]
        if self.type.block in ((0, 0), (1, 0)):
            values *= scales
            return values
        high, wide = self.type.block
        for row, line in enumerate(np.repeat(scales, wide, axis=1)[:, : shape[1]]):
            values[row * high : (row + 1) * high] *= line
        return values

    def config(self, kept: Sequence[str], quantized: Sequence[str] = ()) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(self.type.block),
            "modules_to_not_convert": list(kept),
        }
