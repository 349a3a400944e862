"""From calibration to importances: what `--calibration` names, and what each planned tensor gets of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fewbits.calibration.imatrix_files import read_statistics
from fewbits.calibration.statistics import DATASET_KEY, Statistics, text_mark
from fewbits.checkpoint import open_model
from fewbits.checkpoint.gguf import MAGIC
from fewbits.codecs import codec
from fewbits.errors import FewbitsError, about
from fewbits.formats.gguf.source import GGUFSource
from fewbits.plan import Plan, PlannedTensor
from fewbits.plan.tensors import EMBEDDINGS, OUTPUT, role
from fewbits.quantize.hessians import experts_of
from fewbits.workers import Workers

Progress = Callable[[int, int, str], None]
"""Called with what is done, what there is to do, and the part at hand."""
Importances = dict[str, npt.NDArray[np.float32]]
"""By tensor name, [experts, columns]: the weight of each column's squared error."""
CHUNKS = 128
"""Windows of a text that calibrate a model where nothing else is said, twice those of the figures in docs/."""
CONTEXT = 512
NAMES = 5
"""So many names are spelled out in a note."""


def split_sources(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The statistics files among what `--calibration` names, and the texts.

    Raises:
        FewbitsError: a file cannot be read.
    """
    statistics = [path for path in paths if _is_statistics(path)]
    return statistics, [path for path in paths if path not in statistics]


def _is_statistics(path: Path) -> bool:
    """By the first bytes: a legacy imatrix file begins with a small number, whose bytes no text has."""
    try:
        with open(path, "rb") as file:
            return (first := file.read(4)) == MAGIC or b"\0" in first
    except OSError as error:
        raise FewbitsError(
            f"{path}: cannot be read ({error.strerror}).",
            "Name a text or what `fewbits calibrate` or llama-imatrix made.",
        ) from None


def read_all(paths: Sequence[Path]) -> Statistics:
    """Statistics files of one model as one.

    Raises:
        FewbitsError: a file is damaged, or they are of different models.
    """
    first, *others = [read_statistics(path) for path in paths]
    with about(paths[0]):
        return first.merged(others) if others else first


def promised(
    model: str | Path, paths: Sequence[Path], output: Path, chunks: int | None = None, overwrite: bool = False
) -> tuple[Statistics, Path]:
    """The statistics that `--calibration` names, and their file.

    Of texts alone, which have yet to run through the model, it is what the statistics will tell of themselves, without
    any tensor, and the file beside the output that will keep them.

    Args:
        model: directory, GGUF file or hub id.
        paths: statistics files or texts.
        output: the quantized file.
        chunks: most windows of texts; None means `CHUNKS`.

    Raises:
        FewbitsError: a file cannot be used, or the statistics of a text would replace a file.
    """
    files, texts = split_sources(paths)
    kept = output.with_name(f"{output.stem}.imatrix.gguf")
    if not files and kept.exists() and not overwrite:
        raise FewbitsError(
            f"{kept}: there are statistics already.", f"Use them: --calibration {kept}; or pass --overwrite."
        )
    if files and not texts:
        return read_all(files), files[0]
    from fewbits.calibration.texts import read_texts  # imports torch, which statistics files do without

    text = read_texts(texts, open_model(model).tokenizer(), CONTEXT, chunks or CHUNKS)
    if not files:
        return Statistics({}, text.datasets, len(text.inputs), CONTEXT, text.sha256, text.inputs.size), kept
    found = read_all(files)
    names, digests = ([*found.datasets, *text.datasets], [*found.texts_sha256, *text.sha256])
    return replace(found, datasets=list(dict.fromkeys(names)), texts_sha256=list(dict.fromkeys(digests))), files[0]


def calibrate_texts(
    model: str | Path,
    texts: Sequence[Path],
    kept: Path | None,
    chunks: int | None = None,
    sensitivity: bool = False,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    max_memory: int | None = None,
    workers: Workers | None = None,
    device: str = "cpu",
) -> Statistics:
    """What was `promised`: the statistics of texts, kept for other targets; see `calibration.run.calibrate`."""
    from fewbits.calibration.run import calibrate

    return calibrate(
        *(model, texts, kept),
        chunks=chunks or CHUNKS,
        context=CONTEXT,
        output_tensor=True,
        sensitivity=sensitivity,
        device=device,
        threads=threads,
        overwrite=overwrite,
        progress=progress,
        max_memory=max_memory,
        workers=workers,
    ).statistics


def with_provenance(source: GGUFSource, statistics: Statistics, file: Path) -> GGUFSource:
    """The source with the keys by which llama.cpp tells what importance matrix a file was made with."""
    texts = [Path(name).name for name in statistics.datasets] or ["unknown"]
    digests = [text_mark(digest) for digest in statistics.texts_sha256]
    tokens = statistics.tokens or statistics.chunk_count * statistics.chunk_size
    keys: dict[str, Any] = {
        "quantize.imatrix.file": file.name,
        DATASET_KEY: " ".join([*texts, *digests, f"tokens:{tokens}"]),
        "quantize.imatrix.entries_count": len(statistics.tensors),
        "quantize.imatrix.chunks_count": statistics.chunk_count,
    }
    return replace(source, metadata={**source.metadata, **keys})


def importances_of(plan: Plan, statistics: Statistics, file: Path) -> tuple[Importances, list[str]]:
    """The importances of each tensor whose type has use for them, and notes on those that have none.

    Raises:
        FewbitsError: sizes that do not match, or no tensor of the model is in the statistics.
    """
    found: Importances = {}
    without: list[str] = []
    silent: list[str] = []
    for tensor in plan.tensors:
        if not uses_importances(tensor):
            continue
        known = statistics.tensors.get(tensor.name)
        if known is None:
            if tensor.name not in EMBEDDINGS and role(tensor.name) != OUTPUT:
                without.append(tensor.name)
            continue
        experts = experts_of(tensor)
        try:
            known = known.split(experts, tensor.shape[-1])
        except FewbitsError as error:
            raise FewbitsError(f"{file}: {tensor.name}: {error.message}", "Name statistics of this model.") from None
        found[tensor.name] = known.importance()
        if experts == 1 and known.without_data:
            without.append(tensor.name)
        elif known.without_data:
            silent += [f"expert {expert} of {tensor.name}" for expert in known.without_data]
    if not found and without:
        raise FewbitsError(f"{file}: holds nothing on any tensor of {plan.model}.", "Name statistics of this model.")
    notes = []
    if without:
        notes.append(f"{len(without)} tensors have no statistics and weigh all columns alike: {_some(without)}")
    if silent:
        notes.append(
            f"{len(silent)} matrices of experts saw no calibration text and weigh all columns alike: {_some(silent)}"
        )
    return found, notes


def uses_importances(tensor: PlannedTensor) -> bool:
    """Whether importances change the codes that a tensor gets."""
    return tensor.method not in ("copy", "convert") and codec(tensor.codec).weighted


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES]) + (", ..." if len(names) > NAMES else "")


def calibration_device(wanted: str, calibrated: bool, target: str, workers: Workers | None = None) -> str:
    """The device that texts run on: `cpu` or `cuda`; on a cluster nobody asked for a GPU by `auto`.

    Raises:
        FewbitsError: no text runs, or there is no such device.
    """
    if not calibrated:
        if wanted != "cpu":
            raise FewbitsError(f"{target}: no text is calibrated with, so --device has no effect.", "Leave it out.")
        return "cpu"
    if wanted == "auto" and workers:
        return "cpu"
    from fewbits.calibration.run import resolve_device  # imports torch, which most runs do without

    return resolve_device(wanted)
