"""What the memory report promises: sums, what fits, what to change, honest bounds, clear refusals."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fewbits import api
from fewbits.checkpoint import open_checkpoint
from fewbits.cli import memory as verb
from fewbits.errors import FewbitsError
from fewbits.formats.gguf.source import gguf_source
from fewbits.memory import GPU, Described, Hardware, MemoryReport, describe, memory, named
from fewbits.memory.config_shape import as_llama_cpp, shape_from_config
from fewbits.memory.engines import ENGINES
from fewbits.memory.gguf_shape import shape_from_gguf
from fewbits.memory.skeleton import skeleton_of
from fewbits.quantize import PlanRequest, make_plan
from tiny_models import TINY, save_tiny

DATA = Path(__file__).parent / "data" / "memory"
GGUF_MODELS = json.loads((DATA / "gguf" / "models.json").read_text())
CONFIGS = sorted(path.stem for path in DATA.glob("*.json"))
MIB, GIB = 2**20, 2**30
BIG = Hardware("", 8, "avx2", 2**40, (GPU("large", "nvidia", 2**40),))
NO_GPU = Hardware("", 8, "", 2**40)


def card(gib: float, ram: float = 64) -> Hardware:
    return Hardware("", 8, "avx2", int(ram * GIB), (GPU("card", "nvidia", int(gib * GIB)),))


@cache
def known(name: str) -> Described:
    return describe(DATA / f"{name}.json")


def parts(report: MemoryReport) -> list[int]:
    return [*(report.weights, report.kv_cache, report.recurrent_state, report.compute, report.runtime, report.margin)]


# ------------------------------------------------------------------------------------------------- sums and layers


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_add_up(name: str) -> None:
    report = memory(known(name), target="Q4_K_M", context=4096, hardware=BIG)
    assert report.total == sum(parts(report)) == sum(device.needed for device in report.devices)
    for device in report.devices:
        assert device.needed == device.total
    assert report.kv_cache == sum(row.kv_bytes for row in report.layers)
    assert report.recurrent_state == sum(row.state_bytes for row in report.layers)
    assert report.fits is True and report.levers == []
    assert MemoryReport.model_validate_json(report.model_dump_json()) == report
    assert all(fact.date and fact.source for fact in report.facts)


SAME = {
    "llama-3-8b": "llama3-8b", "llama-2-7b": "llama2-7b", "qwen3-30b-a3b": "qwen3-30b-a3b", "gemma-3-27b": "gemma3-27b",
    "gemma-3-4b": "gemma3-4b", "deepseek-v3": "deepseek-v3", "command-r7b": "command-r7b", "qwen3.6-27b": "qwen3.6-27b",
    "gemma-4-e4b": "gemma4-e4b",
}  # fmt: skip
"""config.json and the metadata of the GGUF files that llama.cpp's converter makes of it."""


@pytest.mark.parametrize("name", SAME)
def test_config_and_gguf_say_the_same(name: str) -> None:
    of_config = as_llama_cpp(shape_from_config(json.loads((DATA / f"{name}.json").read_text())))
    of_gguf = shape_from_gguf(GGUF_MODELS[SAME[name]])
    for field in ("layers", "hidden", "vocabulary", "heads", "experts", "experts_used", "latent", "inner", "per_layer"):
        assert getattr(of_config, field) == getattr(of_gguf, field), field
    assert of_config.certain and of_gguf.certain


@pytest.mark.parametrize("name", TINY)
def test_skeletons_are_the_real_thing(name: str, tmp_path: Path) -> None:
    """The tensors that config.json implies are those of the files that transformers writes."""
    folder = save_tiny(tmp_path / "model", name)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_bytes((folder / "config.json").read_bytes())
    for target in ("Q4_K_M", "F16", "IQ2_XXS"):
        whole = memory(folder, target=target, context=256)
        alone = memory(tmp_path / "alone", target=target, context=256)
        assert alone.weights == whole.weights, target
        assert alone.layers == whole.layers
    if target := {"llama": "gptq:w4g32", "qwen3-moe": "ct:w4a16"}.get(name):
        sizes = {
            memory(tmp_path / "alone", target=target, context=256, engine="vllm").weights,
            memory(folder, target=target, context=256, engine="vllm").weights,
            api.plan(folder, target, method="search").weights_bytes,
        }
        assert len(sizes) == 1


