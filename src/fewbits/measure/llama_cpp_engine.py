"""The real engine for GGUF files: llama.cpp through llama-cpp-python's low-level binding.

Its logits carry what the engine itself adds (8-bit activations in many matrix products, a float16 KV cache), which the
float32 forward pass of `forward` does not have.
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fewbits.checkpoint.gguf import GGML_TYPES
from fewbits.errors import FewbitsError

FLASH_ATTENTION_ON = 1
"""llama_flash_attn_type of llama.h."""


class LlamaCppLogits:
    """Evaluates windows one at a time; implements `metrics.LogitSource`.

    Args:
        path: a GGUF file; of a split set the first shard.
        inputs: token ids [n_windows, context].
        first: first scored position.
        threads: of the engine.
        kv: type of the KV cache, e.g. `q8_0`; None for llama.cpp's own choice, f16.

    Raises:
        FewbitsError: llama-cpp-python is not installed, or llama.cpp cannot load the file or refuses a window.
    """

    def __init__(
        self, path: Path, inputs: npt.NDArray[np.int64], first: int, threads: int, kv: str | None = None
    ) -> None:
        self.api = _binding()
        self.path, self.inputs, self.first = path, inputs, first
        self.current = -1
        self.rows = np.empty((0, 0), np.float32)
        self.model = self.context = self.batch = None
        api, n_context = self.api, inputs.shape[1]
        self.model = api.llama_model_load_from_file(str(path).encode(), self._model_params())
        if not self.model:
            raise FewbitsError(f"{path}: llama.cpp cannot load it.", "`fewbits inspect` shows its headers.")
        self.n_vocab = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model)))
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = n_context
        params.n_ubatch = min(512, n_context)
        params.n_threads = params.n_threads_batch = threads
        if kv is not None:
            params.type_k = params.type_v = GGML_TYPES[kv.upper()]
            # quantized values are read by flash attention only
            params.flash_attn_type = FLASH_ATTENTION_ON
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            cache = f" with a KV cache of {kv}" if kv else ""
            raise FewbitsError(f"{path}: llama.cpp cannot make a context of {n_context} tokens{cache}.")
        self.batch = api.llama_batch_init(n_context, 0, 1)

    def _model_params(self) -> Any:
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0
        return params

    def logits(self, window: int, start: int, stop: int) -> torch.Tensor:
        """float32 [stop - start, n_vocab] at scored positions start:stop of a window."""
        if window != self.current:
            self._evaluate(window)
        # the engine reuses its buffer for the next window: hand out a copy
        return torch.from_numpy(self.rows[start:stop].copy())

    def _evaluate(self, window: int) -> None:
        api, batch, ids = self.api, self.batch, self.inputs[window]
        assert batch is not None
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        batch.n_tokens = len(ids)
        for position, token in enumerate(ids):
            batch.token[position] = int(token)
            batch.pos[position] = position
            batch.n_seq_id[position] = 1
            batch.seq_id[position][0] = 0
            batch.logits[position] = self.first <= position < len(ids) - 1
        status = api.llama_decode(self.context, batch)
        if status:
            raise FewbitsError(f"{self.path}: llama.cpp failed on window {window} (status {status}).")
        count = len(ids) - 1 - self.first
        pointer = api.llama_get_logits(self.context)
        self.rows = np.ctypeslib.as_array(pointer, shape=(count, self.n_vocab))
        self.current = window

    def close(self) -> None:
        """Give the engine's memory back."""
        self.rows = np.empty((0, 0), np.float32)
        if self.batch is not None:
            self.api.llama_batch_free(self.batch)
        if self.context:
            self.api.llama_free(self.context)
        if self.model:
            self.api.llama_model_free(self.model)
        self.model = self.context = self.batch = None
        gc.collect()

    def __enter__(self) -> LlamaCppLogits:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def engine_version() -> str:
    """Version of llama-cpp-python, which pins one of llama.cpp."""
    return f"llama-cpp-python {_binding().__version__}"


def _binding() -> Any:
    try:
        import llama_cpp
    except ImportError:
        raise FewbitsError("llama.cpp is not installed.", 'Install it with: pip install "fewbits[llama]".') from None
    # it prints hundreds of lines to stderr; what matters comes back as status
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    llama_cpp.llama_backend_init()
    return llama_cpp
