"""Figures per scored position and their summary with honest uncertainty.

Definitions, as llama-perplexity has them (`log_softmax` with a base and its final print-out): p is the reference's
distribution at a position, q the quantized model's, t the token that follows.
- KL divergence: sum over the vocabulary of p (ln p - ln q), in nats; all terms count (llama.cpp drops p < e^-16).
- same top: both give the highest probability to the same token.
- delta p: q(t) - p(t).
Positions in one window are correlated, so intervals are made from the means of windows (Student's t over windows); the
naive standard error, which llama-perplexity prints, stands beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import exp, sqrt
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict

SLICE_VALUES = 2**22
"""Logits held at once, per model: 16 MB of float32, about what a cache holds; larger is slower."""
Z95 = 1.959964
T95 = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764}
"""Two-sided 95 % quantiles of Student's t for few degrees of freedom; beyond, `t95` errs by less than 0.003."""

Array = npt.NDArray[np.float64]


class LogitSource(Protocol):
    """Where the logits of the scored positions come from: hidden states and a head, or an engine."""

    n_vocab: int

    def logits(self, window: int, start: int, stop: int) -> torch.Tensor:
        """float32 [stop - start, n_vocab] at scored positions start:stop of a window, asked for in ascending order."""


@dataclass
class StateLogits:
    """Logits made from normed hidden states.

    Attributes:
        hidden: float32 [n_windows, scored, hidden].
        head: hidden states [n, hidden] -> logits [n, n_vocab].
    """

    hidden: npt.NDArray[np.float32]
    head: Callable[[torch.Tensor], torch.Tensor]
    n_vocab: int

    def logits(self, window: int, start: int, stop: int) -> torch.Tensor:
        return self.head(torch.from_numpy(np.array(self.hidden[window, start:stop])))


@dataclass(frozen=True)
class Positions:
    """What is known of each scored position, arrays [n_windows, scored]; all but the first only against a reference.

    Attributes:
        nll: -ln q(t).
        reference_nll: -ln p(t).
        kl: KL divergence in nats.
        same_top: 1 where both models favour the same token, else 0.
        delta_p: q(t) - p(t).
        confidence: the highest p, and `reference_top` the token that has it.
        top_p: the highest q, and `top` the token that has it.
    """

    nll: Array
    reference_nll: Array | None = None
    kl: Array | None = None
    same_top: Array | None = None
    delta_p: Array | None = None
    confidence: Array | None = None
    reference_top: Array | None = None
    top_p: Array | None = None
    top: Array | None = None


