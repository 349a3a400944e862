"""The inverse of a Cholesky factor, in the memory of the matrix itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewbits.spill import Spill

if TYPE_CHECKING:
    import torch

PANEL = 2048
"""Columns that are worked on at once: always so many, since the last bits of matrix products depend on their shapes."""


def invert_cholesky(whole: torch.Tensor, spill: Spill) -> bool:
    """Replace a matrix by the inverse of its lower Cholesky factor.

    Beside the matrix, whose pages need not stay in memory, this takes some panels of [columns, PANEL]. The factor is
    made panel by panel from the first, its inverse from the last: both read only what lies below the diagonal.

    Args:
        whole: the matrix, float64 [columns, columns], symmetric, on any device; changed in place. What is above the
            diagonal blocks of `PANEL` is neither read nor written: it is no part of the result.
        spill: lets go of what was read.

    Returns:
        False where the matrix is not positive.
    """
    import torch  # takes a second, which methods that need no Hessian do without

    size = len(whole)
    panels = [slice(start, min(start + PANEL, size)) for start in range(0, size, PANEL)]
    for number, here in enumerate(panels):
        before = slice(0, here.start)
        pivot = whole[here, before].clone()
        for rows in panels[number:] if number else ():
            whole[rows, here] -= whole[rows, before] @ pivot.T
            spill.forget()
        factor, failed = torch.linalg.cholesky_ex(whole[here, here])
        if failed:
            return False
        whole[here, here] = factor
        for rows in panels[number + 1 :]:
            whole[rows, here] = torch.linalg.solve_triangular(factor.T, whole[rows, here], upper=True, left=False)
            spill.forget()
    for number, here in reversed([*enumerate(panels)]):
        factor = whole[here, here].clone()
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
        below = whole[here.stop :, here] @ -inverse
        spill.forget()
        for rows in panels[number + 1 :]:
            done = slice(here.stop, rows.stop)
            whole[rows, here] = whole[rows, done] @ below[: rows.stop - here.stop]
            spill.forget()
        whole[here, here] = inverse
    return True
