"""What stands beside the tensors: configuration, tokenizer, the graph of an ONNX model, recorded hashes."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fewbits import arch
from fewbits.checkpoint import GGUFCheckpoint, Model, SafetensorsCheckpoint
from fewbits.checkpoint.base import check_regular
from fewbits.errors import FewbitsError
from fewbits.tokenizer.from_gguf import MODELS
from fewbits.tokenizer.pretokenizers import BY_NAME
from fewbits.verify.report import CheckedFile, Fault

READ_BYTES = 1 << 22
SHA256 = re.compile(r"[0-9a-f]{64}")
GRAPH = "model.onnx"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
EMBEDDINGS = ("token_embd.weight", "model.embed_tokens.weight", "transformer.wte.weight", "wte.weight")
PER_TOKEN = ("tokenizer.ggml.token_type", "tokenizer.ggml.scores")


def check_configuration(model: Model) -> list[str]:
    """Compare the tensors' names and shapes with the configuration.

    Returns:
        Notes on what could not be checked.

    Raises:
        FewbitsError: names the tensor, with both shapes.
    """
    checkpoint = model.checkpoint
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    if isinstance(checkpoint, GGUFCheckpoint):  # its names were checked in opening the model
        views = [arch.GGUFTensor(name, shape, ()) for name, shape in shapes.items()]
    else:
        views = arch.gguf_tensors(checkpoint.config, shapes)
    try:
        metadata = arch.gguf_metadata(model.config)
    except FewbitsError as error:  # llama.cpp cannot run it: that is no fault of the files
        return [f"the tensors' sizes were not compared with the configuration ({error.message})"]
    arch.check_shapes(metadata, views)
    return []


def vocabulary_of(checkpoint: SafetensorsCheckpoint | GGUFCheckpoint) -> int | None:
    """Rows of the embeddings; None where they are not found."""
    for name in EMBEDDINGS:
        if name in checkpoint.tensors and checkpoint.tensors[name].shape:
            return checkpoint.tensors[name].shape[0]
    return None


def tokenizer_faults(checkpoint: SafetensorsCheckpoint | GGUFCheckpoint, model: Model | None) -> Iterator[Fault]:
    """A tokenizer that is missing, that cannot be loaded, or that has more tokens than the embeddings have rows.

    Args:
        model: whose tokenizer is to be loaded; None leaves it at looking for it.
    """
    rows = vocabulary_of(checkpoint)
    if isinstance(checkpoint, GGUFCheckpoint):
        yield from _gguf_vocabulary(checkpoint.metadata, rows)
    elif not any((checkpoint.path / name).is_file() for name in VOCABULARIES):
        yield Fault(where="tokenizer", problem=f"there is none; looked for {', '.join(VOCABULARIES)}")
        return
    if model is None:
        return
    try:
        tokenizer = model.tokenizer()
    except FewbitsError as error:
        yield Fault(where="tokenizer", problem=error.message)
        return
    if rows is not None and len(tokenizer) > rows:
        yield Fault(where="tokenizer", problem=f"has {len(tokenizer)} tokens, the embeddings have {rows} rows")


def unknown_tokenizer(checkpoint: SafetensorsCheckpoint | GGUFCheckpoint) -> str:
    """Why a GGUF file's tokenizer cannot be loaded though nothing may be wrong with it; empty where it can."""
    if isinstance(checkpoint, GGUFCheckpoint):
        kind, pre = (str(checkpoint.metadata.get(f"tokenizer.ggml.{key}", "")) for key in ("model", "pre"))
        if kind not in MODELS:
            return f"a tokenizer of the kind {kind[:80]!r} is not known: it was not loaded"
        if kind == "gpt2" and pre and pre not in BY_NAME:
            return f"the pre-tokenizer {pre[:80]!r} is not known: the tokenizer was not loaded"
    return ""


