"""Plan, then execute: the way from a model to a quantized file."""

from fewbits.quantize.execute import QuantizeReport, check, execute
from fewbits.quantize.importances import calibrate_texts, importances_of, promised, with_provenance
from fewbits.quantize.planning import PlanRequest, default_output, make_plan, shards_of

__all__ = [
    "PlanRequest",
    "QuantizeReport",
    "calibrate_texts",
    "check",
    "default_output",
    "execute",
    "importances_of",
    "make_plan",
    "promised",
    "shards_of",
    "with_provenance",
]
