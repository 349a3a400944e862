"""GPTQ (Frantar et al., arXiv 2210.17323): error feedback within the scales that a type's own search has found."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fewbits.codecs import Codec
from fewbits.codecs.blocks import Blocks, BlocksCoded
from fewbits.codecs.fixed_codebooks import GroupCodebook, fixed_codebook
from fewbits.codecs.fixed_scales import FixedScales, fixed_scales
from fewbits.codecs.row_groups import RowGroups
from fewbits.codecs.scaled import Quantized, Scaled
from fewbits.codecs.storage import Coded, StorageType
from fewbits.errors import FewbitsError
from fewbits.kernels.feedback import round_columns
from fewbits.methods import gptq_groups, gptq_row_groups
from fewbits.methods.base import DAMPING, ROWS_THERE, Factor, Known, Method, by_rows
from fewbits.methods.inverse_cholesky import PANEL, invert_cholesky
from fewbits.spill import Spill

DAMPINGS = (0.003, DAMPING, 0.03, 0.1, 0.3, 1.0)
"""What is tried where some text is held out. With less, codes at the ends of their range meet what they cannot make up
for."""
RETRIES = 6
COLUMNS = 128
"""Columns that are rounded before their errors reach the rest in one matrix product."""
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def feedback_span(codec: type[Codec]) -> int:
    """How many neighbouring columns are chosen at once with error feedback, 0 for types that are only searched."""
    if fixed_scales(codec) is not None:
        return 1
    return fixed_codebook(codec).span if issubclass(codec, GroupCodebook) else 0


def factorize(
    hessian: Floats, damping: float = DAMPING, span: int = 1, spill: Spill | None = None, device: str = "cpu"
) -> Factor:
    """Prepare a Hessian, float32 [columns, columns]: the mean of x x^T over the tokens.

    Args:
        span: how many neighbouring columns stay together, in their order: see `feedback_span`. The factor's blocks of
            that size are those of the block factor: a group's error d costs |d B^-1|^2, B its block.
        spill: where the float64 matrix goes if it is too large for memory.
        device: of torch, where it is factored and where errors will be fed back by it.

    Raises:
        FewbitsError: it is not positive, however much it is damped.
    """
    spill = spill or Spill()
    diagonal: Doubles = hessian.diagonal().astype(np.float64)
    if not _finite(hessian, spill) or diagonal.min() < 0:
        raise FewbitsError("the Hessian is not finite and positive.", "Make it again.")
    groups = np.argsort(-diagonal.reshape(-1, span).sum(1), kind="stable")
    order = (groups[:, None] * span + np.arange(span)).reshape(-1)
    mean = float(diagonal.mean()) or 1.0
    # with the order reversed, H = L L^T gives the wanted factor as the inverse of an upper triangle, reversed again
    back = order[::-1].copy()
    for attempt in range(RETRIES):
        damped = diagonal + damping * 10**attempt * mean
        if device == "cpu":
            upper = _inverted(hessian, damped, back, spill)
        else:
            from fewbits.methods import gptq_torch  # imports torch

            upper = gptq_torch.inverted(hessian, damped, back, device)
        if upper is None:
            continue
        if span == 1:
            return Factor(order, upper, device=device)
        ordered = hessian[np.ix_(order, order)]
        np.fill_diagonal(ordered, damped[order])
        return Factor(order, upper, ordered, device)
    raise FewbitsError("the Hessian is not positive.", "Calibrate with more text.")


def _inverted(hessian: Floats, diagonal: Doubles, back: npt.NDArray[np.int64], spill: Spill) -> Floats | None:
    """`gptq_torch.inverted` here."""
    import torch  # takes a second, which methods that need no Hessian do without

    work = spill.empty(hessian.shape, np.float64)
    for start in range(0, back.size, COLUMNS):
        rows = back[start : start + COLUMNS]
        work[start : start + COLUMNS] = hessian[rows][:, back]
        spill.forget()
    np.fill_diagonal(work, diagonal[back])
    if not invert_cholesky(torch.from_numpy(work), spill):
        return None
    upper = np.zeros(hessian.shape, np.float32)
    for start in range(0, back.size, COLUMNS):
        # row i of the inverse, backwards, is row n - 1 - i, from its diagonal on
        rows, end = work[start : start + COLUMNS], min(start + COLUMNS, back.size)
        upper[back.size - end : back.size - start, back.size - end :] = np.tril(rows[:, :end], start)[::-1, ::-1]
        spill.forget()
    return upper


def _finite(matrix: npt.NDArray[np.float32], spill: Spill) -> bool:
    for start in range(0, len(matrix), COLUMNS):
        # min and max carry any NaN along and allocate nothing
        rows = matrix[start : start + COLUMNS]
        if not (np.isfinite(rows.min()) and np.isfinite(rows.max())):
            return False
        spill.forget()
    return True


def choose_damping(seen: Floats, held: Floats, spill: Spill | None = None, device: str = "cpu") -> float:
    """Which of `DAMPINGS` makes feedback by one text lose least on another.

    With errors of rounding d that know nothing of each other, what is left of the weights is d diag(U)^-1 U, U the
    factor; its expected loss on the other text is the trace of diag(U)^-1 U H U^T diag(U)^-1. That was compared with
    the true loss of Q4_0 on eight inputs of smollm2-768: what it chooses is within 2 % of the best.

    Args:
        seen, held: Hessians, float32 [columns, columns], each the mean of x x^T over a text's tokens.
        spill, device: as for `factorize`.

    Raises:
        FewbitsError: see `factorize`.
    """
    costs: dict[int, float] = {}

    def cost(index: int) -> float:
        if index not in costs:
            costs[index] = _expected_loss(factorize(seen, DAMPINGS[index], spill=spill, device=device), held)
        return costs[index]

    best = DAMPINGS.index(DAMPING)
    for step in (1, -1):
        while 0 <= best + step < len(DAMPINGS) and cost(best + step) < cost(best):
            best += step
    return DAMPINGS[best]


def _expected_loss(factor: Factor, held: Floats) -> float:
    if factor.device != "cpu":
        from fewbits.methods import gptq_torch  # imports torch

        return gptq_torch.expected_loss(factor, held)
    ordered, cost = held[np.ix_(factor.order, factor.order)], 0.0
    for start in range(0, len(ordered), PANEL):
        upper = factor.upper[start : start + PANEL]
        each = np.einsum("ij,ij->i", upper @ ordered, upper, dtype=np.float64)
        cost += float((each / np.square(upper.diagonal(start))).sum())
    return cost


class GPTQ(Method):
    """Scales by the type's search; then codes column by column, each error made up for by the columns to come.

    The scales are settled on the unmodified weights before any column is rounded ("static groups"), so columns may be
    taken in any order, the most active first ("act order"), without the file telling of it.
    """

    name = "gptq"
    hessian = "factor"
    summary = "searches scales, then rounds column by column, passing errors on to the columns to come (GPTQ)"

    @classmethod
    def quantize(
        cls,
        weights: npt.NDArray[np.float32],
        codec: type[Codec],
        importance: npt.NDArray[np.float32] | None = None,
        factor: Factor | None = None,
    ) -> npt.NDArray[np.uint8]:
        if factor is not None and issubclass(codec, GroupCodebook):
            return gptq_groups.quantize(weights, codec, importance, factor)
        scales = fixed_scales(codec)
        if factor is None or scales is None:
            return codec.encode(weights, importance)
        data = codec.encode(weights, None if importance is None else factor.expected(importance))
        low, width = scales.ranges(data)
        return scales.with_codes(data, feed(weights, low, width, scales.levels, scales.uniform, factor))

    @classmethod
    def fit(cls, weights: npt.NDArray[np.float32], kind: Scaled, known: Known) -> Quantized:
        found = kind.search(weights, known.importance, known.amax, known.device)
        if known.factor is None:
            return found
        low, width = kind.ranges(found, weights.shape)
        levels, uniform = kind.ladder01()
        return kind.from_ranks(feed(weights, low, width, levels, uniform, known.factor), found)

    @classmethod
    def make(
        cls, weights: npt.NDArray[np.float32], kind: StorageType, known: Known, pool: Executor | None = None
    ) -> Coded:
        if isinstance(kind, RowGroups):
            return gptq_row_groups.quantize(weights, kind, known, pool)
        if isinstance(kind, Blocks) and known.factor is not None and feedback_span(kind.codec) > 1:
            if known.hessian is None:
                raise FewbitsError(f"Error feedback for {kind.name} needs the whole Hessian.")
            span = feedback_span(kind.codec)
            known = replace(known, factor=factorize(known.hessian, known.damping or DAMPING, span, device=known.device))
        if isinstance(kind, Blocks) and known.factor is not None and known.factor.device != "cpu":
            scales = fixed_scales(kind.codec)
            if scales is not None:
                return BlocksCoded(kind, _fed_there(weights, scales, known.importance, known.factor, pool))
        return super().make(weights, kind, known, pool)


def _fed_there(
    weights: Floats, scales: FixedScales, importance: Floats | None, factor: Factor, pool: Executor | None
) -> npt.NDArray[np.uint8]:
    """`GPTQ.quantize` with scales searched here, by all threads, and codes chosen on a GPU, many rows at once."""
    expected = None if importance is None else factor.expected(importance)
    data = by_rows(lambda rows: scales.codec.encode(weights[rows], expected), len(weights), pool)

    def fed(rows: slice) -> npt.NDArray[np.uint8]:
        codes = feed(weights[rows], *scales.ranges(data[rows]), scales.levels, scales.uniform, factor)
        return scales.with_codes(data[rows], codes)

    return by_rows(fed, len(weights), pool, ROWS_THERE)


def feed(
    weights: npt.NDArray[np.float32],
    low: npt.NDArray[np.float32],
    width: npt.NDArray[np.float32],
    levels: npt.NDArray[np.float32],
    uniform: bool,
    factor: Factor,
) -> npt.NDArray[np.uint8]:
    """Choose codes column by column, where a code stands for low + width * levels[code].

    Args:
        weights, low, width: float32 [rows, columns].
        levels: float32 [codes], ascending from 0 to 1.
        uniform: whether the levels are evenly spaced.

    Returns:
        uint8 [rows, columns].
    """
    if factor.device != "cpu":
        from fewbits.methods import gptq_torch  # imports torch

        return gptq_torch.feed(weights, low, width, levels, uniform, factor, COLUMNS)
    low, width, left = (np.ascontiguousarray(part.T[factor.order]) for part in (low, width, weights))
    codes = np.empty(left.shape, np.uint8)
    errors = np.empty((COLUMNS, left.shape[1]), np.float32)
    for start in range(0, left.shape[0], COLUMNS):
        stop = min(start + COLUMNS, left.shape[0])
        here = slice(start, stop)
        part = np.ascontiguousarray(factor.upper[here, here])
        now = errors[: stop - start]
        round_columns(left[here], low[here], width[here], part, levels, uniform, codes[here], now)
        left[stop:] -= factor.upper[here, stop:].T @ now
    back = np.empty_like(codes)
    back[factor.order] = codes
    return np.ascontiguousarray(back.T)
