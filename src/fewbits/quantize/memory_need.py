"""What quantizing takes in memory, from the plan alone, and how it is kept within `--max-memory`.

The coefficients are upper bounds of what was measured on matrices of 1 to 4 million weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from fewbits.checkpoint import Model
from fewbits.checkpoint.safetensors import WITHOUT_CODEC
from fewbits.codecs import CODECS, codec
from fewbits.limits import Limits, Need, largest, resident
from fewbits.methods import method as method_named
from fewbits.methods.base import ROWS
from fewbits.methods.gptq import feedback_span
from fewbits.plan import Plan, PlannedTensor
from fewbits.plan.directory import HEAD
from fewbits.plan.tensors import OUTPUT, role
from fewbits.quantize.execute import SLAB_WEIGHTS
from fewbits.quantize.matrices import WEIGHTS, goes_by_rows

if TYPE_CHECKING:
    from fewbits.calibration.memory_need import TextRun
    from fewbits.layouts import Layout

LIBRARIES = 180 << 20
"""What a process without torch still loads: kernels, and what reading and writing take."""
TORCH = 200 << 20
"""Torch itself, where it is going to be loaded."""
OF_SLAB = 48
"""Bytes for each weight of a slab: as stored, in float32, permuted, in the search and encoded, twice ahead of the
writer."""
OF_ROWS = 24
"""For each weight of the rows at hand, where a matrix goes by rows: in float32 and in the search."""
OF_CODES = 8
"""For each weight of a matrix of which only codes are kept: joined, and packed."""
OF_MATRIX = {"gptq": 11, "ldlq": 18, "quip": 20, "aqlm": 16}
"""For each weight of a matrix that is in memory as a whole, by method: read, worked on, packed and decoded."""
OF_OTHERS = 16
OF_SQUARE = {"ldlq": 26, "quip": 36, "aqlm": 26}
OF_SQUARE_GROUPS, OF_SQUARE_ORDERED = 34, 4
"""For each square of its columns, the Hessian and its factor not counted: by method; where types code groups of
columns, for which a factor of their own is made; where columns are put in order first."""
OF_HESSIAN = 36
"""For each square of the columns of a Hessian that is read from a file, the factors of others kept meanwhile."""
OF_DECODED = 14
"""For each weight of a matrix of a directory that is decoded: when it is read back, or quantized once more."""


def _decoded_whole(dtype: str) -> bool:
    return dtype not in CODECS and dtype not in WITHOUT_CODEC


def gguf_limits(plan: Plan, most: int | None, threads: int | None, hessian: int = 0) -> Limits:
    """How `execute` keeps within so many bytes: with fewer threads.

    Args:
        hessian: columns of the largest Hessian that is read from a file and factored; 0: none is.

    Raises:
        FewbitsError: one thread takes more.
    """
    if most is None:
        return Limits(threads)

    def need(tensor: PlannedTensor, count: int) -> Need:
        slab = max(SLAB_WEIGHTS, tensor.shape[-1])
        whole = OF_DECODED * tensor.n_weights if _decoded_whole(tensor.source_dtype) else 0
        # GPT-2's matrices stand the other way round, so that a slab needs all of their rows
        whole = whole or (12 * tensor.n_weights * count if plan.architecture == "gpt2" else 0)
        parts = {"program": resident() + LIBRARIES, "slabs": count * OF_SLAB * slab, "decoded matrices": whole}
        parts |= {"torch": TORCH, "Hessians": OF_HESSIAN * hessian * hessian} if hessian else {}
        return Need(tensor.name, parts)

    return _fewer_threads(lambda count: largest(need(tensor, count) for tensor in plan.tensors), most, threads)


def directory_limits(
    plan: Plan, layout_of: Callable[[PlannedTensor], Layout], most: int | None, threads: int | None
) -> Limits:
    """How a directory without calibration keeps within so many bytes: with fewer matrices at once.

    Raises:
        FewbitsError: one matrix takes more.
    """
    if most is None:
        return Limits(threads)
    program = {"program": resident() + LIBRARIES}
    matrices = {t.name: matrix_bytes(t, layout_of(t)) for t in plan.tensors if t.method not in ("copy", "convert")}
    needs = [Need(name, program | {"the matrix": size}) for name, size in matrices.items()]
    needs.append(Need("a tensor that stays as it is", program | {"rows": OF_ROWS * WEIGHTS}))
    worst = largest(needs)
    if worst.total > most:
        raise worst.refusal(most)
    left = most - sum(program.values())
    return Limits(threads, at_once=left)


def matrix_bytes(tensor: PlannedTensor, layout: Layout) -> int:
    """What one matrix takes that is quantized without calibration."""
    whole = OF_DECODED * tensor.n_weights if _decoded_whole(tensor.source_dtype) else 0
    if goes_by_rows(layout, tensor.method):
        rows = min(tensor.n_weights, max(WEIGHTS, ROWS * tensor.shape[1]))
        return whole + OF_ROWS * rows + OF_CODES * tensor.n_weights
    return whole + OF_MATRIX.get(tensor.method, OF_OTHERS) * tensor.n_weights


def read_back_threads(plan: Plan, most: int | None, threads: int | None) -> int | None:
    """With how many threads a directory is read back within so many bytes.

    Raises:
        FewbitsError: one thread takes more.
    """
    if most is None:
        return threads
    worst = max(plan.tensors, key=lambda tensor: tensor.n_weights if _decoded_whole(tensor.codec) else 0)
    matrix = OF_DECODED * worst.n_weights if _decoded_whole(worst.codec) else OF_SLAB * SLAB_WEIGHTS

    def need(count: int) -> Need:
        parts = {"program": resident() + LIBRARIES, "decoded matrices": count * matrix}
        return Need(f"reading back {worst.name}", parts, "Allow more memory, or pass --no-verify.")

    return _fewer_threads(need, most, threads).threads


def text_run(plan: Plan, model: Model, windows: int, context: int, tunes: bool) -> TextRun:
    """A run that quantizes block by block.

    Args:
        tunes: whether blocks are tuned afterwards.
    """
    from fewbits.calibration.memory_need import LESS_TEXT, OF_TUNING, Block, TextRun  # imports torch

    methods = {tensor.method for tensor in plan.tensors if tensor.method not in ("copy", "convert")}
    kinds = {method_named(name).hessian for name in methods} - {""}
    grouped = any(t.codec in CODECS and feedback_span(codec(t.codec)) > 1 for t in plan.tensors if t.method == "gptq")
    square = OF_SQUARE_GROUPS if grouped else OF_SQUARE_ORDERED if "actorder" in plan.target else 0
    other = ", or choose a method without Hessians (--method search, --effort fast)"
    return TextRun(
        Block.of(model, context),
        windows,
        context,
        kinds,
        of_weight=max(OF_MATRIX.get(name, OF_OTHERS) for name in methods) if methods else 0,
        of_square=max([square, *(OF_SQUARE.get(name, 0) for name in methods)]),
        all_inputs=bool(methods & {"awq", "awq+gptq", "smoothquant"}) or plan.format == "gguf",
        copies=2 if tunes else 0,
        gradients=OF_TUNING if tunes else 0,
        waits=True,
        head=max((t.n_weights for t in plan.tensors if _is_head(t)), default=0),
        way_out=f"{LESS_TEXT}{other if kinds else ''}.",
    )


def _is_head(tensor: PlannedTensor) -> bool:
    return tensor.reason == HEAD or (role(tensor.name) == OUTPUT and tensor.method == "gptq")


def _fewer_threads(need: Callable[[int], Need], most: int, threads: int | None) -> Limits:
    for count in range(threads or os.cpu_count() or 1, 0, -1):
        if need(count).total <= most:
            return Limits(count)
    raise need(1).refusal(most)
