"""EXL3 checkpoints (exllamav3 1.6): trellis-coded tiles between two Hadamard transforms; see `codecs.trellis`.

A module of in = K, out = N has `trellis` int16 [K/16, N/16, 16 bits], `suh` float16 [K] and `svh` float16 [N]. An empty
`mul1` or `mcg`, int32, says by being there which codebook it is; with neither it is 3inst, that of the first version.
Files of that version have signs alone, `su` and `sv`, int16 bit fields in which a one is minus. Half bits (1.5,
2.5, 3.5; exllamav3 1.6) are read and not made.

exllamav3 goes by the tensors. GPTQModel 7.7 wants `tensor_storage` in config.json and takes `version`, which exllamav3
writes, for a format that it does not know: that key is in quantization_config.json alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fewbits.codecs.base import Floats
from fewbits.codecs.trellis import BITS, CODEBOOKS, HADAMARD, Trellis, TrellisCoded
from fewbits.errors import FewbitsError
from fewbits.kernels.trellis import TILE
from fewbits.layouts.base import Arrays, Layout, Made, Part
from fewbits.layouts.values import DAMAGED, compare, get

VERSION = "1.6.5"
"""Of exllamav3, as whose work files are signed."""
DTYPES = {"I16": "int16", "I32": "int32", "F16": "float16"}
_SPEC = re.compile(r"([1-8])(?:-(mcg|3inst))?")


@dataclass(frozen=True)
class EXL3(Layout):
    """Trellises of one number of bits; the modules of a checkpoint may differ.

    Attributes:
        head_bits: as the configuration names them; None: 16, the head is not quantized.
        average_bits: of the whole checkpoint, None: those of the type.
        calibration: rows and length of each.
        storage: what the configuration tells of each module.
    """

    name: ClassVar[str] = "exl3"
    quant_method: ClassVar[str] = "exl3"
    markers: ClassVar[tuple[str, ...]] = (".trellis",)
    float_dtype: ClassVar[str] = "F16"
    methods: ClassVar[tuple[str, ...]] = ("ldlq",)
    mean_bits: ClassVar[tuple[float, float] | None] = (1.0, 8.0)
    mean_counts_scales: ClassVar[bool] = False

    type: Trellis
    head_bits: int | None = field(default=None, compare=False)
    average_bits: float | None = field(default=None, compare=False)
    calibration: tuple[int, int] | None = field(default=None, compare=False)
    storage: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def engine_dtype(self) -> str:
        return "F16"

    @classmethod
    def examples(cls) -> Mapping[str, str]:
        return {
            "3.25": "3.25 bits per weight on average (1 to 8), mixed by what each matrix loses: exllamav3 on NVIDIA",
            "3": "3 bits everywhere (1 to 8)",
            "3-mcg": "with an older codebook (also -3inst, the first)",
        }

    @classmethod
    def from_spec(cls, spec: str) -> EXL3:
        found = _SPEC.fullmatch(spec)
        if found is None:
            raise FewbitsError(
                f"Unknown target 'exl3:{spec}'.",
                "Take exl3:1 to exl3:8, -mcg or -3inst behind it for an older codebook, or a mean such as exl3:3.25.",
            )
        return cls(Trellis(int(found[1]), found[2] or "mul1"))

    @classmethod
    def members(cls, spec: str) -> tuple[EXL3, ...]:
        return () if _SPEC.fullmatch(spec) or not cls.mixed(spec) else tuple(cls(Trellis(bits)) for bits in BITS)

    @classmethod
    def heads(cls) -> Mapping[int, EXL3]:
        return {bits: cls(Trellis(bits)) for bits in BITS}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> EXL3:
        bits, head = config.get("bits"), config.get("head_bits")
        return cls(
            Trellis(4),  # modules say themselves what they are
            head if isinstance(head, int) and head in BITS else None,
            float(bits) if isinstance(bits, int | float) else None,
        )

    def of_type(self, storage: str) -> EXL3 | None:
        try:
            return replace(self, type=Trellis.from_name(storage))
        except FewbitsError:
            return None

    def told(self, made: Made) -> EXL3:
        storage = {
            name: layout.storage_entry(name, shape, name in made.biased)
            for name, (layout, shape) in made.modules.items()
            if isinstance(layout, EXL3)
        }
        calibration = (made.windows, made.length)
        return replace(self, average_bits=made.bits, head_bits=made.head_bits, calibration=calibration, storage=storage)

    def storage_entry(self, name: str, shape: tuple[int, int], biased: bool = False) -> dict[str, Any]:
        """What `tensor_storage` says of a module. GPTQModel 7.7 loads what is named here alone, biases, too."""
        parts = self.parts(shape) | ({".bias": Part("F16", (shape[0],))} if biased else {})
        stored = {
            name + suffix: {
                "shape": list(part.shape),
                "n_bytes": part.nbytes,
                "dtype": f"torch.{DTYPES[part.dtype]}",
                "torch_dtype": DTYPES[part.dtype],
            }
            for suffix, part in parts.items()
        }
        entry = {"stored_tensors": stored, "quant_format": "exl3", "bits_per_weight": self.type.bits}
        multiplier = CODEBOOKS[self.type.codebook]
        return entry if multiplier is None else entry | {f"{self.type.codebook}_multiplier": multiplier}

    def check(self, shape: tuple[int, int]) -> None:
        if any(size < 1 or size % HADAMARD for size in shape):
            raise FewbitsError(
                f"EXL3 takes multiples of {HADAMARD} inputs and outputs, and these are {shape[1]} and {shape[0]}.",
                "Take exl2:4.0, which needs multiples of 32 inputs, or keep this tensor as it is.",
            )

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        rows, columns = shape
        parts = {
            ".trellis": Part("I16", (columns // TILE, rows // TILE, self.type.words)),
            ".suh": Part("F16", (columns,)),
            ".svh": Part("F16", (rows,)),
        }
        if CODEBOOKS[self.type.codebook] is not None:
            parts[f".{self.type.codebook}"] = Part("I32", ())
        return parts

    def pack(
        self, matrix: TrellisCoded, g_idx: npt.NDArray[np.integer] | None = None, input_peak: float | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        self.check((matrix.svh.size, matrix.suh.size))
        arrays: dict[str, npt.NDArray[Any]] = {".trellis": matrix.trellis, ".suh": matrix.suh, ".svh": matrix.svh}
        multiplier = CODEBOOKS[self.type.codebook]
        if multiplier is not None:
            arrays[f".{self.type.codebook}"] = np.array(multiplier, np.uint32).view(np.int32)
        return arrays

    def shape_of(self, parts: Mapping[str, Part]) -> tuple[int, int]:
        tiles_in, tiles_out, _ = get(parts, ".trellis", 3).shape
        shape = tiles_out * TILE, tiles_in * TILE
        self.check(shape)
        expected = self.parts(shape)
        for old, new, size in ((".su", ".suh", shape[1]), (".sv", ".svh", shape[0])):
            if old in parts and new not in parts:
                del expected[new]
                expected[old] = Part("I16", (size // 16,))
        for marker in (".mul1", ".mcg"):  # only that it is there counts
            if marker in expected and marker in parts:
                del expected[marker]
        compare(parts, expected)
        return shape

    def identify(self, parts: Mapping[str, Part], values: Arrays) -> tuple[EXL3, tuple[int, int]]:
        words = get(parts, ".trellis", 3).shape[2]
        if words % 8 or words // 16 not in BITS:
            raise FewbitsError(f".trellis has {words} words a tile, where 16 to 128 in steps of 16 can be.", DAMAGED)
        # with both, GPTQModel 7.7 takes mcg
        codebook = "mcg" if ".mcg" in parts else "mul1" if ".mul1" in parts else "3inst"
        found = replace(self, type=Trellis(words // 16, codebook, words % 16 == 8))
        return found, found.shape_of(parts)

    def unpack(self, arrays: Arrays, shape: tuple[int, int]) -> Floats:
        suh, svh = _scales(arrays, ".suh", ".su"), _scales(arrays, ".svh", ".sv")
        return TrellisCoded(self.type, arrays[".trellis"], suh, svh).decode()

    def config(self, kept: Sequence[str], quantized: Sequence[str] = ()) -> dict[str, Any]:
        rows, length = self.calibration or (0, 0)
        config: dict[str, Any] = {
            "quant_method": "exl3",
            "bits": round(self.type.bits if self.average_bits is None else self.average_bits, 4),
            "head_bits": self.head_bits,
            "calibration": {"rows": rows, "cols": length},
            "out_scales": "always",
            "codebook": self.type.codebook,
            "tensor_storage": dict(self.storage),
        }
        return config if self.head_bits is not None else {k: v for k, v in config.items() if k != "head_bits"}

    def extra_files(self, kept: Sequence[str]) -> dict[str, dict[str, Any]]:
        config = self.config(kept)
        return {"quantization_config.json": {"quant_method": config.pop("quant_method"), "version": VERSION, **config}}


def _scales(arrays: Arrays, suffix: str, signs: str) -> npt.NDArray[np.float16]:
    """float16 scales, or +1 and -1 from a bit field.

    Raises:
        FewbitsError: they are not finite.
    """
    if suffix in arrays:
        scales = arrays[suffix]
        if scales.dtype != np.float16 or not np.isfinite(scales).all():
            raise FewbitsError(f"{suffix} holds values that are not finite half-precision numbers.", DAMAGED)
        return scales
    bits = np.unpackbits(arrays[signs].astype("<i2").view(np.uint8), bitorder="little")
    return (1 - 2 * bits.astype(np.float16)).astype(np.float16)
