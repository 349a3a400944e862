"""The searches of `kernels.groups` for integer levels on a GPU, in Triton: one program for some groups, which are read
once and stay in registers while all candidates are tried.

Importing this module needs Triton, which comes with torch's CUDA builds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TOGETHER = 1024
"""Elements that a program works on, at least one group."""
TINY = tl.constexpr(1e-30)
WORST = tl.constexpr(3e38)
DOUBT = tl.constexpr(1 - 2e-6)
F16_TINY = tl.constexpr(2.0**-24)
F16_MAX = tl.constexpr(65504.0)
WHOLE = tl.constexpr(12582912.0)
"""1.5 * 2^23: numbers below 2^22 that it is added to lose their fraction, rounded to even."""


@triton.jit
def _whole(numbers: tl.tensor, lowest: tl.tensor, highest: tl.tensor) -> tl.tensor:
    """The nearest whole number between two others, ties to even."""
    return (tl.minimum(tl.maximum(numbers, lowest), highest) + WHOLE) - WHOLE


@triton.jit
def _stored(scales: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """`round_scales`: what the stored type decodes to; none becomes zero."""
    if kind == 1:
        inside = tl.minimum(tl.maximum(scales, -F16_MAX), F16_MAX).to(tl.float16).to(tl.float32)
        scales = tl.where(tl.abs(inside) < F16_TINY, tl.where(scales < 0, -F16_TINY, F16_TINY), inside)
    if kind == 2:
        bits = scales.to(tl.int32, bitcast=True)
        scales = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return scales


@triton.jit
def _better(
    x: tl.tensor, weight: tl.tensor, spacing: tl.tensor, zero: tl.tensor, lowest: tl.tensor, highest: tl.tensor,
    unit: tl.tensor, least: tl.tensor, best: tl.tensor, best_zero: tl.tensor, kind: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """`residuals` and `keep_better`: the least error, its scale and zero, with those of this spacing."""
    usable = tl.abs(spacing) > TINY
    inverse = tl.where(usable, 1.0 / tl.where(usable, spacing, 1.0), 0.0)
    t = x * inverse[:, None]
    c = _whole(t, lowest[:, None], highest[:, None])
    e, a = t - c, weight * c
    sll, sel, see = tl.sum(a * c, 1), tl.sum(a * e, 1), tl.sum(weight * e * e, 1)
    new = _stored(spacing + spacing * (sel / tl.maximum(sll, TINY)), kind)
    a = tl.where(spacing != 0, (new - spacing) / tl.where(spacing != 0, spacing, 1.0), 0.0)
    part = spacing * unit
    stay, move = see * part * part, (see - a * (2.0 * sel - a * sll)) * part * part
    moved = move < stay * DOUBT
    left = tl.where(usable, tl.where(moved, move, stay), WORST)
    better = left < least * DOUBT
    least = tl.where(better, left, least)
    best = tl.where(better, tl.where(moved, new, spacing), best)
    return least, best, tl.where(better, zero, best_zero)


@triton.jit
def _loaded(
    weights: tl.tensor, importance: tl.tensor, groups: tl.tensor, elements: tl.tensor, per_row: tl.tensor,
    size: tl.constexpr, block: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """A program's groups, whether there are such, their weights and importances, zeros beyond the elements."""
    group = tl.program_id(0) * block + tl.arange(0, block)
    element = tl.arange(0, size)
    there = group < groups
    inside = there[:, None] & (element[None, :] < elements)
    x = tl.load(weights + group.to(tl.int64)[:, None] * elements + element[None, :], mask=inside, other=0.0)
    weight = tl.load(importance + (group % per_row)[:, None] * elements + element[None, :], mask=inside, other=0.0)
    return group, there, x, weight


