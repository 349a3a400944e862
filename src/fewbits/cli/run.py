"""fewbits run: generate text with the engine that fits the file."""

from __future__ import annotations

from typing import Annotated

import typer

from fewbits.cli import options as o
from fewbits.cli.output import emit_json, talk


def command(
    model: o.ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    tokens: Annotated[int, typer.Option("-n", "--tokens", min=1, help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    engine: Annotated[str, typer.Option(help="auto, llama.cpp or transformers.")] = "auto",
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    threads: o.Threads = None,
    json: o.Json = False,
) -> None:
    """Generate text: llama.cpp for GGUF files where it is installed, transformers otherwise.

    Example: fewbits run model.gguf "The capital of France is"
    """
    from fewbits.generate import generate  # imports transformers, which most verbs do without

    made = generate(
        model,
        prompt,
        tokens=tokens,
        temperature=temperature,
        chat=chat,
        engine=engine,
        seed=seed,
        threads=threads,
    )
    if json:
        emit_json(made)
    else:
        typer.echo(made.text)
    talk(f"{made.engine}: {made.n_tokens} tokens, {made.tokens_per_second:.1f} tokens per second")
