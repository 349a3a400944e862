"""Comparing quantizations of one model: all of them on one ruler, each read, measured and let go before the next."""

from __future__ import annotations

import os
import shlex
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import prod
from pathlib import Path

from fewbits.checkpoint import GGUFCheckpoint, Model, open_model
from fewbits.compare import facts
from fewbits.compare.estimates import MemoryQuestion
from fewbits.compare.losses import ExpectedLosses
from fewbits.compare.machine import Trial
from fewbits.compare.positions import EDGES, by_confidence, by_text, histogram, worst_tokens
from fewbits.compare.sweep import Made, Sweep
from fewbits.compare.tensors import tensor_rows
from fewbits.compare.texts import REFUSED_SHARE, WORDS, shared
from fewbits.errors import FewbitsError
from fewbits.formats.atomic import AtomicFile, check_output, explain
from fewbits.forward.clock import Clock
from fewbits.forward.identity import fingerprint
from fewbits.forward.streamed import Progress
from fewbits.forward.text import Text, read_text
from fewbits.measure.metrics import Estimate, perplexity
from fewbits.measure.metrics import compare as summarize
from fewbits.measure.report import RulerUsed
from fewbits.measure.windows import get_ruler
from fewbits.measure.yardstick import Yardstick, calibration_marks, check_engine, refuse_calibration_text
from fewbits.plan.directory import is_directory_target
from fewbits.report import render
from fewbits.report.ranking import summary
from fewbits.report.schema import Candidate, ComparisonReport, MemoryLine, ReferenceUsed, SensitivityUsed, TextMeasured
from fewbits.version import __version__

PAGE, DATA = ".html", ".json"


