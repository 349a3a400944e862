"""Q3_K and Q6_K: super-blocks of 256 in 16 blocks of 16, block scales integer times one half-precision scale.

Layouts: block_q3_K and block_q6_K of ggml-common.h.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.codecs.base import Floats
from fewbits.codecs.legacy_symmetric import _Symmetric
from fewbits.kernels.lanes import EXACT, get_f16, put_f16
from fewbits.kernels.symmetric import make_super_encoder

U8 = npt.NDArray[np.uint8]


@njit(**EXACT)
def _pack_q3_k(codes: U8, lane0: int, integers: Floats, step: np.float32, out: U8) -> None:
    """hmask[32] (element i: byte i % 32, bit i / 32), qs[64] (two low bits), scales[12] (6 bits each), d."""
    out[:96] = 0
    for i in range(256):
        code = np.int32(codes[i & 15, lane0 + (i >> 4)])
        out[i & 31] |= (code >> 2) << (i >> 5)
        out[32 + 32 * (i >> 7) + (i & 31)] |= (code & 3) << (2 * ((i >> 5) & 3))
    out[96:108] = 0
    for j in range(16):
        level = np.int32(integers[j]) + 32
        out[96 + (j & 7)] |= (level & 15) << (j // 8 * 4)
        out[104 + (j & 3)] |= (level >> 4) << (2 * (j >> 2))
    put_f16(out, 108, step)


@njit(**EXACT)
def _decode_q3_k(data: U8, out: Floats) -> None:
    for block in range(data.shape[0]):
        row = data[block]
        d = get_f16(row, 108)
        for j in range(16):
            low = (np.int32(row[96 + (j & 7)]) >> (j // 8 * 4)) & 15
            high = (np.int32(row[104 + (j & 3)]) >> (2 * (j >> 2))) & 3
            scale = d * np.float32((low | (high << 4)) - 32)
            for k in range(16):
                i = 16 * j + k
                code = (np.int32(row[32 + 32 * (i >> 7) + (i & 31)]) >> (2 * ((i >> 5) & 3))) & 3
                top = (np.int32(row[i & 31]) >> (i >> 5)) & 1
                out[block, i] = scale * np.float32(code + 4 * top - 4)


@njit(**EXACT)
def _pack_q6_k(codes: U8, lane0: int, integers: Floats, step: np.float32, out: U8) -> None:
    """ql[128] (four low bits), qh[64] (two high bits), scales[16] (int8), d."""
    for half in range(2):
        for k in range(32):
            i = 128 * half + k
            a, b = codes[i & 15, lane0 + (i >> 4)], codes[i & 15, lane0 + (i >> 4) + 2]
            c, e = codes[i & 15, lane0 + (i >> 4) + 4], codes[i & 15, lane0 + (i >> 4) + 6]
            out[64 * half + k] = (a & 15) | ((c & 15) << 4)
            out[64 * half + 32 + k] = (b & 15) | ((e & 15) << 4)
            out[128 + 32 * half + k] = (a >> 4) | ((b >> 4) << 2) | ((c >> 4) << 4) | ((e >> 4) << 6)
    for j in range(16):
        out[192 + j] = np.uint8(np.int32(integers[j]) & 255)
    put_f16(out, 208, step)


@njit(**EXACT)
def _decode_q6_k(data: U8, out: Floats) -> None:
    for block in range(data.shape[0]):
        row = data[block]
        d = get_f16(row, 208)
        for j in range(16):
            scale = d * np.float32(np.int8(row[192 + j]))
            for k in range(16):
                i = 16 * j + k
                half, quarter = i >> 7, (i >> 5) & 3
                low = (np.int32(row[64 * half + 32 * (quarter & 1) + (i & 31)]) >> (4 * (quarter >> 1))) & 15
                high = (np.int32(row[128 + 32 * half + (i & 31)]) >> (2 * quarter)) & 3
                out[block, i] = scale * np.float32((low | (high << 4)) - 32)


class Q3_K(_Symmetric):
    """8 levels, a 6-bit scale for each 16 weights."""

    name = "Q3_K"
    block = 256
    block_bytes = 110
    encoder = staticmethod(make_super_encoder(4, 32, 2, 2, _pack_q3_k))
    decoder = staticmethod(_decode_q3_k)


class Q6_K(_Symmetric):
    """64 levels, an 8-bit scale for each 16 weights."""

    name = "Q6_K"
    block = 256
    block_bytes = 210
    encoder = staticmethod(make_super_encoder(32, 128, 1, 1, _pack_q6_k))
    decoder = staticmethod(_decode_q6_k)
