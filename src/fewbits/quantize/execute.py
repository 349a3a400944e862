"""Executing a plan: read a slab, choose its codes, write it, with all three overlapping and memory bounded."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from fewbits.codecs import codec
from fewbits.errors import FewbitsError
from fewbits.formats.atomic import check_output, check_room
from fewbits.formats.gguf.source import GGUFSource, ReadRows
from fewbits.formats.gguf.writer import Shard, spans_of
from fewbits.formats.journal import work_folder
from fewbits.formats.tensor_files import RESULT, File, TensorFiles
from fewbits.formats.work import WorkFolder
from fewbits.methods import method
from fewbits.plan import Plan, PlannedFile, PlannedTensor
from fewbits.quantize.gguf_blockwise import GGUFBlockwise
from fewbits.quantize.hessians import experts_of
from fewbits.quantize.importances import Progress
from fewbits.quantize.learned import Learned
from fewbits.quantize.planning import shards_of
from fewbits.workers import Job, Pending, Threads, Workers

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SLAB_WEIGHTS = 1 << 21
"""Weights in a slab: 8 MB as float32, small enough for a bound on memory and large enough to drown the overheads."""
Slab = npt.NDArray[np.uint8]


class QuantizeReport(BaseModel):
    """What a run made."""

    model_config = ConfigDict(extra="forbid")
    model: str
    target: str
    files: list[PlannedFile]
    size: int
    n_weights: int
    bits_per_weight: float
    n_fallbacks: int
    notes: list[str]
    seconds: float
    peak_memory: int


def check(plan: Plan, source: GGUFSource, output: Path, overwrite: bool = False, feedback: bool = False) -> list[Shard]:
    """The files of a plan, once nothing is known that would keep them from being made.

    Args:
        feedback: whether Hessians are there, or text for them.

    Raises:
        FewbitsError: the output exists, the disk is full, or the plan needs Hessians that are not there.
    """
    if not feedback:
        asked = next((tensor.name for tensor in plan.tensors if tensor.method == "gptq"), None)
        if asked:
            raise FewbitsError(f"The plan asks for error feedback for {asked!r}.", "Pass --calibration with texts.")
    shards = shards_of(plan, source.metadata, output)
    for shard in shards:
        check_output(shard.path, overwrite)
    there = work_folder(output) / RESULT
    held = sum(file.stat().st_blocks * 512 for file in there.iterdir()) if there.is_dir() and os.name == "posix" else 0
    check_room(output, sum(shard.nbytes for shard in shards) - held)
    return shards


def execute(
    plan: Plan,
    source: GGUFSource,
    work: WorkFolder,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    learned: Learned | None = None,
    blockwise: GGUFBlockwise | None = None,
    beside: Mapping[Path, Path] | None = None,
    workers: Workers | None = None,
) -> QuantizeReport:
    """Make the files of a plan.

    Args:
        work: of this run: its output is the final name, and it is gone on from what an interrupted run has left.
        progress: called with bytes written, bytes in all and the tensor at hand.
        learned: from calibration; without, all columns of all tensors weigh the same.
        threads: how many slabs are encoded at once; None takes every core. The bytes do not depend on it.
        blockwise: makes some of the tensors while text runs through the model.
        beside: further results: where they are -> final name.
        workers: who encodes them, instead of threads.

    Raises:
        FewbitsError: the output exists, the disk is full, a weight is NaN or infinite.
    """
    started = time.monotonic()
    shards = check(plan, source, work.output, overwrite, bool(learned and learned.factors) or blockwise is not None)
    parts = blockwise.parts if blockwise else {}
    files = [File(shard.path.name, shard.header, shard.nbytes) for shard in shards]
    with TensorFiles(work, files, spans_of(shards, parts)) as written:
        notes = blockwise.run(written) if blockwise else []
        left = [tensor for tensor in plan.tensors if tensor.name not in parts and not written.has(tensor.name)]
        with ThreadPoolExecutor(threads or os.cpu_count() or 1, "encode") as pool:
            try:
                pieces = _pieces(left, source, workers or Threads(pool), progress, learned or Learned())
                for tensor, data in zip(left, pieces, strict=True):
                    written.put(tensor.name, data)
            finally:
                pool.shutdown(cancel_futures=True)
        written.finish()
    report = QuantizeReport(
        model=str(source.path),
        target=plan.target,
        files=[PlannedFile(name=shard.path.name, size=shard.nbytes) for shard in shards],
        size=sum(shard.nbytes for shard in shards),
        n_weights=plan.n_weights,
        bits_per_weight=plan.bits_per_weight,
        n_fallbacks=len(plan.fallbacks),
        notes=[*plan.notes, *notes],
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
    )
    moves = {written.folder / shard.path.name: shard.path for shard in shards}
    work.publish({**(beside or {}), **moves}, report.model_dump(mode="json"))
    return report


def peak_memory() -> int:
    """The process's largest resident set in bytes, 0 where the system does not tell.

    Linux's ru_maxrss may hold what the parent had at the fork, so it is asked last.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:", 1)[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _pieces(
    tensors: Sequence[PlannedTensor],
    source: GGUFSource,
    workers: Workers,
    progress: Progress | None,
    learned: Learned,
) -> Iterator[Iterable[memoryview]]:
    """Each tensor's bytes in pieces. A few slabs are ahead of the writer, across tensor borders, never more."""
    encoding = workers.job(SlabEncoder(source.path, source.read, learned))
    tasks = ((tensor, task) for tensor in tensors for task in _tasks(tensor, source, workers, encoding))
    ahead: deque[tuple[PlannedTensor, Pending[Slab]]] = deque()
    total, done = sum(tensor.nbytes for tensor in tensors), 0

    def refill() -> None:
        while len(ahead) < workers.ahead and (item := next(tasks, None)):
            ahead.append((item[0], item[1]()))

    def of(tensor: PlannedTensor) -> Iterator[memoryview]:
        nonlocal done
        refill()
        while ahead and ahead[0][0] is tensor:
            data = ahead.popleft()[1].result()
            refill()
            yield data.reshape(-1).data
            done += data.nbytes
            if progress:
                progress(done, total, tensor.name)

    for tensor in tensors:
        yield of(tensor)


