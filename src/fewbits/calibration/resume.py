"""The state of an unfinished calibration, kept in its work folder so that the next start goes on from there."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fewbits.calibration.statistics import TensorStatistics
from fewbits.formats.journal import Pace, checksum, sync

HIDDEN, STATISTICS, FOUND, SUMS = "hidden.npy", "statistics.safetensors", "found.json", "checksums.json"


@dataclass
class Activations:
    """The windows' activations, and the statistics, after some block: whole or not there.

    Attributes:
        path: a folder for them.
        problem: why no state could be written, if so.
        found: what else was found out about the blocks that are done, as JSON has it.
    """

    path: Path
    problem: str = ""
    found: Any = None
    _pace: Pace = field(default_factory=Pace)

    def load(self, hidden: torch.Tensor) -> tuple[int, dict[str, TensorStatistics]]:
        """Restore the activations in place.

        Returns:
            How many blocks are done, and their statistics: (0, {}) without a usable state.
        """
        for state in sorted(self.path.glob("after-*"), reverse=True):
            try:
                sums = json.loads((state / SUMS).read_bytes())
                if sums != _sums(state):
                    continue
                live = np.load(state / HIDDEN, mmap_mode="r", allow_pickle=False)
                if live.shape != tuple(hidden.shape) or live.dtype != np.float32:
                    continue
                arrays = load_file(state / STATISTICS)
                names = [name.removesuffix(".sums") for name in arrays if name.endswith(".sums")]
                tensors = {n: TensorStatistics(arrays[f"{n}.sums"], arrays[f"{n}.counts"]) for n in names}
                found = json.loads((state / FOUND).read_bytes())
                hidden.numpy()[...] = live
            except (OSError, ValueError, KeyError, EOFError, SafetensorError):
                continue
            self.found = found
            return int(state.name.removeprefix("after-")), tensors
        return 0, {}

    def due(self) -> bool:
        """Whether the last state is old enough."""
        return not self.problem and self._pace.due()

    def save(
        self, blocks: int, hidden: torch.Tensor, tensors: dict[str, TensorStatistics] | None = None, found: Any = None
    ) -> None:
        """Keep the state after so many blocks. Failing to is no error."""
        started = time.monotonic()
        fresh = self.path / ".new"
        state = self.path / f"after-{blocks:05}"
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            np.save(fresh / HIDDEN, hidden.numpy())
            arrays = {f"{name}.sums": tensor.sums for name, tensor in (tensors or {}).items()}
            arrays |= {f"{name}.counts": tensor.counts for name, tensor in (tensors or {}).items()}
            save_file(arrays, fresh / STATISTICS)
            (fresh / FOUND).write_text(json.dumps(found))
            (fresh / SUMS).write_text(json.dumps(_sums(fresh)))
            for file in fresh.iterdir():
                sync(file)
            sync(fresh)
            shutil.rmtree(state, ignore_errors=True)
            os.replace(fresh, state)
            sync(self.path)
            for older in self.path.glob("after-*"):
                if older != state:
                    shutil.rmtree(older)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(fresh, ignore_errors=True)
            self.problem = f"the state could not be kept ({error}): an interruption means beginning anew"
        self._pace.took(started)


def _sums(state: Path) -> dict[str, int | None]:
    return {name: checksum(state / name) for name in (HIDDEN, STATISTICS, FOUND)}
