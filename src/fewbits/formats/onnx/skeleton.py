"""The graph of a model without its weights, made by onnxruntime-genai's model builder in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fewbits.errors import FewbitsError

NEEDED = {"onnx": "onnx", "onnx_ir": "onnx-ir", "onnxruntime_genai": "onnxruntime-genai"}
"""Modules, and the packages that bring them."""
PROCESS = "fewbits.formats.onnx.builder_process"


@dataclass(frozen=True)
class Rows:
    """An initializer that is rows of a matrix.

    Attributes:
        source: name of the matrix as transformers has it, [out, in].
        turned: whether the graph wants them as [in, rows].
    """

    source: str
    start: int
    stop: int
    turned: bool


@dataclass(frozen=True)
class Vector:
    """An initializer that is a vector, and what is added to it."""

    source: str
    plus: float


@dataclass(frozen=True)
class Skeleton:
    """A graph without weights.

    Attributes:
        graph: an ONNX model; the initializers that `rows` and `vectors` name are missing.
        genai_config: what onnxruntime-genai wants to know of it, JSON.
    """

    graph: bytes
    rows: Mapping[str, Rows]
    vectors: Mapping[str, Vector]
    genai_config: bytes


def check_installed(target: str) -> None:
    """Refuse a target that something is missing for.

    Raises:
        FewbitsError: says what to install.
    """
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise FewbitsError(
            f"{target}: making ONNX models needs {', '.join(missing)}.", "Install it: pip install 'fewbits[onnx]'."
        )


def make_skeleton(files: Mapping[str, bytes], target: str) -> Skeleton:
    """Have the graph built.

    Args:
        files: config.json, the tokenizer's files and generation_config.json, by name.
        target: as the user named it.

    Raises:
        FewbitsError: a package is missing, or the builder does not know the model or does something to its weights
            that cannot be followed.
    """
    check_installed(target)
    with tempfile.TemporaryDirectory(prefix="fewbits-onnx-") as name:
        folder = Path(name)
        for file, data in files.items():
            if "/" not in file and file.endswith((".json", ".model", ".jinja", ".txt")):
                (folder / file).write_bytes(data)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", PROCESS, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
        built = folder / "built"
        if done.returncode or not (built / "weights.json").is_file():
            lines = [line.replace(name, "this") for line in done.stderr.splitlines() if line.strip()]
            reason = lines[-1] if lines else f"it ended with {done.returncode}"
            raise FewbitsError(
                f"{target}: onnxruntime-genai's model builder does not make it ({reason}).",
                "Take another target, e.g. Q4_K_M.",
            )
        told = json.loads((built / "weights.json").read_bytes())
        rows = {name: Rows(**found) for name, found in told["weights"].items() if "start" in found}
        vectors = {name: Vector(**found) for name, found in told["weights"].items() if "plus" in found}
        _check_whole(told["matrices"], told["vectors"], rows, vectors, target)
        return Skeleton((built / "graph.onnx").read_bytes(), rows, vectors, (built / "genai_config.json").read_bytes())


def _check_whole(
    matrices: Mapping[str, int],
    small: list[str],
    rows: Mapping[str, Rows],
    vectors: Mapping[str, Vector],
    target: str,
) -> None:
    """Every weight of the model stands in the graph, whole."""
    seen = {vector.source for vector in vectors.values()}
    lost = [name for name in small if name not in seen]
    for name, count in matrices.items():
        parts = sorted({(part.start, part.stop) for part in rows.values() if part.source == name})
        ends = [0, *(stop for _, stop in parts)]
        if not parts or ends[-1] != count or any(start != end for (start, _), end in zip(parts, ends, strict=False)):
            lost.append(name)
    if lost:
        raise FewbitsError(
            f"{target}: in the graph that onnxruntime-genai builds {lost[0]} is not found again.",
            "Take another target, e.g. Q4_K_M.",
        )
