"""compressed-tensors layouts: loaded by transformers, decoded by the package itself, and read where it wrote."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fewbits.codecs.scaled import Quantized
from fewbits.errors import FewbitsError
from fewbits.layouts import Part
from fewbits.layouts.compressed_tensors import FIXED, CompressedTensors
from tiny_models import tiny_model

PATTERNS = [
    "w4a16g128", "w4a16g32", "w4a16", "w8a16g128", "w8a16", "w3a16g128", "w2a16g64", "w5a16g32", "w6a16", "w7a16g32",
]  # fmt: skip
ASYMMETRIC = ["w4a16g128-asym", "w3a16g32-asym", "w8a16-asym", "w2a16g64-asym"]
ALL = [*PATTERNS, *ASYMMETRIC, *FIXED]
PRESETS = {
    "W8A8": "w8a8", "FP8": "fp8-static", "FP8_DYNAMIC": "fp8", "FP8_BLOCK": "fp8-block", "NVFP4A16": "nvfp4",
    "NVFP4": "nvfp4a4", "MXFP4A16": "mxfp4", "W4A16": "w4a16g128", "W4A16_ASYM": "w4a16g128-asym",
    "W8A16": "w8a16g128", "W3A16": "w3a16g128",
}  # fmt: skip
TORCH = {
    "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32, "I8": torch.int8, "U8": torch.uint8,
    "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
SHAPES = {"hidden_size": 128, "intermediate_size": 256}
PEAK = 20.0
"""Beyond any activation of the tiny models."""

Arrays = Mapping[str, npt.NDArray[Any]]


def pack(layout: CompressedTensors, matrix: Quantized) -> Arrays:
    return layout.pack(matrix, input_peak=PEAK if layout.activations == "static" else None)


def to_torch(layout: CompressedTensors, arrays: Arrays, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """As safetensors would name the types."""
    parts = layout.parts(shape)
    assert set(parts) == set(arrays)
    return {suffix: torch.from_numpy(array).view(TORCH[parts[suffix].dtype]) for suffix, array in arrays.items()}


def from_torch(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    plain = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
    return {
        name: tensor.detach().view(plain.get(tensor.dtype, tensor.dtype)).numpy() for name, tensor in tensors.items()
    }


def parts_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Part]:
    names = {dtype: name for name, dtype in TORCH.items()}
    return {name: Part(names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def random_weights(rows: int, columns: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns), np.float32)


@pytest.mark.parametrize("spec", ALL)
def test_comes_back(spec: str) -> None:
    layout = CompressedTensors.from_spec(spec)
    assert layout.spec() == f"ct:{spec}"
    matrix = layout.type.settle(random_weights(192, 256))
    arrays = pack(layout, matrix)
    tensors = to_torch(layout, arrays, (192, 256))
    assert parts_of(tensors) == layout.parts((192, 256))
    again = CompressedTensors.from_config(json.loads(json.dumps(layout.config(["lm_head"]))))
    assert (again.type, again.format) == (layout.type, layout.format)
    assert again.shape_of(parts_of(tensors)) == (192, 256)
    np.testing.assert_array_equal(again.unpack(arrays, (192, 256)), matrix.decode())


@given(spec=st.sampled_from(ALL), rows=st.integers(1, 70), groups=st.integers(1, 3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=80)
def test_any_matrix_comes_back(spec: str, rows: int, groups: int, seed: int) -> None:
    layout = CompressedTensors.from_spec(spec)
    shape = (rows, groups * (layout.type.block[1] or 32))
    kind, grid = layout.type, layout.type.grid(shape)
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << kind.bits, shape, dtype=np.uint8)
    codes[codes & 127 == 127] &= 128  # no NaN among the 8-bit floats
    scales = np.ldexp(1.0, rng.integers(-6, 6, grid)).astype(np.float32)
    zeros = rng.integers(0, 1 << kind.bits, grid).astype(np.float32) if kind.zero == "integer" else None
    matrix = Quantized(kind, codes, scales, zeros, 8.0 if kind.scale == "E4M3" else 1.0)
    np.testing.assert_array_equal(layout.unpack(pack(layout, matrix), shape), matrix.decode())


@pytest.mark.parametrize("spec", ALL)
def test_the_package_decodes_the_same(spec: str) -> None:
    """compressed-tensors' own decompressor, module by module; also where transformers cannot load them."""
    layout = CompressedTensors.from_spec(spec)
    matrix = layout.type.settle(random_weights(192, 256, 1))
    tensors = to_torch(layout, pack(layout, matrix), (192, 256))
    if layout.format not in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):  # else they compute in bfloat16
        tensors = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in tensors.items()}
    scheme = QuantizationConfig.model_validate(layout.config([])).config_groups["group_0"]
    decoded = BaseCompressor.get_value_from_registry(layout.format).decompress(
        {name[1:]: tensor for name, tensor in tensors.items()}, scheme
    )["weight"]
    bound = 2.0**-7 if decoded.dtype == torch.bfloat16 else 1e-6
    np.testing.assert_allclose(decoded.float().numpy(), matrix.decode(), rtol=bound, atol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_configuration_is_the_preset(preset: str) -> None:
    layout = CompressedTensors.from_spec(PRESETS[preset])
    config = QuantizationConfig.model_validate(layout.config(["lm_head"]))
    ours, theirs = config.config_groups["group_0"], preset_name_to_scheme(preset, ["Linear"])
    assert config.ignore == ["lm_head"]
    assert config.quantization_status == "compressed"
    unsaid = {"observer", "observer_kwargs", "zp_dtype"}  # of no use once there are codes
    for name in ("weights", "input_activations"):
        mine, wanted = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (wanted is None)
        if mine is not None:
            assert mine.model_dump(exclude=unsaid) == wanted.model_dump(exclude=unsaid)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reads_what_the_package_writes(preset: str, dtype: torch.dtype) -> None:
    """Scales of another precision than ours, and the parts that its compressor makes of a weight."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    ours = CompressedTensors.from_spec(PRESETS[preset])
    settled = ours.type.settle(random_weights(128, 256, 2))
    state = {"weight": torch.from_numpy(settled.decode()).to(dtype)}
    grid = (1,) if ours.type.block == (0, 0) else settled.scales.shape
    state["weight_scale"] = torch.from_numpy(settled.scales).reshape(grid).to(dtype)
    if settled.zeros is not None:
        state["weight_zero_point"] = torch.from_numpy(settled.zeros - (1 << (ours.type.bits - 1))).to(torch.int8)
    if ours.type.scale == "E4M3":
        state["weight_global_scale"] = torch.tensor([settled.global_scale])
    compressor = BaseCompressor.get_value_from_registry(ours.format)
    written = compressor.compress(state, scheme)
    expected = compressor.decompress(written, scheme)["weight"].float().numpy()
    config = {
        "format": ours.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }
    layout = CompressedTensors.from_config(config)
    tensors = {f".{name}": tensor for name, tensor in written.items()}
    found = {**parts_of({n: t for n, t in tensors.items() if t.dtype != torch.float16})}
    found |= {name: Part("F16", tuple(t.shape)) for name, t in tensors.items() if t.dtype == torch.float16}
    assert layout.shape_of(found) == (128, 256)
    bound = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2.0**-7}[dtype]
    if ours.engine_dtype:
        bound = 2.0**-7
    np.testing.assert_allclose(layout.unpack(from_torch(tensors), (128, 256)), expected, rtol=bound, atol=0)


def write_model(directory: Path, layout: CompressedTensors, dtype: torch.dtype) -> dict[str, npt.NDArray[np.float32]]:
    """A tiny Llama in this layout, and its linear weights as they decode, by module."""
    tiny_model("llama", SHAPES).to(dtype).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    decoded = {}
    for name in [name for name in tensors if "_proj." in name]:
        weights = tensors.pop(name).float().numpy()
        module, shape = name.removesuffix(".weight"), (weights.shape[0], weights.shape[1])
        layout.check(shape)
        arrays = pack(layout, layout.type.settle(weights))
        tensors |= {f"{module}{suffix}": t for suffix, t in to_torch(layout, arrays, shape).items()}
        decoded[module] = layout.unpack(arrays, shape)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = layout.config(["lm_head"])
    (directory / "config.json").write_text(json.dumps(config))
    return decoded


TOKENS = torch.arange(40).reshape(2, 20)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


LEVELS = {
    # dtype to load with, and how far the logits may be off: rounding alone, or quantized activations besides
    **dict.fromkeys(PATTERNS, (torch.float32, 2e-6)),
    "w8a8": (torch.float32, 0.05),
    **dict.fromkeys(("fp8", "fp8-tensor", "fp8-block", "fp8-static"), (torch.float32, 0.12)),
    **dict.fromkeys(("nvfp4", "mxfp4"), (torch.bfloat16, 0.03)),
    "nvfp4a4": (torch.bfloat16, 0.4),
}
"""Checkpoints.md, section 1, found 0, 2e-2, 6e-2, 9e-3 and .22 on a similar model."""


@pytest.mark.parametrize("spec", LEVELS)
def test_loads_in_transformers(spec: str, tmp_path: Path) -> None:
    layout = CompressedTensors.from_spec(spec)
    dtype, bound = LEVELS[spec]
    decoded = write_model(tmp_path, layout, dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
    found = logits_of(model)
    reference = tiny_model("llama", SHAPES).to(dtype).float()
    for module, weights in decoded.items():
        reference.get_submodule(module).weight.data.copy_(torch.from_numpy(weights))
        loaded = model.get_submodule(module).weight.float().numpy()
        # every weight, as engines decode it
        np.testing.assert_allclose(loaded, weights, rtol=2.0**-7 if dtype == torch.bfloat16 else 1e-6, atol=0)
    off = relative(found, logits_of(reference))
    assert off < bound
    assert (off > 1e-3) == (layout.activations != "float" or dtype == torch.bfloat16)


@pytest.mark.parametrize("spec", ["w4a16g128", "fp8", "w8a8"])
def test_loads_as_it_is_stored(spec: str, tmp_path: Path) -> None:
    """In bfloat16, which is what a directory with bfloat16 tensors is loaded in without further ado."""
    layout = CompressedTensors.from_spec(spec)
    decoded = write_model(tmp_path, layout, torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert torch.isfinite(logits_of(model)).all()
    for module, weights in decoded.items():
        np.testing.assert_allclose(model.get_submodule(module).weight.float().numpy(), weights, rtol=2.0**-7, atol=0)


def test_transformers_cannot_load_packed_zero_points(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """So the plain targets are symmetric. vLLM loads them; the package's own decompressor too (see above)."""
    write_model(tmp_path, CompressedTensors.from_spec("w4a16g128-asym"), torch.float32)
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert "weight_zero_point" in caplog.text


def test_targets_are_symmetric_unless_asked() -> None:
    assert CompressedTensors.from_spec("w4a16g128").type.zero == "middle"
    assert CompressedTensors.from_spec("w4a16g128-asym").type.zero == "integer"


def test_every_example_is_a_target() -> None:
    for spec, summary in CompressedTensors.examples().items():
        assert CompressedTensors.from_spec(spec).parts((128, 256))
        assert summary


@pytest.mark.parametrize("spec", ["w9a16g128", "w1a16", "w4a16g100", "w4a4", "fp8-rows", "", "w4g128"])
def test_refuses_unknown_targets(spec: str) -> None:
    with pytest.raises(FewbitsError, match=f"ct:{spec}"):
        CompressedTensors.from_spec(spec)


@pytest.mark.parametrize(
    ("spec", "columns", "message", "nearest"),
    [
        ("w4a16g128", 576, "no multiple of the group 128", "ct:w4a16g64"),
        ("w4a16g128-asym", 96, "no multiple of the group 128", "ct:w4a16g32-asym"),
        ("w8a16g32", 40, "no multiple of the group 32", "ct:w8a16"),
        ("w4a16g128", 36, "8 inputs into whole words", "ct:w8a8"),
        ("fp8-block", 576, "no multiple of the group 128", "ct:fp8"),
        ("mxfp4", 48, "no multiple of the group 32", "ct:nvfp4"),
        ("nvfp4", 40, "no multiple of the group 16", "ct:w8a8"),
    ],
)
def test_refuses_what_does_not_divide(spec: str, columns: int, message: str, nearest: str) -> None:
    with pytest.raises(FewbitsError, match=message) as caught:
        CompressedTensors.from_spec(spec).check((64, columns))
    assert f"Take {nearest}" in caught.value.hint
    CompressedTensors.from_spec(nearest.removeprefix("ct:")).check((64, columns))


def test_static_scales_need_a_peak() -> None:
    for spec, suffix, expected in (("fp8-static", ".input_scale", 2.0), ("nvfp4a4", ".input_global_scale", 3.0)):
        layout = CompressedTensors.from_spec(spec)
        assert layout.activations == "static"
        matrix = layout.type.settle(random_weights(64, 128))
        with pytest.raises(FewbitsError, match="activations"):
            layout.pack(matrix)
        stored = to_torch(layout, layout.pack(matrix, input_peak=896.0), (64, 128))[suffix].float()
        assert stored.tolist() == [expected]
        assert torch.isfinite(to_torch(layout, layout.pack(matrix, input_peak=0.0), (64, 128))[suffix].float()).all()


def changed(config: dict[str, Any], **weights: Any) -> dict[str, Any]:
    group = config["config_groups"]["group_0"]
    return {**config, "config_groups": {"group_0": {**group, "weights": {**group["weights"], **weights}}}}


def test_reads_older_configurations() -> None:
    plain = CompressedTensors.from_spec("w4a16g128").config(["lm_head"])
    group = plain["config_groups"]["group_0"]
    # no format in the group, no strategy, two groups of one scheme, one of activations only
    bare = {key: value for key, value in group.items() if key != "format"}
    del (weights := dict(bare["weights"]))["strategy"]
    several = {"group_0": {**bare, "weights": weights}, "group_1": group, "kv": {"targets": ["a"], "weights": None}}
    layout = CompressedTensors.from_config({**plain, "config_groups": several})
    assert layout.spec() == "ct:w4a16g128"
    block = changed(CompressedTensors.from_spec("fp8-block").config([]), block_structure="128x128")
    assert CompressedTensors.from_config(block).type.block == (128, 128)
    row = changed(CompressedTensors.from_spec("w4a16").config([]), strategy=None, group_size=-1)
    assert CompressedTensors.from_config(row).type.block == (1, 0)


def test_reads_scales_without_axes_and_zero_points_in_bytes() -> None:
    layout = CompressedTensors.from_spec("fp8-tensor")
    matrix = layout.type.settle(random_weights(64, 128))
    arrays = {**layout.pack(matrix)}
    arrays[".weight_scale"] = arrays[".weight_scale"].reshape(())
    parts = {**layout.parts((64, 128)), ".weight_scale": Part("F32", ())}
    assert layout.shape_of(parts) == (64, 128)
    np.testing.assert_array_equal(layout.unpack(arrays, (64, 128)), matrix.decode())
    layout = CompressedTensors.from_spec("w4a16g32-asym")
    matrix = layout.type.settle(random_weights(64, 128))
    assert matrix.zeros is not None
    arrays = {**layout.pack(matrix), ".weight_zero_point": (matrix.zeros - 8).astype(np.int8)}
    parts = {**layout.parts((64, 128)), ".weight_zero_point": Part("I8", (64, 4))}
    assert layout.shape_of(parts) == (64, 128)
    np.testing.assert_array_equal(layout.unpack(arrays, (64, 128)), matrix.decode())


def test_reads_groups_in_order_of_activations() -> None:
    """actorder of llm-compressor before August 2026: g_idx names the group of each column."""
    layout = CompressedTensors.from_spec("w4a16g32")
    matrix = layout.type.settle(random_weights(16, 128))
    g_idx = np.random.default_rng(0).permutation(np.arange(128) // 32).astype(np.int32)
    expected = (matrix.codes.astype(np.float32) - 8) * matrix.scales[:, g_idx]
    found = layout.unpack({**layout.pack(matrix), ".weight_g_idx": g_idx}, (16, 128))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 6, "type": "float"}, "6 bits"),
        ({"num_bits": "4"}, "'4'"),
        ({"num_bits": 12}, "12 bits"),
        ({"strategy": "head"}, "'head'"),
        ({"group_size": "x"}, "'x'"),
        ({"strategy": "block", "block_structure": "128"}, r"\[128\]"),
        ({"strategy": "block", "block_structure": [128, 128]}, "'block'"),
        ({"type": "complex"}, "'complex'"),
    ],
)
def test_refuses_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        CompressedTensors.from_config(changed(CompressedTensors.from_spec("w4a16g128").config([]), **change))


