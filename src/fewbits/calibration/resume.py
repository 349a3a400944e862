"""The state of an unfinished calibration, kept beside its output so that the next start goes on from there."""

from __future__ import annotations

import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fewbits.calibration.statistics import TensorStatistics
from fewbits.errors import FewbitsError

OURS = re.compile(r"identity|\.new|after-\d+")
SAVE_EVERY = 30.0
"""Seconds of work between two states: what an interruption costs at most, beside the block it falls into."""
SAVING_SHARE = 0.05
"""Where a state takes long to write, the next one waits until writing takes no more than this share of the time."""


@dataclass
class WorkFolder:
    """`<output>.partial/`: the live activations and the statistics after some block, whole or not there.

    Attributes:
        identity: of model, text and arguments; a state of another identity is not used.
        problem: why no state could be written, if so.
    """

    path: Path
    identity: str
    problem: str = ""
    _saved: float = field(default_factory=time.monotonic)
    _wait: float = 0.0

    def check(self, overwrite: bool) -> None:
        """Raises:
        FewbitsError: there is a state of another run, without `overwrite`.
        """
        if not self.path.exists():
            return
        try:
            found = (self.path / "identity").read_text()
        except OSError:
            found = ""
        if found == self.identity:
            return
        if not self.path.is_dir():
            raise FewbitsError(f"{self.path}: it is in the way of what an unfinished calibration keeps.", "Move it.")
        if not found and any(not OURS.fullmatch(entry.name) for entry in self.path.iterdir()):
            raise FewbitsError(f"{self.path}: it is in the way of what an unfinished calibration keeps.", "Move it.")
        if found and not overwrite:
            raise FewbitsError(
                f"{self.path}: an unfinished calibration with another model, text or options.",
                "Repeat it with the same, or pass --overwrite to begin anew.",
            )
        shutil.rmtree(self.path)

    def load(self, hidden: torch.Tensor) -> tuple[int, dict[str, TensorStatistics]]:
        """Restore the activations in place.

        Returns:
            How many blocks are done, and their statistics: (0, {}) without a usable state.
        """
        for state in sorted(self.path.glob("after-*"), reverse=True):
            try:
                live = np.load(state / "hidden.npy", mmap_mode="r", allow_pickle=False)
                if live.shape != tuple(hidden.shape) or live.dtype != np.float32:
                    continue
                arrays = load_file(state / "statistics.safetensors")
                names = [name.removesuffix(".sums") for name in arrays if name.endswith(".sums")]
                tensors = {n: TensorStatistics(arrays[f"{n}.sums"], arrays[f"{n}.counts"]) for n in names}
                hidden.numpy()[...] = live
            except (OSError, ValueError, KeyError, EOFError, SafetensorError):
                continue
            return int(state.name.removeprefix("after-")), tensors
        return 0, {}

    def save_if_due(self, blocks: int, hidden: torch.Tensor, tensors: dict[str, TensorStatistics]) -> None:
        """Keep the state after so many blocks, if the last one is old enough. Failing to is no error."""
        now = time.monotonic()
        if self.problem or now - self._saved < max(SAVE_EVERY, self._wait):
            return
        fresh = self.path / ".new"
        state = self.path / f"after-{blocks:05}"
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            (self.path / "identity").write_text(self.identity)
            np.save(fresh / "hidden.npy", hidden.numpy())
            arrays = {f"{name}.sums": tensor.sums for name, tensor in tensors.items()}
            arrays |= {f"{name}.counts": tensor.counts for name, tensor in tensors.items()}
            save_file(arrays, fresh / "statistics.safetensors")
            for file in fresh.iterdir():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            shutil.rmtree(state, ignore_errors=True)
            os.replace(fresh, state)
            for older in self.path.glob("after-*"):
                if older != state:
                    shutil.rmtree(older)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(fresh, ignore_errors=True)
            self.problem = f"the state could not be kept ({error}): an interruption means beginning anew"
        self._saved = time.monotonic()
        self._wait = (self._saved - now) / SAVING_SHARE

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
