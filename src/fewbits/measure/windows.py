"""The rulers: how a text is cut into windows and which positions are scored. Figures of two rulers never compare.

Source of the first: llama.cpp tools/perplexity/perplexity.cpp, `perplexity`; of the second: the GPTQ reference code.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fewbits.errors import FewbitsError


@dataclass(frozen=True)
class Ruler:
    """One convention.

    Attributes:
        context: tokens per window; windows follow one another without overlap, the rest of the text is dropped.
        second_half: score only predictions made at positions context // 2 .. context - 2; else at 0 .. context - 2.
        bos_per_window: if the tokenizer begins a text with BOS, each window's first token is replaced by it.
    """

    name: str
    context: int
    second_half: bool
    bos_per_window: bool
    description: str

    @property
    def first_scored(self) -> int:
        """First position whose prediction (of the next token) counts."""
        return self.context // 2 if self.second_half else 0

    @property
    def scored_per_window(self) -> int:
        return self.context - 1 - self.first_scored


RULERS = {
    ruler.name: ruler
    for ruler in (
        Ruler(
            "llama.cpp", 512, True, True, "windows of 512 tokens, the second half of each scored, as llama-perplexity"
        ),
        Ruler("hf", 2048, False, False, "windows of 2048 tokens, all positions scored, as in the GPTQ and AWQ papers"),
    )
}


def get_ruler(convention: str, context: int | None = None) -> Ruler:
    """A ruler by name, with another context if asked for.

    Raises:
        FewbitsError: unknown name, or a context too short to score anything.
    """
    if convention not in RULERS:
        raise FewbitsError(f"There is no convention {convention!r}.", f"Choose one of: {', '.join(RULERS)}.")
    ruler = RULERS[convention]
    if context is None or context == ruler.context:
        return ruler
    if context < 4:
        raise FewbitsError(f"A context of {context} tokens scores nothing.", "Take at least 4.")
    description = ruler.description.replace(f"windows of {ruler.context}", f"windows of {context}")
    return replace(ruler, context=context, description=f"{description}, but for the context")


@dataclass(frozen=True)
class Windows:
    """Token ids as they go through the model, and what is scored.

    Attributes:
        inputs: int64 [n_windows, context], BOS placed.
        targets: int64 [n_windows, ruler.scored_per_window], the token that follows each scored position.
        n_text_tokens: tokens of the whole text.
        bos: the BOS id put at each window's start, or None.
    """

    ruler: Ruler
    inputs: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    n_text_tokens: int
    bos: int | None

    @property
    def digest(self) -> str:
        """Identity of what is evaluated: the ids and which positions count."""
        head = f"{self.ruler.context} {self.ruler.first_scored} {self.inputs.shape}"
        return hashlib.sha256(head.encode() + self.inputs.tobytes() + self.targets.tobytes()).hexdigest()


def cut(ids: list[int], bos: int | None, ruler: Ruler, chunks: int | None = None) -> Windows:
    """Cut token ids into windows.

    Args:
        chunks: at most so many windows; None means all.

    Raises:
        FewbitsError: the text is shorter than one window.
    """
    if chunks is not None and chunks < 1:
        raise FewbitsError(f"{chunks} windows measure nothing.", "Take at least 1, or leave it out for all.")
    available = len(ids) // ruler.context
    if not available:
        raise FewbitsError(
            f"The text has {len(ids)} tokens, one window of the {ruler.name} convention needs {ruler.context}.",
            "Take a longer text or a smaller context.",
        )
    count = available if chunks is None else min(chunks, available)
    original = np.asarray(ids[: count * ruler.context], np.int64).reshape(count, ruler.context)
    inputs = original.copy()
    if ruler.bos_per_window and bos is not None:
        inputs[:, 0] = bos
    # with all positions scored the first target is the second token, so a replaced first token is never a target
    return Windows(ruler, inputs, original[:, ruler.first_scored + 1 :].copy(), len(ids), bos)
