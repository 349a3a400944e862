"""The page: one HTML file with everything in it, made of a `ComparisonReport`.

Whatever comes from models and texts is escaped by jinja2, in the embedded data too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from math import log10

import jinja2
from markupsafe import Markup

from fewbits.measure.metrics import Estimate
from fewbits.report import numbers
from fewbits.report.heatmap import SHADES, decades_of, maps, type_shades
from fewbits.report.plots import SIZES, Cost, distribution, mark, pareto, shapes
from fewbits.report.ranking import Ranking
from fewbits.report.schema import STATISTICS, Bucket, Candidate, ComparisonReport, Timing

STATISTIC_NAMES = {"mean": "mean", "median": "median", "p90": "90 %", "p99": "99 %"}


@dataclass(frozen=True)
class Figure:
    """A plot with its statistics to choose from: (statistic, drawings for screens and phones)."""

    name: str
    title: str
    drawings: list[tuple[str, list[Markup]]]
    note: str = ""


@dataclass(frozen=True)
class BucketTable:
    """KL divergence of each candidate in some buckets of the positions: (candidate, cells of (text, title, shade))."""

    title: str
    explained: str
    columns: list[tuple[str, str]]
    rows: list[tuple[str, list[tuple[str, str, int]]]]


def render(report: ComparisonReport) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "kl": numbers.kl_text,
        "size": numbers.bytes_text,
        "percent": lambda share: numbers.percent_text(share).replace(" ", "\u00a0"),
        "seconds": numbers.seconds_text,
        "rate": numbers.rate_text,
        "deviation": numbers.deviation_text,
        "timing": _timing,
        "parts": _parts,
        "significant": numbers.significant,
        "plus_minus": _plus_minus,
        "one_line": lambda text: text.replace("\n", "⏎"),
    }
    ordered = sorted(report.candidates, key=lambda c: -c.size)
    decades, losses, types = decades_of(ordered, "error"), decades_of(ordered, "loss"), type_shades(ordered)
    drawn = {c.label: maps(c, types, decades or (-6, 0), losses) for c in ordered}
    kinds, best = shapes(report.candidates), Ranking.of(report.candidates).best
    return environment.get_template("page.html.jinja").render(
        report=report,
        candidates=ordered,
        best={c.label for c in best},
        shown=best[len(best) // 2].label,
        figures=_figures(report),
        statistics=STATISTIC_NAMES,
        legend=[(family, mark(shape)) for family, shape in kinds.items()],
        engines={c.label: ", ".join(dict.fromkeys(name.split()[0] for name in c.engines)) for c in ordered},
        runs_in=[(kind, _engines(ordered, kind)) for kind in dict.fromkeys(c.format for c in ordered)],
        signs={c.label: mark(kinds[c.family]) for c in ordered},
        histograms=[distribution(report, size) for size in SIZES],
        buckets=_bucket_tables(report, ordered),
        maps=drawn,
        decades=decades,
        loss_decades=losses,
        tried=[c for c in ordered if c.speed or c.footprint],
        shades=range(SHADES),
        data=_embedded({label: found.cells for label, found in drawn.items()}),
        style=Markup(_file("style.css")),
        script=Markup(_file("page.js")),
    )


def _file(name: str) -> str:
    return resources.files("fewbits.report").joinpath(name).read_text("utf-8")


def _embedded(value: object) -> Markup:
    """JSON for a script element: nothing in it can end that element or begin a comment."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _engines(candidates: Sequence[Candidate], kind: str) -> str:
    """What is known of the engines of one format."""
    return ", ".join(dict.fromkeys(e for c in candidates if c.format == kind for e in c.engines)) or "not known"


