"""Floating-point storage types: F32, F16, BF16."""

from __future__ import annotations

import numpy as np

from fewbits.codecs.base import Bytes, Codec, Floats
from fewbits.kernels.floats import f16_to_f32, f32_to_bf16, f32_to_f16


class F32(Codec):
    """IEEE single precision."""

    name = "F32"
    block = 1
    block_bytes = 4

    @classmethod
    def encode(cls, weights: Floats, importance: Floats | None = None) -> Bytes:
        return np.ascontiguousarray(weights, "<f4").view(np.uint8)

    @classmethod
    def decode(cls, data: Bytes) -> Floats:
        return np.ascontiguousarray(data).view("<f4")


class F16(Codec):
    """IEEE half precision, rounded to nearest, ties to even. Values beyond its range become infinite, as in ggml."""

    name = "F16"
    block = 1
    block_bytes = 2

    @classmethod
    def encode(cls, weights: Floats, importance: Floats | None = None) -> Bytes:
        out = np.empty(weights.shape, np.uint16)
        f32_to_f16(np.ascontiguousarray(weights, np.float32).reshape(-1), out.reshape(-1))
        return out.view(np.uint8)

    @classmethod
    def decode(cls, data: Bytes) -> Floats:
        halves = np.ascontiguousarray(data).view(np.uint16)
        out = np.empty(halves.shape, np.float32)
        f16_to_f32(halves.reshape(-1), out.reshape(-1))
        return out


class BF16(Codec):
    """The upper half of single precision, rounded to nearest, ties to even."""

    name = "BF16"
    block = 1
    block_bytes = 2

    @classmethod
    def encode(cls, weights: Floats, importance: Floats | None = None) -> Bytes:
        out = np.empty(weights.shape, np.uint16)
        f32_to_bf16(np.ascontiguousarray(weights, np.float32).view(np.uint32).reshape(-1), out.reshape(-1))
        return out.view(np.uint8)

    @classmethod
    def decode(cls, data: Bytes) -> Floats:
        wide = np.ascontiguousarray(data).view("<u2").astype("<u4")
        np.left_shift(wide, 16, out=wide)
        return wide.view("<f4")
