"""HQQ checkpoints (hqq 0.2.8), as its layers' state_dict lies in safetensors.

The codes of a module are reshaped to [out * in / group, group] (axis 1) or [group, out * in / group] (axis 0) and
packed along the first axis, which lays a whole half, quarter or eighth of the rows over another:
- `W_q` uint8: first half << 4 | second half; quarters << 6, 4, 2, 0; eighths; one byte each for 8, 6 and 5 bits. For 3
  bits int32: tenths << 27, 24, .. 0, with rows of zeros up to a multiple of ten.
- `scale` and `zero` [out * in / group, 1] (axis 1) or [1, out * in / group]: weight = (code - zero) * scale.
- every setting as a tensor of its own: bools as uint8, whole numbers as int32, text as its bytes, the shape int64 [2].

hqq's loader of whole directories reads pickled files only, and transformers dropped HQQ with version 5. A model is
filled from safetensors by putting `HQQLinear(None, None, dtype, "cpu")` in the place of each linear and calling
`model.load_state_dict`. Each module tells its own settings, so bits may differ from one to the next; the configuration
says what most have. transformers 4 read such checkpoints module by module, too (`quantizer_hqq.py`); only when
quantizing itself did its `HqqConfig(dynamic_config=...)` go by the last two parts of a name, the same in all blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fewbits.codecs.base import Floats
from fewbits.codecs.scaled import Codes, Quantized, Scaled, ScaleType
from fewbits.errors import FewbitsError
from fewbits.layouts.base import Arrays, Layout, Part
from fewbits.layouts.values import DAMAGED, FLOAT_TYPES, from_stored, get, setting, to_stored

BITS = (1, 2, 3, 4, 8)
"""What is written; 5 and 6 bits are read."""
TORCH_NAMES = {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}
_SPEC = re.compile(r"w(\d)g(\d{1,4})(-axis0)?")
_PACKING = {1: "1bit_u8", 2: "2bit_u8", 3: "3bit_32", 4: "4bit_u8", 5: "8bit_u8", 6: "8bit_u8", 8: "8bit_u8"}
_SHIFTS: dict[str, tuple[int, ...]] = {
    "8bit_u8": (0,),
    "4bit_u8": (4, 0),
    "2bit_u8": (6, 4, 2, 0),
    "1bit_u8": (7, 6, 5, 4, 3, 2, 1, 0),
    "3bit_32": tuple(range(27, -1, -3)),
}
"""By how much each part of the rows is shifted in its word, first part first."""
_PART_TYPES = {"uint8": "U8", "int32": "I32", "int64": "I64", "float32": "F32"}


@dataclass(frozen=True)
class HQQ(Layout):
    """Integers in groups, with float zero points.

    Attributes:
        dtype: of the model's other tensors, which hqq then computes in.
    """

    name: ClassVar[str] = "hqq"
    quant_method: ClassVar[str] = "hqq"
    markers: ClassVar[tuple[str, ...]] = (".W_q",)
    self_describing: ClassVar[bool] = True
    described_by: ClassVar[tuple[str, ...]] = tuple(
        f".{key}" for key in ("shape", "nbits", "group_size", "axis", "packing", "quant_scale", "quant_zero")
    )

    open_specs: ClassVar[str] = r"g\d{1,4}(-axis0)?"
    widths: ClassVar[tuple[int, ...]] = BITS

    type: Scaled
    dtype: str = "F16"

    @classmethod
    def of(cls, bits: int, group: int, axis: int, scale: ScaleType = "F32") -> HQQ:
        """The layout of these settings, in hqq's terms."""
        block = (1, group) if axis == 1 else (group, 1)
        return cls(Scaled("INT", bits, block, "float", scale, strided=axis == 0))

    @property
    def axis(self) -> int:
        return 0 if self.type.strided else 1

    @property
    def group(self) -> int:
        return self.type.block[self.axis]

    @classmethod
    def examples(cls) -> Mapping[str, str]:
        return {
            "w4g64": "4 bits, groups of 64 along the inputs (also 8, 3, 2, 1 bits and other groups)",
            "w3g64": "3 bits",
            "w2g16": "2 bits, groups of 16",
            "w4g64-axis0": "groups along the outputs: a little better, without fast kernels",
        }

    @classmethod
    def from_spec(cls, spec: str) -> HQQ:
        found = _SPEC.fullmatch(spec)
        if found and int(found[1]) in BITS and int(found[2]) >= 8 and int(found[2]) % 8 == 0:
            return cls.of(int(found[1]), int(found[2]), 0 if found[3] else 1)
        raise FewbitsError(
            f"Unknown target 'hqq:{spec}'.",
            "Take hqq:w{1,2,3,4,8}g{8,16,32,64,128,...}, with -axis0 behind it for groups along the outputs.",
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> HQQ:
        # modules say themselves what they are: the configuration is a default, and hqq's own files have none
        settings = config.get("quant_config")
        settings = settings.get("weight_quant_params") if isinstance(settings, Mapping) else None
        if not isinstance(settings, Mapping):
            return cls.of(4, 64, 1)
        return cls.of(setting(settings, "nbits", 4), setting(settings, "group_size", 64), setting(settings, "axis", 1))

    def for_floats(self, dtype: str) -> HQQ:
        # hqq keeps scales and zero points in the type it computes in
        scale: ScaleType = dtype  # type: ignore[assignment]
        return replace(self, dtype=dtype, type=replace(self.type, scale=scale))

    def _grouped(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the codes as they are packed."""
        groups = prod(shape) // self.group
        return (groups, self.group) if self.axis == 1 else (self.group, groups)

    def _packed(self, shape: tuple[int, int]) -> Part:
        rows, columns = self._grouped(shape)
        packing = _PACKING[self.type.bits]
        return Part("I32" if packing == "3bit_32" else "U8", (-(-rows // len(_SHIFTS[packing])), columns))

    def check(self, shape: tuple[int, int]) -> None:
        length = shape[self.axis]
        kind = "Rows" if self.axis == 1 else "Columns"
        if length % self.group:
            group = next((g for g in (64, 32, 16, 8) if length % g == 0 and g < self.group), 0)
            suffix = "" if self.axis == 1 else "-axis0"
            way_out = f"Take hqq:w{self.type.bits}g{group}{suffix}." if group else "Keep this tensor as it is."
            raise FewbitsError(f"{kind} of {length} are no multiple of the group {self.group}.", way_out)
        parts = len(_SHIFTS[_PACKING[self.type.bits]])
        if self.type.bits != 3 and self._grouped(shape)[0] % parts:
            raise FewbitsError(
                f"hqq lays {parts} parts of the {self._grouped(shape)[0]} groups over one another, which does not come "
                "out even.",
                f"Take hqq:w8g{self.group}, or keep this tensor as it is.",
            )

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        groups = prod(shape) // self.group
        scales = Part(self.type.scale, (groups, 1) if self.axis == 1 else (1, groups))
        told = {key: Part(_PART_TYPES[v.dtype.name], v.shape) for key, v in self._settings(shape).items()}
        return {".W_q": self._packed(shape), ".scale": scales, ".zero": scales, **told}

    def _settings(self, shape: tuple[int, int]) -> dict[str, npt.NDArray[Any]]:
        packing = _PACKING[self.type.bits]
        plain: dict[str, bool | int | str] = {
            "nbits": self.type.bits,
            "group_size": self.group,
            "axis": self.axis,
            "packing": packing,
            "unpack_view_dtype": "torch.int32" if packing == "3bit_32" else "torch.uint8",
            "view_as_float": False,
            "quant_scale": False,
            "quant_zero": False,
            "compute_dtype": TORCH_NAMES[self.dtype],
            "offload_meta": False,
            "encoded_state_dict": True,
            "stores_quant_config": True,
            "channel_wise": True,
            "optimize": True,
            "round_zero": self.type.bits == 4,
        }
        return {".shape": np.array(shape, np.int64)} | {f".{key}": _encoded(value) for key, value in plain.items()}

    def pack(
        self, matrix: Quantized, g_idx: npt.NDArray[np.integer] | None = None, input_peak: float | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        shape = (matrix.codes.shape[0], matrix.codes.shape[1])
        self.check(shape)
        if matrix.zeros is None:
            raise FewbitsError("HQQ checkpoints need zero points.")
        packed = self._packed(shape)
        shifts = _SHIFTS[_PACKING[self.type.bits]]
        codes = matrix.codes.reshape(self._grouped(shape))
        short = packed.shape[0] * len(shifts) - codes.shape[0]
        words = np.zeros(packed.shape, np.int32 if packed.dtype == "I32" else np.uint8)
        for shift, part in zip(shifts, np.pad(codes, ((0, short), (0, 0))).reshape(-1, *packed.shape), strict=True):
            words |= part.astype(words.dtype) << words.dtype.type(shift)
        scales = self.parts(shape)[".scale"].shape
        return {
            ".W_q": words,
            ".scale": to_stored(matrix.scales.reshape(scales), self.type.scale),
            ".zero": to_stored(matrix.zeros.reshape(scales), self.type.scale),
            **self._settings(shape),
        }

    def shape_of(self, parts: Mapping[str, Part]) -> tuple[int, int]:
        raise FewbitsError("The shape of an HQQ weight is known from its settings only.")

    def identify(self, parts: Mapping[str, Part], values: Arrays) -> tuple[HQQ, tuple[int, int]]:
        shape, layout = _read_settings(values)
        packed, found = layout._packed(shape), get(parts, ".W_q")
        # view_as_float: the same bytes with another name
        fits = found.dtype in (packed.dtype, *FLOAT_TYPES) and found.nbytes == packed.nbytes
        if not fits or found.shape[0] != packed.shape[0]:
            raise FewbitsError(f".W_q is {found.dtype} {list(found.shape)}, no {shape[0]} x {shape[1]} codes.", DAMAGED)
        groups = prod(shape) // layout.group
        for suffix in (".scale", ".zero"):
            part = get(parts, suffix)
            if part.dtype not in FLOAT_TYPES or prod(part.shape) != groups:
                raise FewbitsError(f"{suffix} is {part.dtype} {list(part.shape)}, not {groups} floats.", DAMAGED)
        scale: ScaleType = parts[".scale"].dtype  # type: ignore[assignment]
        return replace(layout, type=replace(layout.type, scale=scale)), shape

    def unpack(self, arrays: Arrays, shape: tuple[int, int]) -> Floats:
        packed = self._packed(shape)
        words = np.ascontiguousarray(arrays[".W_q"]).view(np.int32 if packed.dtype == "I32" else np.uint8)
        shifts = _SHIFTS[_PACKING[self.type.bits]]
        mask = (1 << (3 if packed.dtype == "I32" else 8 // len(shifts))) - 1
        codes: Codes = np.empty((len(shifts), *packed.shape), np.uint8)
        for part, shift in zip(codes, shifts, strict=True):
            part[...] = np.right_shift(words.reshape(packed.shape), shift) & mask
        rows, columns = self._grouped(shape)
        values = codes.reshape(-1, columns)[:rows].astype(np.float32)
        spread = (rows, 1) if self.axis == 1 else (1, columns)
        values -= from_stored(arrays[".zero"], ".zero").reshape(spread)
        values *= from_stored(arrays[".scale"], ".scale").reshape(spread)
        return values.reshape(shape)

    def config(self, kept: Sequence[str], quantized: Sequence[str] = ()) -> dict[str, Any]:
        weights = {
            "nbits": self.type.bits,
            "channel_wise": True,
            "group_size": self.group,
            "optimize": True,
            "round_zero": self.type.bits == 4,
            "axis": self.axis,
            "view_as_float": False,
        }
        nothing = {"scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
        return {
            "quant_method": self.quant_method,
            "quant_config": {"weight_quant_params": weights, **nothing},
            "skip_modules": list(kept),
        }


def _encoded(value: bool | int | str) -> npt.NDArray[Any]:
    """A setting as hqq puts it into safetensors."""
    if isinstance(value, str):
        return np.frombuffer(value.encode(), np.uint8)
    return np.array(value, np.uint8 if isinstance(value, bool) else np.int32)


def _read_settings(values: Arrays) -> tuple[tuple[int, int], HQQ]:
    """Shape and layout that a module's own tensors tell, which anybody may have written."""
    numbers: dict[str, int] = {}
    for key in ("nbits", "group_size", "axis", "quant_scale", "quant_zero"):
        array = values.get(f".{key}")
        if array is None and key.startswith("quant_"):
            array = np.zeros(1, np.uint8)
        if array is None or array.size != 1 or not np.isfinite(array).all():
            raise FewbitsError(f".{key} is missing or no number.", DAMAGED)
        numbers[key] = ceil(array.item())
    if numbers["quant_scale"] or numbers["quant_zero"]:
        raise FewbitsError("Its scales are quantized in turn, which hqq itself gave up.", "Quantize it anew.")
    bits, group, axis = numbers["nbits"], numbers["group_size"], numbers["axis"]
    shape = values.get(".shape", np.zeros(0)).reshape(-1).tolist()
    if len(shape) != 2 or any(not isinstance(n, int) or not 0 < n < 2**31 for n in shape):
        raise FewbitsError(f".shape says {shape}.", DAMAGED)
    packing = values.get(".packing", np.zeros(0, np.uint8)).tobytes().decode("latin-1")
    if _PACKING.get(bits) != packing or axis not in (0, 1) or group < 1 or prod(shape) % group:
        raise FewbitsError(
            f"{bits} bits packed as {packing!r} in groups of {group} along axis {axis}: not what hqq writes.", DAMAGED
        )
    return (shape[0], shape[1]), HQQ.of(bits, group, axis)