def score(
    source: LogitSource,
    targets: npt.NDArray[np.int64],
    reference: LogitSource | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Positions:
    """Run over all scored positions in slices.

    Args:
        targets: the token that follows each scored position, [n_windows, scored].
        reference: the unquantized model's logits; where vocabularies differ in padding, the common part counts.
    """
    n_vocab = source.n_vocab if reference is None else min(source.n_vocab, reference.n_vocab)
    step = max(1, SLICE_VALUES // n_vocab)
    names = [field.name for field in fields(Positions)][: 1 if reference is None else None]
    found = {name: np.empty(targets.shape) for name in names}
    n_windows, scored = targets.shape
    for window in range(n_windows):
        for start in range(0, scored, step):
            part = slice(start, min(start + step, scored))
            target = torch.from_numpy(targets[window, part])[:, None]
            log_q = torch.log_softmax(source.logits(window, part.start, part.stop)[:, :n_vocab], -1)
            nll = -log_q.gather(1, target)[:, 0].double()
            found["nll"][window, part] = nll.numpy()
            if reference is None:
                continue
            log_p = torch.log_softmax(reference.logits(window, part.start, part.stop)[:, :n_vocab], -1)
            reference_nll = -log_p.gather(1, target)[:, 0].double()
            found["reference_nll"][window, part] = reference_nll.numpy()
            for log, probability, token in ((log_p, "confidence", "reference_top"), (log_q, "top_p", "top")):
                highest, at = log.max(-1)
                found[probability][window, part] = highest.double().exp().numpy()
                found[token][window, part] = at.numpy()
            found["delta_p"][window, part] = ((-nll).exp() - (-reference_nll).exp()).numpy()
            difference = log_p - log_q
            # terms of exactly equal logits vanish, so a model against itself gives 0, not rounding noise
            found["kl"][window, part] = log_p.exp_().mul_(difference).sum(-1).double().numpy()
        if progress:
            progress(window + 1, n_windows, "windows scored")
    if reference is not None:
        found["same_top"] = (found["top"] == found["reference_top"]).astype(np.float64)
    return Positions(**found)


class Estimate(BaseModel):
    """A mean with its uncertainty.

    Attributes:
        low, high: 95 % confidence interval from window means (clustered); from single positions if there is one window.
        stderr: standard error from window means; None with one window.
        stderr_naive: standard error as if positions were independent, llama.cpp's "+-".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    value: float
    low: float
    high: float
    stderr: float | None
    stderr_naive: float


class KLSummary(BaseModel):
    """The distribution of the KL divergence over positions, in nats."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    mean: Estimate
    median: float
    p90: float
    p99: float
    p999: float
    max: float


class Comparison(BaseModel):
    """A model against its reference.

    Attributes:
        perplexity_ratio: perplexity divided by the reference's; the interval is paired.
        same_top: share of positions with the same most probable token.
        rms_delta_p: root mean square of q(t) - p(t).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kl: KLSummary
    reference_perplexity: Estimate
    perplexity_ratio: Estimate
    same_top: Estimate
    rms_delta_p: Estimate


def t95(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t (Abramowitz and Stegun 26.7.5)."""
    if freedom in T95:
        return T95[freedom]
    z = Z95
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def estimate(values: Array) -> Estimate:
    """Mean of values [n_windows, scored]."""
    mean, count = float(values.mean()), values.size
    naive = float(values.std(ddof=1)) / sqrt(count) if count > 1 else 0.0
    windows = values.mean(axis=1)
    stderr = float(windows.std(ddof=1)) / sqrt(len(windows)) if len(windows) > 1 else None
    half = Z95 * naive if stderr is None else t95(len(windows) - 1) * stderr
    return Estimate(value=mean, low=mean - half, high=mean + half, stderr=stderr, stderr_naive=naive)


def exp_estimate(values: Array) -> Estimate:
    """exp of the mean (a perplexity, or a ratio of two); standard errors by the delta method."""
    log = estimate(values)
    value = exp(log.value)
    return Estimate(
        value=value,
        low=exp(log.low),
        high=exp(log.high),
        stderr=None if log.stderr is None else value * log.stderr,
        stderr_naive=value * log.stderr_naive,
    )


def share_estimate(hits: Array) -> Estimate:
    """A share with a Wilson interval, the number of positions divided by the design effect of the windows.

    Wilson, because near 1 (or with no miss at all) a symmetric interval would claim too much.
    """
    plain = estimate(hits)
    share, count, z = plain.value, float(hits.size), Z95
    variance = share * (1 - share) / count
    if plain.stderr is not None and variance > 0:
        count /= max(1.0, plain.stderr**2 / variance)
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return plain.model_copy(update={"low": max(0.0, centre - half), "high": min(1.0, centre + half)})


def rms_estimate(values: Array) -> Estimate:
    """Root mean square; the interval is that of the mean square."""
    square = estimate(values**2)
    root = sqrt(square.value)
    scale = 1 / (2 * root) if root else 0.0
    return Estimate(
        value=root,
        low=sqrt(max(0.0, square.low)),
        high=sqrt(square.high),
        stderr=None if square.stderr is None else square.stderr * scale,
        stderr_naive=square.stderr_naive * scale,
    )


def perplexity(nll: Array) -> Estimate:
    """exp of the mean negative log-likelihood [n_windows, scored]."""
    return exp_estimate(nll)


def compare(positions: Positions) -> Comparison:
    """Summarize positions that were scored against a reference."""
    nll, reference_nll, kl = positions.nll, positions.reference_nll, positions.kl
    assert reference_nll is not None and kl is not None
    assert positions.same_top is not None and positions.delta_p is not None
    median, p90, p99, p999 = (float(q) for q in np.quantile(kl, [0.5, 0.9, 0.99, 0.999]))
    return Comparison(
        kl=KLSummary(mean=estimate(kl), median=median, p90=p90, p99=p99, p999=p999, max=float(kl.max())),
        reference_perplexity=perplexity(reference_nll),
        perplexity_ratio=exp_estimate(nll - reference_nll),
        same_top=share_estimate(positions.same_top),
        rms_delta_p=rms_estimate(positions.delta_p),
    )
