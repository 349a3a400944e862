"""EXL2 checkpoints (exllamav2 0.3.2): groups of input channels with 2 to 8 bits each, the most active channels first.

A module of in = K, out = N (stored as N', the next multiple of 32) and G groups has
- `q_invperm` int32 [K]: where each input channel lies among the rows, the most active first;
- `q_groups` int16 [2 G]: bits and first row of `q_weight` of each group, bits descending;
- `q_weight` int32 [words, N']: the codes of a group one after the other down each column, lowest bits first;
- `q_scale` int32 [G, N' / 8]: 4-bit scale codes, the first in the lowest bits;
- `q_scale_max` float16 [G].
weight = (code - 2^(bits - 1)) * scale with scale = (scale code + 1)^2 * (scale_max / 256), each rounded to half
precision. `q_perm` and `q_group_map` of older files say nothing new. The engine goes by the tensors: the configuration
is a signature that no loader needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fewbits.codecs.base import Floats
from fewbits.codecs.exl2_options import ATTENTION, HEAD, MLP
from fewbits.codecs.packing import pack_columns, pack_rows, unpack_columns
from fewbits.codecs.row_groups import BITS, GroupedRows, RowGroups, decode, padded, scales_of
from fewbits.errors import FewbitsError
from fewbits.layouts.base import Arrays, Layout, Made, Part
from fewbits.layouts.values import DAMAGED, compare, get

VERSION = "0.3.2"
"""Of exllamav2, as whose work files are signed."""
MOST_INPUTS = 65535
"""The engine keeps the rows' places in 16 bits."""


