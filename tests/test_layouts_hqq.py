"""HQQ checkpoints: hqq's own layers take what we write, and what they save is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fewbits.checkpoint import SafetensorsCheckpoint
from fewbits.errors import FewbitsError
from fewbits.layouts.base import Part
from fewbits.layouts.hqq import HQQ
from quantized_tiny import WIDE, apart, is_linear, logits, packed, save_quantized
from tiny_models import tiny_model

SPECS = ("w8g64", "w4g64", "w3g64", "w2g16", "w1g8", "w4g64-axis0", "w3g32-axis0", "w2g64-axis0", "w8g128-axis0")
PART_TYPES = {"uint8": "U8", "float32": "F32", "int32": "I32", "int64": "I64", "float16": "F16"}


def described(arrays: dict[str, np.ndarray]) -> dict[str, Part]:
    return {suffix: Part(PART_TYPES[array.dtype.name], array.shape) for suffix, array in arrays.items()}


def normal(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def put_hqq_layers(model: torch.nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Fill a model from our safetensors file as hqq can: layer by layer."""
    for name, module in list(model.named_modules()):
        if is_linear(f"{name}.weight", getattr(module, "weight", torch.zeros(1))):
            model.set_submodule(name, HQQLinear(None, None, compute_dtype=dtype, device="cpu"))  # type: ignore[arg-type]
    model.load_state_dict(load_file(path), strict=False)
    return model.eval()


