"""The folder beside an output that an unfinished run goes on from."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from fewbits.errors import FewbitsError
from fewbits.formats.atomic import DiskError, explained
from fewbits.formats.facts import Facts, changes
from fewbits.formats.journal import JOURNAL, PUBLISHED, Journal, checksum, sync, work_folder

LOCK, REPLACED = ".lock", "replaced"
BEGUN, STEP, CHECKSUM, REPORT = "run", "step", "crc32", "report"
"""Keys of the journal's entries: the facts of the run; a file that is done, and its checksum; what the run has told in
the end."""
VALUABLE = 60.0
"""Seconds of work that are kept even where the run ends for a reason that seems to be in its input."""


class WorkFolder:
    """`<output>.partial/`: a context manager around a run, which goes on where an earlier one was interrupted.

    The folder vanishes when the run ends well, or has nothing done that is worth keeping. Inside are the journal,
    whose first line holds the facts of the run, and whatever is being made.

    Args:
        output: final name of a file or a directory.
        facts: everything that the result follows from. An unfinished run with other facts is not gone on from.
        overwrite: begin anew where the facts differ.

    Attributes:
        report: what the run has told of itself, where an earlier process was interrupted after all the work.

    Raises:
        FewbitsError: an unfinished run with other facts, which says what has changed; another process is at it; the
            folder's name is taken.
    """

    def __init__(self, output: Path, facts: Facts, overwrite: bool = False) -> None:
        self.output = output
        self.path = work_folder(output)
        self.facts: Facts = json.loads(json.dumps(facts))
        self.overwrite = overwrite
        self.report: dict[str, Any] | None = None
        self._lock = FileLock(self.path / LOCK, timeout=0, thread_local=False)
        self._started = time.monotonic()

    def __enter__(self) -> WorkFolder:
        with explained(self.output):
            self._acquire()
            try:
                self._begin()
            except BaseException:
                self._leave(keep=bool(Journal(self.path / JOURNAL).entries))
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._leave(keep=error is not None and self._worth_keeping(error))

    @property
    def published(self) -> bool:
        """Whether the results have their final names."""
        return self.report is not None

    def has(self, name: str) -> bool:
        """Whether a file in the folder is done, and as it was then."""
        known = next((entry for entry in reversed(self.journal.entries) if entry.get(STEP) == name), None)
        return known is not None and checksum(self.path / name) == known[CHECKSUM]

    def done(self, name: str) -> None:
        """A file in the folder is done: it is there when the run goes on."""
        with explained(self.output):
            sync(self.path / name)
            sync((self.path / name).parent)
            self.journal.append({STEP: name, CHECKSUM: checksum(self.path / name)})

    def read(self, name: str) -> bytes | None:
        """The contents of a file that is done; None where it is not."""
        return (self.path / name).read_bytes() if self.has(name) else None

    def keep(self, name: str, data: bytes) -> None:
        """Write a file, and it is done."""
        with explained(self.output):
            (self.path / name).write_bytes(data)
        self.done(name)

    def check(self, name: str, value: str) -> None:
        """What is only known on the way, and must be as it was when the run was begun.

        Raises:
            FewbitsError: it is not.
        """
        known = next((entry for entry in self.journal.entries if name in entry), None)
        if known is None:
            with explained(self.output):
                self.journal.append({name: value})
        elif known[name] != value:
            raise FewbitsError(
                f"{self.path}: an unfinished run with another {name}.",
                "Remove the folder to begin anew.",
            )

    def publish(self, moves: Mapping[Path, Path], report: Mapping[str, Any]) -> None:
        """Give the results their final names, in place of what stands there.

        Args:
            moves: where each of them is -> final name.
            report: on the run; see the attribute.

        Raises:
            FewbitsError: a rename fails; the next run goes on with it.
        """
        names = {os.path.relpath(item, self.path): str(final.absolute()) for item, final in moves.items()}
        with explained(self.output):
            self.journal.append({PUBLISHED: names, REPORT: dict(report)})
            self._move(names)
        self.report = dict(report)

    def _move(self, names: Mapping[str, str]) -> None:
        """Each step leaves what the next process can go on from."""
        for name, target in names.items():
            item, final = self.path / name, Path(target)
            if not item.exists():
                continue  # an earlier process has done it
            replaced = self.path / REPLACED
            if final.is_dir():
                remove(replaced)
                try:
                    os.rename(final, replaced)
                except OSError as error:
                    if error.errno != errno.EXDEV:
                        raise
                    remove(final)  # on another disk than the work folder
            try:
                os.replace(item, final)
            except BaseException:
                if replaced.exists() and not final.exists():
                    os.rename(replaced, final)
                raise
            sync(final.parent)

    def _acquire(self) -> None:
        in_the_way = FewbitsError(f"{self.path}: it is in the way of what an unfinished run keeps.", "Move it.")
        while True:
            if self.path.exists() and not self.path.is_dir():
                raise in_the_way
            self.path.mkdir(exist_ok=True)
            names = {entry.name for entry in self.path.iterdir()}
            if JOURNAL not in names and names - {LOCK}:
                raise in_the_way
            try:
                self._lock.acquire()
            except Timeout:
                raise FewbitsError(f"{self.output}: another run is writing it.", "Wait for its end.") from None
            if (self.path / LOCK).exists():
                return
            self._lock.release()  # of a folder that the other run has just removed

    def _begin(self) -> None:
        self.journal = Journal(self.path / JOURNAL)
        first = self.journal.entries[0] if self.journal.entries else {}
        moves = self.journal.entries[-1].get(PUBLISHED, {}) if first else {}
        if any(not (self.path / name).exists() and not Path(final).exists() for name, final in moves.items()):
            first = {}  # its results were removed since
        if BEGUN in first and first[BEGUN] != self.facts:
            if not self.overwrite:
                raise FewbitsError(
                    f"{self.path}: an unfinished run with something else: {changes(first[BEGUN], self.facts)}.",
                    "Repeat it as it was, or pass --overwrite to begin anew.",
                )
            first = {}
        if BEGUN not in first:
            self._clear({LOCK})
            self.journal = Journal(self.path / JOURNAL)
            self.journal.append({BEGUN: self.facts})
        last = self.journal.entries[-1]
        if PUBLISHED in last:
            self._move(last[PUBLISHED])
            self.report = last[REPORT]
        self._resumed = len(self.journal.entries) > 1

    def _worth_keeping(self, error: BaseException) -> bool:
        done = any({CHECKSUM, PUBLISHED} & {*entry} for entry in self.journal.entries)
        done = done or any(self.path.rglob("after-*"))
        foreign = not isinstance(error, FewbitsError) or isinstance(error, DiskError)
        return done and (foreign or self._resumed or time.monotonic() - self._started > VALUABLE)

    def _leave(self, keep: bool) -> None:
        try:
            if not keep:
                with suppress(OSError):
                    # the journal last: without it the rest would be somebody else's
                    self._clear({LOCK, JOURNAL})
                    self._clear({LOCK})
                    (self.path / LOCK).unlink()
                    self.path.rmdir()
        finally:
            self._lock.release(force=True)

    def _clear(self, keep: set[str]) -> None:
        for entry in self.path.iterdir():
            if entry.name not in keep:
                remove(entry)


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
