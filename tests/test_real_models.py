"""The main job on real models: what we write, llama.cpp loads and understands, and it is as large as predicted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fewbits
from fewbits.codecs import CODECS
from fewbits.plan import MixtureOptions
from fewbits.plan.presets import FLOAT_TYPES

pytestmark = [pytest.mark.engine, pytest.mark.shared]
llama_cpp = pytest.importorskip("llama_cpp")


def engine(path: Path, **options: int):
    return llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, verbose=False, **options)


def goes_on(path: Path, prompt: str, tokens: int = 8) -> str:
    return engine(path)(prompt, max_tokens=tokens, temperature=0)["choices"][0]["text"]


@pytest.mark.parametrize("name", ["smollm2-768", "smollm2-135m", "wheel"])
def test_q8_0_says_paris_and_is_as_large_as_planned(
    name: str, test_models: Path, wheel_gguf: Path, tmp_path: Path
) -> None:
    source = wheel_gguf if name == "wheel" else test_models / name
    planned = fewbits.plan(source, "Q8_0")
    report = fewbits.quantize(source, "Q8_0", tmp_path / "x.gguf")
    assert planned.file_size == report.size == (tmp_path / "x.gguf").stat().st_size
    assert "Paris" in goes_on(tmp_path / "x.gguf", "The capital of France is")


@pytest.mark.parametrize("name", ["smollm2-768", "smollm2-135m", "wheel"])
def test_q4_k_m_loads_and_answers(name: str, test_models: Path, wheel_gguf: Path, tmp_path: Path) -> None:
    source = wheel_gguf if name == "wheel" else test_models / name
    planned = fewbits.plan(source, "Q4_K_M")
    assert planned.file_size == fewbits.quantize(source, "Q4_K_M", tmp_path / "x.gguf").size
    answer = fewbits.run(str(tmp_path / "x.gguf"), "What is the capital of France?", tokens=24, chat=True, threads=1)
    assert answer.engine == "llama.cpp"
    assert answer.n_tokens > 2
    if name == "smollm2-768":
        assert "Paris" in answer.text
        assert not planned.fallbacks
    else:
        assert len(planned.fallbacks) > 100
        assert any("--no-fallback" in note for note in planned.notes)


@pytest.fixture(scope="module")
def statistics(test_models: Path, shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An importance matrix of smollm2-768, from very little text."""
    out = tmp_path_factory.mktemp("calibrated") / "s.gguf"
    text = shared_dir / "data" / "wikitext-2" / "wiki.valid.raw"
    fewbits.calibrate(test_models / "smollm2-768", text, out, chunks=4, threads=1)
    return out


def test_llama_cpp_computes_with_every_type_what_we_compute(
    test_models: Path, shared_dir: Path, statistics: Path, tmp_path: Path
) -> None:
    """One file with another type in each layer, so that every decoder of the engine has a say."""
    kinds = sorted(name for name in CODECS if name not in FLOAT_TYPES)
    assert len(kinds) == 25
    options = MixtureOptions(tensor_types=[(rf"^blk\.{layer + 4}\.", kind) for layer, kind in enumerate(kinds)])
    made = tmp_path / "x.gguf"
    fewbits.quantize(test_models / "smollm2-768", "COPY", made, mixture=options, calibration=[statistics])
    assert {tensor["dtype"] for tensor in fewbits.inspect(made).tensors} >= set(kinds)
    text = shared_dir / "data" / "wikitext-2" / "wiki.test.raw"
    ours, engines = (
        fewbits.measure(made, text, chunks=2, engine=engine, threads=1).perplexity.value
        for engine in ("torch", "llama.cpp")
    )
    # the engine rounds activations to 8 bits
    assert engines == pytest.approx(ours, rel=0.05)


@pytest.mark.parametrize("target", ["IQ4_XS", "IQ3_S", "IQ2_XS"])
def test_calibrated_levels_speak(target: str, test_models: Path, statistics: Path, tmp_path: Path) -> None:
    made = tmp_path / "x.gguf"
    planned = fewbits.plan(test_models / "smollm2-768", target, output=made, calibration=[statistics])
    assert (
        planned.file_size == fewbits.quantize(test_models / "smollm2-768", target, made, calibration=[statistics]).size
    )
    text = goes_on(made, "The capital of France is")
    assert len(text.split()) > 2
    assert target == "IQ2_XS" or "Paris" in text or "France" in text


def test_no_fallback_refuses(test_models: Path) -> None:
    with pytest.raises(fewbits.FewbitsError, match=r"blk\.\d+"):
        fewbits.plan(test_models / "smollm2-135m", "Q4_K_M", mixture=MixtureOptions(no_fallback=True))


def test_a_split_set_loads_in_llama_cpp(test_models: Path, tmp_path: Path) -> None:
    report = fewbits.quantize(test_models / "smollm2-135m", "Q8_0", tmp_path / "x.gguf", split_max_size=50_000_000)
    assert len(report.files) > 2
    assert "Paris" in goes_on(tmp_path / report.files[0].name, "The capital of France is")


def test_f16_logits_are_transformers(test_models: Path, tmp_path: Path) -> None:
    """The unquantized file in the real engine says what transformers says of the directory."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = test_models / "smollm2-135m"
    fewbits.quantize(folder, "F32", tmp_path / "x.gguf")
    found = engine(tmp_path / "x.gguf", logits_all=True)
    ids = found.tokenize(b"The sun rises in the east and sets in the", add_bos=False)
    found.eval(ids)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        want = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    got = torch.from_numpy(np.array(found.scores[: len(ids)])).log_softmax(-1)
    # llama.cpp keeps its KV cache in half precision
    assert float((got.exp() * (got - want)).sum(-1).abs().max()) < 1e-4


def test_everything_that_matters_survives_requantizing(wheel_gguf: Path, tmp_path: Path) -> None:
    fewbits.quantize(wheel_gguf, "Q8_0", tmp_path / "x.gguf")
    before, after = fewbits.inspect(wheel_gguf), fewbits.inspect(tmp_path / "x.gguf")
    changed = {key for key in before.metadata if before.metadata[key] != after.metadata.get(key)}
    assert changed <= {"general.file_type", "general.quantization_version"}
    assert json.loads(after.model_dump_json())["n_weights"] == before.n_weights
