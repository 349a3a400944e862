"""The verbs that work on files, as functions: what the command line calls and what `import fewbits` offers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from fewbits.checkpoint import GGUFCheckpoint, Model, open_checkpoint, open_model
from fewbits.checkpoint.urls import is_url
from fewbits.cluster import workers_at
from fewbits.errors import FewbitsError
from fewbits.formats.directory.card import Measured
from fewbits.formats.directory.writer import check_directory_output
from fewbits.formats.upload import local_output
from fewbits.methods.base import Effort
from fewbits.plan import MixtureOptions, Plan
from fewbits.plan.directory import is_directory_target
from fewbits.quantize import PlanRequest, QuantizeReport
from fewbits.quantize.budget import Budget
from fewbits.quantize.directory_job import DirectoryJob
from fewbits.quantize.gguf_job import GGUFJob
from fewbits.quantize.importances import Progress
from fewbits.quantize.memory_need import read_back_threads
from fewbits.verify.made import check_made

__all__ = ["Inspection", "inspect", "open", "plan", "quantize"]


class TypeShare(BaseModel):
    """How much of a model is stored in one type."""

    model_config = ConfigDict(extra="forbid")
    dtype: str
    tensors: int
    weights: int
    nbytes: int


class Inspection(BaseModel):
    """What the headers of a model say."""

    model_config = ConfigDict(extra="forbid")
    path: str
    format: str
    architecture: str
    n_tensors: int
    n_weights: int
    nbytes: int
    bits_per_weight: float
    types: list[TypeShare]
    metadata: dict[str, Any]
    tensors: list[dict[str, Any]]


def open(source: str | Path) -> Model:
    """Open a model directory, a GGUF file, a hub id or a URL; see `fewbits.checkpoint.open_model`."""
    return open_model(source)


def inspect(source: str | Path) -> Inspection:
    """What a model holds, from its headers alone. Works for architectures that are not known, too.

    Raises:
        FewbitsError: nothing there, or damaged headers.
    """
    checkpoint = open_checkpoint(source)
    infos = list(checkpoint.tensors.values())
    if isinstance(checkpoint, GGUFCheckpoint):
        kind, metadata = "gguf", checkpoint.metadata
        architecture = str(metadata.get("general.architecture", "unknown"))
    else:
        kind, metadata = "safetensors", checkpoint.config
        architecture = str((metadata.get("architectures") or ["unknown"])[0])
    types = []
    for dtype in Counter(info.dtype for info in infos):
        of = [info for info in infos if info.dtype == dtype]
        types.append(
            TypeShare(
                dtype=dtype,
                tensors=len(of),
                weights=sum(prod(info.shape) for info in of),
                nbytes=sum(info.nbytes for info in of),
            )
        )
    n_weights, nbytes = sum(t.weights for t in types), sum(t.nbytes for t in types)
    return Inspection(
        path=str(checkpoint.path),
        format=kind,
        architecture=architecture,
        n_tensors=len(infos),
        n_weights=n_weights,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / max(1, n_weights),
        types=sorted(types, key=lambda t: -t.nbytes),
        metadata={key: _plain(value) for key, value in metadata.items()},
        tensors=[
            {"name": i.name, "shape": list(i.shape), "dtype": i.dtype, "nbytes": i.nbytes, "file": i.file.name}
            for i in infos
        ],
    )


def _plain(value: Any) -> Any:
    """A metadata value as JSON holds it; broken UTF-8 is shown with replacement characters."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def plan(
    source: str | Path,
    target: str,
    *,
    output: str | Path | None = None,
    mixture: MixtureOptions | None = None,
    split_max_size: int | None = None,
    edited: str | Path | None = None,
    pre_tokenizer: str | None = None,
    calibration: str | Path | Sequence[str | Path] = (),
    calibration_chunks: int | None = None,
    hessians: str | Path | None = None,
    effort: Effort = "default",
    method: str | None = None,
    keep: Sequence[str] = (),
    head_bits: int | None = None,
    measurement: str | Path | None = None,
    budget: Budget | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Plan:
    """What `quantize` would make, to the byte, from headers alone; for a budget, weights are read and texts run.

    Args:
        target: a preset of GGUF (`Q4_K_M`, `Q8_0`, ...) or an ecosystem's directory (`gptq:w4g128`, `bnb:nf4`, ...);
            `fewbits list` names them all.
        output: final file name; shapes only the names of the predicted files.
        mixture: overrides of the preset's rules.
        split_max_size: most bytes of tensor data in one file.
        edited: a plan saved as JSON and changed by hand, to be checked against the model.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer where it is not recognized.
        calibration: what `calibrate` or llama-imatrix made, or texts; see `fewbits.quantize.promised`.
        calibration_chunks: most windows of texts.
        hessians: folder that `calibrate` made beside the statistics; codes are then chosen with error feedback.
        effort: how much time to take where there is text; see docs/effort.md.
        method: of a directory's weights, where not the ecosystem's own, e.g. `search`.
        keep: regular expressions of linears that a directory keeps unquantized.
        head_bits: of the head, for exl2, exl3 and onnx: 6 (onnx: 8) unless said otherwise, 16 to leave it as it is.
        measurement: file of exl2's measuring pass: read where it exists, else written.
        budget: for the target `gguf`, or a directory's without bits in its name (`gptq:g128`): how much the files may
            take; types are chosen freely.
        threads: for a budget; None takes every core.
        progress: for a budget; called with (done, all, what).

    Raises:
        FewbitsError: anything that would keep `quantize` from making the files.
    """
    if is_directory_target(target):
        _refuse_gguf_options(target, mixture, pre_tokenizer, hessians)
        saved, measured = (Path(file) if file else None for file in (edited, measurement))
        options = (method, keep, split_max_size, _paths(calibration), calibration_chunks, "cpu", budget, saved)
        return DirectoryJob.of(source, target, *options, head_bits, measured, effort).spent(threads, progress).plan
    _refuse_directory_options(target, method, keep, head_bits, measurement)
    request = _request(target, mixture, split_max_size, output, edited)
    texts, folder = _paths(calibration), Path(hessians) if hessians else None
    made = GGUFJob.of(
        source, request, pre_tokenizer, texts, calibration_chunks, folder, budget, threads, progress, effort
    )
    return made.plan()


