"""Safetensors directories: single file or sharded by an index, bf16/f16/f32, and quantized as `layouts` knows.

Layout: u64 header length, JSON header, data (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fewbits import arch
from fewbits.checkpoint.base import Checkpoint, TensorInfo, check_layout, element_count
from fewbits.checkpoint.quantized import QuantizedWeights
from fewbits.codecs.scaled_levels import E4M3
from fewbits.errors import FewbitsError

PROVENANCE = "fewbits.json"
"""In a directory that we made: how, and on which texts it was calibrated."""
MAX_HEADER = 100 * 2**20
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


class SafetensorsCheckpoint(Checkpoint):
    """A Hugging Face model directory with safetensors weights. Quantized ones are read as the plain weights they mean.

    Raises:
        FewbitsError: no config.json or weights, damaged header, a shard that the index names is missing, a tensor in
            two shards, quantized in a way that is not known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json", "A model directory needs its config.json.")
        stored: dict[str, TensorInfo] = {}
        for file in self._files():
            for info in read_header(file):
                if info.name in stored:
                    raise FewbitsError(f"{file}: tensor {info.name!r} is also in {stored[info.name].file.name}.")
                stored[info.name] = info
        self._quantized = QuantizedWeights(path, self._quantization(), stored, self._conv1d())
        self.tensors = self._quantized.tensors

    def _quantization(self) -> Any:
        """Settings of the quantizer: in config.json, in older checkpoints under another key or in a file beside it."""
        inside = self.config.get("quantization_config") or self.config.get("compression_config")
        if inside:
            return inside
        gptq, awq = self.path / "quantize_config.json", self.path / "quant_config.json"
        if gptq.exists():
            return {"quant_method": "gptq", **read_json(gptq)}
        if awq.exists():
            found = read_json(awq)
            return {"quant_method": "awq", "bits": found.get("w_bit"), "group_size": found.get("q_group_size"), **found}
        return None

    def _conv1d(self) -> tuple[str, ...]:
        """Ends of the names of modules whose plain weight is [in, out]; none for an architecture that is not known."""
        try:
            roles = arch.family_of(self.config).block_roles
        except FewbitsError:
            return ()
        return tuple(f".{role.hf}" for role in roles if role.change == "transpose")

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        if name in self._quantized:
            raise FewbitsError(f"{self.path}: {name!r} is stored as {self.info(name).dtype}, in several tensors.")
        return super().raw(name, start, stop)

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

    def _read_range(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        if name in self._quantized:
            return self._quantized.read(name, start, stop)
        info = self.info(name)
        if info.dtype not in ("F8_E4M3", "F64"):
            return self.decode(name, start, stop)
        row = info.nbytes // info.shape[0] if info.shape else info.nbytes
        data = self.raw(name, start * row, stop * row)
        values = E4M3[data] if info.dtype == "F8_E4M3" else data.view(np.float64).astype(np.float32)
        return values.reshape(stop - start, *info.shape[1:])


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
