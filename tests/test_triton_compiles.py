"""Triton kernels compile for a GPU, which needs none: the interpreter accepts more than the compiler does."""

from __future__ import annotations

from importlib import import_module

import pytest

triton = pytest.importorskip("triton", reason="Triton is for Linux only")

KERNELS = {
    "viterbi._forward": {"tied": True, "bits": 4, "block": 1024},
    "viterbi._back": {"tied": True, "bits": 4},
    "feedback._round": {"uniform": True, "size": 128, "block": 32},
    "groups._search_scales": {"lowest": -8.0, "highest": 7.0, "signed": True, "kind": 1, "size": 128, "block": 8},
    "groups._search_pairs": {"most": 15.0, "kind": 2, "size": 64, "block": 16},
}
"""What is fixed when a kernel is compiled."""
TYPES = {
    **dict.fromkeys(("begin", "length", "stop", "columns", "rows", "count"), "i32"),
    **dict.fromkeys(("groups", "elements", "per_row", "tried"), "i32"),
    **dict.fromkeys(("wraps", "ends"), "*i64"),
    **dict.fromkeys(("ways", "steps", "codes"), "*u8"),
}
"""Of parameters by their names; others point to float32."""


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile(name: str) -> None:
    module, function = name.split(".")
    kernel = getattr(import_module(f"fewbits.kernels.{module}_triton"), function)
    fixed = KERNELS[name]
    types = {one: "constexpr" if one in fixed else TYPES.get(one, "*fp32") for one in kernel.arg_names}
    source = import_module("triton.compiler").ASTSource(kernel, types, fixed)
    target = import_module("triton.backends.compiler").GPUTarget("cuda", 80, 32)
    assert function in triton.compile(source, target=target).asm["ptx"]
