"""LDLQ (QuIP, Chee et al., arXiv 2307.13304; in blocks as QuIP#, Tseng et al., arXiv 2402.04396) for trellises.

Weights are scaled and rotated until they look like Gaussian noise, which is what a trellis is made for; then the inputs
are coded 16 at a time from the last to the first, and what was lost on those already coded is made up for by the next
ones. With the Hessian of the rotated inputs H = L D L^T, L of unit blocks of 16 on its diagonal, the loss is the sum
over blocks of the error after feedback, weighted by D.

exllamav3 1.6.5 (`exl3_lib/quantize.py`) scales each input by the root mean square of its weights but feeds back with
the Hessian of inputs not so scaled. Here L belongs to what is coded, inputs are scaled by their own energy, too, and
the scales are fitted again when all codes are known: docs/exl.md has the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from fewbits.codecs.storage import StorageType
from fewbits.codecs.trellis import HADAMARD, Trellis, TrellisCoded, codebook, rotate_columns, rotate_rows, tile_order
from fewbits.errors import FewbitsError
from fewbits.kernels.trellis import STEPS, TILE
from fewbits.methods.base import Known, Method
from fewbits.methods.block_cholesky import check_hessian, factored

if TYPE_CHECKING:
    import torch

DAMPING = 0.025
"""Added to the Hessian's diagonal, times its mean, as exllamav3 does."""
RETRIES = 5
OUTPUTS = 256
"""Outputs that are coded together: the tiles of one row fill one vector of the search."""
WEIGHTS_POWER, INPUTS_POWER = 0.75, -0.125
"""An input's scale is its weights' root mean square and its mean square, to these powers: best of the powers tried on
six matrices of smollm2-768; (1, 0) loses 1 to 17 % more, (0, 0) 7 to 30 % more."""
REFIT_ROWS = 1024
"""Outputs that are looked at together when scales are fitted."""
SMALLEST = 1e-3
"""Scales are not less than this part of their mean, or zeros would be divided by."""
GAIN = {1: 1.05, 2: 1.0, 3: 0.95, 4: 0.91, 5: 0.87, 6: 0.83, 7: 0.77, 8: 0.72}
"""Standard deviation of what is coded, in that of the codebook, which loses least on Gaussian noise, and by bits ..."""
DISTORTION = {1: 0.277, 2: 0.0685, 3: 0.01742, 4: 0.00444, 5: 0.00116, 6: 0.000308, 7: 0.000083, 8: 0.000022}
"""... the mean square of what is lost, in that of what is coded (tests/test_exl3.py)."""
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Array = TypeVar("Array", Floats, "torch.Tensor")


@dataclass(frozen=True)
class Rotation:
    """An orthogonal transform that is its own inverse.

    Attributes:
        rows: of a matrix [rows, columns], along the rows.
        columns: along the columns.
    """

    rows: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
    columns: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


BLOCKS = Rotation(rotate_rows, rotate_columns)
"""Hadamard transforms of blocks of 128, as EXL3 has them."""


@dataclass(frozen=True)
class Decomposed:
    """H = L D L^T of rotated inputs, in blocks.

    Attributes:
        lower: float32 [columns, columns], L: unit matrices on the diagonal of blocks, nothing above them.
        spread: float64 [columns / block], the trace of each block of D.
        damping: what was added to H's diagonal, times its mean.
    """

    lower: Floats
    spread: Doubles
    damping: float


def decompose(
    hessian: Floats,
    scales: Floats,
    damping: float = DAMPING,
    rotation: Rotation = BLOCKS,
    block: int = TILE,
    device: str = "cpu",
) -> Decomposed:
    """Prepare a Hessian for feedback among inputs that are multiplied by `scales`, then rotated.

    Args:
        hessian: float32 [columns, columns], the mean of x x^T, of a size that the rotation takes.
        scales: float32 [columns], none of them zero.
        damping: added to the diagonal, times its mean; ten times as much where that is too little.
        block: inputs that are coded together.
        device: of torch, where it is decomposed.

    Raises:
        FewbitsError: the Hessian is not finite and positive, however much it is damped.
    """
    check_hessian(hessian)
    for attempt in range(RETRIES):
        added = damping * 10**attempt
        found = factored(rotate_hessian(hessian, scales, added, rotation), block, device)
        if found:
            return Decomposed(found[0], np.square(found[1]).sum(axis=(1, 2)), added)
    raise FewbitsError("the Hessian is not positive.", "Calibrate with more text.")


def rotate_hessian(hessian: Floats, scales: Floats, damping: float, rotation: Rotation) -> Doubles:
    """The damped Hessian of inputs that are multiplied by `scales`, then rotated."""
    rotated, wide = hessian.astype(np.float64), scales.astype(np.float64)
    diagonal = rotated.diagonal().copy()
    np.fill_diagonal(rotated, diagonal + damping * (float(diagonal.mean()) or 1.0))
    rotated *= wide
    rotated *= wide[:, None]
    found: Doubles = rotation.rows(rotation.columns(rotated))
    return found