def _tasks(
    tensor: PlannedTensor,
    source: GGUFSource,
    workers: Workers,
    encoding: Job[[PlannedTensor, int, int, int], Slab],
) -> Iterator[Callable[[], Pending[Slab]]]:
    """The parts of a tensor in order; each is handed out when it is called."""
    stored = source.stored.get(tensor.name) if tensor.method == "copy" else None
    if stored:
        for start in range(0, tensor.nbytes, 4 * SLAB_WEIGHTS):
            yield partial(workers.near, partial(stored, start, min(start + 4 * SLAB_WEIGHTS, tensor.nbytes)))
        return
    columns = tensor.shape[-1] if tensor.shape else 1
    step = max(1, SLAB_WEIGHTS // max(1, columns))
    experts = experts_of(tensor)
    each = prod(tensor.shape[:-1]) // experts
    for expert in range(experts):
        for start in range(expert * each, (expert + 1) * each, step):
            stop = min(start + step, (expert + 1) * each)
            yield partial(encoding.submit, tensor.name, tensor, start, stop, expert)


@dataclass(frozen=True)
class SlabEncoder:
    """Makes slabs of rows, wherever it is: what it knows of the model is how to read it.

    Attributes:
        path: of the model, for errors.
        read: by tensor name, as `GGUFSource` has it.
    """

    path: Path
    read: Mapping[str, ReadRows]
    learned: Learned

    def __call__(self, tensor: PlannedTensor, start: int, stop: int, expert: int) -> Slab:
        """Rows start:stop of a tensor, which are an expert's.

        Raises:
            FewbitsError: a weight is NaN or infinite.
        """
        weights = np.ascontiguousarray(self.read[tensor.name](start, stop).reshape(stop - start, -1), np.float32)
        # min and max carry any NaN along and allocate nothing
        if weights.size and not (np.isfinite(weights.min()) and np.isfinite(weights.max())):
            bad = int(np.argmax(~np.isfinite(weights).all(axis=1)))
            raise FewbitsError(
                f"{self.path}: tensor {tensor.name!r} holds NaN or infinite weights (row {start + bad}).",
                "Such a model is damaged: fetch it again or repair the training run.",
            )
        # a directory's tensors may be permuted or joined on the way, so "copy" of them is a conversion to the same type
        chosen = method("convert" if tensor.method == "copy" else tensor.method)
        importance = self.learned.importance(tensor.name, expert)
        kind = codec(tensor.codec)
        factor = self.learned.factor(tensor.name, expert, kind) if tensor.method == "gptq" else None
        return chosen.quantize(weights, kind, importance, factor)
