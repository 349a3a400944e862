"""From what a user asked for to a finished GGUF file: statistics, Hessians, a budget, the plan, execution."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fewbits.calibration.imatrix_files import read_statistics
from fewbits.calibration.statistics import Statistics
from fewbits.checkpoint import Model, open_checkpoint, open_model
from fewbits.errors import FewbitsError
from fewbits.formats.atomic import check_output
from fewbits.formats.facts import Facts
from fewbits.formats.gguf.source import GGUFSource, gguf_source
from fewbits.formats.journal import published
from fewbits.formats.work import WorkFolder
from fewbits.forward.identity import digests, file_facts
from fewbits.limits import Limits
from fewbits.methods.base import Effort
from fewbits.plan import Plan
from fewbits.quantize.budget import TARGET, Budget, plan_budget
from fewbits.quantize.execute import QuantizeReport, check, execute
from fewbits.quantize.facts import common_facts, text_facts
from fewbits.quantize.gguf_blockwise import GGUFBlockwise, linears_of, planned_blockwise
from fewbits.quantize.hessians import Factors, with_feedback
from fewbits.quantize.importances import (
    CHUNKS,
    CONTEXT,
    Importances,
    Progress,
    calibrate_texts,
    calibration_device,
    importances_of,
    promised,
    split_sources,
    uses_importances,
    with_provenance,
)
from fewbits.quantize.learned import Learned
from fewbits.quantize.memory_need import gguf_limits, text_run
from fewbits.quantize.planning import PlanRequest, default_output, make_plan
from fewbits.spill import Spill
from fewbits.workers import Workers

if TYPE_CHECKING:
    from fewbits.calibration.texts import CalibrationText

STATISTICS, PLAN = "statistics.gguf", "plan.json"
"""Within the work folder."""


@dataclass(frozen=True)
class GGUFJob:
    """A model, what is to be made of it, and with what.

    Attributes:
        calibration: statistics files or texts, or both: then the texts are for error feedback alone.
        chunks: most windows of texts.
        budget: how much the file may take, where types are chosen freely.
        effort: how much time to take where there is text: `fast` looks at it once, `default` also quantizes block by
            block with error feedback.
        max_memory: most bytes of memory to use; None: no limit.
        workers: of a cluster, who take slabs, matrices and windows of text; budgets are spent here.
        device: of torch, where texts run through the model and Hessians are summed and factored.
    """

    model: str | Path
    source: GGUFSource
    request: PlanRequest
    calibration: list[Path]
    chunks: int | None
    factors: Factors | None
    budget: Budget | None
    threads: int | None
    progress: Progress | None
    effort: Effort = "default"
    workers: Workers | None = None
    max_memory: int | None = None
    device: str = "cpu"

    @staticmethod
    def of(
        model: str | Path,
        request: PlanRequest,
        pre_tokenizer: str | None,
        calibration: Sequence[Path],
        chunks: int | None,
        hessians: Path | None,
        budget: Budget | None,
        threads: int | None,
        progress: Progress | None,
        effort: Effort = "default",
        workers: Workers | None = None,
        device: str = "cpu",
    ) -> GGUFJob:
        """Read the headers.

        Args:
            request: without an output, the usual name is taken.
            device: `cpu`, `cuda` or `auto`.

        Raises:
            FewbitsError: options that do not go together, an unknown architecture or tokenizer.
        """
        target = request.target
        free = target.strip().upper() == TARGET
        if budget is not None and not free:
            raise FewbitsError(f"{target}: a budget is for the target gguf.", "Take gguf, or leave out the budget.")
        if free and (budget is None) == (request.edited is None):
            raise FewbitsError(
                "The target gguf needs a budget or a saved plan.", "Pass --size, --bpw or --fit, or --plan."
            )
        if hessians and not calibration:
            raise FewbitsError(
                f"{hessians}: Hessians alone do not choose scales.", "Pass the statistics made with them, too."
            )
        files, texts = split_sources(calibration)
        if files and texts and (effort == "fast" or hessians):
            raise FewbitsError(
                f"{texts[0]}: a text beside the statistics {files[0]}, which has no effect here.",
                "Make one file of both: `fewbits calibrate MODEL --text TEXT --merge STATISTICS -o BOTH`; or leave "
                "--effort at default.",
            )
        device = calibration_device(device, bool(texts), target, workers)
        source = gguf_source(open_checkpoint(model), pre_tokenizer)
        if budget and budget.like:
            mixture = replace(request.mixture, has_imatrix=bool(calibration))
            alike = make_plan(source, PlanRequest(budget.like, mixture, output=request.output))
            budget = replace(budget, like=None, size=alike.files[0].size)
        budget = budget.as_size(model) if budget else None
        request = replace(request, output=request.output or default_output(source.path, target))
        factors = Factors(hessians) if hessians else None
        options = (factors, budget, threads, progress, effort, workers)
        return GGUFJob(model, source, request, list(calibration), chunks, *options, device=device)

    @property
    def output(self) -> Path:
        assert self.request.output is not None
        return self.request.output

    def plan(self) -> Plan:
        """The plan from headers alone; for a budget, weights are read and texts run, and nothing is kept of that."""
        if not self.calibration:
            return self._made(None, self.output)[1]
        statistics, file = promised(self.model, self.calibration, self.output, self.chunks, overwrite=True)
        if self.budget is not None and not statistics.tensors:
            statistics = self._run(None)
        return self._made(statistics, file)[1]

    def work_folder(self, overwrite: bool) -> WorkFolder:
        """Around `execute`: what an interrupted run has left is gone on from.

        Raises:
            FewbitsError: the result would be refused; said before weights are read and texts run.
        """
        if self.request.split_max_size is None:  # the names of a set depend on how many there are
            check_output(self.output, overwrite)
        if self.calibration:
            promised(self.model, self.calibration, self.output, self.chunks, overwrite or published(self.output))
        return WorkFolder(self.output, self.facts, overwrite)

    def execute(self, work: WorkFolder, overwrite: bool) -> QuantizeReport:
        """Make the file; texts are run first, and what they give is kept beside it."""
        if work.report is not None:
            return QuantizeReport.model_validate(work.report)
        started = time.monotonic()
        if not self.calibration:
            plan = self._made(None, self.output, work)[1]
            return self._write(plan, self.source, work, overwrite, Learned(), self._limits(plan))
        statistics, file = promised(self.model, self.calibration, self.output, self.chunks, overwrite=True)
        made = work.path / STATISTICS
        beside = {}
        if not statistics.tensors:
            source, plan, found = self._made(statistics, file)
            self._limits(plan)  # refuses before the texts run
            if self.budget is None:  # how large a mixture gets is not known yet
                check(plan, source, self.output, overwrite, feedback=True)
            if found is not None:
                statistics = read_statistics(made) if work.has(STATISTICS) else self._run(made)
                if not work.has(STATISTICS):
                    work.done(STATISTICS)
                beside = {made: file}
        source, plan, found = self._made(statistics, file, work)
        limits = self._limits(plan)  # of a budget the types, too, are known now
        blockwise = None
        if self.feeds_back and found is not None:
            state = work.path / "activations"
            run = (plan, self._opened, self._text, state, self.threads, self.progress, self.effort)
            blockwise = GGUFBlockwise(*run, limits, self.workers, self.device)
        learned = Learned(found or {}, self.factors)
        report = self._write(plan, source, work, overwrite, learned, limits, blockwise, beside)
        return report.model_copy(update={"seconds": time.monotonic() - started})

    def _write(
        self,
        plan: Plan,
        source: GGUFSource,
        work: WorkFolder,
        overwrite: bool,
        learned: Learned,
        limits: Limits,
        blockwise: GGUFBlockwise | None = None,
        beside: Mapping[Path, Path] | None = None,
    ) -> QuantizeReport:
        options = (limits.threads, overwrite, self.progress, learned, blockwise, beside, self.workers)
        return execute(plan, source, work, *options)

    @property
    def facts(self) -> Facts:
        """Everything that the files follow from."""
        mixture = {name: value for name, value in asdict(self.request.mixture).items() if value}
        files, texts = split_sources(self.calibration)
        return {
            **common_facts(
                open_checkpoint(self.model), self.request.target, self.effort, self.budget, self.request.edited
            ),
            "mixture": mixture,
            "split size": self.request.split_max_size,
            "statistics": digests(files),
            "Hessians": file_facts(self.factors.folder.glob("*")) if self.factors else None,
            **text_facts(self._text if texts else None, self.threads, self.device),
        }

    @property
    def feeds_back(self) -> bool:
        """Whether text runs through the model while it is quantized."""
        return self.effort != "fast" and not self.factors and bool(split_sources(self.calibration)[1])

    def _limits(self, plan: Plan) -> Limits:
        """How to keep within the memory that may be used.

        Raises:
            FewbitsError: that cannot be.
        """
        widest = max((t.shape[-1] for t in plan.tensors if t.method == "gptq"), default=0) if self.factors else 0
        limits, beside = gguf_limits(plan, self.max_memory, self.threads, widest), self.output.absolute().parent
        if self.max_memory is None or not self.feeds_back:
            return replace(limits, spill=Spill(folder=beside))
        windows, context = self._text.inputs.shape
        # GGUF's blocks are tuned by this effort alone
        run = text_run(plan, self._opened, windows, context, self.effort == "thorough")
        return run.limits(self.max_memory, beside, limits.threads)

    @cached_property
    def _opened(self) -> Model:
        return open_model(self.model)

    @cached_property
    def _text(self) -> CalibrationText:
        from fewbits.calibration.texts import read_texts  # imports torch, which most runs do without

        return read_texts(split_sources(self.calibration)[1], self._opened.tokenizer(), CONTEXT, self.chunks or CHUNKS)

    def _run(self, kept: Path | None) -> Statistics:
        texts = split_sources(self.calibration)[1]
        gradients = self.budget is not None
        return calibrate_texts(
            *(self.model, texts, kept, self.chunks, gradients, self.threads, True, self.progress),
            *(self.max_memory, self.workers, self.device),
        )  # fmt: skip

    def _made(
        self, statistics: Statistics | None, file: Path, work: WorkFolder | None = None
    ) -> tuple[GGUFSource, Plan, Importances | None]:
        """What `execute` needs. Importances are empty where statistics are only promised, None where the target has
        no use for them."""
        if statistics is None:
            plan = make_plan(self.source, self.request)
            return self.source, self._within_budget(self.source, plan, None, file, work), None
        told = with_provenance(self.source, statistics, file)
        mixture = replace(self.request.mixture, has_imatrix=True)
        plan = make_plan(told, replace(self.request, mixture=mixture))
        if self.budget is not None and not statistics.tensors:
            return told, plan, {}
        plan = self._within_budget(told, plan, statistics, file, work)
        if not any(uses_importances(tensor) for tensor in plan.tensors):
            plan = make_plan(self.source, self.request) if self.budget is None else plan
            note = "this target has no use for calibration"
            return self.source, plan.model_copy(update={"notes": [*plan.notes, note]}), None
        if self.factors:
            plan = with_feedback(plan, self.factors, statistics.texts_sha256)
        elif self.feeds_back:
            plan = planned_blockwise(plan, self._opened, self._text.inputs.size)
        if not statistics.tensors:
            return told, plan, {}
        found, notes = importances_of(plan, statistics, file)
        return told, plan.model_copy(update={"notes": [*plan.notes, *notes]}), found

    def _within_budget(
        self, source: GGUFSource, plan: Plan, statistics: Statistics | None, file: Path, work: WorkFolder | None
    ) -> Plan:
        if self.budget is None:
            return plan
        if work and (known := work.read(PLAN)):
            return Plan.model_validate_json(known)
        learned = Learned({}, self.factors)
        fed_back = linears_of(self._opened) if self.feeds_back else ()
        spent = plan_budget(
            source, plan, self.budget, self.output, statistics, file, learned, self.threads, self.progress, fed_back
        )  # fmt: skip
        if work:
            work.keep(PLAN, spent.model_dump_json().encode())
        return spent
