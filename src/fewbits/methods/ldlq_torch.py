"""LDLQ's feedback among trellises on a GPU. Importing this needs torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fewbits.codecs.trellis import HADAMARD, Trellis, codebook, tile_order
from fewbits.kernels.trellis import STEPS, TILE
from fewbits.methods.ldlq import feed_back

Floats = npt.NDArray[np.float32]


def coded(noise: Floats, lower: Floats | None, kind: Trellis, device: str) -> tuple[npt.NDArray[np.uint16], Floats]:
    """Code all outputs [out, in], blocks of 16 inputs from the last to the first.

    Returns:
        States, uint16 [in / 16, out / 16, 256], and the values they stand for, float32 [out, in].

    Raises:
        FewbitsError: steps of two kinds.
    """
    kind.check_made()
    from fewbits.kernels import viterbi_triton  # needs Triton, which comes with torch for GPUs

    wanted, table = torch.from_numpy(noise).to(device), torch.from_numpy(codebook(kind.codebook)).to(device)
    order = torch.from_numpy(tile_order()).to(device)
    gains = None if lower is None else torch.from_numpy(lower).to(device)
    rows, columns = wanted.shape
    states = torch.empty((columns // TILE, rows // TILE, STEPS), dtype=torch.int32, device=device)

    def code(first: int, now: torch.Tensor) -> torch.Tensor:
        tiles = now.reshape(-1, TILE, TILE).transpose(1, 2).reshape(-1, STEPS)[:, order]
        found = _states(viterbi_triton.walk(tiles, table, kind.bits), kind.bits)
        states[first // TILE] = found
        values = torch.empty_like(tiles)
        values[:, order] = table[found]
        return values.view(-1, TILE, TILE).transpose(1, 2).reshape(-1, TILE)

    made = feed_back(wanted, gains, code, TILE, HADAMARD)
    return states.cpu().numpy().astype(np.uint16), made.cpu().numpy()


def _states(steps: torch.Tensor, bits: int) -> torch.Tensor:
    """`Trellis.states`: the state after each step, int32 [tiles, 256]."""
    wide = steps.int()
    found = torch.zeros_like(wide)
    for back in range(-(-16 // bits)):
        found |= wide.roll(back, 1) << (bits * back)
    return found & 0xFFFF
