"""One calibration from beginning to end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fewbits.calibration.collect import Inputs, gguf_names, owners
from fewbits.calibration.groups import BlockPasses, GroupPass
from fewbits.calibration.hessians import block_file, check_folder, open_block, publish, write_hessians
from fewbits.calibration.imatrix_files import FileFormat, read_statistics, write_statistics
from fewbits.calibration.memory_need import Block, TextRun
from fewbits.calibration.report import CalibrateReport, experts_seen, tensors_seen
from fewbits.calibration.resume import WorkFolder
from fewbits.calibration.sensitivity import sensitivities
from fewbits.calibration.statistics import Statistics, TensorStatistics
from fewbits.calibration.texts import CalibrationText, read_texts
from fewbits.checkpoint import Model, open_model
from fewbits.errors import FewbitsError
from fewbits.formats.atomic import check_output
from fewbits.forward.clock import Clock
from fewbits.forward.identity import fingerprint
from fewbits.forward.streamed import Progress, StreamedModel, torch_threads
from fewbits.spill import Spill
from fewbits.version import __version__
from fewbits.workers import Workers

DEVICES = ("cpu", "cuda", "auto")
LAYOUT = 2
"""Raised when what an unfinished run keeps, or how it is computed, changes."""


@dataclass
class Calibration:
    """What `calibrate` gives: the statistics themselves, and the report on them."""

    statistics: Statistics
    report: CalibrateReport


def calibrate(
    model: str | Path,
    texts: str | Path | Sequence[str | Path] = (),
    output: str | Path | None = None,
    *,
    chunks: int | None = None,
    context: int = 512,
    merge: Sequence[str | Path] = (),
    hessians: str | Path | None = None,
    output_tensor: bool = False,
    sensitivity: bool = False,
    format: FileFormat = "gguf",
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    max_memory: int | None = None,
    workers: Workers | None = None,
) -> Calibration:
    """Run text through a model and note how large the inputs of every weight's columns are.

    The arithmetic is float32; one decoder block is in memory at a time. With an output, a run that was interrupted
    goes on when it is started again with the same arguments, and gives the same result bit for bit.

    Args:
        model: directory, GGUF file or hub id.
        texts: text or `.jsonl` files, see `texts.read_texts`; none to merge statistics only.
        output: the importance matrix to write, in llama.cpp's layout; None keeps the statistics in memory.
        chunks: at most so many windows; None means all.
        context: tokens of a window.
        merge: importance matrices of the same model whose sums are added.
        hessians: folder for X^T X of every linear layer, one file for each decoder block.
        output_tensor: also the inputs of the head.
        sensitivity: also how much errors in each weight change what the model says, from gradients of some of the
            windows: what a budget is spent by.
        format: `gguf`, or `dat` for older versions of llama.cpp.
        device: `cpu`, `cuda` or `auto` (cuda where there is one).
        threads: None means all cores.
        overwrite: replace outputs that exist, and begin anew where another run was not finished.
        progress: called with (blocks done, blocks, what).
        max_memory: most bytes of memory to use; None: no limit. The result does not depend on it.
        workers: who takes groups of windows through the blocks; with `device` cpu only.

    Raises:
        FewbitsError: unreadable or too short text, an output that exists, a model that is not known or gives inputs
            that are not finite.
    """
    if format not in ("gguf", "dat"):
        raise FewbitsError(f"There is no importance-matrix format {format!r}.", "Choose gguf or dat.")
    if sensitivity and (format == "dat" or not texts):
        raise FewbitsError("Sensitivities need a text, and a file in the format gguf.", "Leave out --sensitivity.")
    if context < 1:
        raise FewbitsError(f"A context of {context} tokens calibrates nothing.", "Take 512.")
    paths = [Path(text) for text in ([texts] if isinstance(texts, str | Path) else texts)]
    if not paths and not merge:
        raise FewbitsError("There is nothing to calibrate with.", "Name a text.")
    if not paths and hessians is not None:
        raise FewbitsError("Hessians cannot be made from merged statistics.", "Name a text.")
    final = Path(output) if output is not None else None
    folder = Path(hessians) if hessians is not None else None
    if final is not None:
        check_output(final, overwrite)
    if folder is not None:
        check_folder(folder, overwrite)
    if workers and device == "cuda":
        raise FewbitsError("A cluster's workers calibrate on processors.", "Leave out --device or --cluster.")
    added = [read_statistics(path) for path in merge]
    device = "cpu" if workers else resolve_device(device)
    job = _Job(open_model(model), final, folder, output_tensor, device, overwrite, progress, workers)
    statistics = None
    if paths:
        with job.clock.step("tokenize"):
            text = read_texts(paths, job.model.tokenizer(), context, chunks)
        job.spill = _spill(job, text, sensitivity, max_memory, threads)
        with torch_threads(threads or os.cpu_count() or 1), torch.no_grad():
            statistics = job.run(text)
        if sensitivity:
            with job.clock.step("gradients"), torch_threads(threads or os.cpu_count() or 1):
                statistics.sensitivities = sensitivities(job.model, text, progress=progress, spill=job.spill)
    statistics = statistics.merged(added) if statistics else added[0].merged(added[1:])
    if final is not None:
        with job.clock.step("write"):
            write_statistics(statistics, final, format, overwrite)
    job.finish()
    return Calibration(statistics, job.report(statistics, [str(path) for path in merge], context))


def _spill(job: _Job, text: CalibrationText, gradients: bool, most: int | None, threads: int | None) -> Spill:
    """Where the run's large arrays live, so that it keeps within `most` bytes of memory."""
    beside = job.output.absolute().parent if job.output else None
    if most is None:
        return Spill(folder=beside)
    windows, context = text.inputs.shape
    kinds = ("whole",) if job.hessians else ()
    run = TextRun(Block.of(job.model, context), windows, context, kinds, all_inputs=True, gradients=gradients)
    return run.limits(most, beside, threads).spill


