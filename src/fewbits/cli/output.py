"""Data on stdout, everything else on stderr; progress only on a terminal; one line and exit code 2 on bad input."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fewbits.quantize.execute import Progress as Callback

# a pipe has no width: give tables room instead of cutting them at 80 columns
stdout = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 240)
stderr = Console(stderr=True, soft_wrap=True, highlight=False)


def talk(text: str) -> None:
    """Tell the user something that is not data."""
    stderr.print(text, markup=False)


def talk_note(note: str) -> None:
    """A note of a plan or report; what begins with WARNING stands out."""
    if note.startswith("WARNING"):
        stderr.print(note, style="bold red", markup=False)
    else:
        talk(f"note: {note}")


def emit_json(value: BaseModel) -> None:
    sys.stdout.write(value.model_dump_json(indent=2) + "\n")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table on stdout; columns of numbers are right-aligned."""
    shown = Table(title=title or None, box=None, pad_edge=False, header_style="bold", title_justify="left")
    for number, header in enumerate(headers):
        cells = [row[number] for row in rows]
        numeric = bool(cells) and all(not cell or cell.lstrip("-~")[:1].isdigit() for cell in cells)
        shown.add_column(header, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    stdout.print(shown, markup=False)


@contextmanager
def progress_bar() -> Iterator[Callback | None]:
    """A callback (done, total, what) that draws a bar on a terminal; None where there is none."""
    if not stderr.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def parse_size(text: str) -> int:
    """Bytes from `6.5GB`, `500M`, `4GiB` (decimal units unless with an i).

    Raises:
        typer.BadParameter: not a size.
    """
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
    number = text.strip().upper().removesuffix("B")
    digits = number.rstrip("KMGTI")
    try:
        return int(float(digits) * units[number[len(digits) :]])
    except (ValueError, KeyError, OverflowError):
        raise typer.BadParameter(f"{text!r} is not a size such as 500MB or 4GiB") from None
