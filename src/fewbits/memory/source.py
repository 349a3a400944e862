"""What a memory question can be asked about: a GGUF file, a model directory, a config.json alone, or a hub id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fewbits import arch
from fewbits.checkpoint import GGUFCheckpoint, SafetensorsCheckpoint
from fewbits.checkpoint.safetensors import read_json
from fewbits.errors import FewbitsError, about
from fewbits.memory.config_shape import as_llama_cpp, shape_from_config
from fewbits.memory.gguf_shape import shape_from_gguf
from fewbits.memory.shape import ModelShape
from fewbits.memory.skeleton import Skeleton, skeleton_of


@dataclass(frozen=True)
class Described:
    """A model as far as its headers tell.

    Attributes:
        name: as the user named it.
        config: config.json; of a GGUF file empty.
        checkpoint: the tensors' headers; None where only config.json is there.
        memo: what was worked out from it, so that many questions about one model cost little more than one.
    """

    name: str
    kind: Literal["gguf", "directory", "config"]
    config: Mapping[str, Any]
    checkpoint: GGUFCheckpoint | SafetensorsCheckpoint | None = None
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def skeleton(self) -> Skeleton | None:
        """The tensors that config.json implies; None where transformers does not know the model."""
        with about(Path(self.name)):
            return skeleton_of(self.config)

    def shape(self, llama_cpp: bool) -> ModelShape:
        """Its sizes.

        Args:
            llama_cpp: as llama.cpp would keep it.
        """
        with about(Path(self.name)):
            if isinstance(self.checkpoint, GGUFCheckpoint):
                embeddings = self.checkpoint.tensors.get("token_embd.weight")
                rows = embeddings.shape[0] if embeddings is not None and embeddings.shape else None
                return shape_from_gguf(self.checkpoint.metadata, rows)
            if llama_cpp and (quick := self._quick_shape()) is not None:
                return quick
            found = shape_from_config(self.config)
            return as_llama_cpp(found) if llama_cpp else found

    def _quick_shape(self) -> ModelShape | None:
        """Of a family that `arch` knows, without transformers, which takes seconds to import."""
        if self.kind != "directory":
            return None  # its tensors have to come from transformers anyway
        try:
            return shape_from_gguf(arch.gguf_metadata(self.config))
        except FewbitsError:
            return None


def describe(source: str | Path) -> Described:
    """Read the headers of a model, never its weights.

    Args:
        source: a GGUF file, a model directory, a config.json or a directory that holds one, or a hub id: `owner/name`,
            or `owner/name/file.gguf`. Of the hub only config.json and headers are fetched.

    Raises:
        FewbitsError: nothing there, damaged headers, or no connection.
    """
    path = Path(source)
    name = str(source)
    if not path.exists():
        from fewbits.memory.remote import describe_remote

        return describe_remote(name)
    if path.is_dir():
        if any(path.glob("*.safetensors")):
            checkpoint = SafetensorsCheckpoint(path)
            return Described(name, "directory", checkpoint.config, checkpoint)
        files = sorted(path.glob("*.gguf"))
        if files and not (path / "config.json").exists():
            raise FewbitsError(f"{path}: a directory with GGUF files.", f"Name one of them, e.g. {files[0]}.")
        return Described(name, "config", read_json(path / "config.json", "A model directory needs its config.json."))
    if path.suffix == ".json":
        return Described(name, "config", read_json(path))
    if path.suffix == ".safetensors":
        raise FewbitsError(f"{path}: name the model directory, not one of its files.")
    return Described(name, "gguf", {}, GGUFCheckpoint(path))
