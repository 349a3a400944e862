"""compressed-tensors checkpoints, as llm-compressor writes them and vLLM and transformers read them.

Integers of 2 to 8 bits (pack-quantized): `weight_packed` int32 [out, in * bits / 32], a dense stream of codes along the
inputs; `weight_scale` [out, groups]; `weight_shape` int64 [2]; with zero points, `weight_zero_point` int32
[out * bits / 32, groups], a stream along the outputs. Eight bits with quantized activations (int-quantized,
float-quantized): `weight` int8 or E4M3 and `weight_scale` [1], [out, 1] or a number a block. Four-bit floats:
`weight_packed` uint8 [out, in / 2], the even input in the low nibble, `weight_scale` E4M3 [out, in / 16] with
`weight_global_scale` float32 [1] that divides it (NVFP4), or E8M0 exponents uint8 [out, in / 32] (MXFP4).
Scales of activations that are kept: `input_scale` [1]; NVFP4's `input_global_scale` float32 [1].

Modules may have schemes of their own: each of `config_groups` names its modules, and a name goes before the class
`Linear` (compressed-tensors 0.20 `match_targets`; vLLM 0.32 `find_matched_target`, where all parts of a fused module
must be named in one scheme).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from fewbits.codecs.base import Floats
from fewbits.codecs.packing import (
    pack_columns,
    pack_nibbles,
    pack_rows,
    unpack_columns,
    unpack_nibbles,
    unpack_rows,
    words_for,
)
from fewbits.codecs.scaled import Codes, Quantized, Scaled
from fewbits.codecs.scaled_levels import E4M3, ladder
from fewbits.errors import FewbitsError
from fewbits.layouts.base import Arrays, Layout, Others, Part
from fewbits.layouts.values import (
    DAMAGED,
    GROUPS,
    compare,
    decode_groups,
    from_stored,
    get,
    integers,
    nearest_group,
    setting,
    to_stored,
)

E4M3_MAX, E2M1_MAX = 448.0, 6.0
_FP8_SCALE = "torch.float8_e4m3fn"

Inputs = Literal["float", "int8-token", "fp8-token", "fp8-group", "fp8-tensor", "fp4-local"]
INPUTS: dict[Inputs, dict[str, Any] | None] = {
    "float": None,
    "int8-token": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    "fp8-token": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    "fp8-group": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True},
    "fp8-tensor": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    "fp4-local": {
        "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local",
        "scale_dtype": _FP8_SCALE,
    },
}  # fmt: skip
"""How engines quantize what a layer gets, in the terms of the configuration; all are symmetric."""
STATIC = {"fp8-tensor": ".input_scale", "fp4-local": ".input_global_scale"}
"""The part that a scale of activations is kept in."""

_FP8_ROWS = Scaled("E4M3", 8, (1, 0), "none", "BF16")
_FP8_TENSOR = replace(_FP8_ROWS, block=(0, 0))
_NVFP4 = Scaled("E2M1", 4, (1, 16), "none", "E4M3")
_MXFP4 = Scaled("E2M1", 4, (1, 32), "none", "E8M0")
FIXED: dict[str, tuple[Scaled, Inputs, str, str]] = {
    "fp8": (_FP8_ROWS, "fp8-token", "float-quantized", "8-bit floats, a scale a row; activations token by token"),
    "fp8-tensor": (_FP8_TENSOR, "fp8-token", "float-quantized", "8-bit floats, one scale a matrix"),
    "fp8-block": (
        replace(_FP8_ROWS, block=(128, 128)), "fp8-group", "float-quantized", "8-bit floats, a scale a 128x128 block",
    ),
    "fp8-static": (_FP8_TENSOR, "fp8-tensor", "float-quantized", "8-bit floats, scales of activations by calibration"),
    "w8a8": (
        Scaled("INT", 8, (1, 0), "middle", "BF16"), "int8-token", "int-quantized",
        "8-bit integers, a scale a row; activations token by token",
    ),
    "nvfp4": (_NVFP4, "float", "nvfp4-pack-quantized", "4-bit floats in groups of 16, activations as they are"),
    "nvfp4a4": (_NVFP4, "fp4-local", "nvfp4-pack-quantized", "4-bit floats, activations too, by calibration"),
    "mxfp4": (_MXFP4, "float", "mxfp4-pack-quantized", "4-bit floats in groups of 32, scales powers of two"),
}  # fmt: skip
"""Targets that are no pattern: storage type, activations, format, and what it is."""
_PACKED = re.compile(r"w([2-8])a16(?:g(\d+))?(-asym)?")
_PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
_FP4 = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
_STRATEGIES = {"tensor": (0, 0), "channel": (1, 0)}


@dataclass(frozen=True)
class CompressedTensors(Layout):
    """One scheme for every quantized layer; what others wrote may have several.

    Attributes:
        inputs: how engines quantize activations; a key of `INPUTS`.
        format: name of the packing in the configuration.
        others: further schemes of the same checkpoint.
        named: modules of the same checkpoint with another scheme, for the configuration.
    """

    name: ClassVar[str] = "ct"
    quant_method: ClassVar[str] = "compressed-tensors"
    markers: ClassVar[tuple[str, ...]] = (".weight_packed", ".weight_scale")
    described_by: ClassVar[tuple[str, ...]] = (".weight_shape",)
    min_zero: ClassVar[int] = 0
    open_specs: ClassVar[str] = r"a16(g\d+)?(-asym)?"
    widths: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    rare_widths: ClassVar[tuple[int, ...]] = (2, 3)

    type: Scaled
    inputs: Inputs = "float"
    format: str = "pack-quantized"
    others: tuple[CompressedTensors, ...] = ()
    named: Others = ()

    @property
    def engine_dtype(self) -> str:
        return "BF16" if self.format in _FP4 else ""

    @property
    def activations(self) -> Literal["float", "dynamic", "static"]:
        if self.inputs in STATIC:
            return "static"
        return "float" if self.inputs == "float" else "dynamic"

    @classmethod
    def examples(cls) -> Mapping[str, str]:
        return {
            "w4a16g128": "4-bit integers, groups of 128 (also 64, 32), symmetric",
            "w4a16": "4-bit integers, one scale a row",
            "w4a16g128-asym": "with zero points: vLLM only",
            **{f"w{bits}a16g128": f"{bits}-bit integers" for bits in (8, 3, 2)},
            **{name: summary for name, (_, _, _, summary) in FIXED.items()},
        }

    @classmethod
    def from_spec(cls, spec: str) -> CompressedTensors:
        if spec in FIXED:
            return cls(*FIXED[spec][:3])
        found = _PACKED.fullmatch(spec)
        if found and (found[2] is None or int(found[2]) in GROUPS):
            return cls(integers(int(found[1]), int(found[2] or -1), not found[3], "BF16"))
        raise FewbitsError(
            f"Unknown target 'ct:{spec}'.",
            f"Take ct:w{{2..8}}a16 with g128, g64 or g32 and -asym behind it, or one of {', '.join(FIXED)}.",
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CompressedTensors:
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise FewbitsError("quantization_config: there are no config_groups.", "Mend config.json.")
        schemes = {
            _scheme(group["weights"], group.get("format") or config.get("format")): None
            for group in groups.values()
            if isinstance(group.get("weights"), dict)
        }
        if not schemes:
            raise FewbitsError("quantization_config: no group of config_groups is of weights.", "Mend config.json.")
        # a symmetric one would also take a module that has zero points
        first, *others = sorted(schemes, key=lambda scheme: scheme[0].zero != "integer")
        return cls(first[0], "float", first[1], tuple(cls(kind, "float", packing) for kind, packing in others))

    def spec(self, group: int | None = None) -> str:
        """The target that names this layout, or one like it with another group."""
        for name, (kind, inputs, packing, _) in FIXED.items():
            if (kind, inputs, packing) == (self.type, self.inputs, self.format):
                return f"ct:{name}"
        group = self.type.block[1] if group is None else group
        suffix = "-asym" if self.type.zero == "integer" else ""
        return f"ct:w{self.type.bits}a16{f'g{group}' if group else ''}{suffix}"

    def check(self, shape: tuple[int, int]) -> None:
        columns, group = shape[1], self.type.block[1]
        words = 32 // gcd(32, self.type.bits)
        if self.format == "pack-quantized" and columns % words:
            raise FewbitsError(
                f"{self.spec()} packs {words} inputs into whole words, and rows of {columns} are no multiple of that.",
                "Take ct:w8a8, or keep this tensor as it is.",
            )
        if group and columns % group:
            raise FewbitsError(
                f"Rows of {columns} are no multiple of the group {group}.", f"Take {self._nearest(columns)}."
            )

    def _nearest(self, columns: int) -> str:
        if self.type.levels == "E4M3":
            return "ct:fp8"
        if self.type.levels == "E2M1":
            return "ct:nvfp4" if columns % _NVFP4.block[1] == 0 else "ct:w8a8"
        return self.spec(nearest_group(columns))

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        rows, columns = shape
        kind, grid = self.type, self.type.grid(shape)
        parts: dict[str, Part] = {}
        if self.format in _PLAIN:
            parts[".weight"] = Part("I8" if kind.levels == "INT" else "F8_E4M3", shape)
            parts[".weight_scale"] = Part("BF16", (1,) if kind.block == (0, 0) else grid)
        elif self.format in _FP4:
            parts[".weight_packed"] = Part("U8", (rows, columns // 2))
            parts[".weight_scale"] = Part("F8_E4M3" if kind.scale == "E4M3" else "U8", grid)
            if kind.scale == "E4M3":
                parts[".weight_global_scale"] = Part("F32", (1,))
        else:
            parts[".weight_packed"] = Part("I32", (rows, words_for(columns, kind.bits)))
            parts[".weight_scale"] = Part("BF16", grid)
            parts[".weight_shape"] = Part("I64", (2,))
            if kind.zero == "integer":
                parts[".weight_zero_point"] = Part("I32", (words_for(rows, kind.bits), grid[1]))
        if self.inputs in STATIC:
            parts[STATIC[self.inputs]] = Part("BF16" if self.inputs == "fp8-tensor" else "F32", (1,))
        return parts

    def pack(
        self, matrix: Quantized, g_idx: npt.NDArray[np.integer] | None = None, input_peak: float | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """The arrays of `parts`.

        Args:
            input_peak: largest absolute activation that this layer, or one that engines fuse with it, gets; needed
                where `activations` is `static`.

        Raises:
            FewbitsError: the peak is missing.
        """
        kind, codes = self.type, matrix.codes
        arrays: dict[str, npt.NDArray[Any]] = {}
        if self.format in _PLAIN:
            arrays[".weight"] = (codes - np.uint8(kind.middle)).view(np.int8) if kind.levels == "INT" else codes
            scales = to_stored(matrix.scales, "BF16")
            arrays[".weight_scale"] = scales.reshape(1) if kind.block == (0, 0) else scales
        elif self.format in _FP4:
            arrays[".weight_packed"] = pack_nibbles(codes)
            arrays[".weight_scale"] = _scale_codes(kind, matrix.scales)
            if kind.scale == "E4M3":
                arrays[".weight_global_scale"] = np.array([matrix.global_scale], np.float32)
        else:
            arrays[".weight_packed"] = pack_columns(codes, kind.bits)
            arrays[".weight_scale"] = to_stored(matrix.scales, "BF16")
            arrays[".weight_shape"] = np.array(codes.shape, np.int64)
            if matrix.zeros is not None:
                arrays[".weight_zero_point"] = pack_rows(matrix.zeros.astype(np.uint8), kind.bits)
        if self.inputs in STATIC:
            arrays[STATIC[self.inputs]] = self._input_scale(input_peak)
        return arrays

    def _input_scale(self, peak: float | None) -> npt.NDArray[Any]:
        if peak is None:
            raise FewbitsError(f"{self.spec()} keeps scales of activations.", "Pass --calibration TEXT.")
        peak = max(peak, float(np.finfo(np.float16).tiny))
        if self.inputs == "fp8-tensor":
            return to_stored(np.array([peak / E4M3_MAX], np.float32), "BF16")
        return np.array([E4M3_MAX * E2M1_MAX / peak], np.float32)

    def shape_of(self, parts: Mapping[str, Part]) -> tuple[int, int]:
        return self._fitting(parts, None)

    def identify(self, parts: Mapping[str, Part], values: Arrays) -> tuple[CompressedTensors, tuple[int, int]]:
        """Of several schemes, the one that the parts of this module fit."""
        errors = []
        for scheme in (self, *self.others):
            try:
                return scheme, scheme._fitting(parts, values.get(".weight_shape"))
            except FewbitsError as error:
                errors.append(error)
        raise errors[0]

    def _fitting(self, parts: Mapping[str, Part], stated: npt.NDArray[Any] | None) -> tuple[int, int]:
        """Shape of the matrix. `stated` is what `.weight_shape` holds: it tells how far the last words are filled."""
        kind = self.type
        if self.format in _PLAIN:
            rows, columns = get(parts, ".weight").shape
        else:
            rows, width = get(parts, ".weight_packed").shape
            columns = 2 * width if self.format in _FP4 else width * 32 // kind.bits
        if stated is not None and stated.size == 2 and self.format not in (*_PLAIN, *_FP4):
            rows, columns = max(0, int(stated[0])), max(0, int(stated[1]))
        if kind.block[0] == 1 and kind.block[1] and columns % kind.block[1]:
            raise FewbitsError(f"Rows of {columns} are no multiple of the group {kind.block[1]}.", DAMAGED)
        expected = self.parts((rows, columns))
        scale = parts.get(".weight_scale")
        if scale is not None and kind.block[1] == 0 and scale.shape in ((), (rows,)):
            expected[".weight_scale"] = replace(expected[".weight_scale"], shape=scale.shape)
        if kind.zero == "integer" and (self.format in _PLAIN or _unpacked(parts.get(".weight_zero_point"))):
            expected[".weight_zero_point"] = Part("I8", kind.grid((rows, columns)))
        compare(parts, {suffix: part for suffix, part in expected.items() if suffix not in STATIC.values()})
        return rows, columns

    def unpack(self, arrays: Arrays, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
        kind = self.type
        if ".weight_shape" in arrays and tuple(arrays[".weight_shape"].tolist()) != shape:
            raise FewbitsError(
                f".weight_shape says {arrays['.weight_shape'].tolist()}, the codes {list(shape)}.", DAMAGED
            )
        matrix = Quantized(kind, self._codes(arrays, shape), self._scales(arrays, shape), self._zeros(arrays, shape))
        if kind.scale == "E4M3":
            whole = float(from_stored(arrays[".weight_global_scale"], ".weight_global_scale")[0])
            if whole <= 0:
                raise FewbitsError(f".weight_global_scale is {whole}.", DAMAGED)
            matrix = replace(matrix, global_scale=whole)
        return decode_groups(matrix, arrays.get(".weight_g_idx")) if kind.block[0] == 1 else matrix.decode()

    def _codes(self, arrays: Arrays, shape: tuple[int, int]) -> Codes:
        if self.format in _FP4:
            return unpack_nibbles(arrays[".weight_packed"])
        if self.format not in _PLAIN:
            return unpack_columns(arrays[".weight_packed"], self.type.bits, shape[1])
        codes = arrays[".weight"].view(np.uint8)
        if self.type.levels == "INT":
            return codes + np.uint8(1 << (self.type.bits - 1))
        if (codes & 127 == 127).any():
            raise FewbitsError(".weight holds values that are not finite.", DAMAGED)
        return codes

    def _scales(self, arrays: Arrays, shape: tuple[int, int]) -> Floats:
        stored = arrays[".weight_scale"]
        if self.type.scale == "E8M0":
            if (stored == 255).any():
                raise FewbitsError(".weight_scale holds values that are not finite.", DAMAGED)
            return np.ldexp(np.float32(1), stored.astype(np.int32) - 127)
        values = from_stored(E4M3[stored] if self.type.scale == "E4M3" else stored, ".weight_scale")
        return values.reshape(self.type.grid(shape))

    def _zeros(self, arrays: Arrays, shape: tuple[int, int]) -> Floats | None:
        if self.type.zero != "integer":
            return None
        stored = arrays[".weight_zero_point"]
        if stored.dtype == np.int8:
            return stored.astype(np.float32) + np.float32(1 << (self.type.bits - 1))
        return unpack_rows(stored, self.type.bits, shape[0]).astype(np.float32)

    def beside(self, others: Others) -> CompressedTensors:
        return replace(self, named=others)

    def config(self, kept: Sequence[str], quantized: Sequence[str] = ()) -> dict[str, Any]:
        modules: dict[CompressedTensors, list[str]] = {self: ["Linear"]}
        for other, names in self.named:
            assert isinstance(other, CompressedTensors)
            modules.setdefault(other, []).extend(names)
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "config_groups": {f"group_{n}": one._scheme(targets) for n, (one, targets) in enumerate(modules.items())},
            "ignore": list(kept),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def _scheme(self, targets: list[str]) -> dict[str, Any]:
        inputs = INPUTS[self.inputs]
        return {
            "targets": targets,
            "weights": self._weights(),
            "input_activations": None if inputs is None else {"symmetric": True, **inputs},
            "output_activations": None,
            "format": self.format,
        }

    def _weights(self) -> dict[str, Any]:
        kind = self.type
        rows, columns = kind.block
        weights: dict[str, Any] = {
            "num_bits": kind.bits,
            "type": "int" if kind.levels == "INT" else "float",
            "symmetric": kind.zero != "integer",
            "dynamic": False,
        }
        if kind.block in _STRATEGIES.values():
            return {**weights, "strategy": "channel" if rows else "tensor", "group_size": None}
        if rows > 1:
            return {**weights, "strategy": "block", "block_structure": [rows, columns], "group_size": None}
        if kind.scale == "E4M3":
            return {**weights, "strategy": "tensor_group", "group_size": columns, "scale_dtype": _FP8_SCALE}
        group = {**weights, "strategy": "group", "group_size": columns}
        return {**group, "scale_dtype": "torch.uint8"} if kind.scale == "E8M0" else group


def _unpacked(part: Part | None) -> bool:
    """Whether zero points lie one a byte, as early versions wrote them."""
    return part is not None and part.dtype == "I8"


def _scale_codes(kind: Scaled, scales: Floats) -> Codes:
    """E4M3 bytes or E8M0 exponents of scales that are exactly such numbers."""
    if kind.scale == "E4M3":
        return ladder("E4M3").nearest(scales)
    return (np.frexp(scales)[1] + 126).astype(np.uint8)


def _scheme(weights: Mapping[str, Any], packing: Any) -> tuple[Scaled, str]:
    """Storage type and format that a group's `weights` describe.

    Raises:
        FewbitsError: it is none that can be read.
    """
    bits, levels = setting(weights, "num_bits", 8), weights.get("type", "int")
    symmetric = weights.get("symmetric", True) is not False
    block = _block(weights)
    if levels == "int" and packing in ("pack-quantized", *_PLAIN) and 1 <= bits <= 8 and block[0] <= 1:
        return Scaled("INT", bits, block, "middle" if symmetric else "integer", "BF16"), packing
    if levels == "float" and bits == 8 and packing in _PLAIN and symmetric:
        return replace(_FP8_ROWS, block=block), packing
    for kind, expected in ((_NVFP4, _FP4[0]), (_MXFP4, _FP4[1])):
        if (levels, bits, packing, block) == ("float", 4, expected, kind.block):
            return kind, packing
    raise FewbitsError(
        f"quantization_config: weights of type {levels!r}, {bits} bits, strategy {weights.get('strategy')!r} in the "
        f"format {packing!r} cannot be read.",
        "Start from the unquantized model.",
    )


def _block(weights: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    group, structure = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy")
    if strategy is None:  # then the group size tells
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    if isinstance(strategy, str) and strategy in _STRATEGIES:
        return _STRATEGIES[strategy]
    if isinstance(structure, str):
        structure = [int(n) for n in structure.split("x") if n.isdigit()]
    sizes = structure if strategy == "block" else [1, group] if strategy in ("group", "tensor_group") else None
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        raise FewbitsError(
            f"quantization_config: the strategy {strategy!r} with group_size {group!r} and block_structure "
            f"{structure!r} cannot be read.",
            "Mend config.json.",
        )
    return sizes[0], sizes[1]
