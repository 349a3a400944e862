"""Packing of codes: against a plain bit-by-bit stream, the shared oracle, and compressed-tensors' own packer."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

import packing_oracle
from fewbits.codecs import packing

BITS = range(1, 9)


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 1 << bits, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def oracle(shared_dir: Path) -> ModuleType:
    return packing_oracle.load(shared_dir)


def slow_stream(codes: npt.NDArray[np.uint8], bits: int) -> list[int]:
    """One row as 32-bit words, bit after bit, lowest first."""
    total = sum(int(code) << (bits * place) for place, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [(total >> (32 * word)) & 0xFFFFFFFF for word in range(count)]


@given(bits=st.integers(1, 8), rows=st.integers(1, 5), columns=st.integers(1, 70), seed=st.integers(0, 99))
@settings(deadline=None)
def test_columns_are_one_stream_a_row(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes((rows, columns), bits, seed)
    words = packing.pack_columns(codes, bits)
    assert words.shape == (rows, packing.words_for(columns, bits))
    assert words.view(np.uint32).tolist() == [slow_stream(row, bits) for row in codes]
    np.testing.assert_array_equal(packing.unpack_columns(words, bits, columns), codes)


@given(bits=st.integers(1, 8), rows=st.integers(1, 70), columns=st.integers(1, 5), seed=st.integers(0, 99))
@settings(deadline=None)
def test_rows_are_columns_of_the_transpose(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes((rows, columns), bits, seed)
    words = packing.pack_rows(codes, bits)
    np.testing.assert_array_equal(words, packing.pack_columns(codes.T, bits).T)
    assert words.flags.c_contiguous
    np.testing.assert_array_equal(packing.unpack_rows(words, bits, rows), codes)


@given(rows=st.integers(1, 5), words=st.integers(1, 9), seed=st.integers(0, 99), high_first=st.booleans())
@settings(deadline=None)
def test_awq_and_nibbles_come_back(rows: int, words: int, seed: int, high_first: bool) -> None:
    codes = random_codes((rows, 8 * words), 4, seed)
    np.testing.assert_array_equal(packing.unpack_awq(packing.pack_awq(codes)), codes)
    nibbles = packing.pack_nibbles(codes, high_first)
    assert nibbles.shape == (rows, 4 * words)
    np.testing.assert_array_equal(packing.unpack_nibbles(nibbles, high_first), codes)


def test_nibble_order() -> None:
    codes = np.array([[1, 2]], np.uint8)
    assert packing.pack_nibbles(codes).tolist() == [[0x21]]
    assert packing.pack_nibbles(codes, high_first=True).tolist() == [[0x12]]


def test_awq_order() -> None:
    word = int(packing.pack_awq(np.arange(8, dtype=np.uint8).reshape(1, 8)).view(np.uint32)[0, 0])
    assert f"{word:08x}" == "75316420"


@pytest.mark.parametrize("bits", BITS)
def test_equals_compressed_tensors(bits: int) -> None:
    codes = random_codes((64, 96), bits)
    signed = torch.from_numpy(codes.astype(np.int16) - (1 << (bits - 1))).to(torch.int8)
    np.testing.assert_array_equal(packing.pack_columns(codes, bits), pack_to_int32(signed, bits).numpy())
    np.testing.assert_array_equal(packing.pack_rows(codes, bits), pack_to_int32(signed, bits, 0).numpy())


@pytest.mark.shared
@pytest.mark.parametrize("bits", BITS)
def test_equals_the_oracle(bits: int, oracle: ModuleType) -> None:
    codes = random_codes((64, 96), bits)
    np.testing.assert_array_equal(packing.pack_columns(codes, bits), oracle.pack_cols(codes, bits))
    np.testing.assert_array_equal(packing.pack_rows(codes, bits), oracle.pack_rows(codes, bits))
    if bits == 4:
        np.testing.assert_array_equal(packing.pack_awq(codes), oracle.awq_pack(codes))
        np.testing.assert_array_equal(packing.pack_nibbles(codes), oracle.fp4_pack(codes))


def test_codes_beyond_their_bits_leave_neighbours_alone() -> None:
    codes = np.array([[0xFF, 0, 0, 0, 0, 0, 0, 0]], np.uint8)
    assert packing.unpack_columns(packing.pack_columns(codes, 3), 3, 8).tolist() == [[7, 0, 0, 0, 0, 0, 0, 0]]
