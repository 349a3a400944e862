"""Methods that look at one block of weights at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fewbits.codecs import Codec
from fewbits.codecs.scaled import Quantized, Scaled
from fewbits.methods.base import Factor, Known, Method


class Convert(Method):
    """Rounding to another floating-point type; importances have no say."""

    name = "convert"
    summary = "rounds to the nearest value of a floating-point type"

    @classmethod
    def quantize(
        cls,
        weights: npt.NDArray[np.float32],
        codec: type[Codec],
        importance: npt.NDArray[np.float32] | None = None,
        factor: Factor | None = None,
    ) -> npt.NDArray[np.uint8]:
        return codec.encode(weights)


class Search(Method):
    """The scales of each block with the least weighted squared error, by the codec's own search.

    Importances of ones beat llama.cpp's path without imatrix for every type (specs, gguf.md section 2), so searching
    is the default with or without calibration.
    """

    name = "search"
    summary = "searches each block's scales for the least (importance-weighted) squared error"

    @classmethod
    def quantize(
        cls,
        weights: npt.NDArray[np.float32],
        codec: type[Codec],
        importance: npt.NDArray[np.float32] | None = None,
        factor: Factor | None = None,
    ) -> npt.NDArray[np.uint8]:
        return codec.encode(weights, importance)

    @classmethod
    def fit(cls, weights: npt.NDArray[np.float32], kind: Scaled, known: Known) -> Quantized:
        return kind.search(weights, known.importance, known.amax, known.device)


class RoundToNearest(Method):
    """What each ecosystem does where nothing is chosen: scales from the largest value or the range."""

    name = "rtn"
    summary = "takes scales from the largest weight or the range of each block and rounds to nearest"

    @classmethod
    def fit(cls, weights: npt.NDArray[np.float32], kind: Scaled, known: Known) -> Quantized:
        return kind.settle(weights, known.amax)
