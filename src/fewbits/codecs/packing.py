"""Codes of 1 to 8 bits to machine words and back.

Every dense layout here is one bit stream, least significant bit first: GPTQ's words along the rows, compressed-tensors'
words along the columns, nibbles in bytes. Eight codes of b bits fill exactly b bytes, so three folds of a 64-bit lane
pack any width without a special case for codes that straddle words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int32]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring columns each nibble of an AWQ word holds, lowest nibble first (GEMM layout)."""


def _masks(bits: int, lane: int) -> tuple[np.uint64, np.uint64]:
    """Where codes stand in even and odd lanes (of `lane` bits) of 64 bits, if each lies at its lane's low end."""
    code = (1 << bits) - 1
    even = sum(code << start for start in range(0, 64, 2 * lane))
    return np.uint64(even), np.uint64(even << lane)


def _fold(codes: Codes, bits: int) -> Codes:
    """uint8 [..., n] -> the stream's bytes, uint8 [..., n * bits / 8]; n is a multiple of 8."""
    lanes = np.ascontiguousarray(codes).view("<u8")
    for step in range(3):
        width, lane = bits << step, 8 << step
        even, odd = _masks(width, lane)
        lanes = (lanes & even) | ((lanes & odd) >> np.uint64(lane - width))
    octets = lanes[..., np.newaxis].view(np.uint8)[..., :bits]
    return np.ascontiguousarray(octets).reshape(*codes.shape[:-1], -1)


def _unfold(stream: Codes, bits: int) -> Codes:
    """The inverse of `_fold`: uint8 [..., n * bits / 8] -> uint8 [..., n]."""
    groups = stream.shape[-1] // bits
    octets = np.zeros((*stream.shape[:-1], groups, 8), np.uint8)
    octets[..., :bits] = stream.reshape(*stream.shape[:-1], groups, bits)
    lanes = octets.view("<u8")[..., 0]
    for step in (2, 1, 0):
        width, lane = bits << step, 8 << step
        even, odd = _masks(width, lane)
        lanes = (lanes & even) | ((lanes << np.uint64(lane - width)) & odd)
    return np.ascontiguousarray(lanes).view(np.uint8)


def transposed(codes: Codes) -> Codes:
    """uint8 [rows, columns] -> [columns, rows], C-contiguous; in strips, so that lines stay in the cache."""
    out = np.empty(codes.shape[::-1], np.uint8)
    for start in range(0, codes.shape[0], 32):
        out[:, start : start + 32] = codes[start : start + 32].T
    return out


def _padded(array: Codes, multiple: int) -> Codes:
    short = -array.shape[-1] % multiple
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, short)]) if short else array


def words_for(count: int, bits: int) -> int:
    """32-bit words that hold this many codes."""
    return -(-count * bits // 32)


def pack_columns(codes: Codes, bits: int) -> Words:
    """Dense stream along the last axis.

    Args:
        codes: uint8 [..., columns] below 2^bits.
        bits: 1 to 8.

    Returns:
        int32 [..., ceil(columns * bits / 32)]; unused high bits of the last word are zero.
    """
    stream = _fold(_padded(codes, 8), bits)[..., : -(-codes.shape[-1] * bits // 8)]
    return np.ascontiguousarray(_padded(stream, 4)).view("<i4")


def unpack_columns(words: npt.NDArray[Any], bits: int, columns: int) -> Codes:
    """The inverse of `pack_columns`: 32-bit words [..., n] -> uint8 [..., columns]."""
    stream = np.ascontiguousarray(words).view(np.uint8)[..., : -(-columns // 8) * bits]
    return _unfold(_padded(stream, bits), bits)[..., :columns]


def pack_rows(codes: Codes, bits: int) -> Words:
    """Dense stream along the first axis: uint8 [rows, columns] -> int32 [ceil(rows * bits / 32), columns]."""
    return np.ascontiguousarray(pack_columns(transposed(codes), bits).T)


def unpack_rows(words: npt.NDArray[Any], bits: int, rows: int) -> Codes:
    """The inverse of `pack_rows`: 32-bit words [n, columns] -> uint8 [rows, columns]."""
    return transposed(unpack_columns(words.T, bits, rows))


def _reorder(words: npt.NDArray[np.uint32], order: tuple[int, ...]) -> npt.NDArray[np.uint32]:
    """Words whose nibble k is the nibble order[k] of those given: cheaper than moving the codes themselves."""
    out = np.zeros_like(words)
    for place, source in enumerate(order):
        out |= ((words >> np.uint32(4 * source)) & np.uint32(15)) << np.uint32(4 * place)
    return out


def pack_awq(codes: Codes) -> Words:
    """AWQ's GEMM order: uint8 [rows, columns] of 4-bit codes -> int32 [rows, columns / 8]."""
    return _reorder(pack_columns(codes, 4).view(np.uint32), AWQ_ORDER).view(np.int32)


def unpack_awq(words: npt.NDArray[Any]) -> Codes:
    """The inverse of `pack_awq`: 32-bit words [rows, n] -> uint8 [rows, 8 * n]."""
    inverse = tuple(AWQ_ORDER.index(place) for place in range(8))
    plain = _reorder(np.ascontiguousarray(words).view(np.uint32), inverse)
    return unpack_columns(plain, 4, 8 * words.shape[1])


def pack_nibbles(codes: Codes, high_first: bool = False) -> Codes:
    """Two 4-bit codes a byte.

    Args:
        codes: uint8 [..., n] below 16, n even.
        high_first: the first of a pair lies in the high nibble (bitsandbytes), not in the low one (NVFP4, MXFP4).

    Returns:
        uint8 [..., n / 2].
    """
    first, second = codes[..., 0::2], codes[..., 1::2]
    four = np.uint8(4)
    return (first << four) | second if high_first else first | (second << four)


def unpack_nibbles(packed: Codes, high_first: bool = False) -> Codes:
    """The inverse of `pack_nibbles`: uint8 [..., n] -> uint8 [..., 2 * n]."""
    low, high = packed & np.uint8(15), packed >> np.uint8(4)
    nibbles = (high, low) if high_first else (low, high)
    return np.stack(nibbles, axis=-1).reshape(*packed.shape[:-1], -1)