def test_weights_are_the_plan_of_quantize(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "gemma3")
    source = gguf_source(open_checkpoint(folder))
    for target in ("Q8_0", "Q4_K_M", "Q2_K"):
        plan = make_plan(source, PlanRequest(target))
        assert memory(folder, target=target, context=256, hardware=NO_GPU).weights == plan.weights_bytes


def test_experts_are_counted_whole() -> None:
    skeleton = skeleton_of(known("deepseek-v3").config)
    assert skeleton is not None
    # 671 billion, as its authors say
    assert sum(int(np.prod(shape)) for shape in skeleton.tensors.values()) == pytest.approx(671e9, rel=0.001)


# --------------------------------------------------------------------------------------------- what goes where


def test_partial_offload_by_hand() -> None:
    """Llama-3-8B in BF16: a block has 2 x 4096 x (4096 + 4096 + 1024 + 1024 + 3 x 14336) bytes and two norms."""
    block = 2 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 2 * 4 * 4096
    table, norm = 2 * 128256 * 4096, 4 * 4096
    whole = memory(known("llama-3-8b"), context=8192, hardware=BIG)
    gpu, host = whole.device("GPU"), whole.device("host")
    assert gpu is not None and host is not None
    assert (gpu.weights, host.weights) == (32 * block + table + norm, table)
    assert (gpu.kv_cache, host.kv_cache) == (GIB, 0)
    ten = memory(known("llama-3-8b"), context=8192, layers_on_gpu=10, hardware=BIG)
    gpu, host = ten.device("GPU"), ten.device("host")
    assert gpu is not None and host is not None
    # the output layer and the last nine blocks
    assert (gpu.weights, host.weights) == (9 * block + table + norm, 23 * block + table)
    assert (gpu.kv_cache, host.kv_cache) == (GIB * 9 // 32, GIB * 23 // 32)
    none = memory(known("llama-3-8b"), context=8192, layers_on_gpu=0, hardware=BIG)
    assert [device.device for device in none.devices] == ["host"]
    assert none.weights == 32 * block + 2 * table + norm


def test_a_tied_head_is_kept_twice() -> None:
    """gemma-3-4b in f16, as llama.cpp #22171 prints it: 7401 MiB on the GPU, 1280 MiB of embeddings in RAM."""
    report = memory(known("gemma-3-4b"), target="F16", context=32768, hardware=BIG)
    gpu, host = report.device("GPU"), report.device("host")
    assert gpu is not None and host is not None
    assert (gpu.weights // MIB, host.weights // MIB) == (7401, 1280)


def test_multi_token_prediction_layers_are_not_loaded() -> None:
    metadata = {**GGUF_MODELS["llama3-8b"], "llama.nextn_predict_layers": 2}
    shape = shape_from_gguf(metadata)
    assert (len(shape.layers), shape.stored_layers) == (30, 32)


def test_transformers_keeps_latent_caches_decompressed() -> None:
    compressed = memory(known("deepseek-v3"), context=1024, engine="vllm")
    decompressed = memory(known("deepseek-v3"), context=1024, engine="transformers")
    assert compressed.kv_cache == 61 * 1024 * 576 * 2
    assert decompressed.kv_cache == 61 * 1024 * 128 * (192 + 128) * 2


def test_windows_by_engine() -> None:
    """Mistral's window is transformers' business; llama.cpp keeps everything."""
    config = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
        "sliding_window": 4096, "max_position_embeddings": 32768,
    }  # fmt: skip
    mistral = Described("mistral", "config", config)
    token = 2 * 2 * 8 * 128 * 2
    assert memory(mistral, context=32768).kv_cache == 32768 * token
    assert memory(mistral, context=32768, engine="transformers").kv_cache == 4096 * token


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_answers(engine: str) -> None:
    directory = "gguf" not in ENGINES[engine].formats
    report = memory(
        known("llama-3-8b"), engine=engine, context=4096, target=None if directory else "Q8_0", hardware=BIG
    )
    assert report.engine == engine and report.fits
    for kv in ENGINES[engine].cache_types:
        assert memory(known("llama-3-8b"), engine=engine, context=4096, kv=kv, hardware=BIG).kv_cache > 0


def test_ollama_chooses_the_context_by_the_card() -> None:
    contexts = [memory(known("llama-3.1-8b"), engine="ollama", hardware=card(gib)).context for gib in (8, 24, 80)]
    assert contexts == [4096, 32768, 131072]
    assert memory(known("llama-3-8b")).context == 8192


# ---------------------------------------------------------------------------------------------------- what fits

ASKED = st.sampled_from(["llama-3-8b", "gemma-3-27b", "qwen3-30b-a3b", "qwen3.6-27b"])


@settings(deadline=None, max_examples=25)
@given(ASKED, st.integers(1, 200_000), st.integers(1, 200_000), st.integers(1, 4))
def test_more_is_never_less(name: str, first: int, second: int, batch: int) -> None:
    short, long = sorted((first, second))
    totals = [
        memory(known(name), target="Q4_K_M", context=short, hardware=BIG).total,
        memory(known(name), target="Q4_K_M", context=long, hardware=BIG).total,
        memory(known(name), target="Q4_K_M", context=long, batch=batch, hardware=BIG).total,
    ]
    assert totals == sorted(totals)
    small = memory(known(name), target="Q4_K_M", context=long, batch=batch, kv="q4_0", hardware=BIG)
    assert small.total < totals[2]


@settings(deadline=None, max_examples=15)
@given(ASKED, st.floats(6, 40), st.integers(256, 100_000))
def test_limits_are_exact(name: str, gib: float, context: int) -> None:
    """What is said to fit does, and a step more does not."""
    hardware = card(gib, ram=256)
    report = memory(known(name), target="Q4_K_M", context=context, hardware=hardware)
    assert report.layers_that_fit is not None and report.max_context is not None

    def fits(context: int, layers: int) -> bool:
        there = memory(known(name), target="Q4_K_M", context=context, layers_on_gpu=layers, hardware=hardware)
        gpu = there.device("GPU")
        return gpu is None or bool(gpu.fits)

    assert fits(context, report.layers_that_fit)
    if report.layers_that_fit < report.n_layers:
        assert not fits(context, report.layers_that_fit + 1)
    if report.max_context:
        assert fits(report.max_context, report.n_layers)
    longest = max(shape_from_config(known(name).config).context_length, context)
    if report.max_context + 256 <= longest:
        assert not fits(report.max_context + 256, report.n_layers)
    assert report.fits == (report.layers_that_fit == report.n_layers)


@pytest.mark.parametrize(("name", "gib"), [("llama-3-8b", 8), ("gemma-3-27b", 16), ("qwen3-30b-a3b", 12)])
def test_levers_do_what_they_say(name: str, gib: float) -> None:
    hardware = card(gib, ram=64)
    report = memory(known(name), target="Q8_0", context=16384, hardware=hardware)
    assert report.fits is False and report.levers
    order = ["smaller quant", "shorter context", "quantized KV cache", "experts in RAM", "partial offload"]
    names = [lever.name for lever in report.levers]
    assert names == sorted(names, key=order.index)
    for lever in report.levers:
        flags = dict(zip(lever.option.split()[::2], lever.option.split()[1::2], strict=True))
        changes: dict[str, Any] = {"target": "Q8_0", "context": 16384}
        changes |= {"target": flags["--target"]} if "--target" in flags else {}
        changes |= {"context": int(flags["--context"])} if "--context" in flags else {}
        changes |= {"kv": flags["--kv"]} if "--kv" in flags else {}
        changes |= {"layers_on_gpu": int(flags["--layers-on-gpu"])} if "--layers-on-gpu" in flags else {}
        if flags:
            changed = memory(known(name), hardware=hardware, **changes)
            assert changed.fits, lever
            assert sum(device.needed for device in changed.devices) == lever.gpu + lever.host
        assert lever.gpu <= hardware.vram and lever.host <= hardware.ram


def test_experts_in_ram_are_a_way_out() -> None:
    report = memory(known("qwen3-30b-a3b"), target="Q4_K_M", context=16384, hardware=card(8, ram=32))
    lever = next(lever for lever in report.levers if lever.name == "experts in RAM")
    assert lever.gpu < 5 * GIB and lever.host > 16 * GIB
    assert not any(lever.name == "experts in RAM" for lever in memory(known("llama-3-8b"), hardware=card(8)).levers)


def test_nothing_helps() -> None:
    report = memory(known("deepseek-v3"), target="Q4_K_M", context=16384, hardware=card(8, ram=16))
    assert report.fits is False and report.levers == [] and report.max_context == 0


def test_without_hardware_there_is_no_verdict() -> None:
    report = memory(known("llama-3-8b"), target="Q4_K_M", context=4096)
    assert (report.fits, report.max_context, report.layers_that_fit) == (None, None, None)
    assert report.layers_on_gpu == report.n_layers == 33


def test_vllm_answers_the_inverse_question() -> None:
    report = memory(known("llama-3-8b"), engine="vllm", context=8192, hardware=named("H100"))
    budget = 80 * GIB * 0.98 * 0.92 - report.weights - report.compute - report.runtime
    assert report.tokens_that_fit is not None
    # 128 KiB a token, in blocks of 16
    assert 0 <= budget / (128 * 1024) - report.tokens_that_fit < 16 + 1
    assert memory(known("llama-3-8b"), context=8192, hardware=named("H100")).tokens_that_fit is None
    fp8 = memory(known("llama-3-8b"), engine="vllm", context=8192, kv="fp8", hardware=named("H100"))
    assert fp8.tokens_that_fit == pytest.approx(2 * report.tokens_that_fit, rel=0.001)


def test_unified_memory_is_shared() -> None:
    """36 GiB, of which the GPU may take 24: weights that are in RAM anyway count against the same memory."""
    report = memory(known("gemma-3-27b"), target="Q4_K_M", context=16384, hardware=named("M3 Max", "36GB"))
    assert report.fits
    assert not memory(known("gemma-3-27b"), target="Q8_0", context=16384, hardware=named("M3 Max", "36GB")).fits


# ----------------------------------------------------------------------------------------------- what is unknown


def test_an_unknown_architecture_gets_a_bound() -> None:
    config = {**known("llama-3-8b").config, "model_type": "frobnicate", "architectures": ["FrobnicateForCausalLM"]}
    bound = memory(Described("frobnicate", "config", config), target="Q4_K_M", context=8192)
    true = memory(known("llama-3-8b"), target="Q4_K_M", context=8192)
    assert not bound.certain and true.certain
    assert any("unknown" in note for note in bound.notes)
    assert bound.weights >= 0.99 * true.weights and bound.kv_cache >= true.kv_cache


def test_an_unknown_architecture_with_windows_keeps_everything() -> None:
    config = dict(json.loads((DATA / "gemma-3-27b.json").read_text())["text_config"])
    config |= {"model_type": "frobnicate", "vocab_size": 262208}
    bound = memory(Described("frobnicate", "config", config), target="Q4_K_M", context=32768)
    true = memory(known("gemma-3-27b"), target="Q4_K_M", context=32768)
    assert bound.kv_cache > true.kv_cache and not bound.certain


def test_an_unknown_gguf_architecture() -> None:
    metadata = {key.replace("llama.", "frob."): value for key, value in GGUF_MODELS["llama3-8b"].items()}
    shape = shape_from_gguf({**metadata, "general.architecture": "frob"})
    assert not shape.certain and "unknown" in shape.notes[0]
    assert shape.layers == shape_from_gguf(GGUF_MODELS["llama3-8b"]).layers


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "frob"}, "Unknown engine 'frob'"),
        ({"kv": "q3_0"}, "llama.cpp has no KV cache in 'q3_0'"),
        ({"kv": "fp8"}, "llama.cpp has no KV cache in 'fp8'"),
        ({"kv": "q8_0", "engine": "vllm"}, "vllm has no KV cache in 'q8_0'"),
        ({"target": "Q9"}, "Unknown target 'Q9'"),
        ({"target": "gptq:w4g128"}, "llama.cpp runs GGUF files"),
        ({"target": "Q4_K_M", "engine": "vllm"}, "vllm loads model directories"),
        ({"target": "gptq:w9g1", "engine": "vllm"}, "gptq"),
        ({"context": 0}, "The context is 0"),
        ({"batch": -1}, "The batch is -1"),
        ({"layers_on_gpu": -1}, "The number of layers on the GPU is -1"),
        ({"layers_on_gpu": 3, "engine": "vllm"}, "vllm holds a model on the GPU as a whole"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FewbitsError, match=message) as caught:
        memory(known("llama-3-8b"), **options)
    assert caught.value.hint or "which it cannot be" in caught.value.message


