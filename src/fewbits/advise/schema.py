"""What `fewbits advise` tells."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Bytes = Annotated[int, Field(ge=0)]
Fit = Literal["whole", "partly", "no"]
"""whole: on the GPU, or in RAM where there is none. partly: some layers stay in RAM. no: not on this machine."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LossFigure(_Strict):
    """One figure of what a target costs.

    Attributes:
        kind: measured by us, or published by others.
        model: that it was measured on.
        ruler: text and window; figures of different rulers do not compare.
        perplexity_increase: percent over the unquantized model; None where only a divergence is known.
        kl_divergence: mean, nats per token; None where only perplexity is known.
    """

    kind: Literal["measured", "published"]
    target: str
    model: str
    ruler: str
    perplexity_increase: float | None
    kl_divergence: float | None
    source: str


class ExpectedLoss(_Strict):
    """What a target may cost: the range of published figures, and every figure it rests on.

    Attributes:
        low, high: percent of perplexity, over the published figures of models of about this size; None without any.
        models: those they were measured on.
        text: the same in words.
    """

    low: float | None
    high: float | None
    models: list[str]
    text: str
    figures: list[LossFigure]


class Option(_Strict):
    """One way of running one model.

    Attributes:
        model: as the user named it, or the class of models.
        target: what `fewbits quantize` is to make; `as it is` for a file that is there already.
        can_make: whether fewbits makes it today.
        nearest: what does the same job today, where it does not.
        engine: for which the memory is predicted.
        runs_in: engines that are known to load it, `(seen)` or `(read)`.
        bits_per_weight: of the whole model; nominal where fewbits does not make it.
        file_bytes: of the tensors; None where they are not known.
        gpu_bytes, host_bytes: needed in all, cache and margins included.
        available: bytes of the device that decides.
        fits: None where it cannot be known.
        context, kv: that the memory is for.
        layers_on_gpu, n_layers: of a model that fits partly.
        max_context: longest that fits.
        tokens_per_second_at_most: what the GPU's memory bandwidth allows; real engines reach about half.
        note: what must be known of it.
    """

    model: str
    target: str
    can_make: bool
    nearest: str | None
    engine: str
    runs_in: list[str]
    bits_per_weight: float | None
    file_bytes: Bytes | None
    gpu_bytes: Bytes | None
    host_bytes: Bytes | None
    available: Bytes | None
    fits: Fit | None
    context: int
    kv: str
    layers_on_gpu: int | None
    n_layers: int | None
    max_context: int | None
    tokens_per_second_at_most: float | None
    loss: ExpectedLoss
    note: str = ""
    recommended: bool = False


class ScenarioRow(_Strict):
    """The row of the decision table that applied.

    Attributes:
        targets: what the row recommends.
        source: where the recommendation comes from.
    """

    name: str
    title: str
    targets: list[str]
    reason: str
    source: str


class LeverRow(_Strict):
    """Something to change: for memory or for speed.

    Attributes:
        effect: what it brings, with figures where they are known.
    """

    kind: Literal["memory", "speed"]
    name: str
    change: str
    effect: str


class NotYet(_Strict):
    """A target that fewbits cannot make yet."""

    target: str
    what: str
    nearest: str


class Step(_Strict):
    """A command to run next.

    Attributes:
        command: complete; of fewbits unless `foreign`.
        what: what it does.
        foreign: whether it belongs to another program.
    """

    command: str
    what: str
    foreign: bool = False


class Finding(_Strict):
    """One possible cause of a problem.

    Attributes:
        verdict: `likely` and `unlikely` rest on what was seen; `possible` could not be checked.
        evidence: what was seen.
        remedy: what to do.
    """

    cause: str
    verdict: Literal["likely", "possible", "unlikely"]
    evidence: str
    remedy: str


class Machine(_Strict):
    """The hardware that the advice is for.

    Attributes:
        gpus: names.
        vram, ram: bytes.
    """

    cpu: str
    cores: int
    ram: Bytes
    gpus: list[str]
    vram: Bytes
    unified: bool


class Advice(_Strict):
    """What to take, why, and what to do next.

    Attributes:
        sentence: the recommendation.
        engine: that the advice is for, named or chosen.
        context: tokens that memory is predicted for.
        scenario: the row of the table that applied; None for a diagnosis.
        options: ranked; the first is the recommended one.
        why: reasons, for somebody who does this for the first time.
        levers: what else to change for memory and speed.
        not_yet: what others would take here and fewbits cannot make.
        findings: causes of a problem that was asked about, the likeliest first.
        steps: commands.
    """

    format_version: Literal[1] = 1
    sentence: str
    machine: Machine
    engine: str
    use: str | None
    problem: str | None = None
    context: int
    scenario: ScenarioRow | None
    options: list[Option]
    why: list[str]
    levers: list[LeverRow]
    not_yet: list[NotYet]
    findings: list[Finding] = []
    steps: list[Step]
    notes: list[str]

    @property
    def recommended(self) -> Option | None:
        """The option to take, None if nothing runs."""
        return next((option for option in self.options if option.recommended), None)
