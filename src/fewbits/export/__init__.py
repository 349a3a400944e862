"""Handing models over: a Modelfile for Ollama, a model card, a repository on the hub."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from fewbits.checkpoint import GGUFCheckpoint, open_model
from fewbits.errors import FewbitsError
from fewbits.export.card import gguf_card
from fewbits.export.hub import Pushed, push
from fewbits.export.modelfile import modelfile
from fewbits.formats.atomic import AtomicFile, check_output

__all__ = ["OllamaExport", "Pushed", "export_ollama", "gguf_card", "push"]


class OllamaExport(BaseModel):
    """A Modelfile.

    Attributes:
        file: where it was written; None where it was not.
        dialect: what people call the chat format; None without a TEMPLATE.
        stops: what ends an answer.
        repository: the same as the files by which Ollama takes the model from a repository of the hub
            (`ollama run hf.co/OWNER/NAME`): `template`, `params` and `system`.
    """

    model_config = ConfigDict(extra="forbid")
    source: str
    file: str | None
    dialect: str | None
    stops: list[str]
    context: int
    text: str
    notes: list[str]
    repository: dict[str, str]


def export_ollama(
    source: str | Path,
    output: str | Path | None = None,
    *,
    context: int | None = None,
    system: str | None = None,
    overwrite: bool = False,
) -> OllamaExport:
    """Write the recipe by which Ollama takes a GGUF file: `ollama create NAME -f Modelfile`.

    Args:
        output: the Modelfile; None writes nothing.
        context: tokens of a conversation; None: 8192, or what the model has.
        system: a system message for every conversation.

    Raises:
        FewbitsError: no GGUF file, a split one, or an output that exists.
    """
    path = Path(source)
    if not path.is_file():
        raise FewbitsError(f"{source}: there is no such file.", "Name a GGUF file; `fewbits quantize` makes one.")
    checkpoint = open_model(path).checkpoint
    if not isinstance(checkpoint, GGUFCheckpoint):
        raise FewbitsError(f"{source}: no GGUF file.", "Quantize the model first: fewbits quantize MODEL Q4_K_M")
    at = Path(output) if output is not None else Path("Modelfile")
    if output is not None:
        check_output(at, overwrite)
    found = modelfile(checkpoint, at, context, system)
    text = found.text()
    if output is not None:
        with AtomicFile(at, overwrite) as file:
            file.write(text.encode())
    return OllamaExport(
        source=str(path),
        file=str(at) if output is not None else None,
        dialect=found.dialect,
        stops=[value for name, value in found.parameters if name == "stop"],
        context=int(dict(found.parameters)["num_ctx"]),
        text=text,
        notes=found.notes,
        repository=found.repository_files(),
    )
