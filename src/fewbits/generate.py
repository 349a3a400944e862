"""Generating text with the engine that fits: llama.cpp for GGUF where it is installed, transformers otherwise."""

from __future__ import annotations

import importlib.util
import os
import time
from typing import Any

from pydantic import BaseModel, ConfigDict

from fewbits.checkpoint import GGUFCheckpoint, Model, open_model
from fewbits.errors import FewbitsError, about
from fewbits.tokenizer.templates import chat_text

ENGINES = ("llama.cpp", "transformers")


class Generation(BaseModel):
    """What a model went on to say.

    Attributes:
        text: the new text only.
        tokens_per_second: of generation, the prompt's evaluation left out.
    """

    model_config = ConfigDict(extra="forbid")
    model: str
    engine: str
    text: str
    n_tokens: int
    tokens_per_second: float


def generate(
    source: str,
    prompt: str,
    tokens: int = 64,
    temperature: float = 0.0,
    chat: bool = False,
    engine: str = "auto",
    seed: int = 0,
    threads: int | None = None,
) -> Generation:
    """Go on from a prompt.

    Args:
        temperature: 0 takes the likeliest token each time.
        chat: put the prompt through the model's chat template, rendered in a sandbox.

    Raises:
        FewbitsError: unknown or missing engine, no tokenizer, no chat template.
    """
    if engine not in ("auto", *ENGINES):
        raise FewbitsError(f"Unknown engine {engine!r}.", f"Known: auto, {', '.join(ENGINES)}.")
    model = open_model(source)
    is_gguf = isinstance(model.checkpoint, GGUFCheckpoint)
    installed = importlib.util.find_spec("llama_cpp") is not None
    if engine == "auto":
        engine = "llama.cpp" if is_gguf and installed else "transformers"
    if engine == "llama.cpp" and not is_gguf:
        raise FewbitsError(f"{source}: llama.cpp runs GGUF files only.", "Quantize it first.")
    if engine == "llama.cpp" and not installed:
        raise FewbitsError("llama.cpp is not installed.", 'Install it with: pip install "fewbits[llama]".')
    if chat:
        prompt = _through_template(model, prompt)
    run = _in_llama_cpp if engine == "llama.cpp" else _in_transformers
    text, count, seconds = run(model, prompt, tokens, temperature, seed, threads or os.cpu_count() or 1)
    return Generation(
        model=source, engine=engine, text=text, n_tokens=count, tokens_per_second=max(0, count - 1) / max(seconds, 1e-9)
    )


def _through_template(model: Model, prompt: str) -> str:
    tokenizer = model.tokenizer()
    if not tokenizer.chat_template:
        raise FewbitsError(f"{model.path}: the model has no chat template.", "Leave --chat out.")
    messages = [{"role": "user", "content": prompt}]
    with about(model.path):
        return chat_text(tokenizer, messages, generation=True)


def _in_llama_cpp(
    model: Model, prompt: str, tokens: int, temperature: float, seed: int, threads: int
) -> tuple[str, int, float]:
    import llama_cpp

    path = str(model.path)
    try:
        engine = llama_cpp.Llama(path, n_ctx=0, n_threads=threads, seed=seed, verbose=False)
    except (ValueError, AssertionError) as error:
        raise FewbitsError(
            f"{path}: llama.cpp cannot load it ({error}).", "`fewbits inspect` shows its headers."
        ) from None
    ids = engine.tokenize(prompt.encode(), add_bos=_adds_bos(model), special=True)
    room = engine.n_ctx() - len(ids)
    if room < 1:
        raise FewbitsError(f"The prompt has {len(ids)} tokens, the model's context holds {engine.n_ctx()}.")
    vocabulary = llama_cpp.llama_model_get_vocab(engine.model)
    made: list[int] = []
    started = time.perf_counter()
    for token in engine.generate(ids, temp=temperature, top_k=1 if temperature == 0 else 40, repeat_penalty=1.0):
        if not made:
            started = time.perf_counter()
        if llama_cpp.llama_vocab_is_eog(vocabulary, token):
            break
        made.append(token)
        if len(made) >= min(tokens, room):
            break
    seconds = time.perf_counter() - started
    return engine.detokenize(made).decode("utf-8", "replace"), len(made), seconds


def _adds_bos(model: Model) -> bool:
    checkpoint = model.checkpoint
    assert isinstance(checkpoint, GGUFCheckpoint)
    default = checkpoint.metadata.get("tokenizer.ggml.model") == "llama"
    return bool(checkpoint.metadata.get("tokenizer.ggml.add_bos_token", default))


def _in_transformers(
    model: Model, prompt: str, tokens: int, temperature: float, seed: int, threads: int
) -> tuple[str, int, float]:
    import torch
    from transformers import TextStreamer

    from fewbits.forward.streamed import load_whole

    class Clock(TextStreamer):
        """Notes when the first new token came, so that the prompt does not count."""

        first: float | None = None
        calls = 0

        def put(self, value: Any) -> None:
            self.calls += 1
            if self.calls == 2:
                self.first = time.perf_counter()

        def end(self) -> None: ...

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tokenizer = model.tokenizer()
    network = load_whole(model)
    inputs = tokenizer(prompt, return_tensors="pt")
    clock = Clock(tokenizer)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.inference_mode():
        out = network.generate(
            inputs.input_ids,
            attention_mask=torch.ones_like(inputs.input_ids),
            max_new_tokens=tokens,
            streamer=clock,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **sampling,
        )
    made = out[0, inputs.input_ids.shape[1] :]
    seconds = time.perf_counter() - (clock.first or time.perf_counter())
    return str(tokenizer.decode(made, skip_special_tokens=True)), int(made.numel()), seconds
