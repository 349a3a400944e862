"""fewbits list: what can be made from what, generated from the registries."""

from __future__ import annotations

from fewbits.capabilities import EngineRow, capabilities
from fewbits.cli import options as o
from fewbits.cli.output import emit_json, stdout, table


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
    stdout.print("\nModel directories (fewbits quantize MODEL TARGET -o DIRECTORY)", style="bold")
    table(
        ["target", "bits per weight", "methods", "runs in", "what it is"],
        [
            [d.name, f"{d.bits_per_weight:.2f}", ", ".join(d.methods), _runs_in(d.engines), d.summary]
            for d in found.directories
        ],
    )
    stdout.print(
        "\nThe same with bits by layer (fewbits quantize MODEL TARGET --bpw N, --size, --fit or --plan)", style="bold"
    )
    table(
        ["target", "bits to choose from", "bits per weight", "methods", "runs in"],
        [
            [o.name, o.choice, f"{o.least:.2f} to {o.most:.2f}", ", ".join(o.methods), _runs_in(o.engines)]
            for o in found.open_directories
        ],
    )
    stdout.print("\nEngines, as seen or read", style="bold")
    table(
        ["target", "engine", "on", "verdict", "as of", "note"],
        [["GGUF", e.engine, e.hardware, e.verdict, e.date, e.note] for e in found.gguf_engines]
        + [[d.name, e.engine, e.hardware, e.verdict, e.date, e.note] for d in found.directories for e in d.engines]
        + [
            [o.name, e.engine, e.hardware, e.verdict, e.date, e.note] for o in found.open_directories for e in o.engines
        ],
    )
    stdout.print("\nStorage types of GGUF", style="bold")
    table(
        ["type", "bits per weight", "block", "uses importance", "error feedback"],
        [[c.name, f"{c.bits_per_weight:g}", str(c.block), _yes(c.weighted), _yes(c.feedback)] for c in found.codecs],
    )
    stdout.print("\nMethods", style="bold")
    table(["method", "what it does"], [[m.name, m.summary] for m in found.methods])
    stdout.print("\nArchitectures", style="bold")
    table(["family", "in config.json", "in GGUF"], [[a.family, a.architecture, a.gguf] for a in found.architectures])


def _runs_in(engines: list[EngineRow]) -> str:
    seen = dict.fromkeys(e.engine.split(" + ")[-1].split()[0] for e in engines if e.verdict == "runs")
    return ", ".join(seen)


def _yes(value: bool) -> str:
    return "yes" if value else "-"
