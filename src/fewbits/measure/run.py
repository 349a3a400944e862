"""One measurement from beginning to end."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fewbits.calibration.statistics import DATASET_KEY, text_mark
from fewbits.checkpoint import GGUFCheckpoint, Model, open_model
from fewbits.checkpoint.safetensors import PROVENANCE, read_json
from fewbits.errors import FewbitsError
from fewbits.forward.clock import Clock
from fewbits.forward.identity import fingerprint
from fewbits.forward.streamed import Progress, StreamedModel, torch_threads
from fewbits.forward.text import Text, encode, read_text
from fewbits.measure.llama_cpp_engine import LlamaCppLogits, engine_version
from fewbits.measure.metrics import Comparison, LogitSource, StateLogits, compare, perplexity, score
from fewbits.measure.reference import ReferenceStore, default_cache
from fewbits.measure.report import MeasureReport, RulerUsed, TextUsed, TokenizerUsed
from fewbits.measure.windows import Windows, cut, get_ruler
from fewbits.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ENGINES = ("torch", "llama.cpp")
COMPARED_CHARACTERS = 20_000
"""How much of the text both tokenizers encode to tell whether they are the same."""
FEW_WINDOWS = 8


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
        progress: called with (done, total, what).

    Raises:
        FewbitsError: unknown convention or engine, unreadable or too short text, models that do not fit each other,
            a missing tensor.
    """
    if engine not in ENGINES:
        raise FewbitsError(f"Unknown engine {engine!r}.", f"Known: {', '.join(ENGINES)}.")
    if noise_floor and reference is None:
        raise FewbitsError("A noise floor needs a reference.", "Pass --reference.")
    ruler = get_ruler(convention, context)
    passage = read_text(Path(text))
    measured = open_model(model)
    if engine == "llama.cpp" and not isinstance(measured.checkpoint, GGUFCheckpoint):
        raise FewbitsError(f"{measured.path}: llama.cpp runs GGUF files only.", "Quantize it first, or use torch.")
    _refuse_calibration_text(measured, passage)
    base = open_model(reference) if reference is not None else None
    owner = base or measured
    clock = Clock()
    with clock.step("tokenize"):
        tokenizer = owner.tokenizer()
        ids, bos = encode(tokenizer, passage.content)
        windows = cut(ids, bos, ruler, chunks)
        same = _same_tokenizer(tokenizer, measured, passage) if base is not None else None
    threads = threads or os.cpu_count() or 1
    folder = cache if isinstance(cache, Path) else default_cache() if cache else None
    with torch_threads(threads), ExitStack() as stack:
        anchor = _Reference.of(base, windows, ReferenceStore(folder), passage, clock, progress) if base else None
        if engine == "llama.cpp":
            with clock.step("model"):
                source: LogitSource = stack.enter_context(
                    LlamaCppLogits(measured.path, windows.inputs, ruler.first_scored, threads)
                )
        else:
            with clock.step("model"):
                source = _streamed_logits(measured, windows, progress)
        warnings = _check_fit(source.n_vocab, anchor, measured, windows, same)
        with clock.step("score"):
            positions = score(source, windows.targets, anchor.logits if anchor else None, progress)
        floor = anchor.noise_floor(clock, progress) if anchor and noise_floor else None
    return MeasureReport(
        model=str(measured.path),
        reference=str(base.path) if base else None,
        engine=engine,
        engine_version=engine_version() if engine == "llama.cpp" else _torch_version(),
        tool_version=__version__,
        convention=RulerUsed(
            name=ruler.name,
            context=ruler.context,
            scored_per_window=ruler.scored_per_window,
            bos_per_window=ruler.bos_per_window,
            description=ruler.description,
        ),
        text=TextUsed(path=str(passage.path), sha256=passage.sha256, n_tokens=windows.n_text_tokens),
        tokenizer=TokenizerUsed(
            source=str(owner.path), bos=windows.bos if ruler.bos_per_window else None, same_as_models=same
        ),
        n_windows=len(windows.inputs),
        n_scored=windows.targets.size,
        perplexity=perplexity(positions.nll),
        comparison=compare(positions) if anchor else None,
        noise_floor=floor,
        reference_reused=anchor.reused if anchor else None,
        seconds=clock.seconds,
        warnings=warnings,
    )


