"""Which model it is, told from its files without reading all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fewbits.checkpoint import Checkpoint, Model

SAMPLES, SAMPLE_BYTES = 64, 4096


def fingerprint(model: Model) -> str:
    """Identity of a model's weights: its facts and the configuration as transformers understands it."""
    facts = [json.dumps(value, sort_keys=True, default=str) for value in (model.config, model_facts(model.checkpoint))]
    return hashlib.sha256(" ".join(facts).encode()).hexdigest()


def model_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the headers and the configuration of a model say, and the facts of its files.

    The whole of a large model is not hashed, which would take longer than a short measurement.
    """
    digest = hashlib.sha256()
    infos = sorted(checkpoint.tensors.values(), key=lambda info: info.name)
    for info in infos:
        digest.update(f"{info.name} {info.shape} {info.dtype} {info.file.name} {info.offset}".encode())
    config = getattr(checkpoint, "config", None)  # a GGUF file holds its own
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    return {"headers": f"digest:{digest.hexdigest()}", **file_facts({info.file for info in infos})}


def file_facts(files: Iterable[Path]) -> dict[str, Any]:
    """Of each file, by name: its size, when it was written, and a digest of samples of its bytes."""
    facts = {}
    for file in sorted(files):
        status = file.stat()
        digest = hashlib.sha256()
        with open(file, "rb") as stream:
            for at in np.linspace(0, max(0, status.st_size - SAMPLE_BYTES), SAMPLES).astype(np.int64):
                stream.seek(int(at))
                digest.update(stream.read(SAMPLE_BYTES))
        written = datetime.fromtimestamp(status.st_mtime_ns / 1e9, UTC).isoformat()
        facts[file.name] = {"bytes": status.st_size, "written": written, "content": f"digest:{digest.hexdigest()}"}
    return facts


def digests(files: Iterable[Path]) -> dict[str, str]:
    """Of small files, by name: a digest of all of their bytes."""
    found = {}
    for file in files:
        with open(file, "rb") as stream:
            found[file.name] = f"digest:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
    return found
