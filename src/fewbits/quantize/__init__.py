"""Plan, then execute: the way from a model to a quantized file."""

from fewbits.quantize.execute import QuantizeReport, execute
from fewbits.quantize.planning import PlanRequest, make_plan, shards_of

__all__ = ["PlanRequest", "QuantizeReport", "execute", "make_plan", "shards_of"]
