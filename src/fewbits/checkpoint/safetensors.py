"""Safetensors directories: single file or sharded by an index, bf16/f16/f32, fp8 with scales.

Layout: u64 header length, JSON header, data (https://github.com/huggingface/safetensors#format). fp8 checkpoints:
DeepSeek's `weight_scale_inv` per 128x128 block and compressed-tensors' `weight_scale` per tensor or row.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fewbits.checkpoint.base import Checkpoint, TensorInfo, check_layout, element_count
from fewbits.errors import FewbitsError

MAX_HEADER = 100 * 2**20
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
SCALE_SUFFIXES = ("_scale_inv", "_scale")
READABLE_QUANTIZATION = {"fp8", "compressed-tensors"}


class SafetensorsCheckpoint(Checkpoint):
    """A Hugging Face model directory with safetensors weights.

    Raises:
        FewbitsError: no config.json or weights, damaged header, a shard that the index names is missing, a tensor in
            two shards, weights already in a few-bit format that this reader does not decode.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json", "A model directory needs its config.json.")
        self._refuse_foreign_quantization()
        tensors: dict[str, TensorInfo] = {}
        for file in self._files():
            for info in read_header(file):
                if info.name in tensors:
                    raise FewbitsError(f"{file}: tensor {info.name!r} is also in {tensors[info.name].file.name}.")
                tensors[info.name] = info
        self._scales = {name: info for name, info in tensors.items() if self._is_scale(name, tensors)}
        self.tensors = {name: info for name, info in tensors.items() if name not in self._scales}
        self._all = tensors

    def info(self, name: str) -> TensorInfo:
        return self._all[name] if name in self._all else super().info(name)

    def _refuse_foreign_quantization(self) -> None:
        quantization = self.config.get("quantization_config") or {}
        method = quantization.get("quant_method", "") if isinstance(quantization, dict) else str(quantization)
        if method and method not in READABLE_QUANTIZATION:
            raise FewbitsError(
                f"{self.path}: the weights are already quantized with {method!r}, which cannot be read yet.",
                "Start from the unquantized model.",
            )

    def _files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if not index.exists():
            files = sorted(self.path.glob("*.safetensors"))
            if len(files) != 1:
                found = f"{len(files)} *.safetensors files and no index" if files else "no *.safetensors file"
                raise FewbitsError(
                    f"{self.path}: {found}.", "Pickled weights (*.bin) are never opened: convert them to safetensors."
                )
            return files
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FewbitsError(f"{index}: there is no weight_map.", "Fetch the index again.")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name:
                raise FewbitsError(f"{index}: shard {name!r} lies outside the model directory.")
            if not (self.path / name).is_file():
                raise FewbitsError(f"{index}: shard {name} is missing.", "Fetch it into the model directory.")
        return [self.path / name for name in names]

    @staticmethod
    def _is_scale(name: str, tensors: dict[str, TensorInfo]) -> bool:
        owner = next((name.removesuffix(s) for s in SCALE_SUFFIXES if name.endswith(s)), None)
        return owner in tensors and tensors[owner].dtype == "F8_E4M3" if owner else name.endswith(".input_scale")

    def _read_range(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        info = self.info(name)
        if info.dtype == "F8_E4M3":
            return self._read_fp8(info, start, stop)
        if info.dtype == "F64":
            row = info.nbytes // info.shape[0] if info.shape else info.nbytes
            values = self.raw(name, start * row, stop * row).view(np.float64).astype(np.float32)
            return values.reshape(stop - start, *info.shape[1:])
        return self.decode(name, start, stop)

    def _read_fp8(self, info: TensorInfo, start: int, stop: int) -> npt.NDArray[np.float32]:
        row = info.nbytes // info.shape[0]
        codes = self.raw(info.name, start * row, stop * row).reshape(stop - start, *info.shape[1:])
        values = FP8_E4M3[codes]
        scale_name = next((info.name + s for s in SCALE_SUFFIXES if info.name + s in self._scales), None)
        if scale_name is None:
            return values
        scale = self.read(scale_name)
        if scale.ndim < 2 or values.ndim != 2:
            return values * (scale if scale.size == 1 else scale.reshape(-1, 1)[start:stop])
        if scale.shape == (info.shape[0], 1):
            return values * scale[start:stop]
        block = self._block_size(info, scale)
        rows = np.arange(start, stop) // block[0]
        return values * np.repeat(scale[rows], block[1], axis=1)[:, : info.shape[1]]

    def _block_size(self, info: TensorInfo, scale: npt.NDArray[np.float32]) -> tuple[int, int]:
        block = (self.config.get("quantization_config") or {}).get("weight_block_size") or [128, 128]
        expected = tuple(-(-n // b) for n, b in zip(info.shape, block, strict=True))
        if scale.shape != expected:
            raise FewbitsError(
                f"{info.file}: the scales of {info.name!r} have shape {list(scale.shape)}, blocks of {block} need "
                f"{list(expected)}."
            )
        return block[0], block[1]


def _fp8_table() -> npt.NDArray[np.float32]:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    value = np.where((code & 127) == 127, np.nan, value)
    return np.where(code & 128, -value, value).astype(np.float32)


FP8_E4M3 = _fp8_table()
"""Value of each E4M3 (fn) code: bias 7, no infinities, 0x7f and 0xff are NaN (OCP 8-bit floating point, 2023)."""


def read_json(file: Path, hint: str = "") -> dict[str, Any]:
    """The JSON object in a file, duplicate keys refused."""
    try:
        return parse_json(file, file.read_bytes())
    except FileNotFoundError:
        raise FewbitsError(f"{file} does not exist.", hint) from None


def parse_json(file: Path, data: bytes) -> dict[str, Any]:
    """A JSON object from untrusted bytes of this file, duplicate keys refused."""
    again = "It is damaged: fetch it again."

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            raise FewbitsError(f"{file}: the key {max(keys, key=keys.count)!r} stands there twice.", again)
        return found

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FewbitsError(f"{file}: not valid JSON ({error}).", again) from None
    if not isinstance(value, dict):
        raise FewbitsError(f"{file}: not a JSON object.", again)
    return value


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, checked against its size.

    Raises:
        FewbitsError: lying header length, malformed entry, unknown type, overlap, tensor past the end.
    """
    size = file.stat().st_size
    damaged = "It is truncated or damaged: fetch it again."
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8 or length > MAX_HEADER:
            raise FewbitsError(f"{file}: the header claims {length} bytes, the file has {size}.", damaged)
        header = parse_json(file, stream.read(length))
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            count = element_count(file, name, shape)
            wrong = not isinstance(begin, int) or not isinstance(end, int) or begin < 0
        except (KeyError, TypeError, ValueError):
            raise FewbitsError(f"{file}: the header entry of tensor {name!r} is malformed.", damaged) from None
        if dtype not in ITEM_BYTES:
            raise FewbitsError(f"{file}: tensor {name!r} has the unknown type {dtype!r}.")
        if wrong or end - begin != count * ITEM_BYTES[dtype]:
            raise FewbitsError(f"{file}: tensor {name!r} of shape {list(shape)} does not fill bytes {begin} to {end}.")
        tensors.append(TensorInfo(name, shape, dtype, end - begin, file, 8 + length + begin))
    check_layout(file, size, tensors)
    return tensors
