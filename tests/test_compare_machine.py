"""Speed and memory of candidates in the real engine, and what errors of their weights are expected to cost."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import fewbits
from fewbits import api
from fewbits.calibration.imatrix_files import read_statistics, write_statistics
from fewbits.calibration.run import calibrate
from fewbits.calibration.statistics import Sensitivity, Statistics, TensorStatistics
from fewbits.checkpoint import open_model
from fewbits.cli import compare as compare_verb
from fewbits.compare import compare, machine, probe
from fewbits.compare.losses import ExpectedLosses
from fewbits.compare.machine import Trial, printed, timing
from fewbits.compare.tensors import tensor_rows
from fewbits.errors import FewbitsError
from fewbits.report import ComparisonReport
from fewbits.report.schema import Footprint, Speed
from tiny_models import save_tiny

DEMO = Path(fewbits.__file__).parent / "demo" / "model"
MIB = 2**20


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Path:
    """A folder with quantizations of the demo model and statistics with sensitivities."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("machine")
    for target in ("Q8_0", "Q4_0"):
        api.quantize(DEMO, target, folder / f"demo-{target}.gguf", threads=1)
    api.quantize(DEMO, "hqq:w4g64", folder / "demo-hqq", threads=1)
    file = folder / "stats.imatrix.gguf"
    calibrate(DEMO, texts[0], file, chunks=8, context=256, output_tensor=True, sensitivity=True)
    return folder


def run(work: Path, text: Path, *candidates: str, **options: object) -> ComparisonReport:
    options = {"chunks": 8, "window": 128, "noise_floor": False, "cache": work / "cache", "threads": 1} | options
    return compare(DEMO, [work / name for name in candidates], texts=text, **options)  # type: ignore[arg-type]


# the engine