def quantize(
    source: str | Path,
    target: str,
    output: str | Path,
    *,
    mixture: MixtureOptions | None = None,
    split_max_size: int | None = None,
    edited: str | Path | None = None,
    pre_tokenizer: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    calibration: str | Path | Sequence[str | Path] = (),
    calibration_chunks: int | None = None,
    hessians: str | Path | None = None,
    effort: Effort = "default",
    method: str | None = None,
    keep: Sequence[str] = (),
    head_bits: int | None = None,
    measurement: str | Path | None = None,
    device: str = "cpu",
    measure_text: str | Path | None = None,
    measure_chunks: int | None = None,
    budget: Budget | None = None,
    verify: bool = True,
    max_memory: int | None = None,
    cluster: str | None = None,
) -> QuantizeReport:
    """Turn a model into a GGUF file that llama.cpp runs, or into a directory that the target's engines load.

    Arguments as for `plan`, `fewbits.quantize.execute` and `fewbits.quantize.directory.execute_directory`.

    Args:
        output: a path, or the URL of a store, to which the result is uploaded once it is whole.
        device: where calibration texts run through the model: `cpu`, `cuda` or `auto`; see docs/gpu.md.
        measure_text: measures the loss of a directory on this text in the end and writes it into its model card.
        measure_chunks: most windows of it.
        budget: see `plan`.
        verify: decode everything that was written once more.
        max_memory: most bytes of memory to use; None: no limit. The files do not depend on it.
        cluster: address of a Ray cluster whose processes do the work, see docs/cluster.md; None for threads.

    For a GGUF, texts as `calibration` are run through the model first; what comes out is kept as
    `<output>.imatrix.gguf`. For a directory each block is calibrated on what the quantized ones before it give.

    Raises:
        FewbitsError: bad input, an output that exists, a full disk, files that do not decode to finite weights; nothing
            is left under the final name. What is done of a long run stays in `<output>.partial`, and the same call goes
            on from there.
    """
    directory = is_directory_target(target)
    if directory:
        _refuse_gguf_options(target, mixture, pre_tokenizer, hessians)
    else:
        _refuse_directory_options(target, method, keep, head_bits, measurement, measure_text)
    _refuse_without_effect(calibration, calibration_chunks, measure_text, measure_chunks)
    texts = _paths(calibration)
    with local_output(output, overwrite) as place, workers_at(cluster, threads) as workers:
        if not directory:
            request, folder = (
                _request(target, mixture, split_max_size, place, edited),
                Path(hessians) if hessians else None,
            )
            made = GGUFJob.of(
                *(source, request, pre_tokenizer, texts, calibration_chunks, folder, budget, threads, progress),
                *(effort, workers, device),
            )
            made = replace(made, max_memory=max_memory)
            with made.work_folder(overwrite) as work:
                report = made.execute(work, overwrite)
                if verify:
                    files = [place.with_name(file.name) for file in report.files]
                    check_made(files, threads if max_memory is None else 1, progress)
            return report
        check_directory_output(place, overwrite, None if is_url(source) else Path(source))
        saved, measured = (Path(file) if file else None for file in (edited, measurement))
        options = (method, keep, split_max_size, texts, calibration_chunks, device, budget, saved)
        job = DirectoryJob.of(source, target, *options, head_bits, measured, effort)
        job = replace(job, named=str(output) if is_url(output) else None, max_memory=max_memory)
        limits = job.limits(place, threads)
        read_back = read_back_threads(job.plan, max_memory, threads) if verify else None
        if measure_text is not None:
            job.check_measurable(Path(measure_text))
        with job.work_folder(place, threads, overwrite) as work:
            job = job.spent(threads, progress, work)
            report = job.execute(place, threads, overwrite, progress, work, limits, workers)
            if verify:
                check_made([place], read_back, progress)
            if measure_text is not None:
                from fewbits.measure import measure  # imports torch, which quantizing does without

                told = measure(
                    place, measure_text, reference=source, chunks=measure_chunks, threads=threads, progress=progress
                )
                job.tell_loss(place, Measured(told.rows(), told.ruler(), Path(measure_text).name), work)
        return report


