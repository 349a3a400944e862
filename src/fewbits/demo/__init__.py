"""The main job on the embedded model: quantize to three levels, measure each, run one."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from fewbits.api import quantize
from fewbits.generate import Generation, generate
from fewbits.measure import measure

MODEL = Path(__file__).parent / "model"
TEXT = Path(__file__).parent / "held_out.txt"
LEVELS = ("Q8_0", "Q4_K_M", "Q2_K")
PROMPT = "ROMEO:\n"


class DemoRow(BaseModel):
    """One level: its file, its size and what it lost."""

    model_config = ConfigDict(extra="forbid")
    level: str
    file: str
    size: int
    bits_per_weight: float
    perplexity: float
    kl_divergence: float | None
    seconds: float


class DemoReport(BaseModel):
    """The table that `make demo` prints."""

    model_config = ConfigDict(extra="forbid")
    rows: list[DemoRow]
    ruler: str
    sample: Generation


def demo(folder: Path, say: Callable[[str], None], chunks: int | None = 24) -> DemoReport:
    """Quantize the embedded model into `folder`, measure each level on text it never saw, and let one speak.

    Args:
        chunks: windows of the held-out text to measure.
    """
    rows: list[DemoRow] = []
    ruler = ""
    for level in LEVELS:
        started = time.monotonic()
        say(f"{level}: quantizing and measuring")
        made = quantize(MODEL, level, folder / f"demo-{level}.gguf", overwrite=True)
        report = measure(folder / f"demo-{level}.gguf", TEXT, reference=MODEL, chunks=chunks)
        ruler = report.ruler()
        assert report.comparison is not None  # there is a reference
        if not rows:
            weights_bytes = sum(file.stat().st_size for file in MODEL.glob("*.safetensors"))
            rows.append(
                DemoRow(
                    level="bf16 (reference)",
                    file=MODEL.name,
                    size=weights_bytes,
                    bits_per_weight=16,
                    perplexity=report.comparison.reference_perplexity.value,
                    kl_divergence=None,
                    seconds=0,
                )
            )
        rows.append(
            DemoRow(
                level=level,
                file=str(folder / f"demo-{level}.gguf"),
                size=made.size,
                bits_per_weight=made.bits_per_weight,
                perplexity=report.perplexity.value,
                kl_divergence=report.comparison.kl.mean.value,
                seconds=time.monotonic() - started,
            )
        )
    engine = "llama.cpp" if importlib.util.find_spec("llama_cpp") else "transformers"
    say(f"letting {LEVELS[1]} speak through {engine}")
    sample = generate(str(folder / f"demo-{LEVELS[1]}.gguf"), PROMPT, tokens=48)
    return DemoReport(rows=rows, ruler=ruler, sample=sample)
