"""What stands beside the weights in a model directory: config.json, tokenizer, chat template, generation settings,
license. Code and pickles of the source never go along."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.checkpoint import GGUFCheckpoint, Model
from fewbits.checkpoint.safetensors import parse_json
from fewbits.errors import FewbitsError

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt",
    "spiece.model", "tekken.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
LICENSE = re.compile(r"(?i:licen[sc]e|notice|copying)[\w.-]*")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
MAX_BYTES = 256 << 20
"""The largest published tokenizer files are around 35 MB."""
REMOTE_CODE = ("auto_map", "custom_pipelines")
"""Keys that point to Python files of the source."""
QUANTIZATION = ("quantization_config", "compression_config")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""By storage type: torch's name, which config.json uses."""


@dataclass(frozen=True)
class Companions:
    """Files by relative name, and what the user should know about them."""

    files: dict[str, bytes]
    notes: list[str] = field(default_factory=list)


def companions(model: Model) -> Companions:
    """The files of a model that its quantized directory takes over, without config.json and the model card.

    A GGUF file's tokenizer is written as tokenizer.json and its like.

    Raises:
        FewbitsError: a file that cannot be read or is absurdly large.
    """
    if isinstance(model.checkpoint, GGUFCheckpoint):
        return _of_gguf(model.checkpoint.metadata)
    files = {}
    for file in _wanted(model.path):
        name = file.relative_to(model.path).as_posix()
        files[name] = _without_code(file, _read(file)) if file.suffix == ".json" else _read(file)
    if not any(name in files for name in VOCABULARIES):
        return Companions(files, [f"{model.path} has no tokenizer: the result has none either, copy one there."])
    return Companions(files)


def _wanted(folder: Path) -> Iterator[Path]:
    yield from (folder / name for name in COPIED if (folder / name).is_file())
    yield from (file for file in sorted((folder / TEMPLATES).glob("*.jinja")) if file.is_file())
    yield from (file for file in sorted(folder.iterdir()) if LICENSE.fullmatch(file.name) and _is_text(file))


def _is_text(file: Path) -> bool:
    return file.is_file() and file.suffix.lower() in ("", ".txt", ".md", ".pdf", ".rst")


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise FewbitsError(f"{file}: too large for what its name says.", "Check that it is the right file.")
        return file.read_bytes()
    except OSError as error:
        raise FewbitsError(f"{file}: cannot be read ({error.strerror}).", "Fetch it again.") from None


def _without_code(file: Path, data: bytes) -> bytes:
    """The same bytes, unless the file asks for code that does not go along."""
    if not any(f'"{key}"'.encode() in data for key in REMOTE_CODE):
        return data
    content = parse_json(file, data)
    return _json({key: value for key, value in content.items() if key not in REMOTE_CODE})


def _of_gguf(metadata: Mapping[str, Any]) -> Companions:
    from fewbits.tokenizer import tokenizer_from_gguf

    files, notes = {}, []
    if generation := _generation_config(metadata):
        files["generation_config.json"] = _json(generation)
    try:
        tokenizer = tokenizer_from_gguf(metadata)
    except FewbitsError as error:
        notes.append(f"The result has no tokenizer, copy the original model's there. {error.message}")
    else:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tokenizer.save_pretrained(folder)
            saved = (file for file in sorted(folder.rglob("*")) if file.is_file())
            files |= {file.relative_to(folder).as_posix(): file.read_bytes() for file in saved}
    return Companions(files, notes)


def _generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Where generation begins and ends: chat models end at the end of a turn, which config.json has no place for."""

    def token(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return int(value) if isinstance(value, int | np.integer) and not isinstance(value, bool) else None

    ends = list(dict.fromkeys(end for name in ("eos", "eot", "eom") if (end := token(name)) is not None))
    found = {
        "bos_token_id": token("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": token("padding"),
    }
    return {name: value for name, value in found.items() if value is not None}


def config_json(
    model: Model, quantization_config: Mapping[str, Any] | None, dtype: str, old_rope_keys: bool = False
) -> bytes:
    """The model's config.json as its quantized directory has it.

    Args:
        quantization_config: replaces any that the source has; None for an unquantized directory.
        dtype: storage type of the tensors that are not quantized, e.g. `BF16`; empty leaves what the source says.
        old_rope_keys: spell out `rope_theta` and `rope_scaling` for engines that do not look into `rope_parameters`.
    """
    config = _plain(model.config)
    for part in ("text_config", "llm_config"):
        if isinstance(config.get(part), Mapping):
            config[part] = _plain(config[part])
    if old_rope_keys:
        config = _old_rope_keys(config) | config
    if dtype:
        name = DTYPES[dtype]
        # transformers 5 reads dtype, everything older torch_dtype
        config |= {"dtype": name, "torch_dtype": name}
        for value in config.values():
            if isinstance(value, dict):
                value |= {key: name for key in ("dtype", "torch_dtype") if key in value}
    if quantization_config is not None:
        config["quantization_config"] = dict(quantization_config)
    return _json(config)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    # _name_or_path is where the source once lay on somebody's disk
    dropped = {*REMOTE_CODE, *QUANTIZATION, "_name_or_path"}
    return {key: value for key, value in config.items() if key not in dropped}


def _old_rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 5 keeps in `rope_parameters`, under the names that it had before."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or "rope_theta" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    scaled = scaling.get("rope_type", "default") != "default"
    return {"rope_theta": rope["rope_theta"], **({"rope_scaling": scaling} if scaled else {})}


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
