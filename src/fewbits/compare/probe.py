"""One GGUF file in llama.cpp, in a process of its own: run as a script with a request as JSON on stdin.

Nothing of fewbits is imported: what the process takes is the engine's. The answer is JSON on stdout: memory before
the file is loaded and at its peak, llama.cpp's own lines about its buffers, and seconds of each timed run.
A prompt is evaluated in steps of 512 tokens (`ubatch`), only its last token's logits are asked for, and every run
starts with an empty cache: what llama-bench's `pp` and `tg` do (llama.cpp tools/llama-bench/llama-bench.cpp).
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEP = 512
LEAST_REPEATS, MOST_SECONDS = 3, 120.0
"""Runs are repeated so often in any case, and no more once so much time has passed."""
FLASH_ATTENTION_ON = 1
"""llama_flash_attn_type of llama.h."""
STATUS = Path("/proc/self/status")
FIELDS = {"resident": "VmRSS", "peak": "VmHWM", "own": "RssAnon", "mapped": "RssFile"}


def memory() -> dict[str, int] | None:
    """Bytes of this process; `peak` since it was started. None where the system does not tell.

    `getrusage` would not do on Linux: its peak includes that of the process which started this one.
    """
    if STATUS.is_file():
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
        return {name: 1024 * int(lines[field].split()[0]) for name, field in FIELDS.items() if field in lines}
    try:
        import resource
    except ImportError:  # Windows
        return None
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}


class Engine:
    """llama.cpp with one file and one context."""

    def __init__(self, request: dict[str, Any]) -> None:
        import llama_cpp

        self.api = api = llama_cpp
        self.lines: list[str] = []
        # llama.cpp keeps the pointer: the object has to live as long
        self.listener = api.llama_log_callback(
            lambda level, text, data: self.lines.append(text.decode("utf-8", "replace"))
        )
        api.llama_log_set(self.listener, ctypes.c_void_p(0))
        api.llama_backend_init()
        self.before = memory()
        wanted = api.llama_model_default_params()
        wanted.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(os.fsencode(request["path"]), wanted)
        if not self.model:
            raise RuntimeError("llama.cpp cannot load it")
        params = api.llama_context_default_params()
        params.n_ctx = request["context"]
        params.n_batch, params.n_ubatch = max(2048, STEP), STEP
        params.n_threads = params.n_threads_batch = request["threads"]
        params.swa_full = False  # as llama.cpp's own programs ask
        if request["kv"] is not None:
            params.type_k = params.type_v = request["kv"]
            params.flash_attn_type = FLASH_ATTENTION_ON
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context of {request['context']} tokens")
        self.n_vocab = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model)))
        self.batch = api.llama_batch_init(STEP, 0, 1)

    def prompt(self, count: int) -> None:
        """Evaluate so many tokens."""
        for start in range(0, count, STEP):
            self._decode(range(start, min(count, start + STEP)))

    def generate(self, count: int) -> None:
        """Evaluate so many tokens one after the other."""
        for position in range(count):
            self._decode(range(position, position + 1))

    def _decode(self, positions: range) -> None:
        batch = self.batch
        batch.n_tokens = len(positions)
        for at, position in enumerate(positions):
            # the same scattered tokens in every run
            batch.token[at] = (7919 * position + 1) % self.n_vocab
            batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = position, 1, 0
            batch.logits[at] = at == len(positions) - 1
        status = self.api.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama.cpp failed (status {status})")

    def seconds(self, work: Callable[[int], None], count: int) -> float:
        """How long work on so many tokens takes, from an empty cache."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        started = time.perf_counter()
        work(count)
        self.api.llama_synchronize(self.context)
        return time.perf_counter() - started


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run what is asked for.

    Args:
        request: `path`; `context` in tokens; `threads`; `kv`, a ggml type or None; tokens of a `prompt` and of a
            `generation`; `repeats`, 0 for memory alone.
    """
    engine = Engine(request)
    prompt, generation = request["prompt"], request["generation"]
    # this first run, which no figure counts, touches all memory that a step needs
    engine.seconds(engine.prompt, prompt)
    engine.seconds(engine.generate, min(4, generation))
    after = memory()
    times: dict[str, list[float]] = {"prompt": [], "generation": []}
    started = time.perf_counter()
    for number in range(request["repeats"]):
        if number >= LEAST_REPEATS and time.perf_counter() - started > MOST_SECONDS:
            break
        # in turns: what disturbs the machine for a while disturbs both
        times["prompt"].append(engine.seconds(engine.prompt, prompt))
        times["generation"].append(engine.seconds(engine.generate, generation))
    return {"before": engine.before, "after": after, "log": "".join(engine.lines), **times}


if __name__ == "__main__":
    try:
        print(json.dumps(answer(json.load(sys.stdin))))
    except (RuntimeError, ImportError) as error:
        sys.exit(str(error))
