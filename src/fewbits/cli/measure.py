"""fewbits measure: what a model says of a text, and how far that is from the unquantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli import options as o
from fewbits.cli.output import emit_json, progress_bar, table, talk


def command(
    model: o.ModelArgument,
    text: Annotated[Path, typer.Option("--text", help="A text file that was not used for calibration.")],
    reference: Annotated[
        str | None, typer.Option("--reference", help="The unquantized model, for KL divergence.")
    ] = None,
    convention: Annotated[
        str, typer.Option("--convention", help="llama.cpp: 512 tokens, second half scored. hf: 2048, all scored.")
    ] = "llama.cpp",
    chunks: Annotated[int | None, typer.Option("--chunks", min=1, help="Most windows to measure.")] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=8, help="Window length, if not the convention's.")
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="torch, or llama.cpp for the real engine.")] = "torch",
    kv: Annotated[
        str | None,
        typer.Option("--kv", metavar="TYPE", help="Type of the KV cache, e.g. q8_0 or q4_0; simulated in torch."),
    ] = None,
    noise_floor: Annotated[
        bool, typer.Option("--noise-floor", help="Also measure the reference's own rounding.")
    ] = False,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep the reference's answers for later runs.")
    ] = True,
    threads: o.Threads = None,
    json: o.Json = False,
) -> None:
    """Measure perplexity and, against --reference, KL divergence.

    Example: fewbits measure model.gguf --reference ./SmolLM2-135M --text wiki.test.raw --chunks 24
    """
    from fewbits.measure import measure  # imports torch, which the other verbs do without

    with progress_bar() as progress:
        report = measure(
            model,
            text,
            reference=reference,
            convention=convention,
            chunks=chunks,
            context=context,
            engine=engine,
            noise_floor=noise_floor,
            cache=cache,
            threads=threads,
            kv=kv,
            progress=progress,
        )
    for warning in report.warnings:
        talk(f"warning: {warning}")
    if json:
        emit_json(report)
        return
    table(["figure", "value", "± 95 %"], report.rows())
    talk(report.ruler())
