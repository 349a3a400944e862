"""fewbits inspect: what a model's headers say."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fewbits import api
from fewbits.cli import options as o
from fewbits.cli.output import emit_json, megabytes, stdout, table

SHOWN_ITEMS = 6


def command(
    model: o.ModelArgument,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    metadata: Annotated[bool, typer.Option("--metadata", help="List every metadata key.")] = False,
    json: o.Json = False,
) -> None:
    """Show what a model file or directory holds, without reading its weights.

    Example: fewbits inspect model.gguf --metadata
    """
    found = api.inspect(model)
    if json:
        emit_json(found)
        return
    stdout.print(
        f"{found.path}: {found.architecture} ({found.format}), {found.n_weights / 1e6:,.1f} M weights in "
        f"{found.n_tensors} tensors, {megabytes(found.nbytes)}, {found.bits_per_weight:.2f} bits per weight",
        markup=False,
    )
    rows = [
        [t.dtype, str(t.tensors), f"{t.weights:,}", megabytes(t.nbytes), f"{t.nbytes / found.nbytes:.1%}"]
        for t in found.types
    ]
    table(["type", "tensors", "weights", "size", "share"], rows)
    if metadata:
        table(["key", "value"], [[key, _short(value)] for key, value in found.metadata.items()])
    if tensors:
        shown = [[t["name"], "x".join(map(str, t["shape"])), t["dtype"], f"{t['nbytes']:,}"] for t in found.tensors]
        table(["tensor", "shape", "type", "bytes"], shown)


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > SHOWN_ITEMS:
        return f"{value[:SHOWN_ITEMS]} ... ({len(value)} items)"
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= 100 else f"{text[:100]} ... ({len(text)} characters)"