def _request(
    target: str,
    mixture: MixtureOptions | None,
    split_max_size: int | None,
    output: str | Path | None,
    edited: str | Path | None,
) -> PlanRequest:
    paths = [Path(path) if path else None for path in (output, edited)]
    return PlanRequest(target, mixture or MixtureOptions(), split_max_size, *paths)


def _paths(files: str | Path | Sequence[str | Path]) -> list[Path]:
    return [Path(files)] if isinstance(files, str | Path) else [Path(file) for file in files]


def _refuse_gguf_options(
    target: str,
    mixture: MixtureOptions | None,
    pre_tokenizer: str | None,
    hessians: str | Path | None,
) -> None:
    changed = mixture is not None and mixture != MixtureOptions(tensor_types=mixture.tensor_types)
    single = changed or (mixture is not None and bool(mixture.tensor_types))
    unused: dict[str, object] = {"types of single tensors": single}
    unused |= {"--pre-tokenizer": pre_tokenizer, "--hessians": hessians}
    for what, given in unused.items():
        if given:
            raise FewbitsError(f"{target}: {what} can be chosen for GGUF targets only.", "Leave it out.")


def _refuse_without_effect(
    calibration: str | Path | Sequence[str | Path],
    calibration_chunks: int | None,
    measure_text: str | Path | None,
    measure_chunks: int | None,
) -> None:
    if calibration_chunks and not calibration:
        raise FewbitsError("--calibration-chunks without a text.", "Pass --calibration TEXT, too.")
    if measure_chunks and not measure_text:
        raise FewbitsError("--measure-chunks without a text.", "Pass --measure TEXT, too.")


def _refuse_directory_options(
    target: str,
    method: str | None,
    keep: Sequence[str],
    head_bits: int | None = None,
    measurement: str | Path | None = None,
    measure_text: str | Path | None = None,
) -> None:
    unused: dict[str, object] = {"--method": method, "--keep": keep, "--measure": measure_text}
    unused |= {"--head-bits": head_bits, "--measurement": measurement}
    for what, given in unused.items():
        if given:
            raise FewbitsError(f"{target}: {what} is for model directories (gptq:, awq:, ct:, ...).", "Leave it out.")
