"""Verifying a model or an importance matrix."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

from fewbits.arch import FAMILIES
from fewbits.calibration.imatrix_files import read_statistics
from fewbits.checkpoint import GGUFCheckpoint, Model, SafetensorsCheckpoint, open_checkpoint
from fewbits.checkpoint.base import check_regular
from fewbits.checkpoint.gguf import MAGIC
from fewbits.checkpoint.moved_scales import MovedScales
from fewbits.errors import FewbitsError
from fewbits.formats.atomic import AtomicFile
from fewbits.verify import beside
from fewbits.verify.report import CheckedFile, Fault, TensorError, VerifyReport
from fewbits.verify.tensors import Checkpoint, Lines, Progress, as_stored, check_moved, check_tensors, pairs

MOST_EMPTY = 3
ALIKE = 0.3
"""Cosine from which on two tensors have something in common. With 2 bits, error feedback moves weights as far as they
are large, and what they have in common is all that tells them from another tensor's."""


def verify(
    path: str | Path,
    reference: str | Path | None = None,
    *,
    quick: bool = False,
    write_sums: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check that a GGUF file (or split set), a model directory in any layout or an importance matrix is whole.

    Args:
        path: what to check; also a hub id.
        reference: the model that it was made from: each tensor's relative error is told, and one that is too large for
            its bits is a fault.
        quick: leave out hashes and loading the tokenizer, which take longer than decoding every tensor.
        write_sums: record the hashes in `PATH.sha256`, which `sha256sum -c` and later runs check.
        threads: None takes every core.
        progress: called with weights decoded, weights in all and the tensor at hand.

    Raises:
        FewbitsError: it cannot be read at all: no such file, a damaged header, an unknown layout.
    """
    started = time.monotonic()
    checkpoint = None if _is_dat(Path(path)) else open_checkpoint(path)
    if checkpoint is None or _is_statistics(checkpoint):
        report = _verify_statistics(Path(path))
    else:
        options = (quick, write_sums, threads or os.cpu_count() or 1, progress)
        report = _Verification(checkpoint, reference, *options).report()
    return report.model_copy(update={"seconds": time.monotonic() - started})


def _is_dat(path: Path) -> bool:
    """Whether a file can only be an importance matrix of the older kind, which begins with no mark."""
    if not path.exists() or path.is_dir() or path.suffix == ".safetensors":
        return False
    check_regular(path)
    with open(path, "rb") as stream:
        return stream.read(4) != MAGIC


def _is_statistics(checkpoint: Checkpoint) -> bool:
    return isinstance(checkpoint, GGUFCheckpoint) and checkpoint.metadata.get("general.type") == "imatrix"


def _verify_statistics(path: Path) -> VerifyReport:
    """Its reader refuses sums and counts that cannot be; what is left to tell is which experts saw nothing."""
    statistics = read_statistics(path)
    unseen = {name: tensor.without_data for name, tensor in statistics.tensors.items() if tensor.without_data}
    return VerifyReport(
        path=str(path),
        format="imatrix",
        architecture=None,
        reference=None,
        files=[beside.hashed(path, path.name, {})[0]],
        decoded=len(statistics.tensors),
        n_weights=sum(tensor.sums.size for tensor in statistics.tensors.values()),
        errors=[],
        faults=[],
        notes=[f"{name}: no data for experts {experts}" for name, experts in unseen.items()],
        seconds=0.0,
    )


def _problem(found: TensorError) -> str:
    """What is wrong with a tensor by its error; empty where nothing is."""
    if found.error > found.limit / 2 and found.cosine < ALIKE:
        return f"has nothing in common with the reference's (relative error {found.error:.3g})"
    if found.error > found.limit:
        usual = f"{found.type} at {found.bits:.2f} bits a weight stays below {found.limit:g}"
        return f"relative error {found.error:.3g} against the reference; {usual}"
    return ""


class _Verification:
    """One run over a model."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        reference: str | Path | None,
        quick: bool,
        write_sums: bool,
        threads: int,
        progress: Progress | None,
    ) -> None:
        self.checkpoint, self.path = checkpoint, checkpoint.path
        self.reference = open_checkpoint(reference) if reference is not None else None
        self.quick, self.write_sums, self.threads, self.progress = quick, write_sums, threads, progress
        self.faults: list[Fault] = []
        self.notes: list[str] = []
        self._done = 0

    def report(self) -> VerifyReport:
        checkpoint = self.checkpoint
        model = self._model()
        with ThreadPoolExecutor(self.threads, "verify") as pool:
            try:
                files = self._files()
                recorded = beside.recorded_hashes(self.path, files)
                hashes = [] if self.quick else [pool.submit(beside.hashed, *self._named(f), recorded) for f in files]
                tensors, errors = self._tensors(pool, model)
                checked = [hashing.result() for hashing in hashes]
            finally:
                pool.shutdown(cancel_futures=True)
        self.faults += [fault for _, fault in checked if fault is not None]
        present = [CheckedFile(name=self._named(file)[1], size=file.stat().st_size) for file in files]
        self._beside(model)
        missing = recorded.keys() - {file.name for file in present}
        self.faults += [Fault(where=name, problem=f"missing; {recorded[name][1]} has it") for name in sorted(missing)]
        if self.write_sums and checked and not self.faults:
            text = "".join(f"{file.sha256}  {file.name}\n" for file, _ in checked)
            with AtomicFile(beside.sums_file(self.path), overwrite=True) as sums:
                sums.write(text.encode())
        return VerifyReport(
            path=str(self.path),
            format="gguf" if isinstance(checkpoint, GGUFCheckpoint) else "directory",
            architecture=model.family.architecture if model else None,
            reference=str(self.reference.path) if self.reference else None,
            files=[file for file, _ in checked] or present,
            decoded=len(tensors),
            n_weights=sum(prod(lines.shape) for lines in tensors),
            errors=sorted(errors, key=lambda found: (-found.error / found.limit, found.name)),
            faults=self.faults,
            notes=self.notes,
            seconds=0.0,
        )

    def _model(self) -> Model | None:
        """The model, and whether its tensors are those of its configuration."""
        try:
            model = Model(self.checkpoint)
        except FewbitsError as error:
            if self._known_architecture():
                self.faults.append(Fault(where="configuration", problem=error.message))
            else:
                self.notes.append(f"names and shapes were not compared with the configuration: {error.message}")
            return None
        try:
            self.notes += beside.check_configuration(model)
        except FewbitsError as error:
            self.faults.append(Fault(where="configuration", problem=error.message))
        return model

    def _known_architecture(self) -> bool:
        checkpoint = self.checkpoint
        if isinstance(checkpoint, GGUFCheckpoint):
            return any(family.gguf == checkpoint.metadata.get("general.architecture") for family in FAMILIES)
        named = checkpoint.config.get("architectures") or [""]
        return any(family.architecture == named[0] for family in FAMILIES)

    def _files(self) -> list[Path]:
        """The files with tensors; of a directory, every file that belongs to the model."""
        if self.path.is_dir():
            return sorted(file for file in self.path.iterdir() if file.is_file() and not file.name.startswith("."))
        return sorted({info.file for info in self.checkpoint.tensors.values()} | {self.path})

    def _named(self, file: Path) -> tuple[Path, str]:
        return file, beside.name_of(self.path, file)

    def _tensors(self, pool: ThreadPoolExecutor, model: Model | None) -> tuple[list[Lines], list[TensorError]]:
        ours, theirs = as_stored(self.checkpoint), dict[str, Lines]()
        moved = self._moved(model)
        if self.reference is not None and moved is None:
            ours, theirs, notes = pairs(self.checkpoint, self.reference)
            self.notes += notes
        total = sum(prod(lines.shape) for lines in ours.values()) * (2 if moved else 1)

        def done(weights: int, name: str) -> None:
            self._done += weights
            if self.progress:
                self.progress(min(self._done, total), total, name)

        tensors = list(ours.values())
        errors, faults, empty = check_tensors(tensors, theirs, pool, done)
        if moved is not None and model is not None:
            original, scales = moved
            errors, more = check_moved(model, original, scales, done)
            faults += [fault for fault in more if fault.where not in {known.where for known in faults}]
            self.notes.append("scales of channels were moved between layers: they are fitted out of the errors")
        self.faults += faults
        for found in errors:
            if problem := _problem(found):
                self.faults.append(Fault(where=found.name, problem=problem))
        if empty:
            shown = ", ".join(empty[:MOST_EMPTY]) + (", ..." if len(empty) > MOST_EMPTY else "")
            self.notes.append(f"{len(empty)} matrices hold zeros alone: {shown}")
        return tensors, errors

    def _moved(self, model: Model | None) -> tuple[Model, MovedScales] | None:
        """The reference, if scales of channels were moved since."""
        if self.reference is None or model is None or isinstance(self.checkpoint, GGUFCheckpoint):
            return None
        try:
            original = Model(self.reference)
        except FewbitsError:
            return None
        scales = MovedScales(original, model)
        return (original, scales) if scales.found else None

    def _beside(self, model: Model | None) -> None:
        checkpoint = self.checkpoint
        if isinstance(checkpoint, SafetensorsCheckpoint) and (self.path / beside.GRAPH).exists():
            if beside.has_onnx():
                self.faults += beside.graph_faults(self.path)
            else:
                self.notes.append(f"{beside.GRAPH} was not read: install fewbits[onnx]")
        unknown = beside.unknown_tokenizer(checkpoint)
        if unknown:
            self.notes.append(unknown)
        self.faults += beside.tokenizer_faults(checkpoint, None if self.quick or unknown else model)
