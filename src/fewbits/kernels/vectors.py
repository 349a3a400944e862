"""Sixteen float32 as one value that stays in registers, for kernels in which Numba's own vectorizing falls short.

A loop over lanes that picks rows by a table is guarded at run time against overlapping rows, and what it accumulates
goes through memory: both cost more than the arithmetic. Here a kernel says load, add, least, store itself; LLVM maps
that to whatever vector width the processor has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

WIDTH = 16
_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
_BITS = ir.VectorType(ir.IntType(32), WIDTH)


class _VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


vector = _VectorType()


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


def spread_lanes(builder: Any, value: Any, kind: Any) -> Any:
    """A number in all lanes of a vector of this LLVM type."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(_BITS, [0] * WIDTH)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


def lanes_at(context: Any, builder: Any, array_type: Any, array: Any, at: Any, kind: Any) -> Any:
    """Pointer to the vector of this LLVM type that begins at an item of an array."""
    data = cgutils.create_struct_proxy(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), kind.as_pointer())


@intrinsic
def load(typing: Any, array: Any, at: Any) -> Any:
    """array.reshape(-1)[at : at + 16] of a contiguous float32 array; nothing checks the bounds."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = context.cast(builder, arguments[1], at, types.intp)
        return builder.load(lanes_at(context, builder, array, arguments[0], place, _FLOATS), align=4)

    return vector(array, at), generate


@intrinsic
def store(typing: Any, array: Any, at: Any, value: Any) -> Any:
    """Put a vector where `load` would find it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = context.cast(builder, arguments[1], at, types.intp)
        builder.store(arguments[2], lanes_at(context, builder, array, arguments[0], place, _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(array, at, value), generate


@intrinsic
def spread(typing: Any, value: Any) -> Any:
    """A float32 in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return spread_lanes(builder, context.cast(builder, arguments[0], value, types.float32), _FLOATS)

    return vector(value), generate


@intrinsic
def spread_bits(typing: Any, value: Any) -> Any:
    """The bits of an int32 in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = context.cast(builder, arguments[0], value, types.int32)
        return builder.bitcast(spread_lanes(builder, whole, _BITS), _FLOATS)

    return vector(value), generate


def binary(kind: Any, operation: Callable[[Any, Any, Any], Any], doc: str) -> Any:
    """An intrinsic on two values of a type of vectors."""

    def typed(typing: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return operation(builder, *arguments)

        return kind(a, b), generate

    typed.__doc__ = doc
    return intrinsic(typed)


def _bitwise(name: str) -> Callable[[Any, Any, Any], Any]:
    def operation(builder: Any, a: Any, b: Any) -> Any:
        a, b = builder.bitcast(a, _BITS), builder.bitcast(b, _BITS)
        return builder.bitcast(getattr(builder, name)(a, b), _FLOATS)

    return operation


add = binary(vector, lambda builder, a, b: builder.fadd(a, b, ("fast",)), "a + b")
subtract = binary(vector, lambda builder, a, b: builder.fsub(a, b, ("fast",)), "a - b")
multiply = binary(vector, lambda builder, a, b: builder.fmul(a, b, ("fast",)), "a * b")
least = binary(
    vector, lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b), "The smaller of each lane"
)
both_bits = binary(vector, _bitwise("and_"), "a & b, of the bits")
any_bits = binary(vector, _bitwise("or_"), "a | b, of the bits")


@intrinsic
def where_less(typing: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
    """For each lane yes where a < b, else no."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", arguments[0], arguments[1]), arguments[2], arguments[3])

    return vector(a, b, yes, no), generate
