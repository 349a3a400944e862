"""Model directories: exact sizes, whole or nothing, resuming, what goes along, and the card."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

import fewbits.formats.atomic as atomic
from fewbits.checkpoint import open_model
from fewbits.errors import FewbitsError
from fewbits.formats.directory.companions import companions, config_json
from fewbits.formats.directory.shards import NUMPY_TYPES, Entry, ShardFile, lay_out
from fewbits.formats.directory.writer import DirectoryWriter, check_directory_output
from fewbits.formats.journal import Journal
from fewbits.formats.work import WorkFolder
from tiny_models import save_tiny, tiny_model, tiny_tokenizer

STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32", torch.uint8: "U8"}
OURS = {"config.json": b'{"quantization_config": {"quant_method": "gptq"}}', "README.md": b"# x\n"}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(6, 5, generator=generator).to(torch.bfloat16),
        "a.qweight": torch.arange(-6, 6, dtype=torch.int32).reshape(3, 4),
        "a.scales": torch.randn(3, 2, generator=generator).half(),
        'odd "\u00e4\n\x7f name': torch.randn(3, 3, generator=generator),
        "format": torch.tensor(7, dtype=torch.uint8),
        "nothing": torch.zeros((0, 4)),
    }


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def entries(units: bool = False) -> list[Entry]:
    return [
        Entry(name, STORED[tensor.dtype], tuple(tensor.shape), name.split(".")[0] if units and "." in name else "")
        for name, tensor in tensors().items()
    ]


@contextmanager
def writing(
    path: Path,
    shards: Sequence[ShardFile],
    files: Mapping[str, bytes] = OURS,
    overwrite: bool = False,
    run: str = "this",
) -> Iterator[DirectoryWriter]:
    """A writer in its work folder, whose directory gets its final name in the end."""
    with (
        WorkFolder(path, {"run": run}, overwrite) as work,
        DirectoryWriter(work, shards, files, overwrite) as writer,
    ):
        yield writer
        work.publish({writer.finish(): path}, {})


def write(path: Path, limit: int = 10**9, **options: object) -> list[ShardFile]:
    shards = lay_out(entries(), limit)
    with writing(path, shards, **options) as writer:  # type: ignore[arg-type]
        for name, tensor in tensors().items():
            if not writer.has(name):
                writer.put(name, numpy_of(tensor))
    return shards


# --- files ---


def test_the_bytes_are_safetensors_own(tmp_path: Path) -> None:
    write(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == save(tensors(), {"format": "pt"})
    assert {file.name for file in (tmp_path / "m").iterdir()} == {"model.safetensors", *OURS}


def test_types_are_ordered_as_safetensors_orders_them() -> None:
    known = {
        "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "U32": torch.uint32,
        "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool,
    }  # fmt: skip
    assert known.keys() == NUMPY_TYPES.keys()
    (shard,) = lay_out([Entry(f"t{i}", name, (3, 2)) for i, name in enumerate(reversed(known))])
    made = save(
        {f"t{i}": torch.zeros(3, 2).to(known[name]) for i, name in enumerate(reversed(known))}, {"format": "pt"}
    )
    assert made.startswith(shard.header)
    assert len(made) == shard.nbytes


def test_shards_are_read_by_safetensors(tmp_path: Path) -> None:
    shards = write(tmp_path / "m", limit=60)
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-00003.safetensors" for i in range(1, 4)]
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors().values())
    found = {}
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "m" / file, "pt") as shard:
            found[name] = shard.get_tensor(name)
            assert shard.metadata() == {"format": "pt"}
    assert found.keys() == tensors().keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors().items()
    )


def test_the_parts_of_a_module_share_a_shard() -> None:
    assert [len(shard.entries) for shard in lay_out(entries(units=True), 60)] == [1, 2, 3]
    alone = lay_out([*entries()[:2], Entry("large", "F32", (100,)), *entries()[3:]], 120)
    assert [[e.name for e in shard.entries] for shard in alone][1] == ["large"]


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
ENTRIES = st.lists(
    st.builds(Entry, NAMES, st.sampled_from(sorted(NUMPY_TYPES)), SHAPES, st.sampled_from(["", "u", "v"])),
    max_size=12,
    unique_by=lambda entry: entry.name,
)


@given(entries=ENTRIES, limit=st.integers(1, 3000), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_sizes_are_exact(tmp_path_factory: pytest.TempPathFactory, entries: list[Entry], limit: int, seed: int) -> None:
    path = tmp_path_factory.mktemp("sizes") / "m"
    shards = lay_out(entries, limit)
    contents = {entry.name: random.Random(seed).randbytes(entry.nbytes) for entry in entries}
    order = random.Random(seed).sample(entries, len(entries))
    with writing(path, shards, {"config.json": b"{}"}) as writer:
        for entry in order:
            writer.put(entry.name, contents[entry.name])
        predicted = writer.nbytes
    assert predicted == sum(file.stat().st_size for file in path.iterdir())
    for shard in shards:
        assert (path / shard.name).stat().st_size == shard.nbytes
        size = sum(entry.nbytes for entry in shard.entries)
        assert size <= limit or len(shard.entries) == 1 or len({entry.unit for entry in shard.entries}) <= 2
        for entry, offset in shard.offsets():
            assert offset % np.dtype(NUMPY_TYPES[entry.dtype]).itemsize == 0
            assert (path / shard.name).read_bytes()[offset : offset + entry.nbytes] == contents[entry.name]
        with safe_open(path / shard.name, "np") as opened:
            assert set(opened.keys()) == {entry.name for entry in shard.entries}
    assert sorted(e.name for shard in shards for e in shard.entries) == sorted(e.name for e in entries)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Entry("b.weight", "F32", (1,)), "'b.weight' twice"),
        (Entry("__metadata__", "F32", (1,)), "'__metadata__'"),
        (Entry("x", "F3", (1,)), "'x' cannot be written as 'F3'"),
        (Entry("x", "F32", (-1, 2)), "'x' has the impossible shape"),
    ],
)
def test_impossible_tensors_are_refused(wrong: Entry, message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        lay_out([*entries(), wrong])


def test_transformers_loads_what_we_write(tmp_path: Path) -> None:
    model = tiny_model("llama")
    state = model.state_dict()
    shards = lay_out([Entry(n, "F32", tuple(t.shape)) for n, t in state.items()], 100_000)
    assert len(shards) > 2
    source = open_model(save_tiny(tmp_path / "source", "llama"))
    files = {"config.json": config_json(source, None, "F32"), **companions(source).files}
    with writing(tmp_path / "m", shards, files) as writer, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: writer.put(item[0], item[1].numpy()), reversed(state.items())))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert loaded.dtype == torch.float32
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer("the end").input_ids == tiny_tokenizer()("the end").input_ids


# --- putting ---


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[DirectoryWriter]:
    with pytest.raises(StopIteration), writing(tmp_path / "m", lay_out(entries())) as opened:
        yield opened
        raise StopIteration


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("b.weight", b"x" * 59, "'b.weight' came out as 59 bytes, not 60"),
        ("b.weight", b"x" * 61, "'b.weight' came out as 61 bytes, not 60"),
        ("b.weight", np.zeros((5, 6), np.uint16), r"'b.weight' came out as \[5, 6\], not \[6, 5\]"),
        ("b.weight", np.zeros((6, 5), np.float16), "'b.weight' came out as float16, not BF16"),
        ("a.scales", np.zeros((3, 2), np.float32), "'a.scales' came out as float32, not F16"),
        ("c", b"", "no tensor 'c'"),
    ],
)
def test_wrong_data_is_refused(writer: DirectoryWriter, name: str, data: object, message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        writer.put(name, data)  # type: ignore[arg-type]
    if name != "c":
        assert not writer.has(name)
        writer.put(name, numpy_of(tensors()[name]))
        assert writer.has(name)


def test_a_tensor_is_put_once(writer: DirectoryWriter) -> None:
    writer.put("b.weight", bytes(60))
    with pytest.raises(FewbitsError, match=r"'b\.weight' is written twice"):
        writer.put("b.weight", bytes(60))


def test_one_of_many_threads_puts_a_tensor(writer: DirectoryWriter) -> None:
    barrier, refused = threading.Barrier(8), []

    def put(_: int) -> None:
        barrier.wait()
        try:
            writer.put("b.weight", bytes(60))
        except FewbitsError as error:
            refused.append(error)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(8)))
    assert len(refused) == 7


def test_a_failing_source_leaves_the_tensor_open(writer: DirectoryWriter) -> None:
    def pieces() -> Iterator[bytes]:
        yield bytes(20)
        raise OSError("the source cannot be read")

    with pytest.raises(OSError, match="the source cannot be read"):
        writer.put_pieces("b.weight", pieces())
    assert not writer.has("b.weight")
    writer.put_pieces("b.weight", [bytes(20), np.ones((4, 5), np.uint16)])
    assert writer.has("b.weight")


def test_strided_arrays_are_written_in_their_order(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3).T
    with writing(tmp_path / "m", lay_out([Entry("w", "F32", (3, 4))])) as opened:
        opened.put("w", values)
    np.testing.assert_array_equal(load_file(tmp_path / "m" / "model.safetensors")["w"].numpy(), values)


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(FewbitsError, match=r"5 tensors were not written, 'nothing' among them"),
        writing(tmp_path / "m", lay_out(entries())) as opened,
    ):
        opened.put("b.weight", bytes(60))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x.json", "a/b.json", "model.py", "model.safetensors", "x.bin"])
def test_foreign_files_are_not_written(writer: DirectoryWriter, name: str) -> None:
    with pytest.raises(FewbitsError, match="no file of a model directory"):
        writer.add_file(name, b"")


# --- the final name ---


def test_an_interrupt_leaves_what_is_done(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "m", lay_out(entries())) as opened:
        opened.put("b.weight", bytes(60))
        raise KeyboardInterrupt
    with pytest.raises(FewbitsError, match="nothing more"), writing(tmp_path / "m", lay_out(entries())) as opened:
        assert opened.has("b.weight")
        raise FewbitsError("nothing more")
    assert list(tmp_path.iterdir()) == [tmp_path / "m.partial"]


def test_an_interrupt_before_anything_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "m", lay_out(entries())):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_directory_format as t
with t.writing(Path({path!r}), t.lay_out(t.entries())) as writer:
    writer.put("b.weight", t.numpy_of(t.tensors()["b.weight"]))
    writer.tensors.flush()
    writer.put("a.qweight", t.numpy_of(t.tensors()["a.qweight"]))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "m"
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert not path.exists()
    with open(tmp_path / "m.partial" / "journal", "ab") as journal:
        journal.write(b'0123abcd {"tensor": "a.qw')  # killed while recording
    with writing(path, lay_out(entries())) as opened:
        assert [entry.name for entry in entries() if opened.has(entry.name)] == ["b.weight"]
        with pytest.raises(FewbitsError, match="twice"):
            opened.put("b.weight", bytes(60))
        for name, tensor in tensors().items():
            if name != "b.weight":
                opened.put(name, numpy_of(tensor))
    write(tmp_path / "straight")
    names = {file.name for file in path.iterdir()}
    assert names == {file.name for file in (tmp_path / "straight").iterdir()}
    assert all((path / name).read_bytes() == (tmp_path / "straight" / name).read_bytes() for name in names)
    assert {file.name for file in tmp_path.iterdir()} == {"m", "straight"}


def unfinished(path: Path) -> None:
    with pytest.raises(ValueError), writing(path, lay_out(entries())) as opened:
        opened.put("b.weight", numpy_of(tensors()["b.weight"]))
        opened.work.keep("note", b"x")
        raise ValueError


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "m"
    unfinished(path)
    with pytest.raises(FewbitsError, match=r"run: this -> other.*--overwrite"), writing(path, [], run="other"):
        pass
    other = lay_out([*entries(), Entry("more", "F32", (1,))])
    with pytest.raises(FewbitsError, match="another layout of files"), writing(path, other):
        pass
    with writing(path, lay_out(entries())) as opened:
        assert opened.work.read("note") == b"x"
        assert opened.has("b.weight")
        for name, tensor in tensors().items():
            if not opened.has(name):
                opened.put(name, numpy_of(tensor))
    assert {file.name for file in path.iterdir()} == {"model.safetensors", *OURS}


def test_overwrite_begins_anew(tmp_path: Path) -> None:
    unfinished(tmp_path / "m")
    with writing(tmp_path / "m", lay_out(entries()), overwrite=True, run="other") as opened:
        assert not any(opened.has(entry.name) for entry in entries())
        assert opened.work.read("note") is None
        for name, tensor in tensors().items():
            opened.put(name, numpy_of(tensor))
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]


def test_a_damaged_shard_is_not_resumed(tmp_path: Path) -> None:
    unfinished(tmp_path / "m")
    os.truncate(tmp_path / "m.partial" / "result" / "model.safetensors", 100)
    write(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == save(tensors(), {"format": "pt"})


def test_a_tensor_that_has_changed_on_the_disk_is_made_again(tmp_path: Path) -> None:
    unfinished(tmp_path / "m")
    shard = tmp_path / "m.partial" / "result" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # of b.weight, which has come last
    shard.write_bytes(data)
    with pytest.raises(KeyError), writing(tmp_path / "m", lay_out(entries())) as opened:
        assert not opened.has("b.weight")
        raise KeyError


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(StopIteration),
        writing(tmp_path / "m", lay_out(entries())),
    ):
        with (
            pytest.raises(FewbitsError, match="another run is writing it"),
            writing(tmp_path / "m", lay_out(entries())),
        ):
            pass
        assert Journal(tmp_path / "m.partial" / "journal").entries
        raise StopIteration


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_strangers_beside_the_output_are_kept(tmp_path: Path, kind: str) -> None:
    partial = tmp_path / "m.partial"
    if kind == "file":
        partial.write_text("precious")
    else:
        partial.mkdir()
        (partial / "thesis.txt").write_text("precious")
    with (
        pytest.raises(FewbitsError, match="in the way"),
        writing(tmp_path / "m", lay_out(entries()), overwrite=True),
    ):
        pass
    assert (partial if kind == "file" else partial / "thesis.txt").read_text() == "precious"
    assert kind == "file" or [file.name for file in partial.iterdir()] == ["thesis.txt"]


def test_a_run_whose_last_step_failed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    names = list(tensors())
    with monkeypatch.context() as patch, pytest.raises(FewbitsError, match="Permission denied"):
        patch.setattr(os, "replace", refuse)
        with writing(tmp_path / "m", lay_out(entries())) as writer:
            for name in names:
                writer.put(name, numpy_of(tensors()[name]))
    with WorkFolder(tmp_path / "m", {"run": "this"}) as work:
        assert work.published
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m"]
    assert sorted(file.name for file in (tmp_path / "m").iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_what_exists_is_replaced_only_if_it_is_ours(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.mkdir()
    write(path)  # an empty folder is no obstacle
    with pytest.raises(FewbitsError, match=r"the output exists.*--overwrite"):
        write(path)
    (path / "tokenizer.model").write_text("old")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("old")
    write(path, overwrite=True)
    assert {file.name for file in path.iterdir()} == {"model.safetensors", *OURS}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("thesis.txt", "precious", "it holds 'thesis.txt'"),
        ("data/config.json", "{}", "it holds 'data/config.json'"),
        ("pytorch_model.bin", "precious", "it holds 'pytorch_model.bin'"),
        ("config.json", '{"model_type": "llama"}', "no quantization_config"),
        ("config.json", "[]", "no quantization_config"),
        ("config.json", "{", "no quantization_config"),
    ],
)
def test_what_may_be_somebodys_work_is_kept(tmp_path: Path, name: str, content: str, reason: str) -> None:
    path = tmp_path / "m"
    write(path)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text(content)
    with pytest.raises(FewbitsError, match=reason):
        write(path, overwrite=True)
    assert (path / name).read_text() == content


def test_impossible_outputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    write(tmp_path / "source")
    (tmp_path / "link").symlink_to(tmp_path / "source")
    for path, message in [
        (tmp_path / "file", "is a file"),
        (tmp_path / "no" / "m", "does not exist"),
        (tmp_path / "source", "replace the model it is made from"),
        (tmp_path / "link", "replace the model it is made from"),
        (tmp_path, "replace the model it is made from"),
    ]:
        with pytest.raises(FewbitsError, match=message):
            check_directory_output(path, overwrite=True, source=tmp_path / "source")
    with pytest.raises(FewbitsError, match="replace the model"):
        check_directory_output(tmp_path, overwrite=True, source=tmp_path / "file")


def test_what_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(FewbitsError, match="the output exists"),
        writing(tmp_path / "m", lay_out(entries())) as opened,
    ):
        for name, tensor in tensors().items():
            opened.put(name, numpy_of(tensor))
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "new").write_text("precious")
    assert [file.name for file in tmp_path.rglob("*")] == ["m", "new"]


# --- the disk ---


def test_room_is_checked_beforehand(tmp_path: Path) -> None:
    huge = lay_out([Entry("w", "F32", (2**20, 2**20, 2**8))])
    with pytest.raises(FewbitsError, match="the disk has"), writing(tmp_path / "m", huge):
        pass
    assert list(tmp_path.iterdir()) == []


def test_room_for_what_is_already_there_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry("w", "U8", (1_000_000,))
    for free, expected in [(1_100_000, "no end"), (100_000, "no end"), (90, "the disk has")]:
        usage = type("usage", (), {"free": free})
        monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _, usage=usage: usage)
        with (
            pytest.raises((KeyError, FewbitsError), match=expected),
            writing(tmp_path / "m", lay_out([entry])) as opened,
        ):
            if not opened.has("w"):
                opened.put("w", bytes(1_000_000))
            raise KeyError("no end")
    assert Journal(tmp_path / "m.partial" / "journal").entries


FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_directory_format import Entry, lay_out, writing
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    shards = lay_out([Entry("w", "U8", ({size},))])
    with writing(Path({path!r}), shards, {{"README.md": bytes(60_000)}}) as writer:
        writer.put("w", bytes({size}))
except Exception as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
"""


@pytest.mark.parametrize("size", [100_000, 10])
def test_a_full_disk_leaves_what_is_done(tmp_path: Path, size: int) -> None:
    """The file size limit makes the kernel refuse the write as a full disk would: of a shard, or of the last file."""
    code = FULL.format(tests=str(Path(__file__).parent), path=str(tmp_path / "m"), size=size)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("DiskError:") and "no room left on the disk" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ([] if size > 50_000 else ["m.partial"])


def test_memory_is_not_needed_for_the_file(tmp_path: Path) -> None:
    """Pieces go to the disk one by one: 256 MB through a writer that never holds more than one of 4 MB."""
    size, piece = 256 << 20, 4 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with writing(tmp_path / "m", lay_out([Entry("w", "U8", (size,))])) as opened:
        opened.put_pieces("w", (bytes(piece) for _ in range(size // piece)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # in KiB
