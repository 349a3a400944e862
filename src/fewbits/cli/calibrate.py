"""fewbits calibrate: run text through a model and keep how large the inputs of its weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fewbits.cli import options as o
from fewbits.cli.output import emit_json, progress_bar, stdout, table, talk
from fewbits.cluster import workers_at


def command(
    model: o.ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The importance matrix to write.")],
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="A text file, or .jsonl of texts or chats; may be repeated.")
    ] = None,
    context: Annotated[int, typer.Option("--context", min=8, help="Tokens of a window.")] = 512,
    chunks: Annotated[int | None, typer.Option("--chunks", min=1, help="Most windows to run.")] = None,
    merge: Annotated[
        list[Path] | None, typer.Option("--merge", help="An importance matrix of this model to add; may be repeated.")
    ] = None,
    hessians: Annotated[
        Path | None, typer.Option("--hessians", metavar="DIR", help="Also keep Hessians, a file for each block.")
    ] = None,
    output_tensor: Annotated[bool, typer.Option("--output-tensor", help="Also the inputs of the head.")] = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also which weights matter how much: for --size, --bpw and --fit.")
    ] = False,
    format: Annotated[
        Literal["gguf", "dat"], typer.Option("--format", help="dat: for older versions of llama.cpp.")
    ] = "gguf",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Where to compute.")] = "auto",
    threads: o.Threads = None,
    max_memory: o.MaxMemory = None,
    cluster: o.Cluster = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Make an importance matrix that `quantize --calibration` and llama-quantize read.

    A run that was interrupted goes on when it is started again with the same options.

    Example: fewbits calibrate ./SmolLM2-135M --text calibration.txt -o SmolLM2-135M.imatrix.gguf
    """
    from fewbits.calibration.run import calibrate  # imports torch, which most other verbs do without

    with workers_at(cluster, threads) as workers, progress_bar() as progress:
        report = calibrate(
            model,
            text or [],
            output,
            chunks=chunks,
            context=context,
            merge=merge or [],
            hessians=hessians,
            output_tensor=output_tensor,
            sensitivity=sensitivity,
            format=format,
            device=device,
            threads=threads,
            max_memory=o.bytes_of(max_memory),
            overwrite=overwrite,
            progress=progress,
            workers=workers,
        ).report
    for warning in report.warnings:
        talk(f"warning: {warning}")
    if json:
        emit_json(report)
        return
    table(["weights", "layers", "experts", "columns", "mean square", "in 1 % of columns"], report.rows())
    if report.experts:
        stdout.print()
        table(["layer", "experts", "fewest tokens", "median", "most", "experts without data"], report.expert_rows())
    if report.resumed_after:
        talk(f"went on after {report.resumed_after} blocks of an interrupted run")
    talk(f"{report.tokens} tokens in {report.windows} windows -> {report.output}")
