"""Plan, then execute: the way from a model to a quantized file."""

from fewbits.quantize.execute import QuantizeReport, check, execute
from fewbits.quantize.importances import importances_of, statistics_for, with_provenance
from fewbits.quantize.planning import PlanRequest, default_output, make_plan, shards_of

__all__ = [
    "PlanRequest",
    "QuantizeReport",
    "check",
    "default_output",
    "execute",
    "importances_of",
    "make_plan",
    "shards_of",
    "statistics_for",
    "with_provenance",
]
