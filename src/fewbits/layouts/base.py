"""How one ecosystem stores a quantized weight: pure functions between a matrix in a storage type and named arrays.

A layout knows no files: formats write what it packs, and checkpoints read with it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from fewbits.codecs.storage import StorageType
from fewbits.errors import FewbitsError

LAYOUTS: dict[str, type[Layout]] = {}
"""By name of the ecosystem, which begins a target: `gptq` in `gptq:w4g128`."""
Arrays = Mapping[str, npt.NDArray[Any]]
"""By suffix to the module's name. BF16 comes as uint16 and 8-bit floats as uint8: numpy has neither."""
Others = tuple[tuple["Layout", tuple[str, ...]], ...]
"""Modules in another layout than the rest of a checkpoint: a layout, and modules that engines fuse into one."""
ANY = "any"
"""Instead of a mean of bits: what a budget allows."""
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Part:
    """One stored tensor of a quantized weight: its type by safetensors' name, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return ITEM_BYTES[self.dtype] * prod(self.shape)


@dataclass(frozen=True)
class Made:
    """What configurations tell of how a checkpoint was made.

    Attributes:
        bits: the mean over the linears of decoder blocks, bits per weight.
        head_bits: None where the head is as it was.
        windows, length: of the text that calibrated it, in tokens.
        text: its names.
        modules: every quantized module's layout and shape [out, in].
        biased: those that have a bias.
    """

    bits: float
    head_bits: int | None
    windows: int
    length: int
    text: str
    modules: Mapping[str, tuple[Layout, tuple[int, int]]]
    biased: frozenset[str] = frozenset()


class Layout(ABC):
    """One target of an ecosystem; immutable. Subclasses are frozen dataclasses that fill the registry by being defined.

    Attributes:
        name: of the ecosystem, as it begins a target.
        quant_method: value of config.json's `quantization_config.quant_method`.
        markers: suffixes by which a module is known to be quantized, whichever is there.
        type: storage type of the weights.
    """

    name: ClassVar[str]
    quant_method: ClassVar[str]
    markers: ClassVar[tuple[str, ...]]
    float_dtype: ClassVar[str] = ""
    """Type of a directory's other tensors where the source's is neither F16 nor BF16; empty: BF16."""
    self_describing: ClassVar[bool] = False
    """Whether its markers alone tell this layout from all others, without a `quantization_config`."""
    described_by: ClassVar[tuple[str, ...]] = ()
    """Suffixes of small parts whose values, and not shapes alone, say what a module is."""
    open_specs: ClassVar[str] = ""
    """Regular expression of targets that leave the bits open (`g64`), where modules of one checkpoint may differ."""
    widths: ClassVar[tuple[int, ...]] = ()
    """The bits that such a target chooses among."""
    old_rope_keys: ClassVar[bool] = False
    """Whether engines want the keys of config.json that transformers 5 keeps in `rope_parameters`."""
    mean_bits: ClassVar[tuple[float, float] | None] = None
    """Least and most bits per weight that a target may name as the mean over linears of different bits (`4.25`)."""
    mean_counts_scales: ClassVar[bool] = True
    """Whether that mean counts all that is stored of a linear, or its codes alone."""
    fuses: ClassVar[bool] = True
    """Whether engines want one type for linears that they fuse."""
    rare_widths: ClassVar[tuple[int, ...]] = ()
    """Those of them that few engines take: chosen where they are asked for by name."""
    usual_head: ClassVar[int] = 6
    """Bits that the head gets where nothing is said of it, in ecosystems that quantize it; 16: it stays as it is."""
    methods: ClassVar[tuple[str, ...]] = ()
    """The methods that make it, the usual one first, where its type alone does not say."""
    type: StorageType

    @property
    def engine_dtype(self) -> str:
        """The one type of the other tensors with which engines run such a model; empty: F16 and BF16 both do."""
        return ""

    @property
    def activations(self) -> Literal["float", "dynamic", "static"]:
        """What engines multiply with: floats, or inputs that they quantize by scales found token by token (dynamic) or
        kept in the checkpoint (static)."""
        return "float"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in cls.__dict__:
            LAYOUTS[cls.name] = cls

    @classmethod
    @abstractmethod
    def examples(cls) -> Mapping[str, str]:
        """Targets without the ecosystem's name, and one line on each, for `fewbits list` and for error messages."""

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: str) -> Layout:
        """The layout that a target names after the colon, e.g. `w4g128`.

        Raises:
            FewbitsError: it is not known; the message lists what is.
        """

    @classmethod
    def mixed(cls, spec: str) -> bool:
        """Whether a target names a mean of bits, or `any`, which a budget is to decide."""
        return cls.mean_bits is not None and (spec == ANY or cls.rate(spec) is not None)

    @classmethod
    def rate(cls, spec: str) -> float | None:
        """The mean of the bits per weight that a target names; None for targets that name no mean.

        Raises:
            FewbitsError: out of reach.
        """
        if cls.mean_bits is None or not re.fullmatch(r"\d+(\.\d+)?(bpw)?", spec):
            return None
        least, most = cls.mean_bits
        value = float(spec.removesuffix("bpw"))
        if not least <= value <= most:
            raise FewbitsError(f"{cls.name}:{spec}: out of reach.", f"Take {least:g} to {most:g} bits per weight.")
        return value

    @classmethod
    def heads(cls) -> Mapping[int, Layout]:
        """By bits, the layouts that the head can have, in ecosystems that quantize it; else it stays as it is."""
        return {}

    @classmethod
    def members(cls, spec: str) -> tuple[Layout, ...]:
        """The layouts among which a target chooses that leaves the bits open, fewest bits first; of others, none.

        Args:
            spec: what the target names after the colon, e.g. `g64`.

        Raises:
            FewbitsError: it is of this kind and names what there is not.
        """
        if not cls.open_specs or not re.fullmatch(cls.open_specs, spec):
            return ()
        try:
            return tuple(cls.from_spec(f"w{bits}{spec}") for bits in cls.widths)
        except FewbitsError as error:
            raise FewbitsError(f"Unknown target '{cls.name}:{spec}'.", error.hint) from None

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Layout:
        """The layout of a checkpoint.

        Args:
            config: config.json's `quantization_config`, which anybody may have written.

        Raises:
            FewbitsError: a setting that cannot be read.
        """

    @abstractmethod
    def check(self, shape: tuple[int, int]) -> None:
        """Refuse a matrix [out, in] that the layout cannot hold.

        Raises:
            FewbitsError: names what does not divide and the nearest target that works.
        """

    @abstractmethod
    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """The stored tensors of a matrix [out, in], by suffix to the module's name, e.g. `.qweight`."""

    @abstractmethod
    def pack(
        self, matrix: Any, g_idx: npt.NDArray[np.integer] | None = None, input_peak: float | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """The arrays of `parts`.

        Args:
            matrix: [out, in] as the type codes it; codes are in the original order of columns.
            g_idx: group of each column [in], for layouts whose groups need not be neighbours.
            input_peak: largest absolute activation that this layer, or one that engines fuse with it, gets: for layouts
                that store scales of activations.

        Raises:
            FewbitsError: the layout cannot hold the matrix, or needs a peak.
        """

    @abstractmethod
    def shape_of(self, parts: Mapping[str, Part]) -> tuple[int, int]:
        """[out, in] of the matrix that these stored tensors hold.

        Raises:
            FewbitsError: a part is missing or its shape does not fit the others.
        """

    def holds(self, parts: Mapping[str, Part]) -> bool:
        """Whether these stored tensors, a marker among them, are a quantized weight.

        A float `.weight` beside a marker is a plain weight with the settings for quantizing it some day.
        """
        return ".weight" not in parts or parts[".weight"].dtype not in ("F64", "F32", "F16", "BF16")

    def identify(self, parts: Mapping[str, Part], values: Arrays) -> tuple[Layout, tuple[int, int]]:
        """The layout of one module of a checkpoint of this layout, and its shape [out, in].

        Args:
            values: the parts that `described_by` names.

        Raises:
            FewbitsError: a part is missing, does not fit the others or says what cannot be.
        """
        return self, self.shape_of(parts)

    @abstractmethod
    def unpack(self, arrays: Arrays, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
        """The weights, float32 [out, in], as the engine decodes them.

        Raises:
            FewbitsError: a value that cannot be (scales that are not finite, an index out of range).
        """

    @abstractmethod
    def config(self, kept: Sequence[str], quantized: Sequence[str] = ()) -> dict[str, Any]:
        """config.json's `quantization_config`.

        Args:
            kept: names of the linear modules that stay unquantized (`lm_head` among them).
            quantized: names of the others, for loaders that want a list of these.
        """

    def for_floats(self, dtype: str) -> Layout:
        """This layout in a directory whose other tensors are `F16`, `BF16` or `F32`, where it takes note of that."""
        return self

    def beside(self, others: Others) -> Layout:
        """This layout in a checkpoint some of whose modules have another, where its configuration tells of that."""
        return self

    def told(self, made: Made) -> Layout:
        """This layout with what its configuration is to tell of the whole checkpoint, where it tells that."""
        return self

    def of_type(self, storage: str) -> Layout | None:
        """The layout like this one of a storage type by name, where types are too many to be listed as members."""
        return None

    def extra_files(self, kept: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Further JSON files that loaders of the ecosystem look for, by file name."""
        return {}
