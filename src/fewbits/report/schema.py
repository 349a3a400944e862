"""A comparison as data: what the page shows, and what `report.json` holds."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fewbits.errors import FewbitsError
from fewbits.measure.metrics import Comparison, Estimate
from fewbits.measure.report import RulerUsed
from fewbits.plan.schema import first_problem
from fewbits.report.numbers import kl_text, percent_text, rate_text

Statistic = Literal["mean", "median", "p90", "p99"]
STATISTICS: tuple[Statistic, ...] = ("mean", "median", "p90", "p99")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FileUsed(_Record):
    """A file by name, size in bytes and the SHA-256 of all its bytes."""

    name: str
    size: int
    sha256: str


class ReferenceUsed(_Record):
    """The unquantized model.

    Attributes:
        fingerprint: SHA-256 over config, headers, sizes and samples of the weights (the whole is not hashed).
        size: bytes of its tensors.
        stored_as: its storage types, e.g. `BF16`.
    """

    path: str
    name: str
    architecture: str
    fingerprint: str
    n_weights: int
    size: int
    stored_as: str


class TextMeasured(_Record):
    """One text; `n_windows` of it were measured."""

    path: str
    name: str
    sha256: str
    n_windows: int


class MemoryLine(_Record):
    """What the user has: a graphics card's memory, or a size that was named. Bytes."""

    label: str
    size: int


class MemoryUsed(_Record):
    """Predicted memory of one device in bytes, every layer on it and the engine's margin included.

    Attributes:
        device: `GPU`, or `host` where there is none.
        certain: False where parts of the architecture are unknown: then this is an upper bound.
    """

    total: int
    device: str
    parts: dict[str, int]
    engine: str
    context: int
    certain: bool
    notes: list[str]


class Timing(_Record):
    """Tokens a second over repeated runs of `n_tokens`, each from an empty cache, after one that does not count."""

    n_tokens: int
    runs: int
    median: float
    low: float
    high: float


class Speed(_Record):
    """How fast an engine evaluates a prompt and generates, measured on the machine that made the report.

    Attributes:
        prompt: many tokens at once, as llama-bench's `pp`.
        generation: one after the other, as its `tg`.
        context: tokens that the engine's cache was made for.
    """

    engine: str
    processor: str
    threads: int
    context: int
    prompt: Timing
    generation: Timing


class Footprint(_Record):
    """Memory that an engine took on the processor, in bytes, beside what `fewbits memory` predicts for it.

    Attributes:
        reserved: by part, as the engine prints its buffers: `weights`, `kv_cache`, `recurrent_state`, `compute` and
            `output`.
        rearranged: copies of weights that were rearranged for this processor; those of the file that they replace are
            among `reserved`, too, and are given up when memory runs short.
        resident: peak resident memory of a process of its own, less what it had before the file was loaded: what was
            touched. None where the system does not tell.
        mapped: pages of the mapped file among these.
        predicted: by part; without the margin that is left to the rest of the machine.
        deviation: of the predicted sum from the reserved one, as a share of the latter.
        deviation_resident: from `resident`.
    """

    engine: str
    context: int
    kv: str
    reserved: dict[str, int]
    rearranged: int
    resident: int | None
    mapped: int | None
    predicted: dict[str, int]
    deviation: float
    deviation_resident: float | None


class SensitivityUsed(_Record):
    """Statistics by which errors of the weights were weighed."""

    path: str
    sha256: str
    datasets: list[str]


class Bucket(_Record):
    """Some of the positions: a range of the reference's confidence, or a text.

    Attributes:
        kl: None where there is no such position.
    """

    label: str
    n_scored: int
    kl: float | None
    same_top: float | None


class WorstToken(_Record):
    """A position where the two models differ most.

    Attributes:
        before: the text that leads to it, `actual` the token that follows in the text.
        expected: the reference's favourite with its probability, `given` the quantized model's.
        p_actual: the reference's probability of the actual token, `q_actual` the quantized model's.
        text: name of the text.
    """

    kl: float
    before: str
    actual: str
    p_actual: float
    q_actual: float
    expected: str
    p_expected: float
    given: str
    q_given: float
    text: str


class TensorRow(_Record):
    """One matrix, or all experts' matrices of one kind.

    Attributes:
        role: its name without layer number, e.g. `self_attn.q_proj`.
        layer: None outside the decoder blocks.
        type: storage type.
        bits: per weight, of this type in this place.
        error: squared error of the decoded weights divided by the reference's sum of squares; None where they cannot be
            compared.
        loss: KL divergence in nats a token that this error is expected to cost; None without sensitivities.
    """

    role: str
    layer: int | None
    type: str
    bits: float
    n_weights: int
    error: float | None
    loss: float | None = None


