"""EXL2 decoded slowly and independently: bit by bit, in numpy's half precision, from the format's description; and
exllamav2's own rule for scales (conversion/adaptivegptq.py 0.3.2, `AdaptiveQuantizer.find_params`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def decode(arrays: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """float32 [in, padded out] of the tensors by suffix."""
    heads = arrays[".q_groups"].tolist()
    inverse = arrays[".q_invperm"]
    words = arrays[".q_weight"].view(np.uint32)
    n_in, n_out = inverse.size, words.shape[1]
    stored = np.zeros((n_in, n_out), np.float16)
    starts = [*heads[1::2], words.shape[0]]
    row = 0
    for g, bits in enumerate(heads[::2]):
        # a stream of bits down each column, the lowest first
        stream = (words[starts[g] : starts[g + 1], None, :] >> np.arange(32, dtype=np.uint32)[:, None]) & 1
        stream = stream.reshape(-1, n_out)
        unit = np.float16(arrays[".q_scale_max"][g] * np.float16(1 / 256))
        scale = np.zeros(n_out, np.float16)
        for o in range(n_out):
            code = (int(arrays[".q_scale"].view(np.uint32)[g, o // 8]) >> (4 * (o % 8))) & 15
            scale[o] = np.float16((code + 1) ** 2) * unit
        for i in range(stream.shape[0] // bits):
            code = sum(stream[i * bits + k].astype(int) << k for k in range(bits))
            stored[row] = (code - (1 << (bits - 1))).astype(np.float16) * scale
            row += 1
    assert row == n_in
    return stored[inverse].astype(np.float32)


def absmax_scales(x: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float32]:
    """float32 [columns]: the scales that exllamav2 gives a group [rows, columns] of weights."""
    top = 2**bits - 1
    base = (np.abs(x).max(0) + 1e-12) / (top / 2)
    codes = np.clip(np.rint(np.sqrt(base / base.max()) * 16), 1, 16)
    wide = (codes / 16) ** 2 * base.max()
    errors = []
    shares = [0.7 * (1 - i / 96) + 1.2 * i / 96 for i in range(97)]
    for share in shares:
        errors.append((np.abs(rounded(x, wide * share, bits) - x) ** 3.5).sum())
    unit = np.float16(base.max() * shares[int(np.argmin(errors))]) * np.float16(1 / 256)
    return ((codes * codes).astype(np.float16) * unit).astype(np.float32)


def rounded(x: npt.NDArray[np.float32], scales: npt.NDArray[Any], bits: int) -> npt.NDArray[Any]:
    """Each weight of [rows, columns] at the nearest value that its column's scale leaves."""
    half = 2 ** (bits - 1)
    return np.clip(np.rint(x / scales), -half, half - 1) * scales
