"""Comparing quantizations: one ruler for all, sweeps, weights, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fewbits import api
from fewbits.checkpoint import open_model
from fewbits.cli import compare as compare_verb
from fewbits.compare import compare, facts
from fewbits.compare.positions import EDGES, histogram
from fewbits.compare.tensors import place, tensor_rows
from fewbits.compare.texts import shared
from fewbits.errors import FewbitsError
from fewbits.forward.text import Text
from fewbits.measure import measure
from fewbits.measure.metrics import Positions
from fewbits.report import ComparisonReport
from tiny_models import save_tiny

WORDS = ["the", "and", "other", "in", "winter", "banner", "hand", "tin", "θ", "inner"]


def words(folder: Path, name: str, seed: int, count: int = 900) -> Path:
    file = folder / name
    file.write_text(" ".join(np.random.default_rng(seed).choice(WORDS, count)), "utf-8")
    return file


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a reference, two candidates and three texts."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("compare")
    reference = save_tiny(folder / "reference", "llama")
    for target in ("Q8_0", "Q4_0"):
        api.quantize(reference, target, folder / f"tiny-{target}.gguf", threads=1)
    for seed, name in enumerate(("prose.txt", "code.txt", "calibration.txt")):
        words(folder, name, seed)
    return folder


def run(work: Path, *candidates: str, texts: tuple[str, ...] = ("prose.txt",), **options: object) -> ComparisonReport:
    options = {"window": 32, "chunks": 9, "cache": work / "cache", "threads": 1} | options
    return compare(
        work / "reference",
        [work / name for name in candidates],
        texts=[work / text for text in texts],
        **options,  # type: ignore[arg-type]
    )


def test_the_figures_are_those_of_measure(work: Path) -> None:
    report = run(work, "tiny-Q8_0.gguf", "tiny-Q4_0.gguf")
    assert [c.label for c in report.candidates] == ["Q8_0", "Q4_0"]
    for candidate in report.candidates:
        alone = measure(
            candidate.path,
            work / "prose.txt",
            reference=work / "reference",
            context=32,
            chunks=9,
            cache=False,
            threads=1,
        )
        assert alone.comparison is not None
        assert candidate.comparison.kl.mean.value == pytest.approx(alone.comparison.kl.mean.value, rel=1e-6)
        assert candidate.comparison.same_top == alone.comparison.same_top
        assert candidate.perplexity.value == pytest.approx(alone.perplexity.value, rel=1e-9)
        assert np.mean(candidate.window_kl) == pytest.approx(candidate.comparison.kl.mean.value)
        assert candidate.size == Path(candidate.path).stat().st_size == sum(f.size for f in candidate.files)
        difference = candidate.perplexity.value - report.reference_perplexity.value
        assert candidate.perplexity_difference.value == pytest.approx(difference, rel=1e-6, abs=1e-9)
        assert sum(candidate.histogram) == report.n_scored == sum(b.n_scored for b in candidate.by_confidence)
    eight, four = report.candidates
    assert eight.comparison.kl.mean.value < four.comparison.kl.mean.value
    assert eight.bits_per_weight > four.bits_per_weight and four.block_bits_per_weight == 4.5
    assert report.noise_floor is not None and report.noise_floor.kl.mean.value > 0
    assert eight.memory is not None and four.memory is not None and eight.memory.total > four.memory.total > 0
    assert eight.engines and eight.engines[0].startswith("llama.cpp")


def test_the_reference_runs_once(work: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    run(
        work, "tiny-Q8_0.gguf", "tiny-Q4_0.gguf", cache=tmp_path, noise_floor=False, weight_errors=False,
        progress=lambda done, total, what: seen.append(what) if done == total else None,
    )  # fmt: skip
    passes = [what for what in seen if what.endswith("decoder blocks")]
    assert len(passes) == 3 and sum("Q4_0" in what for what in passes) == 1


def test_sweep_makes_measures_and_removes(work: Path, tmp_path: Path) -> None:
    report = run(
        work, "tiny-Q4_0.gguf", sweep=["Q8_0", "Q4_0", "gptq:w4g32"], calibration=[work / "calibration.txt"],
        calibration_chunks=4, keep_files=tmp_path / "kept", output=tmp_path / "report.html",
    )  # fmt: skip
    assert [c.label for c in report.candidates] == ["Q4_0 (file)", "Q8_0", "Q4_0", "gptq:w4g32"]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "reference-Q4_0.gguf", "reference-Q8_0.gguf", "reference-gptq-w4g32", "reference.imatrix.gguf",
    ]  # fmt: skip
    given, _, made, gptq = report.candidates
    assert given.quantize_seconds is None and made.quantize_seconds and made.quantize_seconds > 0
    assert made.calibrated_on and not given.calibrated_on
    assert gptq.format == "gptq" and gptq.target == "gptq:w4g32" and any("gptqmodel" in e for e in gptq.engines)
    assert report.overlap and "calibration texts" in report.overlap[0]
    assert "--sweep Q8_0,Q4_0,gptq:w4g32" in report.command and str(work / "calibration.txt") in report.command
    assert ComparisonReport.load(tmp_path / "report.json") == report
    assert "<h1>reference</h1>" in (tmp_path / "report.html").read_text("utf-8")
    before = set(tmp_path.iterdir())
    run(work, sweep=["Q8_0"], noise_floor=False)
    assert set(tmp_path.iterdir()) == before


def test_several_texts_are_told_apart(work: Path) -> None:
    report = run(work, "tiny-Q4_0.gguf", texts=("prose.txt", "code.txt"), chunks=5)
    (candidate,) = report.candidates
    assert report.n_windows == 10 and [text.n_windows for text in report.texts] == [5, 5]
    prose, code = candidate.by_text
    assert (prose.label, code.label) == ("prose.txt", "code.txt") and prose.kl is not None and code.kl is not None
    assert (prose.kl + code.kl) / 2 == pytest.approx(candidate.comparison.kl.mean.value)
    alone = run(work, "tiny-Q4_0.gguf", texts=("code.txt",), chunks=5)
    assert alone.candidates[0].comparison.kl.mean.value == pytest.approx(code.kl, rel=1e-5)
    assert not alone.candidates[0].by_text


def test_worst_tokens_are_the_worst(work: Path) -> None:
    (candidate,) = run(work, "tiny-Q4_0.gguf").candidates
    worst = candidate.worst
    assert [w.kl for w in worst] == sorted((w.kl for w in worst), reverse=True)
    assert worst[0].kl == pytest.approx(candidate.comparison.kl.max)
    content = (work / "prose.txt").read_text("utf-8")
    for token in worst:
        assert 0 <= token.p_actual <= token.p_expected <= 1 and 0 <= token.q_actual <= token.q_given <= 1
        if "�" not in token.before + token.actual:
            assert (token.before + token.actual)[-40:] in content


# weights


def test_errors_are_the_naive_ones(work: Path) -> None:
    reference, candidate = open_model(work / "reference"), open_model(work / "tiny-Q4_0.gguf")
    rows = tensor_rows(reference, candidate)
    assert rows[0].layer is None and "embed" in rows[0].role and rows[-1].role == "lm_head"
    assert [row.layer for row in rows if row.role == "mlp.down_proj"] == [0, 1]
    assert [row.role for row in rows if row.layer == 0][:4] == [f"self_attn.{name}_proj" for name in "qkvo"]
    for row in rows:
        if row.layer is None:
            continue
        name = f"model.layers.{row.layer}.{row.role}.weight"
        before, after = reference.read(name), candidate.read(name)
        assert row.error == pytest.approx(((after - before) ** 2).sum() / (before**2).sum(), rel=1e-4)
        assert row.type == "Q4_0" and row.bits == 4.5 and 0.001 < row.error < 0.02
    assert all(row.error is None for row in tensor_rows(reference, candidate, errors=False))


def test_experts_are_one_row(tmp_path: Path) -> None:
    model = open_model(save_tiny(tmp_path, "mixtral"))
    rows = [row for row in tensor_rows(model, model) if row.layer == 0]
    experts = [row for row in rows if "experts" in row.role]
    assert len(experts) == 3 and all(row.n_weights == 4 * 64 * 96 for row in experts)
    assert all(row.error == 0 for row in rows)


def test_scales_that_moved_are_taken_out(tmp_path: Path) -> None:
    """As AWQ does: a norm divided, the matrices behind it multiplied, and the same between two matrices."""
    reference = save_tiny(tmp_path / "reference", "llama")
    model = AutoModelForCausalLM.from_pretrained(reference)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in model.model.layers:
            scales = torch.rand(64, generator=generator) + 0.5
            layer.input_layernorm.weight /= scales
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight *= scales
            scales = torch.rand(96, generator=generator) + 0.5
            layer.mlp.up_proj.weight /= scales[:, None]
            layer.mlp.down_proj.weight *= scales
    model.save_pretrained(tmp_path / "folded")
    (tmp_path / "folded" / "tokenizer.json").write_bytes((reference / "tokenizer.json").read_bytes())
    for row in tensor_rows(open_model(reference), open_model(tmp_path / "folded")):
        assert row.error is not None and row.error < 1e-6, row


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.self_attn.q_proj.weight", (12, "self_attn.q_proj")),
        ("model.layers.3.mlp.experts.17.down_proj.weight", (3, "mlp.experts.down_proj")),
        ("transformer.h.0.attn.c_attn.weight", (0, "attn.c_attn")),
        ("model.embed_tokens.weight", (None, "embed_tokens")),
        ("lm_head.weight", (None, "lm_head")),
    ],
)
def test_places(name: str, expected: tuple[int | None, str]) -> None:
    assert place(name) == expected


# parts


def test_labels_are_short_and_unique() -> None:
    def of(*paths: str) -> list[str]:
        return facts.labels([Path(path) for path in paths])

    assert of("/x/SmolLM2-135M-Q4_K_M.gguf", "/x/SmolLM2-135M-Q4_K_S.gguf") == ["Q4_K_M", "Q4_K_S"]
    assert of("/x/m.Q8_0.gguf", "/x/m.Q2_K.gguf") == ["Q8_0", "Q2_K"]
    assert of("/x/model-Q4_0.gguf") == ["Q4_0"] and of("/x/model") == ["model"]
    assert of("/x/a/model.gguf", "/x/b/model.gguf") == ["a/model", "b/model"]
    assert of("/x/m.gguf", "/x/m-Q8_0.gguf") == ["m", "m-Q8_0"]
    with pytest.raises(FewbitsError, match="named twice"):
        of("/x/model.gguf", "/x/../x/model.gguf")


def test_overlap_counts_runs_of_words() -> None:
    rng = np.random.default_rng(0)
    one, other = (" ".join(str(n) for n in rng.integers(0, 10**6, 500)) for _ in range(2))
    text = Text(Path("x"), one, "")
    assert shared(text, [one]) == 1 and shared(text, [other]) == 0
    assert 0.3 < shared(text, [other + " " + one[: len(one) // 2]]) < 0.6
    assert shared(Text(Path("x"), "too short", ""), ["too short"]) == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 40), min_size=1, max_size=50))
def test_histogram_counts_every_position(values: list[float]) -> None:
    kl = np.array([values])
    counts = histogram(Positions(nll=kl, kl=kl))
    assert len(counts) == len(EDGES) + 1 and sum(counts) == kl.size
    assert counts[0] == (kl < EDGES[0]).sum() and counts[-1] == (kl >= EDGES[-1]).sum()


# requests


def test_bad_requests_are_explained_before_any_work(work: Path, tmp_path: Path) -> None:
    def refused(match: str, *candidates: str, **options: object) -> None:
        with pytest.raises(FewbitsError, match=match):
            run(work, *candidates, **options)  # type: ignore[arg-type]

    refused("nothing to compare")
    refused("no text", "tiny-Q4_0.gguf", texts=())
    refused("Unknown target", sweep=["gptq:w99"])
    refused("Unknown engine", "tiny-Q4_0.gguf", engine="vllm")
    refused("llama.cpp runs GGUF files only", sweep=["hqq:w4g32"], engine="llama.cpp")
    refused("llama.cpp runs GGUF files only", "reference", engine="llama.cpp")
    refused("named twice", "tiny-Q4_0.gguf", "tiny-Q4_0.gguf")
    refused("names a target twice", sweep=["Q4_0", "Q4_0"])
    refused("measured on what is calibrated on", sweep=["Q4_0"], calibration=[work / "prose.txt"])
    refused("the page is HTML", "tiny-Q4_0.gguf", output=tmp_path / "report.pdf")
    refused("does not exist", "tiny-Q4_0.gguf", output=tmp_path / "missing" / "report.html")
    refused("Unknown card", "tiny-Q4_0.gguf", gpu="Voodoo 2")
    (tmp_path / "report.json").write_text("{}")
    refused("the output exists", "tiny-Q4_0.gguf", output=tmp_path / "report.html")
    (tmp_path / "copy.txt").write_text((work / "prose.txt").read_text("utf-8") + " the", "utf-8")
    refused("stands in the calibration texts", sweep=["Q4_0"], calibration=[tmp_path / "copy.txt"])
    (tmp_path / "reference-Q4_0.gguf").write_bytes(b"")
    refused("exists already", sweep=["Q4_0"], keep_files=tmp_path)


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"format_version": 1}')
    with pytest.raises(FewbitsError, match=r"report\.json"):
        ComparisonReport.load(tmp_path / "report.json")
    with pytest.raises(FewbitsError, match=r"missing\.json"):
        ComparisonReport.load(tmp_path / "missing.json")


def test_the_verb(work: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(compare_verb.command)
    arguments = [str(work / "reference"), str(work / "tiny-Q8_0.gguf"), "--text", str(work / "prose.txt")]
    arguments += ["--window", "32", "--chunks", "9", "--no-cache", "--threads", "1", "--gpu", "RTX 4090"]
    done = CliRunner().invoke(app, [*arguments, "--sweep", "Q4_0,", "-o", str(tmp_path / "report.html")])
    assert done.exit_code == 0, done.output
    table = [line for line in done.stdout.splitlines() if line.startswith(("Q8_0", "Q4_0"))]
    assert len(table) == 2 and "RTX 4090" in done.output
    assert (tmp_path / "report.html").is_file() and (tmp_path / "report.json").is_file()
    done = CliRunner().invoke(app, [*arguments, "--json", "--no-noise-floor"])
    data = json.loads(done.stdout)
    assert data["format_version"] == 1 and data["noise_floor"] is None
    assert data["memory_line"]["size"] == 24 * 2**30
