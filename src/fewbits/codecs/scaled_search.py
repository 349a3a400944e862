"""What the searches of scales try, and the searches themselves."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from fewbits.codecs.base import Floats
from fewbits.codecs.scaled_levels import ladder
from fewbits.codecs.scaled_scales import ScaleType, store
from fewbits.kernels import asymmetric, groups
from fewbits.kernels.lanes import usable_importance
from fewbits.kernels.levels import Levels as LevelTuple
from fewbits.kernels.levels import with_middles

if TYPE_CHECKING:
    from fewbits.codecs.scaled import Scaled

KINDS: dict[ScaleType, int] = {
    "F32": groups.PLAIN,
    "NESTED": groups.PLAIN,
    "F16": groups.F16,
    "BF16": groups.BF16,
    "E4M3": groups.E4M3,
    "E8M0": groups.E8M0,
}
LARGEST = 1e9
"""Matrices with larger weights are settled: their squares would leave float32."""
# fmt: off
_SIGNED = {
    2: (-3.0, -2.5, -2.3, -2.07, -1.9, -1.6, -1.3, 1.72, 1.95, 2.23, 2.6),
    3: (-7.5, -6.0, -5.33, -4.87, -4.53, -4.27, -4.0, -3.73, -3.33, -3.07, 3.72, 4.0, 4.28, 4.74, 5.2),
    4: (-15.0, -12.0, -10.53, -9.6, -8.93, -8.4, -8.0, -7.73, -7.2, -6.8, 6.15, 8.0, 8.55, 9.29, 10.4),
}
_TABLES = {
    ("NF4", "F32"): (0.58, 0.69, 0.75, 0.81, 0.93, 1.07, 1.14, 1.24, 1.38, 1.6),
    ("FP4", "F32"): (0.4, 0.67, 0.72, 0.79, 0.93, 1.05, 1.11, 1.21, 1.37, 1.6),
    ("E2M1", "E4M3"): (3.74, 3.98, 4.22, 4.53, 4.85, 5.33, 5.65, 6.37, 6.77, 7.33, 7.96, 9.0),
    ("E2M1", "E8M0"): (4.24, 8.49, 16.97),
}
_WIDE = (0.95, 0.965, 0.98, 0.99, 0.995, 1.01)
"""Of codes that are many: in parts of the largest."""
_PAIRS = {
    2: ((2.55, -0.15), (3.6, -0.3), (3.9, -0.15), (4.05, -1.05), (4.35, -1.05), (4.5, -1.05), (4.5, -0.15),
        (4.65, -1.05), (4.8, -1.05), (4.95, -1.05), (5.1, -1.05), (5.25, -1.05), (5.25, -0.6), (5.25, 0.3)),
    3: ((5.6, 0.7), (6.3, 0.0), (7.35, -0.35), (7.7, -0.35), (8.05, 0.0), (8.4, -1.05), (9.1, -1.05), (9.1, 0.0),
        (9.45, -2.45), (10.15, -2.45), (10.15, -1.05), (10.85, -2.45), (11.2, -2.45), (12.25, -2.45), (12.25, -1.05),
        (12.25, 0.0)),
    4: ((12.0, -0.06), (13.5, -0.06), (14.25, 0.46), (15.75, -0.58), (15.75, -0.06), (16.5, -1.1), (16.5, -0.06),
        (17.25, -2.13), (17.25, -1.1), (18.0, -0.58), (18.75, -3.17), (19.5, -0.58), (20.25, -2.65), (21.0, -5.25),
        (23.25, -1.1), (24.0, -4.73)),
}
# fmt: on
_WIDE_PAIRS = ((-14, 0.0), (-11, 0.0), (-9, 0.0), (-7, 0.0), (-5, 0.0), (-4, 3.0), (-2, 1.5), (2, -1.5))
"""As for `_PAIRS`, counted from the largest code.

All of these were chosen greedily, with replacements, for the least error on Gaussian, Student-t(3), Laplace, uniform
and real groups of 32 to 128 (16 and 32 for E2M1), with equal and with lognormal importances: within 0.3 % of what all
80 to 300 that there were to choose from give (8 bits: 3 %).
"""
_OCTAVE = tuple(2.0 ** (k / 32) for k in range(1, 32))
"""By which the settled scale of 8-bit floats is multiplied; a scale twice as large rounds alike.

