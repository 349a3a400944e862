"""BitNet b1.58: three levels in transformers' packing and in GGUF, rounding by the mean, what the engines compute."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers.integrations.bitnet import pack_weights

import fewbits
from fewbits.arch import gguf_metadata
from fewbits.checkpoint import Model, open_model
from fewbits.codecs.scaled import Quantized
from fewbits.errors import FewbitsError
from fewbits.layouts.base import Part
from fewbits.layouts.bitnet import CLASSES, TERNARY, BitNet
from fewbits.methods import AbsMean, Known
from fewbits.methods.absmean import relative_error
from fewbits.plan.directory import is_directory_target, target
from fewbits.quantize.three_levels import three_levels_notes
from quantized_tiny import is_linear
from tiny_models import save_tiny, tiny_model, tiny_tokenizer

SIZES = {"hidden_size": 256, "intermediate_size": 512}
"""Rows that TQ1_0 and TQ2_0 divide."""
IDS = torch.arange(5, 69)[None]
UNEXACT = {"bitlinear": 2.0**-23, "autobitlinear": 0.0}
"""How far a scale may come back changed: 1/(1/g) need not be g."""


def rounded_as_trained(weights: torch.Tensor) -> torch.Tensor:
    """What BitNet's training makes of a weight at every pass, in bfloat16: g times -1, 0 or 1."""
    scale = weights.abs().mean().bfloat16().float()
    return torch.clamp(torch.round(weights / scale), -1, 1) * scale


@pytest.fixture(scope="module")
def ternary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the BitNet family with three levels in each linear, in bfloat16."""
    model = tiny_model("bitnet", SIZES)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(rounded_as_trained(weight) if is_linear(name, weight) else weight.bfloat16())
    folder = tmp_path_factory.mktemp("ternary")
    model.bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(ternary: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """That model in both conventions."""
    folder = tmp_path_factory.mktemp("made")
    for name in CLASSES:
        report = fewbits.quantize(ternary, f"bitnet:{name}", folder / name, threads=1)
        assert report.size == sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
    return {name: folder / name for name in CLASSES}


def unlike(found: Path, wanted: Path) -> dict[str, float]:
    """By name, how far the linears of two models differ, relative to their largest weight."""
    one, other = open_model(found), open_model(wanted)
    linears = [name for name in other.names if name.endswith("_proj.weight")]
    assert len(linears) == 14 and sorted(one.names) == sorted(other.names)
    return {
        name: float(np.abs(one.read(name) - other.read(name)).max() / np.abs(other.read(name)).max())
        for name in linears
    }


def in_transformers(folder: Path) -> Any:
    """The model as transformers loads it, its arithmetic in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    # float() is forbidden for quantized models; without it the norms stay bfloat16
    return torch.nn.Module.float(model)


def ours(model: Model) -> transformers.PreTrainedModel:
    """The model with the weights that we decode."""
    plain = tiny_model("bitnet", SIZES)
    weights = {name: torch.from_numpy(model.read(name)) for name in model.names}
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return plain


def to_int8(x: torch.Tensor) -> torch.Tensor:
    """Activations as both linear classes round them, token by token."""
    scale = 127 / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    return (x * scale).round().clamp(-128, 127) / scale


def as_engine(name: str, weight: torch.Tensor) -> Any:
    """A linear class's arithmetic in its very order, with the weight that we decode: g times -1, 0 or 1."""
    g = weight.abs().max()
    levels = weight / g

    def forward(x: torch.Tensor) -> torch.Tensor:
        if name == "autobitlinear":
            return F.linear(to_int8(x), levels) * g
        scale = 127 / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        return F.linear((x * scale).round().clamp(-128, 127), levels) / (scale * (1 / g))

    return forward


