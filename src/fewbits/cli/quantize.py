"""fewbits quantize: a model in, a file that the engine loads out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbits import api
from fewbits.cli import options as o
from fewbits.cli import plan as plan_verb
from fewbits.cli.output import emit_json, megabytes, parse_size, progress_bar, stdout, talk, talk_note
from fewbits.quantize import QuantizeReport, default_output


def command(
    model: o.ModelArgument,
    target: o.TargetArgument,
    output: Annotated[str | None, typer.Option("-o", "--output", help="The file to make, or its URL.")] = None,
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
    device: o.Device = "cpu",
    measure: o.MeasureText = None,
    measure_chunks: o.MeasureChunks = None,
    threads: o.Threads = None,
    max_memory: o.MaxMemory = None,
    cluster: o.Cluster = None,
    overwrite: o.Overwrite = False,
    verify: o.Verify = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    json: o.Json = False,
) -> None:
    """Quantize a model.

    Example: fewbits quantize ./SmolLM2-135M Q4_K_M -o model.gguf
    """
    mixture = o.mixture_options(
        tensor_type, output_tensor_type, token_embedding_type, pure, leave_output_tensor, no_fallback
    )
    budget = o.budget_of(size, bpw, fit, context, kv, types)
    split = parse_size(split_max_size) if split_max_size else None
    if dry_run:
        made = api.plan(
            model,
            target,
            output=output,
            mixture=mixture,
            split_max_size=split,
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
            budget=budget,
        )
        plan_verb.show(made, json)
        return
    place = output or output_beside(model, target)
    with progress_bar() as progress:
        report = api.quantize(
            model,
            target,
            place,
            mixture=mixture,
            split_max_size=split,
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
            budget=budget,
            device=device,
            measure_text=measure,
            measure_chunks=measure_chunks,
            threads=threads,
            max_memory=o.bytes_of(max_memory),
            cluster=cluster,
            overwrite=overwrite,
            progress=progress,
            verify=verify,
        )
    show(report, json)


def output_beside(model: str, target: str) -> Path:
    """The default output; of a hub id the last part is the name."""
    return default_output(Path(model if Path(model).exists() else model.split("/")[-1]), target)


def show(report: QuantizeReport, json: bool) -> None:
    for note in report.notes:
        talk_note(note)
    if json:
        emit_json(report)
        return
    for file in report.files:
        stdout.print(f"{file.name}  {megabytes(file.size)}", markup=False)
    talk(
        f"{report.target}: {report.bits_per_weight:.2f} bits per weight, {report.n_weights / 1e6:,.1f} M weights, "
        f"{report.seconds:.1f} s, peak memory {megabytes(report.peak_memory)}"
    )
