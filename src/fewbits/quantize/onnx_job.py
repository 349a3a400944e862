"""What an ONNX directory has beside its weights: the graph that refers to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fewbits import arch
from fewbits.checkpoint import Model
from fewbits.codecs import codec
from fewbits.errors import FewbitsError
from fewbits.formats.directory.writer import DirectoryWriter
from fewbits.formats.onnx.graph import Place, Weight, assemble
from fewbits.formats.onnx.skeleton import Skeleton
from fewbits.layouts import Layout, Part
from fewbits.layouts.onnx import ONNX
from fewbits.plan import Plan
from fewbits.plan.directory import HEAD_WEIGHT, Target


def graph_files(
    skeleton: Skeleton, plan: Plan, model: Model, target: Target, writer: DirectoryWriter
) -> Mapping[str, bytes]:
    """The graph's files, once all weights are written.

    Raises:
        FewbitsError: a weight of the graph is not in the plan, or is used in a way that is not known.
    """
    places = {
        name: Place(file, offset, Part(entry.dtype, entry.shape)) for name, (file, entry, offset) in writer.places()
    }
    level = _onnx(target.layout).accuracy_level
    weights: dict[str, Weight] = {}
    for tensor in plan.tensors:
        if len(tensor.shape) != 2:
            continue
        plain = tensor.method in ("copy", "convert")
        layout = None if plain else replace(_onnx(target.layout_of(tensor.codec)), accuracy_level=level)
        stored = tensor.name if plain else tensor.name.removesuffix(".weight")
        weights[tensor.name] = Weight(stored, (tensor.shape[0], tensor.shape[1]), layout)
    if HEAD_WEIGHT not in weights:
        source = arch.head_source(model.config, {name: model.shape(name) for name in model.names})
        weights[HEAD_WEIGHT] = weights[source]

    def read_vector(name: str) -> npt.NDArray[np.float32]:
        if name not in places:
            raise FewbitsError(f"{model.path}: the graph wants {name!r}, which the model has not.")
        part = places[name].part
        return codec(part.dtype).decode(writer.stored(name).reshape(1, -1)).reshape(part.shape)

    return assemble(skeleton, weights, places, read_vector)


def without_nulls(config: bytes) -> bytes:
    """A tokenizer_config.json whose keys all have values: onnxruntime-genai 0.18 refuses `"chat_template": null`."""
    values = {key: value for key, value in json.loads(config).items() if value is not None}
    return json.dumps(values, indent=2).encode() + b"\n"


def _onnx(layout: Layout) -> ONNX:
    assert isinstance(layout, ONNX)
    return layout