@pytest.mark.engine
def test_speed_and_memory_of_what_an_engine_runs(work: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    names = ("demo-Q8_0.gguf", "demo-Q4_0.gguf", "demo-hqq")
    report = run(work, texts[1], *names, speed=True, peak_memory=True, context=200, output=tmp_path / "report.html")
    eight, four, directory = report.candidates
    assert directory.speed is None and directory.footprint is None and not directory.warnings
    for candidate in (eight, four):
        speed, memory = candidate.speed, candidate.footprint
        assert isinstance(speed, Speed) and isinstance(memory, Footprint)
        assert (speed.prompt.n_tokens, speed.generation.n_tokens, speed.threads) == (200, 64, 1)
        for timed in (speed.prompt, speed.generation):
            assert timed.runs == 5 and 0 < timed.low <= timed.median <= timed.high
        assert speed.prompt.median > speed.generation.median
        assert speed.engine.startswith("llama-cpp-python") and memory.context == speed.context == 200
        # llama.cpp prints hundredths of a MiB
        assert abs(memory.reserved["weights"] - memory.predicted["weights"]) < 0.05 * MIB
        assert abs(memory.reserved["kv_cache"] - memory.predicted["kv_cache"]) < 0.01 * MIB
        assert memory.deviation == pytest.approx(sum(memory.predicted.values()) / sum(memory.reserved.values()) - 1)
        if sys.platform == "linux":
            assert memory.resident is not None and memory.mapped is not None
            assert memory.reserved["kv_cache"] < memory.resident < sum(memory.reserved.values()) + 64 * MIB
            assert memory.mapped >= 0.9 * memory.predicted["weights"]
    assert eight.footprint and four.footprint
    assert eight.footprint.reserved["weights"] > four.footprint.reserved["weights"]
    assert (
        "--speed --peak-memory" in report.command and "--threads 1" in report.command and report.seconds["try out"] > 0
    )
    assert ComparisonReport.load(tmp_path / "report.json") == report
    assert "On the machine that made this page" in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.engine
def test_a_longer_context_and_a_smaller_cache_show_in_memory(work: Path) -> None:
    pytest.importorskip("llama_cpp")
    model = open_model(work / "demo-Q8_0.gguf")
    found = {}
    for kv in (None, "q8_0"):
        for context in (256, 4096):
            _, footprint, complaints = Trial(False, True, kv, 1).run(model, context)
            assert footprint is not None and not complaints
            found[kv, context] = footprint
            assert footprint.reserved["kv_cache"] == pytest.approx(footprint.predicted["kv_cache"], abs=0.01 * MIB)
    assert found[None, 4096].reserved["kv_cache"] == pytest.approx(16 * found[None, 256].reserved["kv_cache"], rel=0.01)
    assert found["q8_0", 4096].reserved["kv_cache"] < 0.55 * found[None, 4096].reserved["kv_cache"]
    if sys.platform == "linux":
        more = (found[None, 4096].resident or 0) - (found[None, 256].resident or 0)
        grown = found[None, 4096].reserved["kv_cache"] - found[None, 256].reserved["kv_cache"]
        assert more > 0.9 * grown  # the cache is cleared when it is made: all of it is touched


@pytest.mark.engine
def test_what_fails_in_the_engine_is_a_complaint(work: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    content = (work / "demo-Q8_0.gguf").read_bytes()
    at = content.index(b"tokenizer.ggml.pre") + len(b"tokenizer.ggml.pre") + 4 + 8
    file = tmp_path / "odd.gguf"
    file.write_bytes(content[:at] + b"zzzz" + content[at + 4 :])  # a tokenizer that llama.cpp does not know
    speed, footprint, complaints = Trial(True, True, None, 1).run(open_model(file), 128)
    assert speed is None and footprint is None
    assert complaints == ["not tried out: the engine failed: llama.cpp cannot load it"]


def test_what_does_not_fit_the_machine_is_not_tried(work: Path) -> None:
    trial = Trial(True, True, None, 1)
    trial.__dict__["machine"] = replace(trial.machine, ram=MIB)
    assert trial.run(open_model(work / "demo-Q8_0.gguf"), 128)[2][0].startswith("not tried out: it takes")
    assert Trial(False, False, None, 1).run(open_model(work / "demo-Q8_0.gguf"), 128) == (None, None, [])


def test_requests_that_nothing_answers_are_refused(work: Path, texts: tuple[Path, Path]) -> None:
    with pytest.raises(FewbitsError, match="no candidate is a GGUF file"):
        run(work, texts[1], "demo-hqq", speed=True)
    with pytest.raises(FewbitsError, match="no candidate is a GGUF file"):
        run(work, texts[1], sweep=["hqq:w4g64"], peak_memory=True)


def test_without_the_engine_its_figures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    with pytest.raises(FewbitsError, match="not installed"):
        Trial(True, False, None, 1).check(True)
    Trial(False, False, None, 1).check(False)


def test_the_probe_brings_nothing_of_its_own() -> None:
    """Else its memory would count as the engine's."""
    script = "import sys, runpy; runpy.run_path(sys.argv[1]); print(*{'torch', 'numpy', 'fewbits'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, probe.__file__], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_memory_of_this_process_is_told() -> None:
    told = probe.memory()
    if sys.platform == "linux":
        assert told is not None and 0 < told["own"] < told["resident"] <= told["peak"]
        held = np.ones(2**23)
        again = probe.memory()
        assert again is not None and again["own"] - told["own"] > 0.9 * held.nbytes


LOG = """
load_tensors:   CPU_Mapped model buffer size =    98.87 MiB
load_tensors:   CPU_REPACK model buffer size =     7.59 MiB
llama_context:        CPU  output buffer size =     0.19 MiB
llama_kv_cache:        CPU KV buffer size =   180.00 MiB
llama_kv_cache:        CPU KV buffer size =    20.00 MiB
llama_kv_cache: size =  180.00 MiB (  8192 cells,  30 layers,  1/1 seqs), K (f16):   90.00 MiB, V (f16):   90.00 MiB
llama_memory_recurrent:        CPU RS buffer size =     1.50 MiB
sched_reserve:        CPU compute buffer size =    98.25 MiB
"""


def test_buffers_are_read_off_the_log() -> None:
    assert {part: size / MIB for part, size in printed(LOG).items()} == pytest.approx(
        {
            "weights": 98.87,
            "rearranged": 7.59,
            "kv_cache": 200,
            "recurrent_state": 1.5,
            "compute": 98.25,
            "output": 0.19,
        },
        abs=1e-6,
    )
    assert printed("nothing of the kind") == {}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=9))
def test_rates_come_from_the_runs(seconds: list[float]) -> None:
    found = timing(64, seconds)
    assert found.runs == len(seconds) and found.low <= found.median <= found.high
    assert found.low == 64 / max(seconds) and found.high == 64 / min(seconds)
    if len(seconds) % 2:
        assert found.median == pytest.approx(64 / float(np.median(seconds)))


# expected losses


