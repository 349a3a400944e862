"""Runs that are killed, run out of disk or find their work folder damaged end as if nothing had happened.

The full form, over all targets, is benchmarks/chaos.py.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fewbits
from fewbits import api
from fewbits.calibration.run import calibrate
from fewbits.errors import FewbitsError
from fewbits.formats import journal
from fewbits.formats.facts import changes
from fewbits.formats.journal import Journal, parsed
from fewbits.formats.tensor_files import TensorFiles
from fewbits.formats.work import CHECKSUM, WorkFolder
from fewbits.quantize.budget import Budget
from tiny_models import save_tiny

SHAPES = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 256}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["fewbits.api", "fewbits.calibration.run", "fewbits.quantize.blockwise"])


# --- the journal ---

ENTRIES = st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=8), max_size=3), max_size=6)


@given(entries=ENTRIES, data=st.data())
@settings(max_examples=60, deadline=None)
def test_of_a_damaged_journal_the_beginning_counts(
    tmp_path_factory: pytest.TempPathFactory, entries: list[dict[str, Any]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal"
    made = Journal(path)
    made.append(*entries)
    content = bytearray(path.read_bytes())
    ends = [0, *(at + 1 for at, byte in enumerate(content) if byte == ord("\n"))]
    place = data.draw(st.integers(0, max(0, len(content) - 1)))
    match data.draw(st.sampled_from(["flip", "cut", "add"])) if content else "add":
        case "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
            whole = sum(end <= place for end in ends) - 1
        case "cut":
            del content[place:]
            whole = sum(end <= place for end in ends) - 1
        case _:
            content += data.draw(st.binary(min_size=1, max_size=30))
            whole = len(entries)
    path.write_bytes(content)
    found = Journal(path)
    assert found.entries == entries[:whole]
    found.append({"more": 1})
    assert Journal(path).entries == [*entries[:whole], {"more": 1}]


@given(st.binary(max_size=200))
def test_garbage_is_no_journal(data: bytes) -> None:
    assert parsed(data) == ([], 0)


@pytest.mark.parametrize("text", [b"5", b"[]", b"{", b"[" * 100_000])
def test_a_line_that_holds_something_else_ends_the_journal(text: bytes) -> None:
    good = b'%08x {"a": 1}\n' % zlib.crc32(b'{"a": 1}')
    assert parsed(good + b"%08x %s\n" % (zlib.crc32(text), text)) == ([{"a": 1}], len(good))


# --- facts ---


def test_what_has_changed_is_said() -> None:
    before = {"target": "Q4_K_M", "text": {"c4.txt": "digest:12", "wiki.txt": "digest:3"}, "budget": None, "threads": 2}
    now = {"target": "Q5_K_M", "text": {"c4.txt": "digest:99", "code.txt": "digest:4"}, "budget": {"bpw": 4.5}}
    assert changes(before, before) == ""
    assert changes(before, {**before, "target": "Q5_K_M"}) == "target: Q4_K_M -> Q5_K_M"
    assert changes(before, now) == (
        "target: Q4_K_M -> Q5_K_M; text c4.txt has changed; text wiki.txt is missing, and 3 more"
    )
    assert changes({}, now) == "target: nothing -> Q5_K_M; text c4.txt is new; text code.txt is new, and 1 more"


# --- runs ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama", SHAPES)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the end and the beginning of another winter, in the inn. " * 200, "utf-8")
    return path


def quantized(target: str, **options: object) -> Callable[..., object]:
    def make(model: Path, text: Path, folder: Path, progress: object = None) -> object:
        given = {name: text if value == "TEXT" else value for name, value in options.items()}
        given |= {"calibration_chunks": 4} if "calibration" in given else {}
        given["verify"] = False  # a step too many to be killed in
        return fewbits.quantize(model, target, folder / "out", threads=1, progress=progress, **given)  # type: ignore[arg-type]

    return make


def calibrated(model: Path, text: Path, folder: Path, progress: object = None) -> object:
    return calibrate(model, text, folder / "out", chunks=4, threads=1, hessians=folder / "h", progress=progress)  # type: ignore[arg-type]


JOBS: dict[str, Callable[..., object]] = {
    "gguf": quantized("Q4_0"),
    "split": quantized("Q8_0", split_max_size=100_000),
    "gguf-text": quantized("Q4_0", calibration="TEXT"),
    "gguf-budget": quantized("gguf", budget=Budget(bpw=6.0, types=("Q4_0", "Q8_0")), calibration="TEXT"),
    "directory": quantized("bnb:nf4"),
    "directory-text": quantized("gptq:w4g32", calibration="TEXT"),
    "directory-budget": quantized("gptq:g32", budget=Budget(bpw=4.8), calibration="TEXT"),
    "exl2": quantized("exl2:4.0", calibration="TEXT"),
    "calibrate": calibrated,
}


def killed_at(job: str, model: Path, text: Path, folder: Path, step: int) -> None:
    """In a process of its own: a job that dies when it tells of its progress for so many times."""
    journal.SAFE_EVERY, journal.SAFE_SHARE = 0.0, 1e9
    steps = iter(range(1, step + 1))

    def progress(*_: object) -> None:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    JOBS[job](model, text, folder, progress)


def kill(job: str, model: Path, text: Path, folder: Path, step: int) -> None:
    process = PROCESSES.Process(target=killed_at, args=(job, model, text, folder, step))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def steps_of(job: str, model: Path, text: Path, folder: Path) -> int:
    """Run it undisturbed; returns how often it tells of its progress."""
    folder.mkdir()
    seen: list[object] = []
    JOBS[job](model, text, folder, lambda *step: seen.append(step))
    return len(seen)


@pytest.mark.parametrize("job", JOBS)
def test_a_killed_run_goes_on_to_the_same_bytes(job: str, model: Path, text: Path, tmp_path: Path) -> None:
    steps = steps_of(job, model, text, tmp_path / "out")
    truth = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "whole")
    (tmp_path / "out").mkdir()
    kill(job, model, text, tmp_path / "out", max(1, steps // 3))
    kill(job, model, text, tmp_path / "out", max(1, steps // 4))
    JOBS[job](model, text, tmp_path / "out")
    assert contents(tmp_path / "out") == truth


def test_what_is_done_is_not_made_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = steps_of("gguf", model, tmp_path, tmp_path / "whole")
    kill("gguf", model, tmp_path, tmp_path, total - 2)
    made: list[str] = []
    put = TensorFiles.put
    monkeypatch.setattr(TensorFiles, "put", lambda self, name, pieces: (made.append(name), put(self, name, pieces)))
    JOBS["gguf"](model, tmp_path, tmp_path)
    assert 0 < len(made) <= 3


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("journal", lambda data: data[: len(data) * 2 // 3]),
        ("journal", lambda data: data[:-9] + b"#" + data[-8:]),
        ("journal", lambda data: b"garbage\n" + data),
        ("journal", lambda data: b""),
        ("result/out", lambda data: data[: len(data) // 2]),
        ("result/out", lambda data: data[:-2000] + bytes(2000)),
        ("result/out", lambda data: b""),
    ],
)
def test_a_damaged_work_folder_is_no_harm(
    name: str, change: Callable[[bytes], bytes], model: Path, tmp_path: Path
) -> None:
    steps = steps_of("gguf", model, tmp_path, tmp_path / "whole")
    kill("gguf", model, tmp_path, tmp_path, steps // 2)
    file = tmp_path / "out.partial" / name
    file.write_bytes(change(file.read_bytes()))
    JOBS["gguf"](model, tmp_path, tmp_path)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole" / "out").read_bytes()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("job", ["split", "directory"])
@pytest.mark.parametrize("moved", [False, True])
def test_an_interrupt_in_the_last_step(
    job: str, moved: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    steps_of(job, model, tmp_path, out)
    out.rename(tmp_path / "whole")
    out.mkdir()
    move = WorkFolder._move

    def stop(self: WorkFolder, names: dict[str, str]) -> None:
        if moved:
            move(self, names)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WorkFolder, "_move", stop)
        JOBS[job](model, tmp_path, out)
    assert (out / "out.partial").exists()
    JOBS[job](model, tmp_path, out)
    assert not (out / "out.partial").exists()
    truth, found = contents(tmp_path / "whole"), contents(out)
    assert truth == found


@pytest.mark.parametrize("target", ["Q4_0", "bnb:nf4"])
def test_an_interrupt_while_reading_back_is_made_good(
    target: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has its name already is still read back by the next run, and found faulty."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(api, "check_made", stop)
        fewbits.quantize(model, target, out, threads=1)
    file = out if out.is_file() else next(out.glob("*.safetensors"))
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size - 100)
    with pytest.raises(FewbitsError, match="faulty"):
        fewbits.quantize(model, target, out, threads=1)
    assert not out.exists()
    fewbits.quantize(model, target, out, threads=1)
    assert not (tmp_path / "out.partial").exists()


def test_another_command_is_refused_and_told_why(model: Path, text: Path, tmp_path: Path) -> None:
    kill("gguf-text", model, text, tmp_path, 4)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() + "more")
    for options, message in (
        ({"target": "Q5_0"}, r"target: Q4_0 -> Q5_0\. Repeat it as it was, or pass --overwrite"),
        ({"calibration": other}, r"calibration text text\.txt is missing; calibration text other\.txt is new"),
        ({"calibration": ()}, "calibration text text.txt is missing"),
        ({"threads": 2}, "threads: 1 -> 2"),
    ):
        given = {"target": "Q4_0", "calibration": text, "calibration_chunks": 4, "threads": 1, **options}
        if not given["calibration"]:
            del given["calibration_chunks"]
        with pytest.raises(FewbitsError, match=message):
            fewbits.quantize(model, output=tmp_path / "out", **given)  # type: ignore[arg-type]
    entries = Journal(tmp_path / "out.partial" / "journal").entries
    assert any(CHECKSUM in entry for entry in entries) or list((tmp_path / "out.partial").rglob("after-*"))
    fewbits.quantize(model, "Q5_0", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out.partial").exists()


def test_the_number_of_threads_may_change_where_it_changes_nothing(model: Path, tmp_path: Path) -> None:
    steps = steps_of("gguf", model, tmp_path, tmp_path / "whole")
    kill("gguf", model, tmp_path, tmp_path, steps // 2)
    fewbits.quantize(model, "Q4_0", tmp_path / "out", threads=2)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole" / "out").read_bytes()


@pytest.mark.parametrize("job", ["gguf", "directory", "calibrate"])
def test_a_second_process_is_told_to_wait(job: str, model: Path, text: Path, tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "out", {}):
        with pytest.raises(FewbitsError, match=r"out: another run is writing it\. Wait"):
            JOBS[job](model, text, tmp_path)
        assert (tmp_path / "out.partial" / "journal").exists()


def test_bad_input_leaves_nothing(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama", SHAPES)
    file = model / "model.safetensors"
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + size])
    start = 8 + size + header["model.layers.1.mlp.down_proj.weight"]["data_offsets"][0]
    data = bytearray(file.read_bytes())
    data[start : start + 4] = b"\xff\xff\xff\x7f"  # NaN
    file.write_bytes(data)
    for target in ("Q4_0", "bnb:nf4"):
        with pytest.raises(FewbitsError, match="NaN"):
            fewbits.quantize(model, target, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [model]


def test_a_full_disk_is_one_clear_error_and_the_next_run_goes_on(model: Path, tmp_path: Path) -> None:
    """The file size limit makes the kernel refuse the write as a full disk would."""
    steps_of("gguf", model, tmp_path, tmp_path / "whole")
    truth = (tmp_path / "whole" / "out").read_bytes()
    limit = len(truth) * 2 // 3
    done = subprocess.run(
        [sys.executable, "-m", "fewbits", "quantize", model, "Q4_0", "-o", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "no room left on the disk" in done.stderr
    assert any(CHECKSUM in entry for entry in Journal(tmp_path / "out.partial" / "journal").entries)
    JOBS["gguf"](model, tmp_path, tmp_path)
    assert (tmp_path / "out").read_bytes() == truth
