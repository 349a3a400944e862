"""The row groups among which EXL2's converter chooses for the matrices of a decoder layer and for the head.

Those of exllamav2 0.3.2 (conversion/qparams.py: `qparams_attn`, `qparams_mlp`, `qparams_headoptions`), a few of our own
where it has gaps (between 3.3 and 4.1, 4.4 and 5.3, 6.4 and 8.1 bits), and before them one of 2 bits throughout, so
that files can be as small as 2-bit groups of 128 allow: 2 + 1/32 bits a weight and, for each input channel, 32 bits and
for each group 48. That is 2.04 bits for 4096 x 4096 and 2.08 for 768 x 768.
"""

from __future__ import annotations

from fewbits.codecs.row_groups import RowGroups


def _menu(*lines: str) -> tuple[tuple[RowGroups, ...], ...]:
    return tuple(tuple(RowGroups.parse(text) for text in line.split()) for line in lines)


ATTENTION = _menu(
    "2_G128 2_G128 2_G128 2_G128",
    "3x.05_2x.95_G64 3x.05_2x.95_G64 3x.05_2x.95_G64 3x.05_2x.95_G64",
    "3x.1_2x.9_G64 3x.1_2x.9_G64 3x.25_2x.75_G64 3x.1_2x.9_G64",
    "3x.1_2x.9_G64 3x.1_2x.9_G64 4x.1_3x.9_G128 3x.1_2x.9_G64",
    "3x.1_2x.9_G64 3x.1_2x.9_G64 4x.1_3x.9_G128 4x.1_3x.9_G128",
    "4x.1_3x.9_G128 4x.1_3x.9_G128 4x.1_3x.9_G128 4x.1_3x.9_G128",
    "4x.1_3x.9_G128 4x.1_3x.9_G128 4x.1_3x.9_G64 4x.1_3x.9_G128",
    "4x.5_3x.5_G128 4x.5_3x.5_G128 4x.5_3x.5_G128 4x.5_3x.5_G128",
    "4_G128 4_G128 4_G128 4_G128",
    "4_G128 4_G128 4_G64 4_G128",
    "4_G64 4_G64 4_G32 4_G64",
    "4_G32 4_G32 4_G32 4_G32",
    "5x.1_4x.9_G128 5x.1_4x.9_G128 5x.1_4x.9_G64 5x.1_4x.9_G128",
    "5x.1_4x.9_G64 5x.1_4x.9_G64 5x.1_4x.9_G32 5x.1_4x.9_G64",
    "5x.1_4x.9_G64 5x.1_4x.9_G64 5_G64 5x.1_4x.9_G64",
    "5x.1_4x.9_G32 5x.1_4x.9_G32 5_G32 5x.1_4x.9_G32",
    "5_G128 5_G128 5_G128 5_G128",
    "6x.1_5x.9_G128 6x.1_5x.9_G128 6_G128 6x.1_5x.9_G128",
    "6x.1_5x.9_G32 6x.1_5x.9_G32 6_G32 6x.1_5x.9_G32",
    "6_G128 6_G128 6_G128 6_G128",
    "6_G32 6_G32 8_G32 6_G32",
    "8x.3_6x.7_G128 8x.3_6x.7_G128 8_G128 8x.3_6x.7_G128",
    "8_G128 8_G128 8_G128 8_G128",
)
"""For the projections of queries, keys, values and of the output."""
MLP = _menu(
    "2_G128 2_G128 2_G128",
    "3x.05_2x.95_G64 3x.05_2x.95_G64 6x.05_3x.2_2x.75_G32-64-64",
    "3x.1_2x.9_G64 3x.25_2x.75_G64 6x.05_3x.2_2x.75_G32-64-64",
    "3x.1_2x.9_G64 3x.3_2x.7_G64 5x.05_3x.95_G32",
    "3x.1_2x.9_G64 3x.3_2x.7_G64 5x.05_4x.95_G32",
    "4x.1_3x.9_G128 4x.25_3x.75_G128 8x.05_4x.1_3x.85_G32-128-128",
    "4x.1_3x.9_G32 4x.25_3x.75_G32 8x.05_4x.1_3x.85_G32",
    "4x.1_3x.9_G32 4x.25_3x.75_G32 8x.05_4x.95_G32-128",
    "4x.5_3x.5_G128 4x.5_3x.5_G128 8x.05_4x.45_3x.5_G32-128-128",
    "4_G128 4_G32 8x.05_4x.95_G32-128",
    "4_G32 4_G32 8x.05_4x.95_G32",
    "5x.1_4x.9_G128 5x.25_4x.75_G128 8x.05_5x.1_4x.85_G32-128-128",
    "5x.1_4x.9_G32 5x.25_4x.75_G32 8x.05_5x.1_4x.85_G32",
    "5_G128 5_G128 8x.05_5x.95_G32-128",
    "6x.1_5x.9_G128 6x.25_5x.75_G128 8x.05_6x.1_5x.85_G32-128-128",
    "6x.1_5x.9_G32 6x.25_5x.75_G32 8x.05_6x.1_5x.85_G32",
    "6_G128 6_G128 8x.05_6x.95_G32-128",
    "8x.1_6x.9_G128 8x.1_6x.9_G128 8x.15_6x.85_G128",
    "8x.1_6x.9_G128 8x.1_6x.9_G128 8_G128",
    "8_G128 8_G128 8_G128",
)
"""For gate, up and down; where there is no gate, the last two."""
HEAD = {
    2: RowGroups.parse("4x.3_2x.7_G32"),
    3: RowGroups.parse("4x.15_3x.85_G32"),
    4: RowGroups.parse("6x.15_4x.85_G32"),
    5: RowGroups.parse("6x.15_5x.85_G128"),
    6: RowGroups.parse("8x.15_6x.85_G128"),
    8: RowGroups.parse("8_G128"),
}
"""By the bits that the head is asked to have."""


def for_inputs(menu: tuple[tuple[RowGroups, ...], ...], n_in: tuple[int, ...]) -> tuple[tuple[RowGroups, ...], ...]:
    """A menu for matrices with few inputs: types whose groups take no more rows than they should, each line once.

    Args:
        n_in: inputs of each matrix of a line.
    """
    lines = (tuple(kind.narrowed(n) for kind, n in zip(line, n_in, strict=True)) for line in menu)
    return tuple(dict.fromkeys(lines))
