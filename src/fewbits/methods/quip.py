"""QuIP# (Tseng et al., arXiv 2402.04396): LDLQ with points of the E8 lattice.

Weights are rotated until they look like Gaussian noise; then 8 inputs at a time become a point of the codebook, from
the last to the first, and what was lost on those already coded is made up for by the next ones (`methods.ldlq`).
Further sweeps code each block again, knowing the errors of all the others. When all codes are known, the scales of
inputs and outputs are fitted to them by least squares, in the place of the paper's fine-tuning of its vectors of signs.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fewbits.codecs.hadamard import rotate_columns, rotate_rows
from fewbits.codecs.lattice import INPUTS_TOGETHER, Codes, LatticeCoded, LatticeE8
from fewbits.codecs.storage import StorageType
from fewbits.errors import FewbitsError
from fewbits.kernels.lattice import DIMENSIONS
from fewbits.methods.base import Effort, Known, Method
from fewbits.methods.ldlq import (
    DAMPING,
    OUTPUTS,
    Decomposed,
    Regular,
    Rotation,
    decompose,
    feed_back,
    half,
    refit,
    regularize,
    rotate_hessian,
)

WHOLE = Rotation(rotate_rows, rotate_columns)
"""Hadamard transforms of all inputs and all outputs."""
GAIN = {2: 1.035, 3: 0.98, 4: 0.93}
"""Standard deviation of what is coded that loses least on Gaussian noise, by bits ..."""
DISTORTION = {2: 0.0915, 3: 0.0296, 4: 0.0087}
"""... and the mean square of what is lost, in that of what is coded (tests/test_quip.py)."""
OUTPUTS_POWER = 0.5
"""An output's scale is its weights' root mean square to this power: best on four matrices of smollm2-768 at 2 bits; 0
loses 5 % more, 1 7 %."""
SWEEPS: dict[Effort, int] = {"fast": 0, "default": 4, "thorough": 10}
"""Further sweeps: 4 lose 0 to 9 % less on unseen text (12 matrices of smollm2-768 at 2 bits), 10 hardly less than 4."""
Floats = npt.NDArray[np.float32]


class QuIP(Method):
    """Regularized weights, 8 inputs at a time from the last to the first, each block's loss passed on; then again."""

    name = "quip"
    hessian = "whole"
    summary = "rotates weights into noise and codes it by points of the E8 lattice, passing errors on (QuIP#)"

    @classmethod
    def make(cls, weights: Floats, kind: StorageType, known: Known, pool: Executor | None = None) -> LatticeCoded:
        if not isinstance(kind, LatticeE8):
            raise FewbitsError(f"The method 'quip' does not make {kind.name}.", "Leave the choice to the target.")
        hessian = known.hessian
        regular = regularize(weights, hessian, GAIN[kind.bits], WHOLE, weights.shape[1], OUTPUTS_POWER)
        feedback = None
        if hessian is not None:
            found = decompose(hessian, regular.inputs.astype(np.float32), DAMPING, WHOLE, DIMENSIONS, known.device)
            regular = _leave_room(regular, found, kind)
            scales = regular.inputs.astype(np.float32)
            sweeps = SWEEPS[known.effort]
            again = rotate_hessian(hessian, scales, found.damping, WHOLE).astype(np.float32) if sweeps else None
            feedback = Feedback(found.lower, again, sweeps)
        codes, values = _coded(regular.noise, kind, feedback, known, pool)
        decoded = regular.decode(values)
        regular = refit(weights, regular, lambda rows: decoded[rows], hessian)
        return LatticeCoded(kind, codes, half(regular.inputs), half(regular.outputs))


def _leave_room(regular: Regular, found: Decomposed, kind: LatticeE8) -> Regular:
    """Less of noise to which errors are going to be added, so that the sum is of the size that loses least.

    A block's share in the loss is that of its part of D.
    """
    passed = np.square(found.lower).sum(axis=0, dtype=np.float64).reshape(-1, DIMENSIONS).mean(axis=1) - 1
    added = DISTORTION[kind.bits] * float(np.average(passed, weights=found.spread))
    less = 1 / np.sqrt(1 + added)
    return replace(regular, noise=regular.noise * np.float32(less), inputs=regular.inputs / less)


class Feedback:
    """What becomes of errors.

    Attributes:
        first: float32 [in, in], how much of each input's error goes to those before it.
        others: how much of it goes to all others, in further sweeps; zero within blocks of 8.
        own: float32 [in / 8, 8, 8], the blocks on the Hessian's diagonal.
        sweeps: how many further ones.
    """

    def __init__(self, lower: Floats, hessian: Floats | None, sweeps: int) -> None:
        self.first, self.sweeps = lower, sweeps
        if hessian is None:
            return
        blocks = len(hessian) // DIMENSIONS
        at = np.arange(blocks)
        split = hessian.reshape(blocks, DIMENSIONS, blocks, DIMENSIONS)
        self.own = split[at, :, at]
        gains = np.linalg.solve(self.own, hessian.reshape(blocks, DIMENSIONS, -1))
        gains.reshape(blocks, DIMENSIONS, blocks, DIMENSIONS)[at, :, at] = 0
        self.others = np.ascontiguousarray(gains.reshape(hessian.shape).T)


def _coded(
    noise: Floats, kind: LatticeE8, feedback: Feedback | None, known: Known, pool: Executor | None
) -> tuple[Codes, Floats]:
    """Codes [stages, out, in / 8] and what they stand for, [out, in]."""
    if known.device != "cpu":
        from fewbits.methods import quip_torch  # imports torch

        return quip_torch.coded(noise, kind, feedback, known.device)
    parts = [noise[first : first + OUTPUTS] for first in range(0, len(noise), OUTPUTS)]
    made = list((pool.map if pool else map)(lambda part: _code(part, kind, feedback), parts))
    return np.concatenate([codes for codes, _ in made], axis=1), np.concatenate([values for _, values in made])


def _code(noise: Floats, kind: LatticeE8, feedback: Feedback | None) -> tuple[Codes, Floats]:
    """Codes [stages, out, in / 8] of some outputs [out, in], and what they stand for, [out, in]."""
    rows, columns = noise.shape
    codes = np.empty((kind.stages, rows, columns // DIMENSIONS), np.uint16)

    def code(first: int, wanted: Floats) -> Floats:
        block = first // DIMENSIONS
        codes[:, :, block] = kind.search(wanted)
        return kind.values(codes[:, :, block])

    def improve(first: int, wanted: Floats) -> Floats:
        assert feedback is not None
        block = first // DIMENSIONS
        old, new = codes[:, :, block], kind.search(wanted)
        values = np.stack([kind.values(old), kind.values(new)])
        wrong = values - wanted
        cost = np.einsum("kri,kri->kr", wrong @ feedback.own[block], wrong)
        better = cost[1] < cost[0]
        codes[:, better, block] = new[:, better]
        return np.where(better[:, None], values[1], values[0])

    if feedback is None:
        return codes, feed_back(noise, None, code, DIMENSIONS, INPUTS_TOGETHER)
    values = feed_back(noise, feedback.first, code, DIMENSIONS, INPUTS_TOGETHER)
    for _ in range(feedback.sweeps):
        values = feed_back(noise, feedback.others, improve, DIMENSIONS, INPUTS_TOGETHER, values)
    return codes, values
