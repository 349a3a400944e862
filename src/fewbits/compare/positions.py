"""What single positions tell: buckets by confidence and text, the histogram, the worst tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fewbits.measure.metrics import Positions
from fewbits.measure.yardstick import Yardstick
from fewbits.report.schema import Bucket, WorstToken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONFIDENCE = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)
"""Bounds of the reference's highest probability."""
EDGES = [float(f"{10 ** (exponent / 5):.4g}") for exponent in range(-30, 8)]
"""Of the histogram: five a decade from 1e-6 to 25 nats."""
WORST = 10
APART = 8
"""Of the worst tokens, none is nearer than this to a worse one in the same window: they share a cause."""
CONTEXT_TOKENS, CONTEXT_CHARACTERS = 48, 160


def by_confidence(positions: Positions) -> list[Bucket]:
    """KL divergence and agreement where the reference is unsure, and where it is sure."""
    assert positions.confidence is not None
    found = []
    for low, high in pairwise(CONFIDENCE):
        last = high == CONFIDENCE[-1]
        inside = (positions.confidence >= low) & (
            (positions.confidence <= 1.01) if last else positions.confidence < high
        )
        found.append(_bucket(f"{100 * low:g} to {100 * high:g} %", positions, inside))
    return found


def by_text(positions: Positions, names: Sequence[str], parts: Sequence[slice]) -> list[Bucket]:
    """The same for each text."""
    found = []
    for name, part in zip(names, parts, strict=True):
        inside = np.zeros(positions.nll.shape, bool)
        inside[part] = True
        found.append(_bucket(name, positions, inside))
    return found


def _bucket(label: str, positions: Positions, inside: npt.NDArray[np.bool_]) -> Bucket:
    assert positions.kl is not None and positions.same_top is not None
    count = int(inside.sum())
    if not count:
        return Bucket(label=label, n_scored=0, kl=None, same_top=None)
    kl, same = float(positions.kl[inside].mean()), float(positions.same_top[inside].mean())
    return Bucket(label=label, n_scored=count, kl=kl, same_top=same)


def histogram(positions: Positions) -> list[int]:
    """Positions below the first of `EDGES`, between each two, and above the last."""
    assert positions.kl is not None
    at = np.searchsorted(EDGES, positions.kl.ravel(), side="right")
    return [int(n) for n in np.bincount(at, minlength=len(EDGES) + 1)]


def worst_tokens(positions: Positions, yardstick: Yardstick, names: Sequence[str]) -> list[WorstToken]:
    """The positions with the highest divergence, with what led to them."""
    assert positions.kl is not None
    tokenizer, first = yardstick.tokenizer, yardstick.ruler.first_scored
    inputs, targets = yardstick.windows.inputs, yardstick.windows.targets
    found: list[WorstToken] = []
    taken: list[tuple[int, int]] = []
    scored = positions.kl.shape[1]
    for flat in np.argsort(positions.kl, axis=None)[::-1]:
        window, at = divmod(int(flat), scored)
        if any(window == other and abs(at - near) < APART for other, near in taken):
            continue
        taken.append((window, at))
        ids = inputs[window, max(0, first + at + 1 - CONTEXT_TOKENS) : first + at + 1]
        part = next(i for i, part in enumerate(yardstick.parts) if part.start <= window < part.stop)
        found.append(_worst(positions, tokenizer, window, at, ids.tolist(), int(targets[window, at]), names[part]))
        if len(found) == WORST:
            break
    return found


def _worst(
    positions: Positions,
    tokenizer: PreTrainedTokenizerFast,
    window: int,
    at: int,
    ids: list[int],
    actual: int,
    text: str,
) -> WorstToken:
    def value(name: str) -> float:
        return float(getattr(positions, name)[window, at])

    def token(number: int) -> str:
        return str(tokenizer.decode([number]))

    return WorstToken(
        kl=value("kl"),
        before=str(tokenizer.decode(ids))[-CONTEXT_CHARACTERS:],
        actual=token(actual),
        p_actual=float(np.exp(-value("reference_nll"))),
        q_actual=float(np.exp(-value("nll"))),
        expected=token(int(value("reference_top"))),
        p_expected=value("confidence"),
        given=token(int(value("top"))),
        q_given=value("top_p"),
        text=text,
    )
