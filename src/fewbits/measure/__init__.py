"""Perplexity and KL divergence against the unquantized model, on two named rulers that never mix."""

from fewbits.measure.kv import KV_TYPES
from fewbits.measure.metrics import Comparison, Estimate, KLSummary
from fewbits.measure.report import MeasureReport
from fewbits.measure.run import ENGINES, measure
from fewbits.measure.windows import RULERS, Ruler

__all__ = ["ENGINES", "KV_TYPES", "RULERS", "Comparison", "Estimate", "KLSummary", "MeasureReport", "Ruler", "measure"]
