"""Sixteen uint16 as one value that stays in registers: what `vectors` is for float32."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from fewbits.kernels.vectors import WIDTH, binary, lanes_at, spread_lanes

_WORD = ir.IntType(16)
_WORDS = ir.VectorType(_WORD, WIDTH)


class _WordsType(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"uint16x{WIDTH}")


words = _WordsType()


@register_model(_WordsType)
class _WordsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _WORDS)


@intrinsic
def load(typing: Any, array: Any, at: Any) -> Any:
    """array[at : at + 16] of a contiguous flat uint16 array; nothing checks the bounds."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = context.cast(builder, arguments[1], at, types.intp)
        return builder.load(lanes_at(context, builder, array, arguments[0], place, _WORDS), align=2)

    return words(array, at), generate


@intrinsic
def load_at(typing: Any, array: Any, places: Any, which: Any) -> Any:
    """load(array, places[which]), places a flat uint16 array, which not negative.

    Numba itself would make three instructions of looking whether each index is negative.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        which_one = context.cast(builder, arguments[2], which, types.intp)
        data = cgutils.create_struct_proxy(places)(context, builder, arguments[1]).data
        place = builder.zext(builder.load(builder.gep(data, [which_one])), ir.IntType(64))
        return builder.load(lanes_at(context, builder, array, arguments[0], place, _WORDS), align=2)

    return words(array, places, which), generate


@intrinsic
def store(typing: Any, array: Any, at: Any, value: Any) -> Any:
    """Put words where `load` would find them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = context.cast(builder, arguments[1], at, types.intp)
        builder.store(arguments[2], lanes_at(context, builder, array, arguments[0], place, _WORDS), align=2)
        return context.get_dummy_value()

    return types.void(array, at, value), generate


@intrinsic
def spread(typing: Any, value: Any) -> Any:
    """A uint16 in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = context.cast(builder, arguments[0], value, types.uint16)
        return spread_lanes(builder, word, _WORDS)

    return words(value), generate


@intrinsic
def whole(typing: Any, value: Any) -> Any:
    """Sixteen float32 (a value of `vectors`) from 0 to below 65536, without their fractions."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = builder.fptosi(arguments[0], ir.VectorType(ir.IntType(32), WIDTH))
        return builder.trunc(wide, _WORDS)

    return words(value), generate


def _saturating(builder: Any, a: Any, b: Any) -> Any:
    kind = ir.FunctionType(_WORDS, (_WORDS, _WORDS))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.uadd.sat.v{WIDTH}i16"), (a, b))


add = binary(words, _saturating, "a + b, at most 65535")
subtract = binary(words, lambda builder, a, b: builder.sub(a, b), "a - b, for b <= a")
multiply = binary(words, lambda builder, a, b: builder.mul(a, b), "a * b, modulo 65536")
least = binary(
    words, lambda builder, a, b: builder.select(builder.icmp_unsigned("<", a, b), a, b), "The smaller of each lane"
)
both_bits = binary(words, lambda builder, a, b: builder.and_(a, b), "a & b")