Of 8, 16 and 32 steps an octave these leave 6.5, 7.5 and 8.7 % less squared error than the settled scale, a scale a row.
"""


def candidates(kind: Scaled) -> Floats:
    """Levels as which the largest magnitude of a group is tried, float32 [n]; negative for scales of the other sign."""
    if kind.levels == "INT":
        return np.array(_SIGNED.get(kind.bits) or [part * kind.reach for part in _WIDE], np.float32)
    scale = "F32" if kind.levels in ("NF4", "FP4") else kind.scale
    return np.array(_TABLES[kind.levels, scale], np.float32)


def pair_candidates(bits: int) -> Floats:
    """Codes that the range of a group spans and the code of its lowest weight, float32 [n, 2]."""
    most = (1 << bits) - 1
    return np.array(_PAIRS.get(bits) or [(most + reach, start) for reach, start in _WIDE_PAIRS], np.float32)


@cache
def level_tuple(kind: Scaled) -> LevelTuple:
    values = (-1.0, 0.0, 1.0) if kind.levels == "INT" else ladder(kind.levels).values.tolist()
    return with_middles(tuple(values))


def search_scales(
    kind: Scaled,
    weights: Floats,
    importance: Floats | None,
    scales: Floats,
    zeros: Floats | None,
    global_scale: float,
    device: str = "cpu",
) -> tuple[Floats, Floats | None]:
    """The best scales, and integer zero points, of groups along rows, [grid]; those given are where to begin.

    Args:
        device: of torch; on a GPU integers are searched by Triton, with sums of another order: where two scales are
            equally good but for rounding, it may take the other one.
    """
    elements = kind.block[1] or weights.shape[1]
    flat, usable = np.ascontiguousarray(weights).reshape(-1), usable_importance(importance, weights.shape[1])
    factor = np.float32(global_scale)
    # what engines multiply by: stored scales over the global one
    found = (scales / factor).reshape(-1)
    how = (KINDS[kind.scale], factor, found)
    if device != "cpu" and kind.levels == "INT" and global_scale == 1:
        from fewbits.codecs import scaled_torch  # imports torch

        if scaled_torch.searches(kind, elements):
            return scaled_torch.search_scales(kind, flat, usable, scales, zeros, device)
    if zeros is not None:
        points, most = zeros.reshape(-1).copy(), np.float32((1 << kind.bits) - 1)
        groups.search_pairs(flat, usable, elements, most, pair_candidates(kind.bits), *how, points)
        return store(kind.scale, found).reshape(scales.shape), points.reshape(scales.shape)
    values, _ = kind.ladder()
    ends = np.zeros(2, np.float32) if kind.levels != "INT" else values[[0, -1]]
    tried = candidates(kind)
    groups.search_scales(flat, usable, elements, level_tuple(kind), *ends, tried, kind.signed, 1, *how)
    stored = np.copysign(store(kind.scale, np.abs(found) * factor), found)
    return stored.reshape(scales.shape), None


def search_floats(kind: Scaled, weights: Floats, importance: Floats | None, scales: Floats) -> Floats:
    """The best scales of 8-bit floats, [grid]."""
    rows, columns = weights.shape
    tried = np.stack([scales, *(store(kind.scale, scales * np.float32(part)) for part in _OCTAVE)])
    error = np.empty_like(tried)
    blocks = (kind.block[0] or rows, kind.block[1] or columns)
    groups.search_floats(weights, usable_importance(importance, columns), *blocks, tried, error)
    return np.take_along_axis(tried, error.argmin(axis=0)[None], axis=0)[0]


def search_free(kind: Scaled, weights: Floats, importance: Floats | None) -> tuple[Floats, Floats]:
    """Scales and zero points that are floats, [grid]; a scale of zero where a group is all one value."""
    shape = kind.grid((weights.shape[0], weights.shape[1]))
    if kind.strided:
        # one importance for all of a group has no say in it
        elements, importance = kind.block[0], None
        weights = weights.reshape(elements, -1).T
        columns = elements
    else:
        columns = weights.shape[1]
        elements = kind.block[1] or columns
    top = (1 << kind.bits) - 1
    near = 15 if top > 3 else 3
    grid = asymmetric.CANDIDATES[near] + np.array([top - near, 0, 0], np.float32) * (asymmetric.CANDIDATES[near] < 1e3)
    scales, lows = np.empty(shape[0] * shape[1], np.float32), np.empty(shape[0] * shape[1], np.float32)
    flat = np.ascontiguousarray(weights).reshape(-1)
    groups.search_free(flat, usable_importance(importance, columns), elements, np.float32(top), grid, scales, lows)
    zeros = np.divide(-lows, scales, out=np.zeros_like(lows), where=scales != 0)
    return scales.reshape(shape), zeros.reshape(shape)
