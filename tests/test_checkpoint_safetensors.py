"""Safetensors directories: what is read, and what is refused with one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fewbits.checkpoint import SafetensorsCheckpoint
from fewbits.checkpoint.safetensors import read_header
from fewbits.codecs.scaled_levels import E4M3
from fewbits.errors import FewbitsError


def directory(folder: Path, tensors: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config or {"architectures": ["LlamaForCausalLM"]}))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_reads_every_float_type_as_torch_does(tmp_path: Path, dtype: torch.dtype) -> None:
    want = torch.randn(6, 5, dtype=torch.float32).to(dtype)
    checkpoint = SafetensorsCheckpoint(directory(tmp_path, {"w": want, "v": want[0].clone(), "s": want[0, 0].clone()}))
    np.testing.assert_array_equal(checkpoint.read("w"), want.float().numpy())
    np.testing.assert_array_equal(checkpoint.read("v"), want[0].float().numpy())
    np.testing.assert_array_equal(checkpoint.read("v", slice(1, 3)), want[0, 1:3].float().numpy())
    assert checkpoint.read("s").shape == ()
    np.testing.assert_array_equal(checkpoint.read("w", slice(2, 5)), want[2:5].float().numpy())
    np.testing.assert_array_equal(checkpoint.read("w", np.array([4, 1, 1])), want[[4, 1, 1]].float().numpy())


def test_reads_three_dimensional_rows(tmp_path: Path) -> None:
    want = torch.randn(3, 4, 5)
    checkpoint = SafetensorsCheckpoint(directory(tmp_path, {"experts": want}))
    np.testing.assert_array_equal(checkpoint.read("experts", slice(1, 2)), want[1:2].numpy())
    np.testing.assert_array_equal(checkpoint.lines("experts", 3, 7), want.reshape(12, 5)[3:7].numpy())


def test_fp8_table_is_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(E4M3, codes.view(torch.float8_e4m3fn).float().numpy())


@pytest.mark.parametrize("layout", ["block", "row", "tensor"])
def test_reads_fp8_with_scales(tmp_path: Path, layout: str) -> None:
    codes = torch.randn(200, 300).to(torch.float8_e4m3fn)
    scale = {"block": torch.rand(2, 3), "row": torch.rand(200, 1), "tensor": torch.rand(1)}[layout]
    name = "w.weight_scale_inv" if layout == "block" else "w.weight_scale"
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    checkpoint = SafetensorsCheckpoint(
        directory(tmp_path, {"w.weight": codes, name: scale}, {"quantization_config": quantization})
    )
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :300] if layout == "block" else scale
    assert list(checkpoint.tensors) == ["w.weight"]
    np.testing.assert_array_equal(
        checkpoint.read("w.weight", slice(100, 150)), (codes.float() * spread)[100:150].numpy()
    )


def test_reads_shards(tmp_path: Path) -> None:
    directory(tmp_path, {"a": torch.ones(2, 2)})
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(2, 2)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert sorted(SafetensorsCheckpoint(tmp_path).tensors) == ["a", "b"]
    index.write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    with pytest.raises(FewbitsError, match="outside the model directory"):
        SafetensorsCheckpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "three.safetensors"}}))
    with pytest.raises(FewbitsError, match=r"three\.safetensors is missing"):
        SafetensorsCheckpoint(tmp_path)


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({}, b"", 2**60, "claims 1152921504606846976 bytes"),
        ({"w": entry(0, 16, [4])}, b"\0" * 15, None, "'w' should end at byte"),
        ({"w": entry(0, 16, [5])}, b"\0" * 16, None, "does not fill"),
        ({"w": entry(0, 16, [4]), "v": entry(8, 24, [4])}, b"\0" * 24, None, "overlap"),
        ({"w": entry(0, 16, [-4])}, b"\0" * 16, None, "impossible shape"),
        ({"w": entry(0, 16, [2**40, 2**40])}, b"\0" * 16, None, "impossible shape"),
        ({"w": entry(-16, 0, [4])}, b"\0" * 16, None, "does not fill"),
        ({"w": entry(0, 16, [4], "F99")}, b"\0" * 16, None, "unknown type 'F99'"),
        ({"w": {"dtype": "F32"}}, b"", None, "malformed"),
        ({"w": 3}, b"", None, "malformed"),
        (b'{"w": 1, "w": 2}', b"", None, "twice"),
        (b"[]", b"", None, "not a JSON object"),
        (b"\xff\xfe", b"", None, "not valid JSON"),
        (b"[" * 100_000, b"", None, "not valid JSON"),
    ],
)
def test_refuses_lying_headers(tmp_path: Path, header: object, data: bytes, length: int | None, message: str) -> None:
    file = raw_file(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(FewbitsError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_never_crash(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A header with any bytes changed or cut either reads within the file or is refused."""
    file = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    raw_file(file, {"a": entry(0, 16, [2, 2]), "b": entry(16, 24, [4], "BF16")}, b"\1" * 24)
    content = bytearray(file.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=6)):
        content[position] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        infos = read_header(file)
    except FewbitsError:
        return
    assert all(info.offset + info.nbytes <= file.stat().st_size for info in infos)


def test_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match=r"config\.json does not exist"):
        SafetensorsCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FewbitsError, match="never opened"):
        SafetensorsCheckpoint(tmp_path)