@pytest.mark.parametrize("spec", SPECS)
@given(rows=st.integers(1, 3), columns=st.integers(1, 3), seed=st.integers(0, 99), size=st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_unpacks_what_it_packed(spec: str, rows: int, columns: int, seed: int, size: float) -> None:
    layout = HQQ.from_spec(spec)
    weights = normal((128 * rows, 128 * columns), seed) * np.float32(size)
    matrix = layout.type.settle(weights)
    arrays = layout.pack(matrix)
    assert described(arrays) == layout.parts((128 * rows, 128 * columns))
    found, shape = layout.identify(described(arrays), arrays)
    assert found == layout and shape == weights.shape
    np.testing.assert_array_equal(found.unpack(arrays, shape), matrix.decode())


@pytest.mark.parametrize("spec", SPECS)
def test_hqq_loads_what_we_write(spec: str) -> None:
    layout = HQQ.from_spec(spec)
    matrix = layout.type.settle(normal((128, 256)))
    layer = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")  # type: ignore[arg-type]
    layer.load_state_dict({suffix[1:]: value for suffix, value in packed(layout, matrix).items()})
    np.testing.assert_array_equal(layer.dequantize().numpy(), matrix.decode())
    assert (layer.out_features, layer.in_features) == (128, 256)


@pytest.mark.parametrize("spec", SPECS)
def test_writes_the_state_of_hqq(spec: str) -> None:
    """Every tensor of a layer's state_dict with its name, type and shape, and its value where we choose it."""
    layout = HQQ.from_spec(spec)
    linear = torch.nn.Linear(256, 128, bias=False)
    config = BaseQuantizeConfig(nbits=layout.type.bits, group_size=layout.group, axis=layout.axis)
    theirs = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu").state_dict()
    ours = packed(layout.for_floats("F32"), layout.type.settle(normal((128, 256))))
    assert {suffix[1:] for suffix in ours} == set(theirs)
    for suffix, value in ours.items():
        engine = theirs[suffix[1:]]
        assert (value.dtype, value.shape) == (engine.dtype, engine.shape), suffix
        if suffix not in (".W_q", ".scale", ".zero"):
            assert torch.equal(value, engine), suffix
    assert layout.config(["lm_head"])["quant_config"]["weight_quant_params"] == config["weight_quant_params"]


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1.58, 1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("shape", "group"), [((128, 256), 64), ((64, 40), 16), ((64, 24), 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_hqq_saves(
    tmp_path: Path, bits: float, axis: int, shape: tuple[int, int], group: int, dtype: torch.dtype
) -> None:
    """All widths, also of 5, 6 and 1.58 bits, groups that run on across rows, scales of every type."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0])
    weights = linear.weight.detach().numpy().copy()
    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)  # type: ignore[arg-type]
    layer = HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
    save_file({f"m.{key}": value for key, value in layer.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert sorted(checkpoint.tensors) == ["m.bias", "m.weight"]
    read = checkpoint.read("m.weight")
    assert read.shape == shape
    wanted = layer.dequantize().float().numpy()
    level = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype] * 2**bits
    assert np.abs(read - wanted).max() <= level * np.abs(weights).max()


def test_reads_codes_viewed_as_floats(tmp_path: Path) -> None:
    for bits in (3, 4):
        config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1, view_as_float=True)
        layer = HQQLinear(torch.nn.Linear(128, 64, bias=False), config, compute_dtype=torch.float32, device="cpu")
        state = layer.state_dict()
        assert state["W_q"].dtype == torch.float32
        save_file({f"m.{key}": value for key, value in state.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        np.testing.assert_allclose(
            SafetensorsCheckpoint(tmp_path).read("m.weight"), layer.dequantize().numpy(), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("spec", ["w4g64", "w3g64", "w2g16-axis0"])
def test_a_model_of_hqq_layers_computes_ours(tmp_path: Path, spec: str) -> None:
    reference = save_quantized(tmp_path, HQQ.from_spec(spec), "F16")
    model = put_hqq_layers(tiny_model("llama-bias", WIDE), tmp_path / "model.safetensors")
    assert apart(logits(model), logits(reference)) < 1e-5
    half = put_hqq_layers(tiny_model("llama-bias", WIDE).half(), tmp_path / "model.safetensors", torch.float16)
    assert apart(logits(half), logits(reference)) < 5e-3
    checkpoint = SafetensorsCheckpoint(tmp_path)
    for name, value in reference.state_dict().items():
        np.testing.assert_array_equal(checkpoint.read(name), value.numpy(), err_msg=name)


def test_codes_lie_where_hqq_looks_for_them() -> None:
    """Known answers: which code is in which bits."""
    for bits, group, axis in ((4, 8, 1), (3, 8, 1), (2, 8, 1), (1, 8, 1), (4, 8, 0), (3, 16, 0)):
        layout = HQQ.of(bits, group, axis)
        matrix = layout.type.settle(normal((16, 40) if axis else (32, 10)))
        grouped = torch.from_numpy(matrix.codes.reshape(layout._grouped(matrix.codes.shape)).copy())
        wanted = Quantizer.pack[Quantizer.bit_to_packing[bits]](grouped)
        np.testing.assert_array_equal(layout.pack(matrix)[".W_q"], wanted.numpy())


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("w4g64", (64, 96), "Rows of 96 are no multiple of the group 64. Take hqq:w4g32."),
        ("w4g64-axis0", (96, 64), "Columns of 96 are no multiple of the group 64. Take hqq:w4g32-axis0."),
        ("w4g64", (64, 100), "Keep this tensor"),
        ("w4g64", (1, 64), "does not come out even. Take hqq:w8g64"),
    ],
)
def test_refuses_what_it_cannot_write(spec: str, shape: tuple[int, int], message: str) -> None:
    with pytest.raises(FewbitsError) as caught:
        HQQ.from_spec(spec).check(shape)
    assert message in str(caught.value)


@pytest.mark.parametrize("spec", ["w5g64", "w4g12", "w4g0", "w4", "w4g64-axis1", "int4"])
def test_refuses_unknown_targets(spec: str) -> None:
    with pytest.raises(FewbitsError, match="Unknown target 'hqq:"):
        HQQ.from_spec(spec)


@pytest.mark.parametrize("spec", ["w4g64", "w3g64-axis0"])
def test_refuses_damage(spec: str) -> None:
    layout = HQQ.from_spec(spec)
    arrays = layout.pack(layout.type.settle(normal((64, 128))))

    def read(**changed: Any) -> None:
        found = arrays | {f".{key}": value for key, value in changed.items() if value is not None}
        found = {suffix: array for suffix, array in found.items() if changed.get(suffix[1:], array) is not None}
        layout_found, shape = layout.identify(described(found), found)
        layout_found.unpack(found, shape)

    read()
    read(quant_scale=None, quant_zero=None, round_zero=None, compute_dtype=None)
    for key in ("W_q", "scale", "zero", "shape", "nbits", "group_size", "axis", "packing"):
        with pytest.raises(FewbitsError):
            read(**{key: None})
    for changed in (
        {"shape": np.array([64, 127])}, {"shape": np.array([-64, -128])}, {"shape": np.array([64, 128, 1])},
        {"nbits": np.array(7, np.int32)}, {"nbits": np.array(8, np.int32)}, {"nbits": np.array(np.nan, np.float32)},
        {"group_size": np.array(0, np.int32)}, {"group_size": np.array(48, np.int32)}, {"axis": np.array(2, np.int32)},
        {"axis": np.array([0, 1], np.int32)}, {"packing": np.frombuffer(b"5bit", np.uint8)},
        {"quant_zero": np.array(1, np.uint8)}, {"W_q": arrays[".W_q"][:-1]}, {"scale": arrays[".scale"][:0]},
        {"zero": np.full_like(arrays[".zero"], np.inf)}, {"scale": np.full_like(arrays[".scale"], np.nan)},
    ):  # fmt: skip
        with pytest.raises(FewbitsError):
            read(**changed)


def test_config_is_what_transformers_4_reads() -> None:
    config = HQQ.from_spec("w2g16").config(["lm_head"])
    assert config["quant_method"] == "hqq" and config["skip_modules"] == ["lm_head"]
    assert HQQ.from_config(json.loads(json.dumps(config))) == HQQ.from_spec("w2g16")
    with pytest.raises(FewbitsError, match="'nbits' is 'x'"):
        HQQ.from_config({"quant_config": {"weight_quant_params": {"nbits": "x"}}})
