"""From a weight matrix to the tensors that a checkpoint stores of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fewbits.codecs.scaled import Quantized, Scaled
from fewbits.codecs.storage import Coded
from fewbits.errors import FewbitsError
from fewbits.layouts import Layout
from fewbits.layouts.gptq import GPTQ as GPTQLayout
from fewbits.methods import Known, method
from fewbits.methods.base import ROWS, ROWS_THERE

Floats = npt.NDArray[np.float32]
Arrays = Mapping[str, npt.NDArray[Any]]
WEIGHTS = 1 << 23
"""Of a matrix that goes by rows, so many weights are in memory at a time, or `ROWS` rows."""


def quantize_matrix(
    weights: Floats, layout: Layout, chosen: str, known: Known | None = None, pool: ThreadPoolExecutor | None = None
) -> tuple[Arrays, Floats]:
    """`packed`, and the weights as engines will decode them."""
    arrays = packed(weights, layout, chosen, known, pool)
    return arrays, layout.unpack(arrays, (weights.shape[0], weights.shape[1]))


def packed(
    weights: Floats, layout: Layout, chosen: str, known: Known | None = None, pool: ThreadPoolExecutor | None = None
) -> Arrays:
    """Choose the codes of a matrix and pack them.

    Args:
        weights: float32 [out, in].
        chosen: name of the method.
        pool: to work on several rows at once, where rows do not depend on one another; the result is the same.

    Returns:
        The stored arrays by suffix.

    Raises:
        FewbitsError: a weight is NaN or infinite, or the layout cannot hold the result.
    """
    known = known or Known()
    _check_finite(weights)
    kind, g_idx = layout.type, None
    found: Coded
    if not isinstance(kind, Scaled):
        found = method(chosen).make(weights, kind, known, pool)
    elif isinstance(layout, GPTQLayout) and layout.act_order and known.importance is not None:
        found, g_idx = _fit_in_order(weights, kind, chosen, known, pool)
    else:
        found = _fit(weights, kind, chosen, known, pool)
    return layout.pack(found, g_idx, known.peak)


def goes_by_rows(layout: Layout, chosen: str) -> bool:
    """Whether rows of a matrix are quantized without the others being known."""
    # HQQ stops when the whole matrix no longer gains
    return isinstance(layout.type, Scaled) and layout.type.rows_apart and chosen != "hqq"


def packed_by_rows(read: Callable[[slice], Floats], shape: tuple[int, int], layout: Layout, chosen: str) -> Arrays:
    """`packed` of a matrix that `goes_by_rows` and of whose inputs nothing is known, some rows in memory at a time.

    Args:
        read: gives rows, float32 [rows, in].
        shape: [out, in].
    """
    kind = layout.type
    assert isinstance(kind, Scaled)
    step = max(ROWS, WEIGHTS // shape[1] // ROWS * ROWS)
    parts = []
    for start in range(0, shape[0], step):
        weights = np.ascontiguousarray(read(slice(start, start + step)), np.float32)
        _check_finite(weights, start)
        parts.append(method(chosen).fit(weights, kind, Known()))
    return layout.pack(_stacked(parts), None, None)


def _check_finite(weights: Floats, first: int = 0) -> None:
    """Args:
    first: row of the matrix that `weights` begin with.
    """
    if not (np.isfinite(weights.min()) and np.isfinite(weights.max())):
        bad = first + int(np.argmax(~np.isfinite(weights).all(axis=1)))
        raise FewbitsError(
            f"it holds NaN or infinite weights (row {bad}).",
            "Such a model is damaged: fetch it again or repair the training run.",
        )


def _fit_in_order(
    weights: Floats, kind: Scaled, chosen: str, known: Known, pool: ThreadPoolExecutor | None
) -> tuple[Quantized, npt.NDArray[np.int64]]:
    """Groups of the columns in order of their importance, and the group of each column."""
    assert known.importance is not None
    order = known.factor.order if known.factor else np.argsort(-known.importance, kind="stable")
    factor = replace(known.factor, order=np.arange(order.size)) if known.factor else None
    hessian = None if known.hessian is None else known.hessian[np.ix_(order, order)]
    sorted_ = replace(known, importance=known.importance[order], factor=factor, hessian=hessian)
    found = _fit(np.ascontiguousarray(weights[:, order]), kind, chosen, sorted_, pool)
    codes, g_idx = np.empty_like(found.codes), np.empty_like(order)
    codes[:, order] = found.codes
    g_idx[order] = np.arange(order.size) // (kind.block[1] or order.size)
    return replace(found, codes=codes), g_idx


def _fit(weights: Floats, kind: Scaled, chosen: str, known: Known, pool: ThreadPoolExecutor | None) -> Quantized:
    def fit(rows: slice) -> Quantized:
        return method(chosen).fit(weights[rows], kind, known)

    # HQQ stops when the whole matrix no longer gains
    if pool is None or not kind.rows_apart or chosen == "hqq":
        return fit(slice(None))
    step = ROWS if known.device == "cpu" else ROWS_THERE
    return _stacked(list(pool.map(fit, (slice(i, i + step) for i in range(0, weights.shape[0], step)))))


def _stacked(parts: list[Quantized]) -> Quantized:
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Quantized(
        parts[0].type,
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(zeros) if zeros else None,
    )
