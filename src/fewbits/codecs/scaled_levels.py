"""What the codes of matrices stand for: integers, and tables of 4 and 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from fewbits.codecs.base import Floats

Codes = npt.NDArray[np.uint8]
Levels = Literal["INT", "NF4", "FP4", "E2M1", "E4M3"]

# fmt: off
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)
"""NormalFloat (Dettmers et al., arXiv 2305.14314, appendix E)."""
_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
FP4 = np.concatenate([_FP4, -_FP4])
"""bitsandbytes' own 4-bit float, its largest value scaled to one; no relation to E2M1."""
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([_E2M1, -_E2M1])
"""The 4-bit float of OCP's microscaling formats (MX v1.0, section 5.3.3)."""
# fmt: on


def _e4m3() -> Floats:
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


E4M3 = _e4m3()
"""The 8-bit float of NVIDIA, Arm and Intel (arXiv 2209.05433): no infinities, largest 448, codes 127 and 255 NaN."""
TABLES: dict[Levels, Floats] = {"NF4": NF4, "FP4": FP4, "E2M1": E2M1, "E4M3": E4M3}
EVEN: frozenset[Levels] = frozenset({"E2M1", "E4M3"})
"""Levels that break ties as IEEE does; of the others the lower level takes them."""


@dataclass(frozen=True)
class Ladder:
    """Distinct levels in ascending order.

    Attributes:
        values: float32 [n].
        codes: uint8 [n], the code of each; of two zeros the positive one.
        steps: float32 [n - 1]: a number's nearest level is the one after as many steps as lie below it.
    """

    values: Floats
    codes: Codes
    steps: Floats

    def nearest(self, numbers: Floats) -> Codes:
        """Codes of the nearest levels, in the shape of the numbers."""
        return self.codes[np.searchsorted(self.steps, numbers, "left")]


@cache
def ladder(levels: Levels) -> Ladder:
    """The levels of a table."""
    table = TABLES[levels]
    codes = np.array(
        [c for c in np.argsort(table, kind="stable") if table[c] != 0 or c == np.flatnonzero(table == 0)[0]]
    )
    codes = codes[np.isfinite(table[codes])].astype(np.uint8)
    values = table[codes]
    values[values == 0] = 0.0
    steps = (values[:-1] + values[1:]) / np.float32(2)
    if levels in EVEN:
        upper = codes[1:] % 2 == 0
        steps[upper] = np.nextafter(steps[upper], np.float32(-np.inf))
    for array in (values, codes, steps):
        array.setflags(write=False)
    return Ladder(values, codes, steps)
