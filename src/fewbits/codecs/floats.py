"""Floating-point storage types: F32, F16, BF16."""

from __future__ import annotations

import numpy as np

from fewbits.codecs.base import Bytes, Codec, Floats


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
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(weights.astype("<f2")).view(np.uint8)

    @classmethod
    def decode(cls, data: Bytes) -> Floats:
        return np.ascontiguousarray(data).view("<f2").astype(np.float32)


class BF16(Codec):
    """The upper half of single precision, rounded to nearest, ties to even."""

    name = "BF16"
    block = 1
    block_bytes = 2

    @classmethod
    def encode(cls, weights: Floats, importance: Floats | None = None) -> Bytes:
        bits = np.ascontiguousarray(weights, "<f4").view("<u4")
        rounded = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
        return np.ascontiguousarray((rounded >> 16).astype("<u2")).view(np.uint8)

    @classmethod
    def decode(cls, data: Bytes) -> Floats:
        wide = np.ascontiguousarray(data).view("<u2").astype("<u4")
        np.left_shift(wide, 16, out=wide)
        return wide.view("<f4")
