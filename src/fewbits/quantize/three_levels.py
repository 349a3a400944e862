"""What a target of three levels would do to a model that was not trained with them."""

from __future__ import annotations

import numpy as np

from fewbits.checkpoint import Model
from fewbits.methods.absmean import AbsMean, relative_error
from fewbits.plan import Plan


def three_levels_notes(model: Model, plan: Plan) -> list[str]:
    """A warning with the expected loss, judged by the smallest of the matrices; empty where nothing is lost there."""
    chosen = [tensor for tensor in plan.tensors if tensor.method == AbsMean.name]
    if not chosen:
        return []
    sample = min(chosen, key=lambda tensor: tensor.n_weights)
    error = relative_error(np.ascontiguousarray(model.read(sample.name), np.float32))
    if error == 0:
        return []
    return [
        f"{sample.name} does not hold three levels: rounded to -1, 0 and 1 times their mean magnitude its weights lose "
        f"{error:.0%} of their energy. A model trained with this rounding expects that; any other is destroyed by it "
        "(SmolLM2-135M: KL divergence 11.4, perplexity 26 becomes 3 million)"
    ]
