"""fewbits verify: whether files are whole."""

from __future__ import annotations

from typing import Annotated

import typer

from fewbits.cli import options as o
from fewbits.cli.output import emit_json, megabytes, progress_bar, stdout, table, talk, talk_note
from fewbits.verify import VerifyReport, verify

SHOWN = 10
"""Tensors that are shown with --reference: the worst ones."""


def command(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A GGUF file, a model directory, an imatrix file, or a hub id.")
    ],
    reference: Annotated[
        str | None, typer.Option("--reference", help="The model it was made from: compare every tensor with it.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the hashes and loading the tokenizer.")] = False,
    write_sums: Annotated[
        bool, typer.Option("--write-sums", help="Record the hashes in PATH.sha256, for later runs and sha256sum -c.")
    ] = False,
    threads: o.Threads = None,
    json: o.Json = False,
) -> None:
    """Decode every tensor and check sizes, hashes, configuration and tokenizer.

    Exits with 0 where everything is fine, with 1 where faults were found (they are listed), with 2 where it cannot be
    read at all.

    Example: fewbits verify model.gguf --reference ./SmolLM2-135M
    """
    with progress_bar() as progress:
        report = verify(path, reference, quick=quick, write_sums=write_sums, threads=threads, progress=progress)
    for note in report.notes:
        talk_note(note)
    if json:
        emit_json(report)
    else:
        _show(report)
    verdict = f"{len(report.faults)} faults" if report.faults else "no faults"
    talk(
        f"{report.path}: {verdict}; {report.decoded} tensors, {report.n_weights / 1e6:,.1f} M weights decoded, "
        f"{report.seconds:.1f} s"
    )
    if not report.fine:
        raise typer.Exit(1)


def _show(report: VerifyReport) -> None:
    if any(file.sha256 for file in report.files):
        table(
            ["file", "size", "sha256", "compared with"],
            [[file.name, megabytes(file.size), file.sha256 or "", file.recorded or ""] for file in report.files],
        )
    if report.errors:
        rows = [
            [found.name, found.type, f"{found.bits:.2f}", f"{found.error:.4g}", f"{found.limit:g}"]
            for found in report.errors[:SHOWN]
        ]
        table(["tensor", "type", "bits", "error", "limit"], rows)
    for fault in report.faults:
        stdout.print(f"FAULT {fault.where}: {fault.problem}", markup=False)
