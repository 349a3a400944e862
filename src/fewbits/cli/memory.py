"""fewbits memory: how much memory a model takes, and whether it fits."""

from __future__ import annotations

from typing import Annotated

import typer

from fewbits.cli import options as o
from fewbits.cli.output import emit_json, stdout, table, talk_note
from fewbits.memory import Hardware, detect, named
from fewbits.memory import memory as estimate
from fewbits.memory.report import MemoryReport, Parts

TITLES = {
    "weights": "weights",
    "kv_cache": "KV cache",
    "recurrent_state": "recurrent state",
    "compute": "compute buffer",
    "runtime": "runtime",
    "margin": "margin",
}


def command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A GGUF file, a model directory, a config.json, or a hub id."),
    ],
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="TARGET", help="What it would be quantized to: Q4_K_M, gptq:w4g128, ..."),
    ] = None,
    context: Annotated[int | None, typer.Option("--context", min=1, help="Tokens of each sequence.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences side by side.")] = 1,
    kv: Annotated[str, typer.Option("--kv", metavar="TYPE", help="KV cache: f16, q8_0, q4_0, fp8, ...")] = "f16",
    engine: Annotated[
        str,
        typer.Option("--engine", help="llama.cpp, ollama, vllm, transformers, exllamav2 or onnxruntime."),
    ] = "llama.cpp",
    layers_on_gpu: Annotated[
        int | None, typer.Option("--layers-on-gpu", min=0, help="Layers to offload, as llama.cpp's -ngl counts.")
    ] = None,
    gpu: o.GPU = None,
    memory: o.CardMemory = None,
    layers: Annotated[bool, typer.Option("--layers", help="One row for every layer's cache.")] = False,
    json: o.Json = False,
) -> None:
    """Show how much memory a model takes, and whether it fits.

    Without --gpu and --memory, this machine is asked. The weights are never read or fetched.

    Example: fewbits memory ./SmolLM2-135M --target Q4_K_M --context 8192 --gpu "RTX 3060"
    """
    hardware = named(gpu, memory) if gpu or memory else detect()
    report = estimate(
        model,
        target=target,
        context=context,
        batch=batch,
        kv=kv,
        engine=engine,
        layers_on_gpu=layers_on_gpu,
        hardware=hardware,
    )
    for note in report.notes:
        talk_note(note)
    if json:
        emit_json(report)
        return
    _show(report, hardware)
    if layers:
        rows = [
            [str(r.layer), r.kind, f"{r.cells:,}", str(r.window or ""), mib(r.kv_bytes), mib(r.state_bytes)]
            for r in report.layers
        ]
        table(["layer", "kind", "cells", "window", "KV MiB", "state MiB"], rows)


def _show(report: MemoryReport, hardware: Hardware) -> None:
    what = f"{report.source} as {report.target}" if report.target else report.source
    bound = "" if report.certain else ", unknown architecture: an upper bound"
    stdout.print(
        f"{what} in {report.engine}: context {report.context}, {report.batch} at once, KV cache {report.kv}{bound}",
        markup=False,
    )
    headers = ["", *(device.device for device in report.devices)]
    rows = [[TITLES[part], *(mib(getattr(d, part)) for d in report.devices)] for part in Parts.model_fields]
    rows = [row for row in rows if any(cell != "0" for cell in row[1:])]
    rows.append(["total MiB", *(mib(device.needed) for device in report.devices)])
    rows.append(["available", *(mib(device.available or 0) for device in report.devices)])
    rows.append(["fits", *("yes" if device.fits else "no" for device in report.devices)])
    table(headers, rows)
    cards = ", ".join(gpu.name for gpu in hardware.gpus) or "no GPU"
    stdout.print(f"{cards}; {hardware.cpu}, {hardware.ram / 2**30:.0f} GiB of RAM", markup=False)
    if report.layers_on_gpu:
        stdout.print(f"{report.layers_on_gpu} of {report.n_layers} layers on the GPU", markup=False)
    if report.tokens_that_fit is not None:
        stdout.print(f"{report.tokens_that_fit:,} tokens of KV cache fit, of all sequences together", markup=False)
    _verdict(report)


def _verdict(report: MemoryReport) -> None:
    if report.fits:
        stdout.print(f"It fits, up to a context of {report.max_context:,} tokens.", markup=False)
        return
    stdout.print("It does not fit." + (" What to change, in this order:" if report.levers else ""), markup=False)
    for number, lever in enumerate(report.levers, 1):
        needs = " and ".join(f"{mib(n)} MiB of {what}" for n, what in ((lever.gpu, "VRAM"), (lever.host, "RAM")) if n)
        option = f"  {lever.option}" if lever.option else ""
        stdout.print(f"{number}. {lever.name}: {lever.change} ({needs}){option}", markup=False)
    if not report.levers:
        stdout.print("Nothing makes it fit on this hardware: take a smaller model.", markup=False)


def mib(nbytes: int) -> str:
    return f"{round(nbytes / 2**20):,}"
