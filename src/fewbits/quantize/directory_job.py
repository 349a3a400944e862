"""From what a user asked for to a finished model directory: target, text, plan, companions, execution."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fewbits.checkpoint import Model, open_model
from fewbits.checkpoint.safetensors import PROVENANCE
from fewbits.errors import FewbitsError
from fewbits.formats.atomic import explained
from fewbits.formats.directory.card import CalibrationUsed, CardFacts, Measured, model_card, origin_of
from fewbits.formats.directory.companions import companions, config_json
from fewbits.formats.directory.snippets import snippets
from fewbits.formats.directory.writer import MAX_SHARD_SIZE
from fewbits.formats.journal import sync
from fewbits.formats.onnx.skeleton import check_installed, make_skeleton
from fewbits.formats.work import WorkFolder
from fewbits.forward.text import read_text
from fewbits.layouts import LAYOUTS, Made
from fewbits.layouts.engines import runs_in
from fewbits.layouts.onnx import ONNX
from fewbits.limits import Limits
from fewbits.methods import method as method_named
from fewbits.methods.base import Effort
from fewbits.plan import Plan
from fewbits.plan.directory import HEAD, Target, plain_dtype, target
from fewbits.quantize.budget import Budget
from fewbits.quantize.directory import (
    DirectoryRequest,
    block_linears,
    execute_directory,
    make_directory_plan,
    quantized_tensors,
)
from fewbits.quantize.directory_budget import as_size, check_room, mixture_of, within_budget
from fewbits.quantize.execute import QuantizeReport
from fewbits.quantize.facts import common_facts, text_facts
from fewbits.quantize.importances import CHUNKS, CONTEXT, Progress, calibration_device, split_sources
from fewbits.quantize.memory_need import directory_limits, text_run
from fewbits.quantize.onnx_job import graph_files, without_nulls
from fewbits.spill import Spill

if TYPE_CHECKING:
    from fewbits.calibration.texts import CalibrationText
    from fewbits.workers import Workers


TOKENIZER_CONFIG, CARD = "tokenizer_config.json", "README.md"
PLAN = "plan.json"
"""Within the work folder."""
NOT_OF_THE_RESULT = {"notes", "model"}
"""Of a plan: what makes no difference to the files."""
MEASURED, MEASUREMENT = ("exl2",), "measurement.json"
"""Targets that try their types in the model first, and the file that keeps what was found."""

LIBRARIES = {"hqq": "hqq", "exl2": "exllamav2", "exl3": "exllamav3", "quip": "fewbits", "onnx": "onnxruntime-genai"}
"""What loads such a directory, where it is not transformers."""


@dataclass(frozen=True)
class DirectoryJob:
    """A model, what is to be made of it, and the plan.

    Attributes:
        command: the command line that asks for the same.
        dtype: storage type of most of the unquantized tensors.
        device: where calibration runs.
        measurement: file of a measuring pass, for targets that make one: read where it exists, else written.
        text: what calibrates the model or tells how much its weights matter.
        budget: what an open target may take, until it is spent.
        measured: what the measuring pass found, to be kept beside the weights.
        seconds: that spending the budget took.
        max_memory: most bytes of memory to use; None: no limit.
        named: the output as the command line names it, where that is a URL.
        edited: the saved plan that is followed.
    """

    model: Model
    request: DirectoryRequest
    plan: Plan
    command: str
    dtype: str
    device: str
    text: CalibrationText | None = None
    budget: Budget | None = None
    measurement: Path | None = None
    measured: bytes | None = None
    seconds: float = 0.0
    max_memory: int | None = None
    named: str | None = None
    edited: Path | None = None

    @staticmethod
    def of(
        source: str | Path,
        name: str,
        method: str | None,
        keep: Sequence[str],
        max_shard_size: int | None,
        texts: Sequence[Path],
        chunks: int | None,
        device: str = "cpu",
        budget: Budget | None = None,
        edited: Path | None = None,
        head_bits: int | None = None,
        measurement: Path | None = None,
        effort: Effort = "default",
    ) -> DirectoryJob:
        """Make the plan; texts are tokenized, no weight is read. A budget is spent by `spent` only.

        Raises:
            FewbitsError: whatever would keep the directory from being made.
        """
        chosen = _target(name, method, bool(texts), budget, edited, head_bits)
        if isinstance(chosen.layout, ONNX):
            check_installed(name)
        if measurement is not None and chosen.layout.name not in MEASURED:
            raise FewbitsError(f"{name}: nothing is measured for it.", "Leave out --measurement.")
        if keep and chosen.layout.name in MEASURED and chosen.open:
            raise FewbitsError(f"{name}: the measuring pass mixes bits for whole modules.", "Leave out --keep.")
        asked = _budget_flags(budget) if budget else []
        if chosen.rate is not None and edited is None:
            budget = Budget(bpw=chosen.rate)
        for file in texts:
            if not file.is_file():
                raise FewbitsError(f"{file}: there is no such text.", "Check the path.")
        model = open_model(source)
        stored = {name: (model.shape(name), model.dtype(name)) for name in model.names}
        dtype = plain_dtype(stored, chosen.layout)
        chosen = chosen.for_floats(dtype)
        text = _read(model, texts, chunks) if texts and (chosen.calibrated or budget) else None
        device = calibration_device(device, text is not None and chosen.calibrated, chosen.name)
        saved = Plan.load(edited) if edited else None
        calibrates = text if chosen.calibrated else None
        request = DirectoryRequest(chosen, tuple(keep), max_shard_size or MAX_SHARD_SIZE, calibrates, saved, effort)
        plan = make_directory_plan(model, request)
        if budget:
            budget = as_size(budget, model.path, chosen)
            check_room(plan, model, chosen, budget)
        if texts and text is None:
            unused = f"{chosen.method} has no use for calibration"
            plan = plan.model_copy(update={"notes": [*plan.notes, unused]})
        words = ["fewbits", "quantize", str(source), chosen.name, *_flags("--calibration", texts)]
        words += _flags("--calibration-chunks", [chunks] if chunks and text else [])
        words += [*_flags("--method", [method] if method else []), *_flags("--keep", keep)]
        words += _flags("--split-max-size", [max_shard_size] if max_shard_size else [])
        words += _flags("--device", [device] if device != "cpu" else [])
        words += [*asked, *_flags("--plan", [edited] if edited else [])]
        words += _flags("--head-bits", [head_bits] if head_bits else [])
        words += _flags("--measurement", [measurement] if measurement else [])
        words += _flags("--effort", [effort] if effort != "default" else [])
        options = (dtype, device, text, budget, measurement)
        return DirectoryJob(model, request, plan, shlex.join(words), *options, edited=edited)

    def work_folder(self, output: Path, threads: int | None, overwrite: bool) -> WorkFolder:
        """Around `spent` and `execute`: what an interrupted run has left is gone on from."""
        request = self.request
        plan = hashlib.sha256(self.plan.model_dump_json(exclude=NOT_OF_THE_RESULT).encode())
        facts = {
            **common_facts(self.model.checkpoint, request.target.name, request.effort, self.budget, self.edited),
            "method": request.target.method,
            "kept linears": list(request.keep),
            "file size": request.max_shard_size,
            "measurement": str(self.measurement) if self.measurement else None,
            **text_facts(self.text, threads, self.device),
            "plan": f"digest:{plan.hexdigest()}",
        }
        return WorkFolder(output.resolve(), facts, overwrite)

    def spent(self, threads: int | None, progress: Progress | None, work: WorkFolder | None = None) -> DirectoryJob:
        """The job with its budget spent: text runs through the model, and rows of every linear are tried.

        Args:
            work: where what is found is kept until the end.

        Raises:
            FewbitsError: the budget is too small.
        """
        if self.budget is None or (work and work.published):
            return self
        if work and (known := work.read(PLAN)):
            plan = Plan.model_validate_json(known)
            return replace(self, plan=plan, budget=None, measured=work.read(MEASUREMENT))
        started = time.monotonic()
        measured, found = None, None
        state = work.path / "appraisal" if work else None
        if self.request.target.layout.name in MEASURED:
            from fewbits.quantize import exl2_measurement  # imports torch, which most targets do without

            assert self.text is not None
            file = self.measurement
            if file is not None and file.exists():
                measured = exl2_measurement.Measurement.load(file)
            else:
                cores = threads or os.cpu_count() or 1
                measured = exl2_measurement.measure_lines(self.model, self.text, cores, self.device, progress, state)
                if file is not None:
                    measured.save(file)
            found = exl2_measurement.alternatives(measured, self.model)
        options = (self.budget, self.text, found, threads, progress, state)
        plan = within_budget(self.plan, self.model, self.request, *options)
        kept = measured.to_json() if measured else None
        if work:
            if kept:
                work.keep(MEASUREMENT, kept)
            work.keep(PLAN, plan.model_dump_json().encode())
        return replace(self, plan=plan, budget=None, measured=kept, seconds=time.monotonic() - started)

    def limits(self, output: Path, threads: int | None) -> Limits:
        """How to keep within the memory that may be used.

        Raises:
            FewbitsError: that cannot be.
        """
        text, request, most, beside = self.text, self.request, self.max_memory, output.absolute().parent
        if most is None:
            return Limits(threads, Spill(folder=beside))
        if text is None:
            return directory_limits(self.plan, lambda t: request.target.layout_of(t.codec), most, threads)
        # these import torch, which data-free targets do without
        from fewbits.calibration.memory_need import OF_GRADIENTS
        from fewbits.quantize.tuning import epochs_of

        windows, context = text.inputs.shape
        layouts = [request.target.layout_of(tensor.codec) for tensor in quantized_tensors(self.plan)]
        run = text_run(self.plan, self.model, windows, context, epochs_of(layouts, request.effort) > 0)
        if self.budget is not None:  # weights are tried in the model first: gradients, and the Hessians of whole blocks
            replace(run, all_inputs=True, gradients=OF_GRADIENTS, waits=False).check(most)
        return run.limits(most, beside, threads)

    def execute(
        self,
        output: Path,
        threads: int | None,
        overwrite: bool,
        progress: Progress | None,
        work: WorkFolder,
        limits: Limits | None = None,
        workers: Workers | None = None,
    ) -> QuantizeReport:
        """Make the directory; see `execute_directory`.

        Args:
            output: as the command line names it.
            work: as `work_folder` gives it.
        """
        if work.report is not None:
            return QuantizeReport.model_validate(work.report)
        files, notes = self._files(output)
        plan = self.plan.model_copy(update={"notes": [*self.plan.notes, *notes]})
        finish = None
        if isinstance(self.request.target.layout, ONNX):
            # before the weights: the builder may not know the model
            skeleton = make_skeleton(files, self.request.target.name)
            files["genai_config.json"] = skeleton.genai_config
            if TOKENIZER_CONFIG in files:
                files[TOKENIZER_CONFIG] = without_nulls(files[TOKENIZER_CONFIG])
            finish = partial(graph_files, skeleton, plan, self.model, self.request.target)
        report = execute_directory(
            *(plan, self.model, self.request, work, files, threads, self.device, overwrite, progress, finish),
            *(limits, workers),
        )
        return report.model_copy(update={"seconds": report.seconds + self.seconds})

    def _files(self, output: Path) -> tuple[dict[str, bytes], list[str]]:
        """Everything beside the weights, and notes on what is missing."""
        kept, layout = self._kept(), mixture_of(self.plan, self.model, self.request.target).layout.told(self._made())
        beside = companions(self.model)
        config = layout.config(kept, self._quantized())
        files = {**beside.files, "config.json": config_json(self.model, config, self.dtype, layout.old_rope_keys)}
        for name, content in layout.extra_files(kept).items():
            files[name] = json.dumps(content, indent=2).encode() + b"\n"
        if self.measured is not None:
            files[MEASUREMENT] = self.measured
        files[CARD] = self.card(output)
        files[PROVENANCE] = json.dumps(self._provenance(), indent=2).encode() + b"\n"
        return files, beside.notes

    def check_measurable(self, path: Path) -> None:
        """Refuse a text to measure on that would be refused after all the work.

        Raises:
            FewbitsError: it cannot be read, or is what the directory is calibrated on.
        """
        text = read_text(path)
        if self.text is not None and text.sha256 in self.text.sha256:
            raise FewbitsError(
                f"{path}: the directory is calibrated on it, which flatters.", "Measure on another text."
            )

    def tell_loss(self, output: Path, measured: Measured, work: WorkFolder) -> None:
        """Write the card anew, with what was measured."""
        with explained(output):
            (work.path / CARD).write_bytes(self.card(output, measured))
            sync(work.path / CARD)
            os.replace(work.path / CARD, output / CARD)

    def _provenance(self) -> dict[str, object]:
        """How the directory was made, for programs."""
        text = self.text
        return {
            "tool": self.plan.tool,
            "target": self.plan.target,
            "method": self.request.target.method,
            "command": self.command,
            "calibration_sha256": text.sha256 if text else [],
            "calibration_tokens": text.inputs.size if text else 0,
        }

    def card(self, output: Path, measured: Measured | None = None) -> bytes:
        """The model card.

        Args:
            output: the directory.
            measured: the loss, once it is known.
        """
        target, text = self.request.target, self.text
        mixture = mixture_of(self.plan, self.model, target)
        rest = ["-o", self.named or str(output), *_flags("--measure", [measured.text] if measured else [])]
        used = None
        if text is not None:
            names = [Path(name).name for name in text.datasets]
            used = CalibrationUsed(list(zip(names, text.sha256, strict=True)), text.inputs.size)
        facts = CardFacts(
            target=target.name,
            format=target.layout.quant_method,
            storage=", ".join(mixture.types),
            method=method_named(target.method).summary,
            command=f"{self.command} {shlex.join(rest)}",
            bits_per_weight=self.plan.bits_per_weight,
            size_before=sum(info.nbytes for info in self.model.checkpoint.tensors.values()),
            size_after=self.plan.weights_bytes,
            kept="embeddings, norms"
            + (", the head" if target.head is None else "")
            + (" and what --keep names" if self.request.keep else ""),
            library=LIBRARIES.get(target.layout.name, "transformers"),
            calibration=used,
            measured=measured,
            snippets=snippets(mixture.loader, runs_in(target.name, "vLLM")),
            notes=self.plan.notes,
        )
        return model_card(origin_of(self.model), facts)

    def _made(self) -> Made:
        """How the directory is made, for configurations."""
        target, todo = self.request.target, quantized_tensors(self.plan)
        layouts = {tensor.name: target.layout_of(tensor.codec) for tensor in todo}
        inside = block_linears(self.plan)
        mean = sum(layouts[tensor.name].type.bits * tensor.n_weights for tensor in inside)
        head = next((layouts[tensor.name] for tensor in todo if tensor.reason == HEAD), None)
        windows, length = self.text.inputs.shape if self.text is not None else (0, 0)
        return Made(
            target.rate or mean / max(1, sum(tensor.n_weights for tensor in inside)),
            round(head.type.bits) if head else None,
            windows,
            length,
            ", ".join(Path(name).name for name in self.text.datasets) if self.text is not None else "",
            {t.name.removesuffix(".weight"): (layouts[t.name], (t.shape[0], t.shape[1])) for t in todo},
            frozenset(t.name.removesuffix(".bias") for t in self.plan.tensors if t.name.endswith(".bias")),
        )

    def _quantized(self) -> list[str]:
        return [tensor.name.removesuffix(".weight") for tensor in quantized_tensors(self.plan)]

    def _kept(self) -> list[str]:
        """Linear modules that stay as they are, the head first: engines must be told."""
        inside = [tensor.name.removesuffix(".weight") for tensor in self.plan.tensors if tensor.reason == "kept"]
        return [*(["lm_head"] if self.request.target.head is None else []), *inside]


def _target(
    name: str,
    method: str | None,
    calibrated: bool,
    budget: Budget | None,
    edited: Path | None,
    head_bits: int | None,
) -> Target:
    """The target, with the types that the budget leaves it."""
    if budget is not None and edited is not None:
        raise FewbitsError("A saved plan and a budget.", "The plan says what everything becomes: leave out the budget.")
    decided = budget is not None or edited is not None
    if budget is not None and not target(name, method, True, decided).open:
        family, _, spec = name.strip().lower().partition(":")
        free = re.sub(r"^w\d+", "", spec)
        there = free != spec and bool(LAYOUTS[family].members(free))
        way_out = f"Take {family}:{free}, or leave" if there else "Leave"
        raise FewbitsError(f"{name}: a budget is for targets without bits in their name.", f"{way_out} out the budget.")
    chosen = target(name, method, calibrated, decided, head_bits)
    if chosen.rate is not None and budget is not None:
        raise FewbitsError(f"{name}: the target names its bits per weight.", "Leave out the budget.")
    return chosen.among(budget.types) if budget is not None else chosen


def _budget_flags(budget: Budget) -> list[str]:
    words = _flags("--size", [] if budget.size is None else [budget.size])
    words += _flags("--bpw", [] if budget.bpw is None else [budget.bpw])
    if budget.fit is not None:
        words += ["--fit", str(budget.fit), *_flags("--context", [budget.context] if budget.context else [])]
        words += ["--kv", budget.kv]
    return [*words, *_flags("--types", [",".join(budget.types)] if budget.types else [])]


def _flags(flag: str, values: Sequence[object]) -> list[str]:
    return [word for value in values for word in (flag, str(value))]


def _read(model: Model, texts: Sequence[Path], chunks: int | None) -> CalibrationText:
    statistics, plain = split_sources(texts)
    if statistics:
        raise FewbitsError(
            f"{statistics[0]}: these are statistics; a model directory is calibrated block by block on text.",
            "Pass the text itself.",
        )
    from fewbits.calibration.texts import read_texts  # imports torch, which data-free targets do without

    return read_texts(plain, model.tokenizer(), CONTEXT, chunks or CHUNKS)
