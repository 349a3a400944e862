"""Weights put into a graph: every matrix by the operator of its layout, its data by reference to safetensors files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from fewbits.errors import FewbitsError
from fewbits.formats.onnx.skeleton import Rows, Skeleton
from fewbits.layouts.base import ITEM_BYTES, Part
from fewbits.layouts.onnx import DYNAMIC_ZERO, ONNX

GRAPH, CONSTANTS = "model.onnx", "model.onnx.data"
INLINE_BYTES = 1 << 16
"""Constants that are larger, such as tables of cosines, get a file beside the graph."""
CONTRIB = "com.microsoft"
PLAIN = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Place:
    """Where a stored tensor lies: file beside the graph, offset in bytes, type by safetensors' name, shape."""

    file: str
    offset: int
    part: Part


@dataclass(frozen=True)
class Weight:
    """A matrix as it is stored.

    Attributes:
        name: of the tensor; of a quantized matrix, of its module.
        layout: None where it is plain.
    """

    name: str
    shape: tuple[int, int]
    layout: ONNX | None


def assemble(
    skeleton: Skeleton,
    weights: Mapping[str, Weight],
    places: Mapping[str, Place],
    read_vector: Callable[[str], npt.NDArray[np.float32]],
) -> dict[str, bytes]:
    """The finished graph.

    Args:
        weights: every matrix of the model by its name as transformers has it.
        places: every stored tensor by name.
        read_vector: the values of an unquantized vector, float32.

    Returns:
        The files of the graph by name: model.onnx, and model.onnx.data where there are large constants.

    Raises:
        FewbitsError: the graph uses a weight in a way that is not known.
    """
    import onnx

    model = onnx.ModelProto.FromString(skeleton.graph)
    graph = model.graph
    for name, vector in skeleton.vectors.items():
        values = read_vector(vector.source) + np.float32(vector.plus)
        graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    surgeon = _Surgeon(weights, places)
    nodes = []
    for node in graph.node:
        rows = next((skeleton.rows[name] for name in node.input if name in skeleton.rows), None)
        nodes += [node] if rows is None else surgeon.replaced(node, rows)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(surgeon.initializers.values())
    constants = _moved_out(graph)
    files = {GRAPH: model.SerializeToString(deterministic=True)}
    return {**files, CONSTANTS: constants} if constants else files


def _moved_out(graph: Any) -> bytes:
    """Take the data of large constants out of a graph; returns it."""
    data = b""
    for tensor in graph.initializer:
        if len(tensor.raw_data) > INLINE_BYTES:
            _refer(tensor, CONSTANTS, len(data), len(tensor.raw_data))
            data += tensor.raw_data
            tensor.ClearField("raw_data")
    return data


def _refer(tensor: Any, file: str, offset: int, nbytes: int) -> None:
    """Say that a tensor's data lie in a file beside the graph."""
    tensor.data_location = tensor.EXTERNAL
    for key, value in (("location", file), ("offset", offset), ("length", nbytes)):
        tensor.external_data.add(key=key, value=str(value))


