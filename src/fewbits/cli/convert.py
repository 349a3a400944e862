"""fewbits convert: to GGUF without quantizing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbits import api
from fewbits.cli import options as o
from fewbits.cli.output import parse_size, progress_bar
from fewbits.cli.quantize import output_beside, show
from fewbits.errors import FewbitsError

TARGETS = ("F32", "F16", "BF16", "COPY")


def command(
    model: o.ModelArgument,
    target: Annotated[
        str, typer.Argument(metavar="[F32|F16|BF16|COPY]", help="COPY keeps each tensor's type.")
    ] = "COPY",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The file to make.")] = None,
    split_max_size: o.SplitMaxSize = None,
    pre_tokenizer: o.PreTokenizer = None,
    threads: o.Threads = None,
    max_memory: o.MaxMemory = None,
    overwrite: o.Overwrite = False,
    verify: o.Verify = True,
    json: o.Json = False,
) -> None:
    """Convert a model to GGUF, or join, split or decode GGUF files, without quantizing.

    Example: fewbits convert ./SmolLM2-135M F16 -o model.gguf
    """
    if target.upper() not in TARGETS:
        raise FewbitsError(
            f"convert makes {', '.join(TARGETS)}, not {target!r}.", "Use `fewbits quantize` for the rest."
        )
    with progress_bar() as progress:
        report = api.quantize(
            model,
            target.upper(),
            output or output_beside(model, target),
            split_max_size=parse_size(split_max_size) if split_max_size else None,
            pre_tokenizer=pre_tokenizer,
            threads=threads,
            max_memory=o.bytes_of(max_memory),
            overwrite=overwrite,
            progress=progress,
            verify=verify,
        )
    show(report, json)
