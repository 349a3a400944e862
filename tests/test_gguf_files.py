"""GGUF on disk: what is written is what gguf-py and our reader find, sizes are known beforehand, lies are refused."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.checkpoint import GGUFCheckpoint
from fewbits.errors import FewbitsError
from fewbits.formats.gguf.writer import TensorEntry, lay_out, write_shards

METADATA = {
    "general.architecture": "llama",
    "a.bool": True,
    "a.int": 7,
    "a.float": 0.5,
    "a.u64": np.uint64(2**40),
    "a.i32s": np.array([-1, 2], np.int32),
    "a.f32s": np.array([0.25], np.float32),
    "a.strings": ["eins", "zwei \N{SNOWMAN}", "\udcff"],
    "a.empty": [],
}
ENTRIES = [
    TensorEntry("w", (3, 32), "F32", 384),
    TensorEntry("v", (5,), "F32", 20),
    TensorEntry("q", (2, 64), "Q8_0", 136),
]


def contents() -> list[bytes]:
    rng = np.random.default_rng(1)
    return [rng.normal(size=96).astype("<f4").tobytes(), np.arange(5, dtype="<f4").tobytes(), bytes(range(136))]


def write(path: Path, split: int | None = None) -> list:
    shards = lay_out(path, METADATA, ENTRIES, split)
    write_shards(shards, iter([[data[:10], data[10:]] for data in contents()]), overwrite=False)
    return shards


def test_gguf_py_reads_what_was_written(tmp_path: Path) -> None:
    (shard,) = write(tmp_path / "x.gguf")
    assert shard.path.stat().st_size == shard.nbytes
    reader = gguf.GGUFReader(shard.path)
    assert [t.name for t in reader.tensors] == ["w", "v", "q"]
    assert reader.tensors[0].data.tobytes() == contents()[0]
    assert reader.fields["a.u64"].contents() == 2**40
    assert reader.fields["a.i32s"].contents() == [-1, 2]


@pytest.mark.parametrize("split", [None, 1, 400])
def test_our_reader_reads_what_was_written(tmp_path: Path, split: int | None) -> None:
    shards = write(tmp_path / "x.gguf", split)
    assert [s.path.stat().st_size for s in shards] == [s.nbytes for s in shards]
    checkpoint = GGUFCheckpoint(shards[0].path)
    for entry, data in zip(ENTRIES, contents(), strict=True):
        assert checkpoint.raw(entry.name).tobytes() == data
        assert checkpoint.tensors[entry.name].shape == entry.shape
    for key, value in METADATA.items():
        found = checkpoint.metadata[key]
        assert (
            np.array_equal(found, value)
            if isinstance(value, np.ndarray)
            else list(np.atleast_1d(found))
            == list(np.atleast_1d(np.array(value, dtype=object) if isinstance(value, list) else value))
        )
    assert type(checkpoint.metadata["a.bool"]) is bool
    if split:
        assert len(shards) > 1
        shards[1].path.unlink()
        with pytest.raises(FewbitsError, match="missing"):
            GGUFCheckpoint(shards[0].path)


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    shards = lay_out(tmp_path / "x.gguf", METADATA, ENTRIES, None)

    def fails():
        yield [contents()[0]]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(shards, fails(), overwrite=False)
    with pytest.raises(FewbitsError, match="came out as 3 bytes"):
        write_shards(shards, iter([[b"abc"]]), overwrite=False)
    assert list(tmp_path.iterdir()) == []


def header(n_tensors: int = 0, n_values: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_values) + body


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF"),
        (b"GGML" + bytes(40), "not a GGUF"),
        (header(version=9), "version 9"),
        (header(n_tensors=2**60), "counts in the header"),
        (header(n_values=1, body=struct.pack("<Q", 2**60) + bytes(20)), "a key needs 1152921504606846976"),
        (header(n_values=1, body=text("k") + struct.pack("<IIQ", 9, 4, 2**61)), "array 'k'"),
        (header(n_values=1, body=text("k") + struct.pack("<IIQ", 9, 8, 2**50)), "array 'k'"),
        (header(n_values=1, body=text("k") + struct.pack("<IIQ", 9, 9, 1)), "unknown type 9"),
        (header(n_values=1, body=text("k") + struct.pack("<I", 77)), "unknown type 77"),
        (header(n_values=2, body=(text("k") + struct.pack("<II", 4, 1)) * 2), "'k' stands there twice"),
        (header(1, 0, tensor("w", (2**40, 2**40), 0, 0)), "impossible shape"),
        (header(1, 0, tensor("w", (32,), 999, 0) + bytes(64)), "unknown type 999"),
        (header(1, 0, tensor("w", (31,), 8, 0) + bytes(64)), "no multiple of 32"),
        (header(1, 0, tensor("w", (1024,), 0, 0) + bytes(64)), "'w' should end at byte"),
        (header(1, 0, tensor("w", (4,), 0, 5) + bytes(64)), "not aligned"),
        (header(2, 0, tensor("w", (32,), 0, 0) + tensor("v", (32,), 0, 32) + bytes(256)), "overlap"),
        (header(2, 0, tensor("w", (8,), 0, 0) + tensor("w", (8,), 0, 32) + bytes(256)), "twice"),
    ],
)
def test_refuses_lying_headers(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises(FewbitsError, match=message) as caught:
        GGUFCheckpoint(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_bytes_never_crash(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = tmp_path_factory.mktemp("damaged") / "x.gguf"
    write(file)
    content = bytearray(file.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 600), max_size=6)):
        content[position] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        checkpoint = GGUFCheckpoint(file)
    except FewbitsError:
        return
    size = file.stat().st_size
    assert all(info.offset + info.nbytes <= size for info in checkpoint.tensors.values())
