"""fewbits list: what can be made from what, generated from the registries."""

from __future__ import annotations

from fewbits.capabilities import capabilities
from fewbits.cli import options as o
from fewbits.cli.output import emit_json, stdout, table

NAME = "list"


def command(json: o.Json = False) -> None:
    """List targets, storage types, methods and architectures."""
    found = capabilities()
    if json:
        emit_json(found)
        return
    stdout.print("Targets (fewbits quantize MODEL TARGET)", style="bold")
    table(
        ["target", "bits per weight", "what it is"],
        [[p.name, f"{p.bits_per_weight:.2f}" if p.bits_per_weight else "", p.summary] for p in found.presets],
    )
    stdout.print("\nStorage types", style="bold")
    table(
        ["type", "bits per weight", "block", "uses importance", "error feedback"],
        [[c.name, f"{c.bits_per_weight:g}", str(c.block), _yes(c.weighted), _yes(c.feedback)] for c in found.codecs],
    )
    stdout.print("\nMethods", style="bold")
    table(["method", "what it does"], [[m.name, m.summary] for m in found.methods])
    stdout.print("\nArchitectures", style="bold")
    table(["family", "in config.json", "in GGUF"], [[a.family, a.architecture, a.gguf] for a in found.architectures])


def _yes(value: bool) -> str:
    return "yes" if value else "-"
