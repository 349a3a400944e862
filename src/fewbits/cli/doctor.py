"""fewbits doctor: what this machine has and whether the installation works."""

from __future__ import annotations

import typer

from fewbits.cli import options as o
from fewbits.cli.output import emit_json, table
from fewbits.doctor import doctor


def command(json: o.Json = False) -> None:
    """Check the installation: versions, engines, cores, memory, and a round trip through the kernels.

    Exits with code 1 when something that is needed does not work.
    """
    found = doctor()
    if json:
        emit_json(found)
    else:
        table(["check", "state", "detail"], [[c.name, c.state, c.detail] for c in found.checks])
    if not found.healthy:
        raise typer.Exit(1)