def test_reads_several_schemes() -> None:
    """Each module's parts tell which of the schemes is its own."""
    layouts = [CompressedTensors.from_spec(spec) for spec in ("w4a16g128", "w4a16g64-asym", "w8a16", "fp8", "nvfp4")]
    groups = {f"group_{i}": layout.config([])["config_groups"]["group_0"] for i, layout in enumerate(layouts)}
    config = {**layouts[0].config([]), "format": "mixed-precision", "config_groups": groups}
    mixed = CompressedTensors.from_config(config)
    for layout in layouts:
        matrix = layout.type.settle(random_weights(64, 256))
        arrays = layout.pack(matrix)
        found, shape = mixed.identify(layout.parts((64, 256)), arrays)
        assert (found.type, found.format, shape) == (layout.type, layout.format, (64, 256))
        np.testing.assert_array_equal(found.unpack(arrays, shape), matrix.decode())
    with pytest.raises(FewbitsError, match="belongs"):
        mixed.identify({**layouts[0].parts((64, 256)), ".weight_scale": Part("BF16", (64, 3))}, {})


def test_reads_rows_that_fill_no_whole_words() -> None:
    layout = CompressedTensors.from_spec("w3a16")
    matrix = layout.type.settle(random_weights(5, 37))
    arrays = layout.pack(matrix)
    found, shape = layout.identify(layout.parts((5, 37)), arrays)
    assert shape == (5, 37)
    np.testing.assert_array_equal(found.unpack(arrays, shape), matrix.decode())
    for stated in ([5, 64], [6, 37], [-5, 37], [5, 2**40]):
        with pytest.raises(FewbitsError):
            layout.identify(layout.parts((5, 37)), {".weight_shape": np.array(stated)})