class _Surgeon:
    """Replaces the nodes that use matrices.

    Attributes:
        initializers: that the new nodes use, by name.
    """

    def __init__(self, weights: Mapping[str, Weight], places: Mapping[str, Place]) -> None:
        self._weights, self._places = weights, places
        self.initializers: dict[str, Any] = {}
        self._casts: set[str] = set()

    def replaced(self, node: Any, rows: Rows) -> list[Any]:
        """What stands in the place of a node.

        Raises:
            FewbitsError: a use that is not known.
        """
        weight = self._weights.get(rows.source)
        use = node.op_type, rows.turned
        if weight is None or use not in (("MatMul", True), ("Gather", False)):
            raise FewbitsError(f"{rows.source}: the graph uses it in a way that is not known ({node.op_type}).")
        if node.op_type == "Gather":
            return self._gathered(node, rows, weight)
        if weight.layout is None:
            return self._plain(node, rows, weight)
        return self._blocks(node, rows, weight) if weight.layout.block else self._dynamic(node, rows, weight)

    def _gathered(self, node: Any, rows: Rows, weight: Weight) -> list[Any]:
        """Rows of embeddings, looked up as they are stored, then widened."""
        from onnx import TensorProto, helper

        if weight.layout is not None:
            raise FewbitsError(f"{rows.source}: embeddings are not quantized.")
        table, part = self._reference(weight.name, rows)
        if part.dtype == "F32":
            return [helper.make_node("Gather", [table, node.input[1]], node.output, node.name)]
        looked_up = f"{node.output[0]}/stored"
        return [
            helper.make_node("Gather", [table, node.input[1]], [looked_up], node.name),
            helper.make_node("Cast", [looked_up], node.output, f"{node.name}/Cast", to=TensorProto.FLOAT),
        ]

    def _plain(self, node: Any, rows: Rows, weight: Weight) -> list[Any]:
        """A product with a matrix that is stored as [out, in]: onnxruntime turns and widens it once, when loading."""
        from onnx import TensorProto, helper

        matrix, part = self._reference(weight.name, rows)
        if part.dtype not in PLAIN:
            raise FewbitsError(f"{rows.source}: {part.dtype} cannot stand in a graph.")
        nodes = []
        if part.dtype != "F32":
            nodes.append(
                helper.make_node("Cast", [matrix], [f"{node.name}/wide"], f"{node.name}/Cast", to=TensorProto.FLOAT)
            )
            matrix = f"{node.name}/wide"
        return [
            *nodes,
            helper.make_node("Transpose", [matrix], [f"{node.name}/turned"], f"{node.name}/Transpose", perm=[1, 0]),
            helper.make_node("MatMul", [node.input[0], f"{node.name}/turned"], node.output, node.name),
        ]

    def _blocks(self, node: Any, rows: Rows, weight: Weight) -> list[Any]:
        from onnx import helper

        layout = weight.layout
        assert layout is not None
        names = [self._reference(weight.name + suffix, rows)[0] for suffix in layout.parts(weight.shape)]
        options: dict[str, Any] = {
            "K": weight.shape[1],
            "N": rows.stop - rows.start,
            "bits": layout.type.bits,
            "block_size": layout.block,
            "accuracy_level": layout.accuracy_level,
        }
        name = f"{node.name}_Q{layout.type.bits}"
        return [helper.make_node("MatMulNBits", [node.input[0], *names], node.output, name, domain=CONTRIB, **options)]

    def _dynamic(self, node: Any, rows: Rows, weight: Weight) -> list[Any]:
        """A product of inputs that are quantized as they come; the matrix is turned once, when loading."""
        from onnx import TensorProto, helper

        assert weight.layout is not None
        codes, scales = (self._reference(weight.name + suffix, rows)[0] for suffix in (".weight_U8", ".weight_scale"))
        zero, turned = "dynamic_zero_point", f"{node.name}/turned"
        self.initializers[zero] = helper.make_tensor(zero, TensorProto.UINT8, [], [DYNAMIC_ZERO])
        inputs = [node.input[0], turned, scales, zero]
        return [
            helper.make_node("Transpose", [codes], [turned], f"{node.name}/Transpose", perm=[1, 0]),
            helper.make_node("DynamicQuantizeMatMul", inputs, node.output, f"{node.name}_U8", domain=CONTRIB),
        ]

    def _reference(self, name: str, rows: Rows) -> tuple[str, Part]:
        """The initializer of these rows of a stored tensor, and what it is."""
        import onnx

        place = self._places[name]
        part = Part(place.part.dtype, (rows.stop - rows.start, *place.part.shape[1:]))
        whole = part.shape == place.part.shape
        known = name if whole else f"{name}[{rows.start}:{rows.stop}]"
        if known not in self.initializers:
            types = {"F16": "FLOAT16", "BF16": "BFLOAT16", "F32": "FLOAT", "U8": "UINT8"}
            row = ITEM_BYTES[part.dtype] * prod(part.shape[1:])
            tensor = onnx.TensorProto(name=known, dims=part.shape)
            tensor.data_type = onnx.TensorProto.DataType.Value(types[part.dtype])
            _refer(tensor, place.file, place.offset + rows.start * row, part.nbytes)
            self.initializers[known] = tensor
        return known, part
