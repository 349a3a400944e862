"""One reference, some texts and a ruler: what any number of models are measured by.

The reference runs once. Its answers (hidden states, see `reference.py`) are kept in memory or mapped from the store; of
the measured models one is in memory at a time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fewbits.calibration.statistics import DATASET_KEY, text_mark
from fewbits.checkpoint import GGUFCheckpoint, Model
from fewbits.checkpoint.safetensors import PROVENANCE, read_json
from fewbits.errors import FewbitsError
from fewbits.forward.clock import Clock
from fewbits.forward.identity import fingerprint
from fewbits.forward.streamed import Progress, StreamedModel, torch_threads
from fewbits.forward.text import Text, encode
from fewbits.measure.kv import CachedModel, check_kv
from fewbits.measure.llama_cpp_engine import LlamaCppLogits, engine_version
from fewbits.measure.metrics import Comparison, LogitSource, Positions, StateLogits, compare, score
from fewbits.measure.reference import ReferenceStore, default_cache
from fewbits.measure.windows import Ruler, Windows, cut
from fewbits.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ENGINES = ("torch", "llama.cpp")
COMPARED_CHARACTERS = 20_000
"""How much of a text both tokenizers encode to tell whether they are the same."""
FEW_WINDOWS = 8


@dataclass(frozen=True)
class Measurement:
    """What one model says of the windows.

    Attributes:
        same_tokenizer: whether the model's own tokenizer agrees with the one that was used; None if not compared.
    """

    positions: Positions
    engine: str
    engine_version: str
    same_tokenizer: bool | None
    warnings: list[str]


class Yardstick:
    """Texts cut into windows by the reference's tokenizer, and the reference's answers to them.

    Attributes:
        parts: for each text the windows that are its own.
        reused: whether the reference's answers came from the store; None without a reference.

    Args:
        owner: whose tokenizer cuts the texts; the reference where there is one.
        has_reference: False measures perplexity alone.
        chunks: at most so many windows of each text; None means all.
        cache: keep the reference's answers for later runs, in the default cache folder or the one given.
        threads: of the engines; None means all cores.
    """

    def __init__(
        self,
        owner: Model,
        texts: Sequence[Text],
        ruler: Ruler,
        *,
        has_reference: bool = True,
        chunks: int | None = None,
        cache: bool | Path = True,
        threads: int | None = None,
        clock: Clock | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.owner, self.texts, self.ruler = owner, list(texts), ruler
        self.clock, self.progress = clock or Clock(), progress
        self.threads = threads or os.cpu_count() or 1
        folder = cache if isinstance(cache, Path) else default_cache() if cache else None
        self.store = ReferenceStore(folder)
        self.has_reference = has_reference
        with self.clock.step("tokenize"):
            self.tokenizer = owner.tokenizer()
            self.windows, self.parts = _cut_all(self.tokenizer, self.texts, ruler, chunks)
        self._answers: StateLogits | None = None
        self._entry: Path | None = None
        self.reused: bool | None = None

    def measure(self, model: Model, engine: str = "torch", kv: str | None = None) -> Measurement:
        """Run a model over the windows.

        Args:
            engine: `torch`, or `llama.cpp` for GGUF files in the real engine.
            kv: type of the KV cache, one of `KV_TYPES`; None for the engine's own.

        Raises:
            FewbitsError: the model was calibrated on one of the texts, cannot be run so, or does not fit the reference.
        """
        check_engine(engine, kv, model)
        for text in self.texts:
            refuse_calibration_text(model, text)
        same = None
        if self.has_reference:
            with self.clock.step("tokenize"):
                same = _same_tokenizer(self.tokenizer, model, self.texts[0])
        with torch_threads(self.threads), ExitStack() as stack:
            answers = self.answers() if self.has_reference else None
            with self.clock.step("model"):
                if engine == "llama.cpp":
                    made = LlamaCppLogits(model.path, self.windows.inputs, self.ruler.first_scored, self.threads, kv)
                    source: LogitSource = stack.enter_context(made)
                else:
                    source = self._logits(CachedModel(model, kv) if kv else StreamedModel(model))
            warnings = self._warnings(source.n_vocab, model, same)
            with self.clock.step("score"):
                positions = score(source, self.windows.targets, answers, self.progress)
        version = engine_version() if engine == "llama.cpp" else torch_version()
        return Measurement(positions, engine, version, same, warnings)

    def answers(self) -> StateLogits:
        """The reference's logits: from this run, from the store, or computed and stored."""
        if self._answers is not None:
            return self._answers
        with torch_threads(self.threads), self.clock.step("reference"):
            if self.store.folder is not None:
                self._entry = self.store.entry(fingerprint(self.owner), self.windows)
            states = self.store.load(self._entry, self.windows)
            self.reused = states is not None
            streamed = StreamedModel(self.owner)
            if states is None:
                states = streamed.final_states(self.windows.inputs, self.ruler.first_scored, self.progress)
                provenance = {
                    "reference": str(self.owner.path),
                    "text": ", ".join(str(text.path) for text in self.texts),
                    "text_sha256": ", ".join(text.sha256 for text in self.texts),
                    "convention": self.ruler.name,
                    "context": self.ruler.context,
                    "n_windows": len(self.windows.inputs),
                    "tool_version": __version__,
                }
                self.store.save(self._entry, states, provenance)
            self._answers = StateLogits(states, streamed.head(), streamed.n_vocab)
        return self._answers

    def noise_floor(self) -> Comparison:
        """The reference rounded to bfloat16 against itself; kept beside its answers."""
        answers = self.answers()
        kept = self.store.load_note(self._entry, "noise_floor")
        if kept is not None:
            try:
                return Comparison.model_validate(kept)
            except ValueError:
                pass  # damaged: measure again
        with torch_threads(self.threads), self.clock.step("noise floor"):
            rounded = self._logits(StreamedModel(self.owner, bf16=True))
            floor = compare(score(rounded, self.windows.targets, answers, self.progress))
        self.store.save_note(self._entry, "noise_floor", floor.model_dump())
        return floor

    def _logits(self, streamed: StreamedModel) -> StateLogits:
        states = streamed.final_states(self.windows.inputs, self.ruler.first_scored, self.progress)
        return StateLogits(states, streamed.head(), streamed.n_vocab)

    def _warnings(self, n_vocab: int, measured: Model, same: bool | None) -> list[str]:
        """What stands in the way of a fair comparison: an error if it cannot be made, else warnings."""
        windows, answers = self.windows, self._answers
        highest = int(max(windows.inputs.max(), windows.targets.max()))
        smallest = min(n_vocab, answers.n_vocab) if answers else n_vocab
        if highest >= smallest:
            raise FewbitsError(
                f"{measured.path}: the text has token {highest}, the vocabulary ends at {smallest}.",
                "The reference must be the model that was quantized.",
            )
        warnings = []
        if answers and answers.n_vocab != n_vocab:
            warnings.append(
                f"the vocabularies have {n_vocab} and {answers.n_vocab} entries; the common {smallest} are compared"
            )
        if same is False:
            warnings.append("the model's own tokenizer cuts the text differently from the reference's, which was used")
        if len(windows.inputs) < FEW_WINDOWS:
            warnings.append(f"only {len(windows.inputs)} windows: the intervals are rough")
        return warnings


