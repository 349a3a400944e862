"""llama.cpp's importance-matrix files, read and written: the GGUF layout and the older `.dat`.

Sources: llama.cpp tools/imatrix/imatrix.cpp (`save_imatrix`, `save_imatrix_legacy`) and common/imatrix-loader.cpp.
A GGUF file holds, for each weight NAME, `NAME.in_sum2` F32 [experts, columns] and `NAME.counts` F32 [experts, 1].
Ours may hold `NAME.sensitivity0` F32 [experts, columns] and `NAME.sensitivity0.rows` F32 [rows], too (and 1, for an
embedding that is the head as well), which llama.cpp passes over.
A `.dat` file is a list of (name, windows, values), where values are mean squares times the number of windows.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fewbits.calibration.statistics import Sensitivities, Sensitivity, Statistics, TensorStatistics
from fewbits.checkpoint.base import check_name
from fewbits.checkpoint.gguf import MAGIC, GGUFCheckpoint
from fewbits.errors import FewbitsError
from fewbits.formats.atomic import AtomicFile
from fewbits.formats.gguf.writer import TensorEntry, lay_out, write_shards

FileFormat = Literal["gguf", "dat"]
SUMS, COUNTS = ".in_sum2", ".counts"
SENSITIVITY = re.compile(r"(.+)\.sensitivity[01]")
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
TEXTS, TOKENS = "fewbits.calibration.text_sha256", "fewbits.calibration.tokens"
LEGACY_CHUNK = 512
"""Tokens of a window where the file does not say: llama-imatrix's default."""
MOST_NAME = 1024
DAMAGED = "It is truncated or damaged: make it again."


def read_statistics(path: str | Path) -> Statistics:
    """Read an importance matrix in either layout, told apart by the first bytes.

    Raises:
        FewbitsError: no such file, truncated, sizes that do not match, or sums that are negative or not finite.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise FewbitsError(f"{path}: cannot be read ({error.strerror}).", "Name an importance matrix.") from None
    statistics = _read_gguf(path) if magic == MAGIC else _read_dat(path)
    if not statistics.tensors:
        raise FewbitsError(f"{path}: there are no statistics in it.", "Make it with `fewbits calibrate`.")
    return statistics


def write_statistics(
    statistics: Statistics, path: str | Path, format: FileFormat = "gguf", overwrite: bool = False
) -> None:
    """Write an importance matrix that llama-quantize reads; it appears whole or not at all.

    Raises:
        FewbitsError: the output exists (without `overwrite`) or cannot be written.
    """
    path = Path(path)
    if format == "gguf":
        _write_gguf(statistics, path, overwrite)
    elif format == "dat":
        with AtomicFile(path, overwrite) as file:
            file.write(_dat(statistics))
    else:
        raise FewbitsError(f"There is no importance-matrix format {format!r}.", "Choose gguf or dat.")


def _read_gguf(path: Path) -> Statistics:
    checkpoint = GGUFCheckpoint(path)
    kind = checkpoint.metadata.get("general.type")
    names = [name.removesuffix(SUMS) for name in checkpoint.tensors if name.endswith(SUMS)]
    if kind != "imatrix" and not names:
        raise FewbitsError(f"{path}: it holds a {kind or 'model'}, no importance matrix.", "Name another file.")
    lone = {n.removesuffix(COUNTS) for n in checkpoint.tensors if n.endswith(COUNTS)}.symmetric_difference(names)
    if lone:
        raise FewbitsError(f"{path}: {min(lone)} has not both sums and counts.", DAMAGED)
    tensors = {}
    for name in names:
        for info in (checkpoint.info(name + SUMS), checkpoint.info(name + COUNTS)):
            if info.dtype != "F32":
                raise FewbitsError(f"{path}: {info.name} is {info.dtype}, not F32.", DAMAGED)
        sums, counts = checkpoint.read(name + SUMS), checkpoint.read(name + COUNTS).ravel()
        if not counts.size or not sums.size or sums.size % counts.size:
            raise FewbitsError(f"{path}: {name} has {sums.size} sums for {counts.size} counts.", DAMAGED)
        tensors[name] = _checked(path, name, sums.reshape(counts.size, -1), counts)
    return Statistics(
        tensors,
        [name for name in _texts(path, checkpoint.metadata, DATASETS) if name],
        _whole(path, checkpoint.metadata, CHUNK_COUNT, 0),
        _whole(path, checkpoint.metadata, CHUNK_SIZE, LEGACY_CHUNK) or LEGACY_CHUNK,
        _texts(path, checkpoint.metadata, TEXTS),
        _whole(path, checkpoint.metadata, TOKENS, 0),
        _sensitivities(checkpoint),
    )


def _sensitivities(checkpoint: GGUFCheckpoint) -> Sensitivities:
    out: Sensitivities = {}
    for name in checkpoint.tensors:
        if found := SENSITIVITY.fullmatch(name):
            rows = f"{name}.rows" if f"{name}.rows" in checkpoint.tensors else None
            values = [checkpoint.read(part) for part in (name, rows) if part]
            if values[0].ndim != 2 or not all(
                value.size and 0 <= value.min() <= value.max() < np.inf for value in values
            ):
                raise FewbitsError(f"{checkpoint.path}: {name} is negative, not finite or no matrix.", DAMAGED)
            out.setdefault(found[1], []).append(Sensitivity(values[0], values[1].ravel() if rows else None))
    return out


def _whole(path: Path, metadata: dict[str, Any], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int | np.integer) or value < 0:
        raise FewbitsError(f"{path}: {key} is {value!r}.", DAMAGED)
    return int(value)


def _texts(path: Path, metadata: dict[str, Any], key: str) -> list[str]:
    value = metadata.get(key, [])
    if not isinstance(value, list):
        raise FewbitsError(f"{path}: {key} is no list of texts.", DAMAGED)
    return value


def _checked(path: Path, name: str, sums: npt.NDArray[np.float32], counts: npt.NDArray[np.float32]) -> TensorStatistics:
    for what, values in (("input sum", sums), ("count", counts)):
        # a NaN compares false, too
        if not (values.min() >= 0 and values.max() < np.inf):
            raise FewbitsError(f"{path}: {name} has a negative or non-finite {what}.", "Make it again.")
    with np.errstate(over="ignore"):
        means = sums / np.where(counts > 0, counts, 1)[:, None]
    if not means.max() < np.inf:
        raise FewbitsError(f"{path}: {name} has counts that are no numbers of tokens.", DAMAGED)
    return TensorStatistics(np.ascontiguousarray(sums, np.float32), np.ascontiguousarray(counts, np.float32))


class _Fields:
    """Takes fields off the front of a `.dat` file, never past its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        self.at = 0

    def take(self, nbytes: int, what: str) -> bytes:
        if not 0 <= nbytes <= len(self.data) - self.at:
            raise FewbitsError(f"{self.path}: {what} does not fit the file's {len(self.data)} bytes.", DAMAGED)
        self.at += nbytes
        return self.data[self.at - nbytes : self.at]

    def number(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])


