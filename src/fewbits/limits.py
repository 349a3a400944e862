"""How much memory a job needs, and how it keeps within a bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fewbits.errors import FewbitsError
from fewbits.spill import Spill

HESSIANS = 4 << 30
"""Most bytes of the Hessians of one set of experts that are summed at once, where nothing is said."""
TOLD = 1 << 20
"""Parts of a need that are smaller than this are not spelled out."""


@dataclass(frozen=True)
class Limits:
    """How a job keeps within memory; its result does not depend on it.

    Attributes:
        threads: that quantize at once; None: one a core.
        spill: where large arrays live.
        parked: batches of windows that wait within a decoder block; None: all.
        at_once: bytes for matrices that are worked on at once, where none depends on another; None: as usual.
        hessians: bytes for the Hessians of experts that are summed at once, or one Hessian.
    """

    threads: int | None = None
    spill: Spill = field(default_factory=Spill)
    parked: int | None = None
    at_once: int | None = None
    hessians: int = HESSIANS


@dataclass(frozen=True)
class Need:
    """What a job takes at one of its moments.

    Attributes:
        what: the tensor or block that it is about.
        parts: bytes by what they are for.
        way_out: what to do where that is too much.
    """

    what: str
    parts: Mapping[str, int]
    way_out: str = "Allow more memory."

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def refusal(self, most: int) -> FewbitsError:
        large = sorted((part for part in self.parts.items() if part[1] >= TOLD), key=lambda part: -part[1])
        told = ", ".join(f"{size / 1e9:.2f} {name}" for name, size in large)
        return FewbitsError(
            f"{self.what} needs {self.total / 1e9:.2f} GB of memory ({told}), --max-memory allows {most / 1e9:.2f} GB.",
            self.way_out,
        )


def largest(needs: Iterable[Need]) -> Need:
    return max(needs, key=lambda need: need.total)


def resident() -> int:
    """Bytes of memory that this process has now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/status").read_text().split("VmRSS:", 1)[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0
