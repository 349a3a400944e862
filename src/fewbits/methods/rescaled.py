"""The second halves of AWQ and SmoothQuant, on weights whose channels have been rescaled: choosing codes.

The first halves are `awq.choose_scales` and `smoothquant.smooth`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fewbits.codecs.scaled import Quantized, Scaled
from fewbits.methods.base import Known, Method
from fewbits.methods.direct import Search
from fewbits.methods.gptq import GPTQ
from fewbits.methods.group_search import search_groups, searchable


class AWQ(Method):
    """Each group's range by the error of the layer's output; by importance alone where no Hessian is known or groups
    are long."""

    name = "awq"
    hessian = "diagonal"
    summary = "scales channels by their activations, then searches each group's range by the output's error (AWQ)"

    @classmethod
    def fit(cls, weights: npt.NDArray[np.float32], kind: Scaled, known: Known) -> Quantized:
        if known.hessian is None or not searchable(kind):
            return kind.search(weights, known.importance, known.amax, known.device)
        return search_groups(weights, kind, known.hessian, known.amax, known.device)


class RescaledGPTQ(GPTQ):
    """Error feedback on weights whose channels have been scaled."""

    name = "awq+gptq"
    summary = "scales channels by their activations as AWQ does, then goes on as GPTQ"


class SmoothQuant(Search):
    """Searched scales."""

    name = "smoothquant"
    summary = "moves outliers of activations into the weights, then searches scales (SmoothQuant)"
