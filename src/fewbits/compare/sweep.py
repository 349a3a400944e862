"""Making the candidates of a sweep, one at a time, each just before it is measured."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fewbits import api
from fewbits.errors import FewbitsError
from fewbits.forward.clock import Clock
from fewbits.forward.streamed import Progress
from fewbits.plan.directory import is_directory_target
from fewbits.quantize.importances import CHUNKS, split_sources


@dataclass(frozen=True)
class Made:
    """A candidate that the sweep has made, and how long that took (without calibration that others share)."""

    path: Path
    seconds: float
    notes: list[str]


@dataclass
class Sweep:
    """What is to be made of one model.

    Attributes:
        name: of the reference, for the names of files.
        targets: presets of GGUF and directory targets, as `quantize` takes them.
        calibration: texts, or statistics for the GGUF targets; of texts the statistics are made once for all of these.
        folder: where the candidates lie.
        keep: whether they stay there; else each is removed after it is measured.
    """

    reference: Path
    name: str
    targets: Sequence[str]
    folder: Path
    keep: bool = False
    calibration: Sequence[Path] = ()
    calibration_chunks: int | None = None
    threads: int | None = None
    overwrite: bool = False
    progress: Progress | None = None
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.statistics, self.texts = split_sources(self.calibration)
        if len(set(self.targets)) != len(self.targets):
            raise FewbitsError("The sweep names a target twice.", "Leave one out.")

    def check(self) -> None:
        """Refuse, before any work, what would be refused later.

        Raises:
            FewbitsError: an unknown target, an output that exists, statistics that do not fit.
        """
        for target in self.targets:
            output = self.output(target)
            if output.exists() and not self.overwrite:
                raise FewbitsError(
                    f"{output}: exists already.", "Name it among the candidates instead, or pass --overwrite."
                )
            if is_directory_target(target):
                api.plan(self.reference, target, calibration=self.texts, calibration_chunks=self.calibration_chunks)
            else:
                api.plan(self.reference, target, calibration=self.statistics, output=output)

    def output(self, target: str) -> Path:
        """Where a target's files lie."""
        stem = re.sub(r"[^\w.+-]+", "-", f"{self.name}-{target}")
        return self.folder / (stem if is_directory_target(target) else f"{stem}.gguf")

    def make(self, target: str) -> Made:
        """Quantize. Raises FewbitsError as `fewbits.api.quantize` does."""
        output = self.output(target)
        directory = is_directory_target(target)
        calibration = self.texts if directory else self._statistics()
        started = time.perf_counter()
        with self.clock.step("quantize"):
            report = api.quantize(
                self.reference,
                target,
                output,
                calibration=calibration,
                calibration_chunks=self.calibration_chunks if directory and calibration else None,
                threads=self.threads,
                overwrite=self.overwrite,
                progress=self.progress,
            )
        return Made(output, time.perf_counter() - started, report.notes)

    def done(self, made: Made) -> None:
        """Remove a candidate that need not be kept."""
        if self.keep:
            return
        if made.path.is_dir():
            shutil.rmtree(made.path)
        else:
            made.path.unlink()

    def _statistics(self) -> list[Path]:
        """Statistics for GGUF targets: those that were named, and those of the texts, made once."""
        if not self.texts:
            return self.statistics
        file = self.folder / f"{self.name}.imatrix.gguf"
        if "calibrate" not in self.clock.seconds:
            from fewbits.calibration.run import calibrate  # imports torch, which data-free targets do without

            with self.clock.step("calibrate"):
                calibrate(
                    self.reference,
                    self.texts,
                    file,
                    chunks=self.calibration_chunks or CHUNKS,
                    merge=self.statistics,
                    threads=self.threads,
                    overwrite=self.overwrite,
                    progress=self.progress,
                )
        return [file]
