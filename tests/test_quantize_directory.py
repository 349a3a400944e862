"""From a model to a directory in every ecosystem's layout: sizes, engines, quality, refusals, resuming."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fewbits
from fewbits.errors import FewbitsError
from fewbits.formats import journal
from fewbits.forward.streamed import load_whole
from fewbits.layouts import LAYOUTS
from fewbits.plan import directory as plans
from tiny_models import save_tiny

blockwise = importlib.import_module("fewbits.quantize.blockwise")  # fewbits.quantize is the verb
DEMO = Path(fewbits.__file__).parent / "demo"
MODEL = DEMO / "model"
CALIBRATED = ("gptq:", "awq:", "ct:fp8-static", "ct:nvfp4a4")
TARGETS = [
    *("gptq:w4g64", "gptq:w3g32", "gptq:w2g32", "gptq:w8g128", "gptq:w4g-1", "gptq:w4g64-asym", "gptq:w4g64-asym-v2"),
    *("gptq:w4g64-actorder", "awq:w4g64", "bnb:nf4", "bnb:nf4-single", "bnb:fp4", "bnb:fp4-single", "bnb:int8"),
    *("ct:fp8", "ct:fp8-tensor", "ct:fp8-block", "ct:fp8-static", "ct:w8a8", "ct:w4a16g64", "ct:w4a16"),
    *("ct:w4a16g64-asym", "ct:w8a16g128", "ct:w3a16g64", "ct:nvfp4", "ct:nvfp4a4", "ct:mxfp4"),
    *("hqq:w4g64", "hqq:w3g64", "hqq:w2g16", "hqq:w4g64-axis0", "fp8:block128"),
]


def calibrated(texts: tuple[Path, Path]) -> dict[str, Any]:
    return {"calibration": texts[0], "calibration_chunks": 8}


def make(target: str, out: Path, texts: tuple[Path, Path], **options: Any) -> fewbits.quantize:
    if target.startswith(CALIBRATED):
        options = {**calibrated(texts), **options}
    return fewbits.quantize(MODEL, target, out, **options)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "README.md"}


def kl(model: Path, texts: tuple[Path, Path]) -> float:
    report = fewbits.measure(model, texts[1], reference=MODEL, context=128, chunks=12, cache=False)
    return report.comparison.kl.mean.value


@pytest.mark.parametrize("target", TARGETS)
def test_size_is_predicted_and_the_model_comes_back(target: str, tmp_path: Path, texts: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = calibrated(texts) if target.startswith(CALIBRATED) else {}
    plan = fewbits.plan(MODEL, target, **options)
    report = make(target, out, texts)
    assert [(f.name, f.size) for f in plan.files] == [(f.name, f.size) for f in report.files]
    for file in plan.files:
        assert (out / file.name).stat().st_size == file.size
    with safe_open(out / "model.safetensors", "numpy") as stored:
        held = sum(len(stored.get_slice(name).get_shape()) >= 0 for name in stored.keys())  # noqa: SIM118
    assert held > len(plan.tensors)
    model = fewbits.open(out)
    assert sorted(model.names) == sorted(fewbits.open(MODEL).names)
    shares = {share.dtype: share.weights for share in fewbits.inspect(out).types}
    quantized = [t for t in plan.tensors if t.method not in ("copy", "convert")]
    assert shares[quantized[0].codec] == sum(t.n_weights for t in quantized)
    # what no method may do: give a model that has nothing to do with the original; 2 bits may nearly
    assert kl(out, texts) < (4.0 if re.search(r"w2", target) else 0.7)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == LAYOUTS[target.split(":")[0]].quant_method
    assert (out / "tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()
    card = (out / "README.md").read_text()
    assert f"fewbits quantize {MODEL} {target}" in card


def test_every_listed_target_is_made_from_its_spec() -> None:
    assert len(plans.directory_targets()) > 25
    for name in plans.directory_targets():
        layout = plans.target(name, None, calibrated=True).layout
        layout.check((4096, 4096))
        assert layout.parts((4096, 4096))


@pytest.mark.parametrize("target", ["ct:w4a16g64", "ct:fp8", "ct:w8a8", "bnb:nf4", "bnb:int8", "fp8:block128"])
def test_transformers_runs_it(target: str, tmp_path: Path, texts: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    make(target, out, texts)
    engine = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto", device_map="cpu").eval()
    ids = torch.tensor([fewbits.open(MODEL).tokenizer()(texts[1].read_text()[:400])["input_ids"][:64]])
    with torch.no_grad():
        theirs = engine(ids).logits.float()
        ours = load_whole(fewbits.open(out))(ids).logits
    # bfloat16 rounds weights and activations; FP8 and INT8 quantize activations, too
    bound = 0.1 if target in ("ct:fp8", "ct:w8a8") else 0.02
    assert float((theirs - ours).norm() / ours.norm()) < bound
    assert float((theirs.argmax(-1) == ours.argmax(-1)).float().mean()) > 0.8


def test_calibrated_methods_lose_less(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    """On text that they were not calibrated on."""
    loss = {}
    for method in ("rtn", "search", "gptq"):
        out = tmp_path / method
        options = {"calibration": texts[0]} if method == "gptq" else {}
        fewbits.quantize(MODEL, "ct:w3a16g64", out, method=method, **options)
        loss[method] = kl(out, texts)
    assert loss["gptq"] < 0.8 * loss["rtn"]
    assert loss["search"] < loss["rtn"]


def test_awq_loses_less_than_rounding(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    loss = {}
    for method in ("rtn", "awq"):
        out = tmp_path / method
        make("awq:w4g64", out, texts, method=method)
        loss[method] = kl(out, texts)
    assert loss["awq"] < 0.95 * loss["rtn"]


def test_smoothquant_in_an_engine(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    """Both weights and activations are rounded there: the engine's own distributions must be nearer."""
    plain = load_whole(fewbits.open(MODEL))
    ids = torch.tensor([fewbits.open(MODEL).tokenizer()(texts[1].read_text()[:4000])["input_ids"][:500]])
    loss = {}
    for method in ("rtn", "smoothquant"):
        out = tmp_path / method
        fewbits.quantize(MODEL, "ct:w8a8", out, method=method, **calibrated(texts) if method != "rtn" else {})
        engine = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, device_map="cpu").eval()
        with torch.no_grad():
            true, found = (model(ids).logits.log_softmax(-1) for model in (plain, engine))
        loss[method] = float((true.exp() * (true - found)).sum(-1).mean())
    assert loss["smoothquant"] < loss["rtn"]


