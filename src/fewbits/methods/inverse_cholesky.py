"""The inverse of a Cholesky factor, in the memory of the matrix itself."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fewbits.spill import Spill

PANEL = 2048
"""Columns that are worked on at once: always so many, since the last bits of matrix products depend on their shapes."""
Doubles = npt.NDArray[np.float64]


def invert_cholesky(matrix: Doubles, spill: Spill) -> bool:
    """Replace a matrix by the inverse of its lower Cholesky factor.

    Beside the matrix, whose pages need not stay in memory, this takes some panels of [columns, PANEL]. The factor is
    made panel by panel from the first, its inverse from the last: both read only what lies below the diagonal.

    Args:
        matrix: float64 [columns, columns], symmetric; changed in place. What is above the diagonal blocks of `PANEL`
            is neither read nor written: it is no part of the result.
        spill: lets go of what was read.

    Returns:
        False where the matrix is not positive.
    """
    import torch  # takes a second, which methods that need no Hessian do without

    whole = torch.from_numpy(matrix)
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
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False)
        below = whole[here.stop :, here] @ -inverse
        spill.forget()
        for rows in panels[number + 1 :]:
            done = slice(here.stop, rows.stop)
            whole[rows, here] = whole[rows, done] @ below[: rows.stop - here.stop]
            spill.forget()
        whole[here, here] = inverse
    return True