@triton.jit
def _begun(best: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """What errors are scaled by, the inverse of the scale to begin with, and an error that any candidate beats; zero,
    which none does, for groups of nothing."""
    unit = tl.where(best != 0, 1.0 / tl.where(best != 0, best, 1.0), 0.0)
    return unit, tl.where(tl.abs(best) > TINY, WORST, 0.0)


@triton.jit
def _search_scales(
    weights: tl.tensor, importance: tl.tensor, parts: tl.tensor, scales: tl.tensor, groups: tl.tensor,
    elements: tl.tensor, per_row: tl.tensor, tried: tl.tensor, lowest: tl.constexpr, highest: tl.constexpr,
    signed: tl.constexpr, kind: tl.constexpr, size: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """`search_scales`: weights [groups, elements], importance [groups of a row, elements], parts [tried], the inverse
    candidates; scales [groups] in and out."""
    group, there, x, weight = _loaded(weights, importance, groups, elements, per_row, size, block)
    first = tl.argmax(tl.abs(x), 1)
    peak = tl.sum(tl.where(tl.arange(0, size)[None, :] == first[:, None], x, 0.0), 1)
    best = tl.load(scales + group, mask=there, other=0.0)
    unit, least = _begun(best)
    zero = tl.zeros([block], tl.float32)
    bottom, top = zero + lowest, zero + highest
    for k in range(-1, tried + 1):
        # the scale to begin with, the candidates, and the best of them once more
        spacing = best
        if (k >= 0) & (k < tried):
            spacing = peak * tl.load(parts + k)
            if not signed:
                spacing = tl.abs(spacing)
            spacing = _stored(spacing, kind)
        least, best, zero = _better(x, weight, spacing, zero, bottom, top, unit, least, best, zero, kind)
    tl.store(scales + group, best, mask=there)


@triton.jit
def _search_pairs(
    weights: tl.tensor, importance: tl.tensor, parts: tl.tensor, starts: tl.tensor, scales: tl.tensor,
    zeros: tl.tensor, groups: tl.tensor, elements: tl.tensor, per_row: tl.tensor, tried: tl.tensor,
    most: tl.constexpr, kind: tl.constexpr, size: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """`search_pairs`: as `_search_scales`; starts [tried], the code of the lowest weight, zeros [groups] in and out."""
    group, there, x, weight = _loaded(weights, importance, groups, elements, per_row, size, block)
    low, high = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
    best = tl.load(scales + group, mask=there, other=0.0)
    best_zero = tl.load(zeros + group, mask=there, other=0.0)
    unit, least = _begun(best)
    top = tl.zeros([block], tl.float32) + most
    for k in range(-1, tried + 3):
        # the pair to begin with, the candidates, then the best of them and its neighbours
        step = tl.where(k == tried + 1, 1.0, tl.where(k == tried + 2, -1.0, 0.0))
        spacing, zero = best, tl.minimum(tl.maximum(best_zero + step, 0.0), top)
        if (k >= 0) & (k < tried):
            spacing = _stored((high - low) * tl.load(parts + k), kind)
            usable = spacing > TINY
            zero = _whole(tl.load(starts + k) - low / tl.where(usable, spacing, 1.0), top * 0, top)
        least, best, best_zero = _better(
            x, weight, spacing, zero, -zero, top - zero, unit, least, best, best_zero, kind
        )
    tl.store(scales + group, best, mask=there)
    tl.store(zeros + group, best_zero, mask=there)


def search_scales(
    weights: torch.Tensor,
    importance: torch.Tensor,
    elements: int,
    ends: tuple[float, float],
    candidates: torch.Tensor,
    signed: bool,
    kind: int,
    scales: torch.Tensor,
) -> None:
    """Groups of integers without zero points, or with a constant one.

    Args:
        weights: float32, flat, row-major [rows, columns]; all tensors on one device.
        importance: float32 [columns].
        elements: of a group, some thousands at most; they divide the columns.
        ends: lowest and highest integer less the zero.
        candidates: float32 [candidates], see `groups.search_scales`.
        signed: whether scales may be negative.
        kind: how scales are stored: `groups.PLAIN`, `F16` or `BF16`.
        scales: float32 [groups], in and out: the scale to begin with, and the best one.
    """
    grid, count, size, block = _shape(scales, elements)
    _search_scales[grid](
        *(weights, importance, 1 / candidates, scales, count, elements, len(importance) // elements, len(candidates)),
        *(*ends, signed, kind, size, block),
    )


def search_pairs(
    weights: torch.Tensor,
    importance: torch.Tensor,
    elements: int,
    most: float,
    candidates: torch.Tensor,
    kind: int,
    scales: torch.Tensor,
    zeros: torch.Tensor,
) -> None:
    """Groups with integer zero points.

    Args:
        weights, importance, elements, kind: as for `search_scales`.
        most: codes and zero points run from 0 to this.
        candidates: float32 [candidates, 2], see `groups.search_pairs`.
        scales, zeros: float32 [groups], in and out: the pair to begin with, and the best one.
    """
    grid, count, size, block = _shape(scales, elements)
    _search_pairs[grid](
        *(weights, importance, 1 / candidates[:, 0], candidates[:, 1].contiguous(), scales, zeros, count, elements),
        *(len(importance) // elements, len(candidates), most, kind, size, block),
    )


def _shape(scales: torch.Tensor, elements: int) -> tuple[tuple[int], int, int, int]:
    """The grid of programs; groups, elements and groups of one program, both powers of two."""
    size = triton.next_power_of_2(elements)
    block = max(1, TOGETHER // size)
    return (triton.cdiv(len(scales), block),), len(scales), size, block