# ------------------------------------------------------------------------------------------------------- the layout


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from(sorted(CLASSES)), st.integers(0, 2**32 - 1))
def test_packing_goes_there_and_back(quarter: int, columns: int, name: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    levels = random.integers(-1, 2, (4 * quarter, columns))
    scale = np.float32(np.exp2(random.uniform(-30, 30)))
    layout = BitNet(name)
    arrays = layout.pack(Quantized(TERNARY, (levels + 2).astype(np.uint8), np.full((1, 1), scale)))
    # transformers' own packing
    assert np.array_equal(arrays[".weight"], pack_weights(torch.from_numpy(levels.astype(np.float32))).numpy())
    shape = (4 * quarter, columns)
    parts = {suffix: Part("U8" if a.dtype == np.uint8 else "F32", a.shape) for suffix, a in arrays.items()}
    assert parts == layout.parts(shape) and layout.identify(parts, {}) == (layout, shape)
    np.testing.assert_allclose(layout.unpack(arrays, shape), levels * scale, rtol=UNEXACT[name])


def test_scales_of_any_float_are_read() -> None:
    packed, wanted = np.full((2, 3), 0b10010010, np.uint8), [[1.5], [1.5], [-1.5], [-1.5], [0.0], [0.0], [1.5], [1.5]]
    for scale in (np.array(1.5, np.float16), np.array([0x3FC0], np.uint16), np.array([1.5], np.float32)):
        found = BitNet().unpack({".weight": packed, ".weight_scale": scale}, (8, 3))
        assert np.array_equal(found, np.broadcast_to(np.array(wanted, np.float32), (8, 3)))
        assert BitNet().shape_of({".weight": Part("U8", (2, 3)), ".weight_scale": Part("F16", scale.shape)}) == (8, 3)


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ({".weight_scale": Part("F32", (1,)), ".weight": Part("U8", (4,))}, "axes"),
        ({".weight_scale": Part("F32", (4,)), ".weight": Part("U8", (4, 8))}, "one number"),
        ({".weight_scale": Part("I32", (1,)), ".weight": Part("U8", (4, 8))}, "one number"),
        ({".weight_scale": Part("F32", (1,)), ".weight": Part("I8", (4, 8))}, "bytes"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: dict[str, Part], what: str) -> None:
    with pytest.raises(FewbitsError, match=what):
        BitNet().shape_of(parts)


@pytest.mark.parametrize(
    ("byte", "scale", "name", "what"),
    [
        (0b11, 1.0, "autobitlinear", "code 3"),
        (0b11000000, 1.0, "autobitlinear", "code 3"),
        (0, float("nan"), "autobitlinear", "not finite"),
        (0, 0.0, "bitlinear", "divided"),
    ],
)
def test_values_that_cannot_be_are_refused(byte: int, scale: float, name: str, what: str) -> None:
    arrays = {".weight": np.full((1, 2), byte, np.uint8), ".weight_scale": np.array([scale], np.float32)}
    with pytest.raises(FewbitsError, match=what):
        BitNet(name).unpack(arrays, (4, 2))


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"linear_class": "bitter"}, "linear_class"),
        ({"linear_class": ["bitlinear"]}, "linear_class"),
        ({"linear_class": "autobitlinear", "quantization_mode": "online"}, "every pass"),
        ({"use_rms_norm": True}, "use_rms_norm"),
    ],
)
def test_settings_that_mean_something_else_are_refused(config: dict[str, Any], what: str) -> None:
    with pytest.raises(FewbitsError, match=what):
        BitNet.from_config(config)
    # what transformers takes where config.json does not say
    assert BitNet.from_config({}).linear_class == "bitlinear"


# ------------------------------------------------------------------------------------------------------- the method


def test_other_weights_are_rounded_as_in_training() -> None:
    weights = np.random.default_rng(3).standard_t(4, (64, 96)).astype(np.float32)
    found = AbsMean.make(weights, TERNARY, Known())
    scale = np.abs(weights).mean(dtype=np.float64)
    wanted = np.clip(np.rint(weights / scale), -1, 1) * scale
    np.testing.assert_allclose(found.decode(), wanted, rtol=1e-6)
    share = np.square(weights - wanted).sum() / np.square(weights).sum()
    assert relative_error(weights) == pytest.approx(share, rel=1e-5)
    noise = np.random.default_rng(4).standard_normal((512, 512)).astype(np.float32)
    # of Gaussians, with g = E|x|: 1 - 2g E[|x|; |x| > g/2] + g^2 P(|x| > g/2)
    assert relative_error(noise) == pytest.approx(0.2634, abs=0.002)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-100, 100), st.floats(0, 1))
def test_three_levels_stay_to_the_bit(seed: int, power: float, zeros: float) -> None:
    random = np.random.default_rng(seed)
    scale = np.float32(2.0**power)
    levels = random.choice([-1, 0, 1], (8, 12), p=[(1 - zeros) / 2, zeros, (1 - zeros) / 2]).astype(np.float32)
    weights = levels * scale
    found = AbsMean.make(weights, TERNARY, Known())
    assert np.array_equal(found.decode(), weights)
    assert relative_error(weights) == 0
    arrays = BitNet("bitlinear").pack(found)
    assert np.isfinite(arrays[".weight_scale"]).all() and arrays[".weight_scale"] > 0


# ----------------------------------------------------------------------------------------------------- whole models


def test_the_bare_name_is_what_engines_multiply_by() -> None:
    assert is_directory_target("bitnet") and is_directory_target(" BitNet")
    assert target("bitnet", None, False) == target("bitnet:autobitlinear", None, False)
    for name in ("bitnet:w2", "bitnet:bitlinear2"):
        with pytest.raises(FewbitsError, match="Unknown target"):
            target(name, None, False)
    with pytest.raises(FewbitsError, match="does not make it"):
        target("bitnet", "rtn", False)