@dataclass(frozen=True)
class EXL2(Layout):
    """Row groups of one kind; the modules of a checkpoint usually differ.

    Attributes:
        head_bits: as the configuration names them; None: 16, the head is not quantized.
        average_bits: of the whole checkpoint, None: those of the type.
        calibration: rows, length of each, and name of the text.
    """

    name: ClassVar[str] = "exl2"
    quant_method: ClassVar[str] = "exl2"
    markers: ClassVar[tuple[str, ...]] = (".q_weight",)
    described_by: ClassVar[tuple[str, ...]] = (".q_groups",)
    float_dtype: ClassVar[str] = "F16"
    methods: ClassVar[tuple[str, ...]] = ("gptq",)
    old_rope_keys: ClassVar[bool] = True
    mean_bits: ClassVar[tuple[float, float] | None] = (2.0, 8.5)
    fuses: ClassVar[bool] = False

    type: RowGroups
    head_bits: int | None = field(default=None, compare=False)
    average_bits: float | None = field(default=None, compare=False)
    calibration: tuple[int, int, str] | None = field(default=None, compare=False)

    @property
    def engine_dtype(self) -> str:
        return "F16"

    @classmethod
    def examples(cls) -> Mapping[str, str]:
        return {
            "4.0": "4 bits per weight on average (2.1 to 8), mixed by a measuring pass: exllamav2 on NVIDIA cards",
            "4_g128": "4 bits everywhere, groups of 128 (also 8, 6, 5, 3, 2 bits; 64, 32)",
            "8x.05_4x.95_g32-128": "8 bits for the most active 5 % of the inputs in groups of 32, 4 for the rest",
        }

    @classmethod
    def from_spec(cls, spec: str) -> EXL2:
        try:
            return cls(RowGroups.parse(spec))
        except FewbitsError as error:
            raise FewbitsError(f"Unknown target 'exl2:{spec}'.", error.hint) from None

    @classmethod
    def members(cls, spec: str) -> tuple[EXL2, ...]:
        if not cls.mixed(spec):
            return ()
        kinds = dict.fromkeys(kind for menu in (ATTENTION, MLP) for line in menu for kind in line)
        return tuple(cls(kind) for kind in sorted(kinds, key=lambda kind: (kind.bits, kind.name)))

    @classmethod
    def heads(cls) -> Mapping[int, EXL2]:
        return {bits: cls(kind) for bits, kind in HEAD.items()}

    def of_type(self, storage: str) -> EXL2 | None:
        try:
            return replace(self, type=RowGroups.parse(storage))
        except FewbitsError:
            return None

    def told(self, made: Made) -> EXL2:
        calibration = (made.windows, made.length, made.text)
        return replace(self, average_bits=made.bits, head_bits=made.head_bits, calibration=calibration)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> EXL2:
        bits, head = config.get("bits"), config.get("head_bits")
        return cls(
            RowGroups.uniform(4),  # modules say themselves what they are
            head if isinstance(head, int) and head in BITS else None,
            float(bits) if isinstance(bits, int | float) else None,
        )

    def check(self, shape: tuple[int, int]) -> None:
        rows, columns = shape
        if columns % 32 or not 0 < columns <= MOST_INPUTS or rows < 1:
            raise FewbitsError(
                f"{columns} inputs do not go into groups of rows: EXL2 takes multiples of 32, at most {MOST_INPUTS}.",
                "Keep this tensor as it is.",
            )

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        groups = self.type.groups(shape[1])
        width = padded(shape[0])
        return {
            ".q_weight": Part("I32", (sum(bits * rows for bits, rows in groups) // 32, width)),
            ".q_scale": Part("I32", (len(groups), width // 8)),
            ".q_scale_max": Part("F16", (len(groups),)),
            ".q_groups": Part("I16", (2 * len(groups),)),
            ".q_invperm": Part("I32", (shape[1],)),
        }

    def pack(
        self, matrix: GroupedRows, g_idx: npt.NDArray[np.integer] | None = None, input_peak: float | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        columns, rows = matrix.codes.shape
        self.check((rows, columns))
        short = padded(rows) - rows
        words, heads, row, word = [], [], 0, 0
        for bits, size in self.type.groups(columns):
            codes = np.pad(matrix.codes[row : row + size], ((0, 0), (0, short)), constant_values=1 << (bits - 1))
            words.append(pack_rows(codes, bits))
            heads.append((bits, word))
            row, word = row + size, word + len(words[-1])
        inverse = np.empty(columns, np.int32)
        inverse[matrix.order] = np.arange(columns, dtype=np.int32)
        return {
            ".q_weight": np.concatenate(words),
            ".q_scale": pack_columns(np.pad(matrix.scale_codes, ((0, 0), (0, short)), constant_values=15), 4),
            ".q_scale_max": matrix.scale_max,
            ".q_groups": np.array(heads, np.int16).ravel(),
            ".q_invperm": inverse,
        }

    def shape_of(self, parts: Mapping[str, Part]) -> tuple[int, int]:
        shape = get(parts, ".q_weight").shape[1], get(parts, ".q_invperm", 1).shape[0]
        if shape[0] % 32:
            raise FewbitsError(f".q_weight has {shape[0]} columns, no multiple of 32.", DAMAGED)
        self.check(shape)
        compare(parts, self.parts(shape))
        return shape

    def identify(self, parts: Mapping[str, Part], values: Arrays) -> tuple[EXL2, tuple[int, int]]:
        groups = _groups(values.get(".q_groups"), parts)
        found = EXL2(RowGroups.covering(groups), self.head_bits, self.average_bits, self.calibration)
        return found, found.shape_of(parts)

    def unpack(self, arrays: Arrays, shape: tuple[int, int]) -> Floats:
        rows, columns = shape
        groups = self.type.groups(columns)
        inverse = arrays[".q_invperm"].astype(np.int64)
        order = np.full(columns, -1)
        if inverse.min() >= 0 and inverse.max() < columns:
            order[inverse] = np.arange(columns)
        if order.min() < 0:
            raise FewbitsError(".q_invperm is no permutation of the input channels.", DAMAGED)
        weight, codes = arrays[".q_weight"], np.empty((rows, columns), np.uint8)
        row = word = 0
        for bits, size in _runs(groups):
            more = bits * size // 32
            codes[:, row : row + size] = unpack_columns(weight[word : word + more, :rows].T, bits, size)
            row, word = row + size, word + more
        scale_codes = unpack_columns(arrays[".q_scale"], 4, rows)
        scale_max = arrays[".q_scale_max"]
        if scale_max.dtype != np.float16 or not np.isfinite(scale_max).all():
            raise FewbitsError(".q_scale_max holds values that are not finite half-precision numbers.", DAMAGED)
        return decode(groups, order, codes, scales_of(scale_codes, scale_max))

    def config(self, kept: Sequence[str], quantized: Sequence[str] = ()) -> dict[str, Any]:
        rows, length, text = self.calibration or (0, 0, "none")
        return {
            "quant_method": "exl2",
            "version": VERSION,
            "bits": round(self.type.bits if self.average_bits is None else self.average_bits, 4),
            "head_bits": 16 if self.head_bits is None else self.head_bits,
            "calibration": {"rows": rows, "length": length, "dataset": text},
        }


def _runs(groups: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Bits and rows of neighbouring groups of the same bits: whole words each, they make one stream of codes."""
    runs: list[tuple[int, int]] = []
    for bits, rows in groups:
        if runs and runs[-1][0] == bits:
            rows += runs.pop()[1]
        runs.append((bits, rows))
    return runs


def _groups(heads: npt.NDArray[Any] | None, parts: Mapping[str, Part]) -> list[tuple[int, int]]:
    """Bits and rows of each group.

    Raises:
        FewbitsError: `q_groups` is missing or says what cannot be.
    """
    words, inputs = get(parts, ".q_weight").shape[0], get(parts, ".q_invperm", 1).shape[0]
    if heads is None or heads.ndim != 1 or heads.size == 0 or heads.size % 2 or inputs > MOST_INPUTS:
        raise FewbitsError(".q_groups is missing or does not fit.", DAMAGED)
    bits = [int(head) for head in heads[::2]]
    ends = [*(int(head) for head in heads[3::2]), words]
    groups, row = [], 0
    for index, (width, start, end) in enumerate(zip(bits, heads[1::2].tolist(), ends, strict=True)):
        if width not in BITS or start >= end or (index == 0 and start != 0) or width > bits[max(index - 1, 0)]:
            raise FewbitsError(
                f".q_groups names a group of {width} bits in words {start} to {end}, where none can be.", DAMAGED
            )
        rows = (end - start) * 32 // width
        if rows * width != (end - start) * 32 or rows % (16 if width == 2 else 32):
            raise FewbitsError(f".q_groups names a group of {end - start} words of {width}-bit codes.", DAMAGED)
        groups.append((width, rows))
        row += rows
    if row != inputs:
        raise FewbitsError(f".q_groups has {row} rows and .q_invperm {inputs}.", DAMAGED)
    return groups
