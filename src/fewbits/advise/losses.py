"""What targets cost, as published and as measured here: data with model, ruler and source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fewbits.advise.schema import ExpectedLoss, LossFigure

SMALL = 1e9
"""Below so many weights, our own figures say more than those of 8B models: small models lose more."""
LARGE = 50e9
"""From so many weights on, the figures of 70B models say more than those of 8B models."""


@dataclass(frozen=True)
class Series:
    """Figures of one source, on one model and one ruler.

    Attributes:
        large: whether the model is one of about 70B weights.
        baseline: perplexity of the unquantized model.
        values: target -> (perplexity or None, mean KL divergence or None).
    """

    kind: Literal["measured", "published"]
    model: str
    large: bool
    ruler: str
    source: str
    baseline: float | None
    values: Mapping[str, tuple[float | None, float | None]]


_WIKI = "wikitext-2, context"
_OURS = "wiki.test.raw, 24 windows of 512, second halves"

SERIES = (
    Series(
        "published", "an 8B Llama", False, "wikitext-2", "field guide (several guides)", 6.14,
        {
            "IQ2_XS": (8.10, None), "Q2_K": (7.62, None), "Q3_K_S": (6.79, None), "Q3_K_M": (6.58, None),
            "Q4_K_S": (6.36, None), "Q4_K_M": (6.32, None), "Q5_K_M": (6.21, None), "Q6_K": (6.17, None),
            "Q8_0": (6.15, None),
        },
    ),
    Series(
        "published", "Llama 3 8B", False, f"{_WIKI} 512, importance matrix from 3 bits down",
        "llama.cpp tools/perplexity/README.md", 6.233,
        {
            "Q8_0": (6.234, 0.00136), "Q6_K": (6.253, 0.00545), "Q5_K_M": (6.289, 0.0108), "Q5_K_S": (6.337, 0.0166),
            "Q4_K_M": (6.383, 0.0282), "Q4_K_S": (6.410, 0.0320), "IQ4_NL": (6.456, 0.0357), "IQ4_XS": (6.460, 0.0363),
            "Q4_0": (6.700, 0.0719), "Q3_K_L": (6.671, 0.0731), "Q3_K_M": (6.734, 0.0844), "IQ3_M": (6.898, 0.1025),
            "IQ3_S": (6.966, 0.1113), "IQ3_XS": (7.163, 0.1387), "IQ3_XXS": (7.458, 0.1836), "Q3_K_S": (7.603, 0.1998),
            "IQ2_M": (8.601, 0.326), "Q2_K": (8.65, 0.332), "IQ2_S": (9.651, 0.439), "IQ2_XS": (10.761, 0.546),
            "IQ2_XXS": (14.09, 0.812), "IQ1_M": (25.49, 1.393),
        },
    ),
    Series(
        "published", "Llama 2 7B", False, f"{_WIKI} 512", "llama.cpp tools/perplexity/README.md", 1.0,
        {"Q8_0": (None, 0.00037), "Q6_K": (None, 0.0021), "Q4_K_M": (1.0142, 0.01269), "Q2_K": (1.108, 0.1089)},
    ),
    Series(
        "published", "Llama 3.1 8B Instruct", False, "wikitext-2, own harness", "IST gptq-gguf-toolkit README", 6.73,
        {"Q2_K": (8.73, None), "Q3_K_M": (7.18, None), "Q4_K_M": (6.87, None), "Q5_K_M": (6.79, None)},
    ),
    Series(
        "published", "Llama 3.1 8B Instruct", False, "wikitext-2, read off a plot; over EXL3 at 8 bits",
        "exllamav3 doc/llama31_8b_instruct_bpw.png", 7.637,
        {
            "exl2:3.0bpw": (9.995, None), "exl2:3.5bpw": (8.592, None), "exl2:4.0bpw": (8.094, None),
            "exl2:4.5bpw": (7.840, None), "exl2:5.0bpw": (7.783, None), "exl2:6.0bpw": (7.676, None),
            "exl3:2.0bpw": (10.516, None), "exl3:3.0bpw": (8.159, None), "exl3:3.5bpw": (7.931, None),
            "exl3:4.0bpw": (7.729, None), "exl3:5.0bpw": (7.665, None), "exl3:6.0bpw": (7.642, None),
            "IQ2_S": (10.818, None), "IQ2_M": (9.929, None), "IQ3_S": (8.299, None), "IQ3_M": (8.223, None),
            "IQ4_XS": (7.840, None), "Q4_K_M": (7.810, None), "Q5_K_M": (7.699, None), "Q6_K": (7.671, None),
            "aqlm:1x16g8": (10.261, None),
        },
    ),
    Series(
        "published", "a 70B Llama 3", True, "wikitext-2, read off a plot; over EXL3 at 6 bits",
        "exllamav3 doc (70B plot)", 3.656,
        {
            "exl3:2.0bpw": (6.608, None), "exl3:3.0bpw": (4.502, None), "exl3:4.0bpw": (3.853, None),
            "exl2:4.0bpw": (4.060, None), "exl2:5.0bpw": (3.743, None), "IQ2_XXS": (7.518, None),
            "IQ3_XXS": (5.417, None), "IQ4_XS": (3.921, None), "Q4_K_M": (3.806, None), "Q5_K_M": (3.683, None),
            "awq:w4g128": (4.191, None), "aqlm:1x16g8": (6.546, None),
        },
    ),
    Series(
        "published", "Llama 3 8B", False, f"{_WIKI} 2048", "arXiv 2404.14047", 6.1,
        {
            "gptq:w4g128": (6.5, None), "awq:w4g128": (6.6, None), "gptq:w3g128": (8.2, None),
            "awq:w3g128": (8.2, None),
        },
    ),
    Series(
        "published", "Llama 3 8B", False, f"{_WIKI} 8192", "ParoQuant", 5.54, {"awq:w4g128": (5.92, None)},
    ),
    Series(
        "published", "Llama 2 7B", False, f"{_WIKI} 2048", "llm-awq #109", 5.47, {"awq:w4g128": (5.60, None)},
    ),
    Series(
        "published", "LLaMA 7B", False, f"{_WIKI} 2048", "GPTQ README", 5.68, {"gptq:w3g128": (6.61, None)},
    ),
    Series(
        "published", "Llama 2 7B", False, f"{_WIKI} 4096", "AQLM README", 5.12, {"aqlm:1x16g8": (5.92, None)},
    ),
    Series(
        "measured", "smollm2-768 (135M), with calibration", False, _OURS, "docs/benchmarks.md", None,
        {
            "Q4_K_M": (None, 0.10082), "Q3_K_M": (None, 0.36903), "Q2_K": (None, 1.14193), "IQ4_XS": (None, 0.15214),
            "IQ3_S": (None, 0.40755), "IQ2_XS": (None, 1.71883),
        },
    ),
    Series(
        "measured", "smollm2-768 (135M), without calibration", False, _OURS, "docs/benchmarks.md", None,
        {
            "Q8_0": (None, 0.00506), "Q6_K": (None, 0.04014), "Q5_K_M": (None, 0.07147), "Q4_K_M": (None, 0.20788),
            "Q3_K_M": (None, 0.74711), "Q2_K": (None, 3.65076),
        },
    ),
    Series(
        "measured", "smollm2-576 (135M), with calibration", False, _OURS, "docs/benchmarks.md", None,
        {
            "Q4_K_M": (None, 0.06381), "Q3_K_M": (None, 0.18217), "Q2_K": (None, 0.38042), "IQ4_NL": (None, 0.17756),
            "Q4_0": (None, 0.25909), "gptq:w4g64": (None, 0.1647), "gptq:w3g64": (None, 0.6146),
        },
    ),
    Series(
        "measured", "smollm2-576 (135M), with calibration", False, "wiki.test.raw, 64 windows", "docs/benchmarks.md",
        None, {"awq:w4g64": (None, 0.135)},
    ),
    Series(
        "measured", "smollm2-576 (135M), SmoothQuant", False, "wiki.test.raw, real 8-bit activations",
        "docs/benchmarks.md", None, {"ct:w8a8": (None, 0.0135)},
    ),
)  # fmt: skip

SAME = {"gptq:w4g128": "gptq:w4g64", "gptq:w3g128": "gptq:w3g64", "awq:w4g128": "awq:w4g64"}
"""Targets that our own figures are nearest to: small models have no groups of 128."""
LOSSLESS = ("BF16", "F16", "F32")


def expected_loss(target: str, n_weights: float) -> ExpectedLoss:
    """What a target may cost a model of so many weights."""
    if target in LOSSLESS:
        return ExpectedLoss(low=0.0, high=0.0, models=[], text="none", figures=[])
    figures = _figures(target, n_weights >= LARGE) or _figures(target, False)
    increases = [f.perplexity_increase for f in figures if f.perplexity_increase is not None]
    published = [f.model for f in figures if f.perplexity_increase is not None]
    low, high = (min(increases), max(increases)) if increases else (None, None)
    return ExpectedLoss(
        low=low,
        high=high,
        models=list(dict.fromkeys(published)),
        text=_text(low, high, figures, n_weights < SMALL),
        figures=figures,
    )


def _figures(target: str, large: bool) -> list[LossFigure]:
    found = []
    for series in SERIES:
        names = {target, SAME.get(target, target)} if series.kind == "measured" else {target}
        if series.kind == "published" and series.large != large:
            continue
        for name in sorted(names & series.values.keys()):
            perplexity, divergence = series.values[name]
            over = None if perplexity is None or series.baseline is None else 100 * (perplexity / series.baseline - 1)
            found.append(
                LossFigure(
                    kind=series.kind,
                    target=name,
                    model=series.model,
                    ruler=series.ruler,
                    perplexity_increase=None if over is None else round(over, 1),
                    kl_divergence=divergence,
                    source=series.source,
                )
            )
    # without a published figure of this size there is nothing that is known of it
    return found if not large or any(figure.kind == "published" for figure in found) else []


def _text(low: float | None, high: float | None, figures: list[LossFigure], small: bool) -> str:
    divergences = sorted(f.kl_divergence for f in figures if f.kind == "measured" and f.kl_divergence is not None)
    if divergences and (small or low is None):
        spread = f"{divergences[0]:.2g} to {divergences[-1]:.2g}" if len(divergences) > 1 else f"{divergences[0]:.2g}"
        return f"KL {spread} (135M)"
    if low is None or high is None:
        return "no figure known"
    more = "over " if small else ""
    if high < 0.1:
        return f"{more}0.1 %" if small else "below 0.1 %"
    return f"{more}{low:.1f} to {high:.1f} %" if high - low >= 0.1 and not small else f"{more}{high:.1f} %"