def resolve_device(wanted: str) -> str:
    """`cpu` or `cuda`.

    Raises:
        FewbitsError: unknown, or not there.
    """
    if wanted not in DEVICES:
        raise FewbitsError(f"There is no device {wanted!r}.", f"Choose one of: {', '.join(DEVICES)}.")
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise FewbitsError("torch sees no CUDA device.", "Pass --device cpu, or install torch with CUDA.")
    return "cuda" if there and wanted != "cpu" else "cpu"


@dataclass
class _Job:
    """The parts of one run, and what is noted on the way."""

    model: Model
    output: Path | None
    hessians: Path | None
    output_tensor: bool
    device: str
    overwrite: bool
    progress: Progress | None
    workers: Workers | None = None
    spill: Spill = field(default_factory=Spill)
    text: CalibrationText | None = None
    work: WorkFolder | None = None
    resumed_after: int = 0
    clock: Clock = field(default_factory=Clock)
    warnings: list[str] = field(default_factory=list)

    @property
    def unfinished_hessians(self) -> Path | None:
        return self.hessians.with_name(f"{self.hessians.name}.partial") if self.hessians else None

    def run(self, text: CalibrationText) -> Statistics:
        """All windows through all blocks."""
        self.text = text
        with self.clock.step("build"):
            streamed = StreamedModel(self.model, spill=self.spill)
            owned = owners(self.model)
            text.check(streamed.n_vocab, self.model.path)
        tensors: dict[str, TensorStatistics] = {}
        with self.clock.step("embed"):
            stream = streamed.enter(text.inputs)
        if self.output is not None:
            self.work = WorkFolder(self.output.with_name(f"{self.output.name}.partial"), self._identity(text))
            self.work.check(self.overwrite)
            self.resumed_after, tensors = self.work.load(stream.hidden)
        if not self._hessians_reach(self.resumed_after, text):
            with self.clock.step("embed"):
                stream, tensors, self.resumed_after = streamed.enter(text.inputs), {}, 0
        here = GroupPass(streamed, stream.calls, self.hessians is not None, self.device)
        passes = BlockPasses(here, stream, self.workers)
        with self.clock.step("blocks"):
            for index in range(self.resumed_after, len(streamed.layers)):
                inputs = passes(index)
                for record in inputs:
                    tensors |= record.statistics()
                if self.unfinished_hessians:
                    write_hessians(self.unfinished_hessians, index, inputs, self._identity(text), text.sha256)
                if self.work is not None and index + 1 < len(streamed.layers):
                    self.work.save_if_due(index + 1, stream.hidden, tensors)
                if self.progress:
                    self.progress(index + 1, len(streamed.layers), "decoder blocks")
        if self.output_tensor:
            with self.clock.step("head"):
                streamed.norm(stream)
                tensors |= self._head(streamed, owned, stream.hidden)
        self._note_missing(owned, tensors)
        count, context = text.inputs.shape
        return Statistics(dict(sorted(tensors.items())), text.datasets, count, context, text.sha256, text.inputs.size)

    def finish(self) -> None:
        """Give the Hessians their final name and drop what only an interrupted run needs."""
        if self.unfinished_hessians and self.hessians:
            publish(self.unfinished_hessians, self.hessians)
        if self.work is not None:
            if self.work.problem:
                self.warnings.append(self.work.problem)
            self.work.remove()

    def report(self, statistics: Statistics, merged: list[str], context: int) -> CalibrateReport:
        layers = experts_seen(statistics)
        poor = [layer for layer in layers if layer.without_data]
        if poor:
            silent, every = sum(len(layer.without_data) for layer in poor), sum(layer.experts for layer in layers)
            self.warnings.append(
                f"{silent} of {every} experts, in {len(poor)} layers, got no text (the first is expert "
                f"{poor[0].without_data[0]} of {poor[0].name}): calibrate with more or other text"
            )
        return CalibrateReport(
            model=str(self.model.path),
            output=str(self.output) if self.output else None,
            hessians=str(self.hessians) if self.hessians else None,
            texts=self.text.datasets if self.text else [],
            merged=merged,
            device=self.device,
            context=context,
            windows=len(self.text.inputs) if self.text else 0,
            tokens=self.text.inputs.size if self.text else 0,
            resumed_after=self.resumed_after,
            tensors=tensors_seen(statistics),
            experts=layers,
            seconds=self.clock.seconds,
            warnings=self.warnings,
        )

    def _identity(self, text: CalibrationText) -> str:
        """Of everything that the statistics follow from."""
        parts = {
            "layout": LAYOUT,
            "version": __version__,
            "torch": str(torch.__version__),
            "model": fingerprint(self.model),
            "windows": hashlib.sha256(text.inputs.tobytes()).hexdigest(),
            "shape": text.inputs.shape,
            "hessians": str(self.hessians.absolute()) if self.hessians else None,
            "output_tensor": self.output_tensor,
            "device": self.device,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _hessians_reach(self, blocks: int, text: CalibrationText) -> bool:
        """Whether the Hessians of the blocks that are done are there, too; without any done, a folder for them."""
        folder = self.unfinished_hessians
        if folder is None:
            return True
        # another run may have used the folder since: what is there must be this one's
        done = range(blocks)
        if blocks and all(block_file(folder, block).is_file() for block in done):
            identity = self._identity(text)
            if all(open_block(folder, block).run == identity for block in done):
                return True
        check_folder(folder, overwrite=True)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        except OSError as error:
            raise FewbitsError(f"{folder}: cannot be made ({error.strerror}).", "Choose another folder.") from None
        return not blocks

    def _head(
        self, streamed: StreamedModel, owned: Mapping[str, list[str]], hidden: torch.Tensor
    ) -> dict[str, TensorStatistics]:
        """The head's inputs: the normed hidden states. A tied head's are the embedding's, whose weights it uses."""
        names = {id(module): name for name, module in streamed.skeleton.named_modules()}
        for module in (streamed.skeleton.get_output_embeddings(), streamed.skeleton.get_input_embeddings()):
            weights = gguf_names(streamed, owned, f"{names[id(module)]}.weight")
            if weights:
                record = Inputs.empty(weights, 1, hidden, False)
                for window in hidden:
                    record.add(window)
                return record.statistics()
        return {}

    def _note_missing(self, owned: Mapping[str, list[str]], tensors: Mapping[str, TensorStatistics]) -> None:
        weights = {name for names in owned.values() for name in names if name.startswith("blk.")}
        linear = {name for name in weights if "norm" not in name and "ffn_gate_inp" not in name}
        missing = sorted(linear - set(tensors))
        if missing:
            self.warnings.append(f"no statistics of {len(missing)} weights, the first is {missing[0]}")