def _read_dat(path: Path) -> Statistics:
    fields = _Fields(path)
    entries = fields.number("the number of entries")
    # the smallest entry takes 17 bytes
    if not 0 < entries <= len(fields.data) // 17:
        raise FewbitsError(f"{path}: it is no importance matrix.", "Name a file made by calibrate or llama-imatrix.")
    tensors: dict[str, TensorStatistics] = {}
    for number in range(entries):
        length = fields.number(f"entry {number + 1}")
        if not 0 < length <= MOST_NAME:
            raise FewbitsError(f"{path}: the name of entry {number + 1} has {length} bytes.", DAMAGED)
        data = fields.take(length, f"the name of entry {number + 1}")
        name = check_name(path, data.decode("utf-8", "surrogateescape"))
        calls, count = fields.number(name), fields.number(name)
        if count < 1 or calls < 0:
            raise FewbitsError(f"{path}: {name} has {count} sums of {calls} windows.", DAMAGED)
        values = np.frombuffer(fields.take(4 * count, name), "<f4").reshape(1, -1)
        if name in tensors:
            raise FewbitsError(f"{path}: {name} stands there twice.", DAMAGED)
        # some writers leave the number of windows at 0 and give the values themselves: then one token counts as seen
        rows = calls * LEGACY_CHUNK or 1
        with np.errstate(over="ignore", invalid="ignore"):
            sums = values * np.float32(LEGACY_CHUNK if calls else 1)
        tensors[name] = _checked(path, name, sums, np.array([rows], np.float32))
    chunks, datasets = 0, []
    if fields.at < len(fields.data):
        chunks = fields.number("the number of windows")
        if chunks < 0:
            raise FewbitsError(f"{path}: it says {chunks} windows.", DAMAGED)
    if fields.at < len(fields.data):
        name = fields.take(fields.number("the text's name"), "the text's name").decode("utf-8", "surrogateescape")
        datasets = [name] if name else []
    return Statistics(tensors, datasets, chunks, LEGACY_CHUNK)


def _write_gguf(statistics: Statistics, path: Path, overwrite: bool) -> None:
    metadata: dict[str, Any] = {
        "general.type": "imatrix",
        DATASETS: list(statistics.datasets),
        CHUNK_COUNT: statistics.chunk_count,
        CHUNK_SIZE: statistics.chunk_size,
    }
    if statistics.texts_sha256:
        metadata[TEXTS] = list(statistics.texts_sha256)
    if statistics.tokens:
        metadata[TOKENS] = np.uint64(statistics.tokens)
    entries, values = [], []
    for name, tensor in sorted(statistics.tensors.items()):
        for suffix, array in ((SUMS, tensor.sums), (COUNTS, tensor.counts.reshape(-1, 1))):
            entries.append(TensorEntry(name + suffix, array.shape, "F32", array.nbytes))
            values.append(np.ascontiguousarray(array, np.float32))
    for name, known in sorted(statistics.sensitivities.items()):
        for number, one in enumerate(known):
            for suffix, part in (("", one.columns), (".rows", one.rows)):
                if part is not None:
                    entries.append(TensorEntry(f"{name}.sensitivity{number}{suffix}", part.shape, "F32", part.nbytes))
                    values.append(np.ascontiguousarray(part, np.float32))
    shards = lay_out(path, metadata, entries, None)
    write_shards(shards, ([array.tobytes()] for array in values), overwrite)


def _dat(statistics: Statistics) -> bytes:
    stored = {name: t for name, t in sorted(statistics.tensors.items()) if t.counts.any()}
    parts = [struct.pack("<i", len(stored))]
    for name, tensor in stored.items():
        data = name.encode("utf-8", "surrogateescape")
        # rounded up: a window that was not filled counts, else few tokens would make none
        windows = -(-int(tensor.counts.max()) // statistics.chunk_size)
        values = tensor.importance() * np.float32(windows)
        parts += [struct.pack("<i", len(data)), data, struct.pack("<ii", windows, values.size), values.tobytes()]
    dataset = (statistics.datasets[-1] if statistics.datasets else "").encode("utf-8", "surrogateescape")
    parts += [struct.pack("<ii", statistics.chunk_count, len(dataset)), dataset]
    return b"".join(parts)
