"""The same tasks on Ray: the same bytes, whichever worker dies."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import psutil
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import fewbits
from fewbits.calibration import groups
from fewbits.calibration.run import calibrate
from fewbits.checkpoint import open_checkpoint
from fewbits.cluster import RayWorkers, workers_at
from fewbits.demo import MODEL
from fewbits.errors import FewbitsError
from fewbits.formats.gguf.source import gguf_source
from fewbits.quantize import PlanRequest
from fewbits.quantize.execute import SlabEncoder
from fewbits.quantize.learned import Learned
from fewbits.quantize.planning import make_plan
from tiny_models import save_tiny

WORDS = "the cat sat on a mat and then it ran in the hat and the rat ate the bat " * 200


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayWorkers]:
    """Two processes, for all tests of this file: `--cluster local` finds them running."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWBITS_CACHE", str(tmp_path_factory.mktemp("cache")))
        with workers_at("local", 2) as workers:
            assert isinstance(workers, RayWorkers)
            yield workers


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(WORDS)
    return file


@pytest.fixture(scope="module")
def statistics(text: Path) -> Path:
    file = text.with_name("statistics.gguf")
    calibrate(MODEL, text, file, context=64, chunks=4, threads=1)
    return file


def processes() -> list[psutil.Process]:
    """Ray's workers under this process, without which Ray goes on; its agents are called alike."""
    names = {child: " ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)}
    return [child for child, name in names.items() if name.startswith("ray::") and "Agent" not in name]


def test_a_gguf_is_the_same_though_workers_are_killed(
    ray: RayWorkers, statistics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "threads.gguf", tmp_path / "ray.gguf"
    options = {"calibration": statistics, "threads": 2}
    fewbits.quantize(MODEL, "IQ2_XS", one, **options)
    monkeypatch.setattr(import_module("fewbits.quantize.execute"), "SLAB_WEIGHTS", 1 << 15)
    killed: list[int] = []

    def kill(done: int, total: int, what: str) -> None:
        if done > total / 3 and not killed:
            for worker in processes():
                worker.send_signal(signal.SIGKILL)
                killed.append(worker.pid)

    fewbits.quantize(MODEL, "IQ2_XS", other, **options, cluster="local", progress=kill)
    assert killed
    assert other.read_bytes() == one.read_bytes()


@pytest.mark.parametrize("target", ["gptq:w4g32", "ct:nvfp4"])
def test_a_directory_is_the_same(ray: RayWorkers, target: str, tmp_path: Path) -> None:
    for name, cluster in (("threads", None), ("ray", "local")):
        fewbits.quantize(MODEL, target, tmp_path / name, method="search", cluster=cluster, threads=2)
    assert contents(tmp_path / "ray") == contents(tmp_path / "threads")


def test_a_calibrated_directory_is_the_same(
    ray: RayWorkers, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "model", "mixtral")
    sent: list[str] = []
    once = RayWorkers.result
    monkeypatch.setattr(RayWorkers, "result", lambda self, task, what: sent.append(what) or once(self, task, what))
    for name, cluster in (("threads", None), ("ray", "local")):
        out = tmp_path / name
        fewbits.quantize(
            model, "gptq:w4g32", out, calibration=text, calibration_chunks=4, cluster=cluster, threads=1
        )  # fmt: skip
    assert contents(tmp_path / "ray") == contents(tmp_path / "threads")
    assert sum("experts" in what for what in sent) == 2 * 4 * 3


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but the card, which names the folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "README.md"}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_calibration_is_the_same(
    ray: RayWorkers, name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewbits.forward.streamed.BATCH_TOKENS", 128)
    monkeypatch.setattr(groups, "GROUP", {True: 3})
    model = save_tiny(tmp_path / "model", name)
    for workers in (None, ray):
        out = tmp_path / ("ray" if workers else "threads")
        out.mkdir()
        options = {"context": 64, "chunks": 15, "hessians": out / "hessians", "output_tensor": True}
        calibrate(model, text, out / "statistics.gguf", **options, threads=1, workers=workers)
    files = [file for file in sorted((tmp_path / "threads").rglob("*")) if file.is_file()]
    assert len(files) == 3
    for file in files:
        # what a Hessian's file tells of its run names the folder
        skip = file.read_bytes().index(b"}}") if file.suffix == ".safetensors" else 0
        other = tmp_path / "ray" / file.relative_to(tmp_path / "threads")
        assert other.read_bytes()[skip:] == file.read_bytes()[skip:]


def test_a_task_is_tried_again_and_given_up_in_the_end(ray: RayWorkers, tmp_path: Path) -> None:
    def dies(mark: Path, times: int) -> str:
        tried = len(list(tmp_path.iterdir()))
        if tried < times:
            (tmp_path / str(tried)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return f"{mark.name} after {tried}"

    workers = RayWorkers(ray.ray, tries=1)
    job = workers.job(dies)
    assert job.submit("blk.0.ffn_up.weight", tmp_path, 1).result() == f"{tmp_path.name} after 1"
    with pytest.raises(FewbitsError, match=r"blk.0.ffn_up.weight: its worker died 2 times"):
        job.submit("blk.0.ffn_up.weight", tmp_path, 9).result()


def test_what_a_worker_does_not_see_is_named(ray: RayWorkers, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    source = gguf_source(open_checkpoint(model))
    tensor = make_plan(source, PlanRequest("Q8_0", output=tmp_path / "out.gguf")).tensors[0]
    encoding = ray.job(SlabEncoder(source.path, source.read, Learned()))
    model.rename(tmp_path / "elsewhere")
    with pytest.raises(FewbitsError, match=rf"model: the worker on {socket.gethostname()} sees no such path"):
        encoding.submit(tensor.name, tensor, 0, 8, 0).result()
    save_tiny(model, "llama-bias")
    with pytest.raises(FewbitsError, match="sees another model there"):
        ray.job(SlabEncoder(source.path, source.read, Learned())).submit(tensor.name, tensor, 0, 8, 0).result()


def test_other_versions_are_refused(ray: RayWorkers) -> None:
    workers = RayWorkers(ray.ray)
    workers.versions["numpy"] = "0.1"
    with pytest.raises(FewbitsError, match=rf"The worker on {socket.gethostname()} has numpy .* \(here 0.1\)"):
        workers.job(len).submit("x", "abc").result()


def test_without_ray_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FewbitsError, match=r"needs Ray.*pip install 'fewbits\[cluster\]'"):
        fewbits.quantize(MODEL, "Q8_0", tmp_path / "out.gguf", cluster="auto")


def test_models_and_outputs_by_url(ray: RayWorkers, tmp_path: Path) -> None:
    """The worker opens the URL; the output is uploaded whole, and nothing of it stays here."""
    model = save_tiny(tmp_path / "tiny", "llama")
    url = f"file://{model}"
    fewbits.quantize(model, "Q8_0", tmp_path / "one.gguf")
    fewbits.quantize(url, "Q8_0", "memory://store/two.gguf", cluster="local")
    store = MemoryFileSystem()
    assert store.cat("/store/two.gguf") == (tmp_path / "one.gguf").read_bytes()
    with pytest.raises(FewbitsError, match=r"memory://store/two.gguf: the output exists"):
        fewbits.quantize(url, "Q4_0", "memory://store/two.gguf")
    fewbits.quantize(url, "gptq:w4g32", "memory://store/folder", method="search")
    fewbits.quantize(model, "gptq:w4g32", tmp_path / "folder", method="search")
    there = {Path(file).name: store.cat(file) for file in store.find("/store/folder")}
    here = contents(tmp_path / "folder")
    assert set(there) == {*here, "README.md"}
    assert all(there[name] == data for name, data in here.items() if name != "fewbits.json")
    assert not list(Path(os.environ["FEWBITS_CACHE"]).rglob("*.gguf"))


def test_a_model_that_changed_at_its_url_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "cache"))
    model = save_tiny(tmp_path / "tiny", "llama")
    first = fewbits.open(f"file://{model}")
    assert first.path.name == "tiny" and first.path != model
    shutil.rmtree(model)
    save_tiny(model, "llama-bias")
    assert set(fewbits.open(f"file://{model}").names) > set(first.names)
    with pytest.raises(FewbitsError, match="no model there"):
        fewbits.open(f"file://{tmp_path}")
    with pytest.raises(FewbitsError, match="none: there is no such file or directory"):
        fewbits.open(f"file://{tmp_path}/none")
    with pytest.raises(FewbitsError, match="nosuchstore://x: Protocol not known"):
        fewbits.open("nosuchstore://x")
