"""Quantized directories of every ecosystem, read as the plain models they stand for."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fewbits
from fewbits.checkpoint import GGUFCheckpoint, SafetensorsCheckpoint
from fewbits.checkpoint.model import Model
from fewbits.errors import FewbitsError
from fewbits.forward.streamed import load_whole
from fewbits.layouts import LAYOUTS, Layout
from quantized_tiny import TORCH_TYPES, WIDE, apart, logits, packed, save_quantized
from tiny_models import save_tiny, tiny_model

TARGETS = (
    "gptq:w4g128", "gptq:w3g64", "gptq:w8g32-asym", "gptq:w4g-1-asym-v2", "awq:w4g128", "bnb:nf4", "bnb:fp4-single",
    "bnb:int8", "ct:w4a16g128", "ct:w4a16g128-asym", "ct:w3a16", "ct:fp8", "ct:fp8-tensor", "ct:fp8-block", "ct:w8a8",
    "ct:nvfp4", "ct:mxfp4", "hqq:w4g64", "hqq:w3g64-axis0", "fp8:block128",
)  # fmt: skip
A_TARGET_EACH = ("gptq:w4g128", "awq:w4g128", "bnb:nf4", "ct:w4a16g128", "ct:fp8", "hqq:w4g64", "fp8:block128")
KEPT = ("layers.1.mlp",)


def layout(target: str) -> Layout:
    name, _, spec = target.partition(":")
    return LAYOUTS[name].from_spec(spec)


def changed(folder: Path, tensors: dict[str, torch.Tensor | None] = {}, **config: Any) -> Path:  # noqa: B006
    """Change tensors and config.json of a directory; None takes something away."""
    stored = {name: value for name, value in (load_file(folder / "model.safetensors") | tensors).items()}
    save_file({k: v for k, v in stored.items() if v is not None}, folder / "model.safetensors")
    found = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_reads_the_plain_model(tmp_path: Path, target: str) -> None:
    """Names, shapes and values of a model that was never quantized, with some of its modules left as they were."""
    reference = save_quantized(tmp_path, layout(target), "BF16", keep=KEPT)
    wanted = {name: value.numpy() for name, value in reference.state_dict().items()}
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert set(checkpoint.tensors) == set(wanted)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(info.nbytes for info in checkpoint.tensors.values()) == sum(t.nbytes for t in stored.values())
    for name, value in wanted.items():
        info = checkpoint.info(name)
        quantized = name.endswith("_proj.weight") and KEPT[0] not in name
        assert (info.shape, info.dtype) == (value.shape, layout(target).type.name if quantized else "BF16")
        np.testing.assert_array_equal(checkpoint.read(name), value, err_msg=name)
        if value.ndim == 2:
            np.testing.assert_array_equal(checkpoint.read(name, slice(5, 77)), value[5:77])
            np.testing.assert_array_equal(checkpoint.read(name, np.array([40, 3, 3])), value[[40, 3, 3]])
    whole = load_whole(Model(checkpoint))
    assert apart(logits(whole), logits(reference)) < 1e-5


@pytest.mark.parametrize("target", A_TARGET_EACH)
def test_goes_into_a_gguf_and_is_inspected(tmp_path: Path, target: str) -> None:
    """The same bytes as from a plain model of the decoded weights."""
    reference = save_quantized(tmp_path / "quantized", layout(target), "F16", "llama")
    reference.save_pretrained(tmp_path / "plain")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "plain" / file).write_bytes((tmp_path / "quantized" / file).read_bytes())
    found = fewbits.inspect(tmp_path / "quantized")
    assert found.n_weights == sum(value.numel() for value in reference.state_dict().values())
    assert {share.dtype for share in found.types} == {"F16", layout(target).type.name}
    files = {}
    for source in ("quantized", "plain"):
        fewbits.quantize(tmp_path / source, "Q4_K_M", tmp_path / f"{source}.gguf")
        files[source] = GGUFCheckpoint(tmp_path / f"{source}.gguf")
    for name, info in files["plain"].tensors.items():
        assert files["quantized"].info(name).dtype == info.dtype
        np.testing.assert_array_equal(files["quantized"].raw(name), files["plain"].raw(name), err_msg=name)


def test_threads_read_slabs(tmp_path: Path) -> None:
    reference = save_quantized(tmp_path, layout("gptq:w4g64"), model="llama")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    wanted = {name: value.numpy() for name, value in reference.state_dict().items()}
    jobs = [
        (name, slice(start, start + 16))
        for name in wanted
        if name.endswith("_proj.weight")
        for start in range(0, 128, 16)
    ]
    with ThreadPoolExecutor(4) as pool:
        for (name, rows), found in zip(jobs, pool.map(lambda job: checkpoint.read(*job), jobs), strict=True):
            np.testing.assert_array_equal(found, wanted[name][rows])
            found[:] = 0  # what a reader does to its rows is nobody else's business
    np.testing.assert_array_equal(checkpoint.read(jobs[-1][0]), wanted[jobs[-1][0]])
    np.testing.assert_array_equal(checkpoint.read(*jobs[-1]), wanted[jobs[-1][0]][jobs[-1][1]])


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_reads_quantized_conv1d(tmp_path: Path, kind: str) -> None:
    """GPT-2 keeps [in, out]; quantizers store [out, in]."""
    tiny_model("gpt2").save_pretrained(tmp_path / "plain")
    config = transformers.BitsAndBytesConfig(**{f"load_in_{kind}": True})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "quantized")
    plain = SafetensorsCheckpoint(tmp_path / "plain")
    quantized = SafetensorsCheckpoint(tmp_path / "quantized")
    assert set(quantized.tensors) == set(plain.tensors)
    for name, info in plain.tensors.items():
        assert quantized.info(name).shape == info.shape
        error = np.abs(quantized.read(name) - plain.read(name)).max()
        assert error < (0.01 if kind == "8bit" else 0.25) * np.abs(plain.read(name)).max(), name


@pytest.mark.parametrize(("dtype", "level"), [("F16", 5e-3), ("BF16", 4e-2), ("F32", 1e-5)])
def test_transformers_loads_native_fp8(tmp_path: Path, dtype: str, level: float) -> None:
    """Without a GPU transformers decodes it, to the checkpoint's own type and no other."""
    reference = save_quantized(tmp_path, layout("fp8:block128"), dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == TORCH_TYPES[dtype]
    assert apart(logits(model), logits(reference)) < level


@pytest.mark.parametrize("shape", [(192, 128), (128, 576)])
def test_cut_blocks_are_read_and_not_written(tmp_path: Path, shape: tuple[int, int]) -> None:
    """DeepSeek-V3 has some; transformers on the CPU misreads them."""
    fp8 = layout("fp8:block128")
    with pytest.raises(FewbitsError, match=r"no whole blocks of 128x128\. Take ct:fp8"):
        fp8.check(shape)
    fp8.check((384, 256))
    matrix = fp8.type.settle(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    save_file({f"m{suffix}": part for suffix, part in packed(fp8, matrix).items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": fp8.config([])}))
    np.testing.assert_array_equal(SafetensorsCheckpoint(tmp_path).read("m.weight"), matrix.decode())


def test_reads_scales_of_other_writers(tmp_path: Path) -> None:
    codes = torch.randn(96, 64).to(torch.float8_e4m3fn)
    for scale in (torch.rand(()), torch.rand(1), torch.rand(1, 1), torch.rand(96), torch.rand(96, 1).bfloat16()):
        for name in ("weight_scale", "weight_scale_inv"):
            save_file(
                {"m.weight": codes, f"m.{name}": scale, "m.input_scale": torch.ones(1), "n.k_scale": torch.ones(1)},
                tmp_path / "model.safetensors",
            )
            (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
            checkpoint = SafetensorsCheckpoint(tmp_path)
            assert list(checkpoint.tensors) == ["m.weight"]
            wanted = codes.float() * scale.float().reshape(-1, 1)
            np.testing.assert_array_equal(checkpoint.read("m.weight"), wanted.numpy())


def test_weights_that_are_not_packed_yet_are_plain(tmp_path: Path) -> None:
    """compressed-tensors with quantization_status `frozen`: dense weights beside the scales to pack them with."""
    reference = save_quantized(tmp_path, layout("ct:w4a16g128"), "BF16")
    tensors: dict[str, torch.Tensor | None] = {}
    for name, value in reference.state_dict().items():
        if name.endswith("_proj.weight"):
            tensors |= {name: value.bfloat16(), f"{name}_packed": None, f"{name}_shape": None}
    config = layout("ct:w4a16g128").config(["lm_head"]) | {"quantization_status": "frozen"}
    checkpoint = SafetensorsCheckpoint(changed(tmp_path, tensors, quantization_config=config))
    assert set(checkpoint.tensors) == set(reference.state_dict())
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}


def test_markers_tell_without_a_configuration(tmp_path: Path) -> None:
    for target in ("bnb:nf4", "bnb:int8", "hqq:w4g64", "fp8:block128"):
        reference = save_quantized(tmp_path / target, layout(target), "F16")
        checkpoint = SafetensorsCheckpoint(changed(tmp_path / target, quantization_config=None))
        assert set(checkpoint.tensors) == set(reference.state_dict())


@pytest.mark.parametrize(
    ("target", "file", "settings"),
    [
        ("gptq:w4g64", "quantize_config.json", {"bits": 4, "group_size": 64, "desc_act": False, "sym": True}),
        ("awq:w4g64", "quant_config.json", {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}),
    ],
)
def test_reads_settings_in_a_file_of_their_own(tmp_path: Path, target: str, file: str, settings: dict) -> None:
    """As AutoGPTQ and AutoAWQ had them before config.json was the place."""
    reference = save_quantized(tmp_path, layout(target), "F16")
    changed(tmp_path, quantization_config=None)
    (tmp_path / file).write_text(json.dumps(settings))
    checkpoint = SafetensorsCheckpoint(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(checkpoint.read(name), reference.state_dict()[name].numpy())


@pytest.mark.parametrize("method", ["vptq", "mxfp4", "", None, 4])
def test_refuses_unknown_quantization(tmp_path: Path, method: Any) -> None:
    changed(save_tiny(tmp_path, "llama"), quantization_config={"quant_method": method})
    with pytest.raises(FewbitsError, match=r"already quantized with .*Known are aqlm, awq") as caught:
        SafetensorsCheckpoint(tmp_path)
    assert repr(method) in str(caught.value)
    changed(tmp_path, quantization_config="gptq")
    with pytest.raises(FewbitsError, match="'gptq'"):
        SafetensorsCheckpoint(tmp_path)


def test_refuses_8_bit_floats_under_unknown_names(tmp_path: Path) -> None:
    codes = torch.zeros(2, 8, 8).to(torch.float8_e4m3fn)
    experts = {"experts.gate_up_proj": codes, "experts.gate_up_proj_scale_inv": torch.ones(2, 1, 1)}
    save_file(experts, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    with pytest.raises(FewbitsError, match=r"'experts\.gate_up_proj' .* cannot be read yet"):
        SafetensorsCheckpoint(tmp_path)
    save_file({"m.weight": codes, "m.weight_scale_inv": torch.ones(2, 1, 1)}, tmp_path / "model.safetensors")
    with pytest.raises(FewbitsError, match=r"m: \.weight has shape"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("target", A_TARGET_EACH)
def test_refuses_damaged_modules(tmp_path: Path, target: str) -> None:
    """Any part of one module taken away, cut or of another type: refused with the module's name."""
    save_quantized(tmp_path, layout(target), "F16", "llama")
    module = "model.layers.1.mlp.up_proj"
    parts = layout(target).parts((WIDE["intermediate_size"], WIDE["hidden_size"]))
    whole = load_file(tmp_path / "model.safetensors")
    wanted = SafetensorsCheckpoint(tmp_path).read(f"{module}.weight")
    optional = {".g_idx", ".weight_format"}
    for suffix, part in parts.items():
        if target.startswith("hqq") and suffix not in (".W_q", ".scale", ".zero", ".shape", ".nbits"):
            continue
        stored = whole[module + suffix]
        damages = [None]
        if part.shape and part.shape != (1,):
            # not by one only: JSON is padded, and one scale could be of the whole matrix
            damages += [stored[: len(stored) * 2 // 5].contiguous(), torch.stack([stored, stored])]
        if suffix not in optional:
            damages.append(stored.reshape(-1).view(torch.uint8).to(torch.int16))
        for damage in damages:
            save_file(whole | {module + suffix: damage} if damage is not None else {
                name: value for name, value in whole.items() if name != module + suffix
            }, tmp_path / "model.safetensors")  # fmt: skip
            if damage is None and suffix in optional:
                np.testing.assert_array_equal(SafetensorsCheckpoint(tmp_path).read(f"{module}.weight"), wanted)
                continue
            with pytest.raises(FewbitsError, match=module.replace(".", r"\.")) as caught:
                SafetensorsCheckpoint(tmp_path).read(f"{module}.weight")
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", A_TARGET_EACH)
def test_refuses_values_that_cannot_be(tmp_path: Path, target: str) -> None:
    save_quantized(tmp_path, layout(target), "F16", "llama")
    module = "model.layers.0.self_attn.q_proj"
    for name, value in load_file(tmp_path / "model.safetensors").items():
        if name.startswith(f"{module}.") and value.dtype in (torch.float32, torch.float16, torch.bfloat16):
            changed(tmp_path, {name: torch.full_like(value, float("nan"))})
            with pytest.raises(FewbitsError, match=r"q_proj: \.\S+ holds values that are not finite"):
                SafetensorsCheckpoint(tmp_path).read(f"{module}.weight")
            changed(tmp_path, {name: value})
    with pytest.raises(FewbitsError, match="in several tensors"):
        SafetensorsCheckpoint(tmp_path).raw(f"{module}.weight")


def test_refuses_a_file_cut_short_while_reading(tmp_path: Path) -> None:
    save_quantized(tmp_path, layout("gptq:w4g128"), "F16", "llama")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:4096])
    with pytest.raises(FewbitsError, match="ends early"):
        checkpoint.read("model.layers.1.self_attn.v_proj.weight")


@pytest.fixture(scope="module", params=A_TARGET_EACH)
def small_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, str]:
    """A directory with one quantized module, its weights' bytes and its configuration."""
    folder = tmp_path_factory.mktemp("small")
    save_quantized(folder, layout(request.param), "F16", "llama")
    kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if "layers.0.self_attn.k_proj" in k}
    save_file(kept, folder / "model.safetensors")
    return folder, (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_text()


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_damaged_bytes_never_crash(small_file: tuple[Path, bytes, str], data: st.DataObject) -> None:
    """Whatever bytes are changed, weights come out in their shape or one error does."""
    folder, content, _ = small_file
    header = int.from_bytes(content[:8], "little")
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        spot = data.draw(st.sampled_from(("header", "data")))
        low, high = (8, 8 + header - 1) if spot == "header" else (8 + header, len(content) - 1)
        damaged[data.draw(st.integers(low, high))] = data.draw(st.integers(0, 255))
    (folder / "model.safetensors").write_bytes(damaged)
    with np.errstate(all="ignore"):
        try:
            checkpoint = SafetensorsCheckpoint(folder)
            for name, info in checkpoint.tensors.items():
                assert checkpoint.read(name).shape == info.shape
        except FewbitsError as error:
            assert "\n" not in str(error)


_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 200), st.floats(allow_nan=False), st.text(max_size=4),
    st.lists(st.integers(-1, 200), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_hostile_settings_never_crash(small_file: tuple[Path, bytes, str], data: st.DataObject) -> None:
    folder, content, config = small_file
    (folder / "model.safetensors").write_bytes(content)
    found = json.loads(config)
    place = found["quantization_config"]
    for _ in range(data.draw(st.integers(0, 2))):
        inner = [value for value in place.values() if isinstance(value, dict) and value]
        if inner:
            place = data.draw(st.sampled_from(inner))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(_VALUES)
    (folder / "config.json").write_text(json.dumps(found))
    try:
        checkpoint = SafetensorsCheckpoint(folder)
        for name in checkpoint.tensors:
            checkpoint.read(name)
    except FewbitsError as error:
        assert "\n" not in str(error)
    finally:
        (folder / "config.json").write_text(config)
