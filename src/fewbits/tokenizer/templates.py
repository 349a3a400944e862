"""Chat templates are programs of strangers: they run in jinja2's sandbox, and here within limits of time and memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fewbits.errors import FewbitsError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 3.0
"""Of this thread's computing. Real templates take milliseconds."""
MEMORY = 256 << 20
COMPILED = "<template>"
"""What jinja2 calls the file of a template's code."""
STATUS = Path("/proc/self/statm")


class TooMuch(FewbitsError):
    """A template that takes too long."""


@contextmanager
def bounded() -> Iterator[None]:
    """Limit what Python code called within takes: loops end with `TooMuch`, allocations with MemoryError (on Linux).

    The sandbox limits neither: two loops of `range(100000)`, one in the other, run for hours, `'x' | center(10**12)`
    takes a terabyte. The limit of memory is the process's, so other threads should not be allocating.
    """
    limit = time.thread_time() + SECONDS

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > limit:
            raise TooMuch(f"the chat template computes for more than {SECONDS:g} seconds")
        # line by line in templates alone, whose loops may call nothing
        return watch if frame.f_code.co_filename == COMPILED else None

    before, allowed = sys.gettrace(), None
    if resource is not None and STATUS.exists():
        allowed = resource.getrlimit(resource.RLIMIT_AS)
        used = int(STATUS.read_text().split()[0]) * resource.getpagesize()
        most = [used + MEMORY, *(known for known in allowed if known != resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_AS, (min(most), allowed[1]))
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
        if allowed is not None:
            resource.setrlimit(resource.RLIMIT_AS, allowed)


def chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], generation: bool = False
) -> str:
    """A conversation as the model's template has it.

    Args:
        generation: whether the model is to speak next.

    Raises:
        FewbitsError: the template refuses it, fails or takes too much.
    """
    import jinja2  # noqa: F401  (imported by the first template, which would count as its computing)

    try:
        with bounded():
            found = tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=generation
            )
    except FewbitsError:
        raise
    except Exception as error:  # a stranger's template can fail in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise FewbitsError(f"the model's chat template refuses it ({reason}).") from None
    return str(found)