def random_signs(count: int, side: int = 0) -> Floats:
    """+1 or -1, the same for every matrix of this size."""
    return np.random.default_rng([count, side]).choice(np.array([-1, 1], np.float32), count)


@dataclass(frozen=True)
class Regular:
    """A matrix like Gaussian noise: weights = outputs * H @ noise @ H * inputs.

    Attributes:
        noise: float32 [out, in], all inputs that are rotated together of the same mean square.
        inputs: float64 [in].
        outputs: float64 [out].
        rotation: H.
    """

    noise: Floats
    inputs: Doubles
    outputs: Doubles
    rotation: Rotation = BLOCKS

    def decode(self, noise: Floats, rows: slice = slice(None)) -> Floats:
        """Some rows of the weights, float32 [rows, in], with something else [rows, in] in place of the noise.

        Args:
            rows: such as are rotated among themselves.
        """
        weights = self.rotation.rows(self.rotation.columns(noise))
        weights *= self.inputs.astype(np.float32)
        weights *= self.outputs[rows].astype(np.float32)[:, None]
        return weights


def regularize(
    weights: Floats,
    hessian: Floats | None,
    gain: float,
    rotation: Rotation = BLOCKS,
    together: int = HADAMARD,
    outputs_power: float = 1.0,
) -> Regular:
    """Scale and rotate a matrix until its standard deviation is `gain`.

    Args:
        weights: float32 [out, in], of sizes that the rotation takes.
        together: how many inputs are rotated among themselves.
        outputs_power: of an output's weights' root mean square, which makes its scale.
    """
    rows, columns = weights.shape
    outputs = _no_zeros(np.sqrt(np.einsum("oi,oi->o", weights, weights).astype(np.float64) / columns))
    outputs **= outputs_power
    outputs *= random_signs(rows, 1) / outputs.mean()
    turned = rotation.rows(weights / outputs.astype(np.float32)[:, None])
    inputs = _no_zeros(np.sqrt(np.einsum("oi,oi->i", turned, turned).astype(np.float64) / rows))
    if hessian is not None:
        energy = hessian.diagonal().astype(np.float64)
        energy = energy + DAMPING * (energy.mean() or 1.0)
        inputs = inputs**WEIGHTS_POWER * (energy / energy.mean()) ** INPUTS_POWER
    inputs *= random_signs(columns)
    turned /= inputs.astype(np.float32)
    noise: Floats = rotation.columns(turned)
    blocks = noise.reshape(rows, -1, together)
    size = np.sqrt(np.einsum("obi,obi->b", blocks, blocks).astype(np.float64) / (rows * together)) / gain
    size[size == 0] = 1.0
    blocks /= size.astype(np.float32)[:, None]
    return Regular(noise, inputs * np.repeat(size, together), outputs, rotation)


def _no_zeros(values: Doubles) -> Doubles:
    mean = float(values.mean())
    return np.maximum(values, SMALLEST * mean) if mean > 0 else np.ones_like(values)


def expected_errors(weights: Floats, hessian: Floats, bits: Iterable[int]) -> dict[int, Doubles]:
    """What LDLQ is going to lose, without doing it; on real layers within 3 %.

    Args:
        weights: float32 [out, in].
        hessian: float32 [in, in].

    Returns:
        By bits, float64 [out]: the expected e^T H e of each output's errors e, of the damped Hessian.
    """
    regular = regularize(weights, hessian, 1.0)
    decomposed = decompose(hessian, regular.inputs.astype(np.float32))
    # what is passed on comes on top of the weights
    passed = np.square(decomposed.lower).sum(axis=0, dtype=np.float64).reshape(-1, TILE).mean(axis=1) - 1
    power = np.square(regular.outputs)
    return {
        each: power * DISTORTION[each] * float((decomposed.spread * (1 + DISTORTION[each] * passed)).sum())
        for each in bits
    }


class LDLQ(Method):
    """Regularized weights, 16 inputs at a time from the last to the first, each block's loss passed on."""

    name = "ldlq"
    hessian = "whole"
    summary = "rotates weights into noise and codes it by a trellis, passing errors on to the inputs to come (LDLQ)"

    @classmethod
    def make(cls, weights: Floats, kind: StorageType, known: Known, pool: Executor | None = None) -> TrellisCoded:
        if not isinstance(kind, Trellis):
            raise FewbitsError(f"The method 'ldlq' does not make {kind.name}.", "Leave the choice to the target.")
        regular = regularize(weights, known.hessian, GAIN[kind.bits])
        lower = None
        if known.hessian is not None:
            lower = decompose(known.hessian, regular.inputs.astype(np.float32), device=known.device).lower
        if known.device == "cpu":
            states, coded = _code(regular.noise, lower, kind, pool)
        else:
            from fewbits.methods import ldlq_torch  # imports torch

            states, coded = ldlq_torch.coded(regular.noise, lower, kind, known.device)
        regular = refit(weights, regular, lambda rows: regular.decode(coded[rows], rows), known.hessian)
        return TrellisCoded(kind, kind.pack(states), half(regular.inputs), half(regular.outputs))


