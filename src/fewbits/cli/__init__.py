"""The command line: one file a verb."""

from __future__ import annotations

import os
import signal
import sys

import typer

from fewbits.cli import (
    advise,
    calibrate,
    compare,
    convert,
    demo,
    doctor,
    export,
    inspect,
    listing,
    measure,
    memory,
    plan,
    quantize,
    run,
)
from fewbits.cli.output import talk
from fewbits.errors import FewbitsError
from fewbits.version import __version__

app = typer.Typer(
    help="Turn any language model into any few-bit format, know beforehand how big it gets, measure what it lost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERBS = (
    *(advise, memory, plan, quantize, calibrate, convert, measure, compare),
    *(export, inspect, run, listing, doctor, demo),
)
for verb in VERBS:
    app.command(verb.NAME)(verb.command)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        sys.stdout.write(f"fewbits {__version__}\n")
        raise typer.Exit


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2."""
    # a plain kill unwinds like an interrupt, so that nothing half-written is left
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except FewbitsError as error:
        talk(f"fewbits: {error}")
        sys.exit(2)
    except BrokenPipeError:
        # the reader of our output has gone: nothing more to say, and no traceback about it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
