"""Verifying: whole files pass, every kind of damage is found and named, and nothing depends on threads or slabs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fewbits
from fewbits.calibration.imatrix_files import write_statistics
from fewbits.calibration.statistics import Statistics, TensorStatistics
from fewbits.checkpoint import GGUFCheckpoint
from fewbits.checkpoint.safetensors import read_header
from fewbits.cli.verify import command
from fewbits.demo import MODEL
from fewbits.errors import FewbitsError
from fewbits.verify import VerifyReport, tensors, verify
from tiny_models import save_tiny

Q = "model.layers.0.self_attn.q_proj.weight"
GGUF_DOWN = "blk.0.ffn_down.weight"
DIRECTORIES = ("bnb:nf4", "hqq:w3g64", "fp8:block128", "ct:nvfp4", "bitnet:autobitlinear")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in Q4_K_M."""
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    fewbits.quantize(MODEL, "Q4_K_M", path)
    return path


@pytest.fixture
def copy(tmp_path: Path, quantized: Path) -> Path:
    return Path(shutil.copy(quantized, tmp_path / "demo.gguf"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "demo"))


def faults(report: VerifyReport) -> list[str]:
    return [f"{fault.where}: {fault.problem}" for fault in report.faults]


def patched(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def changed(directory: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change the tensors of a directory."""
    found = load_file(directory / "model.safetensors")
    change(found)
    save_file({name: np.ascontiguousarray(value) for name, value in found.items()}, directory / "model.safetensors")


def test_whole_files_have_no_faults(quantized: Path) -> None:
    report = verify(quantized, MODEL, threads=2)
    assert faults(report) == []
    checkpoint = GGUFCheckpoint(quantized)
    assert report.decoded == len(checkpoint.tensors) == len(report.errors)
    assert report.n_weights == sum(int(np.prod(info.shape)) for info in checkpoint.tensors.values())
    assert all(0 <= found.error < found.limit / 1.5 for found in report.errors)
    shares = [found.error / found.limit for found in report.errors]
    assert shares == sorted(shares, reverse=True)
    assert report.files[0].size == quantized.stat().st_size and len(report.files[0].sha256 or "") == 64


def test_the_source_itself_has_no_error() -> None:
    report = verify(MODEL, MODEL)
    assert report.fine and {found.error for found in report.errors} == {0.0}
    assert min(found.cosine for found in report.errors) > 0.999


@pytest.mark.parametrize("target", DIRECTORIES)
def test_directories(tmp_path: Path, target: str) -> None:
    fewbits.quantize(MODEL, target, tmp_path / "out")
    report = verify(tmp_path / "out", MODEL, quick=True)
    assert faults(report) == []
    assert max(found.error for found in report.errors) > 0.01


def test_split_sets(tmp_path: Path) -> None:
    fewbits.quantize(MODEL, "Q8_0", tmp_path / "x.gguf", split_max_size=2_000_000)
    first = sorted(tmp_path.glob("*.gguf"))[0]
    report = verify(first, quick=True)
    assert report.fine and len(report.files) == len(list(tmp_path.glob("*.gguf"))) > 1


def test_errors_are_those_of_the_definition(quantized: Path) -> None:
    """And the slabs' height changes nothing but the order of sums."""
    errors = {found.name: found for found in verify(quantized, MODEL, quick=True).errors}
    decoded = GGUFCheckpoint(quantized).read(GGUF_DOWN).astype(np.float64)
    original = fewbits.open(MODEL).read("model.layers.0.mlp.down_proj.weight").astype(np.float64)
    wanted = np.sqrt(((decoded - original) ** 2).mean() / (original**2).mean())
    assert errors[GGUF_DOWN].error == pytest.approx(wanted, rel=1e-5)
    cosine = (decoded * original).sum() / np.sqrt((decoded**2).sum() * (original**2).sum())
    assert errors[GGUF_DOWN].cosine == pytest.approx(cosine, rel=1e-5)


def test_nothing_depends_on_threads_or_slabs(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = verify(quantized, MODEL, quick=True, threads=1)
    three = verify(quantized, MODEL, quick=True, threads=3)
    assert one.errors == three.errors
    monkeypatch.setattr(tensors, "SLAB", 5000)
    for slabs, whole in zip(
        sorted(verify(quantized, MODEL, quick=True).errors, key=lambda e: e.name),
        sorted(one.errors, key=lambda e: e.name),
        strict=True,
    ):
        assert slabs.error == pytest.approx(whole.error, rel=1e-6)


def test_progress_reaches_the_end(quantized: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify(quantized, quick=True, progress=lambda done, total, what: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_scales_that_are_not_finite(copy: Path) -> None:
    info = GGUFCheckpoint(copy).tensors[GGUF_DOWN]
    patched(copy, info.offset + info.nbytes // info.shape[0] * 3, b"\xff\x7e\xff\x7e")
    assert any(line.startswith(f"{GGUF_DOWN}: ") and "not finite" in line for line in faults(verify(copy, quick=True)))
    assert any("row 3" in line for line in faults(verify(copy, MODEL, quick=True)))


def test_a_scale_of_a_directory_that_is_not_finite(tmp_path: Path) -> None:
    fewbits.quantize(MODEL, "hqq:w3g64", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    info = next(info for info in read_header(file) if info.name == Q.replace(".weight", ".scale"))
    patched(file, info.offset, b"\xff" * 4)
    (line,) = faults(verify(tmp_path / "out", quick=True))
    assert "not finite" in line and "layers.0.self_attn.q_proj" in line


@pytest.mark.parametrize("damage", ["swapped", "shuffled", "transposed", "zeroed", "negated", "doubled"])
def test_tensors_that_are_not_the_references(directory: Path, damage: str) -> None:
    other = Q.replace("layers.0", "layers.1")

    def spoil(found: dict[str, np.ndarray]) -> None:
        value = found[Q]
        found[Q] = {
            "swapped": lambda: found[other],
            "shuffled": lambda: value[np.random.default_rng(0).permutation(len(value))],
            "transposed": lambda: value.reshape(value.shape[::-1]).T if value.shape[0] != value.shape[1] else value.T,
            "zeroed": lambda: np.zeros_like(value),
            "negated": lambda: _negative(value),
            "doubled": lambda: _twice(value),
        }[damage]()

    _as_half(directory)
    changed(directory, spoil)
    quantized = directory.parent / "q.gguf"
    fewbits.quantize(directory, "Q4_0", quantized)
    found = verify(quantized, MODEL, quick=True)
    assert [fault.where for fault in found.faults] == ["blk.0.attn_q.weight"]
    assert found.errors[0].name == "blk.0.attn_q.weight"


def _negative(value: np.ndarray) -> np.ndarray:
    return -value


def _twice(value: np.ndarray) -> np.ndarray:
    return 2 * value


def _as_half(directory: Path) -> None:
    """numpy has no bfloat16: the same model in half precision."""
    model = fewbits.open(directory)
    values = {name: model.read(name).astype(np.float16) for name in model.names}
    save_file(values, directory / "model.safetensors")


def test_scales_moved_between_layers(directory: Path) -> None:
    _as_half(directory)

    def move(found: dict[str, np.ndarray]) -> None:
        norm = "model.layers.0.input_layernorm.weight"
        scales = np.exp(np.random.default_rng(0).normal(size=found[norm].shape) / 2).astype(np.float32)
        found[norm] = (found[norm] / scales).astype(np.float16)
        for part in "qkv":
            name = Q.replace("q_proj", f"{part}_proj")
            found[name] = (found[name] * scales).astype(np.float16)

    changed(directory, move)
    report = verify(directory, MODEL, quick=True)
    assert faults(report) == [] and any("moved" in note for note in report.notes)
    assert max(found.error for found in report.errors) < 0.01


def test_empty_matrices_are_noted(directory: Path) -> None:
    _as_half(directory)
    changed(directory, lambda found: found.update({Q: np.zeros_like(found[Q])}))
    report = verify(directory, quick=True)
    assert report.fine and any(Q in note for note in report.notes)


def test_hashes(copy: Path) -> None:
    report = verify(copy, write_sums=True)
    assert report.fine and report.files[0].recorded is None
    sums = copy.with_name("demo.gguf.sha256")
    done = subprocess.run(["sha256sum", "-c", sums.name], cwd=copy.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert verify(copy).files[0].recorded == sums.name
    info = GGUFCheckpoint(copy).tensors[GGUF_DOWN]
    patched(copy, info.offset + 20, b"\x55")  # codes: nothing but the hash can tell
    (line,) = faults(verify(copy))
    assert "SHA-256" in line
    assert verify(copy, quick=True).fine


def test_hashes_of_directories_and_missing_files(directory: Path) -> None:
    assert verify(directory, write_sums=True).fine
    (directory / "generation_config.json").unlink()
    assert any("generation_config.json: missing" in line for line in faults(verify(directory)))


def test_tokenizers(directory: Path, tmp_path: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    extra = {**tokenizer["added_tokens"][0], "id": config["vocab_size"] + 5, "content": "<|more|>"}
    last = {**tokenizer["added_tokens"][0], "content": "<|most|>"}
    more = [*tokenizer["added_tokens"], *({**last, "id": i, "content": f"<{i}>"} for i in range(extra["id"]))]
    (directory / "tokenizer.json").write_text(json.dumps({**tokenizer, "added_tokens": [*more, extra]}))
    assert any("tokens, the embeddings have" in line for line in faults(verify(directory)))
    (directory / "tokenizer.json").unlink()
    assert any(line.startswith("tokenizer: there is none") for line in faults(verify(directory, quick=True)))


def test_configurations(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": config["hidden_size"] + 64}))
    (line,) = faults(verify(directory, quick=True))
    assert line.startswith("configuration: ") and "ffn_" in line
    (directory / "config.json").write_text(json.dumps({**config, "architectures": ["SomethingElse"]}))
    report = verify(directory, quick=True)
    assert report.fine and any("SomethingElse" in note for note in report.notes)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "phi3-long", "mixtral", "qwen2", "bitnet"])
def test_families(tmp_path: Path, name: str) -> None:
    """Rows in another order, matrices turned round, experts, tensors from the configuration."""
    source = save_tiny(tmp_path / "m", name)
    fewbits.quantize(source, "Q8_0", tmp_path / "x.gguf")
    report = verify(tmp_path / "x.gguf", source, quick=True)
    assert faults(report) == []
    assert faults(verify(source, tmp_path / "x.gguf", quick=True)) == []


def test_another_model_is_no_reference(tmp_path: Path, quantized: Path) -> None:
    with pytest.raises(FewbitsError, match="made from"):
        verify(quantized, save_tiny(tmp_path / "m", "llama"), quick=True)


def test_graphs(directory: Path) -> None:
    onnx = pytest.importorskip("onnx")
    size = (directory / "model.safetensors").stat().st_size

    def graph(location: str, offset: int, length: int) -> None:
        tensor = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        made = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor]))
        (directory / "model.onnx").write_bytes(made.SerializeToString())

    for location, offset, length, problem in (
        ("model.safetensors", 8, size - 8, None),
        ("model.safetensors", 8, size, "beyond the end"),
        ("../x", 0, 4, "not beside it"),
    ):
        graph(location, offset, length)
        assert [problem in line for line in faults(verify(directory, quick=True))] == ([True] if problem else [])
    (directory / "model.onnx").write_bytes(b"\xff" * 40)
    assert any("not an ONNX graph" in line for line in faults(verify(directory, quick=True)))


def test_importance_matrices(tmp_path: Path) -> None:
    counts = np.array([512, 0], np.float32)
    found = Statistics({"blk.0.ffn_up_exps.weight": TensorStatistics(np.ones((2, 8), np.float32), counts)}, [], 1, 512)
    write_statistics(found, tmp_path / "x.gguf")
    report = verify(tmp_path / "x.gguf")
    assert report.format == "imatrix" and report.fine and "experts [1]" in report.notes[0]
    write_statistics(found, tmp_path / "x.dat", "dat")
    assert verify(tmp_path / "x.dat").decoded == 1


def test_exit_codes(copy: Path) -> None:
    def run(*args: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "fewbits", "verify", *map(str, args)]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    assert command.__doc__ and "Exits with 0" in command.__doc__
    fine = run(copy, "--quick", "--json")
    assert fine.returncode == 0 and VerifyReport.model_validate_json(fine.stdout).fine
    assert "no faults" in fine.stderr
    info = GGUFCheckpoint(copy).tensors[GGUF_DOWN]
    patched(copy, info.offset, b"\xff\x7e\xff\x7e")
    bad = run(copy, "--quick")
    assert bad.returncode == 1 and bad.stdout.startswith(f"FAULT {GGUF_DOWN}: ")
    with open(copy, "r+b") as file:
        file.truncate(info.offset)
    lost = run(copy, "--quick")
    assert lost.returncode == 2 and lost.stdout == "" and "truncated" in lost.stderr


@pytest.mark.parametrize("split", [None, 1_000_000])
def test_what_quantize_makes_is_verified(copy: Path, tmp_path: Path, split: int | None) -> None:
    """Blocks that are copied are not looked at on the way."""
    patched(copy, GGUFCheckpoint(copy).tensors[GGUF_DOWN].offset, b"\xff\x7e\xff\x7e")
    with pytest.raises(FewbitsError, match=f"{GGUF_DOWN}.*not finite.*faulty"):
        fewbits.quantize(copy, "COPY", tmp_path / "again.gguf", split_max_size=split)
    made = [path.name for path in tmp_path.iterdir() if path != copy]
    assert made and all(name.endswith(".gguf.faulty") for name in made)
    report = fewbits.quantize(copy, "COPY", tmp_path / "again.gguf", split_max_size=split, verify=False)
    assert all((tmp_path / file.name).exists() for file in report.files)
