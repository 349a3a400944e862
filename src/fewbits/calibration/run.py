"""One calibration from beginning to end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from fewbits.calibration.collect import Inputs, gguf_names, owners
from fewbits.calibration.groups import BlockPasses, GroupPass
from fewbits.calibration.hessians import block_file, check_folder, publish, unfinished, write_hessians
from fewbits.calibration.imatrix_files import FileFormat, read_statistics, write_statistics
from fewbits.calibration.memory_need import OF_GRADIENTS, Block, TextRun
from fewbits.calibration.report import CalibrateReport, experts_seen, tensors_seen
from fewbits.calibration.resume import Activations
from fewbits.calibration.sensitivity import sensitivities
from fewbits.calibration.statistics import Statistics, TensorStatistics
from fewbits.calibration.texts import CalibrationText, read_texts
from fewbits.checkpoint import Model, open_model
from fewbits.errors import FewbitsError
from fewbits.formats.atomic import check_output
from fewbits.formats.facts import Facts
from fewbits.formats.journal import published
from fewbits.formats.work import WorkFolder
from fewbits.forward.clock import Clock
from fewbits.forward.identity import digests, model_facts
from fewbits.forward.streamed import Progress, StreamedModel, torch_threads
from fewbits.spill import Spill
from fewbits.version import __version__
from fewbits.workers import Workers

DEVICES = ("cpu", "cuda", "auto")
LAYOUT = 2
"""Raised when what an unfinished run keeps, or how it is computed, changes."""
STATISTICS, ACTIVATIONS = "statistics", "activations"
"""Within the work folder."""


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
        check_folder(folder, overwrite or (final is not None and published(final)))
    if workers and device == "cuda":
        raise FewbitsError("A cluster's workers calibrate on processors.", "Leave out --device or --cluster.")
    added = [read_statistics(path) for path in merge]
    device = "cpu" if workers else resolve_device(device)
    cores = threads or os.cpu_count() or 1
    job = _Job(open_model(model), final, folder, output_tensor, device, cores, overwrite, progress, workers)
    if paths:
        with job.clock.step("tokenize"):
            job.text = read_texts(paths, job.model.tokenizer(), context, chunks)
        job.spill = _spill(job, job.text, sensitivity, max_memory, threads)
    merged = [str(path) for path in merge]
    if final is None:
        return job.calibration(added, merged, context, sensitivity)
    options = {"merged": digests(map(Path, merge)), "sensitivity": sensitivity, "format": format}
    with WorkFolder(final, {**job.facts, **options}, overwrite) as work:
        if work.report is not None:
            return Calibration(read_statistics(final), CalibrateReport.model_validate(work.report))
        made = job.calibration(added, merged, context, sensitivity, work)
        with job.clock.step("write"):
            write_statistics(made.statistics, work.path / STATISTICS, format, overwrite=True)
        moves = {work.path / STATISTICS: final}
        if folder is not None:
            moves[unfinished(folder)] = folder
        report = made.report.model_copy(update={"seconds": job.clock.seconds})
        work.publish(moves, report.model_dump(mode="json"))
        return Calibration(made.statistics, report)


def _spill(job: _Job, text: CalibrationText, gradients: bool, most: int | None, threads: int | None) -> Spill:
    """Where the run's large arrays live, so that it keeps within `most` bytes of memory."""
    beside = job.output.absolute().parent if job.output else None
    if most is None:
        return Spill(folder=beside)
    windows, context = text.inputs.shape
    kinds = ("whole",) if job.hessians else ()
    taken = OF_GRADIENTS if gradients else 0
    run = TextRun(Block.of(job.model, context), windows, context, kinds, all_inputs=True, gradients=taken)
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
    threads: int
    overwrite: bool
    progress: Progress | None
    workers: Workers | None = None
    spill: Spill = field(default_factory=Spill)
    text: CalibrationText | None = None
    resumed_after: int = 0
    clock: Clock = field(default_factory=Clock)
    warnings: list[str] = field(default_factory=list)

    def calibration(
        self,
        added: Sequence[Statistics],
        merged: list[str],
        context: int,
        sensitivity: bool,
        work: WorkFolder | None = None,
    ) -> Calibration:
        """The statistics of the text, with these added."""
        statistics = None
        if self.text is not None:
            with torch_threads(self.threads), torch.no_grad():
                statistics = self.run(self.text, work)
            if sensitivity:
                with self.clock.step("gradients"), torch_threads(self.threads):
                    statistics.sensitivities = sensitivities(
                        self.model, self.text, progress=self.progress, spill=self.spill
                    )
        statistics = statistics.merged(added) if statistics else added[0].merged(added[1:])
        if self.hessians and work is None:
            publish(unfinished(self.hessians), self.hessians)
        return Calibration(statistics, self.report(statistics, merged, context))

    def run(self, text: CalibrationText, work: WorkFolder | None) -> Statistics:
        """All windows through all blocks."""
        with self.clock.step("build"):
            streamed = StreamedModel(self.model, spill=self.spill)
            owned = owners(self.model)
            text.check(streamed.n_vocab, self.model.path)
        tensors: dict[str, TensorStatistics] = {}
        with self.clock.step("embed"):
            stream = streamed.enter(text.inputs)
        state = Activations(work.path / ACTIVATIONS) if work else None
        if state:
            self.resumed_after, tensors = state.load(stream.hidden)
        if not self._hessians_reach(self.resumed_after, work):
            with self.clock.step("embed"):
                stream, tensors, self.resumed_after = streamed.enter(text.inputs), {}, 0
        here = GroupPass(streamed, stream.calls, self.hessians is not None, self.device)
        passes = BlockPasses(here, stream, self.workers)
        with self.clock.step("blocks"):
            for index in range(self.resumed_after, len(streamed.layers)):
                inputs = passes(index)
                for record in inputs:
                    tensors |= record.statistics()
                if self.hessians:
                    write_hessians(unfinished(self.hessians), index, inputs, self.identity, text.sha256)
                    if work:
                        work.done(self._hessians_of(index, work))
                if state and index + 1 < len(streamed.layers) and state.due():
                    state.save(index + 1, stream.hidden, tensors)
                if self.progress:
                    self.progress(index + 1, len(streamed.layers), "decoder blocks")
        if self.output_tensor:
            with self.clock.step("head"):
                streamed.norm(stream)
                tensors |= self._head(streamed, owned, stream.hidden)
        self._note_missing(owned, tensors)
        if state and state.problem:
            self.warnings.append(state.problem)
        count, context = text.inputs.shape
        return Statistics(dict(sorted(tensors.items())), text.datasets, count, context, text.sha256, text.inputs.size)

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

    @cached_property
    def facts(self) -> Facts:
        """Everything that the statistics follow from."""
        facts = {
            "version": f"{__version__}, {LAYOUT}",
            "torch": str(torch.__version__),
            "model": model_facts(self.model.checkpoint),
            "Hessians": str(self.hessians.absolute()) if self.hessians else None,
            "output tensor": self.output_tensor,
            "device": self.device,
            # sums of products are split among threads
            "threads": self.threads,
        }
        return facts if self.text is None else {**facts, **self.text.facts}

    @cached_property
    def identity(self) -> str:
        """Of the calibration, wherever its results are put."""
        facts = {name: fact for name, fact in self.facts.items() if name != "Hessians"}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _hessians_of(self, block: int, work: WorkFolder) -> str:
        """The file of a block, as the journal names it."""
        assert self.hessians
        return os.path.relpath(block_file(unfinished(self.hessians), block), work.path)

    def _hessians_reach(self, blocks: int, work: WorkFolder | None) -> bool:
        """Whether the Hessians of the blocks that are done are there, too; without any done, a folder for them."""
        if self.hessians is None:
            return True
        folder = unfinished(self.hessians)
        done = range(blocks)
        # another run may have used the folder since: what is there must be this one's, which checksums tell
        if blocks and work and all(work.has(self._hessians_of(block, work)) for block in done):
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
