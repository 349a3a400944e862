"""The model card for GGUF files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from fewbits.checkpoint import GGUFCheckpoint, Model
from fewbits.formats.directory.card import CalibrationUsed, CardFacts, Snippet, model_card, origin_of
from fewbits.plan import PRESETS


def gguf_card(model: Model, name: str | None = None) -> bytes:
    """README.md for a repository with a GGUF file, from the file alone.

    Args:
        name: the repository, for the commands; None: the file.
    """
    checkpoint = model.checkpoint
    assert isinstance(checkpoint, GGUFCheckpoint)
    tensors = checkpoint.tensors.values()
    by_type: dict[str, int] = {}
    n_weights = 0
    for info in tensors:
        by_type[info.dtype] = by_type.get(info.dtype, 0) + info.nbytes
        n_weights += prod(info.shape)
    total = sum(by_type.values())
    storage = ", ".join(sorted(by_type, key=lambda kind: -by_type[kind]))
    target = _target(checkpoint.metadata, storage)
    facts = CardFacts(
        target=target,
        format="gguf",
        storage=storage,
        method=None,
        command=None,
        bits_per_weight=8 * total / max(n_weights, 1),
        size_before=2 * n_weights,
        size_after=total,
        library="gguf",
        calibration=_calibration(checkpoint.metadata),
        snippets=_snippets(checkpoint.path, name),
        notes=["The size before is that of the same weights in 16 bits."],
    )
    return model_card(origin_of(model), facts)


def _target(metadata: Mapping[str, Any], storage: str) -> str:
    number = metadata.get("general.file_type")
    named = next((p.name for p in PRESETS.values() if p.file_type is not None and p.file_type == number), None)
    return named or storage.split(",")[0]


def _calibration(metadata: Mapping[str, Any]) -> CalibrationUsed | None:
    """As `fewbits quantize` and llama-quantize tell it in the file."""
    told = metadata.get("quantize.imatrix.dataset")
    if not isinstance(told, str):
        return None
    words = told.split()
    names = [word for word in words if ":" not in word]
    digests = [word.partition(":")[2] for word in words if word.startswith("sha256:")]
    tokens = next((int(w[7:]) for w in words if w.startswith("tokens:") and w[7:].isdigit()), 0)
    chunks = metadata.get("quantize.imatrix.chunks_count", 0)
    files = [(name, digests[index] if index < len(digests) else "?") for index, name in enumerate(names)]
    return CalibrationUsed(files, tokens or 512 * int(chunks))


def _snippets(path: Path, name: str | None) -> list[Snippet]:
    file = shlex.quote(path.name)
    remote = f"-hf {name}" if name else f"-m {file}"
    ollama = f"ollama run hf.co/{name}" if name else f"fewbits export ollama {file} -o Modelfile"
    return [
        Snippet("llama.cpp", f"llama-server {remote}", "sh"),
        Snippet("Ollama", ollama, "sh"),
        Snippet("fewbits", f'fewbits run {file} "Why is the sky blue?" --chat', "sh"),
    ]
