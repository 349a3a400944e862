"""Quantizations of one model side by side: on one ruler, with a page to read."""

from fewbits.compare.run import compare

__all__ = ["compare"]
