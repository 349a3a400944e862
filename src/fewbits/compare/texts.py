"""Does the measured text also stand in what was calibrated on?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from fewbits.forward.text import Text

WORDS = 13
"""Runs of so many words in common count as overlap: the usual length in the contamination checks of papers since GPT-3
(arXiv 2005.14165, appendix C)."""
REFUSED_SHARE = 0.05
"""Above this the figures flatter."""


def shared(measured: Text, calibration: Iterable[str]) -> float:
    """Share of the measured text's runs of words that also stand in the calibration texts, 0 to 1."""
    wanted = _runs(measured.content)
    if not wanted:
        return 0.0
    found: set[bytes] = set()
    for content in calibration:
        found |= wanted & _runs(content)
    return len(found) / len(wanted)


def _runs(content: str) -> set[bytes]:
    words = content.split()
    # half of them would do, but a run may begin anywhere in the other text
    spans: Sequence[str] = [" ".join(words[at : at + WORDS]) for at in range(len(words) - WORDS + 1)]
    return {hashlib.blake2b(span.encode("utf-8", "replace"), digest_size=8).digest() for span in spans}
