"""The command line as a user meets it: data on stdout, one line and exit code 2 for bad input, nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fewbits.demo import MODEL


def fewbits(*args: object, cwd: Path | None = None, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "fewbits", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, check=False, preexec_fn=restrict, env={**os.environ}
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "demo-model"))


def test_quantize_makes_what_plan_predicted(tmp_path: Path, model: Path) -> None:
    planned = fewbits("plan", model, "Q4_K_M", "--json")
    made = fewbits("quantize", model, "Q4_K_M", "-o", tmp_path / "x.gguf", "--json")
    assert (planned.returncode, made.returncode) == (0, 0), planned.stderr + made.stderr
    plan, report = json.loads(planned.stdout), json.loads(made.stdout)
    assert plan["files"][0]["size"] == report["size"] == (tmp_path / "x.gguf").stat().st_size
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["x.gguf"]


def test_threads_do_not_change_the_bytes(tmp_path: Path, model: Path) -> None:
    for threads in (1, 2):
        assert (
            fewbits("quantize", model, "Q3_K_M", "-o", tmp_path / f"{threads}.gguf", "--threads", threads).returncode
            == 0
        )
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


def test_dry_run_and_edited_plan(tmp_path: Path, model: Path) -> None:
    dry = fewbits("quantize", model, "Q4_K_M", "-o", tmp_path / "x.gguf", "--dry-run", "--json")
    assert dry.returncode == 0
    assert not (tmp_path / "x.gguf").exists()
    saved = tmp_path / "plan.json"
    assert fewbits("plan", model, "Q4_K_M", "-o", saved).returncode == 0
    plan = json.loads(saved.read_text())
    victim = next(t for t in plan["tensors"] if t["codec"] == "Q4_K")
    victim["codec"] = "Q8_0"
    saved.write_text(json.dumps(plan))
    made = fewbits("quantize", model, "Q4_K_M", "--plan", saved, "-o", tmp_path / "x.gguf", "--json")
    assert made.returncode == 0, made.stderr
    types = {
        t["name"]: t["dtype"] for t in json.loads(fewbits("inspect", tmp_path / "x.gguf", "--json").stdout)["tensors"]
    }
    assert types[victim["name"]] == "Q8_0"
    victim["codec"] = "Q9_Z"
    saved.write_text(json.dumps(plan))
    refused(
        fewbits("quantize", model, "Q4_K_M", "--plan", saved, "-o", tmp_path / "y.gguf"), "Q9_Z", tmp_path / "y.gguf"
    )


@pytest.mark.parametrize("verb", [["list"], ["inspect", str(MODEL)], ["plan", str(MODEL), "Q8_0"], ["doctor"]])
def test_json_is_json_and_tables_are_tables(verb: list[str]) -> None:
    data = fewbits(*verb, "--json")
    assert data.returncode == 0, data.stderr
    assert isinstance(json.loads(data.stdout), dict)
    shown = fewbits(*verb)
    assert shown.returncode == 0
    assert shown.stdout.strip()
    assert "\x1b" not in shown.stdout + shown.stderr


def refused(done: subprocess.CompletedProcess[str], message: str, output: Path) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr, done.stderr
    assert not output.exists()
    assert not list(output.parent.glob(".*partial*"))


def truncate(model: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)


def lie(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])


def poison(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = float("nan")
    save_file(tensors, model / "model.safetensors")


def reshape(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, model / "model.safetensors")


def rename_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = ["FooBarForCausalLM"]
    (model / "config.json").write_text(json.dumps(config))


def drop_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def drop_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "should end at byte"),
        (lie, "header claims 1152921504606846976 bytes"),
        (poison, "'blk.1.ffn_up.weight' holds NaN or infinite weights"),
        (reshape, "up_proj"),
        (rename_architecture, "FooBarForCausalLM"),
        (drop_tokenizer, "tokenizer"),
        (drop_tensor, "up_proj"),
    ],
)
def test_damaged_models_are_refused(tmp_path: Path, model: Path, damage, message: str) -> None:
    damage(model)
    refused(fewbits("quantize", model, "Q4_K_M", "-o", tmp_path / "x.gguf"), message, tmp_path / "x.gguf")


def test_unknown_target_and_missing_model(tmp_path: Path, model: Path) -> None:
    output = tmp_path / "x.gguf"
    refused(fewbits("quantize", model, "Q4_K_XXL", "-o", output), "Q4_K_M", output)
    refused(fewbits("quantize", tmp_path / "nowhere", "Q4_K_M", "-o", output), "nowhere", output)
    refused(fewbits("quantize", model, "Q4_K_M", "-o", tmp_path / "no" / "x.gguf"), "does not exist", output)


def test_a_full_disk_leaves_nothing(tmp_path: Path, model: Path) -> None:
    """The file size limit makes the kernel refuse the write as a full disk would."""
    output = tmp_path / "x.gguf"
    refused(fewbits("quantize", model, "Q8_0", "-o", output, limit=1_000_000), "no room left", output)


def test_an_output_that_exists_is_kept(tmp_path: Path, model: Path) -> None:
    output = tmp_path / "x.gguf"
    output.write_text("precious")
    done = fewbits("quantize", model, "Q8_0", "-o", output)
    assert done.returncode == 2
    assert "exists" in done.stderr
    assert output.read_text() == "precious"
    assert fewbits("quantize", model, "Q8_0", "-o", output, "--overwrite").returncode == 0
    assert output.read_bytes()[:4] == b"GGUF"


def test_after_a_kill_the_same_command_goes_on(tmp_path: Path) -> None:
    """SIGTERM while the file is being written: what is done of it stays, under another name."""
    output = tmp_path / "x.gguf"
    code = (
        "import os, signal, sys; from fewbits.cli import main; from fewbits.formats.tensor_files import TensorFiles\n"
        "plain = TensorFiles.put\n"
        "def put(self, name, pieces):\n"
        "    plain(self, name, pieces); os.kill(os.getpid(), signal.SIGTERM)\n"
        "TensorFiles.put = put\n"
        f"sys.argv = ['fewbits', 'quantize', {str(MODEL)!r}, 'Q8_0', '-o', {str(output)!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 143, done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "x.gguf.partial"]
    assert fewbits("quantize", MODEL, "Q8_0", "-o", output).returncode == 0
    assert list(tmp_path.iterdir()) == [output]
