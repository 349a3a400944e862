"""bitsandbytes checkpoints: what we write is what bitsandbytes means by it, and what it writes is read."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import transformers
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fewbits.checkpoint import SafetensorsCheckpoint
from fewbits.errors import FewbitsError
from fewbits.layouts import LAYOUTS
from fewbits.layouts.base import Part
from fewbits.layouts.bitsandbytes import BitsAndBytes
from quantized_tiny import WIDE, apart, is_linear, logits, save_quantized
from tiny_models import tiny_model

SPECS = tuple(BitsAndBytes.examples())
PART_TYPES = {"uint8": "U8", "float32": "F32", "int8": "I8", "float16": "F16", "uint16": "BF16"}


def described(arrays: dict[str, np.ndarray]) -> dict[str, Part]:
    return {suffix: Part(PART_TYPES[array.dtype.name], array.shape) for suffix, array in arrays.items()}


def engine_config(spec: str, dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    if spec == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec[:3],
        bnb_4bit_use_double_quant=not spec.endswith("single"),
        bnb_4bit_compute_dtype=dtype,
    )


def engine_weight(module: torch.nn.Module) -> torch.Tensor:
    """float32 weight of a module of bitsandbytes', by its own arithmetic."""
    weight = module.weight
    if isinstance(module, bnb.nn.Linear8bitLt):
        return bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    state = weight.quant_state
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(weight.data, state)


def weights_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {f"{n}.weight": engine_weight(m).numpy() for n, m in model.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("spec", SPECS)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 5), seed=st.integers(0, 99), size=st.floats(1e-30, 1e30))
@settings(max_examples=25, deadline=None)
def test_unpacks_what_it_packed(spec: str, rows: int, blocks: int, seed: int, size: float) -> None:
    layout = BitsAndBytes.from_spec(spec)
    weights = np.random.default_rng(seed).standard_normal((rows, 64 * blocks)).astype(np.float32) * np.float32(size)
    matrix = layout.type.settle(weights)
    arrays = layout.pack(matrix)
    assert described(arrays) == layout.parts(weights.shape)
    found, shape = layout.identify(described(arrays), arrays)
    assert found == layout and shape == weights.shape
    np.testing.assert_array_equal(found.unpack(arrays, shape), matrix.decode())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_transformers_loads_what_we_write(tmp_path: Path, spec: str, dtype: str) -> None:
    reference = save_quantized(tmp_path, LAYOUTS["bnb"].from_spec(spec), dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    found, wanted = weights_of(model), reference.state_dict()
    assert len(found) == 14
    for name, weight in found.items():
        # the engine multiplies in another order
        np.testing.assert_allclose(weight, wanted[name].numpy(), rtol=3e-7, atol=0, err_msg=name)
    exact = logits(reference)
    if spec != "int8":
        for parameter in model.parameters():  # transformers leaves these at the checkpoint's type
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.compute_dtype, module.compute_type_is_set = torch.float32, True
                module.support_avx512bf16_for_cpu = False
        assert apart(logits(model), exact) < 1e-5
    # as they come: activations in int8, or those of 4-bit layers in the checkpoint's type
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert apart(logits(model), exact) < 4e-2


@pytest.mark.parametrize("spec", SPECS)
def test_writes_the_bytes_of_bitsandbytes(tmp_path: Path, spec: str) -> None:
    """Every tensor that transformers writes, from the same weights, with its name, type and shape."""
    tiny_model("llama", WIDE).half().save_pretrained(tmp_path / "plain")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float16, quantization_config=engine_config(spec, torch.float16)
    )
    model.save_pretrained(tmp_path / "engine")
    theirs = load_file(tmp_path / "engine" / "model.safetensors")
    layout = BitsAndBytes.from_spec(spec).for_floats("F16")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    for name, value in plain.items():
        if not is_linear(name, value):
            continue
        module = name.removesuffix(".weight")
        arrays = layout.pack(layout.type.settle(value.float().numpy()))
        ours = {module + suffix: array for suffix, array in arrays.items()}
        assert set(ours) == {key for key in theirs if key.startswith(f"{module}.")}
        for key, array in ours.items():
            engine = theirs[key].numpy()
            if "quant_state" in key:
                assert json.loads(array.tobytes()) | {"nested_offset": 0} == json.loads(engine.tobytes()) | {
                    "nested_offset": 0
                }
                continue
            assert (array.dtype, array.shape) == (engine.dtype, engine.shape)
            # another order of summing the mean moves a few nested codes, and ties may go the other way
            assert np.mean(array != engine) < 0.02 or np.allclose(array, engine, rtol=1e-5)
    written = json.loads((tmp_path / "engine" / "config.json").read_text())["quantization_config"]
    kept = layout.config(["lm_head"])
    assert kept | {"llm_int8_skip_modules": None} == {**kept, **written, "llm_int8_skip_modules": None}
    assert set(written) <= set(kept) | {"bnb_4bit_quant_storage"}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("after_forward", [False, True])
