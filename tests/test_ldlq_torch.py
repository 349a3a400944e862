"""LDLQ on a GPU, by torch's processor: what is decomposed and fed back there is what is here, but for rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbits.codecs.trellis import Trellis, walker
from fewbits.methods.base import Known
from fewbits.methods.ldlq import LDLQ, decompose, random_signs

pytest.importorskip("triton", reason="Triton is for Linux only")
ELSEWHERE = "cpu:0"


def layer() -> tuple[np.ndarray, np.ndarray]:
    """Weights [128, 256] and the Hessian of correlated inputs."""
    random = np.random.default_rng(3)
    basis = random.normal(size=(256, 256)) * np.geomspace(3, 0.2, 256)[:, None]
    inputs = (random.normal(size=(1000, 256)) @ basis).astype(np.float32)
    return random.normal(size=(128, 256)).astype(np.float32), inputs.T @ inputs / 1000


def test_the_decomposition() -> None:
    _, hessian = layer()
    here, there = (decompose(hessian, random_signs(256), device=device) for device in ("cpu", ELSEWHERE))
    np.testing.assert_allclose(there.lower, here.lower, atol=1e-5)
    np.testing.assert_allclose(there.spread, here.spread, rtol=1e-9)
    # the least eigenvalue is -0.016
    negative = (1.008 * np.eye(128) - 0.008).astype(np.float32)
    for device in ("cpu", ELSEWHERE):
        assert decompose(negative, random_signs(128), 0.01, device=device).damping == pytest.approx(0.1)


def test_the_feedback(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.kernels import viterbi_triton

    # the search itself is looked at by tests/test_viterbi_triton.py
    def walk(tiles: torch.Tensor, values: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.from_numpy(walker(bits, "mul1").walk(tiles.numpy(), None).astype(np.uint8))

    monkeypatch.setattr(viterbi_triton, "walk", walk)
    weights, hessian = layer()
    for known in (Known(hessian=hessian), Known()):
        here = LDLQ.make(weights, Trellis(2), known)
        there = LDLQ.make(weights, Trellis(2), Known(hessian=known.hessian, device=ELSEWHERE))
        assert there.trellis.shape == here.trellis.shape and there.trellis.dtype == here.trellis.dtype
        wrong = [found.decode() - weights for found in (here, there)]
        losses = [np.einsum("oi,ij,oj", each, hessian, each, optimize=True) for each in wrong]
        # a walk that is as good but for rounding may be another one
        assert losses[1] == pytest.approx(losses[0], rel=0.02)
