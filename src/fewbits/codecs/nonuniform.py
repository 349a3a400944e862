"""IQ4_NL, IQ4_XS, MXFP4, NVFP4: four-bit codes that name one of 16 unevenly spaced levels.

Layouts: block_iq4_nl, block_iq4_xs, block_mxfp4 and block_nvfp4 of ggml-common.h.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.codecs.base import Blocked, Bytes, Floats
from fewbits.kernels.lanes import EXACT, get_f16, put_f16, usable_importance
from fewbits.kernels.levels import Levels, encode_blocks, encode_float_blocks, encode_super_blocks, with_middles

U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)
"""All values of a float of a sign, two exponent bits and one mantissa bit."""
E2M1_CODES = np.array((15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7, 7), np.uint8)
"""How the levels of E2M1, in ascending order, are stored: sign and magnitude."""
IQ4_VALUES = np.array(IQ4, np.float32)
TWICE_E2M1 = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.float32)
"""Values in the order of the stored codes, a zero never negative; doubled, as libggml has them, for scales halved."""


def _half_ue4m3(byte: int) -> float:
    """Half the value of an unsigned float of four exponent and three mantissa bits; the eighth bit is ignored."""
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if byte == 0x7F:
        return 0.0
    return mantissa / 1024 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 8)


HALF_E8M0 = np.ldexp(1.0, np.arange(256) - 128).astype(np.float32)
HALF_UE4M3 = np.array([_half_ue4m3(byte) for byte in range(256)], np.float32)

# fmt: off
IQ4_CANDIDATES = np.array(
    (-157, -144, -139, -134, -129, -125, -120, -110, -104, 92, 108, 114, 121, 129), np.float32,
)
# fmt: on
"""At which the largest magnitude of a block is tried.