@pytest.mark.parametrize("name", CLASSES)
def test_a_ternary_model_loses_nothing(name: str, made: dict[str, Path], ternary: Path) -> None:
    assert max(unlike(made[name], ternary).values()) <= UNEXACT[name]
    stored = load_file(made[name] / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight"].shape == (64, 512)
    assert stored["model.layers.0.mlp.down_proj.weight_scale"].shape == (1,)
    config = json.loads((made[name] / "config.json").read_text())["quantization_config"]
    assert config["linear_class"] == name and "lm_head" in config["modules_to_not_convert"]


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_computes_what_we_decode(name: str, made: dict[str, Path]) -> None:
    model, plain = in_transformers(made[name]), ours(open_model(made[name]))
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(which: str) -> Any:
        def hook(module: Any, given: tuple[torch.Tensor], result: torch.Tensor) -> None:
            seen[which] = given[0], result

        return hook

    for which, module in model.named_modules():
        if type(module).__name__.lower() == name:
            module.register_forward_hook(keep(which))
    # without its compiler, which not every machine has; the same code
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = model(IDS).logits
        assert len(seen) == 14
        for which, (x, y) in seen.items():
            expected = F.linear(to_int8(x), plain.get_submodule(which).weight)
            torch.testing.assert_close(y, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
        floats = plain(IDS).logits
        for which in seen:
            module = plain.get_submodule(which)
            module.forward = as_engine(name, module.weight)
        torch.testing.assert_close(plain(IDS).logits, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    # what rounding activations to 8 bits comes to
    assert float((floats - logits).norm() / logits.norm()) < 0.04


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_gguf_loses_nothing_either(kind: str, ternary: Path, made: dict[str, Path], tmp_path: Path) -> None:
    for source in (ternary, made["autobitlinear"]):
        file = tmp_path / f"{source.name}.gguf"
        fewbits.quantize(source, kind, file, threads=1)
        # the scales of this model are bfloat16 numbers that half precision holds
        assert max(unlike(file, ternary).values()) == 0
        fewbits.quantize(file, "bitnet", tmp_path / source.name, threads=1)
        assert max(unlike(tmp_path / source.name, ternary).values()) == 0


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_llama_cpp_runs_it(kind: str, ternary: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    fewbits.quantize(ternary, kind, tmp_path / "m.gguf", threads=1)
    engine = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    engine.eval(IDS[0].tolist())
    with torch.no_grad():
        wanted = ours(open_model(tmp_path / "m.gguf"))(IDS).logits[0].numpy()
    found = np.array(engine.scores[: IDS.shape[1]])
    # it rounds activations to 8 bits, in blocks of 256
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()
    assert float((found.argmax(axis=1) == wanted.argmax(axis=1)).mean()) > 0.9


def test_the_size_is_foretold(ternary: Path, made: dict[str, Path]) -> None:
    plan = fewbits.plan(ternary, "bitnet")
    assert [file.size for file in plan.files] == [(made["autobitlinear"] / "model.safetensors").stat().st_size]
    linears = [tensor for tensor in plan.tensors if tensor.method == "absmean"]
    assert len(linears) == 14 and all(t.nbytes == t.n_weights // 4 + 4 for t in linears)


def test_models_that_it_cannot_hold_are_refused(ternary: Path, tmp_path: Path) -> None:
    odd = save_tiny(tmp_path / "odd", "bitnet", {"intermediate_size": 98})
    with pytest.raises(FewbitsError, match="4 outputs in a byte, and these are 98"):
        fewbits.plan(odd, "bitnet")
    experts = save_tiny(tmp_path / "experts", "mixtral")
    with pytest.raises(FewbitsError, match="experts"):
        fewbits.plan(experts, "bitnet")
    config = json.loads((ternary / "config.json").read_text())
    with pytest.raises(FewbitsError, match="hidden_act"):
        gguf_metadata(config | {"hidden_act": "relu2"})
    with pytest.raises(FewbitsError, match="tie_word_embeddings"):
        gguf_metadata(config | {"tie_word_embeddings": False})


def test_a_model_that_was_not_trained_so_is_warned_of(ternary: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", "llama")
    (note,) = three_levels_notes(open_model(other), fewbits.plan(other, "bitnet"))
    # random weights are Gaussian
    assert re.search(r"k_proj.weight does not hold three levels: .* lose 2[567]% of", note)
    assert three_levels_notes(open_model(ternary), fewbits.plan(ternary, "bitnet")) == []
    assert three_levels_notes(open_model(other), fewbits.plan(other, "bnb:int8")) == []


def test_damaged_files_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    stored = load_file(made["bitlinear"] / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    for damage, what in ((torch.zeros(3), "one number"), (torch.tensor([float("inf")]), "not finite")):
        folder = tmp_path / what.replace(" ", "-")
        folder.mkdir()
        (folder / "config.json").write_bytes((made["bitlinear"] / "config.json").read_bytes())
        save_file(stored | {f"{name}.weight_scale": damage}, folder / "model.safetensors")
        with pytest.raises(FewbitsError, match=rf"up_proj.*{what}"):
            open_model(folder).read(f"{name}.weight")
