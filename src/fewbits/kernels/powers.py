"""torch's powers of float32 on a CPU, to the last bit, without torch, whose import takes longer than HQQ's own work.

torch calls SLEEF's `powf` of one unit in the last place (Shibata and Petrogalli, "SLEEF: A Portable Vectorized Library
of C Standard Mathematical Functions", IEEE TPDS 2020): exp(y log x), with the logarithm and what the exponential takes
as pairs of floats whose sum is the number (Dekker, "A Floating-Point Technique for Extending the Available Precision",
1971). Their sums and products must be those of SLEEF for the last bit to be.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Pair = tuple[Floats, Floats]
F32 = np.float32
LOG = tuple(map(F32, (0.240320354700088500976562, 0.285112679004669189453125, 0.400007992982864379882812)))
LOG_TAIL = F32(0.66666662693023681640625), F32(3.69183861259614332084311e-09)
"""atanh(x) = x + x^3 (1/3 + x^2 / 5 + ...), twice; the first two terms' constants come as a pair."""
EXP = (
    tuple(map(F32, (0.00136324646882712841, 0.00836596917361021041, 0.0416710823774337768, 0.166665524244308472))),
    F32(0.499999850988388061523438),
)
LN2 = F32(0.69314718246459960938), F32(-1.904654323148236017e-09)
LN2_UPPER, LN2_LOWER, PER_LN2 = F32(0.693145751953125), F32(1.428606765330187045e-06), F32(1.4426950408889634)


def fma(a: Floats, b: Floats | F32, c: Floats | F32) -> Floats:
    """a * b + c, rounded once: float64 holds the product, and a sum that it does not hold is rounded to odd."""
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    part = total - product
    rest = (product - (total - part)) + (c - part)
    even = (rest != 0) & (total.view(np.int64) & 1 == 0)
    return np.where(even, np.nextafter(total, np.copysign(np.inf, rest)), total).astype(np.float32)


def _sum(a: Floats, b: Floats) -> Pair:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _add(a: Pair, b: Pair) -> Pair:
    total, rest = _sum(a[0], b[0])
    return total, rest + (a[1] + b[1])


def _times(a: Pair, b: Pair) -> Pair:
    product = a[0] * b[0]
    return product, fma(a[0], b[1], fma(a[1], b[0], fma(a[0], b[0], -product)))


def _scaled(a: Pair, b: Floats | F32) -> Pair:
    product = a[0] * b
    return product, fma(a[1], b, fma(a[0], b, -product))


def _square(a: Pair) -> Pair:
    product = a[0] * a[0]
    return product, fma(a[0] + a[0], a[1], fma(a[0], a[0], -product))


def _quotient(a: Pair, b: Pair) -> Pair:
    inverse = F32(1) / b[0]
    quotient = a[0] * inverse
    missed = fma(-b[1], inverse, fma(-b[0], inverse, F32(1)))
    return quotient, fma(quotient, missed, fma(a[1], inverse, fma(inverse, a[0], -quotient)))


def _log(x: Floats) -> Pair:
    exponent = np.frexp(x * F32(1 / 0.75))[1] - 1
    mantissa = np.ldexp(x, -exponent)
    ones = np.ones_like(x)
    ratio = _quotient(_sum(-ones, mantissa), _sum(ones, mantissa))
    squared = _square(ratio)
    series = fma(fma(np.full_like(x, LOG[0]), squared[0], LOG[1]), squared[0], LOG[2])
    tail = _add(_scaled(squared, series), (ones * LOG_TAIL[0], ones * LOG_TAIL[1]))
    whole = exponent.astype(np.float32)
    doubled = ratio[0] * F32(2), ratio[1] * F32(2)
    cubed = _times(_times(squared, ratio), tail)
    return _add(_scaled((ones * LN2[0], ones * LN2[1]), whole), _add(doubled, cubed))


def _exp(x: Pair) -> Floats:
    power = np.rint((x[0] + x[1]) * PER_LN2)
    total, rest = x
    for part in (power * -LN2_UPPER, power * -LN2_LOWER):
        total, more = _sum(total, part)
        rest = more + rest
    high = total + rest
    low = (total - high) + rest
    series = np.full_like(high, EXP[0][0])
    for term in EXP[0][1:]:
        series = fma(series, high, term)
    series = fma(series, high, EXP[1])
    square = _scaled(_square((high, low)), series)
    total = high + square[0]
    rest = (((high - total) + square[0]) + low) + square[1]
    one = F32(1) + total
    return np.ldexp(one + (((F32(1) - one) + total) + rest), power.astype(np.int32))


def powers(x: Floats, exponent: float) -> Floats:
    """x ** exponent as `torch.pow` computes it in vectors.

    Args:
        x: float32, positive normal numbers. So must be the results, or they are wrong.
    """
    with np.errstate(all="ignore"):
        return _exp(_scaled(_log(x), F32(exponent)))