def test_expected_losses_are_the_sums_by_hand(work: Path) -> None:
    reference, candidate = open_model(DEMO), open_model(work / "demo-Q4_0.gguf")
    expected = ExpectedLosses(reference, work / "stats.imatrix.gguf")
    rows = {(row.layer, row.role): row for row in tensor_rows(reference, candidate, expected=expected)}
    known = read_statistics(work / "stats.imatrix.gguf").sensitivities
    for key, stored, name in [
        ((1, "mlp.down_proj"), "model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ((0, "self_attn.q_proj"), "model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"),
        ((None, "embed_tokens"), "model.embed_tokens.weight", "token_embd.weight"),
        ((None, "lm_head"), "lm_head.weight", "output.weight"),
    ]:
        squares = (candidate.read(stored) - reference.read(stored)).astype(np.float64) ** 2
        by_hand = 0.0
        for one in known[name]:
            by_row = one.rows if one.rows is not None else np.full(len(squares), 1 / len(squares))
            by_hand += 0.5 * float(by_row @ squares @ one.columns[0])
        assert rows[key].loss == pytest.approx(by_hand, rel=1e-4) and by_hand > 0
    assert all(row.loss is not None for row in rows.values())
    assert all(row.loss is None for row in tensor_rows(reference, candidate))


def test_what_is_expected_is_about_what_is_measured(work: Path, texts: tuple[Path, Path]) -> None:
    report = run(
        work, texts[1], "demo-Q8_0.gguf", "demo-Q4_0.gguf", "demo-hqq", sensitivity=work / "stats.imatrix.gguf"
    )
    for candidate in report.candidates:
        assert candidate.expected_loss is not None
        assert 0.4 < candidate.expected_loss / candidate.comparison.kl.mean.value < 2.5, candidate.label
    assert report.sensitivity is not None and report.sensitivity.datasets == [str(texts[0])]
    assert "--sensitivity" in report.command


def test_experts_and_turned_matrices_have_their_own(tmp_path: Path) -> None:
    """Mixtral's experts share a GGUF tensor; GPT-2's matrices stand the other way round."""
    rng = np.random.default_rng(0)

    def statistics(name: str, experts: int, columns: int) -> Path:
        plain = TensorStatistics(np.ones((experts, columns), np.float32), np.ones(experts, np.float32))
        weight = rng.uniform(0, 1, (experts, columns)).astype(np.float32)
        made = Statistics({name: plain}, ["text"], sensitivities={name: [Sensitivity(weight)]})
        write_statistics(made, tmp_path / f"{name}.gguf")
        return tmp_path / f"{name}.gguf"

    mixtral = open_model(save_tiny(tmp_path / "mixtral", "mixtral"))
    file = statistics("blk.0.ffn_down_exps.weight", 4, 96)
    expected, known = ExpectedLosses(mixtral, file), read_statistics(file).sensitivities
    squares = rng.uniform(0, 1, (64, 96)).astype(np.float32)
    for expert in range(4):
        names = [n for n in mixtral.names if n.startswith("model.layers.0.") and f"experts.{expert}." in n]
        found = [one for name in names for one in expected.counted(name)]
        assert len(found) == 1
        by_hand = 0.5 * (squares @ known["blk.0.ffn_down_exps.weight"][0].columns[expert]).mean()
        assert found[0].loss(squares, slice(None)) == pytest.approx(by_hand, rel=1e-5)

    gpt2 = open_model(save_tiny(tmp_path / "gpt2", "gpt2"))
    stored = next(name for name in gpt2.names if name.endswith("h.0.mlp.c_proj.weight"))
    inputs, outputs = gpt2.shape(stored)
    file = statistics("blk.0.ffn_down.weight", 1, inputs)
    (counted,) = ExpectedLosses(gpt2, file).counted(stored)
    columns = read_statistics(file).sensitivities["blk.0.ffn_down.weight"][0].columns[0]
    squares = rng.uniform(0, 1, (inputs, outputs)).astype(np.float32)
    by_hand = 0.5 * float((columns @ squares).mean())
    assert counted.loss(squares, slice(None)) == pytest.approx(by_hand, rel=1e-5)


def test_statistics_of_no_use_are_refused(work: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    known = read_statistics(work / "stats.imatrix.gguf")
    write_statistics(Statistics(known.tensors, known.datasets), tmp_path / "plain.gguf")
    with pytest.raises(FewbitsError, match="no sensitivities in it"):
        ExpectedLosses(open_model(DEMO), tmp_path / "plain.gguf")
    other = open_model(save_tiny(tmp_path / "other", "llama"))
    with pytest.raises(FewbitsError, match="has sensitivities"):
        ExpectedLosses(other, work / "stats.imatrix.gguf")
    renamed = Statistics(known.tensors, sensitivities={"x.weight": known.sensitivities["output.weight"]})
    write_statistics(renamed, tmp_path / "renamed.gguf")
    with pytest.raises(FewbitsError, match="no tensor of this model"):
        ExpectedLosses(open_model(DEMO), tmp_path / "renamed.gguf")
    with pytest.raises(FewbitsError, match="weigh the errors"):
        run(work, texts[1], "demo-Q8_0.gguf", sensitivity=work / "stats.imatrix.gguf", weight_errors=False)


@pytest.mark.engine
def test_the_verb(work: Path, texts: tuple[Path, Path]) -> None:
    pytest.importorskip("llama_cpp")
    app = typer.Typer()
    app.command()(compare_verb.command)
    arguments = [str(DEMO), str(work / "demo-Q4_0.gguf"), str(work / "demo-hqq"), "--text", str(texts[1])]
    arguments += ["--window", "128", "--chunks", "4", "--no-cache", "--no-noise-floor", "--threads", "1"]
    arguments += ["--speed", "--peak-memory", "--context", "128", "--sensitivity", str(work / "stats.imatrix.gguf")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "prompt tok/s" in done.stdout and "peak resident MB" in done.stdout
    data = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    file, directory = data["candidates"]
    assert file["speed"]["prompt"]["median"] > 0 and file["footprint"]["context"] == 128
    assert directory["speed"] is None and directory["tensors"][1]["loss"] > 0
