"""The reference's answers, kept on disk so that many quantizations are measured against one forward pass.

Kept are the normed hidden states of the scored positions, not logits: 100 times smaller for usual vocabularies, and
exact, since the head is read from the reference model again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fewbits.measure.windows import Windows
from fewbits.version import __version__

if TYPE_CHECKING:
    pass

LAYOUT = 1
"""Raised when what is stored, or how it is computed, changes."""


def default_cache() -> Path:
    """$XDG_CACHE_HOME/fewbits, or ~/.cache/fewbits."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewbits"


@dataclass(frozen=True)
class ReferenceStore:
    """One folder per (reference, windows) below a cache folder; with folder None nothing is kept.

    Entries appear whole or not at all; a damaged one counts as absent. Failing to write (read-only cache, full disk)
    is no error: the measurement goes on without.
    """

    folder: Path | None

    def entry(self, model_fingerprint: str, windows: Windows) -> Path | None:
        """Where the answers to these windows lie or would lie."""
        if self.folder is None:
            return None
        key = f"{LAYOUT} {__version__} {model_fingerprint} {windows.digest}"
        return self.folder / "reference" / hashlib.sha256(key.encode()).hexdigest()[:32]

    def load(self, entry: Path | None, windows: Windows) -> npt.NDArray[np.float32] | None:
        """Hidden states [n_windows, scored, hidden], mapped from disk; None if absent or damaged."""
        if entry is None:
            return None
        try:
            states = np.load(entry / "hidden.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        whole = states.ndim == 3 and states.shape[:2] == windows.targets.shape and states.dtype == np.float32
        return states if whole else None

    def save(self, entry: Path | None, states: npt.NDArray[np.float32], provenance: dict[str, Any]) -> bool:
        """Keep hidden states with a note of where they come from; True if they are kept."""
        if entry is None:
            return False
        partial: Path | None = None
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=entry.parent))
            np.save(partial / "hidden.npy", states)
            (partial / "provenance.json").write_text(json.dumps(provenance, indent=1))
            if entry.exists():  # damaged, or another process was faster
                shutil.rmtree(entry)
            os.replace(partial, entry)
        except OSError:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            return False
        return True

    def load_note(self, entry: Path | None, name: str) -> dict[str, Any] | None:
        """A small JSON result kept beside the states."""
        try:
            found = json.loads((entry / f"{name}.json").read_text()) if entry is not None else None
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def save_note(self, entry: Path | None, name: str, value: dict[str, Any]) -> None:
        if entry is None or not entry.is_dir():
            return
        partial = entry / f".{name}.{os.getpid()}"
        try:
            partial.write_text(json.dumps(value))
            os.replace(partial, entry / f"{name}.json")
        except OSError:
            partial.unlink(missing_ok=True)
