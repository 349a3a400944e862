"""What all block searches share: tiles of blocks side by side, half precision, importances that cannot divide by zero.

A tile holds 128 blocks as [elements of a block, 128 lanes]. Every accumulator is an array of 128 lanes and the
innermost loop runs over lanes without branches, so that it becomes vector code. A tile is always full (lanes
beyond the last block repeat it), so a block's bytes never depend on its neighbours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

LANES = 128
STRIDE = 144
FAST = {"nogil": True, "cache": True, "fastmath": True, "error_model": "numpy"}
EXACT = {"nogil": True, "cache": True, "error_model": "numpy"}
INLINE = {**FAST, "inline": "always"}
"""Inlined, arrays are known not to overlap and loops over lanes become vector code: twice as fast."""
TINY = np.float32(1e-30)
"""Blocks whose range is below this are stored as constants: its inverse would leave float32."""
F16_MAX = np.float32(65504.0)
F16_NORMAL = np.float32(2.0**-14)
HUGE = np.float32(1e9)
"""Larger weights are searched as this: no code reaches it, and its square stays in float32."""


def usable_importance(importance: npt.NDArray[np.float32] | None, columns: int) -> npt.NDArray[np.float32]:
    """Importances scaled to a mean of one, none of them zero, so that no weighted sum vanishes or overflows.

    Args:
        importance: [columns], or None for ones.
    """
    if importance is None:
        return np.ones(columns, np.float32)
    wide = np.nan_to_num(np.maximum(importance.astype(np.float64), 0.0), nan=0.0, posinf=0.0)
    mean = wide.mean()
    if not mean > 0:
        return np.ones(columns, np.float32)
    return np.maximum(wide / mean, 1e-6).astype(np.float32)


@njit(**EXACT)
def lane_rows(rows: int) -> npt.NDArray[np.float32]:
    """Uninitialized [rows, 144], of which 128 are lanes, at a cache line's start.

    Vector loads that straddle two cache lines take twice as long, and so do loads of a row that lies a multiple of
    4096 bytes from one just stored: rows of 512 bytes always meet such a one, rows of 576 hardly ever.
    """
    raw = np.empty(rows * STRIDE + 16, np.float32)
    skip = (-raw.ctypes.data % 64) // 4
    return raw[skip : skip + rows * STRIDE].reshape(rows, STRIDE)


@njit(**EXACT)
def load_tile(
    x: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32],
    first: int,
    count: int,
    xt: npt.NDArray[np.float32],
    wt: npt.NDArray[np.float32],
) -> None:
    """Gather blocks first..first+127 of flat x (row-major [rows, columns]) into xt, wt [elements, lanes].

    wt must be what the call for the tile before left in it: it is not written again where it would not change.
    """
    elements = xt.shape[0]
    per_row = importance.size // elements
    if first + LANES <= count:
        blocks = x[first * elements : (first + LANES) * elements].reshape(LANES, elements)
        for i in range(elements):
            for lane in range(LANES):
                xt[i, lane] = min(max(blocks[lane, i], -HUGE), HUGE)
    else:
        for lane in range(LANES):
            start = min(first + lane, count - 1) * elements
            for i in range(elements):
                xt[i, lane] = min(max(x[start + i], -HUGE), HUGE)
    if first > 0 and LANES % per_row == 0:
        return
    lane = 0
    while lane < LANES:
        column = (first + lane) % per_row
        run = min(per_row - column, LANES - lane)
        parts = importance[column * elements : (column + run) * elements].reshape(run, elements)
        for i in range(elements):
            for k in range(run):
                wt[i, lane + k] = parts[k, i]
        lane += run


@njit(**EXACT)
def to_f16(value: np.float32) -> np.uint16:
    """Bits of the nearest finite half, ties to even; what is too large becomes the largest."""
    bits = np.float32(value).view(np.uint32)
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if magnitude >= np.uint32(0x477FE000 + 0x1000):  # rounds past 65504
        return np.uint16(sign | np.uint32(0x7BFF))
    if magnitude < np.uint32(0x38800000):  # below the smallest normal half: steps of 2^-24
        scaled = np.float32(magnitude.view(np.float32) * np.float32(16777216.0))
        return np.uint16(sign | np.uint32(np.rint(scaled)))
    odd = (magnitude >> np.uint32(13)) & np.uint32(1)
    return np.uint16(sign | ((magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)))


@njit(**EXACT)
def from_f16(bits: np.uint16) -> np.float32:
    """Value of a finite half, infinity or NaN."""
    sign = np.uint32(bits & np.uint16(0x8000)) << np.uint32(16)
    exponent = (np.uint32(bits) >> np.uint32(10)) & np.uint32(31)
    mantissa = np.uint32(bits) & np.uint32(0x3FF)
    if exponent == np.uint32(0):
        value = np.float32(mantissa) * np.float32(5.960464477539063e-08)
        return np.float32(-value) if sign else np.float32(value)
    if exponent == np.uint32(31):
        return np.uint32(sign | np.uint32(0x7F800000) | (mantissa << np.uint32(13))).view(np.float32)
    return np.uint32(sign | ((exponent + np.uint32(112)) << np.uint32(23)) | (mantissa << np.uint32(13))).view(
        np.float32
    )


@njit(**EXACT)
def round_f16(value: np.float32) -> np.float32:
    return from_f16(to_f16(value))


@njit(**EXACT)
def round_f16_lanes(values: npt.NDArray[np.float32], bits: npt.NDArray[np.int32]) -> None:
    """`round_f16` for many at once, in place, without branches; bits: work, as long as values."""
    whole, rounded = values.view(np.int32), bits.view(np.float32)
    for lane in range(values.size):
        b = whole[lane]
        m = min(b & np.int32(0x7FFFFFFF), np.int32(0x477FE000))
        m = (m + np.int32(0xFFF) + ((m >> np.int32(13)) & np.int32(1))) & np.int32(~0x1FFF)
        bits[lane] = m | (b & np.int32(-0x80000000))
    for lane in range(values.size):
        v, r = values[lane], rounded[lane]
        small = np.rint(v * np.float32(2.0**24)) * np.float32(2.0**-24)
        values[lane] = small if abs(v) < F16_NORMAL else r


@njit(**EXACT)
def put_f16(out: npt.NDArray[np.uint8], at: int, value: np.float32) -> None:
    bits = to_f16(value)
    out[at] = np.uint8(bits & np.uint16(0xFF))
    out[at + 1] = np.uint8(bits >> np.uint16(8))


@njit(**EXACT)
def get_f16(data: npt.NDArray[np.uint8], at: int) -> np.float32:
    return from_f16(np.uint16(data[at]) | (np.uint16(data[at + 1]) << np.uint16(8)))
