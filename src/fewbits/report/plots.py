"""The drawings, as SVG inside the page. Colours are variables of the page's style, so that light and dark both work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from fewbits.report.labels import Box, placed, width
from fewbits.report.numbers import bytes_text, kl_text
from fewbits.report.ranking import frontier
from fewbits.report.scales import Axis, decade_text, linear, logarithmic
from fewbits.report.schema import Candidate, ComparisonReport, Statistic

SHAPES = (
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",  # circle
    "M-4.5-4.5h9v9h-9z",  # square
    "M0-6L5.6 4.4H-5.6z",  # triangle
    "M0-6.4L6.4 0 0 6.4-6.4 0z",  # diamond
    "M0 6L5.6-4.4H-5.6z",  # triangle upside down
    "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",  # plus
    "M0-6.2L5.9-1.9 3.6 5H-3.6L-5.9-1.9z",  # pentagon
)
"""One shape for each kind of storage, so that colour alone tells nothing."""
LEAST_KL = 1e-7
FAR_FLOOR = 30.0
"""A noise floor this many times below the best candidate is told instead of drawn."""
FAR_LINE = 2.0
"""The user's memory is drawn if it is at most this many times what the largest candidate needs."""


@dataclass(frozen=True)
class Size:
    """One drawing in two sizes: for screens and for phones. Pixels; `text` is the type size."""

    name: str
    width: float
    height: float
    text: float
    left: float
    ticks: int


HISTOGRAM_ROW = 38.0
WIDE = Size("wide", 760, 430, 12.5, 62, 8)
NARROW = Size("narrow", 344, 400, 11.5, 60, 4)
SIZES = (WIDE, NARROW)


@dataclass(frozen=True)
class Cost:
    """What the plot is drawn over: bytes of each candidate, and the name of the axis."""

    title: str
    values: list[float]
    line: tuple[str, float] | None = None


def shapes(candidates: Iterable[Candidate]) -> dict[str, int]:
    """A number for each kind of storage, in order of appearance."""
    return {family: i % len(SHAPES) for i, family in enumerate(dict.fromkeys(c.family for c in candidates))}


def mark(shape: int) -> Markup:
    """The sign of one kind of storage, for the legend."""
    return Markup(
        '<svg class="sign" viewBox="-8 -8 16 16" width="16" height="16" aria-hidden="true">'
        f'<path class="f{shape} full" d="{SHAPES[shape]}"/></svg>'
    )


def pareto(report: ComparisonReport, cost: Cost, statistic: Statistic, size: Size) -> Markup:
    """KL divergence over a cost in bytes."""
    return _Pareto(report, cost, statistic, size).draw()