Chosen greedily, with replacements, out of 242 (either sign, whole numbers from 60 to 180) for the least error on
Gaussian, Laplace, Student-t(3), uniform, one-sided and real blocks with equal and with lognormal importances: within
0.6 % of what all of them give.
"""
IQ4_STEPS = np.linspace(-20, -32, 49, dtype=np.float32)
"""At which integers, whole or not, the largest block scale of an IQ4_XS super-block is tried."""


@njit(**EXACT)
def _pack_iq4_nl(codes: U8, scale: Floats, out: U8) -> None:
    """d, qs[16]: byte i holds elements i and i + 16."""
    for block in range(out.shape[0]):
        row, code = out[block], codes[block]
        put_f16(row, 0, scale[block])
        for i in range(16):
            row[2 + i] = code[i] | (code[i + 16] << 4)


@njit(**EXACT)
def _pack_iq4_xs(codes: U8, integers: I8, steps: Floats, out: U8) -> None:
    """d, scales_h (2 high bits of 8 block scales), scales_l[4] (4 low bits), qs[128] as in IQ4_NL."""
    for block in range(out.shape[0]):
        row = out[block]
        put_f16(row, 0, steps[block])
        row[2:8] = 0
        for j in range(8):
            level, code = np.int32(integers[block, j]) + 32, codes[block, j]
            row[2 + (j >> 2)] |= (level >> 4) << (2 * (j & 3))
            row[4 + (j >> 1)] |= (level & 15) << (4 * (j & 1))
            for i in range(16):
                row[8 + 16 * j + i] = code[i] | (code[i + 16] << 4)


@njit(**EXACT)
def _pack_floats(codes: U8, scales: U8, order: U8, out: U8) -> None:
    """The scales of a row's blocks, then their codes: the first and the second half of a block share bytes.

    codes [rows, blocks, elements], scales [rows, blocks].
    """
    blocks, half = codes.shape[1], codes.shape[2] // 2
    for n in range(out.shape[0]):
        row = out[n]
        for j in range(blocks):
            row[j] = scales[n, j]
            code = codes[n, j]
            for i in range(half):
                row[blocks + half * j + i] = order[code[i]] | (order[code[i + half]] << 4)


@njit(**EXACT)
def _decode_levels(qs: U8, scale: np.float32, levels: Floats, values: Floats) -> None:
    """Elements i and i + half of values [2 half] from byte i of qs."""
    half = values.size // 2
    for i in range(half):
        byte = qs[i]
        values[i] = scale * levels[byte & 15]
        values[i + half] = scale * levels[byte >> 4]


@njit(**EXACT)
def _decode_iq4_nl(data: U8, out: Floats) -> None:
    for block in range(data.shape[0]):
        row = data[block]
        _decode_levels(row[2:18], get_f16(row, 0), IQ4_VALUES, out[block])


@njit(**EXACT)
def _decode_iq4_xs(data: U8, out: Floats) -> None:
    for block in range(data.shape[0]):
        row = data[block]
        d = get_f16(row, 0)
        for j in range(8):
            low = (np.int32(row[4 + (j >> 1)]) >> (4 * (j & 1))) & 15
            high = (np.int32(row[2 + (j >> 2)]) >> (2 * (j & 3))) & 3
            scale = d * np.float32((low | (high << 4)) - 32)
            _decode_levels(row[8 + 16 * j : 24 + 16 * j], scale, IQ4_VALUES, out[block, 32 * j : 32 * j + 32])


@njit(**EXACT)
def _decode_mxfp4(data: U8, out: Floats) -> None:
    for block in range(data.shape[0]):
        row = data[block]
        _decode_levels(row[1:17], HALF_E8M0[row[0]], TWICE_E2M1, out[block])


@njit(**EXACT)
def _decode_nvfp4(data: U8, out: Floats) -> None:
    for block in range(data.shape[0]):
        row, values = data[block], out[block]
        for j in range(4):
            _decode_levels(row[4 + 8 * j : 12 + 8 * j], HALF_UE4M3[row[j]], TWICE_E2M1, values[16 * j : 16 * j + 16])


class IQ4_NL(Blocked):
    """16 uneven levels, a half-precision scale for each 32 weights."""

    name = "IQ4_NL"
    code_bytes = slice(2, 18)
    block, block_bytes, weighted = 32, 18, True
    step_bytes = (0,)
    decoder = staticmethod(_decode_iq4_nl)
    levels: ClassVar[Levels] = with_middles(IQ4)

    @classmethod
    def encode(cls, weights: Floats, importance: Floats | None = None) -> Bytes:
        rows, columns = weights.shape
        flat, weight = np.ascontiguousarray(weights, np.float32).reshape(-1), usable_importance(importance, columns)
        count = flat.size // cls.block
        codes, scale = np.empty((count, cls.block), np.uint8), np.empty(count, np.float32)
        encode_blocks(flat, weight, cls.levels, IQ4_CANDIDATES, 1, codes, scale)
        out = np.empty((count, cls.block_bytes), np.uint8)
        _pack_iq4_nl(codes, scale, out)
        return out.reshape(rows, -1)


class IQ4_XS(Blocked):
    """16 uneven levels, a 6-bit scale for each 32 weights and a half-precision one for 256."""

    name = "IQ4_XS"
    code_bytes = slice(8, 136)
    block, block_bytes, weighted = 256, 136, True
    step_bytes = (0,)
    decoder = staticmethod(_decode_iq4_xs)
    levels: ClassVar[Levels] = with_middles(IQ4)
    reaches: ClassVar[tuple[int, ...]] = (1, 1)

    @classmethod
    def encode(cls, weights: Floats, importance: Floats | None = None) -> Bytes:
        rows, columns = weights.shape
        flat, weight = np.ascontiguousarray(weights, np.float32).reshape(-1), usable_importance(importance, columns)
        count = flat.size // cls.block
        codes, integers = np.empty((count, 8, 32), np.uint8), np.empty((count, 8), np.int8)
        steps = np.empty(count, np.float32)
        tables = (IQ4_CANDIDATES, 0, IQ4_STEPS, np.array(cls.reaches))
        encode_super_blocks(flat, weight, cls.levels, 32, *tables, codes, integers, steps)
        out = np.empty((count, cls.block_bytes), np.uint8)
        _pack_iq4_xs(codes, integers, steps, out)
        return out.reshape(rows, -1)


class _FloatScales(Blocked):
    """E2M1 levels and scales of 8 bits; weights above 1e9 are stored as that."""

    weighted = True
    parts: ClassVar[int]
    """Scales in a block."""
    mantissa: ClassVar[int]
    bias: ClassVar[int]
    highest: ClassVar[int]
    """Mantissa bits, exponent bias and largest usable byte of a scale."""
    offsets: ClassVar[tuple[int, ...]]
    """Which scales are tried, see `encode_float_blocks`."""
    levels: ClassVar[Levels] = with_middles(E2M1)

    @classmethod
    def encode(cls, weights: Floats, importance: Floats | None = None) -> Bytes:
        rows, columns = weights.shape
        flat, weight = np.ascontiguousarray(weights, np.float32).reshape(-1), usable_importance(importance, columns)
        count = flat.size // cls.block
        codes = np.empty((count * cls.parts, cls.block // cls.parts), np.uint8)
        scales = np.empty(count * cls.parts, np.uint8)
        form = (cls.mantissa, cls.bias, cls.highest, np.array(cls.offsets))
        encode_float_blocks(flat, weight, cls.levels, *form, codes, scales)
        out = np.empty((count, cls.block_bytes), np.uint8)
        _pack_floats(codes.reshape(count, cls.parts, -1), scales.reshape(count, cls.parts), E2M1_CODES, out)
        return out.reshape(rows, -1)


class MXFP4(_FloatScales):
    """E2M1 floats, a power of two for each 32."""

    name = "MXFP4"
    block, block_bytes, parts = 32, 17, 1
    mantissa, bias, highest, offsets = 0, 127, 254, (0, 1, -1)
    decoder = staticmethod(_decode_mxfp4)


class NVFP4(_FloatScales):
    """E2M1 floats, an UE4M3 float for each 16; it has no further scale for the tensor."""

    name = "NVFP4"
    block, block_bytes, parts = 64, 36, 4
    mantissa, bias, highest, offsets = 3, 7, 126, (0, 1, -1, 2, -2, 3, -3, 4, 5, 6)
    decoder = staticmethod(_decode_nvfp4)
