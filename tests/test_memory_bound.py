"""--max-memory: results that do not depend on it, needs told before any work, and jobs under the system's own limit."""

from __future__ import annotations

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from fewbits import api
from fewbits.calibration import memory_need
from fewbits.calibration.collect import BlockRecorder
from fewbits.calibration.memory_need import SPILLED, Block, TextRun
from fewbits.calibration.run import calibrate
from fewbits.checkpoint import open_model
from fewbits.errors import FewbitsError
from fewbits.forward import streamed
from fewbits.limits import HESSIANS, Limits, largest
from fewbits.methods import factorize, inverse_cholesky
from fewbits.quantize.directory_job import DirectoryJob
from fewbits.quantize.gguf_job import GGUFJob
from fewbits.quantize.memory_need import text_run
from fewbits.spill import Spill
from tiny_models import save_tiny

ROOT = Path(__file__).resolve().parent.parent
LONG = {"num_hidden_layers": 1, "max_position_embeddings": 512}


def test_an_array_in_a_file_keeps_its_values(tmp_path: Path) -> None:
    spill = Spill(1000, tmp_path)
    small, large = spill.empty((10,)), spill.empty((300, 10), np.float64)
    large[:] = np.arange(3000).reshape(300, 10)
    spill.forget()
    np.testing.assert_array_equal(large, np.arange(3000).reshape(300, 10))
    assert large.base is not None and small.base is None
    assert not list(tmp_path.iterdir())
    with pytest.raises(FewbitsError, match="no room for"):
        spill.empty((1 << 50,))