def _gguf_vocabulary(metadata: Mapping[str, Any], rows: int | None) -> Iterator[Fault]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        yield Fault(where="tokenizer", problem="there is no tokenizer.ggml.tokens")
        return
    if rows is not None and len(tokens) != rows:
        yield Fault(where="tokenizer", problem=f"has {len(tokens)} tokens, the embeddings have {rows} rows")
    for key in PER_TOKEN:
        if key in metadata and (not hasattr(metadata[key], "__len__") or len(metadata[key]) != len(tokens)):
            yield Fault(where="tokenizer", problem=f"{key} has not one entry for each of {len(tokens)} tokens")
    for key, value in metadata.items():
        wanted = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        # llama.cpp reads -1 as "none"
        if wanted and not (isinstance(value, int | np.integer) and -1 <= value < len(tokens)):
            yield Fault(where="tokenizer", problem=f"{key} is {str(value)[:80]}, there are {len(tokens)} tokens")


def graph_faults(folder: Path) -> Iterator[Fault]:
    """Weights of an ONNX graph that lie elsewhere than in the files beside it."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    check_regular(folder / GRAPH)
    try:
        graph = onnx.load_model(folder / GRAPH, load_external_data=False).graph
    except (DecodeError, ValueError, RecursionError) as error:
        yield Fault(where=GRAPH, problem=f"not an ONNX graph ({error})")
        return
    for tensor in graph.initializer:
        told = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        try:
            name, start, length = told["location"], int(told.get("offset", 0)), int(told.get("length", 0))
        except (KeyError, ValueError):
            yield Fault(where=GRAPH, problem=f"{tensor.name[:200]} does not say where it lies")
            continue
        if Path(name).name != name or not (folder / name).is_file():
            yield Fault(where=GRAPH, problem=f"{tensor.name[:200]} lies in {name[:200]!r}, which is not beside it")
        elif start < 0 or length < 0 or start + length > (folder / name).stat().st_size:
            yield Fault(where=GRAPH, problem=f"{tensor.name[:200]} lies beyond the end of {name}")


def has_onnx() -> bool:
    return importlib.util.find_spec("onnx") is not None


def hashed(file: Path, name: str, recorded: Mapping[str, tuple[str, str]]) -> tuple[CheckedFile, Fault | None]:
    """Size and SHA-256 of a file, compared with what is recorded of it.

    Args:
        recorded: by name: the hash and where it was found.
    """
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(READ_BYTES):
            digest.update(chunk)
    found = digest.hexdigest()
    wanted, where = recorded.get(name, ("", None))
    fault = None
    if where is not None and wanted != found:
        fault = Fault(where=name, problem=f"its SHA-256 is {found}, {where} says {wanted}")
    return CheckedFile(name=name, size=file.stat().st_size, sha256=found, recorded=where), fault


def recorded_hashes(path: Path, files: Sequence[Path]) -> dict[str, tuple[str, str]]:
    """Hashes of a model's files that somebody noted down: `PATH.sha256` in the format of sha256sum, and what the hub's
    cache names its files by.

    Returns:
        By name, as `names` gives it: the hash and where it stands.
    """
    found: dict[str, tuple[str, str]] = {}
    for file in files:
        target = Path(os.path.realpath(file))
        told = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
        if target.parent.name == "blobs" and SHA256.fullmatch(target.name):
            found[name_of(path, file)] = (target.name, "the hub's cache")
        elif told.is_file() and told.stat().st_size < READ_BYTES:
            tags = [line for line in told.read_text(errors="replace").splitlines() if SHA256.fullmatch(line)]
            found |= {name_of(path, file): (tag, "the hub's metadata") for tag in tags}
    sums = sums_file(path)
    if sums.is_file():
        check_regular(sums)
        for line in sums.read_text(errors="replace").splitlines():
            digest, _, name = line.partition(" ")
            if SHA256.fullmatch(digest):
                found[name.lstrip(" *")] = (digest, sums.name)
    return found


def sums_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def name_of(path: Path, file: Path) -> str:
    """A file's name relative to the folder that holds the model."""
    return f"{path.name}/{file.name}" if path.is_dir() else file.name
