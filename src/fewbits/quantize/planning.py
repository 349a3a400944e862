"""From headers to a Plan: types, exact sizes and file names, before a weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewbits.formats.gguf.source import GGUFSource
from fewbits.formats.gguf.writer import Shard, TensorEntry, lay_out
from fewbits.plan import MixtureOptions, Plan, PlannedFile, apply_edits, plan_tensors, preset
from fewbits.plan.directory import is_directory_target
from fewbits.plan.presets import FLOAT_TYPES, PRESETS
from fewbits.version import __version__

QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class PlanRequest:
    """What the user asked for.

    Attributes:
        target: a preset name such as `Q4_K_M`.
        mixture: overrides of the preset's rules.
        split_max_size: most bytes of tensor data in one file, or None for a single file.
        output: final name; None makes one from the model and the target.
        edited: a saved plan to be followed; its types replace those of the preset.
    """

    target: str
    mixture: MixtureOptions = field(default_factory=MixtureOptions)
    split_max_size: int | None = None
    output: Path | None = None
    edited: Path | None = None


def make_plan(source: GGUFSource, request: PlanRequest) -> Plan:
    """Choose a type for every tensor and predict the files to the byte.

    Raises:
        FewbitsError: unknown target or type, a refused fallback, an override that is no regular expression, an edited
            plan that does not fit the model.
    """
    chosen = preset(request.target)
    tensors, notes = plan_tensors(source.facts, source.tensors, chosen.name, request.mixture)
    plan = Plan(
        tool=f"fewbits {__version__}",
        target=chosen.name,
        format="gguf",
        model=str(source.path),
        architecture=source.facts.arch,
        tensors=tensors,
        split_max_size=request.split_max_size,
        files=[],
        notes=notes,
    )
    if request.edited is not None:
        plan = apply_edits(plan, Plan.load(request.edited))
    plan = plan.model_copy(update={"notes": [*source.notes, *plan.notes, *_losses(plan)]})
    shards = shards_of(plan, source.metadata, request.output or default_output(source.path, chosen.name))
    files = [PlannedFile(name=shard.path.name, size=shard.nbytes) for shard in shards]
    return plan.model_copy(update={"files": files})


def default_output(model: Path, target: str) -> Path:
    """`<model name>-<TARGET>.gguf`, or a directory `<model name>-<target>`, in the current folder."""
    stem = model.stem if model.suffix == ".gguf" else model.resolve().name
    if is_directory_target(target):
        return Path(f"{stem}-{target.replace(':', '-')}")
    return Path(f"{stem}-{target.upper()}.gguf")


def _losses(plan: Plan) -> list[str]:
    """What the user may not expect: larger types than asked for, and loss on top of loss."""
    notes = []
    if plan.fallbacks:
        share = sum(tensor.n_weights for tensor in plan.fallbacks) / plan.n_weights
        notes.append(
            f"{len(plan.fallbacks)} tensors ({share:.1%} of the weights) have rows that do not fit the type wanted and "
            f"take another: {plan.bits_per_weight:.2f} bits per weight in all; --no-fallback refuses that"
        )
    lossy = {t.source_dtype for t in plan.tensors if t.method == "search" and t.source_dtype not in FLOAT_TYPES}
    if lossy:
        notes.append(f"the source is already quantized ({', '.join(sorted(lossy))}): its loss adds to this one's")
    return notes


def _file_type(plan: Plan) -> int | None:
    """What engines tell the user the file is: of a free mixture, the preset of the type that most weights have."""
    chosen = preset(plan.target)
    if chosen.name != "GGUF":
        return chosen.file_type
    sizes: Counter[str] = Counter()
    for tensor in plan.tensors:
        sizes[tensor.codec] += tensor.n_weights
    most = sizes.most_common(1)[0][0]
    return next((known.file_type for known in PRESETS.values() if known.base == most), None)


def shards_of(plan: Plan, metadata: Mapping[str, Any], output: Path) -> list[Shard]:
    """The exact files of a plan."""
    keys: dict[str, Any] = {"general.quantization_version": QUANTIZATION_VERSION}
    file_type = _file_type(plan)
    if file_type is not None:
        keys["general.file_type"] = file_type
    entries = [TensorEntry(t.name, tuple(t.shape), t.codec, t.nbytes) for t in plan.tensors]
    return lay_out(output, {**metadata, **keys}, entries, plan.split_max_size)
