"""Maps of a candidate's matrices, layer by layer: how they are stored, how far they are off, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Literal

from markupsafe import Markup, escape

from fewbits.report.numbers import significant
from fewbits.report.schema import Candidate, TensorRow

SHADES = 12
MOST_BITS = 9.0
"""What has more is not quantized."""
LEAST_DECADE, MOST_DECADES = -9, 6
"""What is smaller is nothing, and so is what is so many decades below the largest: a range down to exact copies would
leave no shades for the rest."""
LABEL, ROW = 132.0, 18.0
CONTAINERS = ("self_attn.", "mlp.", "block_sparse_moe.", "attn.", "attention.")


@dataclass(frozen=True)
class Maps:
    """The maps of one candidate, what their cells say, and the types for the legend.

    Attributes:
        loss_map: of the expected losses; empty where they are not known.
        cells: rows of (name, [[layer, type, error as text, expected loss as text], ...]) for those who point at a cell.
        types: (type, shade, bits per weight).
        roles: for the table: name, types, bits per weight, share of the bytes, error, expected loss.
    """

    types_map: Markup
    error_map: Markup
    loss_map: Markup
    cells: list[tuple[str, list[tuple[int, str, str, str]]]]
    types: list[tuple[str, int, str]]
    roles: list[tuple[str, str, str, str, str, str]]


def short(role: str) -> str:
    """A role without the module that it is in."""
    for container in CONTAINERS:
        role = role.removeprefix(container)
    return role


Value = Literal["error", "loss"]


def decades_of(candidates: Sequence[Candidate], value: Value) -> tuple[int, int] | None:
    """The powers of ten between which all errors or losses of a report lie; None if there are none."""
    known = [of for c in candidates for t in c.tensors if (of := getattr(t, value))]
    if not known:
        return None
    high = ceil(log10(max(known)))
    low = max(LEAST_DECADE, high - MOST_DECADES, floor(log10(min(known))))
    return low, max(high, low + 1)


def shade_of(value: float | None, decades: tuple[int, int]) -> int:
    """0 .. SHADES - 1; -1 where it is not known."""
    if value is None:
        return -1
    low, high = decades
    place = (log10(max(value, 1e-12)) - low) / (high - low)
    return min(SHADES - 1, max(0, int(place * SHADES)))


def type_shades(candidates: Sequence[Candidate]) -> dict[str, int]:
    """A shade for each storage type of a report, the same in all maps: fewer bits are brighter, -1 is not quantized."""
    bits = {t.type: t.bits for c in candidates for t in c.tensors}
    found = {name: -1 for name in bits}
    quantized = sorted((name for name in bits if bits[name] <= MOST_BITS), key=lambda name: (-bits[name], name))
    for rank, name in enumerate(quantized):
        found[name] = round((rank + 0.5) / len(quantized) * SHADES - 0.5)
    return found


def maps(
    candidate: Candidate,
    shades: Mapping[str, int],
    decades: tuple[int, int],
    losses: tuple[int, int] | None = None,
) -> Maps:
    """Everything about one candidate's matrices.

    Args:
        shades: of the types, see `type_shades`.
        decades: errors within these powers of ten take the shades.
        losses: the same for expected losses; None leaves their map out.
    """
    rows = _rows(candidate.tensors)
    layers = 1 + max((t.layer for t in candidate.tensors if t.layer is not None), default=0)
    kinds = {t.type: t for t in sorted(candidate.tensors, key=lambda t: t.bits)}
    return Maps(
        _draw(rows, layers, lambda t: shades[t.type], f"{candidate.label}: bits of each matrix by layer"),
        _draw(rows, layers, lambda t: shade_of(t.error, decades), f"{candidate.label}: error of each matrix by layer"),
        Markup("")
        if losses is None
        else _draw(
            rows,
            layers,
            lambda t: shade_of(t.loss, losses),
            f"{candidate.label}: expected loss of each matrix by layer",
        ),
        [
            (name, [(-1 if t.layer is None else t.layer, t.type, _small(t.error), _small(t.loss)) for t in row])
            for name, row in rows
        ],
        [(name, shades[name], f"{t.bits:.3g}") for name, t in kinds.items()],
        [_role(name, row, candidate.tensors) for name, row in rows],
    )


def _rows(tensors: Sequence[TensorRow]) -> list[tuple[str, list[TensorRow]]]:
    found: dict[str, list[TensorRow]] = {}
    for tensor in tensors:
        found.setdefault(short(tensor.role), []).append(tensor)
    return list(found.items())


def _draw(
    rows: Sequence[tuple[str, list[TensorRow]]], layers: int, shade: Callable[[TensorRow], int], title: str
) -> Markup:
    """Cells of one shade are one path: a map of 100 layers stays small."""
    cell = min(24.0, max(6.0, 620 / layers))
    width, height = LABEL + cell * layers + 2, ROW * len(rows) + 20
    paths: dict[int, list[str]] = {}
    names = []
    for number, (name, row) in enumerate(rows):
        names.append(
            f'<text class="name" x="{LABEL - 8}" y="{ROW * number + 13}" text-anchor="end">{escape(name[-20:])}</text>'
        )
        for tensor in row:
            x = LABEL if tensor.layer is None else LABEL + cell * tensor.layer
            wide = cell * layers if tensor.layer is None else cell
            paths.setdefault(shade(tensor), []).append(
                f"M{x:.1f} {ROW * number:g}h{wide - 1:.1f}v{ROW - 1:g}h-{wide - 1:.1f}z"
            )
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if layers / s <= 12)
    for layer in range(0, layers, step):
        x = LABEL + cell * (layer + 0.5)
        names.append(f'<text class="tick" x="{x:.1f}" y="{ROW * len(rows) + 13:g}" text-anchor="middle">{layer}</text>')
    cells = "".join(f'<path class="s{key if key >= 0 else "x"}" d="{"".join(found)}"/>' for key, found in paths.items())
    return Markup(
        f'<svg class="map" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'font-size="11.5" role="img" '
        f'aria-label="{escape(title)}; the table below sums it up" data-cell="{cell:g}" data-left="{LABEL:g}" '
        f'data-row="{ROW:g}">{cells}{"".join(names)}</svg>'
    )


def _role(name: str, row: Sequence[TensorRow], everything: Sequence[TensorRow]) -> tuple[str, str, str, str, str, str]:
    weights = sum(t.n_weights for t in row)
    nbytes = sum(t.bits * t.n_weights for t in row)
    known = [t for t in row if t.error is not None]
    error = sum((t.error or 0) * t.n_weights for t in known) / sum(t.n_weights for t in known) if known else None
    losses = [t.loss for t in row if t.loss is not None]
    kinds = ", ".join(sorted({t.type for t in row}))
    share = nbytes / sum(t.bits * t.n_weights for t in everything)
    loss = _small(sum(losses) if losses else None)
    return name, kinds, f"{nbytes / weights:.2f}", f"{100 * share:.1f} %", _small(error), loss


def _small(value: float | None) -> str:
    if value is None:
        return "–"
    return significant(value, 2) if value >= 1e-4 else f"{value:.1e}" if value else "0"