@dataclass
class _Reference:
    """The reference's answers to the windows, computed or from the store."""

    model: Model
    windows: Windows
    store: ReferenceStore
    entry: Path | None
    logits: StateLogits
    reused: bool

    @staticmethod
    def of(
        model: Model, windows: Windows, store: ReferenceStore, text: Text, clock: Clock, progress: Progress | None
    ) -> _Reference:
        with clock.step("reference"):
            entry = store.entry(fingerprint(model), windows) if store.folder is not None else None
            states = store.load(entry, windows)
            reused = states is not None
            streamed = StreamedModel(model)
            if states is None:
                states = streamed.final_states(windows.inputs, windows.ruler.first_scored, progress)
                provenance = {
                    "reference": str(model.path),
                    "text": str(text.path),
                    "text_sha256": text.sha256,
                    "convention": windows.ruler.name,
                    "context": windows.ruler.context,
                    "n_windows": len(windows.inputs),
                    "tool_version": __version__,
                }
                store.save(entry, states, provenance)
            logits = StateLogits(states, streamed.head(), streamed.n_vocab)
        return _Reference(model, windows, store, entry, logits, reused)

    def noise_floor(self, clock: Clock, progress: Progress | None) -> Comparison:
        """The reference rounded to bfloat16 against itself; kept beside its answers."""
        kept = self.store.load_note(self.entry, "noise_floor")
        if kept is not None:
            try:
                return Comparison.model_validate(kept)
            except ValueError:
                pass  # damaged: measure again
        with clock.step("noise floor"):
            rounded = _streamed_logits(self.model, self.windows, progress, bf16=True)
            floor = compare(score(rounded, self.windows.targets, self.logits, progress))
        self.store.save_note(self.entry, "noise_floor", floor.model_dump())
        return floor


def _streamed_logits(model: Model, windows: Windows, progress: Progress | None, bf16: bool = False) -> StateLogits:
    streamed = StreamedModel(model, bf16)
    states = streamed.final_states(windows.inputs, windows.ruler.first_scored, progress)
    return StateLogits(states, streamed.head(), streamed.n_vocab)


def _same_tokenizer(tokenizer: PreTrainedTokenizerFast, measured: Model, text: Text) -> bool | None:
    """Whether the measured model's own tokenizer agrees; None if it has none that can be read."""
    beginning = text.content[:COMPARED_CHARACTERS]
    try:
        return encode(measured.tokenizer(), beginning) == encode(tokenizer, beginning)
    except FewbitsError:
        return None


def _refuse_calibration_text(measured: Model, passage: Text) -> None:
    """What a file was calibrated on flatters it."""
    if isinstance(measured.checkpoint, GGUFCheckpoint):
        dataset = measured.checkpoint.metadata.get(DATASET_KEY, "")
        seen = text_mark(passage.sha256) in str(dataset).split()
    else:
        file = measured.path / PROVENANCE
        known = read_json(file).get("calibration_sha256") if file.is_file() else None
        seen = isinstance(known, list) and passage.sha256 in known
    if seen:
        raise FewbitsError(
            f"{measured.path}: was calibrated on {passage.path}, which flatters it.", "Measure it on another text."
        )


def _check_fit(
    n_vocab: int, anchor: _Reference | None, measured: Model, windows: Windows, same: bool | None
) -> list[str]:
    """What stands in the way of a fair comparison: an error if it cannot be made, else warnings."""
    highest = int(max(windows.inputs.max(), windows.targets.max()))
    smallest = min(n_vocab, anchor.logits.n_vocab) if anchor else n_vocab
    if highest >= smallest:
        raise FewbitsError(
            f"{measured.path}: the text has token {highest}, the vocabulary ends at {smallest}.",
            "The reference must be the model that was quantized.",
        )
    warnings = []
    if anchor and anchor.logits.n_vocab != n_vocab:
        warnings.append(
            f"the vocabularies have {n_vocab} and {anchor.logits.n_vocab} entries; the common {smallest} are compared"
        )
    if same is False:
        warnings.append("the model's own tokenizer cuts the text differently from the reference's, which was used")
    if len(windows.inputs) < FEW_WINDOWS:
        warnings.append(f"only {len(windows.inputs)} windows: the intervals are rough")
    return warnings


def _torch_version() -> str:
    import torch
    import transformers

    return f"torch {torch.__version__}, transformers {transformers.__version__}"
