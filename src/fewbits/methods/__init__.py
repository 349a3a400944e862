"""Weights and statistics -> codes. A method takes rows of weights and a codec; it knows no files."""

from fewbits.methods.base import METHODS, Method, method
from fewbits.methods.direct import Convert, Search

__all__ = ["METHODS", "Convert", "Method", "Search", "method"]
