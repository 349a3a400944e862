"""Scales of groups by the error of what each group adds to the output, correlations of its inputs included.

AWQ's clip search (arXiv 2306.00978; `auto_clip` in its code) minimizes the same over one bound for both ends of a
group. Here each end moves alone, inputs are known by X^T X instead of a sample of tokens, and a group's error is taken
together with what the groups before it have already done to the output.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fewbits.codecs.scaled import Quantized, Scaled
from fewbits.codecs.scaled_scales import store
from fewbits.kernels.group_error import best_candidates

Floats = npt.NDArray[np.float32]
MOST = {8: 0.06, 4: 0.4, 3: 0.5, 2: 0.6}
"""Bits -> most that a range is shrunk."""
STEPS = 8
SIDES = (0.0, 0.5, 1.0)
"""How much of what is cut off is cut at the low end."""
LONGEST = 256
"""In longer groups X^T X is as good as the whole of it, which costs as much as a forward pass for each candidate."""


def searchable(kind: Scaled) -> bool:
    """Whether `search_groups` takes a type: groups of neighbours in a row, scales that are stored one by one."""
    return (
        kind.block[0] == 1
        and 1 < kind.block[1] <= LONGEST
        and not kind.strided
        and kind.scale != "NESTED"
        and kind.zero != "float"
    )


def search_groups(
    weights: Floats, kind: Scaled, hessian: Floats, amax: float | None = None, device: str = "cpu"
) -> Quantized:
    """Choose scales and zero points group by group, each for the least error together with the groups before it; codes
    by rounding to nearest.

    Args:
        weights: float32 [rows, columns], finite.
        kind: a type that is `searchable`.
        hessian: float32 [columns, columns], X^T X of the inputs or its mean.
        amax: as for `Scaled.settle`.
        device: of torch, where the candidates are tried.

    Raises:
        FewbitsError: the group does not divide the rows.
    """
    weights = np.ascontiguousarray(weights, np.float32)
    rows, columns = weights.shape
    # the largest entry becomes one, so that no square leaves float32
    hessian = hessian / np.float32(max(float(hessian.diagonal().max()), 1e-30))
    found = kind.search(weights, np.ascontiguousarray(hessian.diagonal()), amax, device)
    scales, zeros = _candidates(weights, kind, found, kind.settle(weights, amax))
    levels = kind.ladder()[0]
    if device != "cpu":
        from fewbits.methods import group_search_torch  # imports torch

        tried = (scales / np.float32(found.global_scale), zeros, levels, kind.levels == "INT")
        chosen = group_search_torch.picked_candidates(weights, hessian, *tried, device)[None]
        best = np.take_along_axis(scales, chosen, 0)[0]
        points = np.take_along_axis(zeros, chosen, 0)[0] if kind.zero == "integer" else None
        codes = kind.round(weights, best, points, found.global_scale)
        return Quantized(kind, codes, best, points, found.global_scale)
    wrong = np.zeros((columns, rows), np.float32)
    picked = np.zeros(rows, np.uint8)
    for index in range(scales.shape[2]):
        here = slice(index * kind.block[1], (index + 1) * kind.block[1])
        candidates = scales[:, :, index] / np.float32(found.global_scale)
        points = np.ascontiguousarray(zeros[:, :, index])
        pull = hessian[here, : here.start] @ wrong[: here.start]
        best_candidates(
            np.ascontiguousarray(weights[:, here].T),
            np.ascontiguousarray(hessian[here, here]),
            pull,
            candidates,
            points,
            levels,
            kind.levels == "INT",
            picked,
        )
        scale = np.take_along_axis(scales[:, :, index], picked[None], 0).T
        zero = np.take_along_axis(points, picked[None], 0).T if kind.zero == "integer" else None
        found.scales[:, index] = scale[:, 0]
        if zero is not None and found.zeros is not None:
            found.zeros[:, index] = zero[:, 0]
        codes = kind.round(weights[:, here], scale, zero, found.global_scale)
        found.codes[:, here] = codes
        wrong[here] = (Quantized(kind, codes, scale, zero, found.global_scale).decode() - weights[:, here]).T
    return found


def _candidates(weights: Floats, kind: Scaled, searched: Quantized, plain: Quantized) -> tuple[Floats, Floats]:
    """Scales and zero points to try, both float32 [candidates, rows, groups]."""
    most = MOST.get(kind.bits, 0.5)
    cuts = [most * step / STEPS for step in range(1, STEPS + 1)]
    if kind.zero != "integer":
        factors = (2.0, 0.5) if kind.scale == "E8M0" else (1.08, *(1 - cut for cut in cuts))
        tried = [store(kind.scale, plain.scales * np.float32(factor)) for factor in factors]
        turned = [-scales for scales in (plain.scales, *tried)] if kind.signed else []
        scales = np.stack([searched.scales, plain.scales, *tried, *turned])
        return scales, np.zeros_like(scales)
    assert searched.zeros is not None and plain.zeros is not None
    all_scales, all_zeros = [searched.scales, plain.scales], [searched.zeros, plain.zeros]
    lowest, highest = kind.extremes(weights)
    lowest, highest = np.minimum(lowest, np.float32(0)), np.maximum(highest, np.float32(0))
    for cut in cuts:
        scale = store(kind.scale, plain.scales * np.float32(1 - cut))
        for side in SIDES:
            low = lowest + np.float32(cut * side) * (highest - lowest)
            all_scales.append(scale)
            all_zeros.append(np.clip(np.rint(-low / scale), 0, (1 << kind.bits) - 1).astype(np.float32))
    return np.stack(all_scales), np.stack(all_zeros)
