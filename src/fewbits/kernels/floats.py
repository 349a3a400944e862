"""Half precision and bfloat16 from and to single precision, bit by bit as ggml does it, without branches."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels.lanes import EXACT, F16_NORMAL

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]


@njit(**EXACT)
def f32_to_f16(values: F32, out: U16) -> None:
    """Nearest half, ties to even; infinity from 65520 on; any NaN becomes the quiet one. Both flat."""
    bits = values.view(np.uint32)
    for i in range(values.size):
        sign = np.int32((bits[i] >> np.uint32(16)) & np.uint32(0x8000))
        m = np.int32(bits[i] & np.uint32(0x7FFFFFFF))
        odd = (m >> np.int32(13)) & np.int32(1)
        normal = (min(m, np.int32(0x47800000)) - np.int32(0x38000000) + np.int32(0xFFF) + odd) >> np.int32(13)
        # below the smallest normal half: steps of 2^-24
        small = np.int32(np.rint(min(abs(values[i]), F16_NORMAL) * np.float32(2.0**24)))
        half = small if m < np.int32(0x38800000) else min(normal, np.int32(0x7C00))
        out[i] = np.uint16((np.int32(0x7E00) if m > np.int32(0x7F800000) else half) | sign)


@njit(**EXACT)
def f16_to_f32(halves: U16, out: F32) -> None:
    """Exact. Both flat."""
    bits = out.view(np.uint32)
    for i in range(halves.size):
        # the mantissa and the exponent, too small by 112, as those of a single: right for subnormals too
        bits[i] = (np.uint32(halves[i]) & np.uint32(0x7FFF)) << np.uint32(13)
    for i in range(halves.size):
        out[i] *= np.float32(2.0**112)
    for i in range(halves.size):
        h, b = np.uint32(halves[i]), bits[i]
        special = (h & np.uint32(0x7C00)) == np.uint32(0x7C00)
        b = b | np.uint32(0x7F800000) if special else b
        bits[i] = b | ((h & np.uint32(0x8000)) << np.uint32(16))


@njit(**EXACT)
def f32_to_bf16(bits: U32, out: U16) -> None:
    """The upper half, ties to even, NaNs quiet. Both flat; bits are those of singles."""
    for i in range(bits.size):
        b = bits[i]
        rounded = (b + (np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        quiet = (b >> np.uint32(16)) | np.uint32(64)
        out[i] = np.uint16(quiet if (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded)
