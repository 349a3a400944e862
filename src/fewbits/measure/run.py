"""Measuring one model: perplexity and, against a reference, KL divergence."""

from __future__ import annotations

from pathlib import Path

from fewbits.checkpoint import open_model
from fewbits.errors import FewbitsError
from fewbits.forward.clock import Clock
from fewbits.forward.streamed import Progress
from fewbits.forward.text import read_text
from fewbits.measure.metrics import compare, perplexity
from fewbits.measure.report import MeasureReport, RulerUsed, TextUsed, TokenizerUsed
from fewbits.measure.windows import get_ruler
from fewbits.measure.yardstick import ENGINES, Yardstick, check_engine, refuse_calibration_text
from fewbits.version import __version__

__all__ = ["ENGINES", "measure"]


def measure(
    model: str | Path,
    text: str | Path,
    *,
    reference: str | Path | None = None,
    convention: str = "llama.cpp",
    chunks: int | None = None,
    context: int | None = None,
    engine: str = "torch",
    noise_floor: bool = False,
    cache: bool | Path = True,
    threads: int | None = None,
    kv: str | None = None,
    progress: Progress | None = None,
) -> MeasureReport:
    """Perplexity of a model on a text and, against a reference, KL divergence.

    The reference runs in torch with float32 arithmetic, whatever the engine of the measured model. Its tokenizer cuts
    the text for both.

    Args:
        model: directory, GGUF file or hub id.
        text: path of a UTF-8 text file that was not used for calibration.
        reference: the unquantized model; None measures perplexity alone.
        convention: `llama.cpp` (512 tokens, second half scored) or `hf` (2048, all scored).
        chunks: at most so many windows; None means all.
        context: another window length than the convention's.
        engine: `torch`, or `llama.cpp` for GGUF files in the real engine.
        noise_floor: also measure the reference against its own bfloat16 rounding.
        cache: keep the reference's answers for later runs, in the default cache folder or the one given.
        threads: of the engines; None means all cores.
        kv: type of the measured model's KV cache, e.g. `q8_0`: llama.cpp's own with that engine, simulated in torch
            (see `measure.kv`); None for the engine's own (float16 in llama.cpp, float32 in torch).
        progress: called with (done, total, what).

    Raises:
        FewbitsError: unknown convention or engine, unreadable or too short text, models that do not fit each other,
            a missing tensor.
    """
    if noise_floor and reference is None:
        raise FewbitsError("A noise floor needs a reference.", "Pass --reference.")
    ruler = get_ruler(convention, context)
    passage = read_text(Path(text))
    measured = open_model(model)
    check_engine(engine, kv, measured)
    refuse_calibration_text(measured, passage)
    base = open_model(reference) if reference is not None else None
    owner = base or measured
    clock = Clock()
    yardstick = Yardstick(
        owner,
        [passage],
        ruler,
        has_reference=base is not None,
        chunks=chunks,
        cache=cache,
        threads=threads,
        clock=clock,
        progress=progress,
    )
    found, windows = yardstick.measure(measured, engine, kv), yardstick.windows
    return MeasureReport(
        model=str(measured.path),
        reference=str(base.path) if base else None,
        engine=engine,
        engine_version=found.engine_version,
        kv=kv,
        tool_version=__version__,
        convention=RulerUsed.of(ruler),
        text=TextUsed(path=str(passage.path), sha256=passage.sha256, n_tokens=windows.n_text_tokens),
        tokenizer=TokenizerUsed(
            source=str(owner.path),
            bos=windows.bos if ruler.bos_per_window else None,
            same_as_models=found.same_tokenizer,
        ),
        n_windows=len(windows.inputs),
        n_scored=windows.targets.size,
        perplexity=perplexity(found.positions.nll),
        comparison=compare(found.positions) if base else None,
        noise_floor=yardstick.noise_floor() if noise_floor else None,
        reference_reused=yardstick.reused,
        seconds=clock.seconds,
        warnings=found.warnings,
    )