class _Pareto:
    """One such plot while it is drawn.

    Attributes:
        places: where each candidate's point lies.
        avoid: where no name may stand.
    """

    def __init__(self, report: ComparisonReport, cost: Cost, statistic: Statistic, size: Size) -> None:
        self.candidates, self.cost, self.statistic, self.size = report.candidates, cost, statistic, size
        self.values = [max(LEAST_KL, c.kl(statistic)) for c in self.candidates]
        self.floor = _floor(report, statistic, self.values)
        highest = max(cost.values)
        self.unit, self.scale = ("GB", 1e9) if highest >= 2e9 else ("MB", 1e6)
        self.line = cost.line if cost.line and cost.line[1] <= FAR_LINE * highest else None
        self.frame = Box(size.left, 14.0, size.width - 14, size.height - 44)
        costs = [value / self.scale for value in [*cost.values, *([self.line[1]] if self.line else [])]]
        shown = [*self.values, *_interval(self.candidates, statistic), *([self.floor] if self.floor else [])]
        self.x = linear(costs, self.frame.left, self.frame.right)
        self.y = logarithmic(shown, self.frame.bottom, self.frame.top, LEAST_KL)
        self.places = [
            (self.x.at(value / self.scale), self.y.at(kl)) for value, kl in zip(cost.values, self.values, strict=True)
        ]
        self.avoid: list[Box] = []

    def draw(self) -> Markup:
        title = _KL_TITLES[self.statistic]
        parts = _grid(self.x, self.y, self.frame, self.size, f"{self.cost.title}, {self.unit}", title)
        parts += self._floor_line() + self._memory_line()
        best = frontier(list(zip(self.cost.values, self.values, strict=True)))
        path = " ".join(f"{self.places[i][0]:.1f},{self.places[i][1]:.1f}" for i in best)
        parts.append(f'<polyline class="frontier" points="{path}"/>')
        kinds = shapes(self.candidates)
        for i, candidate in enumerate(self.candidates):
            parts.append(self._point(i, kinds[candidate.family], i in best))
        parts += self._names()
        return _svg(parts, self.size, f"{title} over {self.cost.title.lower()}; the table below has the figures")

    def _floor_line(self) -> list[str]:
        if self.floor is None:
            return []
        at, right, text = self.y.at(self.floor), self.frame.right, "noise floor"
        self.avoid.append(Box(right - 4 - width(text, self.size.text), at - 5 - self.size.text, right, at))
        return [_line("floor", self.frame.left, at, right, at), _text(right - 4, at - 5, text, "end", "floor-text")]

    def _memory_line(self) -> list[str]:
        """What the user has, its name on the side where there is room, and a tint over what does not fit."""
        if self.line is None:
            return []
        name, frame, text = self.line[0], self.frame, self.size.text
        at, wide = self.x.at(self.line[1] / self.scale), width(name, text) + 6
        left = at - wide > frame.left
        start = at - wide if left else at
        self.avoid.append(Box(start, frame.top, start + wide, frame.top + 1.4 * text))
        height = frame.bottom - frame.top
        beyond = f'x="{at:.1f}" y="{frame.top}" width="{frame.right - at:.1f}" height="{height}"'
        return [
            f'<rect class="beyond" {beyond}/>',
            _line("limit", at, frame.top, at, frame.bottom),
            _text(at - 6 if left else at + 6, frame.top + text, name, "end" if left else "start", "limit-text"),
        ]

    def _point(self, index: int, shape: int, best: bool) -> str:
        candidate, (x, y) = self.candidates[index], self.places[index]
        mean, whisker = candidate.comparison.kl.mean, ""
        if self.statistic == "mean":
            low, high = self.y.at(mean.low if mean.low > 0 else self.y.low), self.y.at(mean.high)
            whisker = f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
        kl = kl_text(candidate.kl(self.statistic))
        told = f"{candidate.label}: {bytes_text(self.cost.values[index])}, KL divergence {kl} ({self.statistic})"
        told += "" if best else "; another is no larger and better"
        return (
            f'<g class="f{shape}"><title>{escape(told)}</title>{whisker}<path class="{"full" if best else "hollow"}" '
            f'transform="translate({x:.1f} {y:.1f})" d="{SHAPES[shape]}"/></g>'
        )

    def _names(self) -> list[str]:
        parts = []
        named = [(x, y, c.label) for (x, y), c in zip(self.places, self.candidates, strict=True)]
        for label, (x, y, _) in zip(placed(named, self.frame, self.size.text, self.avoid), named, strict=True):
            if label.leader:
                parts.append(_line("leader", x, y, *label.leader))
            parts.append(_text(label.x, label.y, label.text, label.anchor, "name"))
        return parts


_KL_TITLES: dict[Statistic, str] = {
    "mean": "KL divergence, mean (nats)",
    "median": "KL divergence, median (nats)",
    "p90": "KL divergence, 90th percentile (nats)",
    "p99": "KL divergence, 99th percentile (nats)",
}


def _floor(report: ComparisonReport, statistic: Statistic, values: Sequence[float]) -> float | None:
    if report.noise_floor is None:
        return None
    kl = report.noise_floor.kl
    floor = kl.mean.value if statistic == "mean" else float(getattr(kl, statistic))
    return floor if floor >= LEAST_KL and floor * FAR_FLOOR >= min(values) else None


def _interval(candidates: Sequence[Candidate], statistic: Statistic) -> list[float]:
    if statistic != "mean":
        return []
    means = [c.comparison.kl.mean for c in candidates]
    return [m.high for m in means] + [m.low for m in means if m.low > m.value / 3]


