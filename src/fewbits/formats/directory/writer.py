"""Model directories on disk: tensors written in any order, by any thread; the folder appears whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from fewbits.errors import FewbitsError
from fewbits.formats.atomic import explained
from fewbits.formats.directory.shards import INDEX, MAX_SHARD_SIZE, NUMPY_TYPES, Entry, ShardFile, index_json, lay_out
from fewbits.formats.journal import published, sync
from fewbits.formats.tensor_files import File, Span, TensorFiles
from fewbits.formats.work import WorkFolder, remove

__all__ = ["MAX_SHARD_SIZE", "DirectoryWriter", "Entry", "ShardFile", "check_directory_output", "index_json", "lay_out"]

OUR_FILES = re.compile(
    r"[\w-][\w.-]*\.(json|safetensors|jinja|model|onnx|onnx\.data)|README\.md|(?i:licen[sc]e|notice|copying)[\w.-]*"
    r"|merges\.txt|vocab\.txt|additional_chat_templates/[\w-][\w.-]*\.jinja"
)
"""What a model directory holds that we wrote."""

Data = npt.NDArray[Any] | bytes | bytearray | memoryview


def check_directory_output(path: Path, overwrite: bool = False, source: Path | None = None) -> None:
    """Refuse an output folder that cannot be made or must not be replaced, before any work is done.

    Args:
        overwrite: replace a model directory that we wrote; nothing else is ever replaced.
        source: the model that is read: the output must not lie on it.

    Raises:
        FewbitsError: says what is in the way.
    """
    final = path.resolve()
    if source is not None and (final == source.resolve() or final in source.resolve().parents):
        raise FewbitsError(f"{path}: the output would replace the model it is made from.", "Name another folder.")
    if not final.parent.is_dir():
        raise FewbitsError(f"{path}: the folder {final.parent} does not exist.", "Create it first.")
    if not final.exists():
        return
    if not final.is_dir():
        raise FewbitsError(f"{path}: the output is a file, a model directory is to be written.", "Name a folder.")
    if not any(final.iterdir()):
        return
    if published(final):
        return  # the folder is there because a run was killed in its last step
    if not overwrite:
        raise FewbitsError(f"{path}: the output exists.", "Choose another name or pass --overwrite.")
    names = (file.relative_to(final).as_posix() for file in final.rglob("*") if file.is_symlink() or not file.is_dir())
    foreign = next((name for name in names if not OUR_FILES.fullmatch(name)), None)
    if foreign is not None or not _is_ours(final):
        reason = f"it holds {foreign!r}" if foreign is not None else "its config.json has no quantization_config"
        raise FewbitsError(
            f"{path}: this folder is not replaced, for it may be no result of quantizing ({reason}).",
            "Choose another name, or remove it yourself.",
        )


def _is_ours(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and bool(config.get("quantization_config"))


class DirectoryWriter:
    """A context manager for a model directory, which appears under its final name whole or not at all.

    Tensors are put in any order, from any thread. Until the end everything lies in the work folder.

    Args:
        work: of this run; its output is the final folder, whose parent exists.
        shards: as `lay_out` gives them.
        files: further files by relative name, e.g. config.json; `add_file` takes more.
        overwrite: replace a model directory that we wrote.
        source: the model that is read: it is never replaced.

    Raises:
        FewbitsError: the output exists, no room; in `finish`: a tensor was not put.
    """

    def __init__(
        self,
        work: WorkFolder,
        shards: Sequence[ShardFile],
        files: Mapping[str, bytes] | None = None,
        overwrite: bool = False,
        source: Path | None = None,
    ) -> None:
        self.path = work.output
        self.work = work
        self.overwrite = overwrite
        self.source = source
        self._shards = shards
        self._places = {entry.name: (shard.name, entry, at) for shard in shards for entry, at in shard.offsets()}
        self._files: dict[str, bytes] = {}
        check_directory_output(self.path, overwrite, source)
        for name, data in (files or {}).items():
            self.add_file(name, data)
        self.tensors = TensorFiles(
            work,
            [File(shard.name, shard.header, shard.nbytes) for shard in shards],
            {name: Span(file, at, entry.nbytes) for name, (file, entry, at) in self._places.items()},
            self.nbytes - sum(shard.nbytes for shard in shards),
        )

    def __enter__(self) -> DirectoryWriter:
        self.tensors.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tensors.__exit__(kind, error, trace)

    def add_file(self, name: str, data: bytes) -> None:
        """A further file, written at the end; a later one of the same name counts."""
        if not OUR_FILES.fullmatch(name) or name in {shard.name for shard in self._shards}:
            raise FewbitsError(f"{self.path}: {name!r} is no file of a model directory.")
        self._files[name] = data

    def has(self, name: str) -> bool:
        """Whether a tensor is written, now or by the run that is gone on from."""
        return self.tensors.has(name)

    def places(self) -> Iterator[tuple[str, tuple[str, Entry, int]]]:
        """Every tensor by name: its file, what it is, and where its bytes start in the file."""
        yield from self._places.items()

    def stored(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor that is written."""
        return self.tensors.stored(name)

    def put(self, name: str, data: Data) -> None:
        """Write a tensor, once.

        Args:
            data: an array of the entry's shape and type (BF16 as uint16, 8-bit floats as uint8), or its bytes, which
                may come as a flat uint8 array.

        Raises:
            FewbitsError: unknown or already written, another shape, type or size, disk full.
        """
        self.tensors.span(name)
        entry = self._places[name][1]
        shaped = isinstance(data, np.ndarray) and not (data.dtype == np.uint8 and data.ndim == 1)
        if isinstance(data, np.ndarray) and shaped and data.shape != entry.shape:
            wanted = list(entry.shape)
            raise FewbitsError(f"{self.path}: tensor {name!r} came out as {list(data.shape)}, not {wanted}.")
        self.put_pieces(name, [data])

    def put_pieces(self, name: str, pieces: Iterable[Data]) -> None:
        """Like `put`, with the bytes in pieces, in order: for tensors that need not fit into memory.

        Args:
            pieces: bytes, uint8 arrays of any shape that hold bytes, or arrays of the entry's type.
        """
        self.tensors.span(name)
        entry = self._places[name][1]
        self.tensors.put(name, (self._bytes(entry, piece) for piece in pieces))

    @property
    def nbytes(self) -> int:
        """Size of the whole directory, as far as its files are known yet."""
        index = index_json(self._shards) or b""
        return sum(shard.nbytes for shard in self._shards) + sum(map(len, self._files.values())) + len(index)

    def finish(self) -> Path:
        """Write what stands beside the tensors; returns the finished folder, which waits to be published.

        Raises:
            FewbitsError: a tensor is missing, or something has come to be where the output is to stand.
        """
        self.tensors.finish()
        check_directory_output(self.path, self.overwrite, self.source)
        index = index_json(self._shards)
        with explained(self.path):
            for entry in self.tensors.folder.iterdir():
                if entry.name not in {shard.name for shard in self._shards}:
                    remove(entry)  # an interrupted run of this has left it
            for name, data in {**self._files, **({INDEX: index} if index else {})}.items():
                target = self.tensors.folder / name
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(data)
                sync(target)
                sync(target.parent)
        return self.tensors.folder

    def _bytes(self, entry: Entry, piece: Data) -> memoryview:
        if not isinstance(piece, np.ndarray):
            return memoryview(piece).cast("B")
        if piece.dtype not in (np.dtype(NUMPY_TYPES[entry.dtype]), np.uint8):  # uint8: its bytes
            raise FewbitsError(f"{self.path}: tensor {entry.name!r} came out as {piece.dtype}, not {entry.dtype}.")
        return np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
