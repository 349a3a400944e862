"""Every tensor decoded, slab by slab, and compared with a reference where there is one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
import numpy.typing as npt

from fewbits import arch
from fewbits.checkpoint import GGUFCheckpoint, Model, SafetensorsCheckpoint
from fewbits.checkpoint.moved_scales import MovedScales
from fewbits.codecs import CODECS
from fewbits.errors import FewbitsError
from fewbits.verify.report import Fault, TensorError

Checkpoint = SafetensorsCheckpoint | GGUFCheckpoint
Floats = npt.NDArray[np.float32]
ReadLines = Callable[[int, int], Floats]
Progress = Callable[[int, int, str], None]
SLAB = 1 << 19
"""Weights decoded at once by one thread: 2 MB, which stay in its cache, and as much again of the reference. Quantized
matrices of directories, whose layouts decode them whole, are as large as they are."""
INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
LIMITS = ((12.0, 0.02), (7.5, 0.1), (5.4, 0.2), (3.8, 0.6), (2.8, 0.9), (0.0, 1.6))
"""From so many bits a code on: well above the largest relative error that any method made. docs/verify.md has what was
measured; a tensor that is permuted, transposed or another's has 1.4, one that is zero or of twice the size 1."""
REFITTED = 3.0
"""How much larger errors may be where moved scales had to be fitted, which is not exact."""
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Lines:
    """A tensor seen as [prod(shape[:-1]), columns].

    Attributes:
        step: how many lines are read at once.
        type: storage type of what it is made of.
        bits: stored bits of a weight.
        code_bits: those of its codes alone.
    """

    name: str
    shape: tuple[int, ...]
    read: ReadLines
    step: int
    type: str
    bits: float
    code_bits: float

    @property
    def count(self) -> int:
        return prod(self.shape[:-1])

    @property
    def limit(self) -> float:
        return next(limit for bits, limit in LIMITS if self.code_bits >= bits)


@dataclass
class Sums:
    """What is added up over the slabs of one tensor; float64."""

    wrong: int = 0
    first_wrong: int = -1
    squared_error: float = 0.0
    squares: float = 0.0
    own_squares: float = 0.0
    nonzero: bool = False

    def add(self, other: Sums) -> None:
        if self.first_wrong < 0:
            self.first_wrong = other.first_wrong
        self.wrong += other.wrong
        self.squared_error += other.squared_error
        self.squares += other.squares
        self.own_squares += other.own_squares
        self.nonzero |= other.nonzero


def as_stored(checkpoint: Checkpoint) -> dict[str, Lines]:
    """Every tensor of weights under the name that it has in the files."""
    return {
        name: _lines(checkpoint, name, name, info.shape, partial(checkpoint.lines, name))
        for name, info in checkpoint.tensors.items()
        if info.dtype not in INTEGERS and prod(info.shape) > 0
    }


def as_gguf(checkpoint: Checkpoint) -> dict[str, Lines]:
    """Every tensor as a GGUF file has it.

    Raises:
        FewbitsError: an architecture that is not known, or tensors that it does not have.
    """
    if isinstance(checkpoint, GGUFCheckpoint):
        return as_stored(checkpoint)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return {
        view.name: _lines(checkpoint, view.name, view.sources[0], view.shape, partial(view.read, checkpoint.read))
        for view in arch.gguf_tensors(checkpoint.config, shapes)
        if view.sources
    }