class Candidate(_Record):
    """One quantization, measured.

    Attributes:
        label: short and unique in the report.
        family: kind of storage, e.g. `K-quants`: what has one colour in the plots.
        format: `GGUF`, or what a directory's configuration calls its quantization.
        target: what it was made for, where that is known.
        size: bytes of the weight files, headers included.
        bits_per_weight: over every weight of the model, embeddings included, as llama.cpp counts.
        block_bits_per_weight: over the matrices of the decoder blocks alone, as EXL2 and the papers count.
        perplexity_difference: perplexity less the reference's; the interval is paired.
        window_kl: mean KL divergence of each window, in nats: two candidates of a report can be compared in pairs.
        histogram: positions by KL divergence, see `ComparisonReport.histogram_edges`.
        quantize_seconds: None where it was not made in this run.
        engines: that load it, as seen or read; empty where nothing is known.
        calibrated_on: marks of the calibration texts that the file names.
        speed: None where it was not asked for, or no engine on the machine runs the candidate; `footprint` likewise.
    """

    label: str
    path: str
    files: list[FileUsed]
    family: str
    format: str
    target: str | None
    size: int
    bits_per_weight: float
    block_bits_per_weight: float | None
    perplexity: Estimate
    perplexity_difference: Estimate
    comparison: Comparison
    within_noise: bool
    by_confidence: list[Bucket]
    by_text: list[Bucket]
    window_kl: list[float]
    histogram: list[int]
    worst: list[WorstToken]
    tensors: list[TensorRow]
    memory: MemoryUsed | None
    quantize_seconds: float | None
    measure_seconds: float
    engines: list[str]
    calibrated_on: list[str]
    warnings: list[str]
    speed: Speed | None = None
    footprint: Footprint | None = None

    @property
    def expected_loss(self) -> float | None:
        """Sum of what the errors of the matrices are expected to cost, in nats; None where that is not known."""
        known = [row.loss for row in self.tensors if row.loss is not None]
        return sum(known) if known else None

    def kl(self, statistic: Statistic) -> float:
        """KL divergence in nats."""
        summary = self.comparison.kl
        return summary.mean.value if statistic == "mean" else float(getattr(summary, statistic))


def _timings(candidate: Candidate) -> tuple[Timing | None, Timing | None]:
    speed = candidate.speed
    return (speed.prompt, speed.generation) if speed else (None, None)


def _sizes(candidate: Candidate) -> tuple[int | None, int | None, int | None]:
    """Predicted, reserved, resident."""
    found = candidate.footprint
    if found is None:
        return None, None, None
    return sum(found.predicted.values()), sum(found.reserved.values()), found.resident


class ComparisonReport(_Record):
    """Quantizations of one model on one ruler.

    Attributes:
        summary: the result in plain words, one sentence an item.
        histogram_edges: KL divergences in nats; `histogram` has one count below the first, one between each two and
            one above the last.
        overlap: what was found when calibration and measured texts were compared.
        command: that makes it again.
        date: ISO, UTC.
        seconds: wall time by step.
        sensitivity: what the expected losses of single matrices are from.
    """

    format_version: Literal[1] = 1
    tool_version: str
    date: str
    command: str
    engine: str
    engine_version: str
    kv: str | None
    reference: ReferenceUsed
    convention: RulerUsed
    texts: list[TextMeasured]
    n_windows: int
    n_scored: int
    reference_perplexity: Estimate
    noise_floor: Comparison | None
    candidates: list[Candidate]
    memory_line: MemoryLine | None
    memory_context: int | None
    histogram_edges: list[float]
    overlap: list[str]
    summary: list[str]
    seconds: dict[str, float]
    warnings: list[str]
    sensitivity: SensitivityUsed | None = None

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headers and rows for a terminal, largest first; `*` where no other is both smaller and nearer."""
        headers = [
            "candidate",
            "MB",
            "bits/weight",
            "KL mean",
            "± 95 %",
            "median",
            "99 %",
            "same top",
            "perplexity",
            "Δ PPL",
        ]
        headers += ["memory MB"] if self.memory_context else []
        timed, weighed = any(c.speed for c in self.candidates), any(c.footprint for c in self.candidates)
        headers += ["prompt tok/s", "generation tok/s"] if timed else []
        headers += ["CPU predicted MB", "reserved MB", "peak resident MB"] if weighed else []
        rows = []
        for c in sorted(self.candidates, key=lambda c: -c.size):
            mean = c.comparison.kl.mean
            beaten = any(o.size <= c.size and o.kl("mean") < c.kl("mean") for o in self.candidates if o is not c)
            row = [
                f"{c.label}{'' if beaten else ' *'}",
                f"{c.size / 1e6:,.1f}",
                f"{c.bits_per_weight:.2f}",
                kl_text(mean.value),
                kl_text((mean.high - mean.low) / 2),
                kl_text(c.kl("median")),
                kl_text(c.kl("p99")),
                percent_text(c.comparison.same_top.value),
                f"{c.perplexity.value:.3f}",
                f"{c.perplexity_difference.value:.3f}",
            ]
            if self.memory_context:
                row.append(f"{c.memory.total / 1e6:,.0f}" if c.memory else "")
            if timed:
                row += [rate_text(t.median) if t else "" for t in _timings(c)]
            if weighed:
                row += ["" if size is None else f"{size / 1e6:,.1f}" for size in _sizes(c)]
            rows.append(row)
        return headers, rows

    @classmethod
    def load(cls, path: str | Path) -> ComparisonReport:
        """Read a report.

        Raises:
            FewbitsError: it cannot be read, or is none.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise FewbitsError(f"{path}: {error.strerror or error}.", "Name what `fewbits compare` wrote.") from None
        except ValidationError as error:
            raise FewbitsError(f"{path}: {first_problem(error)}.", "Name what `fewbits compare` wrote.") from None
