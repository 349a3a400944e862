"""H = L D L^T in blocks, as feedback among groups of inputs uses a Hessian."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fewbits.errors import FewbitsError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def check_hessian(hessian: Floats) -> None:
    """Raises:
    FewbitsError: it is not finite, or an input's energy is less than nothing.
    """
    if not np.isfinite(hessian).all() or hessian.diagonal().min() < 0:
        raise FewbitsError("the Hessian is not finite and positive.", "Make it again.")


def factored(hessian: Doubles, block: int, device: str = "cpu") -> tuple[Floats, Doubles] | None:
    """H = L D L^T in blocks.

    Args:
        hessian: float64 [columns, columns].
        device: of torch, where it is factored.

    Returns:
        L, float32 [columns, columns], unit matrices in the blocks on its diagonal, and the lower Cholesky factors of
        D's blocks, float64 [columns / block, block, block]; None where H is not positive.
    """
    if device != "cpu":
        return _factored_there(hessian, block, device)
    try:
        lower = np.linalg.cholesky(hessian)
    except np.linalg.LinAlgError:
        return None
    own = np.empty((len(hessian) // block, block, block))
    for index in range(len(own)):
        here = slice(index * block, (index + 1) * block)
        own[index] = lower[here, here]
        lower[here.start :, here] = np.linalg.solve(own[index].T, lower[here.start :, here].T).T
    return lower.astype(np.float32), own


def _factored_there(hessian: Doubles, block: int, device: str) -> tuple[Floats, Doubles] | None:
    """`factored` on a device."""
    import torch  # takes a second, which runs on the processor alone do without

    lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(hessian).to(device))
    if failed:
        return None
    size = len(lower)
    panels = lower.view(size, -1, block).transpose(0, 1)  # [blocks, columns, block]
    own = lower.view(-1, block, size // block, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    unit = torch.linalg.solve_triangular(own, panels, upper=False, left=False)
    return unit.transpose(0, 1).reshape(size, size).float().cpu().numpy(), own.cpu().numpy()