def _figures(report: ComparisonReport) -> list[Figure]:
    found = [_figure(report, "size", "By file size", Cost("File size", [float(c.size) for c in report.candidates]))]
    known = [c for c in report.candidates if c.memory is not None]
    if known:
        part = report.model_copy(update={"candidates": known})
        needed = [float(c.memory.total) for c in known if c.memory is not None]
        line = (report.memory_line.label, float(report.memory_line.size)) if report.memory_line else None
        where = "GPU memory" if known[0].memory and known[0].memory.device == "GPU" else "Memory"
        cost = Cost(f"{where} at {report.memory_context:,} tokens of context", needed, line)
        engines = dict.fromkeys(c.memory.engine for c in known if c.memory is not None)
        notes = [f"As {' or '.join(engines)} would load it, with all layers, cache, buffers and a margin."]
        if line and line[1] > 2 * max(needed):
            notes.append(f"{line[0]} is far to the right: every one of them fits.")
        if not all(c.memory.certain for c in known if c.memory is not None):
            notes.append("Parts of this architecture are unknown: the memory is an upper bound.")
        found.append(
            _figure(
                part,
                "memory",
                f"By {where} at {report.memory_context:,} tokens".replace("Memory", "memory"),
                cost,
                " ".join(notes),
            )
        )
    return found


def _figure(report: ComparisonReport, name: str, title: str, cost: Cost, note: str = "") -> Figure:
    drawings = [(s, [pareto(report, cost, s, size) for size in SIZES]) for s in STATISTICS]
    return Figure(name, title, [(str(s), d) for s, d in drawings], note)


def _bucket_tables(report: ComparisonReport, ordered: Sequence[Candidate]) -> list[BucketTable]:
    found = [
        _bucket_table(
            "By how sure the original is",
            "Columns: the probability that the original gives to its own first choice. Averages hide damage where the "
            "original is sure: that is where facts, names and code are.",
            [(c.label, c.by_confidence) for c in ordered],
        )
    ]
    if len(report.texts) > 1:
        found.append(_bucket_table("By text", "One column for each text.", [(c.label, c.by_text) for c in ordered]))
    return found


def _bucket_table(title: str, explained: str, rows: Sequence[tuple[str, Sequence[Bucket]]]) -> BucketTable:
    known = [b.kl for _, buckets in rows for b in buckets if b.kl is not None and b.kl > 0]
    low, high = (log10(min(known)), log10(max(known))) if known else (0.0, 1.0)

    def cell(bucket: Bucket) -> tuple[str, str, int]:
        if bucket.kl is None or bucket.same_top is None:
            return "–", "no such token", -1
        share = (log10(max(bucket.kl, 10**low)) - low) / ((high - low) or 1)
        told = f"{numbers.percent_text(bucket.same_top)} the same first choice"
        return numbers.kl_text(bucket.kl), told, min(SHADES - 1, int(share * SHADES))

    columns = [(bucket.label, f"{bucket.n_scored:,} tokens") for bucket in rows[0][1]]
    return BucketTable(title, explained, columns, [(label, [cell(b) for b in buckets]) for label, buckets in rows])


def _parts(parts: dict[str, int]) -> str:
    """The parts that add up to a size, in words."""
    return ", ".join(f"{part.replace('_', ' ')} {numbers.bytes_text(size)}" for part, size in parts.items())


def _timing(value: Timing) -> Markup:
    """A rate, and the least and the largest of all runs."""
    low, high = numbers.rate_text(value.low), numbers.rate_text(value.high)
    return Markup('{}<span class="pm"> ({} to {})</span>').format(numbers.rate_text(value.median), low, high)


def _plus_minus(value: Estimate, digits: int = 3) -> Markup:
    """A value with half of its 95 % interval, to the digit that the interval leaves certain."""
    half = (value.high - value.low) / 2
    if half <= 0 or value.value == 0:
        return Markup("{}").format(numbers.significant(value.value, digits))
    decimals = min(8, max(0, 1 - int(log10(half) // 1)))
    return Markup('{}<span class="pm"> ± {}</span>').format(f"{value.value:.{decimals}f}", f"{half:.{decimals}f}")
