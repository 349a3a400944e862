"""Names beside points, so that none lies on another, on a point or outside of the drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot

CHARACTER = 0.65
"""Mean width of a character, as a share of the type size."""
AROUND = (
    (1, 0), (1, -0.8), (1, 0.8), (-1, 0), (-1, -0.8), (-1, 0.8), (0, -1), (0, 1),
)  # fmt: skip
"""Where a name may stand, seen from its point: right of it first."""
DISTANCES = (9.0, 16.0, 26.0, 40.0, 58.0)


@dataclass(frozen=True)
class Box:
    """A rectangle."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area in common."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


@dataclass(frozen=True)
class Label:
    """A name where it stands: `x`, `y` of its baseline, and the end of the line to its point where it is far away."""

    text: str
    x: float
    y: float
    anchor: str
    leader: tuple[float, float] | None


def placed(
    points: Sequence[tuple[float, float, str]], frame: Box, size: float, avoid: Sequence[Box] = ()
) -> list[Label]:
    """A place for the name of each point (x, y, name), crowded points first."""
    marks = [Box(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    crowd = [sum(hypot(x - u, y - v) < 60 for u, v, _ in points) for x, y, _ in points]
    taken: list[Box] = list(avoid)
    found: dict[int, Label] = {}
    for index in sorted(range(len(points)), key=lambda i: (-crowd[i], points[i][1])):
        x, y, text = points[index]
        best: tuple[float, Box, Label] | None = None
        for distance in DISTANCES:
            for dx, dy in AROUND:
                box, label = _at(x, y, text, dx, dy, distance, size)
                cost = distance + 2 * abs(dy) + (3 if dx < 0 else 0) + 60 * _outside(box, frame)
                cost += 8 * sum(box.overlap(other) for other in taken)
                cost += 5 * sum(box.overlap(mark) for at, mark in enumerate(marks) if at != index)
                if best is None or cost < best[0]:
                    best = cost, box, label
        assert best is not None
        taken.append(best[1])
        found[index] = best[2]
    return [found[index] for index in range(len(points))]


def width(text: str, size: float) -> float:
    """About how wide a text is."""
    return len(text) * size * CHARACTER


def _at(x: float, y: float, text: str, dx: float, dy: float, distance: float, size: float) -> tuple[Box, Label]:
    wide = width(text, size)
    # above and below, half of the letters' height comes on top
    centre, middle = x + dx * distance, y + dy * distance + (dy * 0.6 * size if dx == 0 else 0)
    anchor = "middle" if dx == 0 else "start" if dx > 0 else "end"
    left = centre - wide / 2 if dx == 0 else centre if dx > 0 else centre - wide
    box = Box(left - 1, middle - size * 0.6, left + wide + 1, middle + size * 0.6)
    near = min(max(x, box.left), box.right), min(max(y, box.top), box.bottom)
    leader = near if hypot(near[0] - x, near[1] - y) > 14 else None
    return box, Label(text, centre, middle + size * 0.35, anchor, leader)


def _outside(box: Box, frame: Box) -> float:
    return max(0.0, frame.left - box.left, box.right - frame.right, frame.top - box.top, box.bottom - frame.bottom)
