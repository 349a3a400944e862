"""A language model in Hugging Face terms, whatever file it lies in."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fewbits import arch
from fewbits.checkpoint.gguf import GGUFCheckpoint
from fewbits.checkpoint.hub import fetch
from fewbits.checkpoint.safetensors import SafetensorsCheckpoint
from fewbits.checkpoint.urls import fetch_url, is_url
from fewbits.errors import FewbitsError, about
from fewbits.tokenizer import load_tokenizer, tokenizer_from_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Model:
    """One model: its Hugging Face config and tensors by their Hugging Face names, read lazily as float32.

    Attributes:
        checkpoint: the files, with the tensors as they are stored.
        config: config.json of a directory; made from the metadata of a GGUF file.
    """

    def __init__(self, checkpoint: SafetensorsCheckpoint | GGUFCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.path = checkpoint.path
        with about(checkpoint.path):
            self._translate(checkpoint)

    def _translate(self, checkpoint: SafetensorsCheckpoint | GGUFCheckpoint) -> None:
        if isinstance(checkpoint, GGUFCheckpoint):
            shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
            self.config: dict[str, Any] = arch.config_from_gguf(checkpoint.metadata, shapes, checkpoint.read)
            self._views = {tensor.name: tensor for tensor in arch.hf_tensors(self.config, shapes)}
            self._shapes = {name: view.shape for name, view in self._views.items()}
        else:
            self.config = checkpoint.config
            self._views = {}
            self._shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        self.family = arch.family_of(self.config)

    @property
    def names(self) -> list[str]:
        return list(self._shapes)

    @property
    def n_weights(self) -> int:
        return sum(prod(shape) for shape in self._shapes.values())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """Storage type of a tensor, e.g. `BF16` or `Q4_K`."""
        return self.checkpoint.tensors[self.stored(name)].dtype

    def stored(self, name: str) -> str:
        """What the files call a tensor, or what it is a part of."""
        return self._views[name].sources[0] if name in self._views else name

    def read(self, name: str, rows: slice | None = None) -> npt.NDArray[np.float32]:
        """A tensor as float32, by its Hugging Face name; some rows of it, or all."""
        view = self._views.get(name)
        if view is None:
            return self.checkpoint.read(name, rows)
        if view.change == "copy" and view.expert is None:
            return self.checkpoint.read(view.sources[0], rows)
        return view.read(self.checkpoint.read)[slice(None) if rows is None else rows]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's tokenizer.

        Raises:
            FewbitsError: there is none, or it is of a kind that is not known.
        """
        if isinstance(self.checkpoint, GGUFCheckpoint):
            return tokenizer_from_gguf(self.checkpoint.metadata)
        return load_tokenizer(self.path)


def open_checkpoint(source: str | Path) -> SafetensorsCheckpoint | GGUFCheckpoint:
    """Open a model directory, a GGUF file, a hub id (`owner/name`, fetched when online) or the URL of a directory or
    GGUF file (see `urls`), reading headers only.

    Raises:
        FewbitsError: nothing there, or damaged headers.
    """
    path = fetch_url(str(source)) if is_url(source) else Path(source)
    if not path.exists():
        path = fetch(str(source))
    if path.suffix == ".safetensors" and not path.is_dir():
        raise FewbitsError(f"{path}: name the model directory, not one of its files.")
    opened = SafetensorsCheckpoint(path) if path.is_dir() else GGUFCheckpoint(path)
    opened.url = str(source) if is_url(source) else None
    return opened


def open_model(source: str | Path) -> Model:
    """Like `open_checkpoint`, with the architecture known.

    Raises:
        FewbitsError: also for an architecture that is not known, by name and with the list of known ones.
    """
    return Model(open_checkpoint(source))
