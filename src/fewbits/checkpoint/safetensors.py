"""Safetensors directories: single file or sharded by an index, bf16/f16/f32, and quantized as `layouts` knows.

Layout: u64 header length, JSON header, data (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fewbits import arch
from fewbits.checkpoint.base import Checkpoint, TensorInfo, check_layout, check_name, check_regular, element_count
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


WITHOUT_CODEC = ("F8_E4M3", "F64")
"""Types of weights that no format is written in."""


class SafetensorsCheckpoint(Checkpoint):
    """A Hugging Face model directory with safetensors weights. Quantized ones are read as the plain weights they mean.

    Raises:
        FewbitsError: no config.json or weights, damaged header, a shard that the index names is missing, a tensor in
            two shards, quantized in a way that is not known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_links(path)
        self.config = read_json(path / "config.json", "A model directory needs its config.json.")
        named = self.config.get("architectures") or []
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise FewbitsError(f"{path / 'config.json'}: architectures is no list of names.", "Fetch it again.")
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

    def code_bits(self, name: str) -> float | None:
        """Bits of a quantized module's codes, scales not counted; None where the tensor is stored as it is."""
        return self._quantized.code_bits(name) if name in self._quantized else None

    def lines(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """As in the base class; of quantized modules and types without a codec, too."""
        info = self.info(name)
        if name not in self._quantized and info.dtype not in WITHOUT_CODEC:
            return super().lines(name, start, stop)
        each = max(1, prod(info.shape[1:-1]))
        first = start // each
        values = self.read(name, slice(first, -(-stop // each)))
        return values.reshape(-1, info.shape[-1] if info.shape else 1)[start - first * each : stop - first * each]

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
                raise FewbitsError(f"{index}: shard {name[:200]!r} lies outside the model directory.")
            if not name.isprintable() or len(name) > 200 or not name.endswith(".safetensors"):
                raise FewbitsError(f"{index}: {name[:200]!r} is no name of a shard.", "Fetch the index again.")
            if not (self.path / name).is_file():
                raise FewbitsError(f"{index}: shard {name} is missing.", "Fetch it into the model directory.")
        return [self.path / name for name in names]

    def _read_range(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        if name in self._quantized:
            return self._quantized.read(name, start, stop)
        info = self.info(name)
        if info.dtype not in WITHOUT_CODEC:
            return self.decode(name, start, stop)
        row = info.nbytes // info.shape[0] if info.shape else info.nbytes
        data = self.raw(name, start * row, stop * row)
        values = E4M3[data] if info.dtype == "F8_E4M3" else data.view(np.float64).astype(np.float32)
        return values.reshape(stop - start, *info.shape[1:])


def refuse_links(folder: Path) -> None:
    """Refuse links that lead out of a model directory: what they lead to would be read, and copied into results.

    The hub's own cache is made of links into the folder beside its snapshots; those are what they should be.

    Raises:
        FewbitsError: names the link.
    """
    home = Path(os.path.realpath(folder))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    for link in (*folder.glob("*"), *folder.glob("additional_chat_templates/*")):
        if link.is_symlink() and not {home, blobs}.intersection(Path(os.path.realpath(link)).parents):
            raise FewbitsError(f"{link}: the link leads out of the model directory.", "Put the file itself there.")


def read_json(file: Path, hint: str = "") -> dict[str, Any]:
    """The JSON object in a file, duplicate keys refused."""
    if not file.exists():
        raise FewbitsError(f"{file} does not exist.", hint)
    check_regular(file)
    return parse_json(file, file.read_bytes())


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
        if b"\\u" in data:  # half of a surrogate pair is no text, and could not be written again
            json.dumps(value, ensure_ascii=False).encode()
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
    size = check_regular(file)
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
            count = element_count(file, check_name(file, name), shape)
            wrong = type(begin) is not int or type(end) is not int or begin < 0
            dtype = str(dtype)
        except (KeyError, TypeError, ValueError):
            raise FewbitsError(f"{file}: the header entry of tensor {name!r} is malformed.", damaged) from None
        if dtype not in ITEM_BYTES:
            raise FewbitsError(f"{file}: tensor {name!r} has the unknown type {dtype!r}.")
        if wrong or end - begin != count * ITEM_BYTES[dtype]:
            raise FewbitsError(f"{file}: tensor {name!r} of shape {list(shape)} does not fill bytes {begin} to {end}.")
        tensors.append(TensorInfo(name, shape, dtype, end - begin, file, 8 + length + begin))
    check_layout(file, size, tensors)
    return tensors