def compare(
    reference: str | Path,
    candidates: Sequence[str | Path] = (),
    *,
    texts: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    sweep: Sequence[str] = (),
    calibration: str | Path | Sequence[str | Path] = (),
    calibration_chunks: int | None = None,
    keep_files: str | Path | None = None,
    chunks: int | None = None,
    convention: str = "llama.cpp",
    window: int | None = None,
    engine: str = "torch",
    kv: str | None = None,
    context: int | None = None,
    gpu: str | None = None,
    memory: str | None = None,
    noise_floor: bool = True,
    weight_errors: bool = True,
    sensitivity: str | Path | None = None,
    speed: bool = False,
    peak_memory: bool = False,
    cache: bool | Path = True,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ComparisonReport:
    """Measure quantizations of one model against it, all on one ruler, and write a page about them.

    Args:
        reference: the unquantized model: directory, GGUF file or hub id.
        candidates: GGUF files and directories.
        texts: UTF-8 text files that nothing was calibrated on; each is also reported on its own.
        output: the page (`.html`); its data is written beside it (`.json`). None writes nothing.
        sweep: targets (`Q4_K_M`, `gptq:w4g128`, ...) that are made of the reference first.
        calibration: for these: texts, or statistics that `calibrate` made.
        calibration_chunks: most windows of calibration texts.
        keep_files: folder that keeps what the sweep makes; None removes each after it is measured.
        chunks: at most so many windows of each text; None means all.
        convention: `llama.cpp` or `hf`, see `measure`; `window` another length of the windows in tokens.
        engine: `torch`, or `llama.cpp` where all candidates are GGUF files.
        kv: type of the candidates' KV cache, see `measure`.
        context: tokens for which memory is predicted; None for 8192, or the model's longest if that is shorter.
        gpu: a card by name, `memory` a size such as `8GB`: what the user has.
        noise_floor: also measure the reference against its own bfloat16 rounding.
        weight_errors: also compare each matrix with the reference's.
        sensitivity: statistics that `calibrate` made with sensitivities: what each matrix's error is expected to cost.
        speed: also time GGUF candidates in llama.cpp on this machine's processor.
        peak_memory: also measure there what memory they take at `context` tokens.
        cache: keep the reference's answers for later runs, in the default cache folder or the one given.
        threads: None means all cores.
        overwrite: replace outputs that exist.
        progress: called with (done, total, what).

    Raises:
        FewbitsError: whatever `measure` and `quantize` refuse, an output that exists, two candidates of one name.
            Requests are checked before any work.
    """
    paths = [Path(text) for text in ([texts] if isinstance(texts, str | Path) else texts)]
    learned = [Path(file) for file in ([calibration] if isinstance(calibration, str | Path) else calibration)]
    question = MemoryQuestion.of(context, kv, gpu, memory)
    files = _outputs(Path(output), overwrite) if output is not None else None
    if not candidates and not sweep:
        raise FewbitsError("There is nothing to compare.", "Name candidates, or targets with --sweep.")
    if not paths:
        raise FewbitsError("There is no text to measure on.", "Pass --text FILE.")
    passages = [read_text(path) for path in paths]
    base, clock = open_model(reference), Clock()
    given = [open_model(candidate) for candidate in candidates]
    trial = Trial(speed, peak_memory, kv, threads or os.cpu_count() or 1)
    trial.check(
        any(isinstance(m.checkpoint, GGUFCheckpoint) for m in given) or not all(map(is_directory_target, sweep))
    )
    expected = _expected(base, sensitivity, weight_errors)
    for model in given:
        check_engine(engine, kv, model)
        for passage in passages:
            refuse_calibration_text(model, passage)
    name = Path(reference).name.removesuffix(".gguf") or base.path.name
    with ExitStack() as stack:
        made = Sweep(
            base.path,
            name,
            list(sweep),
            _folder(keep_files, bool(sweep), stack),
            keep_files is not None,
            learned,
            calibration_chunks,
            threads,
            overwrite,
            progress,
            clock,
        )
        _check_sweep(made, engine, passages)
        ruler = get_ruler(convention, window)
        yardstick = Yardstick(
            base, passages, ruler, chunks=chunks, cache=cache, threads=threads, clock=clock, progress=progress
        )
        run = _Run(base, name, yardstick, engine, kv, question, weight_errors, expected, trial, progress)
        overlap = _overlap(passages, made.texts)
        line = question.line()
        found = [run.candidate(model, label) for model, label in zip(given, _labels(given, sweep), strict=True)]
        for target in made.targets:
            product = made.make(target)
            found.append(run.candidate(open_model(product.path), target, product))
            made.done(product)
        flags: dict[str, Sequence[object]] = {
            "--text": paths,
            "--chunks": [chunks],
            "--convention": [convention if convention != "llama.cpp" else None],
            "--window": [window],
            "--engine": [engine if engine != "torch" else None],
            "--kv": [kv],
            "--context": [context],
            "--gpu": [gpu],
            "--memory": [memory],
            "--sensitivity": [sensitivity],
            "--threads": [threads],
            "--sweep": [",".join(sweep) or None],
            "--calibration": learned,
            "--calibration-chunks": [calibration_chunks],
            "--output": [output],
        }
        switches = {"--speed": speed, "--peak-memory": peak_memory}
        report = run.report(found, line, overlap, noise_floor, _command(reference, candidates, flags, switches))
    if files is not None:
        _write(report, *files)
    return report


@dataclass
class _Run:
    """One reference, one yardstick, and the questions asked of each candidate."""

    base: Model
    name: str
    yardstick: Yardstick
    engine: str
    kv: str | None
    question: MemoryQuestion
    weight_errors: bool
    expected: ExpectedLosses | None
    trial: Trial
    progress: Progress | None
    version: str = field(default="", init=False)

    @property
    def text_names(self) -> list[str]:
        return [text.path.name for text in self.yardstick.texts]

    def candidate(self, model: Model, label: str, made: Made | None = None) -> Candidate:
        """Measure one candidate."""
        started, clock = time.perf_counter(), self.yardstick.clock
        self.yardstick.progress = self._named(label)
        found = self.yardstick.measure(model, self.engine, self.kv)
        self.version = found.engine_version
        positions = found.positions
        assert positions.kl is not None and positions.reference_nll is not None
        compared = summarize(positions)
        target = facts.target_of(model) or (label if made else None)
        total, blocks = facts.bits_per_weight(model)
        files = facts.weight_files(model)
        with clock.step("hash files"):
            hashes = facts.hashed(files)
        with clock.step("compare weights"):
            rows = tensor_rows(self.base, model, self.weight_errors, self.yardstick.progress, self.expected)
        estimated, complaint = self.question.ask(model)
        with clock.step("try out"):
            speed, footprint, more = self.trial.run(model, self.question.tokens(model))
        return Candidate(
            label=label,
            path=str(model.path),
            files=hashes,
            family=facts.family_of(model),
            format=facts.format_of(model),
            target=target,
            size=sum(file.size for file in hashes),
            bits_per_weight=total,
            block_bits_per_weight=blocks,
            perplexity=perplexity(positions.nll),
            perplexity_difference=_difference(compared.reference_perplexity, compared.perplexity_ratio),
            comparison=compared,
            within_noise=False,
            by_confidence=by_confidence(positions),
            by_text=by_text(positions, self.text_names, self.yardstick.parts) if len(self.text_names) > 1 else [],
            window_kl=positions.kl.mean(axis=1).tolist(),
            histogram=histogram(positions),
            worst=worst_tokens(positions, self.yardstick, self.text_names),
            tensors=rows,
            memory=estimated,
            quantize_seconds=made.seconds if made else None,
            measure_seconds=time.perf_counter() - started,
            engines=facts.engines(model, target),
            calibrated_on=calibration_marks(model)[:16],
            warnings=[*found.warnings, *(made.notes if made else []), *complaint, *more],
            speed=speed,
            footprint=footprint,
        )

    def report(
        self, found: list[Candidate], line: MemoryLine | None, overlap: list[str], noise_floor: bool, command: str
    ) -> ComparisonReport:
        """Everything together."""
        self.yardstick.progress = self._named("noise floor")
        floor = self.yardstick.noise_floor() if noise_floor else None
        for candidate in found:
            candidate.within_noise = floor is not None and candidate.kl("mean") <= floor.kl.mean.value
        ruler, windows = self.yardstick.ruler, self.yardstick.windows
        return ComparisonReport(
            tool_version=__version__,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
            engine=self.engine,
            engine_version=self.version,
            kv=self.kv,
            reference=ReferenceUsed(
                path=str(self.base.path),
                name=self.name,
                architecture=self.base.family.architecture,
                fingerprint=fingerprint(self.base),
                n_weights=sum(prod(info.shape) for info in self.base.checkpoint.tensors.values()),
                size=sum(info.nbytes for info in self.base.checkpoint.tensors.values()),
                stored_as=facts.stored_as(self.base),
            ),
            convention=RulerUsed.of(ruler),
            texts=[
                TextMeasured(
                    path=str(text.path), name=text.path.name, sha256=text.sha256, n_windows=part.stop - part.start
                )
                for text, part in zip(self.yardstick.texts, self.yardstick.parts, strict=True)
            ],
            n_windows=len(windows.inputs),
            n_scored=windows.targets.size,
            reference_perplexity=found[0].comparison.reference_perplexity,
            noise_floor=floor,
            candidates=found,
            memory_line=line,
            memory_context=next((c.memory.context for c in found if c.memory), None),
            histogram_edges=EDGES,
            overlap=overlap,
            summary=summary(self.name, found, windows.targets.size, floor is not None, line),
            seconds=self.yardstick.clock.seconds,
            warnings=_common_warnings(found),
            sensitivity=_sensitivity(self.expected),
        )

    def _named(self, label: str) -> Progress | None:
        told = self.progress
        return None if told is None else lambda done, total, what: told(done, total, f"{label}: {what}")


def _difference(reference: Estimate, ratio: Estimate) -> Estimate:
    """Perplexity less the reference's: the reference's own uncertainty is common to both and left out."""
    scale = reference.value
    return Estimate(
        value=scale * (ratio.value - 1),
        low=scale * (ratio.low - 1),
        high=scale * (ratio.high - 1),
        stderr=None if ratio.stderr is None else scale * ratio.stderr,
        stderr_naive=scale * ratio.stderr_naive,
    )


def _common_warnings(found: Sequence[Candidate]) -> list[str]:
    """What holds for all candidates, told once."""
    common = [warning for warning in found[0].warnings if all(warning in c.warnings for c in found)]
    for candidate in found:
        candidate.warnings = [warning for warning in candidate.warnings if warning not in common]
    return common


def _labels(given: Sequence[Model], sweep: Sequence[str]) -> list[str]:
    """Names of the candidates that were given, none of them a target of the sweep."""
    short = facts.labels([model.path for model in given])
    return [f"{label} (file)" if label in sweep else label for label in short]


def _check_sweep(sweep: Sweep, engine: str, passages: Sequence[Text]) -> None:
    """Refuse what would be refused after hours of work."""
    for target in sweep.targets:
        if engine == "llama.cpp" and is_directory_target(target):
            raise FewbitsError(f"{target}: llama.cpp runs GGUF files only.", "Leave --engine out.")
    for passage in passages:
        for text in sweep.texts:
            if read_text(text).sha256 == passage.sha256:
                raise FewbitsError(f"{text}: measured on what is calibrated on, which flatters.", "Take another text.")
    sweep.check()


def _overlap(passages: Sequence[Text], calibration: Sequence[Path]) -> list[str]:
    """What calibration and measured texts have in common, in words.

    Raises:
        FewbitsError: so much that the figures would flatter.
    """
    contents = [read_text(path).content for path in calibration]
    found = []
    for passage in passages if contents else ():
        share = shared(passage, contents)
        if share > REFUSED_SHARE:
            raise FewbitsError(
                f"{passage.path}: {share:.1%} of it stands in the calibration texts, which flatters.",
                "Measure on another text.",
            )
        found.append(f"{passage.path.name}: {share:.2%} of its runs of {WORDS} words stand in the calibration texts")
    return found


def _folder(keep_files: str | Path | None, needed: bool, stack: ExitStack) -> Path:
    """Where the sweep works."""
    if keep_files is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fewbits-sweep-"))) if needed else Path()
    folder = Path(keep_files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(folder, error) from None
    return folder


def _outputs(output: Path, overwrite: bool) -> tuple[Path, Path]:
    """The page and its data, `report.html` and `report.json`; refused early where they cannot be written."""
    if output.suffix not in (PAGE, DATA):
        raise FewbitsError(f"{output}: the page is HTML.", "Name it report.html, for example.")
    files = output.with_suffix(PAGE), output.with_suffix(DATA)
    for file in files:
        check_output(file, overwrite)
    return files


def _write(report: ComparisonReport, page_file: Path, data_file: Path) -> None:
    for file, content in ((data_file, report.model_dump_json(indent=1) + "\n"), (page_file, render(report))):
        with AtomicFile(file, overwrite=True) as stream:
            stream.write(content.encode("utf-8"))


def _expected(reference: Model, file: str | Path | None, weight_errors: bool) -> ExpectedLosses | None:
    """What errors of the reference's matrices cost, where that is asked for."""
    if file is None:
        return None
    if not weight_errors:
        raise FewbitsError("Sensitivities weigh the errors of the weights.", "Leave out --no-weight-errors.")
    return ExpectedLosses(reference, Path(file))


def _sensitivity(expected: ExpectedLosses | None) -> SensitivityUsed | None:
    if expected is None:
        return None
    sha256 = facts.hashed([expected.path])[0].sha256
    return SensitivityUsed(path=str(expected.path), sha256=sha256, datasets=expected.datasets)


def _command(
    reference: str | Path,
    candidates: Sequence[str | Path],
    flags: dict[str, Sequence[object]],
    switches: dict[str, bool],
) -> str:
    """The command line that asks for the same."""
    words = ["fewbits", "compare", str(reference), *map(str, candidates)]
    words += [switch for switch, on in switches.items() if on]
    for flag, values in flags.items():
        words += [word for value in values if value is not None for word in (flag, str(value))]
    return shlex.join(words)
