"""fewbits compare: quantizations of one model side by side, on one ruler, with a page to read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbits.cli import options as o
from fewbits.cli.output import emit_json, progress_bar, table, talk

if TYPE_CHECKING:
    from fewbits.report.schema import ComparisonReport


def command(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="The unquantized model.")],
    candidates: Annotated[
        list[str] | None, typer.Argument(metavar="CANDIDATE", help="GGUF files and directories made of it.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="A text that nothing was calibrated on; more of them are also told apart."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The page to make; its data goes beside it as .json.")
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep", metavar="TARGET,TARGET,...", help="Make these of the reference first, e.g. Q8_0,Q4_K_M."
        ),
    ] = None,
    calibration: o.Calibration = None,
    calibration_chunks: o.CalibrationChunks = None,
    keep_files: Annotated[
        Path | None, typer.Option("--keep-files", metavar="DIR", help="Keep what the sweep makes in this folder.")
    ] = None,
    chunks: Annotated[int | None, typer.Option("--chunks", min=1, help="Most windows to measure of each text.")] = None,
    convention: Annotated[
        str, typer.Option("--convention", help="llama.cpp: 512 tokens, second half scored. hf: 2048, all scored.")
    ] = "llama.cpp",
    window: Annotated[
        int | None, typer.Option("--window", min=8, help="Length of the windows, if not the convention's.")
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="torch, or llama.cpp for the real engine.")] = "torch",
    kv: Annotated[
        str | None, typer.Option("--kv", metavar="TYPE", help="Type of the KV cache, e.g. q8_0; simulated in torch.")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens of context for which memory is predicted.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME", help='Your card, e.g. "RTX 4090": a line in the plot.')
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Your memory, e.g. 8GB: a line in the plot.")
    ] = None,
    noise_floor: Annotated[
        bool, typer.Option("--noise-floor/--no-noise-floor", help="Measure the reference's own rounding.")
    ] = True,
    weight_errors: Annotated[
        bool, typer.Option("--weight-errors/--no-weight-errors", help="Compare every matrix with the reference's.")
    ] = True,
    sensitivity: Annotated[
        Path | None,
        typer.Option("--sensitivity", metavar="FILE", help="Weigh the errors by what `calibrate --sensitivity` made."),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Time GGUF files in llama.cpp on this processor: prompt and generation.")
    ] = False,
    peak_memory: Annotated[
        bool, typer.Option("--peak-memory", help="Measure what memory they take there, beside what is predicted.")
    ] = False,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep the reference's answers for later runs.")
    ] = True,
    threads: o.Threads = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Compare quantizations of one model.

    Example: fewbits compare ./SmolLM2-135M --sweep Q8_0,Q4_K_M,Q2_K --text wiki.test.raw --chunks 24 -o report.html
    """
    from fewbits.compare import compare  # imports torch, which the other verbs do without

    with progress_bar() as progress:
        report = compare(
            reference,
            candidates or (),
            texts=text or (),
            output=output,
            sweep=[target.strip() for target in sweep.split(",") if target.strip()] if sweep else (),
            calibration=calibration or (),
            calibration_chunks=calibration_chunks,
            keep_files=keep_files,
            chunks=chunks,
            convention=convention,
            window=window,
            engine=engine,
            kv=kv,
            context=context,
            gpu=gpu,
            memory=memory,
            noise_floor=noise_floor,
            weight_errors=weight_errors,
            sensitivity=sensitivity,
            speed=speed,
            peak_memory=peak_memory,
            cache=cache,
            threads=threads,
            overwrite=overwrite,
            progress=progress,
        )
    show(report, json)
    if output is not None:
        talk(f"page: {output.with_suffix('.html')}; data: {output.with_suffix('.json')}")


def show(report: ComparisonReport, json: bool) -> None:
    for warning in report.warnings:
        talk(f"warning: {warning}")
    for candidate in report.candidates:
        for warning in candidate.warnings:
            talk(f"{candidate.label}: {warning}")
    if json:
        emit_json(report)
        return
    headers, rows = report.table()
    table(headers, rows)
    for sentence in report.summary[1:]:
        talk(sentence)
