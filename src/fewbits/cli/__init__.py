"""The command line: one file a verb."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable
from importlib import import_module

import typer

from fewbits.cli.output import talk
from fewbits.errors import FewbitsError
from fewbits.version import __version__

VERBS = {
    **{name: name for name in ("advise", "memory", "plan", "quantize", "calibrate", "convert", "measure", "compare")},
    **{name: name for name in ("export", "inspect", "verify", "run", "doctor", "demo")},
    "list": "listing",
}
"""Names and the files they are in."""


def application(verbs: Iterable[str] = VERBS) -> typer.Typer:
    """The command line with these verbs; others need not be imported."""
    app = typer.Typer(
        help="Turn any language model into any few-bit format, know beforehand how big it gets, measure what it lost.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for verb in verbs:
        app.command(verb)(import_module(f"fewbits.cli.{VERBS[verb]}").command)
    app.callback(invoke_without_command=True)(_root)
    return app


def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        sys.stdout.write(f"fewbits {__version__}\n")
        raise typer.Exit


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2."""
    # a plain kill unwinds like an interrupt, so that nothing half-written is left
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        named = sys.argv[1:2]
        application(named if named and named[0] in VERBS else VERBS)()
    except FewbitsError as error:
        talk(f"fewbits: {error}")
        sys.exit(2)
    except BrokenPipeError:
        # the reader of our output has gone: nothing more to say, and no traceback about it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