def test_reads_what_transformers_saves(tmp_path: Path, spec: str, after_forward: bool) -> None:
    """Also what it saves after a forward pass on a CPU with AVX512-BF16, which it cannot load itself."""
    tiny_model("llama", WIDE).save_pretrained(tmp_path / "plain")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, quantization_config=engine_config(spec, torch.float32)
    )
    wanted = weights_of(model)
    if after_forward:
        logits(model)
    model.save_pretrained(tmp_path / "engine")
    checkpoint = SafetensorsCheckpoint(tmp_path / "engine")
    assert set(checkpoint.tensors) == set(tiny_model("llama", WIDE).state_dict())
    for name, weight in wanted.items():
        assert checkpoint.info(name).dtype == BitsAndBytes.from_spec(spec).type.name
        # scales saved after a forward pass were rounded to bfloat16, and quantized once more
        error = 2e-2 * np.abs(weight).max() if after_forward and spec != "int8" else 1e-6 * np.abs(weight).max()
        np.testing.assert_allclose(checkpoint.read(name), weight, rtol=0, atol=error, err_msg=name)


def test_reads_scales_laid_out_for_the_cpu_kernel() -> None:
    """The damage of saving after a forward pass, on any machine: absmax [in / 64, out] in bfloat16."""
    layout = BitsAndBytes.from_spec("fp4-single")
    weights = np.random.default_rng(0).standard_normal((96, 256)).astype(np.float32)
    arrays = layout.pack(layout.type.settle(weights))
    turned = torch.from_numpy(arrays[".weight.absmax"]).reshape(96, 4).T.to(torch.bfloat16).contiguous()
    arrays[".weight.absmax"] = turned.view(torch.uint16).numpy()
    found, shape = layout.identify(described(arrays), arrays)
    error = np.abs(found.unpack(arrays, shape) - weights).max()
    assert error < np.abs(layout.type.settle(weights).decode() - weights).max() * 1.02


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(30, 50), (7, 9), (128, 96)])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_reads_blocks_that_cross_rows(
    tmp_path: Path, quant_type: str, nested: bool, shape: tuple[int, int], storage: torch.dtype
) -> None:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, state = bnb.functional.quantize_4bit(
        weights, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    # bitsandbytes' own kernel for CPUs takes the wrong scales here, which its implementation in torch does not
    absmax = state.absmax
    if nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    wanted = _dequantize_4bit_compute(codes.view(torch.uint8).reshape(-1), absmax, state.code, 64, shape, torch.float32)
    parts = {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file({"m.weight": codes, **parts}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert list(checkpoint.tensors) == ["m.weight"]
    np.testing.assert_allclose(checkpoint.read("m.weight"), wanted.numpy(), rtol=3e-7)


def test_refuses_what_it_cannot_write() -> None:
    with pytest.raises(FewbitsError, match=r"blocks of 64\. Take bnb:int8"):
        BitsAndBytes.from_spec("nf4").check((64, 100))
    BitsAndBytes.from_spec("int8").check((64, 100))
    with pytest.raises(FewbitsError, match="Known: bnb:nf4"):
        BitsAndBytes.from_spec("nf5")


def damaged(arrays: dict[str, np.ndarray], suffix: str, state: dict[str, object]) -> dict[str, np.ndarray]:
    found = json.loads(arrays[suffix].tobytes()) | state
    return arrays | {suffix: np.frombuffer(json.dumps(found).encode(), np.uint8)}


@pytest.mark.parametrize("spec", ["nf4", "fp4-single", "int8"])
def test_refuses_damage(spec: str) -> None:
    layout = BitsAndBytes.from_spec(spec)
    arrays = layout.pack(layout.type.settle(np.ones((8, 128), np.float32)))

    def read(changed: dict[str, np.ndarray]) -> None:
        found, shape = layout.identify(described(changed), changed)
        found.unpack(changed, shape)

    read(arrays)
    for suffix, array in arrays.items():
        if suffix == ".weight_format":
            continue
        with pytest.raises(FewbitsError):
            read({key: value for key, value in arrays.items() if key != suffix})
        with pytest.raises(FewbitsError):
            read(arrays | {suffix: array[: len(array) // 2]})
        if array.dtype == np.float32:
            with pytest.raises(FewbitsError, match="not finite"):
                read(arrays | {suffix: np.full_like(array, np.nan)})
    if spec == "int8":
        with pytest.raises(FewbitsError, match="weight_format"):
            read(arrays | {".weight_format": np.array(2, np.uint8)})
        return
    state = next(suffix for suffix in arrays if "quant_state" in suffix)
    for wrong in (
        {"shape": [8, 127]}, {"shape": [-8, -128]}, {"shape": [8, 128, 1]}, {"shape": None}, {"shape": [True, 1024]},
        {"blocksize": 0}, {"blocksize": 1.5}, {"quant_type": "int3"}, {"nested_offset": float("nan")},
        {"nested_offset": "x"}, {"nested_blocksize": -1},
    ):  # fmt: skip
        with pytest.raises(FewbitsError):
            read(damaged(arrays, state, wrong))
    for junk in (b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000):
        with pytest.raises(FewbitsError, match="quant_state"):
            read(arrays | {state: np.frombuffer(junk, np.uint8)})
