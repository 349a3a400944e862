"""The codebooks of llama.cpp's i-quants as small integers, out of the gguf package, which no rule gives."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import quants

from fewbits.errors import FewbitsError

LEVELS: dict[str, tuple[int, ...]] = {
    "IQ1_S": (-1, 0, 1),
    "IQ2_XXS": (8, 25, 43),
    "IQ2_XS": (8, 25, 43),
    "IQ2_S": (8, 25, 43),
    "IQ3_XXS": (4, 12, 20, 28, 36, 44, 52, 62),
    "IQ3_S": (1, 3, 5, 7, 9, 11, 13, 15),
}
"""What each small integer stands for, before any scale. IQ1_M has the grid of IQ1_S."""
_DIGESTS = {
    "IQ1_S": "bf92c60e2ed15644d2d948b652a55624cc35699ef5c8e0337258e332f8c47b48",
    "IQ2_XXS": "886814bc08b031008eb1086cdbc5c3fae78eecc764a4a6742f8eb839b9f37ef6",
    "IQ2_XS": "e9567eb15257b717a029c8c1e574ffd87af0c95090552eff83eb6e09b1211046",
    "IQ2_S": "1d4ca1e2fbd2be073bef55f6582ad20109dc746ebd39b5c0780d57ebacc73024",
    "IQ3_XXS": "e86540e4e7b2d3375c137ffe84467dc402396c6da24273f9007b5db112172f4c",
    "IQ3_S": "acb8a458f699e571cf55c9270a4bc15facd6653b40450ce1f449f345c95e4407",
}
"""SHA-256 of the small integers as bytes."""


@cache
def grid(name: str) -> npt.NDArray[np.uint8]:
    """Entries in index order, each element an index into LEVELS[name]: [entries, 8], for IQ3 [entries, 4].

    Raises:
        FewbitsError: the installed gguf package has other entries.
    """
    kind: Any = getattr(quants, name)
    kind.init_grid()
    values = np.asarray(kind.grid, np.float32).reshape(kind.grid_shape)
    levels = np.array(LEVELS[name], np.float32)
    found = np.abs(values[..., None] - levels).argmin(-1).astype(np.uint8)
    if hashlib.sha256(found.tobytes()).hexdigest() != _DIGESTS[name] or not np.array_equal(levels[found], values):
        raise FewbitsError(f"The gguf package installed has another codebook for {name} than files of this type use.")
    found.flags.writeable = False
    return found
