"""Model directories on disk: tensors written in any order, by any thread; the folder appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from fewbits.checkpoint.safetensors import read_json
from fewbits.errors import FewbitsError
from fewbits.formats.atomic import AtomicFile, check_room, explain
from fewbits.formats.directory.shards import INDEX, MAX_SHARD_SIZE, NUMPY_TYPES, Entry, ShardFile, index_json, lay_out

__all__ = ["MAX_SHARD_SIZE", "DirectoryWriter", "Entry", "ShardFile", "check_directory_output", "index_json", "lay_out"]

STATE, LOCK, SCRATCH = "state.json", ".lock", ".scratch"
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

    Tensors are put in any order, from any thread. Until the end everything lies beside the final name: in a hidden
    folder, or with a `resume_key` in `<path>.partial`, which is kept on errors once something is recorded there.

    Args:
        path: the final folder. Its parent exists.
        shards: as `lay_out` gives them.
        files: further files by relative name, e.g. config.json; `add_file` takes more.
        overwrite: replace a model directory that we wrote, and an unfinished run of another key.
        resume_key: identity of model, text and options. Tensors that an earlier run of the same key recorded are kept.
        source: the model that is read: it is never replaced.

    Raises:
        FewbitsError: the output exists, no room, an unfinished run with another key, or one that is going on;
            at the end: a tensor was not put.
    """

    def __init__(
        self,
        path: Path,
        shards: Sequence[ShardFile],
        files: Mapping[str, bytes] | None = None,
        overwrite: bool = False,
        resume_key: str | None = None,
        source: Path | None = None,
    ) -> None:
        self.path = path
        self.overwrite = overwrite
        self.source = source
        self._final = path.resolve()
        self._shards = shards
        self._places = {entry.name: (shard.name, entry, at) for shard in shards for entry, at in shard.offsets()}
        self._files: dict[str, bytes] = {}
        self._key = None if resume_key is None else _digest(resume_key, shards)
        hidden = f".{self._final.name}.{os.getpid()}.partial"
        self.partial = self._final.with_name(hidden if resume_key is None else f"{self._final.name}.partial")
        self._mutex = threading.Lock()
        self._recording = threading.Lock()
        self._lock = FileLock(self.partial / LOCK, timeout=0, thread_local=False)
        self._claimed: set[str] = set()
        self._written: set[str] = set()
        self._recorded: set[str] = set()
        check_directory_output(path, overwrite, source)
        for name, data in (files or {}).items():
            self.add_file(name, data)

    @property
    def scratch(self) -> Path:
        """A folder for what the run itself needs to go on after an interruption; it is gone in the end."""
        folder = self.partial / SCRATCH
        folder.mkdir(exist_ok=True)
        return folder

    def add_file(self, name: str, data: bytes) -> None:
        """A further file, written at the end; a later one of the same name counts."""
        if not OUR_FILES.fullmatch(name) or name == STATE or name in {shard.name for shard in self._shards}:
            raise FewbitsError(f"{self.path}: {name!r} is no file of a model directory.")
        self._files[name] = data

    def has(self, name: str) -> bool:
        """Whether a tensor is written, now or by the run that is resumed."""
        self._place(name)
        return name in self._written

    def places(self) -> Iterator[tuple[str, tuple[str, Entry, int]]]:
        """Every tensor by name: its file, what it is, and where its bytes start in the file."""
        yield from self._places.items()

    def stored(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor that is written."""
        if not self.has(name):
            raise FewbitsError(f"{self.path}: tensor {name!r} is read before it is written.")
        file, entry, offset = self._place(name)
        return np.fromfile(self.partial / file, np.uint8, entry.nbytes, offset=offset)

    def put(self, name: str, data: Data) -> None:
        """Write a tensor, once.

        Args:
            data: an array of the entry's shape and type (BF16 as uint16, 8-bit floats as uint8), or its bytes, which
                may come as a flat uint8 array.

        Raises:
            FewbitsError: unknown or already written, another shape, type or size, disk full.
        """
        entry = self._place(name)[1]
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
        file, entry, offset = self._place(name)
        with self._mutex:
            if name in self._claimed:
                raise FewbitsError(f"{self.path}: tensor {name!r} is written twice.")
            self._claimed.add(name)
        try:
            written = 0
            for piece in pieces:
                data = self._bytes(entry, piece)
                # checked before writing: never into the next tensor
                if written + data.nbytes <= entry.nbytes:
                    self._write(file, offset + written, data)
                written += data.nbytes
            if written != entry.nbytes:
                raise FewbitsError(f"{self.path}: tensor {name!r} came out as {written} bytes, not {entry.nbytes}.")
        except BaseException:
            with self._mutex:
                self._claimed.discard(name)
            raise
        with self._mutex:
            self._written.add(name)

    def checkpoint(self, names: Iterable[str]) -> None:
        """Record tensors as done, once they are safely on the disk. Without a resume key nothing is recorded.

        Raises:
            FewbitsError: one of them is not written yet.
        """
        if self._key is None:
            return
        with self._recording, self._explained():
            fresh = {name for name in names if name not in self._recorded}
            for name in fresh:
                if not self.has(name):
                    raise FewbitsError(f"{self.path}: tensor {name!r} is recorded before it is written.")
            for file in {self._places[name][0] for name in fresh}:
                _sync(self.partial / file)
            self._recorded |= fresh
            self._record()

    @property
    def nbytes(self) -> int:
        """Size of the whole directory, as far as its files are known yet."""
        index = index_json(self._shards) or b""
        return sum(shard.nbytes for shard in self._shards) + sum(map(len, self._files.values())) + len(index)

    def __enter__(self) -> DirectoryWriter:
        created = not self.partial.exists()
        try:
            with self._explained():
                self._begin()
        except BaseException:
            self._lock.release(force=True)
            if created:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        published = False
        try:
            if error is None:
                with self._explained():
                    self._publish()
                published = True
        finally:
            self._lock.release(force=True)
            if not published and not self._worth_keeping():
                shutil.rmtree(self.partial, ignore_errors=True)

    def _worth_keeping(self) -> bool:
        scratch = self.partial / SCRATCH
        return self._key is not None and bool(self._recorded or (scratch.is_dir() and any(scratch.iterdir())))

    def _begin(self) -> None:
        if self._key is None:
            shutil.rmtree(self.partial, ignore_errors=True)  # of a killed process whose number came again
            self.partial.mkdir()
        else:
            self._resume(self._key)
        check_room(self._final, self.nbytes - sum(self._places[name][1].nbytes for name in self._recorded))
        for shard in self._shards:
            with open(self.partial / shard.name, "ab") as stream:
                stream.truncate(shard.nbytes)
            self._write(shard.name, 0, memoryview(shard.header))
        if self._key is not None:
            self._record()

    def _resume(self, key: str) -> None:
        in_the_way = FewbitsError(f"{self.partial}: it is in the way of what an unfinished run keeps.", "Move it.")
        if self.partial.exists() and not self.partial.is_dir():
            raise in_the_way
        self.partial.mkdir(exist_ok=True)
        found = [entry.name for entry in self.partial.iterdir()]
        try:
            state = read_json(self.partial / STATE)
        except FewbitsError:
            # the state is there before anything else of ours
            if any(name != LOCK and not name.startswith(f".{STATE}.") for name in found):
                raise in_the_way from None
            state = {}
        try:
            self._lock.acquire()
        except Timeout:
            raise FewbitsError(f"{self.path}: another run is writing it.", "Wait for its end.") from None
        if state and state.get("key") != key:
            if not self.overwrite:
                raise FewbitsError(
                    f"{self.partial}: an unfinished run with another model, text or options.",
                    "Repeat it with the same, or pass --overwrite to begin anew.",
                )
            self._clear(keep={LOCK})
            state, found = {}, []
        sizes = {shard.name: shard.nbytes for shard in self._shards}
        whole = {name for name in found if name in sizes and (self.partial / name).stat().st_size == sizes[name]}
        recorded = [name for name in state.get("done", []) if name in self._places]
        done = {name for name in recorded if self._places[name][0] in whole}
        self._claimed, self._written, self._recorded = set(done), set(done), set(done)
        self._record()

    def _clear(self, keep: set[str]) -> None:
        for entry in self.partial.iterdir():
            if entry.name in keep:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _record(self) -> None:
        with AtomicFile(self.partial / STATE, overwrite=True) as file:
            file.write(json.dumps({"key": self._key, "done": sorted(self._recorded)}).encode())

    def _publish(self) -> None:
        missing = [name for name in self._places if name not in self._written]
        if missing:
            raise FewbitsError(f"{self.path}: {len(missing)} tensors were not written, {missing[0]!r} among them.")
        check_directory_output(self.path, self.overwrite, self.source)
        index = index_json(self._shards)
        files = {**self._files, **({INDEX: index} if index else {})}
        for name, data in files.items():
            target = self.partial / name
            target.parent.mkdir(exist_ok=True)
            with AtomicFile(target, overwrite=True) as file:
                file.write(data)
        for shard in self._shards:
            _sync(self.partial / shard.name)
        self._lock.release(force=True)
        # lock, scratch, and what a killed run may have left; without its state an unfinished run could not go on
        ours = {shard.name for shard in self._shards} | {name.split("/")[0] for name in files}
        self._clear(keep={STATE, *ours})
        self._replace()
        (self._final / STATE).unlink(missing_ok=True)

    def _replace(self) -> None:
        """Rename the finished folder; what stood there before is removed last."""
        old = self._final.with_name(f".{self._final.name}.{os.getpid()}.old")
        replaces = self._final.exists()
        if replaces:
            os.rename(self._final, old)
        try:
            os.rename(self.partial, self._final)
        except BaseException:
            if replaces:
                os.rename(old, self._final)
            raise
        if os.name == "posix":
            _sync(self._final)
            _sync(self._final.parent)
        if replaces:
            shutil.rmtree(old, ignore_errors=True)

    def _place(self, name: str) -> tuple[str, Entry, int]:
        try:
            return self._places[name]
        except KeyError:
            raise FewbitsError(f"{self.path}: no tensor {name!r} was laid out.") from None

    def _bytes(self, entry: Entry, piece: Data) -> memoryview:
        if not isinstance(piece, np.ndarray):
            return memoryview(piece).cast("B")
        if piece.dtype not in (np.dtype(NUMPY_TYPES[entry.dtype]), np.uint8):  # uint8: its bytes
            raise FewbitsError(f"{self.path}: tensor {entry.name!r} came out as {piece.dtype}, not {entry.dtype}.")
        return np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data

    def _write(self, file: str, offset: int, data: memoryview) -> None:
        # a stream of its own for every write: positions are not shared between threads
        with self._explained(), open(self.partial / file, "r+b") as stream:
            stream.seek(offset)
            stream.write(data)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise explain(self.path, error) from None


def _digest(key: str, shards: Sequence[ShardFile]) -> str:
    """The identity of a run: what was asked for and the exact files that it makes."""
    whole = hashlib.sha256(key.encode())
    for shard in shards:
        whole.update(shard.name.encode() + b"\0" + shard.header)
    return whole.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are safely on the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
