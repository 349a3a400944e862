"""What a measurement found, as data."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from fewbits.measure.metrics import Comparison, Estimate
from fewbits.measure.windows import Ruler


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RulerUsed(_Record):
    """The convention of a figure; without it the figure means nothing."""

    name: str
    context: int
    scored_per_window: int
    bos_per_window: bool
    description: str

    @staticmethod
    def of(ruler: Ruler) -> RulerUsed:
        return RulerUsed(
            name=ruler.name,
            context=ruler.context,
            scored_per_window=ruler.scored_per_window,
            bos_per_window=ruler.bos_per_window,
            description=ruler.description,
        )


class TextUsed(_Record):
    """The text and how much of it was measured. `sha256` is of the file's bytes."""

    path: str
    sha256: str
    n_tokens: int


class TokenizerUsed(_Record):
    """Whose tokenizer cut the text.

    Attributes:
        source: path of the model it belongs to (the reference's where there is one).
        bos: token id put at each window's start, None if the tokenizer adds none or the ruler puts none.
        same_as_models: whether the measured model's own tokenizer makes the same ids of the text's beginning; None if
            it was not compared.
    """

    source: str
    bos: int | None
    same_as_models: bool | None


class MeasureReport(_Record):
    """A model's quality on one text, by one ruler.

    Attributes:
        model: path; `reference` likewise, None where only perplexity was asked for.
        engine: `torch` (float32 arithmetic) or `llama.cpp`; the reference always runs in torch.
        kv: type of the measured model's KV cache, None for the engine's own.
        comparison: against the reference.
        noise_floor: the reference with weights, residual stream and head input rounded to bfloat16, against itself:
            a divergence below this is not distinguishable from how the reference is run.
        reference_reused: the reference's answers came from the cache.
        seconds: wall time by step.
        warnings: what to keep in mind when reading the figures.
    """

    model: str
    reference: str | None
    engine: str
    engine_version: str
    kv: str | None = None
    tool_version: str
    convention: RulerUsed
    text: TextUsed
    tokenizer: TokenizerUsed
    n_windows: int
    n_scored: int
    perplexity: Estimate
    comparison: Comparison | None
    noise_floor: Comparison | None
    reference_reused: bool | None
    seconds: dict[str, float]
    warnings: list[str]

    def rows(self) -> list[tuple[str, str, str]]:
        """The figures as text: name, value, 95 % interval."""
        found = [("perplexity", *_shown(self.perplexity, ".4f"))]
        if self.comparison is not None:
            c = self.comparison
            found += [
                ("reference perplexity", *_shown(c.reference_perplexity, ".4f")),
                ("perplexity ratio", *_shown(c.perplexity_ratio, ".5f")),
                ("KL divergence, mean", *_shown(c.kl.mean, ".6f")),
                ("KL divergence, median", f"{c.kl.median:.6f}", ""),
                ("KL divergence, 90 %", f"{c.kl.p90:.6f}", ""),
                ("KL divergence, 99 %", f"{c.kl.p99:.6f}", ""),
                ("KL divergence, 99.9 %", f"{c.kl.p999:.6f}", ""),
                ("KL divergence, max", f"{c.kl.max:.6f}", ""),
                ("same top token, %", *_shown(c.same_top, ".3f", 100)),
                ("RMS delta p, %", *_shown(c.rms_delta_p, ".3f", 100)),
            ]
        if self.noise_floor is not None:
            found += [
                ("noise floor: KL, mean", *_shown(self.noise_floor.kl.mean, ".6f")),
                ("noise floor: same top, %", *_shown(self.noise_floor.same_top, ".3f", 100)),
            ]
        return found

    def ruler(self) -> str:
        """One sentence that says what the figures are."""
        return (
            f"{self.convention.name} convention ({self.convention.description}): {self.n_windows} windows, "
            f"{self.n_scored} positions scored, in {self.engine}{self._cache()}; intervals are 95 %, from the means of "
            "windows."
        )

    def _cache(self) -> str:
        if self.kv is None:
            return ""
        return f" with a KV cache of {self.kv}" + (" (simulated)" if self.engine == "torch" else "")


def _shown(value: Estimate, style: str, scale: float = 1.0) -> tuple[str, str]:
    low, high = format(value.low * scale, style), format(value.high * scale, style)
    return format(value.value * scale, style), f"{low} .. {high}"
