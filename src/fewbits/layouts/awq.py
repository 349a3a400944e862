"""AWQ checkpoints in AutoAWQ's GEMM layout, which vLLM reads and transformers through gptqmodel.

A module of in = K, out = N and G groups has `qweight` int32 [K, N/8] and `qzeros` int32 [G, N/8], eight 4-bit codes of
neighbouring outputs a word in the order of the kernel's lanes, and `scales` float16 [G, N].
weight[n, k] = scales[k / group, n] * (code - zero); zeros are stored as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fewbits.codecs.packing import pack_awq, transposed, unpack_awq
from fewbits.codecs.scaled import Quantized, Scaled
from fewbits.errors import FewbitsError
from fewbits.layouts.base import Arrays, Layout, Part
from fewbits.layouts.values import GROUPS, compare, from_stored, get, integers, nearest_group, setting, to_stored

_SPEC = re.compile(r"w4g(-1|\d+)")


@dataclass(frozen=True)
class AWQ(Layout):
    """4-bit integers with zero points in groups along the inputs."""

    name: ClassVar[str] = "awq"
    quant_method: ClassVar[str] = "awq"
    markers: ClassVar[tuple[str, ...]] = (".qweight",)
    float_dtype: ClassVar[str] = "F16"
    min_zero: ClassVar[int] = 0

    type: Scaled

    @classmethod
    def examples(cls) -> Mapping[str, str]:
        return {
            "w4g128": "4 bits with zero points, groups of 128 (also 64, 32)",
            "w4g-1": "one scale and zero point a row",
        }

    @classmethod
    def from_spec(cls, spec: str) -> AWQ:
        found = _SPEC.fullmatch(spec)
        if found and int(found[1]) in (-1, *GROUPS):
            return cls(integers(4, int(found[1]), False, "F16"))
        raise FewbitsError(
            f"Unknown target 'awq:{spec}'.",
            "Take awq:w4g{32,64,128,-1}, e.g. awq:w4g128: its kernels have 4 bits only.",
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AWQ:
        # AutoAWQ's own quant_config.json has the older names
        bits = setting(config, "bits" if "bits" in config else "w_bit", 4)
        group = setting(config, "group_size" if "group_size" in config else "q_group_size", 128)
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        zero_point = config.get("zero_point", True)
        if bits != 4 or version != "gemm" or zero_point is not True or group == 0 or group < -1:
            raise FewbitsError(
                f"quantization_config: AWQ with {bits} bits, group_size {group}, version {version!r} and zero_point "
                f"{zero_point!r} cannot be read.",
                "Known are 4 bits with zero points in version gemm.",
            )
        return cls(integers(4, group, False, "F16"))

    @property
    def group(self) -> int:
        """As in configurations: -1 for the whole row."""
        return self.type.block[1] or -1

    def check(self, shape: tuple[int, int]) -> None:
        rows, columns = shape
        if self.group > 0 and columns % self.group:
            raise FewbitsError(
                f"Rows of {columns} are no multiple of the group {self.group}.",
                f"Take awq:w4g{nearest_group(columns) or -1}.",
            )
        if rows % 8:
            raise FewbitsError(
                f"awq:w4g{self.group} packs 8 outputs into a word, and {rows} outputs are no multiple of that.",
                "Take ct:w4a16, which has no such words, or keep this tensor as it is.",
            )

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        rows, columns = shape
        groups = columns // self.group if self.group > 0 else 1
        return {
            ".qweight": Part("I32", (columns, rows // 8)),
            ".qzeros": Part("I32", (groups, rows // 8)),
            ".scales": Part("F16", (groups, rows)),
        }

    def pack(
        self, matrix: Quantized, g_idx: npt.NDArray[np.integer] | None = None, input_peak: float | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        zeros = np.full(matrix.scales.shape, 8, np.float32) if matrix.zeros is None else matrix.zeros
        return {
            ".qweight": pack_awq(transposed(matrix.codes)),
            ".qzeros": pack_awq(transposed(zeros.astype(np.uint8))),
            ".scales": to_stored(matrix.scales.T, "F16"),
        }

    def shape_of(self, parts: Mapping[str, Part]) -> tuple[int, int]:
        columns, words = get(parts, ".qweight").shape
        if self.group > 0 and columns % self.group:
            raise FewbitsError(f".qweight has rows of {columns}, no multiple of the group {self.group}.")
        compare(parts, self.parts((8 * words, columns)))
        return 8 * words, columns

    def unpack(self, arrays: Arrays, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
        codes = transposed(unpack_awq(arrays[".qweight"]))
        zeros = transposed(unpack_awq(arrays[".qzeros"])).astype(np.float32)
        scales = np.ascontiguousarray(from_stored(arrays[".scales"], ".scales").T)
        return Quantized(self.type, codes, scales, zeros).decode()

    def config(self, kept: Sequence[str], quantized: Sequence[str] = ()) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group,
            "zero_point": True,
            "version": "gemm",
            "format": "gemm",
            "modules_to_not_convert": list(kept) or None,
        }

    def extra_files(self, kept: Sequence[str]) -> dict[str, dict[str, Any]]:
        # AutoAWQ's own file, which vLLM falls back to
        names = {"w_bit": 4, "q_group_size": self.group, "zero_point": True, "version": "GEMM"}
        return {"quant_config.json": {**names, "modules_to_not_convert": list(kept) or None}}
