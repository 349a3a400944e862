"""bitsandbytes checkpoints (0.43 to 0.50), as transformers saves and loads them.

NF4 and FP4, of a module of n = out * in weights, all under the weight's own name:
- `weight` uint8 [n/2, 1]: two codes a byte, the first in the high nibble; blocks of 64 run on across rows.
- `weight.absmax` float32 [n/64]; with double quantization uint8, indices into `weight.nested_quant_map` float32 [256],
  to be multiplied by `weight.nested_absmax` float32 [n/64/256] and added to the offset.
- `weight.quant_map` float32 [16]: the level of each code.
- `weight.quant_state.bitsandbytes__nf4` (or `__fp4`) uint8: JSON with type, block size, shape, offset.

LLM.int8(): `weight` int8 [out, in]; `SCB` float32 [out], the largest magnitude of each row; `weight_format` uint8, 0.
weight = code * SCB / 127.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from fewbits.codecs.base import Floats
from fewbits.codecs.packing import pack_nibbles
from fewbits.codecs.scaled import Quantized, Scaled, dynamic_map
from fewbits.codecs.scaled_levels import TABLES
from fewbits.errors import FewbitsError
from fewbits.layouts.base import ITEM_BYTES, Arrays, Layout, Part
from fewbits.layouts.values import DAMAGED, compare, from_stored, get

BLOCK, NESTED_BLOCK = 64, 256
STATE = ".weight.quant_state.bitsandbytes__"
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OFFSET_WIDTH = 24
"""Longest decimal form of a float32: the JSON is padded so that its size does not depend on the offset."""
_KINDS: dict[str, tuple[Scaled, str]] = {
    "nf4": (Scaled("NF4", 4, (1, BLOCK), "none", "NESTED"), "NF4 with double quantization, what QLoRA uses"),
    "nf4-single": (Scaled("NF4", 4, (1, BLOCK), "none", "F32"), "NF4 with float32 scales"),
    "fp4": (Scaled("FP4", 4, (1, BLOCK), "none", "NESTED"), "bitsandbytes' own 4-bit float, double quantization"),
    "fp4-single": (Scaled("FP4", 4, (1, BLOCK), "none", "F32"), "the same with float32 scales"),
    "int8": (Scaled("INT", 8, (1, 0), "middle", "F32"), "LLM.int8(): rows of 8-bit integers"),
}


@dataclass(frozen=True)
class _State:
    """What the JSON of a 4-bit weight says."""

    kind: Literal["nf4", "fp4"]
    block: int
    shape: tuple[int, int]
    nested_block: int
    offset: float

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class BitsAndBytes(Layout):
    """NF4, FP4 and LLM.int8().

    Attributes:
        dtype: of the model's other tensors, which bitsandbytes then computes in.
    """

    name: ClassVar[str] = "bnb"
    quant_method: ClassVar[str] = "bitsandbytes"
    markers: ClassVar[tuple[str, ...]] = (".weight.absmax", ".weight.quant_map", f"{STATE}nf4", f"{STATE}fp4", ".SCB")
    self_describing: ClassVar[bool] = True
    described_by: ClassVar[tuple[str, ...]] = (f"{STATE}nf4", f"{STATE}fp4", ".weight_format")

    type: Scaled
    dtype: str = "BF16"

    @property
    def activations(self) -> Literal["float", "dynamic", "static"]:
        return "float" if self.four_bit else "dynamic"

    @property
    def four_bit(self) -> bool:
        return self.type.bits == 4

    @property
    def nested(self) -> bool:
        """Whether scales are quantized in turn (double quantization)."""
        return self.type.scale == "NESTED"

    @classmethod
    def examples(cls) -> Mapping[str, str]:
        return {name: summary for name, (_, summary) in _KINDS.items()}

    @classmethod
    def from_spec(cls, spec: str) -> BitsAndBytes:
        if spec not in _KINDS:
            raise FewbitsError(
                f"Unknown target 'bnb:{spec}'.", f"Known: {', '.join('bnb:' + name for name in _KINDS)}."
            )
        return cls(_KINDS[spec][0])

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BitsAndBytes:
        if config.get("load_in_8bit") is True:
            return cls.from_spec("int8")
        kind = config.get("bnb_4bit_quant_type", "fp4")
        if kind not in ("nf4", "fp4"):
            raise FewbitsError(f"quantization_config: bnb_4bit_quant_type is {kind!r}.", "Known are nf4 and fp4.")
        return cls.from_spec(kind if config.get("bnb_4bit_use_double_quant") is True else f"{kind}-single")

    def for_floats(self, dtype: str) -> BitsAndBytes:
        return replace(self, dtype=dtype)

    def check(self, shape: tuple[int, int]) -> None:
        if self.four_bit and shape[1] % BLOCK:
            raise FewbitsError(
                f"Rows of {shape[1]} are no multiple of bitsandbytes' blocks of {BLOCK}.",
                "Take bnb:int8, which has none, or keep this tensor as it is.",
            )

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        rows, columns = shape
        if not self.four_bit:
            return {".weight": Part("I8", shape), ".SCB": Part("F32", (rows,)), ".weight_format": Part("U8", ())}
        blocks = rows * columns // BLOCK
        found = {
            ".weight": Part("U8", (rows * columns // 2, 1)),
            ".weight.absmax": Part("U8" if self.nested else "F32", (blocks,)),
            ".weight.quant_map": Part("F32", (16,)),
            self._state_suffix: Part("U8", (len(self._json(shape, 0.0)),)),
        }
        if self.nested:
            found[".weight.nested_absmax"] = Part("F32", (-(-blocks // NESTED_BLOCK),))
            found[".weight.nested_quant_map"] = Part("F32", (256,))
        return found

    @property
    def _state_suffix(self) -> str:
        return STATE + self.type.levels.lower()

    def _json(self, shape: tuple[int, int], offset: float) -> bytes:
        state: dict[str, Any] = {
            "quant_type": self.type.levels.lower(),
            "blocksize": BLOCK,
            "dtype": TORCH_NAMES[self.dtype],
            "shape": list(shape),
        }
        if not self.nested:
            return json.dumps(state).encode()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        text = json.dumps(state)
        return text.encode() + b" " * (_OFFSET_WIDTH - len(json.dumps(offset)))

    def pack(
        self, matrix: Quantized, g_idx: npt.NDArray[np.integer] | None = None, input_peak: float | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        shape = (matrix.codes.shape[0], matrix.codes.shape[1])
        self.check(shape)
        if not self.four_bit:
            # in float64 the product rounds back to the very magnitude that the scale came from
            largest = (matrix.scales.reshape(-1).astype(np.float64) * 127).astype(np.float32)
            signed = (matrix.codes ^ np.uint8(128)).view(np.int8)
            return {".weight": signed, ".SCB": largest, ".weight_format": np.array(0, np.uint8)}
        offset = matrix.nested.offset if matrix.nested is not None else 0.0
        found: dict[str, npt.NDArray[Any]] = {
            ".weight": pack_nibbles(matrix.codes.reshape(-1), high_first=True)[:, np.newaxis],
            ".weight.quant_map": TABLES[self.type.levels],
            self._state_suffix: np.frombuffer(self._json(shape, offset), np.uint8),
        }
        if matrix.nested is None:
            return found | {".weight.absmax": np.ascontiguousarray(matrix.scales.reshape(-1), np.float32)}
        return found | {
            ".weight.absmax": matrix.nested.codes.reshape(-1),
            ".weight.nested_absmax": matrix.nested.absmax.reshape(-1),
            ".weight.nested_quant_map": dynamic_map(),
        }

    def shape_of(self, parts: Mapping[str, Part]) -> tuple[int, int]:
        if self.four_bit:
            raise FewbitsError("The shape of a 4-bit weight is known from its quant_state only.")
        rows, columns = get(parts, ".weight").shape
        compare(parts, {".weight": Part("I8", (rows, columns)), ".SCB": Part("F32", (rows,))})
        return rows, columns

    def holds(self, parts: Mapping[str, Part]) -> bool:
        # packed weights may be stored as floats (bnb_4bit_quant_storage), so the type of `.weight` tells nothing
        return True

    def identify(self, parts: Mapping[str, Part], values: Arrays) -> tuple[BitsAndBytes, tuple[int, int]]:
        if ".SCB" in parts:
            if values.get(".weight_format", np.zeros(1)).any():
                raise FewbitsError("weight_format is not row-major.", "Save the model again with bitsandbytes >= 0.43.")
            layout = replace(self, type=_KINDS["int8"][0])
            return layout, layout.shape_of(parts)
        state = _read_state(values)
        nested = ".weight.nested_absmax" in parts
        blocks = -(-state.size // state.block)
        weight, absmax = parts.get(".weight"), parts.get(".weight.absmax")
        # in any type (bnb_4bit_quant_storage): only the bytes count
        if weight is None or ITEM_BYTES.get(weight.dtype, 0) * prod(weight.shape) != -(-state.size // 2):
            raise FewbitsError(f".weight does not hold {state.shape[0]} x {state.shape[1]} codes of 4 bits.", DAMAGED)
        if absmax is None or prod(absmax.shape) != blocks or (absmax.dtype == "U8") != nested:
            raise FewbitsError(f".weight.absmax does not hold {blocks} scales of {state.block} weights.", DAMAGED)
        expected = {".weight.quant_map": Part("F32", (16,))}
        if nested:
            expected[".weight.nested_absmax"] = Part("F32", (-(-blocks // state.nested_block),))
            expected[".weight.nested_quant_map"] = Part("F32", (256,))
        compare(parts, expected)
        levels: Literal["NF4", "FP4"] = "NF4" if state.kind == "nf4" else "FP4"
        kind = Scaled(levels, 4, (1, state.block), "none", "NESTED" if nested else "F32")
        return replace(self, type=kind), state.shape

    def unpack(self, arrays: Arrays, shape: tuple[int, int]) -> Floats:
        if not self.four_bit:
            scales = from_stored(arrays[".SCB"], ".SCB") / np.float32(127)
            return arrays[".weight"].astype(np.float32) * scales[:, np.newaxis]
        state = _read_state(arrays)
        levels = from_stored(arrays[".weight.quant_map"], ".weight.quant_map")
        pairs = np.stack([np.repeat(levels, 16), np.tile(levels, 16)], axis=1).view(np.uint64).reshape(-1)
        packed = np.ascontiguousarray(arrays[".weight"]).view(np.uint8).reshape(-1)
        values = pairs[packed].view(np.float32)[: state.size]
        scales = self._scales(arrays, state)
        whole = state.size // state.block
        values[: whole * state.block].reshape(whole, state.block)[...] *= scales[:whole, np.newaxis]
        values[whole * state.block :] *= scales[-1]
        return values.reshape(shape)

    def _scales(self, arrays: Arrays, state: _State) -> Floats:
        """float32 [blocks], in the order of the flat weights."""
        absmax = arrays[".weight.absmax"]
        if self.nested:
            levels = from_stored(arrays[".weight.nested_quant_map"], ".weight.nested_quant_map")
            outer = from_stored(arrays[".weight.nested_absmax"], ".weight.nested_absmax")
            flat = absmax.reshape(-1)
            return levels[flat] * np.repeat(outer, state.nested_block)[: flat.size] + np.float32(state.offset)
        scales = from_stored(absmax, ".weight.absmax")
        rows, columns = state.shape
        if scales.shape == (columns // state.block, rows):
            # saved after a forward pass on a CPU with AVX512-BF16, which lays scales out for its kernel, rounds them to
            # bfloat16 and is undone for the codes only: bitsandbytes itself reads such a file wrongly
            scales = scales.T
        return np.ascontiguousarray(scales).reshape(-1)

    def config(self, kept: Sequence[str], quantized: Sequence[str] = ()) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "load_in_4bit": self.four_bit,
            "load_in_8bit": not self.four_bit,
            "_load_in_4bit": self.four_bit,
            "_load_in_8bit": not self.four_bit,
            "bnb_4bit_quant_type": self.type.levels.lower() if self.four_bit else "fp4",
            "bnb_4bit_use_double_quant": self.nested,
            "bnb_4bit_compute_dtype": TORCH_NAMES[self.dtype] if self.four_bit else "float32",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": list(kept),
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }


def _read_state(arrays: Arrays) -> _State:
    """Parse the JSON of a 4-bit weight, which anybody may have written."""
    found = [(suffix, array) for suffix, array in arrays.items() if suffix.startswith(STATE)]
    if len(found) != 1:
        raise FewbitsError(f"{STATE}nf4 or {STATE}fp4 is missing or there twice.", DAMAGED)
    suffix, array = found[0]
    try:
        state = json.loads(array.tobytes())
        kind, block, (rows, columns) = state["quant_type"], state["blocksize"], state["shape"]
        nested_block, offset = state.get("nested_blocksize", NESTED_BLOCK), float(state.get("nested_offset", 0.0))
        counts = (block, rows, columns, nested_block)
        sound = all(type(count) is int and 0 < count < 2**31 for count in counts) and np.isfinite(offset)
        sound = sound and kind == suffix.removeprefix(STATE) and array.dtype == np.uint8
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise FewbitsError(f"{suffix} is no quantization state of a matrix.", DAMAGED)
    return _State(kind, block, (rows, columns), nested_block, offset)