def _lines(checkpoint: Checkpoint, name: str, stored: str, shape: tuple[int, ...], read: ReadLines) -> Lines:
    info = checkpoint.tensors[stored]
    step = max(1, SLAB // (shape[-1] if shape else 1))
    if info.dtype not in CODECS and info.dtype not in FLOATS:
        step = shape[-2] if len(shape) > 1 else 1  # the whole matrix is decoded anyway: once is enough
    bits = 8 * info.nbytes / prod(info.shape)
    codes = None if isinstance(checkpoint, GGUFCheckpoint) else checkpoint.code_bits(stored)
    return Lines(name, shape, read, step, info.dtype, bits, codes or bits)


def check_tensors(
    tensors: Iterable[Lines],
    reference: Mapping[str, Lines],
    pool: ThreadPoolExecutor,
    done: Callable[[int, str], None],
) -> tuple[list[TensorError], list[Fault], list[str]]:
    """Decode every tensor; nothing depends on the number of threads.

    Args:
        reference: tensors by name; those without a counterpart are decoded alone.
        done: called with the number of weights decoded and the tensor's name.

    Returns:
        Errors against the reference, faults, and names of matrices that hold nothing but zeros.
    """
    errors, faults, empty = [], [], []
    for lines, other, parts in _ahead(tensors, reference, pool):
        sums, problem = Sums(), ""
        for part in parts:
            try:
                sums.add(part.result())
            except FewbitsError as error:
                problem = problem or error.message
        if problem:
            faults.append(Fault(where=lines.name, problem=problem))
        elif sums.wrong:
            problem = f"{sums.wrong} of {prod(lines.shape)} values are not finite, the first in row {sums.first_wrong}"
            faults.append(Fault(where=lines.name, problem=problem))
        elif other is not None:
            errors.append(error_of(lines, sums))
        if not problem and not sums.nonzero and len(lines.shape) > 1:
            empty.append(lines.name)
        done(prod(lines.shape), lines.name)
    return errors, faults, empty


def _ahead(
    tensors: Iterable[Lines], reference: Mapping[str, Lines], pool: ThreadPoolExecutor
) -> Iterator[tuple[Lines, Lines | None, Iterable[Future[Sums]]]]:
    """Each tensor with its slabs' sums; a few slabs are ahead of who asks, across tensor borders, never more."""
    counted = list(tensors)
    jobs = (
        (lines, partial(_slab, lines, reference.get(lines.name), start))
        for lines in counted
        for start in range(0, lines.count, lines.step)
    )
    ahead: deque[tuple[Lines, Future[Sums]]] = deque()

    def refill() -> None:
        while len(ahead) <= pool._max_workers and (job := next(jobs, None)):
            ahead.append((job[0], pool.submit(job[1])))

    def of(lines: Lines) -> Iterator[Future[Sums]]:
        refill()
        while ahead and ahead[0][0] is lines:
            part = ahead.popleft()[1]
            yield part
            refill()

    for lines in counted:
        yield lines, reference.get(lines.name), of(lines)


def _slab(lines: Lines, other: Lines | None, start: int) -> Sums:
    stop = min(start + lines.step, lines.count)
    values = lines.read(start, stop).reshape(stop - start, -1)
    sums = _looked_at(values, start)
    if other is not None and not sums.wrong:
        sums.add(squared(values, other.read(start, stop).reshape(values.shape)))
    return sums


def _looked_at(values: Floats, start: int) -> Sums:
    # min and max carry any NaN along and allocate nothing
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if np.isfinite(low) and np.isfinite(high):
        return Sums(nonzero=low != high)
    finite = np.isfinite(values)
    return Sums(int(finite.size - finite.sum()), start + int(np.argmin(finite.all(axis=1))), nonzero=True)


def squared(values: Floats, reference: Floats) -> Sums:
    """Squares of the difference, of the reference and of the values, added up in float64 row by row."""
    parts = (values - reference, reference, values)
    off, there, here = (float(np.einsum("ij,ij->i", p, p).sum(dtype=np.float64)) for p in parts)
    return Sums(squared_error=off, squares=there, own_squares=here)


def error_of(lines: Lines, sums: Sums) -> TensorError:
    error = min(1e6, (sums.squared_error / sums.squares) ** 0.5) if sums.squares else float(sums.squared_error > 0)
    size = (sums.squares * sums.own_squares) ** 0.5
    cosine = (sums.squares + sums.own_squares - sums.squared_error) / (2 * size) if size else float(error == 0)
    return TensorError(name=lines.name, type=lines.type, bits=lines.bits, error=error, limit=lines.limit, cosine=cosine)


def pairs(candidate: Checkpoint, reference: Checkpoint) -> tuple[dict[str, Lines], dict[str, Lines], list[str]]:
    """Both models' tensors under common names, and notes on what has no counterpart.

    Raises:
        FewbitsError: nothing in common, or an architecture that is not known where names must be translated.
    """
    ours, theirs = as_stored(candidate), as_stored(reference)
    if type(candidate) is not type(reference) or len(ours.keys() & theirs.keys()) < len(ours) // 2:
        ours, theirs = as_gguf(candidate), as_gguf(reference)
    common = ours.keys() & theirs.keys()
    if not common:
        raise FewbitsError(f"{reference.path}: has no tensor of {candidate.path}.", "Name the model it was made from.")
    differ = [name for name in ours if name in common and ours[name].shape != theirs[name].shape]
    if differ:
        raise FewbitsError(
            f"{reference.path}: {differ[0]} is {list(theirs[differ[0]].shape)}, in {candidate.path} "
            f"{list(ours[differ[0]].shape)}.",
            "Name the model that it was made from.",
        )
    lone = [name for name in (*ours, *theirs) if name not in common]
    notes = [f"{len(lone)} tensors have no counterpart, {lone[0]} the first: not compared"] if lone else []
    return ours, theirs, notes


def check_moved(
    candidate: Model, reference: Model, moved: MovedScales, done: Callable[[int, str], None]
) -> tuple[list[TensorError], list[Fault]]:
    """Compare matrices of a model in which scales of channels were moved from layer to layer: these are fitted first,
    for which each matrix is read whole, as the plain model has it."""
    errors, faults = [], []
    for name in candidate.names:
        shape = candidate.shape(name)
        if len(shape) == 2 and name in reference.names and reference.shape(name) == shape:
            lines = _named(candidate, name)
            try:
                values, original = candidate.read(name), reference.read(name)
            except FewbitsError as error:
                faults.append(Fault(where=name, problem=error.message))
                continue
            found = error_of(lines, squared(moved.undone(name, original, values), original))
            errors.append(found.model_copy(update={"limit": REFITTED * found.limit}))
        done(prod(shape), name)
    return errors, faults


def _named(model: Model, name: str) -> Lines:
    """A tensor by its Hugging Face name, for its type and bits."""
    stored = model.stored(name)
    return _lines(model.checkpoint, name, stored, model.shape(name), lambda start, stop: model.read(name)[start:stop])
