"""Numbers as people read them: three digits that count, units, no noise."""

from __future__ import annotations

from math import floor, log10


def significant(value: float, digits: int = 3) -> str:
    """With so many significant digits and no exponent down to 1e-6."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - floor(log10(abs(value))))
    if decimals > 8:
        return f"{value:.1e}"
    return f"{value:.{decimals}f}"


def kl_text(value: float) -> str:
    """A KL divergence in nats."""
    # the sum of rounding errors can be a hair below zero
    return significant(max(0.0, value), 2 if value < 1e-3 else 3) if value > 1e-8 else "0"


def bytes_text(size: float) -> str:
    """Decimal units, as disks and downloads are sold."""
    unit, scale = next((pair for pair in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= pair[1]), ("bytes", 1.0))
    return f"{size:.0f} {unit}" if scale == 1 else f"{significant(size / scale, 4 if size >= 1e9 else 3)} {unit}"


def percent_text(share: float) -> str:
    """A share as a percentage; near 100 % with the digits that tell it from 100."""
    if 0 < share < 0.0005:
        return "<0.1 %"
    rest = 100 * (1 - share)
    return f"{100 * share:.{2 if 0 < rest < 1 else 1}f} %"


def seconds_text(seconds: float) -> str:
    """A duration."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def rate_text(rate: float) -> str:
    """Tokens a second."""
    return f"{rate:,.0f}" if rate >= 100 else significant(rate)


def deviation_text(share: float) -> str:
    """How far a prediction is off, with its sign."""
    text = f"{100 * share:+.1f} %"
    return "0.0 %" if text in ("+0.0 %", "-0.0 %") else text
