"""GPTQ and AWQ tensors: against the shared oracle, decoders written anew here, and through our own reader."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AwqConfig, GPTQConfig

import packing_oracle
from fewbits.codecs.scaled import Quantized
from fewbits.errors import FewbitsError
from fewbits.layouts import Layout, Part
from fewbits.layouts.awq import AWQ
from fewbits.layouts.gptq import GPTQ

NAMES = {"float16": "F16", "float32": "F32", "int32": "I32"}
GPTQ_SPECS = [
    f"w{bits}g{group}{flags}"
    for bits in (2, 3, 4, 8)
    for group in (32, -1)
    for flags in ("", "-asym", "-v2", "-asym-v2")
]


@pytest.fixture(scope="module")
def oracle(shared_dir: Path) -> ModuleType:
    return packing_oracle.load(shared_dir)


def random_matrix(layout: Layout, rows: int = 64, columns: int = 128, seed: int = 0) -> Quantized:
    """Codes, scales and zeros without any pattern."""
    rng = np.random.default_rng(seed)
    kind = layout.type
    grid = kind.grid((rows, columns))
    scales = rng.uniform(1e-3, 1, grid).astype(np.float16).astype(np.float32)
    zeros = rng.integers(1, 1 << kind.bits, grid).astype(np.float32) if kind.zero == "integer" else None
    return Quantized(kind, rng.integers(0, 1 << kind.bits, (rows, columns), dtype=np.uint8), scales, zeros)


def parts_of(arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Part]:
    return {suffix: Part(NAMES[array.dtype.name], array.shape) for suffix, array in arrays.items()}


def zeros_of(matrix: Quantized) -> npt.NDArray[np.float32]:
    return np.full_like(matrix.scales, 1 << (matrix.type.bits - 1)) if matrix.zeros is None else matrix.zeros


def gptqmodel_decode(layout: GPTQ, arrays: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """As GPTQModel: version 1 becomes 2 by adding one to every code of a packed word at once, then words are cut.

    Written for widths that divide a word.
    """
    bits = layout.type.bits
    places = np.arange(0, 32, bits, dtype=np.uint32)
    ones = np.uint32(sum(1 << int(place) for place in places))
    qzeros = arrays[".qzeros"].view(np.uint32) + (np.uint32(0) if layout.v2 else ones)
    mask = np.uint32((1 << bits) - 1)
    zeros = ((qzeros[:, :, None] >> places) & mask).reshape(qzeros.shape[0], -1).astype(np.float32)
    words = arrays[".qweight"].view(np.uint32)
    codes = ((words[:, None, :] >> places[None, :, None]) & mask).reshape(-1, words.shape[1]).astype(np.float32)
    index = arrays[".g_idx"]
    return (arrays[".scales"].astype(np.float32)[index] * (codes - zeros[index])).T


def awq_decode(arrays: dict[str, npt.NDArray[Any]], group: int) -> npt.NDArray[np.float32]:
    """As AutoAWQ's packing_utils: cut words from the low end, undo the order of the lanes."""
    order = [0, 4, 1, 5, 2, 6, 3, 7]

    def cut(words: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        lanes = np.stack([(words >> (4 * place)) & 15 for place in range(8)], axis=-1)[..., order]
        return lanes.reshape(words.shape[0], -1).astype(np.float32)

    codes = cut(arrays[".qweight"])
    index = np.arange(codes.shape[0]) // (codes.shape[0] if group == -1 else group)
    return (arrays[".scales"].astype(np.float32)[index] * (codes - cut(arrays[".qzeros"])[index])).T


@pytest.mark.parametrize("spec", GPTQ_SPECS)
def test_gptq_comes_back(spec: str) -> None:
    layout = GPTQ.from_spec(spec)
    assert layout.spec() == f"gptq:{spec}"
    matrix = random_matrix(layout)
    arrays = layout.pack(matrix)
    assert parts_of(arrays) == layout.parts((64, 128))
    assert all(array.flags.c_contiguous for array in arrays.values())
    again = GPTQ.from_config(layout.config(["lm_head"]))
    assert again == layout
    assert again.shape_of(parts_of(arrays)) == (64, 128)
    np.testing.assert_array_equal(again.unpack(arrays, (64, 128)), matrix.decode())
    if layout.type.bits != 3:
        np.testing.assert_array_equal(gptqmodel_decode(layout, arrays), matrix.decode())


@given(
    bits=st.sampled_from([2, 3, 4, 8]), v2=st.booleans(), symmetric=st.booleans(), rows=st.integers(1, 3),
    columns=st.integers(1, 4), group=st.sampled_from([32, -1]), seed=st.integers(0, 999), permuted=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_gptq_holds_any_matrix(
    bits: int, v2: bool, symmetric: bool, rows: int, columns: int, group: int, seed: int, permuted: bool
) -> None:
    flags = ("" if symmetric else "-asym") + ("-actorder" if permuted else "") + ("-v2" if v2 else "")
    layout = GPTQ.from_spec(f"w{bits}g{group}{flags}")
    shape = (32 * rows, 32 * columns)
    matrix = random_matrix(layout, *shape, seed)
    order = np.random.default_rng(seed).permutation(shape[1]) if permuted else np.arange(shape[1])
    index = np.arange(shape[1])[order] // (shape[1] if group == -1 else group)
    expected = matrix.scales[:, index] * (matrix.codes.astype(np.float32) - zeros_of(matrix)[:, index])
    arrays = layout.pack(matrix, index)
    np.testing.assert_array_equal(layout.unpack(arrays, shape), expected)


@pytest.mark.shared
@pytest.mark.parametrize("spec", GPTQ_SPECS)
def test_gptq_equals_the_oracle(spec: str, oracle: ModuleType) -> None:
    layout = GPTQ.from_spec(spec)
    matrix = random_matrix(layout, seed=1)
    theirs = oracle.gptq_tensors(
        matrix.codes.astype(np.uint32), matrix.scales, zeros_of(matrix).astype(np.uint32), layout.type.bits,
        layout.group, v2=layout.v2,
    )  # fmt: skip
    arrays = layout.pack(matrix)
    assert set(arrays) == {f".{name}" for name in theirs}
    for name, array in theirs.items():
        np.testing.assert_array_equal(arrays[f".{name}"], array, name)
    np.testing.assert_array_equal(oracle.gptq_dequant(theirs, layout.type.bits, layout.v2), matrix.decode())


def test_zero_points_of_version_1_do_not_carry() -> None:
    """A zero of 0 would be stored as -1: readers that add one to a whole word at once would spoil the next column."""
    layout = GPTQ.from_spec("w4g32-asym")
    assert layout.min_zero == 1
    matrix = random_matrix(layout, 8, 32)
    true = np.array([[8, 0, 8, 0, 0, 15, 1, 0]], np.float32).T
    codes = np.minimum(matrix.codes, 14)
    arrays = layout.pack(replace(matrix, codes=codes, zeros=true))
    expected = (codes.astype(np.float32) - true) * matrix.scales
    np.testing.assert_array_equal(gptqmodel_decode(layout, arrays), expected)
    np.testing.assert_array_equal(layout.unpack(arrays, (8, 32)), expected)
    # stored as it is, the same word shows what the trap would have done
    spoilt = dict(arrays)
    codes_less_one = (true[:, 0].astype(np.int64) - 1) & 15
    spoilt[".qzeros"] = np.array([[sum(int(z) << (4 * i) for i, z in enumerate(codes_less_one))]], np.uint32).view(
        np.int32
    )
    assert not np.array_equal(gptqmodel_decode(layout, spoilt), expected)


def test_zero_points_of_version_2_are_stored_as_they_are() -> None:
    layout = GPTQ.from_spec("w4g32-asym-v2")
    assert layout.min_zero == 0
    matrix = replace(random_matrix(layout, 8, 32), zeros=np.zeros((8, 1), np.float32))
    np.testing.assert_array_equal(gptqmodel_decode(layout, layout.pack(matrix)), matrix.decode())


def test_a_raised_zero_point_costs_the_top_code_only() -> None:
    layout = GPTQ.from_spec("w4g32-asym")
    codes = np.arange(32, dtype=np.uint8).reshape(1, 32).repeat(8, 0) % 16
    matrix = Quantized(layout.type, codes, np.ones((8, 1), np.float32), np.zeros((8, 1), np.float32))
    off = np.abs(layout.unpack(layout.pack(matrix), (8, 32)) - matrix.decode())
    assert set(off[codes < 15]) == {0.0}
    assert set(off[codes == 15]) == {1.0}


def test_symmetric_version_1_stores_sevens() -> None:
    layout = GPTQ.from_spec("w4g32")
    qzeros = layout.pack(random_matrix(layout))[".qzeros"]
    assert (qzeros == 0x77777777).all()


@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_awq_comes_back(group: int) -> None:
    layout = AWQ.from_spec(f"w4g{group}")
    matrix = random_matrix(layout)
    arrays = layout.pack(matrix)
    assert parts_of(arrays) == layout.parts((64, 128))
    again = AWQ.from_config(layout.config(["lm_head"]))
    assert again == layout
    assert again.shape_of(parts_of(arrays)) == (64, 128)
    np.testing.assert_array_equal(again.unpack(arrays, (64, 128)), matrix.decode())
    np.testing.assert_array_equal(awq_decode(arrays, group), matrix.decode())


@pytest.mark.shared
def test_awq_equals_the_oracle(oracle: ModuleType) -> None:
    layout = AWQ.from_spec("w4g64")
    matrix = random_matrix(layout)
    theirs = oracle.awq_tensors(matrix.codes, matrix.scales, zeros_of(matrix).astype(np.uint8))
    arrays = layout.pack(matrix)
    assert set(arrays) == {f".{name}" for name in theirs}
    for name, array in theirs.items():
        np.testing.assert_array_equal(arrays[f".{name}"], array, name)


def test_every_example_is_a_target() -> None:
    for layout in (GPTQ, AWQ):
        for spec, summary in layout.examples().items():
            assert layout.from_spec(spec).parts((128, 256))
            assert summary


@pytest.mark.parametrize(
    ("layout", "spec", "shape", "message", "way_out"),
    [
        (GPTQ, "w4g128", (64, 576), "Rows of 576 are no multiple of the group 128", "gptq:w4g64"),
        (GPTQ, "w3g128-asym-v2", (64, 96), "Rows of 96", "gptq:w3g32-asym-v2"),
        (GPTQ, "w4g32", (64, 40), "Rows of 40", "gptq:w4g-1"),
        (GPTQ, "w4g-1", (64, 36), "rows of 36", "keep"),
        (GPTQ, "w3g32", (48, 64), "48 outputs", "ct:w4a16"),
        (AWQ, "w4g128", (64, 576), "Rows of 576 are no multiple of the group 128", "awq:w4g64"),
        (AWQ, "w4g32", (36, 64), "36 outputs", "ct:w4a16"),
    ],
)
def test_refuses_what_does_not_divide(
    layout: type[Layout], spec: str, shape: tuple[int, int], message: str, way_out: str
) -> None:
    with pytest.raises(FewbitsError, match=message) as caught:
        layout.from_spec(spec).check(shape)
    assert way_out in caught.value.hint
    named = re.search(r"Take (\w+):(w\S+?)[.,]", caught.value.hint)
    if named and named[1] == layout.name:
        layout.from_spec(named[2]).check(shape)


@pytest.mark.parametrize("spec", ["w5g128", "w4g100", "w4", "w4g128-asym-asym", "w4g128-sym", "", "nf4"])
def test_refuses_unknown_targets(spec: str) -> None:
    with pytest.raises(FewbitsError, match=f"gptq:{spec}"):
        GPTQ.from_spec(spec)
    with pytest.raises(FewbitsError, match=f"awq:{spec}"):
        AWQ.from_spec(spec)


def test_configuration_of_gptq() -> None:
    layout = GPTQ.from_spec("w4g128")
    plain = layout.config(["lm_head"])
    assert plain == layout.extra_files(["lm_head"])["quantize_config.json"]
    assert {key: plain[key] for key in ("bits", "group_size", "desc_act", "sym", "lm_head", "checkpoint_format")} == {
        "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False, "checkpoint_format": "gptq",
    }  # fmt: skip
    assert "dynamic" not in plain
    assert "modules_in_block_to_quantize" not in plain
    kept = layout.config(["lm_head", "model.layers.1.mlp.gate"], ["model.layers.1.mlp.up_proj"])
    (rule,) = kept["dynamic"]
    assert rule.startswith("-:")
    assert re.match(rule[2:], "model.layers.1.mlp.gate")
    assert not re.match(rule[2:], "model.layers.1.mlp.gate_proj")
    assert not re.match(rule[2:], "model.layers.11.mlp.gate")
    assert kept["modules_in_block_to_quantize"] == [["model.layers.1.mlp.up_proj"]]


def test_transformers_takes_the_configurations() -> None:
    for spec in GPTQ.examples():
        layout = GPTQ.from_spec(spec)
        taken = GPTQConfig.from_dict(layout.config(["lm_head", "model.layers.0.mlp.gate"]))
        assert (taken.bits, taken.group_size, taken.desc_act) == (layout.type.bits, layout.group, layout.act_order)
        assert (taken.sym, taken.format) == (layout.type.zero == "middle", "gptq_v2" if layout.v2 else "gptq")
    awq = AwqConfig.from_dict(AWQ.from_spec("w4g64").config(["lm_head"]))
    assert (awq.bits, awq.group_size, awq.zero_point, awq.format) == (4, 64, True, "gemm")
    assert awq.modules_to_not_convert == ["lm_head"]


def test_reads_what_others_write() -> None:
    """AutoGPTQ left out keys, AutoRound leaves out g_idx, AutoAWQ's own file has older names."""
    old = GPTQ.from_config({"quant_method": "gptq", "bits": 4, "group_size": 32})
    assert (old.v2, old.act_order, old.type.zero) == (False, False, "middle")
    matrix = random_matrix(GPTQ.from_spec("w4g32-asym"))
    arrays = GPTQ.from_spec("w4g32-asym").pack(matrix)
    del arrays[".g_idx"]
    assert old.shape_of(parts_of(arrays)) == (64, 128)
    # the zeros that are stored count, though the configuration does not speak of any
    np.testing.assert_array_equal(old.unpack(arrays, (64, 128)), matrix.decode())
    assert AWQ.from_config({"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}).group == 64


def test_reads_modules_with_bits_of_their_own() -> None:
    """`dynamic` rules of GPTQModel that are positive."""
    model = GPTQ.from_config({"bits": 4, "group_size": 32, "sym": True})
    for spec in ("w4g32", "w8g64", "w3g32", "w2g128"):
        layout = GPTQ.from_spec(spec)
        matrix = random_matrix(layout)
        arrays = layout.pack(matrix)
        found, shape = model.identify(parts_of(arrays), {})
        assert (found, shape) == (layout, (64, 128))
        np.testing.assert_array_equal(found.unpack(arrays, shape), matrix.decode())
    with pytest.raises(FewbitsError, match=r"\.qzeros is missing"):
        model.identify({name: part for name, part in parts_of(arrays).items() if name != ".qzeros"}, {})


@pytest.mark.parametrize(
    ("layout", "config", "message"),
    [
        (GPTQ, {"bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "marlin"),
        (GPTQ, {"bits": 5, "group_size": 128}, "5 bits"),
        (GPTQ, {"bits": "four", "group_size": 128}, "'four'"),
        (GPTQ, {"bits": True, "group_size": 128}, "True"),
        (GPTQ, {"group_size": 128}, "'bits'"),
        (GPTQ, {"bits": 4, "group_size": 0}, "group_size 0"),
        (AWQ, {"bits": 4, "group_size": 128, "version": "gemv"}, "gemv"),
        (AWQ, {"bits": 4, "group_size": 128, "zero_point": False}, "zero_point False"),
        (AWQ, {"bits": 8, "group_size": 128}, "8 bits"),
    ],
)
def test_refuses_configurations(layout: type[Layout], config: dict[str, Any], message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        layout.from_config(config)


def test_refuses_damaged_parts() -> None:
    layout = GPTQ.from_spec("w4g32")
    arrays = layout.pack(random_matrix(layout))
    for suffix in (".qweight", ".qzeros", ".scales"):
        parts = parts_of(arrays)
        with pytest.raises(FewbitsError, match=rf"\{suffix} is missing"):
            layout.shape_of({name: part for name, part in parts.items() if name != suffix})
    for suffix, part in parts_of(arrays).items():
        longer = Part(part.dtype, (part.shape[0] + 1, *part.shape[1:]))
        with pytest.raises(FewbitsError):
            layout.shape_of({**parts_of(arrays), suffix: longer})
    with pytest.raises(FewbitsError, match="F32"):
        layout.shape_of({**parts_of(arrays), ".qweight": Part("F32", arrays[".qweight"].shape)})
    with pytest.raises(FewbitsError, match="not 2 axes"):
        layout.shape_of({**parts_of(arrays), ".qweight": Part("I32", (64,))})
    for index, message in ((4, "names group 4"), (-1, "negative"), (0, "unequal")):
        g_idx = arrays[".g_idx"].copy()
        g_idx[-1] = index
        with pytest.raises(FewbitsError, match=message):
            layout.unpack({**arrays, ".g_idx": g_idx}, (64, 128))
    scales = arrays[".scales"].copy()
    scales[1, 2] = np.nan
    with pytest.raises(FewbitsError, match=r"\.scales holds values that are not finite"):
        layout.unpack({**arrays, ".scales": scales}, (64, 128))


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_any_parts_are_refused_or_have_a_shape(data: st.DataObject) -> None:
    """Whatever headers claim: an error that is ours, or a shape whose parts are those."""
    shapes = st.lists(st.integers(0, 70), max_size=3).map(tuple)
    part = st.builds(Part, st.sampled_from(["I32", "F16", "BF16", "U8"]), shapes)
    parts = data.draw(st.dictionaries(st.sampled_from([".qweight", ".qzeros", ".scales", ".g_idx"]), part))
    layout = data.draw(st.sampled_from([GPTQ.from_spec("w3g32"), GPTQ.from_spec("w4g-1"), AWQ.from_spec("w4g32")]))
    try:
        layout, shape = layout.identify(parts, {})
    except FewbitsError:
        return
    for suffix, expected in layout.parts(shape).items():
        assert suffix == ".g_idx" or parts[suffix].shape == expected.shape
