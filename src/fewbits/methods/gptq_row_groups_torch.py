"""What `gptq_row_groups` does with a matrix, on a GPU, all outputs at once. Importing this needs torch.

Sums over the rows of a group are in another order than the processor's, so that of two codes that are as good but for
rounding the other one may be taken; everything else is the same arithmetic.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fewbits.codecs.row_groups import GroupedRows, RowGroups
from fewbits.kernels.lanes import HUGE, TINY
from fewbits.kernels.row_groups import WIDTHS
from fewbits.methods.base import Known
from fewbits.methods.gptq_row_groups import LEAST, REACH, TRIES, Doubles, Floats, Group, settled_unit

WORK = 1 << 26
"""Weights, times the scales tried for them, that are rounded at once at most: 256 MB."""
TOP = 16
"""The largest scale code."""


def quantize(
    weights: Floats, kind: RowGroups, known: Known, order: npt.NDArray[np.int64], groups: list[Group]
) -> GroupedRows:
    """`gptq_row_groups.quantize` on the device.

    Args:
        weights: float32 [out, in], finite.
        order: int64 [in], of the rows.
        groups: of the rows in that order.
    """
    device, upper = known.device, None
    if known.factor is not None:
        upper = known.factor.upper_there.to(device)
    left = torch.from_numpy(weights).to(device).T[torch.from_numpy(order).to(device)].contiguous()
    codes = torch.empty(left.shape, dtype=torch.uint8, device=device)
    scale_codes = torch.empty((len(groups), left.shape[1]), dtype=torch.uint8, device=device)
    errors = torch.empty((max(group.last - group.first for group in groups), left.shape[1]), device=device)
    scale_max = np.empty(len(groups), np.float16)
    for group in groups:
        here = slice(group.start, group.stop)
        x = left[here].clamp(-float(HUGE), float(HUGE))
        unit, k = _search(x, group)
        if upper is None:
            ranks = _rounded(x, _scales(k, unit), group)
        else:
            k, ranks, wrong = _feed(x, upper[here, here], k, unit, group)
            errors[group.start - group.first : group.stop - group.first] = wrong
            _pass_on(left, upper, errors, group)
        codes[here] = ranks + float(group.half)
        scale_codes[group.index] = k - 1
        scale_max[group.index] = unit * np.float32(256)
    return GroupedRows(kind, order, codes.cpu().numpy(), scale_codes.cpu().numpy(), scale_max)


def _search(x: torch.Tensor, group: Group) -> tuple[np.float32, torch.Tensor]:
    """The unit of a group's scales with the least weighted error, and each column's scale code with it.

    Args:
        x: [rows, columns].

    Returns:
        The unit, and [columns], 1 to 16.
    """
    weight = torch.from_numpy(group.weight).to(x.device)
    free = _free_scales(x, weight, group)
    codes = torch.empty_like(free)

    def scan(units: Floats) -> Doubles:
        return _scan_units(x, weight, free, units, group)

    def choose(unit: np.float32) -> Doubles:
        return _choose_codes(x, weight, free, unit, group, codes)

    return settled_unit(group, float(free.max()), scan, choose), codes


def _scales(k: torch.Tensor, unit: np.float32) -> torch.Tensor:
    """The scales that codes from 1 to 16 stand for, rounded to half precision; a group's units keep them in range."""
    return (k * k * float(unit)).half().float()


def _rounded(x: torch.Tensor, scales: torch.Tensor, group: Group) -> torch.Tensor:
    """Codes less half, of the scales' shape but for [rows] before the columns.

    Args:
        x: [rows, columns].
        scales: [columns] or [n, 1, columns].
    """
    half = float(group.half)
    return (x * scales.clamp_min(float(TINY)).reciprocal_()).round_().clamp_(-half, half - 1)


