"""fewbits export: hand a model over to Ollama or to the hub."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fewbits.checkpoint import GGUFCheckpoint, open_model
from fewbits.cli import options as o
from fewbits.cli.output import emit_json, stdout, talk, talk_note
from fewbits.errors import FewbitsError
from fewbits.formats.atomic import AtomicFile


class What(StrEnum):
    """What is made of the model."""

    OLLAMA = "ollama"
    CARD = "card"
    HUB = "hub"


def command(
    what: Annotated[
        What,
        typer.Argument(
            metavar="ollama|card|hub",
            help="ollama: a Modelfile for a GGUF file. card: its model card. hub: nothing new, for --push.",
        ),
    ],
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file; with hub also a model directory.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file to write; without it, it is printed.")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens of a conversation, for Ollama; 8192.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="A system message for every conversation in Ollama.")
    ] = None,
    push_to: Annotated[
        str | None,
        typer.Option("--push", metavar="OWNER/NAME", help="Upload to this repository of the hub; made if need be."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Hand a model over: to Ollama, or to the hub with a model card.

    Example: fewbits export ollama model.gguf -o Modelfile
    """
    from fewbits.export import export_ollama, push  # imports jinja2, which the other verbs do without

    _refuse_without_effect(what, output, context, system, push_to, private)
    extra: dict[str, bytes] = {}
    if what is What.OLLAMA:
        made = export_ollama(source, output, context=context, system=system, overwrite=overwrite)
        for note in made.notes:
            talk_note(note)
        extra = {name: text.encode() for name, text in made.repository.items()}
        if json and push_to is None:
            emit_json(made)
        elif output is None and push_to is None:
            sys.stdout.write(made.text)
        elif output is not None:
            format = f"{made.dialect} format" if made.dialect else "no TEMPLATE"
            talk(f"{made.file}: {format}, context {made.context}; next: ollama create my-model -f {made.file}")
    elif what is What.CARD:
        _card(source, output, push_to, overwrite, json)
    if push_to is not None:
        pushed = push(source, push_to, private=private, extra=extra)
        if json:
            emit_json(pushed)
        else:
            stdout.print(pushed.url, markup=False)
            talk(f"{len(pushed.files)} files: {', '.join(pushed.files)}")


def _refuse_without_effect(
    what: What, output: Path | None, context: int | None, system: str | None, push_to: str | None, private: bool
) -> None:
    if what is What.HUB and push_to is None:
        raise FewbitsError("`export hub` uploads.", "Say where to: --push OWNER/NAME.")
    unused = {
        "--output": what is What.HUB and output,
        "--context": what is not What.OLLAMA and context,
        "--system": what is not What.OLLAMA and system,
        "--private": push_to is None and private,
    }
    for option, given in unused.items():
        if given:
            raise FewbitsError(f"{option} has no effect here.", "Leave it out.")


def _card(source: Path, output: Path | None, push_to: str | None, overwrite: bool, json: bool) -> None:
    from fewbits.export import gguf_card

    if json and push_to is None:
        raise FewbitsError("A model card is Markdown.", "Leave --json out.")
    if not source.is_file():
        raise FewbitsError(f"{source}: there is no such file.", "Name a GGUF file.")
    model = open_model(source)
    if not isinstance(model.checkpoint, GGUFCheckpoint):
        raise FewbitsError(f"{source}: no GGUF file.", "Directories get their card when they are made.")
    card = gguf_card(model, push_to)
    if output is not None:
        with AtomicFile(output, overwrite) as file:
            file.write(card)
    elif push_to is None:
        sys.stdout.write(card.decode())
