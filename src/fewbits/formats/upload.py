"""Outputs by URL: made on this machine, and uploaded once they are whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from fewbits.checkpoint.urls import cache_folder, is_url, store_of
from fewbits.errors import FewbitsError


@contextmanager
def local_output(output: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Where to make an output: its own path, or of a URL one in this machine's cache that is uploaded in the end.

    What was made is only removed here once the store tells the same sizes; an interrupted run goes on.

    Raises:
        FewbitsError: the store has something under this name (without `overwrite`), or refuses it.
    """
    if not is_url(output):
        yield Path(output)
        return
    url = str(output).rstrip("/")
    with store_of(url) as (store, path):
        if store.exists(path) and not overwrite:
            raise FewbitsError(f"{url}: the output exists.", "Choose another name or pass --overwrite.")
    folder = cache_folder(url)
    folder.mkdir(parents=True, exist_ok=True)
    yield folder / PurePosixPath(path).name
    try:
        with store_of(url) as (store, path):
            if store.isdir(path):
                store.rm(path, recursive=True)
            for file in sorted(file for file in folder.rglob("[!.]*") if file.is_file()):
                _upload(store, file, str(PurePosixPath(path).parent / file.relative_to(folder).as_posix()))
    except FewbitsError as error:
        raise FewbitsError(error.message, f"It is whole and kept in {folder}: upload it from there.") from None
    shutil.rmtree(folder)


def _upload(store: Any, file: Path, there: str) -> None:
    store.makedirs(str(PurePosixPath(there).parent), exist_ok=True)
    store.put_file(str(file), there)
    store.invalidate_cache()
    if (size := store.size(there)) != file.stat().st_size:
        raise FewbitsError(f"{there}: the store has {size} bytes of {file.stat().st_size}.")
