"""HQQ (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", Mobius Labs, 2023).

Zero points that minimize sum |w - decoded|^p, p = 0.7, by half-quadratic splitting: a second variable takes the errors
that are outliers and lets go of the rest, and the zero point fits what is left. Scales stay those of the range. No
calibration.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fewbits.codecs.scaled import Quantized, Scaled
from fewbits.errors import FewbitsError
from fewbits.kernels.hqq import mend, round_columns, round_rows, step_columns, step_rows
from fewbits.kernels.powers import powers
from fewbits.methods.base import Known, Method

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.uint8]
STEPS = 20
P = 0.7


def hqq(weights: npt.NDArray[np.float32], kind: Scaled) -> Quantized:
    """Choose zero points and codes as hqq 0.2.8 does on a CPU with one thread, to the last bit.

    Scales and zero points are rounded to their stored type in the end, as hqq does.

    Args:
        weights: float32 [rows, columns], finite.
        kind: a type with zero points that are floats.

    Raises:
        FewbitsError: the type has other zero points, or the groups do not divide the matrix.
    """
    if kind.zero != "float":
        raise FewbitsError(f"HQQ does not make {kind.name}.", "Take a target hqq:..., or another method.")
    grid = kind.grid((weights.shape[0], weights.shape[1]))
    # groups as rows or, strided, as columns; zero points are counted in codes
    shape = (kind.block[0], -1) if kind.strided else (grid[0] * grid[1], -1)
    groups = np.ascontiguousarray(weights).reshape(shape)
    inverse, zeros = kind.start_of_range(weights)
    top = np.float32((1 << kind.bits) - 1)
    step, round_codes = (step_columns, round_columns) if kind.strided else (step_rows, round_rows)
    least = np.float32(np.inf)
    moved, flags = np.empty_like(zeros), np.empty(zeros.size, np.uint8)
    for _ in range(STEPS):
        total = step(groups, inverse, zeros, top, moved, flags)
        if flags.any():
            _mend(groups.T if kind.strided else groups, kind.strided, inverse, zeros, top, flags, moved)
        error = np.float32(total) / np.float32(weights.size)
        # the zero points that come of the last step are kept even where it was a worse one
        zeros, moved = moved, zeros
        if not error < least:
            break
        least = error
    if not np.isfinite(zeros).all():
        return kind.settle(weights)  # weights that nearly leave float32
    codes = np.empty(groups.shape, np.uint8)
    round_codes(groups, inverse, zeros, top, codes)
    stored = kind.stored_start(inverse, zeros, (weights.shape[0], weights.shape[1]))
    return Quantized(kind, codes.reshape(weights.shape), *stored)


def _mend(
    groups: Floats, columns: bool, inverse: Floats, zeros: Floats, top: np.float32, flags: Flags, moved: Floats
) -> None:
    """Make up for outliers in the new zero points of flagged groups.

    Their powers are torch's: those are not the nearest floats, and hqq's are the same.
    """
    outliers = np.empty(int(flags.sum()) * groups.shape[1], np.float32)
    settings = (groups, columns, inverse, zeros, top, flags)
    count = mend(*settings, np.empty(0, np.float32), outliers, moved)
    mend(*settings, powers(outliers[:count], P - 1), outliers, moved)


class HQQ(Method):
    """See `hqq`."""

    name = "hqq"
    summary = "half-quadratic zero points: the least sum of |error|^0.7, without calibration (HQQ)"

    @classmethod
    def fit(cls, weights: npt.NDArray[np.float32], kind: Scaled, known: Known) -> Quantized:
        return hqq(weights, kind)
