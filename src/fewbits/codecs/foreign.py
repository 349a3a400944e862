"""Storage types that can be read but not made yet, one codec each: most through gguf-py."""

from __future__ import annotations

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from fewbits.codecs.base import Bytes, Codec, Floats
from fewbits.errors import FewbitsError

READABLE = (
    *("IQ1_S", "IQ1_M"),
    *("TQ1_0", "TQ2_0"),
)


class Unmakeable(Codec):
    """A type without an encoder."""

    makeable = False

    @classmethod
    def encode(cls, weights: Floats, importance: Floats | None = None) -> Bytes:
        raise FewbitsError(f"{cls.name} can be read but not made yet.", "`fewbits list` shows what can be made.")


class Foreign(Unmakeable):
    """A type that gguf-py decodes."""

    kind: GGMLQuantizationType

    @classmethod
    def decode(cls, data: Bytes) -> Floats:
        return np.ascontiguousarray(dequantize(data, cls.kind), np.float32)


class FewLevels(Unmakeable):
    """A half-precision scale, then codes of `bits` bits, least significant first; `levels` are their multiples of it.

    Layout: block_q1_0 and block_q2_0 of ggml-common.h, which gguf-py does not decode.
    """

    bits: int
    levels: tuple[int, ...]

    @classmethod
    def decode(cls, data: Bytes) -> Floats:
        blocks = np.ascontiguousarray(data).reshape(-1, cls.block_bytes)
        scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
        shifts = np.arange(0, 8, cls.bits, dtype=np.uint8)
        codes = (blocks[:, 2:, None] >> shifts) & np.uint8(2**cls.bits - 1)
        values = np.array(cls.levels, np.float32)[codes].reshape(blocks.shape[0], cls.block) * scale
        return values.reshape(data.shape[0], -1)


class Q1_0(FewLevels):
    """A sign for each weight, one scale for 128."""

    name = "Q1_0"
    block = 128
    block_bytes = 18
    bits = 1
    levels = (-1, 1)


class Q2_0(FewLevels):
    """Four levels, one scale for 64 weights."""

    name = "Q2_0"
    block = 64
    block_bytes = 18
    bits = 2
    levels = (-1, 0, 1, 2)


for _name in READABLE:
    _kind = GGMLQuantizationType[_name]
    _block, _bytes = GGML_QUANT_SIZES[_kind]
    type(_name, (Foreign,), {"name": _name, "block": _block, "block_bytes": _bytes, "kind": _kind})