def _errors(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, group: Group) -> torch.Tensor:
    """Weighted squared errors of each column with some scales.

    Args:
        x: [rows, columns].
        weight: [rows].
        scales: [n, columns].

    Returns:
        [n, columns].
    """
    found = []
    for some in scales[:, None].split(max(1, WORK // x.numel())):
        wrong = _rounded(x, some, group).mul_(some).sub_(x)
        found.append(wrong.square_().mul_(weight[:, None]).sum(1))
    return torch.cat(found)


def _free_scales(x: torch.Tensor, weight: torch.Tensor, group: Group) -> torch.Tensor:
    """The best scale of each column by itself, [columns]; zero where the column is."""
    sizes = np.geomspace(LEAST[group.bits], 1.15, WIDTHS).astype(np.float32)
    scales = x.abs().amax(0) / (float(group.half) - 0.5) * torch.from_numpy(sizes).to(x.device)[:, None]
    return scales.gather(0, _errors(x, weight, scales, group).argmin(0, keepdim=True))[0]


def _scan_units(x: torch.Tensor, weight: torch.Tensor, free: torch.Tensor, units: Floats, group: Group) -> Doubles:
    """The error of a group with each of some units [n], every column with the better of the scales around its own."""
    unit = torch.from_numpy(units).to(x.device)[:, None]
    below = (free / unit).sqrt_().floor_().clamp_(1, TOP - 1)
    k = torch.stack([below, below + 1])
    errors = _errors(x, weight, (k * k * unit).flatten(0, 1), group)
    return errors.view_as(k).amin(0).sum(1, dtype=torch.float64).cpu().numpy()


def _choose_codes(
    x: torch.Tensor, weight: torch.Tensor, free: torch.Tensor, unit: np.float32, group: Group, codes: torch.Tensor
) -> Doubles:
    """The best scale of each column that a unit leaves.

    Args:
        codes: out, [columns]: 1 to 16.

    Returns:
        [3]: the error, and the numerator and the denominator of the unit that would be best for these codes.
    """
    steps = torch.arange(1 - REACH[group.bits], REACH[group.bits] + 1, device=x.device)[:, None]
    k = ((free / float(unit)).sqrt_().floor_() + steps).clamp_(1, TOP)
    errors, best = _errors(x, weight, _scales(k, unit), group).min(0, keepdim=True)
    codes.copy_(k.gather(0, best)[0])
    square = codes * codes
    values = _rounded(x, square * float(unit), group).mul_(square)
    weighted = values * weight[:, None]
    sums = torch.stack([errors[0], (weighted * x).sum(0), (weighted * values).sum(0)])
    return sums.sum(1, dtype=torch.float64).cpu().numpy()


def _feed(
    x: torch.Tensor, upper: torch.Tensor, codes: torch.Tensor, unit: np.float32, group: Group
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a group with error feedback, each column with the scale among its neighbours that then costs least.

    Args:
        x: [rows, columns], the rows as the errors of those before have left them.
        upper: [rows, rows], of the upper Cholesky factor of the inverse Hessian.
        codes: [columns], 1 to 16.

    Returns:
        Scale codes [columns]; codes less half [rows, columns]; what later rows have to make up for [rows, columns].
    """
    half, tries = float(group.half), TRIES[group.bits]
    steps = torch.arange(-tries, tries + 1, device=x.device)[:, None]
    k = (codes + steps).clamp_(1, TOP)
    scales = _scales(k, unit).flatten()
    inverse, value = scales.reciprocal(), torch.empty_like(scales, dtype=torch.float16)
    # errors are divided by the diagonal in the end: until then what they are passed on by is
    passed = (upper / upper.diagonal()[:, None]).T.contiguous()
    wrong = x.repeat(1, len(k))
    ranks = torch.empty_like(wrong)
    for j, (place, rank) in enumerate(zip(wrong, ranks, strict=True)):
        place.addmv_(wrong[:j].T, passed[j, :j], alpha=-1)
        torch.mul(place, inverse, out=rank).round_().clamp_(-half, half - 1)
        place.sub_(torch.mul(rank, scales, out=value))
    wrong /= upper.diagonal()[:, None]
    tried = (len(x), *k.shape)
    best = wrong.view(tried).square().sum(0).argmin(0, keepdim=True)
    every = best.expand(len(x), -1, -1)
    chosen, missed = (part.view(tried).gather(1, every)[:, 0] for part in (ranks, wrong))
    return k.gather(0, best)[0], chosen, missed


def _pass_on(left: torch.Tensor, upper: torch.Tensor, errors: torch.Tensor, group: Group) -> None:
    """Let later rows make up for errors: those of the group within its block, those of a whole block beyond.

    Args:
        left: in and out, [in, columns].
        upper: [in, in].
        errors: [rows of the block, columns], up to the group's.
    """
    if group.stop < group.last:
        here, there = slice(group.start, group.stop), slice(group.stop, group.last)
    else:
        here, there = slice(group.first, group.last), slice(group.last, None)
    left[there].addmm_(upper[here, there].T, errors[here.start - group.first : here.stop - group.first], alpha=-1)