def test_a_gguf_is_not_for_vllm(wheel_gguf: Path) -> None:
    with pytest.raises(FewbitsError, match="vllm loads model directories"):
        memory(wheel_gguf, engine="vllm")


DAMAGE: list[dict[str, Any]] = [
    *({"num_hidden_layers": value} for value in (10**9, -1, "many", None)),
    {"num_attention_heads": None},
    {"hidden_size": 2**40},
    {"vocab_size": True},
    {"num_key_value_heads": [[]]},
]


@pytest.mark.parametrize("changes", DAMAGE)
@pytest.mark.parametrize("kind", ["llama", "frobnicate"])
def test_damaged_configurations_are_refused(changes: dict[str, Any], kind: str) -> None:
    config = {**known("llama-3-8b").config, **changes, "model_type": kind}
    try:
        memory(Described("damaged/config.json", "config", config), context=4096)
    except FewbitsError as error:
        assert "damaged/config.json" in str(error)
    else:  # transformers fills in what is left out
        assert None in changes.values()


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(GGUF_MODELS)),
    st.data(),
    st.one_of(st.integers(-(2**40), 2**40), st.none(), st.text(max_size=3), st.lists(st.integers(0, 9), max_size=3)),
)
def test_lying_metadata_is_refused_or_read(name: str, data: st.DataObject, value: Any) -> None:
    metadata = dict(GGUF_MODELS[name])
    key = data.draw(st.sampled_from([key for key in metadata if not key.startswith("tokenizer")]))
    try:
        shape = shape_from_gguf({**metadata, key: value})
    except FewbitsError as error:
        assert "metadata" in str(error).lower()
    else:
        assert all(layer.keys >= 0 and layer.values >= 0 and layer.state >= 0 for layer in shape.layers)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="no such file or directory"):
        memory(tmp_path / "missing.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FewbitsError, match=r"config.json does not exist"):
        memory(tmp_path / "empty")
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(FewbitsError, match="Name one of them"):
        memory(tmp_path / "ggufs")


# ------------------------------------------------------------------------------------------------ command line

APP = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
APP.command()(verb.command)


def test_the_verb_prints_json() -> None:
    done = CliRunner().invoke(
        APP, [str(DATA / "gemma-3-27b.json"), "--target", "Q4_K_M", "--context", "16384", "--memory", "24GB", "--json"]
    )
    assert done.exit_code == 0
    report = MemoryReport.model_validate_json(done.stdout)
    assert report.fits and report.target == "Q4_K_M" and report.context == 16384


def test_the_verb_tells_what_to_change() -> None:
    done = CliRunner().invoke(
        APP, [str(DATA / "llama-3-8b.json"), "--target", "Q8_0", "--context", "16384", "--memory", "8GB", "--layers"]
    )
    assert done.exit_code == 0
    for words in ("weights", "KV cache", "compute buffer", "runtime", "margin", "total MiB", "fits", "It does not fit"):
        assert words in done.stdout
    assert "1. smaller quant" in done.stdout and "partial offload" in done.stdout
    assert "attention" in done.stdout
    assert "note:" in done.stderr and "note:" not in done.stdout


def test_the_verb_says_where_vllm_stands() -> None:
    done = CliRunner().invoke(APP, [str(DATA / "llama-3-8b.json"), "--engine", "vllm", "--gpu", "RTX 4090"])
    assert done.exit_code == 0 and "tokens of KV cache fit" in done.stdout


def test_the_verb_refuses_in_one_line() -> None:
    done = CliRunner().invoke(APP, [str(DATA / "llama-3-8b.json"), "--gpu", "RTX 4095"])
    assert isinstance(done.exception, FewbitsError) and "Nearest" in str(done.exception)
