"""Weights and statistics -> codes. A method takes rows of weights and a codec; it knows no files."""

from fewbits.methods.base import METHODS, Factor, Method, method
from fewbits.methods.direct import Convert, Search
from fewbits.methods.feedback import Feedback, factorize

__all__ = ["METHODS", "Convert", "Factor", "Feedback", "Method", "Search", "factorize", "method"]
