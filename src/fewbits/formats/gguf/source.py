"""Any model seen as the tensors and metadata of a GGUF file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFValueType, GGUFWriter, Metadata

from fewbits import arch
from fewbits.checkpoint import GGUFCheckpoint, SafetensorsCheckpoint
from fewbits.checkpoint.gguf import SCALARS
from fewbits.errors import FewbitsError, about
from fewbits.plan import ModelFacts, SourceTensor, converted_dtype
from fewbits.tokenizer import gguf_tokenizer

DROPPED_KEYS = ("split.", "quantize.imatrix.")

ReadRows = Callable[[int, int], npt.NDArray[np.float32]]
ReadBytes = Callable[[int, int], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class GGUFSource:
    """What a GGUF of this model holds before any type is chosen.

    Attributes:
        tensors: name, row-major shape and the type that a plain conversion would give each.
        stored: the names whose stored bytes may be copied as they are, when their type stays.
        read: rows start:stop of a tensor seen as [prod(shape[:-1]), columns], float32.
        notes: where the engine computes something else than the original model does.
    """

    path: Path
    facts: ModelFacts
    metadata: dict[str, Any]
    tensors: list[SourceTensor]
    stored: dict[str, ReadBytes]
    read: dict[str, ReadRows]
    notes: list[str] = field(default_factory=list)


def gguf_source(checkpoint: SafetensorsCheckpoint | GGUFCheckpoint, pre_tokenizer: str | None = None) -> GGUFSource:
    """Headers only; no weight is read.

    Args:
        pre_tokenizer: llama.cpp's name of the pre-tokenizer where it is not recognized by itself.

    Raises:
        FewbitsError: unknown architecture or tensor, missing or unknown tokenizer.
    """
    with about(checkpoint.path):
        if isinstance(checkpoint, GGUFCheckpoint):
            return _from_gguf(checkpoint)
        return _from_directory(checkpoint, pre_tokenizer)


def _from_directory(checkpoint: SafetensorsCheckpoint, pre_tokenizer: str | None) -> GGUFSource:
    config = checkpoint.config
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    views = arch.gguf_tensors(config, shapes)
    metadata = arch.gguf_metadata(config)
    arch.check_shapes(metadata, views)
    name = str(metadata["general.architecture"])
    metadata |= _authorship(checkpoint.path, name, sum(prod(shape) for shape in shapes.values()))
    metadata |= gguf_tokenizer(checkpoint.path, config, pre_tokenizer)
    tensors: list[SourceTensor] = []
    read: dict[str, ReadRows] = {}
    for view in views:
        stored = checkpoint.tensors[view.sources[0]].dtype if view.sources else "F32"
        tensors.append(SourceTensor(view.name, view.shape, converted_dtype(view.name, view.shape, stored, name)))
        read[view.name] = partial(view.read, checkpoint.read)
    facts, notes = ModelFacts.from_metadata(metadata), arch.gguf_notes(config)
    return GGUFSource(checkpoint.path, facts, metadata, tensors, {}, read, notes)


def _from_gguf(checkpoint: GGUFCheckpoint) -> GGUFSource:
    metadata = {key: value for key, value in checkpoint.metadata.items() if not key.startswith(DROPPED_KEYS)}
    if metadata.get("general.type", "model") != "model":
        raise FewbitsError(f"{checkpoint.path}: holds a {metadata['general.type']}, not a model.")
    if not checkpoint.tensors:
        raise FewbitsError(f"{checkpoint.path}: holds no tensors.", "Fetch the file again.")
    tensors = [SourceTensor(name, info.shape, info.dtype) for name, info in checkpoint.tensors.items()]
    stored: dict[str, ReadBytes] = {name: partial(checkpoint.raw, name) for name in checkpoint.tensors}
    read: dict[str, ReadRows] = {name: partial(checkpoint.lines, name) for name in checkpoint.tensors}
    return GGUFSource(checkpoint.path, ModelFacts.from_metadata(metadata), metadata, tensors, stored, read)


def _authorship(path: Path, arch_name: str, n_weights: int) -> dict[str, Any]:
    """Name, license and origin, as the official converter derives them from model card and folder name."""
    logging.getLogger("metadata").setLevel(logging.ERROR)
    writer = GGUFWriter(None, arch_name)
    try:
        Metadata.load(model_path=path, total_params=n_weights).set_gguf_meta_model(writer)
    except Exception as error:  # a malformed model card must not stop the conversion; its YAML can fail in any way
        logging.getLogger(__name__).warning("%s: no authorship taken from the model card (%s)", path, error)
    values: dict[str, Any] = {"general.type": "model"}
    for key, item in writer.kv_data[0].items():
        if item.type == GGUFValueType.ARRAY:
            values[key] = [str(v) for v in item.value]
        elif item.type in SCALARS:
            values[key] = SCALARS[item.type].type(item.value)
        else:
            values[key] = str(item.value)
    return values