def test_refuses_configurations_without_schemes() -> None:
    one = CompressedTensors.from_spec("w4a16g128").config([])
    for groups in ({}, None, {"W8A8": ["Linear"]}, {"group_0": {"targets": ["Linear"]}}):
        with pytest.raises(FewbitsError, match="config_groups"):
            CompressedTensors.from_config({**one, "config_groups": groups})
    with pytest.raises(FewbitsError, match="marlin-24"):
        CompressedTensors.from_config({**one, "format": "marlin-24", "config_groups": {
            "group_0": {**one["config_groups"]["group_0"], "format": None}
        }})  # fmt: skip


@pytest.mark.parametrize("spec", ["w4a16g32-asym", "w8a8", "fp8-block", "nvfp4", "mxfp4"])
def test_refuses_damaged_parts(spec: str) -> None:
    layout = CompressedTensors.from_spec(spec)
    arrays = pack(layout, layout.type.settle(random_weights(64, 128)))
    parts = layout.parts((64, 128))
    for suffix, part in parts.items():
        with pytest.raises(FewbitsError, match=rf"\{suffix} is missing"):
            layout.shape_of({name: other for name, other in parts.items() if name != suffix})
        if (spec, suffix) != ("w8a8", ".weight"):  # which would just be another matrix
            with pytest.raises(FewbitsError):
                layout.shape_of({**parts, suffix: Part(part.dtype, (*part.shape[:-1], part.shape[-1] + 1))})
        with pytest.raises(FewbitsError):
            layout.shape_of({**parts, suffix: Part("BOOL", part.shape)})
    scale = arrays[".weight_scale"].copy()
    scale.reshape(-1)[0] = {"BF16": 0x7F80, "F8_E4M3": 127, "U8": 255}[parts[".weight_scale"].dtype]
    with pytest.raises(FewbitsError, match=r"\.weight_scale holds values that are not finite"):
        layout.unpack({**arrays, ".weight_scale": scale}, (64, 128))
    wrong = {
        "w4a16g32-asym": (".weight_shape", np.array([128, 64])),
        "fp8-block": (".weight", np.full((64, 128), 255, np.uint8)),
        "nvfp4": (".weight_global_scale", np.zeros(1, np.float32)),
    }
    if spec in wrong:
        suffix, array = wrong[spec]
        with pytest.raises(FewbitsError, match=rf"\{suffix}"):
            layout.unpack({**arrays, suffix: array}, (64, 128))


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_any_parts_are_refused_or_have_a_shape(data: st.DataObject) -> None:
    layout = CompressedTensors.from_spec(data.draw(st.sampled_from(ALL)))
    shapes = st.lists(st.integers(0, 70), max_size=3).map(tuple)
    part = st.builds(Part, st.sampled_from(["I32", "F16", "U8", "I8", "F8_E4M3", "I64", "F32"]), shapes)
    parts = data.draw(st.fixed_dictionaries({suffix: part for suffix in layout.parts((128, 256))}))
    try:
        _, (rows, columns) = layout.identify(parts, {})
    except FewbitsError:
        return
    assert layout.parts((rows, columns))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 200) | st.sampled_from(["int", "float", "group", "block", "x"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["weights", "format"]), inner, max_size=2)
    ),
    max_leaves=6,
)


@given(
    weights=st.dictionaries(
        st.sampled_from(["num_bits", "type", "strategy", "group_size", "block_structure", "symmetric"]), JSON
    ),
    packing=st.sampled_from(["pack-quantized", "float-quantized", "nvfp4-pack-quantized"]) | JSON,
)
@settings(deadline=None, max_examples=200)
def test_any_configuration_is_read_or_refused(weights: dict[str, Any], packing: Any) -> None:
    config = {"format": packing, "config_groups": {"group_0": {"weights": weights}}}
    try:
        layout = CompressedTensors.from_config(config)
    except FewbitsError:
        return
    assert layout.type.name