def _grid(x: Axis, y: Axis, frame: Box, size: Size, x_title: str, y_title: str) -> list[str]:
    parts = []
    for value in y.ticks(9):
        at = y.at(value)
        parts.append(_line("grid", frame.left, at, frame.right, at))
        parts.append(_text(frame.left - 7, at + size.text * 0.35, decade_text(value), "end", "tick"))
    for value in x.ticks(size.ticks):
        at = x.at(value)
        parts.append(_line("grid", at, frame.top, at, frame.bottom))
        parts.append(_text(at, frame.bottom + size.text + 5, f"{value:g}", "middle", "tick"))
    parts.append(_text((frame.left + frame.right) / 2, size.height - 6, x_title, "middle", "axis"))
    turned = f'transform="translate(11 {(frame.top + frame.bottom) / 2:.0f}) rotate(-90)"'
    parts.append(f'<text class="axis" text-anchor="middle" {turned}>{escape(y_title)}</text>')
    return parts


def distribution(report: ComparisonReport, size: Size) -> Markup:
    """How the divergence of single tokens is spread: one row for each candidate, on one logarithmic axis."""
    ordered = sorted(report.candidates, key=lambda c: c.kl("mean"))
    edges = report.histogram_edges
    left = min(max(width(c.label, size.text) for c in ordered) + 12, size.width * 0.34)
    bottom = 6 + HISTOGRAM_ROW * len(ordered)
    drawing = Size(size.name, size.width, bottom + 40, size.text, left, size.ticks)
    x = Axis(edges[0], edges[-1], left, size.width - 12, log=True)
    parts = []
    for value in x.ticks(8 if size is WIDE else 5):
        parts.append(_line("grid", x.at(value), 6, x.at(value), bottom))
        parts.append(_text(x.at(value), bottom + size.text + 4, decade_text(value), "middle", "tick"))
    kinds = shapes(report.candidates)
    peak = max(max(c.histogram) for c in ordered) or 1
    for number, candidate in enumerate(ordered):
        base = 6 + HISTOGRAM_ROW * (number + 1)
        parts.append(f'<g class="f{kinds[candidate.family]}">{_bars(candidate, edges, x, base, peak)}</g>')
        parts.append(_line("base", left, base, x.stop, base))
        parts.append(_text(left - 8, base - 8, candidate.label, "end", "name"))
    axis = "KL divergence of a single token (nats)"
    parts.append(_text((left + size.width) / 2, drawing.height - 5, axis, "middle", "axis"))
    return _svg(parts, drawing, "Distribution of the divergence of single tokens, one row for each candidate")


def _bars(candidate: Candidate, edges: Sequence[float], x: Axis, base: float, peak: int) -> str:
    """One row: its bars, and marks at the median and the 99th percentile."""
    # what lies beyond the axis counts to the outermost bars
    below, *counts, above = candidate.histogram
    counts[0] += below
    counts[-1] += above
    path = f"M{x.at(edges[0]):.1f} {base:.1f}"
    for count, high in zip(counts, edges[1:], strict=True):
        path += f"V{base - (HISTOGRAM_ROW - 7) * min(1.0, count / peak):.1f}H{x.at(high):.1f}"
    told = f"{candidate.label}: half of the tokens below {kl_text(candidate.kl('median'))}, "
    told += f"one in a hundred above {kl_text(candidate.kl('p99'))}"
    marks: tuple[Statistic, ...] = ("median", "p99")
    top = base - HISTOGRAM_ROW + 9
    lines = "".join(f'<path class="{s}" d="M{x.at(candidate.kl(s)):.1f} {base:.1f}V{top:.1f}"/>' for s in marks)
    return f'<title>{escape(told)}</title><path class="bars" d="{path}V{base:.1f}z"/>{lines}'


def _svg(parts: Sequence[str], size: Size, title: str) -> Markup:
    body = "".join(parts)
    return Markup(
        f'<svg class="plot {size.name}" viewBox="0 0 {size.width:g} {size.height:g}" role="img" '
        f'font-size="{size.text:g}" aria-label="{escape(title)}">{body}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
