"""The command line: one file a verb."""

from __future__ import annotations

import sys

import click
import typer

from fewbits.cli import convert, demo, doctor, inspect, listing, measure, plan, quantize, run
from fewbits.cli.output import talk
from fewbits.errors import FewbitsError
from fewbits.version import __version__

app = typer.Typer(
    help="Turn any language model into any few-bit format, know beforehand how big it gets, measure what it lost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (quantize, plan, convert, measure, inspect, run, listing, doctor, demo):
    app.command(verb.NAME)(verb.command)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        sys.stdout.write(f"fewbits {__version__}\n")
        raise typer.Exit


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except FewbitsError as error:
        talk(f"fewbits: {error}")
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        talk("fewbits: stopped; nothing half-written is left.")
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    sys.exit(code if isinstance(code, int) else 0)
