"""libggml itself, out of the installed llama-cpp-python: the oracle for codecs."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fewbits.checkpoint.gguf import GGML_TYPES


class _Traits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@cache
def library() -> ctypes.CDLL:
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = Path(llama_cpp.__file__).parent / "lib"
    found = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    ]
    found.ggml_row_size.restype = ctypes.c_size_t
    found.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    found.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    return found


def row_size(name: str, columns: int) -> int:
    return int(library().ggml_row_size(GGML_TYPES[name], columns))


NEEDS_IMPORTANCE = ("IQ2_XXS", "IQ2_XS", "IQ1_S")
"""libggml ends the process when it is to make these without importances."""


def quantize_chunk(name: str, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """uint8 [rows, row bytes] from float32 [rows, columns], as llama-quantize makes them."""
    rows, columns = weights.shape
    weights = np.ascontiguousarray(weights, np.float32)
    out = np.zeros((rows, row_size(name, columns)), np.uint8)
    if importance is None and name in NEEDS_IMPORTANCE:
        importance = np.ones(columns, np.float32)
    given = None if importance is None else np.ascontiguousarray(importance, np.float32)
    library().ggml_quantize_chunk(
        *(GGML_TYPES[name], weights.ctypes.data, out.ctypes.data, 0, rows, columns),
        None if given is None else given.ctypes.data,
    )
    return out


def to_float(name: str, data: np.ndarray) -> np.ndarray:
    """float32 [rows, columns] from uint8 [rows, row bytes], as llama.cpp decodes them."""
    traits = library().ggml_get_type_traits(GGML_TYPES[name]).contents
    columns = data.shape[1] // traits.type_size * traits.blck_size
    data = np.ascontiguousarray(data)
    out = np.empty((data.shape[0], columns), np.float32)
    traits.to_float(data.ctypes.data, out.ctypes.data, out.size)
    return out
