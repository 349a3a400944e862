"""Plans: which tensor gets which type, and how big the result will be, before a weight is read."""

from fewbits.plan.mixture import Choice, MixtureOptions, choose_types, requires_imatrix
from fewbits.plan.planner import apply_edits, default_method, plan_tensors
from fewbits.plan.presets import ALIASES, PRESETS, TENSOR_TYPES, Preset, preset, tensor_type
from fewbits.plan.schema import Plan, PlannedFile, PlannedTensor, TableRow
from fewbits.plan.tensors import ModelFacts, SourceTensor, converted_dtype, quantizable, role

__all__ = [
    "ALIASES",
    "PRESETS",
    "TENSOR_TYPES",
    "Choice",
    "MixtureOptions",
    "ModelFacts",
    "Plan",
    "PlannedFile",
    "PlannedTensor",
    "Preset",
    "SourceTensor",
    "TableRow",
    "apply_edits",
    "choose_types",
    "converted_dtype",
    "default_method",
    "plan_tensors",
    "preset",
    "quantizable",
    "requires_imatrix",
    "role",
    "tensor_type",
]