def check_engine(engine: str, kv: str | None, model: Model) -> None:
    """Refuse what cannot be run, before any work.

    Raises:
        FewbitsError: an unknown engine or KV cache type, or llama.cpp and no GGUF file.
    """
    if engine not in ENGINES:
        raise FewbitsError(f"Unknown engine {engine!r}.", f"Known: {', '.join(ENGINES)}.")
    check_kv(kv, engine)
    if engine == "llama.cpp" and not isinstance(model.checkpoint, GGUFCheckpoint):
        raise FewbitsError(f"{model.path}: llama.cpp runs GGUF files only.", "Quantize it first, or use torch.")


def calibration_marks(model: Model) -> list[str]:
    """What a quantized model tells of the texts that it was calibrated on: marks of SHA-256 sums (see `text_mark`)
    and whatever names another tool has left; empty where nothing is told."""
    if isinstance(model.checkpoint, GGUFCheckpoint):
        return str(model.checkpoint.metadata.get(DATASET_KEY, "")).split()
    file = model.path / PROVENANCE
    known = read_json(file).get("calibration_sha256") if file.is_file() else None
    return [text_mark(str(sha256)) for sha256 in known] if isinstance(known, list) else []


def refuse_calibration_text(measured: Model, passage: Text) -> None:
    """What a file was calibrated on flatters it.

    Raises:
        FewbitsError: the text is one of those.
    """
    if text_mark(passage.sha256) in calibration_marks(measured):
        raise FewbitsError(
            f"{measured.path}: was calibrated on {passage.path}, which flatters it.", "Measure it on another text."
        )


def torch_version() -> str:
    import torch
    import transformers

    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def _cut_all(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[Text], ruler: Ruler, chunks: int | None
) -> tuple[Windows, list[slice]]:
    """The windows of all texts, one after another, and which are whose."""
    found: list[Windows] = []
    for text in texts:
        ids, bos = encode(tokenizer, text.content)
        try:
            found.append(cut(ids, bos, ruler, chunks))
        except FewbitsError as error:
            if len(texts) == 1:
                raise
            raise FewbitsError(f"{text.path}: {error.message}", error.hint) from None
    ends = np.cumsum([len(windows.inputs) for windows in found]).tolist()
    joined = replace(
        found[0],
        inputs=np.concatenate([windows.inputs for windows in found]),
        targets=np.concatenate([windows.targets for windows in found]),
        n_text_tokens=sum(windows.n_text_tokens for windows in found),
    )
    return joined, [slice(end - len(windows.inputs), end) for end, windows in zip(ends, found, strict=True)]


def _same_tokenizer(tokenizer: PreTrainedTokenizerFast, measured: Model, text: Text) -> bool | None:
    """Whether the measured model's own tokenizer agrees; None if it has none that can be read."""
    beginning = text.content[:COMPARED_CHARACTERS]
    try:
        return encode(measured.tokenizer(), beginning) == encode(tokenizer, beginning)
    except FewbitsError:
        return None
