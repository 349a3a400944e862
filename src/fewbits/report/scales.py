"""Axes: from values to places on a drawing, and the numbers that are written at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from fewbits.report.numbers import significant


@dataclass(frozen=True)
class Axis:
    """One axis: values low..high lie at start..stop (pixels; start may be larger, as y runs downwards)."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies; beyond the ends, the end."""
        low, high, value = (self._scaled(v) for v in (self.low, self.high, min(max(value, self.low), self.high)))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def _scaled(self, value: float) -> float:
        return log10(value) if self.log else value

    def ticks(self, wanted: int) -> list[float]:
        """Round values inside the axis, about so many."""
        if self.log:
            decades = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [step * 10.0**decade for decade in decades for step in steps]
                found = [value for value in found if self.low <= value * 1.0001 and value <= self.high * 1.0001]
                if len(found) <= wanted:
                    return found
            return found[:: -(-len(found) // wanted)]
        raw = (self.high - self.low) / max(1, wanted)
        power = 10.0 ** floor(log10(raw))
        step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw)
        return [n * step for n in range(ceil(self.low / step), floor(self.high / step) + 1)]


def linear(values: Sequence[float], start: float, stop: float) -> Axis:
    """An axis with a margin around values above zero."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.1 * high or 1.0
    return Axis(max(0.0, low - margin), high + margin, start, stop)


def logarithmic(values: Sequence[float], start: float, stop: float, least: float = 1e-7) -> Axis:
    """A logarithmic axis with a margin; values below `least` count as it."""
    low, high = max(least, min(values)), max(least, *values)
    return Axis(low / 1.5, high * 1.6, start, stop, log=True)


def decade_text(value: float) -> str:
    """A value of a logarithmic axis."""
    return significant(value, 1) if value >= 1e-4 else f"{value:.0e}".replace("e-0", "e-")
