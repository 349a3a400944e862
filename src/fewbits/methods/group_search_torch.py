"""The loop of `group_search.search_groups` on a GPU. Importing this needs torch.

Products of matrices do nearly all of the work, so that torch alone is enough.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]


def picked_candidates(
    weights: Floats,
    hessian: Floats,
    scales: Floats,
    zeros: Floats,
    levels: Floats,
    uniform: bool,
    device: str,
) -> npt.NDArray[np.int64]:
    """For each group of each row the candidate with the least error, together with the groups before it.

    Args:
        weights: float32 [rows, columns].
        hessian: float32 [columns, columns].
        scales, zeros: float32 [candidates, rows, groups]: a level stands for (level - zero) * scale.
        levels: float32 [n], ascending.
        uniform: whether the levels are neighbouring whole numbers.

    Returns:
        int64 [rows, groups]; of equals the first.
    """
    moments, steps = torch.from_numpy(hessian).to(device), torch.tensor(levels, device=device)
    middles = (steps[1:] + steps[:-1]) / 2
    left = torch.from_numpy(weights).to(device).T
    size = weights.shape[1] // scales.shape[2]
    wrong = torch.zeros(left.shape, device=device)
    picked = torch.empty((weights.shape[0], scales.shape[2]), dtype=torch.int64, device=device)
    for index in range(scales.shape[2]):
        here = slice(index * size, (index + 1) * size)
        scale, zero = (torch.from_numpy(part[:, :, index].copy()).to(device) for part in (scales, zeros))
        x = left[here, None]  # [columns, candidates, rows] from here on
        if uniform:
            level = torch.floor(x * (1 / scale) + zero + 0.5).clamp(levels[0].item(), levels[-1].item())
        else:
            level = steps[torch.bucketize(x * (1 / scale), middles)]
        error = (level - zero).mul_(scale).sub_(x)
        pull = moments[here, : here.start] @ wrong[: here.start]
        loss = (moments[here, here] @ error.flatten(1)).view_as(error).add_(pull[:, None], alpha=2).mul_(error).sum(0)
        best = loss.nan_to_num_(nan=torch.inf).argmin(0)
        picked[:, index] = best
        wrong[here] = error.gather(1, best.expand(size, 1, -1))[:, 0]
    return picked.cpu().numpy()