def half(values: Doubles) -> npt.NDArray[np.float16]:
    return np.clip(values, -65504, 65504).astype(np.float16)


def _code(
    noise: Floats, lower: Floats | None, kind: Trellis, pool: Executor | None
) -> tuple[npt.NDArray[np.uint16], Floats]:
    """States [in / 16, out / 16, 256] and the values they stand for, [out, in]."""

    def part(first: int) -> tuple[npt.NDArray[np.uint16], Floats]:
        return _feed(np.ascontiguousarray(noise[first : first + OUTPUTS]), lower, kind)

    parts = list((pool.map if pool else map)(part, range(0, len(noise), OUTPUTS)))
    return np.concatenate([states for states, _ in parts], axis=1), np.concatenate([coded for _, coded in parts])


def _feed(noise: Floats, lower: Floats | None, kind: Trellis) -> tuple[npt.NDArray[np.uint16], Floats]:
    """Code some outputs [out, in], blocks of 16 inputs from the last to the first."""
    rows, columns = noise.shape
    table, order = codebook(kind.codebook), tile_order()
    work = kind.workspace()
    states = np.empty((columns // TILE, rows // TILE, STEPS), np.uint16)
    tiles, values = np.empty((rows // TILE, STEPS), np.float32), np.empty((rows // TILE, STEPS), np.float32)

    def code(first: int, wanted: Floats) -> Floats:
        tiles[:] = wanted.reshape(-1, TILE, TILE).transpose(0, 2, 1).reshape(-1, STEPS)[:, order]
        states[first // TILE] = kind.search(tiles, work)
        values[:, order] = table[states[first // TILE]]
        return values.reshape(-1, TILE, TILE).transpose(0, 2, 1).reshape(-1, TILE)

    return states, feed_back(noise, lower, code, TILE, HADAMARD)


def feed_back(
    noise: Array,
    gains: Array | None,
    code: Callable[[int, Array], Array],
    block: int,
    together: int,
    before: Array | None = None,
) -> Array:
    """Code blocks of inputs from the last to the first, each with what makes up for the others' errors.

    All arrays are NumPy's, or all are tensors on one device.

    Args:
        noise: float32 [out, in].
        gains: float32 [in, in], how much of the error of each input (rows) goes to each other (columns); None for none.
            In a first pass that is what is below the diagonal; in others, zero for the inputs of a block among
            themselves.
        code: takes a block's first input and what to code instead of it [out, block], and returns what it has become.
        block: inputs that are coded together.
        together: inputs, a multiple of `block`, whose errors reach the others by one product.
        before: what a pass before has made of all inputs.

    Returns:
        float32 [out, in], what all blocks have become.
    """
    columns, again = noise.shape[1], before is not None
    coded = abs(noise) * 0 if before is None else before + 0
    missed = abs(noise) * 0 if before is None else noise - before
    for stop in range(columns, 0, -together):
        start = stop - together
        target = noise[:, start:stop] + 0
        if gains is not None:
            target += missed[:, stop:] @ gains[stop:, start:stop]
            if again:
                target += missed[:, :start] @ gains[:start, start:stop]
        for first in range(stop - block, start - 1, -block):
            here = slice(first, first + block)
            now = target[:, first - start : first - start + block] + 0
            if gains is not None:
                near = slice(start if again else first + block, stop)
                now += missed[:, near] @ gains[near, here]
            coded[:, here] = code(first, now)
            missed[:, here] = noise[:, here] - coded[:, here]
    return coded


def refit(weights: Floats, regular: Regular, decoded: Callable[[slice], Floats], hessian: Floats | None) -> Regular:
    """The scales that lose least with some codes: those of the inputs together, then each output's.

    Args:
        weights: float32 [out, in].
        decoded: rows of what the codes make with the scales so far, float32 [rows, in].
    """
    parts = [slice(start, start + REFIT_ROWS) for start in range(0, len(weights), REFIT_ROWS)]
    damped = None
    change: Doubles = np.ones(weights.shape[1])
    if hessian is not None:
        damped = hessian.copy()
        damped[np.diag_indices_from(damped)] += np.float32(DAMPING * hessian.diagonal().mean())
        moments, wanted = np.zeros(hessian.shape), np.zeros(len(hessian))
        for rows in parts:
            shape = decoded(rows)
            moments += shape.T @ shape
            wanted += np.einsum("oi,oi->i", shape, weights[rows] @ damped)
        # an input without weights or without energy keeps its scale
        ridge = np.maximum(1e-6 * (moments * damped).diagonal(), 1e-30)
        moments *= damped
        moments[np.diag_indices_from(moments)] += ridge
        change = np.asarray(np.linalg.solve(moments, wanted + ridge), np.float64)
    factor = np.ones(len(weights))
    for rows in parts:
        shape = decoded(rows) * change.astype(np.float32)
        weighed = shape if damped is None else shape @ damped
        power = np.einsum("oi,oi->o", shape, weighed)
        at = power > 0
        factor[rows][at] = np.einsum("oi,oi->o", weights[rows], weighed)[at] / power[at]
    return replace(regular, inputs=regular.inputs * change, outputs=regular.outputs * factor)
