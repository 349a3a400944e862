"""How the scales of a matrix are stored, and what storage makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from fewbits.codecs.base import Floats
from fewbits.codecs.scaled_levels import Codes, ladder

ScaleType = Literal["F32", "F16", "BF16", "E8M0", "E4M3", "NESTED"]
SCALE_BITS: dict[ScaleType, int] = {"F32": 32, "F16": 16, "BF16": 16, "E8M0": 8, "E4M3": 8, "NESTED": 8}
SCALE_MAX: dict[ScaleType, float] = {"F16": 65504.0, "E8M0": 2.0**127, "E4M3": 448.0}
SCALE_MIN: dict[ScaleType, float] = {
    "F32": 2.0**-126,
    "BF16": 2.0**-126,
    "F16": 2.0**-24,
    "E8M0": 2.0**-127,
    "E4M3": 2.0**-9,
}
EMPTY: dict[ScaleType, float] = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7, "E8M0": 2.0**-127, "E4M3": 0.125}
"""Scales of blocks without a weight but zeros, as compressed-tensors has them."""
FINITE = 3e38
"""What a code may decode to: a little less than float32 can hold."""
NESTED_BLOCK = 256


@dataclass(frozen=True)
class Nested:
    """Scales quantized in turn (bitsandbytes' double quantization): scale = absmax[i // 256] * map[code] + offset.

    Attributes:
        codes: uint8, in the shape of the scales.
        absmax: float32 [blocks of 256 scales].
        offset: the scales' mean, a float32.
    """

    codes: Codes
    absmax: Floats
    offset: float

    def decode(self) -> Floats:
        """The scales, float32."""
        spread = np.repeat(self.absmax, NESTED_BLOCK)[: self.codes.size].reshape(self.codes.shape)
        return dynamic_map()[self.codes] * spread + np.float32(self.offset)


@cache
def dynamic_map() -> Floats:
    """The 256 levels of bitsandbytes' dynamic 8-bit type, ascending (Dettmers et al., arXiv 2110.02861, section 2).

    A sign, then an exponent of ten told by leading zeros, then a linear fraction in the bits that are left.
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        bounds = _linspace(2**exponent + 1)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        levels += [*means.tolist(), *(-means).tolist()]
    out = np.sort(np.array(levels, np.float32))
    out.setflags(write=False)
    return out


def _linspace(count: int) -> Floats:
    """From 0.1 to 1 as torch has it: a float32 step, each half counted from its end, rounded once."""
    start, end, i = np.float32(0.1), np.float32(1), np.arange(count)
    step = np.float64((end - start) / np.float32(count - 1))
    return np.where(i < count // 2, start + step * i, end - step * (count - 1 - i)).astype(np.float32)


def nest(scales: Floats) -> Nested:
    """Quantize scales in blocks of 256, in row-major order."""
    flat = scales.reshape(-1)
    offset = np.float32(flat.mean(dtype=np.float64))
    centred = flat - offset
    count = -(-flat.size // NESTED_BLOCK)
    padded = np.zeros(count * NESTED_BLOCK, np.float32)
    padded[: flat.size] = centred
    blocks = padded.reshape(count, NESTED_BLOCK)
    absmax = np.abs(blocks).max(axis=1)
    levels = dynamic_map()
    steps = (levels[:-1] + levels[1:]) / np.float32(2)
    inverse = np.float32(1) / np.maximum(absmax, np.float32(1e-38))
    codes = np.searchsorted(steps, blocks * inverse[:, None], "left").astype(np.uint8)
    return Nested(codes.reshape(-1)[: flat.size].reshape(scales.shape), absmax, float(offset))


def store(kind: ScaleType, scales: Floats) -> Floats:
    """What positive scales decode to once stored; none becomes zero or infinite. `NESTED` ones are left as they are."""
    top = np.float32(SCALE_MAX.get(kind, FINITE))
    scales = np.minimum(scales, top).astype(np.float32)
    if kind == "F16":
        scales = scales.astype(np.float16).astype(np.float32)
    elif kind == "BF16":
        scales = round_bf16(scales)
    elif kind == "E4M3":
        grid = ladder("E4M3")
        scales = grid.values[np.searchsorted(grid.steps, scales, "left")]
    elif kind == "E8M0":
        scales = np.ldexp(
            np.float32(1), np.clip(np.rint(np.log2(np.maximum(scales, 1e-45))), -127, 127).astype(np.int32)
        )
        scales = scales.astype(np.float32)
    return np.maximum(scales, np.float32(SCALE_MIN.get(kind, 0)))


def global_factor(amax: float) -> np.float32:
    """The global scale of a matrix with E4M3 scales and E2M1 codes: with the largest of both they reach amax."""
    with np.errstate(over="ignore"):
        # torch divides a number by a tensor by way of its reciprocal
        factor = np.float32(1) / np.maximum(np.float32(amax), np.finfo(np.float32).tiny) * np.float32(448 * 6)
    return factor if np.isfinite(factor) else np.float32(1)


def store_points(kind: ScaleType, zeros: Floats) -> Floats:
    """What zero points that are floats decode to once stored as scales of this kind are."""
    if kind == "F16":
        return np.clip(zeros, -65504, 65504).astype(np.float16).astype(np.float32)
    return round_bf16(zeros) if kind == "BF16" else zeros


def round_bf16(values: Floats) -> Floats:
    """Nearest bfloat16, ties to even; finite values."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def power_of_two(largest: npt.NDArray[np.float32]) -> Floats:
    """MX scales of blocks with E2M1 codes: 2^(floor(log2(largest)) - 2), one more from 1.75 * 2^n on.

    OCP's rule takes the floor alone; compressed-tensors rounds up where the largest weight would be cut by more than
    an eighth.
    """
    bits = np.ascontiguousarray(largest, np.float32).view(np.int32)
    exponent = ((bits + (1 << 21)) >> 23) - 127 - 2
    return np.ldexp(np.float32(1), np.clip(exponent, -127, 125)).astype(np.float32)
