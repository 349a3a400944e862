"""fewbits plan: what would be made, to the byte, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbits import api
from fewbits.cli import options as o
from fewbits.cli.output import emit_json, megabytes, parse_size, progress_bar, stdout, table, talk, talk_note
from fewbits.plan import Plan


def command(
    model: o.ModelArgument,
    target: o.TargetArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Save the plan as JSON, to be edited and passed back.")
    ] = None,
    tensor_type: o.TensorTypes = None,
    output_tensor_type: o.OutputType = None,
    token_embedding_type: o.EmbeddingType = None,
    pure: o.Pure = False,
    leave_output_tensor: o.LeaveOutput = False,
    no_fallback: o.NoFallback = False,
    split_max_size: o.SplitMaxSize = None,
    plan: o.EditedPlan = None,
    pre_tokenizer: o.PreTokenizer = None,
    calibration: o.Calibration = None,
    calibration_chunks: o.CalibrationChunks = None,
    hessians: o.Hessians = None,
    effort: o.Effort = "default",
    size: o.Size = None,
    bpw: o.BitsPerWeight = None,
    fit: o.Fit = None,
    context: o.FitContext = None,
    kv: o.FitKV = "f16",
    types: o.Types = None,
    method: o.Method = None,
    keep: o.Keep = None,
    head_bits: o.HeadBits = None,
    measurement: o.Measurement = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="One row for every tensor.")] = False,
    json: o.Json = False,
) -> None:
    """Show what quantize would make.

    Example: fewbits plan ./SmolLM2-135M Q4_K_M --no-fallback
    """
    with progress_bar() as progress:
        made = api.plan(
            model,
            target,
            mixture=o.mixture_options(
                tensor_type, output_tensor_type, token_embedding_type, pure, leave_output_tensor, no_fallback
            ),
            split_max_size=parse_size(split_max_size) if split_max_size else None,
            edited=plan,
            pre_tokenizer=pre_tokenizer,
            calibration=calibration or (),
            calibration_chunks=calibration_chunks,
            hessians=hessians,
            effort=effort,
            method=method,
            keep=keep or (),
            head_bits=head_bits,
            measurement=measurement,
            budget=o.budget_of(size, bpw, fit, context, kv, types),
            progress=progress,
        )
    if output is not None:
        made.save(output)
        talk(f"saved: {output}")
    show(made, json, tensors)


def show(made: Plan, json: bool, tensors: bool = False) -> None:
    for note in made.notes:
        talk_note(note)
    if json:
        emit_json(made)
        return
    table(*made.table(per_tensor=tensors))
    for file in made.files:
        stdout.print(f"{file.name}  {megabytes(file.size)}  ({file.size} bytes)", markup=False)
    talk(
        f"{made.target}: {made.bits_per_weight:.2f} bits per weight over all {made.n_weights / 1e6:,.1f} M weights, "
        f"embeddings included"
    )
