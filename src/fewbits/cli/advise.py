"""fewbits advise: what to take for this machine, why, and what to run next."""

from __future__ import annotations

from typing import Annotated

import typer

from fewbits.advise import PROBLEMS, USES, advise
from fewbits.advise.engines import ENGINES
from fewbits.advise.schema import Advice, Option
from fewbits.advise.words import gib, size
from fewbits.cli import options as o
from fewbits.cli.output import emit_json, stdout, table, talk_note
from fewbits.memory import detect, named

FITS = {"whole": "yes", "partly": "partly", "no": "no", None: "?"}


def command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="Models to choose among: GGUF files, directories, config.json, hub ids."
        ),
    ] = None,
    engine: Annotated[str | None, typer.Option("--engine", help=f"{', '.join(ENGINES)}.")] = None,
    use: Annotated[str | None, typer.Option("--use", help=f"{', '.join(USES)}.")] = None,
    gpu: o.GPU = None,
    memory: o.CardMemory = None,
    context: Annotated[int | None, typer.Option("--context", min=1, help="Tokens of each sequence; 8192.")] = None,
    problem: Annotated[
        str | None, typer.Option("--problem", help=f"Find the cause instead: {', '.join(PROBLEMS)}.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Recommend a model, a format and a level for this machine.

    Without --gpu and --memory, this machine is asked. Without MODEL: advice by the size of models.

    Example: fewbits advise ./SmolLM2-135M --gpu "RTX 3060" --use code
    """
    hardware = named(gpu, memory) if gpu or memory else detect()
    advice = advise(models or [], hardware, engine=engine, use=use, context=context, problem=problem)
    if json:
        emit_json(advice)
        return
    show(advice)


def show(advice: Advice) -> None:
    """First what to take, then the ranked options, then why, then the commands."""
    stdout.print(advice.sentence, style="bold", markup=False)
    if advice.findings:
        rows = [[found.cause, found.verdict, found.evidence] for found in advice.findings]
        table(["cause", "verdict", "because"], rows)
        _section("What to do", [f.remedy for f in advice.findings if f.verdict != "unlikely" and f.remedy])
    elif advice.options:
        _options(advice)
    _section("Why", advice.why)
    _section(
        "If memory is short, in this order",
        [f"{lever.name}: {lever.change} ({lever.effect})" for lever in advice.levers if lever.kind == "memory"],
        numbered=True,
    )
    if advice.use in ("serving", "speed") or advice.problem == "slow":
        speed = [f"{lever.name}: {lever.change} ({lever.effect})" for lever in advice.levers if lever.kind == "speed"]
        _section("For speed", speed)
    _section("Not made by fewbits yet", [f"{row.target}: {row.what}. Today: {row.nearest}." for row in advice.not_yet])
    if advice.steps:
        stdout.print("\nNext:", markup=False)
        for step in advice.steps:
            stdout.print(f"  {step.command}    # {step.what}", markup=False)
    for note in advice.notes:
        talk_note(note)


def _options(advice: Advice) -> None:
    several = len({option.model for option in advice.options}) > 1
    headers = ["", *(["model"] if several else []), "target", "weights", "GPU GiB", "RAM GiB", "fits", "loss", ""]
    table(headers, [_row(option, several) for option in advice.options])


def _row(option: Option, several: bool) -> list[str]:
    fits = FITS[option.fits]
    if option.fits == "partly" and option.layers_on_gpu != option.n_layers:
        fits = f"{option.layers_on_gpu} of {option.n_layers} layers"
    return [
        "->" if option.recommended else "",
        *([option.model] if several else []),
        option.target,
        size(option.file_bytes),
        "" if option.gpu_bytes == 0 else gib(option.gpu_bytes),
        gib(option.host_bytes),
        fits,
        option.loss.text,
        option.note,
    ]


def _section(title: str, lines: list[str], numbered: bool = False) -> None:
    if lines:
        stdout.print(f"\n{title}:", markup=False)
        for number, line in enumerate(lines, 1):
            stdout.print(f"{number}. {line}" if numbered else f"- {line}", markup=False)
