"""What a candidate's files tell of themselves."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from math import prod
from pathlib import Path

from gguf import LlamaFileType

from fewbits.checkpoint import GGUFCheckpoint, Model
from fewbits.checkpoint.safetensors import PROVENANCE, read_json
from fewbits.codecs import CODECS
from fewbits.compare.tensors import place, stored_bits
from fewbits.errors import FewbitsError
from fewbits.layouts.engines import engines_of
from fewbits.report.schema import FileUsed

ANY_PRESET = "Q4_K_M"
"""Stands for every GGUF where engines are asked for: they load all of its types."""
FLOATS = ("F32", "F16", "BF16")
READ_BYTES = 1 << 22


def format_of(model: Model) -> str:
    """`GGUF`, what a directory's configuration calls its quantization, or `safetensors`."""
    if isinstance(model.checkpoint, GGUFCheckpoint):
        return "GGUF"
    settings = model.config.get("quantization_config") or model.config.get("compression_config") or {}
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return str(method) if method else "safetensors"


def family_of(model: Model) -> str:
    """The kind of storage that a file is named for, or that most of its block matrices have."""
    if isinstance(model.checkpoint, GGUFCheckpoint):
        preset = _preset(model.checkpoint)
        if preset:
            return _gguf_family(preset)
    weights: Counter[str] = Counter()
    for name in model.names:
        shape = model.shape(name)
        if len(shape) == 2 and place(name)[0] is not None:
            weights[model.dtype(name)] += prod(shape)
    main = weights.most_common(1)[0][0] if weights else ""
    if main in FLOATS:
        return "unquantized"
    if not isinstance(model.checkpoint, GGUFCheckpoint):
        return {"gptq": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "fp8": "FP8"}.get(format_of(model), format_of(model))
    return _gguf_family(main)


def _preset(checkpoint: GGUFCheckpoint) -> str | None:
    """What `general.file_type` says, e.g. `Q4_K_M`."""
    try:
        return LlamaFileType(int(checkpoint.metadata["general.file_type"])).name.removeprefix("MOSTLY_")
    except (KeyError, ValueError, TypeError):
        return None


def _gguf_family(name: str) -> str:
    if name.startswith("IQ"):
        return "i-quants"
    if "_K" in name:
        return "K-quants"
    if name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        return "legacy types"
    return "unquantized" if name.endswith(FLOATS) else "other GGUF types"


def target_of(model: Model) -> str | None:
    """What a directory of our own was made for; None where the files do not tell."""
    file = model.path / PROVENANCE
    if not file.is_file():
        return None
    target = read_json(file).get("target")
    return str(target)[:80] if isinstance(target, str) else None


def engines(model: Model, target: str | None) -> list[str]:
    """The engines that load it, as seen or read: name and hardware."""
    if isinstance(model.checkpoint, GGUFCheckpoint):
        target = ANY_PRESET
    facts = engines_of(target) if target else []
    found = [f"{fact.engine} ({fact.hardware})" for fact in facts if fact.verdict == "runs"]
    return found + [f"{f.engine} ({f.hardware}, not tried)" for f in facts if f.verdict == "should run"]


def weight_files(model: Model) -> list[Path]:
    """The files that hold its tensors."""
    return sorted({info.file for info in model.checkpoint.tensors.values()})


def hashed(files: Sequence[Path]) -> list[FileUsed]:
    """Size and SHA-256 of each file."""
    found = []
    for file in files:
        digest = hashlib.sha256()
        with open(file, "rb") as stream:
            while chunk := stream.read(READ_BYTES):
                digest.update(chunk)
        found.append(FileUsed(name=file.name, size=file.stat().st_size, sha256=digest.hexdigest()))
    return found


def bits_per_weight(model: Model) -> tuple[float, float | None]:
    """Over all weights, and over the matrices of the decoder blocks alone (None if there are none)."""
    tensors = model.checkpoint.tensors.values()
    total = 8 * sum(info.nbytes for info in tensors) / max(1, sum(prod(info.shape) for info in tensors))
    bits = count = 0.0
    for name in model.names:
        if len(model.shape(name)) == 2 and place(name)[0] is not None:
            weights = prod(model.shape(name))
            bits += stored_bits(model, name) * weights
            count += weights
    return total, bits / count if count else None


def stored_as(model: Model) -> str:
    """The storage types of most bytes, at most three."""
    nbytes: Counter[str] = Counter()
    for info in model.checkpoint.tensors.values():
        nbytes[info.dtype] += info.nbytes
    return ", ".join(name for name, _ in nbytes.most_common(3))


def labels(paths: Sequence[Path]) -> list[str]:
    """Short unique names: what file and folder names do not have in common.

    Raises:
        FewbitsError: a path stands there twice.
    """
    if len({path.resolve() for path in paths}) != len(paths):
        raise FewbitsError("A candidate is named twice.", "Leave one out.")
    stems = [path.name.removesuffix(".gguf") for path in paths]
    if len(set(stems)) != len(stems):
        stems = [f"{path.parent.name}/{stem}" for path, stem in zip(paths, stems, strict=True)]
    if len(set(stems)) != len(stems):
        stems = [str(path) for path in paths]
    # cut at a separator only: of Q4_K_M and Q4_K_S nothing may go
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*stems, strict=False)) if len(stems) > 1 else ()
    common = "".join(letters[0] for letters in alike)
    cut = max(common.rfind(mark) for mark in ".-/") + 1
    short = [stem[cut:] for stem in stems]
    for i, stem in enumerate(short):
        known = max((name for name in CODECS if stem.upper().endswith(name)), key=len, default="")
        if len(short) == 1 and known:
            short[i] = stem[-len(known) :]
    return short if all(short) else stems
