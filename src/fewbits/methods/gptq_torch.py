"""What GPTQ does with matrices, on a GPU: the factor, what a damping costs, and feedback. Importing it needs torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fewbits.methods.base import Factor
from fewbits.methods.inverse_cholesky import PANEL, invert_cholesky
from fewbits.spill import Spill

Floats = npt.NDArray[np.float32]


def inverted(
    hessian: Floats, diagonal: npt.NDArray[np.float64], order: npt.NDArray[np.int64], device: str
) -> Floats | None:
    """The inverse of a Hessian's Cholesky factor, both its axes reversed, so that it is an upper triangle; in float64.

    Args:
        hessian: float32 [columns, columns].
        diagonal: float64 [columns], in place of the Hessian's own.
        order: int64 [columns], of the columns before they are factored.

    Returns:
        float32 [columns, columns]; None where the matrix is not positive.
    """
    rows = torch.from_numpy(order).to(device)
    work = torch.from_numpy(hessian).to(device)[rows][:, rows].double()
    work.diagonal().copy_(torch.from_numpy(diagonal[order]))
    if not invert_cholesky(work, Spill()):
        return None
    return work.tril_().float().flip(0, 1).cpu().numpy()


def expected_loss(factor: Factor, hessian: Floats) -> float:
    """The trace of diag(U)^-1 U H U^T diag(U)^-1: see `gptq.choose_damping`.

    Args:
        factor: U.
        hessian: H, float32 [columns, columns], in the columns' own order.
    """
    order, upper = torch.from_numpy(factor.order).to(factor.device), factor.upper_there
    ordered = torch.from_numpy(hessian).to(factor.device)[order][:, order]
    total = 0.0
    for start in range(0, len(upper), PANEL):
        rows = upper[start : start + PANEL]
        each = ((rows @ ordered).double() * rows).sum(1)
        total += float((each / rows.diagonal(start).double().square()).sum())
    return total


def feed(
    weights: Floats,
    low: Floats,
    width: Floats,
    levels: Floats,
    uniform: bool,
    factor: Factor,
    columns: int,
) -> npt.NDArray[np.uint8]:
    """`gptq.feed` on the factor's device.

    Args:
        columns: that are rounded before their errors reach the rest in one matrix product.
    """
    from fewbits.kernels.feedback_triton import round_columns  # needs Triton, which comes with torch for GPUs

    order, upper = torch.from_numpy(factor.order).to(factor.device), factor.upper_there
    given = (torch.from_numpy(part).to(factor.device) for part in (low, width, weights))
    low_, width_, left = (part.T[order].contiguous() for part in given)
    rungs = torch.from_numpy(levels).to(factor.device)
    codes = torch.empty(left.shape, dtype=torch.uint8, device=factor.device)
    errors = torch.empty((columns, left.shape[1]), device=factor.device)
    for start in range(0, len(left), columns):
        stop = min(start + columns, len(left))
        here, now = slice(start, stop), errors[: stop - start]
        own = upper[here, here].contiguous()
        round_columns(left[here], low_[here], width_[here], own, rungs, uniform, codes[here], now)
        left[stop:].addmm_(upper[here, stop:].T, now, alpha=-1)
    back = torch.empty_like(codes)
    back[order] = codes
    return back.T.contiguous().cpu().numpy()
