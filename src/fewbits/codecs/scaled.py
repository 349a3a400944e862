"""Storage types of whole matrices: a code for each weight, and a scale (and zero point) for each block of them.

What GPTQ, AWQ, bitsandbytes, compressed-tensors and HQQ checkpoints hold differs in levels, block and precision of the
scales only (specs, checkpoints.md), so one class with five fields describes them all:
value = (level[code] - zero) * scale / global scale. How the parts are packed is the layouts' business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fewbits.codecs.base import Floats
from fewbits.codecs.scaled_levels import TABLES, Codes, Levels, ladder
from fewbits.codecs.scaled_scales import (
    EMPTY,
    FINITE,
    NESTED_BLOCK,
    SCALE_BITS,
    Nested,
    ScaleType,
    dynamic_map,
    global_factor,
    nest,
    power_of_two,
    store,
    store_points,
)
from fewbits.codecs.scaled_search import LARGEST, search_floats, search_free, search_scales
from fewbits.codecs.storage import Coded, StorageType
from fewbits.errors import FewbitsError
from fewbits.kernels.hqq import round_columns, round_rows
from fewbits.kernels.lanes import usable_importance
from fewbits.kernels.matrices import block_extremes, decode_rows, round_e4m3, round_integers, round_levels

__all__ = ["Codes", "Levels", "Nested", "Quantized", "ScaleType", "Scaled", "Zero", "dynamic_map"]

Zero = Literal["none", "middle", "integer", "float"]


@dataclass(frozen=True)
class Scaled(StorageType):
    """A storage type.

    Attributes:
        levels: what a code stands for: integers 0 .. 2^bits - 1, or a table.
        bits: of a code.
        block: rows and columns that share a scale; 0 stands for all of them.
        zero: `none`: there is none (tables); `middle`: always 2^(bits - 1), stored nowhere or as a constant
            (symmetric); `integer`: a code, 0 .. 2^bits - 1; `float`: stored as scales are.
        scale: how scales are stored. `E4M3` scales come with one float32 global scale of the matrix that they are
            divided by (NVFP4); `NESTED` scales are 8-bit codes in blocks of 256 (bitsandbytes' double quantization).
            Symmetric integers with `F32` scales are bitsandbytes' and do without the lowest code.
        strided: a scale covers a column of rows that lie rows/block apart (HQQ's axis 0) instead of neighbours; block
            is (rows of a group, 1).
    """

    levels: Levels
    bits: int
    block: tuple[int, int]
    zero: Zero
    scale: ScaleType
    strided: bool = False

    @property
    def name(self) -> str:
        """E.g. `INT4_G128` (symmetric), `UINT4_G64` (with zero points), `NF4_G64`, `E4M3_128x128`, `INT8_ROW`.

        `_NESTED` follows where scales are quantized in turn, `_FLOAT` where zero points are floats.
        """
        head = f"{'INT' if self.zero == 'middle' else 'UINT'}{self.bits}" if self.levels == "INT" else self.levels
        rows, columns = self.block
        tail = {(0, 0): "TENSOR", (1, 0): "ROW"}.get(self.block, f"{rows}x{columns}")
        if self.strided:
            tail = f"S{rows}"
        elif rows == 1 and columns:
            tail = f"G{columns}"
        kind = {"NESTED": "_NESTED"}.get(self.scale, "_FLOAT" if self.zero == "float" else "")
        return f"{head}_{tail}{kind}"

    @property
    def rows_apart(self) -> bool:
        return self.block[0] == 1 and not self.strided and self.scale not in ("NESTED", "E4M3")

    @property
    def needs_all_rows(self) -> bool:
        return self.strided

    @property
    def shares_a_scale(self) -> bool:
        return self.scale == "E4M3"

    @property
    def narrow(self) -> bool:
        """Whether the lowest code stays unused, so that codes are symmetric about zero."""
        return self.levels == "INT" and self.zero == "middle" and self.scale == "F32"

    @property
    def signed(self) -> bool:
        """Whether scales may be negative, for the one code more on one side of zero to serve the largest weight.

        Engines multiply by scales and do not mind. In 8 bits it gains less than 1 %.
        """
        return self.levels == "INT" and self.zero == "middle" and self.bits <= 4 and not self.narrow

    @property
    def middle(self) -> int:
        """The zero of symmetric integers, else 0."""
        return 1 << (self.bits - 1) if self.zero == "middle" else 0

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales of a matrix of this shape.

        Raises:
            FewbitsError: the group does not divide the rows.
        """
        rows, columns = shape
        if not rows or not columns:
            raise FewbitsError(f"A matrix of {rows} x {columns} holds no weights.", "The file is damaged.")
        high, wide = self.block[0] or rows, self.block[1] or columns
        if self.strided:
            if rows % high:
                raise FewbitsError(f"Groups of {high} do not divide {rows} rows.", "Choose another group size.")
            return rows // high, columns
        if high == 1 and columns % wide:
            fitting = [g for g in (128, 64, 32, 16) if columns % g == 0]
            way = f"Take groups of {fitting[0]}." if fitting else "Take one scale a row."
            raise FewbitsError(f"Groups of {wide} do not divide rows of {columns}.", way)
        return -(-rows // high), -(-columns // wide)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Codes, scales and zero points of a matrix as stored, in bits a weight; constants are not counted."""
        rows, columns = self.grid(shape)
        zero = {"none": 0, "middle": 0, "integer": self.bits, "float": SCALE_BITS[self.scale]}[self.zero]
        total = rows * columns * (SCALE_BITS[self.scale] + zero)
        if self.scale == "NESTED":
            total += 32 * (-(-rows * columns // NESTED_BLOCK) + 1)
        elif self.scale == "E4M3":
            total += 32
        return self.bits + total / (shape[0] * shape[1])

    def ladder(self) -> tuple[Floats, Codes]:
        """The distinct levels, float32 [n], ascending, and their codes, uint8 [n].

        Symmetric integers come less their middle; from others the zero point is yet to be subtracted.
        """
        if self.levels == "INT":
            codes = np.arange(int(self.narrow), 1 << self.bits)
            return (codes - self.middle).astype(np.float32), codes.astype(np.uint8)
        rungs = ladder(self.levels)
        return rungs.values, rungs.codes

    def ladder01(self) -> tuple[Floats, bool]:
        """The distinct levels, ascending from 0 to 1, float32 [n], and whether they are evenly spaced."""
        values, _ = self.ladder()
        wide = values.astype(np.float64)
        return ((wide - wide[0]) / (wide[-1] - wide[0])).astype(np.float32), self.levels == "INT"

    def ranges(self, found: Quantized, shape: tuple[int, int]) -> tuple[Floats, Floats]:
        """(low, width) of every weight, float32 [rows, columns]: value = low + width * ladder01[code's rank].

        Widths are negative where scales are.
        """
        values, _ = self.ladder()
        scales = found.scales / np.float32(found.global_scale)
        zeros = np.float32(0) if found.zeros is None else found.zeros
        low, width = (values[0] - zeros) * scales, (values[-1] - values[0]) * scales
        return self.spread(low, shape), self.spread(width, shape)

    def from_ranks(self, ranks: Codes, found: Quantized) -> Quantized:
        """The matrix with the scales of `found` and these places in the ladder, uint8 [rows, columns]."""
        return replace(found, codes=self.ladder()[1][ranks])

    def spread(self, scales: Floats, shape: tuple[int, int]) -> Floats:
        """A number of every block as a number of every weight: [grid] -> [rows, columns]."""
        high, wide, _ = self._blocks(shape)
        if self.strided:
            return np.tile(scales, (high, 1))
        return np.repeat(np.repeat(scales, wide, axis=1)[:, : shape[1]], high, axis=0)[: shape[0]]

    def _blocks(self, shape: tuple[int, int]) -> tuple[int, int, int]:
        """Rows and columns that share a scale, and whether they are strided, for the kernels."""
        return self.block[0] or shape[0], self.block[1] or shape[1], int(self.strided)

    def extremes(self, weights: Floats) -> tuple[Floats, Floats]:
        """Smallest and largest weight of every block, float32 [grid]."""
        shape = (weights.shape[0], weights.shape[1])
        low, high = np.empty(self.grid(shape), np.float32), np.empty(self.grid(shape), np.float32)
        rows, columns, strided = self._blocks(shape)
        block_extremes(np.ascontiguousarray(weights), rows, columns, bool(strided), low, high)
        return low, high

    def settle(self, weights: Floats, amax: float | None = None) -> Quantized:
        """Scales by the largest absolute value or by the range, codes by rounding to nearest: no choice is made.

        This is what each ecosystem does itself: bitsandbytes' quantize_4bit and int8_vectorwise_quant,
        compressed-tensors' calculate_qparams (FP8, INT8, NVFP4, MXFP4, group integers), GPTQ's and AWQ's minmax for
        zero points, HQQ's start.

        Args:
            weights: float32 [rows, columns], finite.
            amax: largest magnitude of all matrices that share this one's global scale; None: its own.

        Raises:
            FewbitsError: the group does not divide the rows.
        """
        weights = np.ascontiguousarray(weights, np.float32)
        if self.zero == "float":
            inverse, zeros = self.start_of_range(weights)
            codes = np.empty(weights.shape, np.uint8)
            top = np.float32((1 << self.bits) - 1)
            if self.strided:
                elements = self.block[0]
                round_columns(weights.reshape(elements, -1), inverse, zeros, top, codes.reshape(elements, -1))
            else:
                round_rows(weights.reshape(inverse.size, -1), inverse, zeros, top, codes.reshape(inverse.size, -1))
            return Quantized(self, codes, *self.stored_start(inverse, zeros, (weights.shape[0], weights.shape[1])))
        lowest, highest = self.extremes(weights)
        if self.zero == "integer":
            scales, zeros = self._settled_pairs(lowest, highest)
            return Quantized(self, self.round(weights, scales, zeros), scales, zeros)
        largest = np.maximum(highest, -lowest)
        scales, global_scale = self._settled_scales(largest, amax)
        if self.narrow:
            inverse = np.asarray(np.float32(self.reach) / np.maximum(largest, np.float32(1e-36)), np.float32)
            return Quantized(self, self._round(weights, inverse, False, np.zeros_like(scales)), scales)
        codes = self.round(weights, scales, None, global_scale)
        # codes stay those of the scales as they were, as in bitsandbytes
        nested = nest(scales) if self.scale == "NESTED" else None
        return Quantized(self, codes, scales if nested is None else nested.decode(), None, global_scale, nested)

    def _settled_scales(self, largest: Floats, amax: float | None) -> tuple[Floats, float]:
        """Scales by the largest magnitude of every block, float32 [grid], and the global scale."""
        if self.scale == "E8M0":
            return power_of_two(largest), 1.0
        values, _ = self.ladder()
        raw = np.minimum(largest / np.float32(self.reach), np.float32(FINITE) / max(-values[0], values[-1]))
        if self.scale == "E4M3":
            factor = global_factor(float(largest.max()) if amax is None else amax)
            raw = factor * raw
            # too small for its least value, compressed-tensors takes this
            return np.where(raw <= 2.0**-10, np.float32(EMPTY["E4M3"]), store("E4M3", raw)), float(factor)
        empty = 0.0 if self.narrow or self.levels in ("NF4", "FP4") else EMPTY[self.scale]
        return np.where(largest == 0, np.float32(empty), store(self.scale, raw)), 1.0

    def _settled_pairs(self, lowest: Floats, highest: Floats) -> tuple[Floats, Floats]:
        """Scales and integer zero points as GPTQ and AWQ settle them: zero is in the range, and has a code."""
        top = np.float32((1 << self.bits) - 1)
        most = np.float32(FINITE / 2)
        low, high = np.clip(lowest, -most, 0), np.clip(highest, 0, most)
        scales = np.where(high == low, np.float32(EMPTY[self.scale]), store(self.scale, (high - low) / top))
        return scales, np.clip(np.rint(-low / scales), 0, top).astype(np.float32)

    def start_of_range(self, weights: Floats) -> tuple[Floats, Floats]:
        """HQQ's start: inverse scales and zero points, in codes, of the groups in a row, float32 [groups] each."""
        lowest, highest = (part.reshape(-1) for part in self.extremes(weights))
        one, top = np.float32(1), np.float32((1 << self.bits) - 1)
        with np.errstate(over="ignore", divide="ignore"):
            extent = highest - lowest
            # torch divides a number by a tensor by way of its reciprocal
            inverse = np.where(extent <= np.float32(1e-4), one, (one / extent) * top)
        # hqq's own limit is the upper one; the lower one keeps what follows finite
        inverse = np.clip(inverse, np.float32(1e-37), np.float32(2e4))
        return inverse, -lowest * inverse

    def stored_start(self, inverse: Floats, zeros: Floats, shape: tuple[int, int]) -> tuple[Floats, Floats]:
        """Scales and zero points, [grid], as they decode, of inverse scales and zero points of the groups in a row."""
        grid = self.grid(shape)
        return store(self.scale, np.float32(1) / inverse.reshape(grid)), store_points(self.scale, zeros.reshape(grid))

    @property
    def reach(self) -> float:
        """The level that the largest weight of a block is stored as."""
        if self.levels != "INT":
            return float(self.ladder()[0][-1])
        return (1 << (self.bits - 1)) - 1 if self.narrow else ((1 << self.bits) - 1) / 2

    def round(self, weights: Floats, scales: Floats, zeros: Floats | None, global_scale: float = 1.0) -> Codes:
        """Codes by rounding to nearest, uint8 [rows, columns]; not for zero points that are floats."""
        weights = np.ascontiguousarray(weights, np.float32)
        scales = np.asarray(scales / np.float32(global_scale), np.float32)
        points = np.zeros_like(scales) if zeros is None else zeros
        if self.levels in ("NF4", "FP4") or self.narrow:
            # bitsandbytes multiplies by the inverse
            with np.errstate(over="ignore", divide="ignore"):
                inverse = 1 / np.copysign(np.maximum(np.abs(scales), np.float32(1e-38)), scales)
            return self._round(weights, np.asarray(inverse, np.float32), False, points)
        return self._round(weights, scales, True, points)

    def _round(self, weights: Floats, by: Floats, divide: bool, zeros: Floats) -> Codes:
        grid = np.array(self._blocks((weights.shape[0], weights.shape[1])))
        codes = np.empty(weights.shape, np.uint8)
        if self.levels == "INT":
            ends = (np.float32(int(self.narrow)), np.float32((1 << self.bits) - 1))
            round_integers(weights, by, divide, zeros + np.float32(self.middle), *ends, grid, codes)
        elif self.levels == "E4M3":
            round_e4m3(weights, by, grid, codes)
        else:
            rungs = ladder(self.levels)
            round_levels(weights, by, divide, rungs.steps, rungs.codes, grid, codes)
        return codes

    def search(
        self, weights: Floats, importance: Floats | None = None, amax: float | None = None, device: str = "cpu"
    ) -> Quantized:
        """Scales, and zero points, of the least weighted squared error; never worse than `settle`'s.

        Args:
            weights: float32 [rows, columns], finite.
            importance: float32 [columns], non-negative, or None for ones.
            amax: as for `settle`.
            device: of torch, where scales are searched that can be on a GPU; see `search_scales`.

        Raises:
            FewbitsError: the group does not divide the rows.
        """
        weights = np.ascontiguousarray(weights, np.float32)
        start = self.settle(weights, amax)
        rows, columns, _ = self._blocks((weights.shape[0], weights.shape[1]))
        if max(weights.max(initial=0), -weights.min(initial=0)) > LARGEST:
            return start
        if self.zero == "float":
            return self._search_free(weights, importance, start) if (rows * columns) % 4 == 0 else start
        if self.levels == "E4M3":
            scales = search_floats(self, weights, importance, start.scales)
            return Quantized(self, self.round(weights, scales, None), scales)
        if rows > 1:
            return start
        if self.scale == "NESTED":
            return self._search_nested(weights, importance, start)
        found, zeros = search_scales(self, weights, importance, start.scales, start.zeros, start.global_scale, device)
        codes = self.round(weights, found, zeros, start.global_scale)
        return Quantized(self, codes, found, zeros, start.global_scale)

    def _search_nested(self, weights: Floats, importance: Floats | None, start: Quantized) -> Quantized:
        """Scales are searched as if they stayed floats, then nested, and codes chosen for what that makes of them."""
        lowest, highest = self.extremes(weights)
        ideal, _ = search_scales(self, weights, importance, np.maximum(highest, -lowest), None, 1.0)
        nested = nest(ideal)
        scales = nested.decode()
        found = Quantized(self, self.round(weights, scales, None), scales, None, 1.0, nested)
        usable = usable_importance(importance, weights.shape[1])
        better = np.square(found.decode() - weights).sum(axis=0) @ usable < (
            np.square(start.decode() - weights).sum(axis=0) @ usable
        )
        return found if better else start

    def _search_free(self, weights: Floats, importance: Floats | None, start: Quantized) -> Quantized:
        """Least squares for scales and zero points in float32, where that helps."""
        assert start.zeros is not None
        scales, zeros = search_free(self, weights, importance)
        usable = scales > 0
        scales, zeros = store(self.scale, scales), store_points(self.scale, zeros)
        shape = (weights.shape[0], weights.shape[1])
        with np.errstate(over="ignore"):
            places = weights / self.spread(scales, shape) + self.spread(zeros, shape)
        codes = np.clip(np.rint(places), 0, (1 << self.bits) - 1).astype(np.uint8)
        found = Quantized(self, codes, scales, zeros)
        gain = np.square(start.decode() - weights) - np.square(found.decode() - weights)
        gain *= usable_importance(importance, shape[1])
        down, across = scales.shape
        parts = gain.reshape(-1, down, across) if self.strided else gain.reshape(down, across, -1)
        better = (parts.sum(axis=0 if self.strided else 2) > 0) & usable
        return Quantized(
            self,
            np.where(self.spread(better, shape), codes, start.codes),
            np.where(better, scales, start.scales),
            np.where(better, zeros, start.zeros),
        )


@dataclass(frozen=True)
class Quantized(Coded):
    """A matrix in a storage type.

    Attributes:
        codes: uint8 [rows, columns].
        scales: float32 [the type's grid], exactly as their stored form decodes.
        zeros: float32 [grid], whole numbers where the type says so; None where there are none or they are the middle.
        global_scale: of the matrix; scales are divided by it.
        nested: the stored form of `NESTED` scales.
    """

    type: Scaled
    codes: Codes
    scales: Floats
    zeros: Floats | None = None
    global_scale: float = 1.0
    nested: Nested | None = None

    def decode(self) -> Floats:
        """float32 [rows, columns]."""
        kind = self.type
        table = np.arange(256, dtype=np.float32) - np.float32(kind.middle)
        if kind.levels != "INT":
            values = TABLES[kind.levels]
            table[: values.size] = values
        scales = self.scales / np.float32(self.global_scale)
        zeros = np.zeros_like(scales) if self.zeros is None else self.zeros
        out = np.empty(self.codes.shape, np.float32)
        grid = np.array(kind._blocks((self.codes.shape[0], self.codes.shape[1])))
        decode_rows(np.ascontiguousarray(self.codes), table, scales, zeros, grid, out)
        return out