def test_a_factor_is_the_same_in_panels_and_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = np.random.default_rng(0).normal(size=(400, 300)).astype(np.float32) * np.geomspace(4, 0.1, 300)
    hessian = (inputs.T @ inputs / 400).astype(np.float32)
    whole = factorize(hessian)
    monkeypatch.setattr(inverse_cholesky, "PANEL", 64)
    panels, spilled = factorize(hessian), factorize(hessian, spill=Spill(100))
    np.testing.assert_allclose(panels.upper, whole.upper, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(spilled.upper, panels.upper)
    assert not np.tril(panels.upper, -1).any()


@pytest.mark.parametrize(
    ("family", "target"),
    [("llama", "gptq:w4g32"), ("mixtral", "ct:w4a16g32"), ("llama", "Q4_0")],
)
def test_results_do_not_depend_on_the_bound(
    family: str, target: str, tmp_path: Path, texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits within a block, every array is in a file, one thread."""
    model = save_tiny(tmp_path / "model", family, LONG)
    options = {"calibration": texts[0], "calibration_chunks": 5, "threads": 2}
    monkeypatch.setattr(streamed, "BATCH_TOKENS", 512)
    made = [tmp_path / "usual" / "made", tmp_path / "bounded" / "made"]
    for path in made:
        path.parent.mkdir()
    api.quantize(model, target, made[0], **options)
    tight = Limits(1, Spill(100, tmp_path), parked=1)
    monkeypatch.setattr(DirectoryJob, "limits", lambda *_: tight)
    monkeypatch.setattr(GGUFJob, "_limits", lambda *_: tight)
    api.quantize(model, target, made[1], **options)
    usual, bounded = ([f.read_bytes() for f in files(path)] for path in made)
    assert usual == bounded
    assert not list(tmp_path.glob(".fewbits-*"))


@pytest.mark.parametrize("target", ["ct:w4a16g32", "awq:w4g32"])
@pytest.mark.parametrize("parked", [None, 1])
def test_experts_in_rounds_are_the_same(
    target: str, parked: int | None, tmp_path: Path, texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hessians of three experts of six at a time, of one where inputs are longer."""
    model = save_tiny(tmp_path / "model", "qwen3-moe", LONG | {"num_experts": 6, "moe_intermediate_size": 96})
    options = {"calibration": texts[0], "calibration_chunks": 5, "threads": 2}
    monkeypatch.setattr(streamed, "BATCH_TOKENS", 512)
    api.quantize(model, target, tmp_path / "usual", **options)
    rounds: dict[tuple[str, ...], list[range]] = {}
    go_on = BlockRecorder.go_on

    def count(recorder: BlockRecorder, names: tuple[str, ...]) -> None:
        inputs = recorder.recorded(names)
        rounds.setdefault(names, []).append(inputs.at_once)
        summed = [expert for expert, hessian in enumerate(inputs.hessians) if hessian is not None]
        assert set(summed) <= set(inputs.at_once)
        go_on(recorder, names)

    monkeypatch.setattr(BlockRecorder, "go_on", count)
    tight = Limits(2, parked=parked, hessians=3 * 4 * 64 * 64 + 100)
    monkeypatch.setattr(DirectoryJob, "limits", lambda *_: tight)
    api.quantize(model, target, tmp_path / "bounded", **options)
    assert [f.read_bytes() for f in files(tmp_path / "usual")] == [f.read_bytes() for f in files(tmp_path / "bounded")]
    told = {name.split(".")[-2]: at for names, at in rounds.items() for name in names if "experts" in name}
    assert told["gate_proj"] == told["up_proj"] == [range(0, 3), range(3, 6)]
    assert told["down_proj"] == [range(at, at + 1) for at in range(6)]


def test_what_experts_need_is_what_a_round_takes() -> None:
    # as in Qwen3-235B-A22B: 128 experts, all of whose Hessians take 8.6 GB
    block = Block("model.layers.0", 2_500_000_000, 805_306_368, {4096: 128, 1536: 128}, "gate", (151936, 4096), 0)
    run = TextRun(block, 128, 512, {"factor"}, of_weight=11, waits=True)
    every, usual = (largest(run.needs(Limits(hessians=most))).total for most in (1 << 50, HESSIANS))
    assert every - usual == 4 * 4096**2 * (128 - 64)
    one = run.limits(usual - 4 * 4096**2 * 60, None, 1)
    assert one.parked is None and one.hessians < HESSIANS


def test_gptq_of_a_70b_fits_into_four_blocks_and_two_gigabytes(
    tmp_path: Path, texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks as they are stored, bfloat16; linears lie in files then."""
    # the suite's own process has more in memory than one that begins
    monkeypatch.setattr(memory_need, "resident", lambda: 400 << 20)
    sparse = runpy.run_path(str(ROOT / "benchmarks" / "large_shapes.py"))
    shape = argparse.Namespace(hidden=8192, ff=28672, vocabulary=128_256, layers=1, heads=64, kv_heads=8)
    model = open_model(sparse["make_sparse"](tmp_path / "model", shape))
    long = tmp_path / "long.txt"
    long.write_text(3 * texts[0].read_text(encoding="utf-8"), encoding="utf-8")
    run = text_run(api.plan(model.path, "gptq:w4g128", calibration=long), model, 60, 512, tunes=False)
    limits = run.limits(4 * 2 * run.block.weights + 2_000_000_000, tmp_path, 2)
    assert limits.spill.scarce
    linears = [m.weight.numel() for m in streamed.StreamedModel(model).layers[0].modules() if isinstance(m, nn.Linear)]
    assert run.block.filed == sum(size for size in linears if 4 * size > SPILLED) > 0.9 * run.block.weights


@pytest.mark.parametrize("above", [100, 1 << 30])
def test_where_memory_is_scarce_linears_lie_in_files(above: int, tmp_path: Path) -> None:
    model = open_model(save_tiny(tmp_path / "model", "llama", LONG))
    spill = Spill(above, tmp_path)
    block = streamed.StreamedModel(model, spill=spill).block(0)
    assert len(spill._mapped) == (0 if above > 100 else len(list(block.parameters())))


def files(made: Path) -> list[Path]:
    return sorted(made.glob("*.safetensors")) if made.is_dir() else [made]


def test_statistics_do_not_depend_on_the_bound(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    usual = calibrate(model, texts[0], chunks=4, context=64, sensitivity=True).statistics
    bounded = calibrate(model, texts[0], chunks=4, context=64, sensitivity=True, max_memory=4 << 30).statistics
    for name, tensor in usual.tensors.items():
        np.testing.assert_array_equal(bounded.tensors[name].sums, tensor.sums)


CHILD = """
import json, resource, sys
from pathlib import Path
from fewbits import api
from fewbits.errors import FewbitsError
from fewbits.quantize import directory_job, gguf_job
from fewbits.quantize.execute import peak_memory

model, target, output, text = sys.argv[1:]

def guarded(function):
    def call(*given):
        found = function(*given)
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
        return found
    return call

gguf_job.gguf_limits = guarded(gguf_job.gguf_limits)
directory_job.directory_limits = guarded(directory_job.directory_limits)
if text:
    from fewbits.calibration.memory_need import TextRun
    TextRun.limits = guarded(TextRun.limits)

def job():
    if target == "calibrate":
        from fewbits.calibration.run import calibrate
        return calibrate(model, text, output, context=64, chunks=16, hessians=output + ".hessians", max_memory=most)
    options = {"calibration": text, "calibration_chunks": 3} if text else {}
    return api.quantize(model, target, output, threads=2, max_memory=most, **options)

most, refused = 128 << 20, ""
while True:  # refusals cost nothing, so the first bound that is accepted is nearly the least
    try:
        job()
        break
    except FewbitsError as error:
        refused = str(error)
        if "--max-memory" not in refused or Path(output).exists():
            raise
        most = round(most * 1.1)
print(json.dumps({"most": most, "peak": peak_memory(), "refused": refused}))
"""
SHAPES = {
    "Q4_0": {"hidden": 4096, "ff": 14336, "vocabulary": 48_000, "layers": 2},
    "bnb:nf4": {"hidden": 2048, "ff": 8192, "vocabulary": 2048, "layers": 6},
    "gptq:w4g128": {"hidden": 512, "ff": 1536, "vocabulary": 200_000, "layers": 2},
    "calibrate": {"hidden": 512, "ff": 1536, "vocabulary": 200_000, "layers": 2},
}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone bounds a process's own memory")
@pytest.mark.parametrize("target", SHAPES)
def test_under_the_systems_limit(target: str, tmp_path: Path, texts: tuple[Path, Path]) -> None:
    """The least bound that is accepted is one that the system may enforce, and not far above what is used."""
    sparse = runpy.run_path(str(ROOT / "benchmarks" / "large_shapes.py"))
    shape = argparse.Namespace(**SHAPES[target], heads=8, kv_heads=4)
    model = sparse["make_sparse"](tmp_path / "model", shape)
    text = str(texts[0]) if target in ("gptq:w4g128", "calibrate") else ""
    command = [sys.executable, "-c", CHILD, str(model), target, str(tmp_path / "made"), text]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout)
    assert told["peak"] <= told["most"] <= 3 * told["peak"], told
    assert " needs " in told["refused"]
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert target != "Q4_0" or size > 3 * told["most"], told
