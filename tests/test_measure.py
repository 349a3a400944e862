"""Perplexity and KL divergence: the windows, the streamed forward pass, the figures, the store and the real engine."""

from __future__ import annotations

import json
import os
from math import exp, log
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fewbits.checkpoint import open_model
from fewbits.errors import FewbitsError
from fewbits.forward import streamed as forward
from fewbits.forward.streamed import StreamedModel, load_whole
from fewbits.forward.text import encode
from fewbits.measure import MeasureReport, measure, metrics
from fewbits.measure.windows import RULERS, cut, get_ruler
from fewbits.spill import Spill
from tiny_models import TINY, VOCAB, save_tiny, tiny_tokenizer

WORDS = ["the", "and", "other", "in", "winter", "banner", "hand", "tin", "θ", "inner"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "reference", "llama")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny`, with slightly different weights."""
    folder = save_tiny(tmp_path_factory.mktemp("tiny") / "other", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(0)
    file.write_text(" ".join(rng.choice(WORDS, 600)) + "\n", "utf-8")
    return file


def run(model: Path, text: Path, reference: Path | None = None, **options: object) -> MeasureReport:
    options = {"context": 32, "chunks": 9, "cache": False, "threads": 1} | options
    return measure(model, text, reference=reference, **options)  # type: ignore[arg-type]


# windows


def test_llama_cpp_ruler_scores_the_second_half() -> None:
    ids = list(range(100, 100 + 1100))
    windows = cut(ids, bos=7, ruler=RULERS["llama.cpp"])
    assert windows.inputs.shape == (2, 512) and windows.targets.shape == (2, 255)
    assert windows.inputs[:, 0].tolist() == [7, 7] and windows.inputs[1, 1] == 100 + 513
    # the prediction made at position 256 is of token 257
    assert windows.targets[0, 0] == 100 + 257 and windows.targets[0, -1] == 100 + 511
    assert cut(ids, None, RULERS["llama.cpp"]).inputs[1, 0] == 100 + 512


def test_hf_ruler_scores_all_positions() -> None:
    windows = cut(list(range(5000)), bos=7, ruler=RULERS["hf"], chunks=1)
    assert windows.inputs.shape == (1, 2048) and windows.targets.shape == (1, 2047)
    assert windows.inputs[0, 0] == 0, "this ruler puts no BOS"
    assert windows.targets[0].tolist() == list(range(1, 2048))


def test_special_tokens_in_a_text_stay_text() -> None:
    tokenizer = tiny_tokenizer()
    ids, bos = encode(tokenizer, "the <|endoftext|> and")
    assert bos is None and tokenizer.bos_token_id not in ids
    assert tokenizer.decode(ids) == "the <|endoftext|> and"


def test_bos_is_found_and_put_first() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    end = str(tokenizer.bos_token)
    template = TemplateProcessing(single=f"{end} $A {end}", special_tokens=[(end, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    ids, bos = encode(tokenizer, "the the")
    assert bos == tokenizer.bos_token_id and ids[0] == bos and ids[-1] != bos


def test_bad_requests_are_explained(tiny: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="no convention 'mlx'"):
        get_ruler("mlx")
    with pytest.raises(FewbitsError, match="one window of the hf convention needs 2048"):
        cut([1] * 2047, None, RULERS["hf"])
    with pytest.raises(FewbitsError, match=r"missing\.txt: the text cannot be read"):
        run(tiny, tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 9)
    with pytest.raises(FewbitsError, match=r"latin\.txt: not UTF-8 at byte 3"):
        run(tiny, tmp_path / "latin.txt")
    (tmp_path / "short.txt").write_text("the")
    with pytest.raises(FewbitsError, match="one window"):
        run(tiny, tmp_path / "short.txt")
    with pytest.raises(FewbitsError, match="made for 512 positions"):
        run(tiny, text, convention="hf", context=1024)
    with pytest.raises(FewbitsError, match="Unknown engine"):
        run(tiny, text, engine="vllm")
    with pytest.raises(FewbitsError, match="GGUF files only"):
        run(tiny, text, engine="llama.cpp")
    with pytest.raises(FewbitsError, match="needs a reference"):
        run(tiny, text, noise_floor=True)
    with pytest.raises(FewbitsError, match="0 windows"):
        run(tiny, text, chunks=0)


# the forward pass


@pytest.mark.parametrize("name", TINY)
def test_streamed_forward_is_transformers_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path, name)
    ids = np.random.default_rng(1).integers(0, VOCAB, (3, 96))
    ordinary = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = ordinary(torch.from_numpy(ids)).logits
    monkeypatch.setattr(forward, "BATCH_TOKENS", 192)  # two batches, the second not full
    model = open_model(folder)
    streamed = StreamedModel(model)
    states = streamed.final_states(ids, first=10)
    logits = streamed.head()(torch.from_numpy(states.reshape(-1, states.shape[-1]))).reshape(3, 85, -1)
    assert streamed.n_vocab == VOCAB
    torch.testing.assert_close(logits, expected[:, 10:95], rtol=1e-4, atol=1e-4)
    if name in ("llama", "gpt2", "gemma3", "mixtral"):
        with torch.no_grad():
            torch.testing.assert_close(load_whole(model)(torch.from_numpy(ids)).logits, expected, rtol=1e-4, atol=1e-4)


def test_large_activations_go_to_a_file(tiny: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(1).integers(0, VOCAB, (2, 32))
    in_memory = StreamedModel(open_model(tiny)).final_states(ids, 0)
    spilled = StreamedModel(open_model(tiny), spill=Spill(100, tmp_path)).final_states(ids, 0)
    assert np.array_equal(spilled, in_memory)


def test_missing_tensor_is_named(tiny: Path, tmp_path: Path) -> None:
    model = open_model(tiny)
    name = "model.layers.1.mlp.up_proj.weight"
    streamed = StreamedModel(model)
    streamed.names = frozenset(model.names) - {name}
    with pytest.raises(FewbitsError, match=name.replace(".", r"\.")):
        streamed.final_states(np.zeros((1, 8), np.int64), 0)


# the figures


def naive_nll(folder: Path, ids: list[int], context: int) -> npt.NDArray[np.float64]:
    """-ln p of the second half of each window, one position at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    found = []
    for start in range(0, len(ids) - context + 1, context):
        window = ids[start : start + context]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].numpy()
        for position in range(context // 2, context - 1):
            row = logits[position]
            found.append(log(np.exp(row - row.max()).sum()) + row.max() - row[window[position + 1]])
    return np.array(found)


def test_perplexity_is_the_naive_one(tiny: Path, text: Path) -> None:
    report = run(tiny, text)
    ids = tiny_tokenizer()(text.read_text("utf-8").removesuffix("\n"))["input_ids"][: 9 * 32]
    nll = naive_nll(tiny, ids, 32)
    assert report.n_scored == nll.size == 9 * 15 and report.comparison is None
    assert report.perplexity.value == pytest.approx(exp(nll.mean()), rel=1e-5)
    expected = exp(nll.mean()) * nll.std(ddof=1) / nll.size**0.5
    assert report.perplexity.stderr_naive == pytest.approx(expected, rel=1e-4)
    assert report.perplexity.low < report.perplexity.value < report.perplexity.high


def test_a_model_does_not_differ_from_itself(tiny: Path, text: Path) -> None:
    report = run(tiny, text, tiny)
    assert report.comparison is not None
    assert abs(report.comparison.kl.mean.value) < 1e-9 and report.comparison.kl.max < 1e-9
    assert report.comparison.same_top.value == 1 and report.comparison.same_top.low < 1
    assert report.comparison.perplexity_ratio.value == 1 and report.comparison.rms_delta_p.value == 0
    assert report.tokenizer.same_as_models is True and report.warnings == []


class Given:
    """Logits from an array [windows, scored, vocabulary]."""

    def __init__(self, values: npt.NDArray[np.float32]) -> None:
        self.values, self.n_vocab = values, values.shape[-1]

    def logits(self, window: int, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(self.values[window, start:stop].copy())


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(2, 40),
    st.floats(0.1, 8),
    st.integers(0, 2**31),
    st.integers(1, 99),
)
def test_metrics_against_naive_formulas(w: int, s: int, v: int, spread: float, seed: int, at_once: int) -> None:
    rng = np.random.default_rng(seed)
    q, p = (spread * rng.standard_normal((2, w, s, v))).astype(np.float32)
    targets = rng.integers(0, v, (w, s))
    before, metrics.SLICE_VALUES = metrics.SLICE_VALUES, at_once * v
    try:
        got = metrics.score(Given(q), targets, Given(p))
    finally:
        metrics.SLICE_VALUES = before
    prob_q, prob_p = (
        np.exp(z.astype(np.float64)) / np.exp(z.astype(np.float64)).sum(-1, keepdims=True) for z in (q, p)
    )
    at_q, at_p = (np.take_along_axis(prob, targets[..., None], -1)[..., 0] for prob in (prob_q, prob_p))
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(got.nll, -np.log(at_q), **close)
    np.testing.assert_allclose(got.reference_nll, -np.log(at_p), **close)
    np.testing.assert_allclose(got.kl, (prob_p * np.log(prob_p / prob_q)).sum(-1), **close)
    np.testing.assert_allclose(got.delta_p, at_q - at_p, **close)
    assert np.array_equal(got.same_top, q.argmax(-1) == p.argmax(-1))
    summary = metrics.compare(got)
    assert summary.rms_delta_p.value == pytest.approx(np.sqrt(((at_q - at_p) ** 2).mean()), rel=1e-3, abs=1e-6)
    assert summary.kl.median <= summary.kl.p90 <= summary.kl.p99 <= summary.kl.p999 <= summary.kl.max
    assert 0 <= summary.same_top.low <= summary.same_top.value <= summary.same_top.high <= 1


def test_intervals_are_those_of_window_means() -> None:
    values = np.array([[1.0, 3.0], [2.0, 6.0], [4.0, 8.0]])
    got = metrics.estimate(values)
    error = np.array([2.0, 4.0, 6.0]).std(ddof=1) / 3**0.5
    assert got.value == 4 and got.stderr == pytest.approx(error)
    assert got.high - got.value == pytest.approx(4.3027 * error)
    assert got.stderr_naive == pytest.approx(values.std(ddof=1) / 6**0.5)
    alone = metrics.estimate(values[:1])
    assert alone.stderr is None and alone.high > alone.value


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (5, 2.5706), (23, 2.0687), (100, 1.9840)])
def test_student_quantiles(freedom: int, quantile: float) -> None:
    assert metrics.t95(freedom) == pytest.approx(quantile, abs=3e-3)


def test_padded_vocabulary_is_compared_in_its_common_part() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 3, 8)).astype(np.float32)
    padded = np.concatenate([logits, 5 * np.ones((2, 3, 4), np.float32)], -1)
    got = metrics.score(Given(logits), rng.integers(0, 8, (2, 3)), Given(padded))
    assert got.kl is not None and abs(got.kl).max() < 1e-6


def test_noise_floor_is_small_but_not_nothing(tiny: Path, other: Path, text: Path) -> None:
    report = run(other, text, tiny, noise_floor=True)
    assert report.comparison is not None and report.noise_floor is not None
    assert 0 < report.noise_floor.kl.mean.value < report.comparison.kl.mean.value
    assert any("noise floor" in name for name, _, _ in report.rows())


def test_report_is_json_and_names_its_ruler(tiny: Path, other: Path, text: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    report = run(other, text, tiny, progress=lambda done, total, what: seen.append((done, total, what)))
    again = MeasureReport.model_validate_json(report.model_dump_json())
    assert again == report and again.convention.name == "llama.cpp" and again.convention.context == 32
    assert "llama.cpp convention" in report.ruler() and "9 windows" in report.ruler()
    assert json.loads(report.model_dump_json())["text"]["sha256"]
    assert (2, 2, "decoder blocks") in seen and (9, 9, "windows scored") in seen


def test_few_windows_and_foreign_tokenizer_are_warned_of(tiny: Path, text: Path, tmp_path: Path) -> None:
    foreign = save_tiny(tmp_path / "foreign", "llama")
    tokenizer = json.loads((foreign / "tokenizer.json").read_text("utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:3]
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    report = run(foreign, text, tiny, chunks=1)
    assert report.tokenizer.same_as_models is False and report.perplexity.stderr is None
    assert len(report.warnings) == 2 and "only 1 windows" in report.warnings[1]


# the reference store


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "reference").iterdir())


def test_reference_is_kept_and_reused(tiny: Path, other: Path, text: Path, tmp_path: Path) -> None:
    first = run(other, text, tiny, cache=tmp_path, noise_floor=True)
    (entry,) = entries(tmp_path)
    written = (entry / "hidden.npy").stat().st_mtime_ns
    second = run(other, text, tiny, cache=tmp_path, noise_floor=True)
    assert first.reference_reused is False and second.reference_reused is True
    assert (entry / "hidden.npy").stat().st_mtime_ns == written and "noise floor" not in second.seconds
    assert second.comparison == first.comparison and second.noise_floor == first.noise_floor
    assert json.loads((entry / "provenance.json").read_text())["text_sha256"] == first.text.sha256


def test_reference_is_computed_anew_when_anything_changes(tiny: Path, text: Path, tmp_path: Path) -> None:
    run(tiny, text, tiny, cache=tmp_path)
    assert run(tiny, text, tiny, cache=tmp_path, chunks=8).reference_reused is False
    assert run(tiny, text, tiny, cache=tmp_path, convention="hf").reference_reused is False
    assert len(entries(tmp_path)) == 3
    os.utime(tiny / "model.safetensors")
    assert run(tiny, text, tiny, cache=tmp_path).reference_reused is False


def test_damaged_entry_is_replaced_and_unwritable_cache_ignored(tiny: Path, text: Path, tmp_path: Path) -> None:
    whole = run(tiny, text, tiny, cache=tmp_path / "cache")
    (entry,) = entries(tmp_path / "cache")
    data = (entry / "hidden.npy").read_bytes()
    (entry / "hidden.npy").write_bytes(data[: len(data) // 2])
    again = run(tiny, text, tiny, cache=tmp_path / "cache")
    assert again.reference_reused is False and again.comparison == whole.comparison
    assert run(tiny, text, tiny, cache=tmp_path / "cache").reference_reused is True
    (tmp_path / "file").write_text("")
    assert run(tiny, text, tiny, cache=tmp_path / "file").comparison == whole.comparison


def test_default_cache_follows_the_environment(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run(tiny, text, tiny, cache=False)
    assert not (tmp_path / "fewbits").exists()
    run(tiny, text, tiny, cache=True)
    assert len(entries(tmp_path / "fewbits")) == 1


# the real engine


@pytest.mark.engine
@pytest.mark.shared
def test_engines_agree_on_the_same_file(test_models: Path, shared_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from fewbits.api import quantize

    directory = test_models / "smollm2-135m"
    file = tmp_path / "model.gguf"
    quantize(str(directory), "F16", file)
    # the beginning is enough for two windows, and tokenized sooner
    wiki = tmp_path / "wiki.txt"
    beginning = (shared_dir / "data" / "wikitext-2" / "wiki.test.raw").read_text("utf-8")[:20_000]
    wiki.write_text(beginning, "utf-8")
    reports = [
        measure(file, wiki, reference=directory, chunks=2, engine=engine, threads=1, cache=tmp_path / "cache")
        for engine in ("torch", "llama.cpp")
    ]
    torch_report, engine_report = reports
    assert engine_report.reference_reused is True and engine_report.tokenizer.same_as_models is True
    # llama-perplexity prints 21.3753 for these two windows of the float32 file
    for report in reports:
        assert report.perplexity.value == pytest.approx(21.3753, rel=1e-3)
        assert report.comparison is not None and report.comparison.kl.mean.value < 1e-4
    assert torch_report.perplexity.value == pytest.approx(engine_report.perplexity.value, rel=1e-3)


@pytest.mark.engine
def test_engine_refuses_what_is_no_model(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from fewbits.measure.llama_cpp_engine import LlamaCppLogits

    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(FewbitsError, match=r"broken\.gguf: llama\.cpp cannot load it"):
        LlamaCppLogits(tmp_path / "broken.gguf", np.zeros((1, 8), np.int64), 4, 1)
