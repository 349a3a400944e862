"""Model directories of a given size: bits by layer, what engines make of them, and plans edited by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hqq.core.quantize import HQQLinear
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import fewbits
from fewbits.errors import FewbitsError
from fewbits.forward.streamed import load_whole
from fewbits.layouts.base import Part
from fewbits.layouts.compressed_tensors import CompressedTensors
from fewbits.layouts.gptq import FUSED_NAMES, GPTQ
from fewbits.plan import Plan
from fewbits.quantize.budget import Budget
from tiny_models import save_tiny

DEMO = Path(fewbits.__file__).parent / "demo"
MODEL = DEMO / "model"


def options_of(target: str, texts: tuple[Path, Path]) -> dict[str, Any]:
    if target.endswith("-v2"):
        return {"method": "search"}
    return {"calibration": texts[0], "calibration_chunks": 4} if target.startswith("gptq:") else {}


def kl(model: Path, texts: tuple[Path, Path]) -> float:
    report = fewbits.measure(model, texts[1], reference=MODEL, context=128, chunks=12, cache=False)
    assert report.comparison is not None
    return report.comparison.kl.mean.value


def linears(plan: Plan) -> dict[str, str]:
    """Types of the quantized linears."""
    return {tensor.name: tensor.codec for tensor in plan.tensors if tensor.method not in ("copy", "convert")}


def bits(plan: Plan) -> float:
    """A weight of the quantized linears."""
    some = [tensor for tensor in plan.tensors if tensor.name in linears(plan)]
    return 8 * sum(tensor.nbytes for tensor in some) / sum(tensor.n_weights for tensor in some)


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text())["quantization_config"])


@pytest.mark.parametrize(
    ("target", "bpw"),
    [("gptq:g64", 3.5), ("gptq:g32-asym-v2", 4.2), ("ct:a16g64", 5.0), ("ct:a16", 6.0), ("hqq:g64", 3.0)],
)
def test_bits_a_weight_are_kept_and_the_model_comes_back(
    target: str, bpw: float, tmp_path: Path, texts: tuple[Path, Path]
) -> None:
    options = options_of(target, texts) | {"budget": Budget(bpw=bpw)}
    plan = fewbits.plan(MODEL, target, **options)
    made = fewbits.quantize(MODEL, target, tmp_path / "out", **options)
    assert plan.files == made.files
    assert made.size == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 0.97 * bpw < bits(plan) <= bpw  # the demo model's layers are coarse steps
    types = linears(plan)
    assert len(set(types.values())) > 1
    for name, found in types.items():  # engines fuse q, k and v; gate and up
        for one, other in (("q_proj", "k_proj"), ("q_proj", "v_proj"), ("gate_proj", "up_proj")):
            assert found == types[name.replace(one, other)]
    read = {t["name"]: t["dtype"] for t in fewbits.inspect(tmp_path / "out").tensors if t["name"] in types}
    # stored zero points are read even where they are all the same
    assert {name: dtype.removeprefix("U") for name, dtype in read.items()} == {
        name: dtype.removeprefix("U") for name, dtype in types.items()
    }
    model, plain = fewbits.open(tmp_path / "out"), fewbits.open(MODEL)
    for name, dtype in types.items():
        wide = int(re.findall(r"INT(\d)", dtype)[0])
        ours, theirs = model.read(name), plain.read(name)
        assert np.square(ours - theirs).sum() < min(0.5, 16 * 4.0**-wide) * np.square(theirs).sum()


def test_a_size_is_kept_and_less_is_lost_than_with_the_same_bits_everywhere(
    tmp_path: Path, texts: tuple[Path, Path]
) -> None:
    usual = fewbits.quantize(MODEL, "gptq:w3g64", tmp_path / "usual", **options_of("gptq:", texts))
    budget = Budget(size=usual.size)
    ours = fewbits.quantize(MODEL, "gptq:g64", tmp_path / "ours", **options_of("gptq:", texts), budget=budget)
    assert 0.98 * usual.size < ours.size <= usual.size
    assert kl(tmp_path / "ours", texts) < 0.95 * kl(tmp_path / "usual", texts)
    assert any("bits per weight over the 28 quantized linears" in note for note in ours.notes)
    told = (tmp_path / "ours" / "README.md").read_text()
    assert f"--size {usual.size}" in told and "gptqmodel" in told


def test_what_text_has_told_is_not_measured_on(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    """Also where the method itself takes no text."""
    options: dict[str, Any] = {"calibration": texts[0], "calibration_chunks": 4, "budget": Budget(bpw=3.0)}
    fewbits.quantize(MODEL, "hqq:g64", tmp_path / "out", **options)
    with pytest.raises(FewbitsError, match="calibrated on"):
        fewbits.measure(tmp_path / "out", texts[0], reference=MODEL, chunks=2)


def test_memory_is_kept(tmp_path: Path) -> None:
    needs = fewbits.memory(MODEL, target="ct:w4a16g64", engine="vllm", context=256)
    other = needs.total - needs.weights
    # weights of 2 MB beside embeddings; vLLM leaves a share of the card free
    budget = Budget(fit=int((other + needs.weights + 5e5) / 0.92), context=256)
    made = fewbits.plan(MODEL, "ct:a16g64", budget=budget)
    assert needs.weights < made.file_size <= needs.weights + 5.3e5
    with pytest.raises(FewbitsError, match="KV cache, buffers and margin of vllm alone"):
        fewbits.plan(MODEL, "ct:a16g64", budget=Budget(fit=other // 2, context=256))


def test_transformers_runs_a_mixture_of_compressed_tensors(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    fewbits.quantize(
        MODEL, "ct:a16g64", tmp_path / "out", budget=Budget(bpw=5.0, types=("w3", "w4", "w8")), keep=["1.mlp.down"]
    )
    groups = config_of(tmp_path / "out")["config_groups"]
    assert len(groups) > 1
    assert groups["group_0"]["targets"] == ["Linear"]
    engine = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        theirs, ours = engine(ids).logits, load_whole(fewbits.open(tmp_path / "out"))(ids).logits
    assert float((theirs - ours).norm() / ours.norm()) < 1e-4


def test_hqq_loads_a_mixture(tmp_path: Path) -> None:
    fewbits.quantize(MODEL, "hqq:g64", tmp_path / "out", budget=Budget(bpw=2.8))
    assert len({t["dtype"] for t in fewbits.inspect(tmp_path / "out").tensors if "proj" in t["name"]}) > 1
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    ours = load_whole(fewbits.open(tmp_path / "out"))
    engine = transformers.AutoModelForCausalLM.from_config(ours.config).float().eval()
    for name, _ in list(engine.named_modules()):
        if f"{name}.W_q" in tensors:
            engine.set_submodule(name, HQQLinear(None, None, compute_dtype=torch.float32, device="cpu"))  # type: ignore[arg-type]
    engine.load_state_dict(tensors, strict=False)
    engine.tie_weights()
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        found, wanted = engine(ids).logits, ours(ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < 0.01


def resolved(config: dict[str, Any], name: str) -> int | None:
    """Bits of a module as GPTQModel and vLLM find them: the first rule that matches from the beginning of its name."""
    for pattern, rule in config.get("dynamic", {}).items():
        if re.match(pattern[2:], name):
            return None if pattern.startswith("-:") else int(rule["bits"])
    return int(config["bits"])


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "phi3"])
@given(data=st.data())
@settings(max_examples=6, deadline=None)
def test_rules_say_what_the_plan_says(
    family: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """For every module, and for what engines fuse it into, whatever types a plan has."""
    folder = tmp_path_factory.mktemp(family)
    wide = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64}
    changes = {key: value for key, value in wide.items() if family == "qwen3-moe" or "moe" not in key}
    source = save_tiny(folder / "model", family, changes)
    made = fewbits.plan(source, "gptq:g32", budget=Budget(bpw=8.5, types=("w4",)), method="search")
    names = list(linears(made))
    fused = {name: fused_name(name.removesuffix(".weight")) for name in names}
    widths = {whole: data.draw(st.sampled_from([None, 2, 3, 4, 8])) for whole in sorted(set(fused.values()))}
    if not any(widths.values()):
        return
    edited = [
        tensor.model_copy(update={"codec": f"INT{wide}_G32" if (wide := widths[fused[tensor.name]]) else "F16"})
        if tensor.name in fused
        else tensor
        for tensor in made.tensors
    ]
    made.model_copy(update={"tensors": edited}).save(folder / "plan.json")
    fewbits.quantize(source, "gptq:g32", folder / "out", method="search", edited=folder / "plan.json")
    config = config_of(folder / "out")
    assert config == json.loads((folder / "out" / "quantize_config.json").read_text()) | {
        key: config[key] for key in config if key == "modules_in_block_to_quantize"
    }
    for name, whole in fused.items():
        module, wanted = name.removesuffix(".weight"), widths[whole]
        assert resolved(config, module) == wanted
        if wanted is not None:
            assert resolved(config, whole) == wanted
    types = {t["name"]: t["dtype"] for t in fewbits.inspect(folder / "out").tensors}
    for name, whole in fused.items():
        assert types[name] == (f"INT{widths[whole]}_G32" if widths[whole] else "F16")


def fused_name(module: str) -> str:
    """What vLLM calls the module that it makes of this and others."""
    experts = re.match(r"(.*\.experts)\.\d+\.", module)
    if experts:
        return experts[1]
    head, _, end = module.rpartition(".")
    return next((f"{head}.{whole}" for parts, whole in FUSED_NAMES.items() if end in parts), module)


def test_one_type_for_all_is_told_as_if_it_was_asked_for(tmp_path: Path) -> None:
    fewbits.quantize(MODEL, "ct:a16g64", tmp_path / "open", budget=Budget(bpw=9.0))
    fewbits.quantize(MODEL, "ct:w8a16g64", tmp_path / "named")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "open" / name).read_bytes() == (tmp_path / "named" / name).read_bytes()


def test_reads_rules_of_gptqmodel() -> None:
    rules: dict[str, Any] = {"+:.*1.*": {"bits": 8, "group_size": 64, "damp_percent": 0.05}, "-:.*gate$": {}}
    layout = GPTQ.from_config({"bits": 4, "group_size": 128, "dynamic": rules})
    kind = GPTQ.from_spec("w8g64")
    parts = kind.parts((64, 128))
    assert layout.identify(parts, {}) == (kind, (64, 128))
    del parts[".g_idx"]  # the zero points tell the bits, too
    assert layout.identify(parts, {}) == (kind, (64, 128))
    with pytest.raises(FewbitsError, match="multiple of the group"):
        layout.identify({**parts, ".qzeros": Part("I32", (2, 7))}, {})


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"+:.*": {"bits": 4, "rotation": "hadamard"}}, r"'\+:\.\*' sets 'rotation'"),
        ({".*": {"pack_dtype": "int16"}}, "sets 'pack_dtype' to 'int16'"),
        ({".*": {"bits": 5}}, "sets 'bits' to 5"),
        ({".*": 8}, "no table of rules"),
        ([], "no table of rules"),
    ],
)
def test_rules_that_are_not_known_are_refused(dynamic: Any, message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        GPTQ.from_config({"bits": 4, "group_size": 128, "dynamic": dynamic})


def test_reads_several_schemes_that_name_modules() -> None:
    four, eight = CompressedTensors.from_spec("w4a16g64"), CompressedTensors.from_spec("w8a16g64")
    config = four.beside(((eight, ("model.layers.0.mlp.down_proj",)),)).config(["lm_head"])
    assert config["config_groups"]["group_1"]["targets"] == ["model.layers.0.mlp.down_proj"]
    read = CompressedTensors.from_config(config)
    for kind in (four, eight):
        found, shape = read.identify(kind.parts((64, 128)), {".weight_shape": np.array([64, 128])})
        assert (found.type, shape) == (kind.type, (64, 128))


def test_an_edited_plan_is_followed(tmp_path: Path) -> None:
    plan = fewbits.plan(MODEL, "ct:a16g64", budget=Budget(bpw=5.0))
    plan.save(tmp_path / "plan.json")
    fewbits.quantize(MODEL, "ct:a16g64", tmp_path / "a", budget=Budget(bpw=5.0))
    fewbits.quantize(MODEL, "ct:a16g64", tmp_path / "b", edited=tmp_path / "plan.json")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    text = (tmp_path / "plan.json").read_text()
    text = edit(text, "model.layers.2.mlp.down_proj.weight", "INT3_G64")
    (tmp_path / "plan.json").write_text(edit(text, "model.layers.0.self_attn.o_proj.weight", "BF16"))
    fewbits.quantize(MODEL, "ct:a16g64", tmp_path / "c", edited=tmp_path / "plan.json")
    types = {t["name"]: t["dtype"] for t in fewbits.inspect(tmp_path / "c").tensors}
    assert types["model.layers.2.mlp.down_proj.weight"] == "INT3_G64"
    assert types["model.layers.0.self_attn.o_proj.weight"] == "BF16"
    assert "model.layers.0.self_attn.o_proj" in config_of(tmp_path / "c")["ignore"]


def edit(plan: str, name: str, to: str) -> str:
    found = json.loads(plan)
    for tensor in found["tensors"]:
        if tensor["name"] == name:
            tensor["codec"] = to
    return json.dumps(found)


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "INT3_G64", "engines fuse"),
        ("model.layers.0.mlp.down_proj.weight", "Q4_K", "has no type 'Q4_K'.*INT4_G64"),
        ("model.norm.weight", "INT4_G64", "no linear of a block"),
    ],
)
def test_edits_that_cannot_be_are_refused(name: str, to: str, message: str, tmp_path: Path) -> None:
    fewbits.plan(MODEL, "ct:a16g64", budget=Budget(bpw=5.0)).save(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(edit((tmp_path / "plan.json").read_text(), name, to))
    with pytest.raises(FewbitsError, match=message):
        fewbits.plan(MODEL, "ct:a16g64", edited=tmp_path / "plan.json")
    with pytest.raises(FewbitsError, match="has the target"):
        fewbits.plan(MODEL, "ct:a16g32", edited=tmp_path / "plan.json")
    with pytest.raises(FewbitsError, match="a budget"):
        fewbits.plan(MODEL, "ct:a16g64", edited=tmp_path / "plan.json", budget=Budget(bpw=5.0))


@pytest.mark.parametrize(
    ("target", "budget", "message"),
    [
        ("gptq:g64", None, r"leaves the bits open.*--bpw.*gptq:w4g64"),
        ("gptq:g65", Budget(bpw=4.0), "Unknown target 'gptq:g65'"),
        ("gptq:w4g64", Budget(bpw=4.0), "without bits in their name.*gptq:g64"),
        ("bnb:nf4", Budget(bpw=4.0), "without bits in their name.*Leave out"),
        ("ct:a16g64", Budget(bpw=4.0), "fewest bits a weight are 4.2"),
        ("ct:a16g64", Budget(size=1000), "smallest mixture takes.*embeddings, norms and head"),
        ("ct:a16g64", Budget(bpw=4.5, types=("w5",)), "has no type 'w5'.*w2, w3, w4, w8"),
    ],
)
def test_refused(target: str, budget: Budget | None, message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        fewbits.plan(MODEL, target, method="search" if target.startswith("gptq") else None, budget=budget)