@pytest.mark.parametrize("target", ["gptq:w4g64", "awq:w4g64", "ct:w8a8"])
def test_windows_go_on_with_the_quantized_weights(
    target: str, tmp_path: Path, texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the processor: products in bfloat16 must not remember weights from before."""
    monkeypatch.setattr(blockwise, "rough_products", lambda device: True)
    seen: list[torch.Tensor] = []
    block_done = blockwise.BlockwiseRun._block

    def watched(run: Any, index: int, block: torch.nn.Module) -> None:
        before = run.stream.hidden.clone()
        block_done(run, index, block)
        after = run.stream.hidden.clone()
        run.stream.hidden.copy_(before)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            run.streamed.run_block(index, block, run.stream)
        seen.append((run.stream.hidden - after).norm() / after.norm())
        run.stream.hidden.copy_(after)

    monkeypatch.setattr(blockwise.BlockwiseRun, "_block", watched)
    fewbits.quantize(MODEL, target, tmp_path / "out", **calibrated(texts))
    assert len(seen) == 4
    assert max(map(float, seen)) < 1e-5


def test_an_expert_without_text_takes_the_others_scales(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    source = save_tiny(tmp_path / "model", "qwen3-moe", {"moe_intermediate_size": 64, "num_experts": 8})
    with safe_open(source / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    router = tensors["model.layers.0.mlp.gate.weight"]
    router[5] = 0
    # an expert that is never among the best: every other one outdoes it on one side of any input
    router[6], router[7], router[4], router[3] = router[0] * 9, -router[0] * 9, router[1] * 9, -router[1] * 9
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = fewbits.quantize(source, "ct:fp8-static", tmp_path / "out", **calibrated(texts))
    assert any("saw no calibration text" in note for note in report.notes)


def test_the_text_to_measure_on_is_checked_before_any_work(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    for text, message in ((tmp_path / "nothing.txt", "cannot be read"), (texts[0], "calibrated on it")):
        with pytest.raises(FewbitsError, match=message):
            make("gptq:w4g64", tmp_path / "out", texts, measure_text=text)
    assert not (tmp_path / "out").exists()
    make("gptq:w4g64", tmp_path / "out", texts, measure_text=texts[1], measure_chunks=2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "KL" in card
    assert "--measure test.txt" in card
    with pytest.raises(FewbitsError, match="calibrated on"):
        fewbits.measure(tmp_path / "out", texts[0], reference=MODEL)


def test_the_type_of_floats_is_told_by_what_stays_float(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    source = save_tiny(tmp_path / "model", "llama", {"hidden_size": 64, "intermediate_size": 128})
    fewbits.quantize(source, "gptq:w4g64", tmp_path / "gptq", method="rtn")
    fewbits.quantize(tmp_path / "gptq", "ct:fp8", tmp_path / "fp8")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.float16
    assert config["dtype"] == "float16"


def test_groups_by_activity_are_told_in_g_idx(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    make("gptq:w4g64-actorder", tmp_path / "out", texts)
    g_idx = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.q_proj.g_idx"].numpy()
    assert not np.array_equal(g_idx, np.arange(256) // 64)
    assert np.array_equal(np.bincount(g_idx), [64] * 4)


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "gemma3", "qwen2", "phi3"])
def test_families(family: str, tmp_path: Path, texts: tuple[Path, Path]) -> None:
    """Experts, biases, norms that are stored less one, fused projections."""
    source = save_tiny(tmp_path / "model", family, {"moe_intermediate_size": 64} if family == "qwen3-moe" else {})
    fewbits.quantize(source, "gptq:w4g32", tmp_path / "out", calibration=texts[0], calibration_chunks=2)
    model = fewbits.open(tmp_path / "out")
    assert sorted(model.names) == sorted(fewbits.open(source).names)
    linear = [t for t in fewbits.inspect(tmp_path / "out").tensors if t["dtype"] == "INT4_G32"]
    assert any("down_proj" in t["name"] or "w2" in t["name"] for t in linear)
    assert not any("router" in t["name"] or t["name"].endswith("mlp.gate.weight") for t in linear)
    ids = torch.arange(2, 50)[None]
    with torch.no_grad():
        ours, true = load_whole(model)(ids).logits, load_whole(fewbits.open(source))(ids).logits
    assert float((ours - true).norm() / true.norm()) < 0.9


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SAFE_EVERY", 0.0)
    monkeypatch.setattr(journal, "SAFE_SHARE", 1e9)
    make("gptq:w4g64", tmp_path / "whole", texts)
    seen: list[int] = []

    def stop(done: int, total: int, what: str) -> None:
        if what == "decoder blocks":
            seen.append(done)
            if seen == [1, 2]:
                raise Interrupted

    with pytest.raises(Interrupted):
        make("gptq:w4g64", tmp_path / "out", texts, progress=stop)
    assert not (tmp_path / "out").exists()
    make("gptq:w4g64", tmp_path / "out", texts, progress=stop)
    assert seen == [1, 2, 3, 4]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("gptq:w4g64", {}, "gptq needs calibration.*--calibration TEXT.*--method search"),
        ("awq:w4g64", {}, "awq needs calibration"),
        ("ct:nvfp4a4", {}, "activations need calibration"),
        ("gptq:w5g64", {}, "Unknown target"),
        ("exl9:w4", {}, "Unknown target.*gptq:w4g128"),
        ("bnb:nf4", {"method": "awq"}, "'awq' does not make it.*rtn"),
        ("hqq:w4g64", {"method": "gptq"}, "does not make it"),
        ("gptq:w4g64-actorder", {"method": "search"}, "groups by activity.*gptq:w4g64"),
        ("bnb:nf4", {"calibration": "/nothing/here.txt"}, "no such text"),
        ("bnb:nf4", {"keep": ["q_proj"]}, "engines fuse"),
        ("bnb:nf4", {"keep": ["nothing_here"]}, "finds no linear"),
        ("bnb:nf4", {"keep": ["("]}, "no regular expression"),
        ("bnb:nf4", {"keep": ["_proj"]}, "nothing would be quantized"),
        ("bnb:nf4", {"pre_tokenizer": "llama-bpe"}, "GGUF targets only"),
        ("Q4_0", {"method": "gptq"}, "model directories"),
    ],
)
def test_refused_at_plan_time(target: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        fewbits.plan(MODEL, target, **options)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("bnb:nf4", {"device": "auto"}, "--device has no effect"),
        ("Q4_0", {"device": "cuda"}, "--device has no effect"),
        ("bnb:nf4", {"measure_chunks": 3}, "Pass --measure"),
        ("bnb:nf4", {"calibration_chunks": 3}, "Pass --calibration"),
        ("Q4_0", {"calibration_chunks": 3}, "Pass --calibration"),
    ],
)
def test_options_without_effect_are_refused(tmp_path: Path, target: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        fewbits.quantize(MODEL, target, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_text_shorter_than_the_widest_row_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text((DEMO / "held_out.txt").read_text()[:1500])
    with pytest.raises(FewbitsError, match=r"tokens.*(columns|window)"):
        fewbits.plan(MODEL, "gptq:w4g64", calibration=text)


def test_groups_that_do_not_divide_are_refused_with_those_that_do(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "llama", {"hidden_size": 64, "intermediate_size": 128})
    with pytest.raises(FewbitsError, match=r"_proj.*64.*group 128.*gptq:w4g64"):
        fewbits.plan(source, "gptq:w4g128", method="rtn")
    with pytest.raises(FewbitsError, match=r"Conv1D|plain linear"):
        fewbits.plan(save_tiny(tmp_path / "gpt2", "gpt2"), "gptq:w4g32", method="rtn")


def test_experts_that_an_engine_cannot_hold_are_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "qwen3-moe", {"moe_intermediate_size": 64})
    with pytest.raises(FewbitsError, match="experts"):
        fewbits.plan(source, "bnb:nf4")
    assert any("vLLM only" in note for note in fewbits.plan(source, "ct:nvfp4").notes)


def test_statistics_are_no_text(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    fewbits.calibrate(MODEL, texts[0], tmp_path / "stats.gguf", chunks=4)
    with pytest.raises(FewbitsError, match="block by block on text"):
        fewbits.plan(MODEL, "gptq:w4g64", calibration=tmp_path / "stats.gguf")


@pytest.mark.parametrize("target", ["bnb:nf4", "gptq:w4g64"])
def test_damaged_weights_leave_nothing(target: str, tmp_path: Path, texts: tuple[Path, Path]) -> None:
    source = tmp_path / "model"
    shutil.copytree(MODEL, source)
    with safe_open(source / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    options: dict[str, Any] = {"calibration": texts[0]} if target.startswith(CALIBRATED) else {}
    with pytest.raises(FewbitsError, match=r"model\.layers\.1\.mlp\.up_proj.*NaN or infinite.*row 3"):
        fewbits.quantize(source, target, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_kept_layers_stay_and_engines_are_told(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    make("ct:w4a16g64", out, texts, keep=["layers.0.mlp.down_proj"])
    kept = fewbits.inspect(out)
    assert {t["dtype"] for t in kept.tensors if t["name"] == "model.layers.0.mlp.down_proj.weight"} == {"BF16"}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.down_proj" in config["ignore"]
    engine = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, device_map="cpu").eval()
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        theirs, ours = engine(ids).logits, load_whole(fewbits.open(out))(ids).logits
    assert float((theirs - ours).norm() / ours.norm()) < 1e-4


def test_command_line(tmp_path: Path, texts: tuple[Path, Path]) -> None:

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "fewbits", *words], capture_output=True, text=True, check=False)

    out = tmp_path / "out"
    found = run("quantize", str(MODEL), "gptq:w4g64", "-o", str(out), "--calibration", str(texts[0]), "--json")
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["target"] == "gptq:w4g64"
    assert report["size"] == (out / "model.safetensors").stat().st_size
    again = run("quantize", str(MODEL), "bnb:nf4", "-o", str(out))
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert run("quantize", str(MODEL), "bnb:nf4", "-o", str(out), "--overwrite").returncode == 0
    planned = run("plan", str(MODEL), "ct:fp8", "--json")
    assert json.loads(planned.stdout)["format"] == "ct"
    listed = run("list").stdout
    assert "gptq:w4g128" in listed and "refuses" in listed


def test_sharded(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    plan = fewbits.plan(MODEL, "bnb:nf4", split_max_size=2_000_000)
    report = make("bnb:nf4", tmp_path / "out", texts, split_max_size=2_000_000)
    assert len(report.files) > 1
    assert plan.files == report.files
    assert sorted(fewbits.open(tmp_path / "out").names) == sorted(fewbits.open(MODEL).names)
