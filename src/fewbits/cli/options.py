"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fewbits.cli.output import parse_size
from fewbits.errors import FewbitsError
from fewbits.plan import MixtureOptions
from fewbits.plan.presets import ALIASES, PRESETS
from fewbits.quantize.budget import Budget

MODEL_HELP = "A model directory, a GGUF file, or a hub id."
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
TargetArgument = Annotated[
    str,
    typer.Argument(metavar="TARGET", help="Q4_K_M or another GGUF preset, or gptq:w4g128, ...; see `fewbits list`."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Cores to use; all by default.")]
MaxMemory = Annotated[
    str | None, typer.Option("--max-memory", metavar="SIZE", help="Use no more memory than this, e.g. 8GB.")
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Decode what was written once more, to find damage.")
]
Cluster = Annotated[
    str | None,
    typer.Option("--cluster", metavar="ADDRESS", help="Work on Ray: auto, host:port, or local; see docs/cluster.md."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
TensorTypes = Annotated[
    list[str] | None,
    typer.Option("--tensor-type", metavar="REGEX=TYPE", help="Type for tensors whose name matches; first match wins."),
]
OutputType = Annotated[str | None, typer.Option("--output-tensor-type", metavar="TYPE", help="Type of output.weight.")]
EmbeddingType = Annotated[
    str | None, typer.Option("--token-embedding-type", metavar="TYPE", help="Type of token_embd.weight.")
]
Pure = Annotated[bool, typer.Option("--pure", help="One type for every tensor instead of the preset's mixture.")]
LeaveOutput = Annotated[bool, typer.Option("--leave-output-tensor", help="Keep output.weight in its own type.")]
NoFallback = Annotated[
    bool, typer.Option("--no-fallback", help="Fail where a row does not fit the type, instead of taking a larger one.")
]
SplitMaxSize = Annotated[
    str | None,
    typer.Option("--split-max-size", metavar="SIZE", help="Split into files of at most this size, e.g. 4GB."),
]
EditedPlan = Annotated[
    Path | None, typer.Option("--plan", metavar="PLAN.json", help="A saved plan, edited by hand, to be followed.")
]
PreTokenizer = Annotated[
    str | None, typer.Option("--pre-tokenizer", metavar="NAME", help="llama.cpp's pre-tokenizer, if not recognized.")
]

Calibration = Annotated[
    list[Path] | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Statistics of `calibrate` or llama-imatrix, or a text to make them of; may be repeated.",
    ),
]
CalibrationChunks = Annotated[
    int | None, typer.Option("--calibration-chunks", min=1, help="Most windows of 512 tokens to run of texts.")
]

Effort = Annotated[
    Literal["fast", "default", "thorough"],
    typer.Option("--effort", help="How much time to take where text calibrates; see docs/effort.md."),
]
Hessians = Annotated[
    Path | None,
    typer.Option(
        "--hessians",
        metavar="DIR",
        help="Hessians of `calibrate --hessians`: codes are chosen with error feedback where the type allows.",
    ),
]

Size = Annotated[
    str | None,
    typer.Option(
        "--size",
        help="For gguf, gptq:g64, ct:a16g128, hqq:g64, ...: most bytes, e.g. 6.5GB; for gguf also those of Q4_K_M.",
    ),
]
BitsPerWeight = Annotated[
    float | None, typer.Option("--bpw", min=0.1, max=32, help="Likewise: most bits per weight; gguf counts embeddings.")
]
Fit = Annotated[
    str | None, typer.Option("--fit", metavar="SIZE", help="Likewise: memory that the model has to run in, e.g. 8GB.")
]
FitContext = Annotated[int | None, typer.Option("--context", min=1, help="With --fit: tokens of the KV cache.")]
FitKV = Annotated[str, typer.Option("--kv", metavar="TYPE", help="With --fit: KV cache, f16, q8_0, q4_0, ...")]
Types = Annotated[
    str | None,
    typer.Option("--types", metavar="T1,T2,...", help="Likewise: choose among these only (Q4_K,... or w4,w8)."),
]

Method = Annotated[
    str | None, typer.Option("--method", help="How a directory's codes are chosen, if not as the target usually does.")
]
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="REGEX", help="Linear layers that a directory keeps unquantized; may be repeated."),
]
HeadBits = Annotated[
    int | None, typer.Option("--head-bits", help="Of the head, for exl2, exl3 and onnx; 16 leaves it as it is.")
]
Measurement = Annotated[
    Path | None,
    typer.Option(
        "--measurement", metavar="FILE", help="exl2's measuring pass: read where it exists, else saved there."
    ),
]
GPU = Annotated[
    str | None, typer.Option("--gpu", metavar="NAME", help='A card, e.g. "RTX 4090" or "2x RTX 3090"; or none.')
]
CardMemory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Of the card, e.g. 24GB; with --gpu none: of the machine."),
]
MeasureText = Annotated[
    Path | None, typer.Option("--measure", metavar="TEXT", help="Measure a directory's loss and tell it in its card.")
]
MeasureChunks = Annotated[
    int | None, typer.Option("--measure-chunks", min=1, help="Most windows of the text to measure on.")
]
Device = Annotated[str, typer.Option("--device", help="Where calibration runs: cpu, cuda or auto.")]


def bytes_of(size: str | None) -> int | None:
    return parse_size(size) if size else None


def budget_of(
    size: str | None, bpw: float | None, fit: str | None, context: int | None, kv: str, types: str | None
) -> Budget | None:
    """The budget from the options above, if there is one."""
    if size is None and bpw is None and fit is None:
        if types or context or kv != "f16":
            raise FewbitsError("--types, --context and --kv without a budget.", "Pass --size, --bpw or --fit, too.")
        return None
    names = tuple(name.strip() for name in types.split(",") if name.strip()) if types else ()
    level = size.strip().upper() if size else ""
    like = level if level in (*PRESETS, *ALIASES) else None
    most = parse_size(size) if size and not like else None
    return Budget(most, bpw, parse_size(fit) if fit else None, context, kv, names, like=like)


def mixture_options(
    tensor_types: list[str] | None,
    output_type: str | None,
    embedding_type: str | None,
    pure: bool,
    leave_output: bool,
    no_fallback: bool,
) -> MixtureOptions:
    """The overrides of a preset's rules from the options above.

    Raises:
        FewbitsError: a --tensor-type without `=`.
    """
    pairs = []
    for text in tensor_types or []:
        pattern, equals, name = text.rpartition("=")
        if not equals or not pattern:
            raise FewbitsError(f"--tensor-type {text!r} has no `=`.", "Write it as REGEX=TYPE, e.g. ffn_down=Q6_K.")
        pairs.append((pattern, name))
    return MixtureOptions(
        pure=pure,
        tensor_types=pairs,
        output_type=output_type,
        token_embedding_type=embedding_type,
        leave_output=leave_output,
        no_fallback=no_fallback,
    )
