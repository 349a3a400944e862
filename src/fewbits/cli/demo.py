"""fewbits demo: the main job on the embedded model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli import options as o
from fewbits.cli.output import emit_json, megabytes, stdout, table, talk


def command(
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Keep the files in this folder.")] = None,
    json: o.Json = False,
) -> None:
    """Quantize the embedded model to three levels, measure what each lost, and run one."""
    from fewbits.demo import demo  # imports torch, which most verbs do without

    with tempfile.TemporaryDirectory() as scratch:
        folder = output or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        report = demo(folder, talk)
    if json:
        emit_json(report)
        return
    table(
        ["level", "size", "bits/weight", "perplexity", "KL divergence", "seconds"],
        [
            [
                row.level,
                megabytes(row.size),
                f"{row.bits_per_weight:.2f}",
                f"{row.perplexity:.3f}",
                "" if row.kl_divergence is None else f"{row.kl_divergence:.5f}",
                f"{row.seconds:.1f}" if row.seconds else "",
            ]
            for row in report.rows
        ],
    )
    talk(report.ruler)
    stdout.print(f"\n{report.sample.engine} goes on:\n{report.sample.text}", markup=False)
