"""The comparison as data and as one self-contained HTML page."""

from fewbits.report.page import render
from fewbits.report.schema import ComparisonReport

__all__ = ["ComparisonReport", "render"]
