"""QuIP# checkpoints as quip-sharp stores them, but with every linear by itself; see `codecs.lattice`.

A linear of n inputs and m outputs has `Qidxs` int64 [m, n bits / 64], `SU` float16 [n], `SV` float16 [m], `Wscale`
float32 [] and `codebook_id` int64 []. SU holds the whole scale, so that Wscale, by which readers multiply, is 1.

quip-sharp (read in its commit 1d8f873e) fuses q, k and v as well as gate and up before it quantizes, has model classes
of its own that transformers do not know, and takes Hadamard matrices of other sizes than powers of two from tables: its
files cannot be had without those, and ours are for fewbits' reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fewbits.codecs.base import Floats
from fewbits.codecs.hadamard import factors
from fewbits.codecs.lattice import INPUTS_TOGETHER, NAMES, ROWS_TOGETHER, LatticeCoded, LatticeE8
from fewbits.errors import FewbitsError
from fewbits.layouts.base import Arrays, Layout, Part
from fewbits.layouts.values import compare, from_stored, get

CODEBOOK_IDS = {7: 2, 17: 4, 18: 3}
"""Bits of quip-sharp's codebooks."""


@dataclass(frozen=True)
class QuIP(Layout):
    """Points of the E8 lattice, of one number of bits."""

    name: ClassVar[str] = "quip"
    quant_method: ClassVar[str] = "quip"
    markers: ClassVar[tuple[str, ...]] = (".Qidxs",)
    described_by: ClassVar[tuple[str, ...]] = (".codebook_id",)
    float_dtype: ClassVar[str] = "F16"
    methods: ClassVar[tuple[str, ...]] = ("quip",)
    fuses: ClassVar[bool] = False

    type: LatticeE8

    @classmethod
    def examples(cls) -> Mapping[str, str]:
        return {
            "2": "QuIP#, 2 bits in the E8 lattice: for fewbits alone, no engine reads it",
            "3": "3 bits",
            "4": "4 bits",
        }

    @classmethod
    def from_spec(cls, spec: str) -> QuIP:
        if spec not in map(str, NAMES):
            raise FewbitsError(f"Unknown target 'quip:{spec}'.", "Take quip:2, quip:3 or quip:4.")
        return cls(LatticeE8(int(spec)))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuIP:
        return cls(LatticeE8(2))  # modules say themselves what they are

    def check(self, shape: tuple[int, int]) -> None:
        rows, columns = shape
        if min(shape) < 1 or rows % ROWS_TOGETHER or columns % INPUTS_TOGETHER:
            raise FewbitsError(
                f"QuIP# takes multiples of {INPUTS_TOGETHER} inputs and {ROWS_TOGETHER} outputs, and these are "
                f"{columns} and {rows}.",
                "Take aqlm:2x8g8, or keep this tensor as it is.",
            )
        for size in shape:
            factors(size)

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        rows, columns = shape
        return {
            ".Qidxs": Part("I64", (rows, columns * self.type.bits // 64)),
            ".SU": Part("F16", (columns,)),
            ".SV": Part("F16", (rows,)),
            ".Wscale": Part("F32", ()),
            ".codebook_id": Part("I64", ()),
        }

    def pack(
        self, matrix: LatticeCoded, g_idx: npt.NDArray[np.integer] | None = None, input_peak: float | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        self.check((matrix.sv.size, matrix.su.size))
        codebook = next(known for known, bits in CODEBOOK_IDS.items() if bits == self.type.bits)
        return {
            ".Qidxs": self.type.pack(matrix.codes),
            ".SU": matrix.su,
            ".SV": matrix.sv,
            ".Wscale": np.array(matrix.scale, np.float32),
            ".codebook_id": np.array(codebook, np.int64),
        }

    def shape_of(self, parts: Mapping[str, Part]) -> tuple[int, int]:
        shape = get(parts, ".SV", 1).shape[0], get(parts, ".SU", 1).shape[0]
        compare(parts, self.parts(shape))
        self.check(shape)
        return shape

    def identify(self, parts: Mapping[str, Part], values: Arrays) -> tuple[QuIP, tuple[int, int]]:
        codebook = values.get(".codebook_id", np.zeros(0))
        number = int(codebook.ravel()[0]) if codebook.size == 1 and codebook.dtype.kind == "i" else None
        if number not in CODEBOOK_IDS:
            known = ", ".join(f"{one} ({NAMES[bits]})" for one, bits in CODEBOOK_IDS.items())
            raise FewbitsError(
                f".codebook_id is {'missing or no whole number' if number is None else number}; known are {known}.",
                "Take another version of this model.",
            )
        found = QuIP(LatticeE8(CODEBOOK_IDS[number]))
        return found, found.shape_of(parts)

    def unpack(self, arrays: Arrays, shape: tuple[int, int]) -> Floats:
        su, sv, scale = (from_stored(arrays[suffix], suffix) for suffix in (".SU", ".SV", ".Wscale"))
        codes = self.type.unpack(np.ascontiguousarray(arrays[".Qidxs"], np.int64))
        return LatticeCoded(self.type, codes, su, sv, float(scale.item())).decode()

    def config(self, kept: Sequence[str], quantized: Sequence[str] = ()) -> dict[str, Any]:
        params: dict[str, Any] = {
            "codebook": self.type.name,
            "codesz": 8,
            "fused": False,
            "idx_dtype": "torch.int64",
            "rescale_WH": False,
        }
        if 8 % self.type.bits == 0:
            params["packsz"] = 8 // self.type.bits
        return {"quant_method": "quip", "quip_params": params}
