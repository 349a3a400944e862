"""The loop of `kernels.feedback` on a GPU, in Triton: one program for some rows of weights, which stay in registers.

Importing this module needs Triton, which comes with torch's CUDA builds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 32
"""Of weights, that a program works on: 128 columns of them fill 32 registers of each of its 128 threads."""


@triton.jit
def _round(
    left: tl.tensor, low: tl.tensor, width: tl.tensor, upper: tl.tensor, levels: tl.tensor, codes: tl.tensor,
    errors: tl.tensor, columns: tl.tensor, rows: tl.tensor, count: tl.tensor, uniform: tl.constexpr,
    size: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """`round_columns`: left, low, width, codes and errors [columns, rows], upper [columns, columns], levels [count]."""
    row = tl.program_id(0) * block + tl.arange(0, block)
    column = tl.arange(0, size)
    there = row < rows
    inside = (column[:, None] < columns) & there[None, :]
    tile = tl.load(left + column[:, None] * rows + row[None, :], mask=inside, other=0.0)
    top = (count - 1).to(tl.float32)
    for j in range(columns):
        now = tl.sum(tl.where(column[:, None] == j, tile, 0.0), 0)
        bottom = tl.load(low + j * rows + row, mask=there, other=0.0)
        span = tl.load(width + j * rows + row, mask=there, other=1.0)
        place = (now - bottom) / tl.where(span != 0.0, span, 1.0)
        if uniform:
            chosen = tl.minimum(tl.maximum(tl.floor(place * top + 0.5), 0.0), top)
        else:
            chosen = tl.zeros([block], tl.float32)
            for k in range(count - 1):
                middle = (tl.load(levels + k) + tl.load(levels + k + 1)) * 0.5
                chosen += tl.where(place > middle, 1.0, 0.0)
        code = tl.minimum(tl.maximum(chosen.to(tl.int32), 0), count - 1)
        value = bottom + span * tl.load(levels + code)
        wrong = (now - value) * (1.0 / tl.load(upper + j * columns + j))
        tl.store(codes + j * rows + row, code.to(tl.uint8), mask=there)
        tl.store(errors + j * rows + row, wrong, mask=there)
        share = tl.load(upper + j * columns + column, mask=(column > j) & (column < columns), other=0.0)
        tile -= share[:, None] * wrong[None, :]


def round_columns(
    left: torch.Tensor,
    low: torch.Tensor,
    width: torch.Tensor,
    upper: torch.Tensor,
    levels: torch.Tensor,
    uniform: bool,
    codes: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """Choose the codes of some columns, each column's error made up for by those that follow.

    Args:
        left, low, width: float32 [columns, rows], contiguous, all tensors on one device: a code stands for low +
            width * levels[code].
        upper: float32 [columns, columns], of the upper Cholesky factor of the inverse Hessian.
        levels: float32 [codes], ascending from 0 to 1.
        uniform: whether the levels are evenly spaced.
        codes: out, uint8 [columns, rows].
        errors: out, float32 [columns, rows], what columns beyond these have to make up for.
    """
    columns, rows = left.shape
    size = triton.next_power_of_2(columns)
    _round[(triton.cdiv(rows, ROWS),)](
        left, low, width, upper, levels, codes, errors, columns, rows, len(levels), uniform, size, ROWS
    )
