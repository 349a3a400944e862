"""Which model it is, told from its files without reading all of them."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fewbits.checkpoint import Model

SAMPLES, SAMPLE_BYTES = 64, 4096


def fingerprint(model: Model) -> str:
    """Identity of a model's weights: config, headers, and of each file its size, time of change and byte samples.

    The whole of a large model is not hashed, which would take longer than a short measurement.
    """
    digest = hashlib.sha256(json.dumps(model.config, sort_keys=True, default=str).encode())
    infos = sorted(model.checkpoint.tensors.values(), key=lambda info: info.name)
    for info in infos:
        digest.update(f"{info.name} {info.shape} {info.dtype} {info.file.name} {info.offset}".encode())
    for file in sorted({info.file for info in infos}):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
        with open(file, "rb") as stream:
            for at in np.linspace(0, max(0, status.st_size - SAMPLE_BYTES), SAMPLES).astype(np.int64):
                stream.seek(int(at))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
