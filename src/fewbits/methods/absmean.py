"""The rounding that BitNet b1.58 was trained with (Ma et al., arXiv 2402.17764, equations 1 to 3)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fewbits.codecs.scaled import Quantized, Scaled
from fewbits.methods.base import Known, Method

LEAST = np.float32(1e-5)
"""Smallest scale that is found by the mean, as in transformers 5.23 (integrations/bitnet.py)."""
NORMAL = np.finfo(np.float32).tiny


class AbsMean(Method):
    """One scale for a matrix: the mean of its absolute values, and weights rounded to -1, 0 or 1 times that.

    A matrix of -g, 0 and g alone, what a model trained so holds once it is rounded, keeps its g: its mean, taken again,
    would be too small by the share of its zeros.
    """

    name = "absmean"
    summary = "rounds to three levels by the mean magnitude of the matrix, as BitNet is trained; three levels stay"

    @classmethod
    def fit(cls, weights: npt.NDArray[np.float32], kind: Scaled, known: Known) -> Quantized:
        if kind.block != (0, 0) or kind.levels != "INT" or not kind.narrow:
            return super().fit(weights, kind, known)
        largest = three_levels(weights)
        mean = np.float32(np.abs(weights).mean(dtype=np.float64))
        scale = max(mean, LEAST) if largest is None else np.float32(largest)
        scales = np.full((1, 1), scale, np.float32)
        return Quantized(kind, kind.round(weights, scales, None), scales)


def three_levels(weights: npt.NDArray[np.float32]) -> float | None:
    """g of a matrix of -g, 0 and g alone; None for any other, and for one of zeros.

    Args:
        weights: float32 [rows, columns], finite.
    """
    magnitudes = np.abs(weights)
    largest = magnitudes.max(initial=0)
    if largest < NORMAL or not ((magnitudes == 0) | (magnitudes == largest)).all():
        return None
    return float(largest)


def relative_error(weights: npt.NDArray[np.float32]) -> float:
    """Squared error of rounding to three levels over the squared weights; 0 for a matrix that has just these.

    Args:
        weights: float32 [rows, columns], finite.
    """
    if three_levels(weights) is not None or not weights.any():
        return 0.0
    scale = max(np.abs(weights).mean(dtype=np.float64), float(LEAST))
    rounded = np.clip(np.rint(weights / scale), -1, 1) * scale
    return float(np.square(weights - rounded).sum(dtype=np.float64) / np.square(weights).sum(dtype=np.float64))
