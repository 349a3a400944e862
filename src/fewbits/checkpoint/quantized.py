"""Quantized checkpoints read as plain weights: the stored tensors of each quantized module as one `module.weight`.

Which modules are quantized is told by their tensors, not by the lists in config.json, which name modules in more ways
than one can know; the configuration only tells the layout.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fewbits.checkpoint.base import TensorInfo, stored_bytes
from fewbits.errors import FewbitsError
from fewbits.layouts import LAYOUTS, Layout, Part

NUMPY_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
    "BOOL": "u1",
}  # fmt: skip
"""What the bytes of each safetensors type are seen as; bfloat16 and 8-bit floats stay bits."""
ACTIVATION_SUFFIXES = (
    ".input_scale", ".output_scale", ".activation_scale", ".input_global_scale", ".q_scale", ".k_scale", ".v_scale",
    ".k_zero_point", ".v_zero_point",
)  # fmt: skip
"""Scales of activations and of the KV cache, which say nothing of the weights."""
DESCRIPTION_BYTES = 1 << 16
KEPT_MATRICES = 2
"""Decoded matrices that are kept for being read on by rows: with threads side by side, one ends as the next begins."""


@dataclass(frozen=True)
class Module:
    """A quantized linear layer.

    Attributes:
        shape: [out, in].
        parts: its stored tensors by suffix.
        turned: whether the plain model has its weight as [in, out].
    """

    name: str
    layout: Layout
    shape: tuple[int, int]
    parts: Mapping[str, TensorInfo]
    turned: bool

    def info(self) -> TensorInfo:
        """The one tensor that stands for all of them."""
        main = max(self.parts.values(), key=lambda part: part.nbytes)
        nbytes = sum(part.nbytes for part in self.parts.values())
        shape = self.shape[::-1] if self.turned else self.shape
        return TensorInfo(f"{self.name}.weight", shape, self.layout.type.name, nbytes, main.file, main.offset)


class QuantizedWeights:
    """The quantized weights among a checkpoint's tensors, decoded on demand. Safe to read from several threads.

    Attributes:
        tensors: the checkpoint's tensors as a plain model has them: unquantized ones as they are stored, and one of
            the layout's storage type for each quantized module.
    """

    def __init__(
        self, path: Path, settings: Any, stored: Mapping[str, TensorInfo], conv1d: tuple[str, ...] = ()
    ) -> None:
        """
        Args:
            settings: config.json's `quantization_config`, whatever is there; None where there is none.
            stored: every tensor of the files.
            conv1d: ends of the names of modules whose plain weight is [in, out] (GPT-2's Conv1D): every quantizer
                stores them as the linear layers that they are.

        Raises:
            FewbitsError: an unknown kind of quantization, or a module whose tensors do not fit together.
        """
        self._path, self._conv1d = path, conv1d
        self._lock = threading.Lock()
        self._decoded: OrderedDict[str, npt.NDArray[np.float32]] = OrderedDict()
        self._modules: dict[str, Module] = {}
        self.tensors: dict[str, TensorInfo] = {}
        layout = layout_of(path, settings, stored)
        if layout is None:
            self.tensors |= stored
            return
        owners: dict[str, str] = {}
        for name, parts in group(stored, layout.markers).items():
            owners |= {info.name: f"{name}.weight" for info in parts.values()}
            module = self._module(layout, name, parts)
            if module is not None:
                self._modules[f"{name}.weight"] = module
        for name, info in stored.items():
            weight = owners.get(name)
            if weight in self._modules:
                self.tensors.setdefault(weight, self._modules[weight].info())
            elif weight == name or (weight is None and not name.endswith(ACTIVATION_SUFFIXES)):
                self.tensors[name] = info
        self._refuse_unscaled()

    def _module(self, layout: Layout, name: str, parts: Mapping[str, TensorInfo]) -> Module | None:
        """The module of these parts; None if its weight is plain."""
        shapes = {suffix: Part(info.dtype, info.shape) for suffix, info in parts.items()}
        if not layout.holds(shapes):
            return None
        try:
            values = {}
            for suffix in layout.described_by:
                if suffix in parts:
                    if parts[suffix].nbytes > DESCRIPTION_BYTES:
                        raise FewbitsError(f"{suffix} has {parts[suffix].nbytes} bytes.", "Fetch the file again.")
                    values[suffix] = self._array(parts[suffix])
            found, shape = layout.identify(shapes, values)
        except FewbitsError as error:
            raise self._named(name, error) from None
        if min(shape) < 1:
            raise FewbitsError(f"{self._path}: {name}: a matrix of shape {list(shape)} is empty.")
        return Module(name, found, shape, parts, name.endswith(self._conv1d))

    def _named(self, name: str, error: FewbitsError) -> FewbitsError:
        return FewbitsError(f"{self._path}: {name}: {error.message}", error.hint)

    def _refuse_unscaled(self) -> None:
        """In a quantized model 8-bit floats have scales: where none is found, the codes alone would be nonsense."""
        for name, info in self.tensors.items():
            if info.dtype == "F8_E4M3":
                scale = next((name + end for end in ("_scale_inv", "_scale") if name + end in self.tensors), None)
                trouble = f"is scaled by {scale!r}, which cannot be read yet" if scale else "has no scale"
                raise FewbitsError(
                    f"{self._path}: tensor {name!r} is F8_E4M3 {list(info.shape)} and {trouble}.",
                    "Start from the unquantized model.",
                )

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def code_bits(self, name: str) -> float:
        return self._modules[name].layout.type.bits

    def read(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start:stop of a quantized weight, float32, the caller's own.

        Raises:
            FewbitsError: values that cannot be.
        """
        if (start, stop) == (0, self.tensors[name].shape[0]):
            with self._lock:
                known = self._decoded.get(name)
            return self._decode(name) if known is None else known.copy()
        with self._lock:  # held while decoding: the others want rows of the same matrix
            matrix = self._decoded.get(name)
            if matrix is None:
                matrix = self._decoded[name] = self._decode(name)
                if len(self._decoded) > KEPT_MATRICES:
                    self._decoded.popitem(last=False)
            self._decoded.move_to_end(name)
        return matrix[start:stop].copy()

    def _decode(self, name: str) -> npt.NDArray[np.float32]:
        module = self._modules[name]
        arrays = {suffix: self._array(info) for suffix, info in module.parts.items()}
        try:
            matrix = module.layout.unpack(arrays, module.shape)
        except FewbitsError as error:
            raise self._named(module.name, error) from None
        return np.ascontiguousarray(matrix.T) if module.turned else matrix

    def _array(self, info: TensorInfo) -> npt.NDArray[Any]:
        return stored_bytes(info).view(NUMPY_TYPES[info.dtype]).reshape(info.shape)


def layout_of(path: Path, settings: Any, names: Iterable[str]) -> Layout | None:
    """The layout of a model directory; None where nothing tells of quantization.

    Raises:
        FewbitsError: a kind of quantization that is not known, by name, or settings that cannot be read.
    """
    if not settings:
        present = list(names)
        for known in LAYOUTS.values():
            if known.self_describing and any(name.endswith(known.markers) for name in present):
                return known.from_config({})
        return None
    method = settings.get("quant_method", "") if isinstance(settings, Mapping) else str(settings)
    layout = next((known for known in LAYOUTS.values() if known.quant_method == method), None)
    if layout is None or not isinstance(settings, Mapping):
        raise FewbitsError(
            f"{path}: the weights are already quantized with {method!r}, which cannot be read yet.",
            f"Known are {', '.join(sorted({known.quant_method for known in LAYOUTS.values()}))}; "
            "else start from the unquantized model.",
        )
    try:
        return layout.from_config(settings)
    except FewbitsError as error:
        raise FewbitsError(f"{path}: {error.message}", error.hint) from None


def group(stored: Mapping[str, TensorInfo], markers: tuple[str, ...]) -> dict[str, dict[str, TensorInfo]]:
    """The stored tensors of each module that has a marker, by module and suffix. A bias is none of them."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name in stored:
        marker = next((marker for marker in markers if name.endswith(marker)), None)
        if marker:
            modules[name.removesuffix(marker)] = {}
    for name, info in stored.items():
        at = name.rfind(".")
        while at >= 0 and name[:at] not in modules:
            at = name.rfind(".", 0, at)
        if at >= 0 and name[at:] != ".bias":
            modules[name[:at]][name[at:]] = info
    return modules
