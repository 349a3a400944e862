"""Models by URL, through fsspec (https://filesystem-spec.readthedocs.io): `s3://bucket/model`, `gs://bucket/x.gguf`.

What a URL names is fetched once into a folder of this machine, and again where it has changed: a checkpoint is read by
many small reads, which a disk answers sooner than a store.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from fewbits.checkpoint.hub import WANTED
from fewbits.errors import FewbitsError

SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
"""How the files of a split GGUF are called."""
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.+")
METADATA, LOCK = "cache", ".lock"
"""What fsspec and we keep beside the files."""


def is_url(name: object) -> bool:
    """Whether a name is no path."""
    return URL.fullmatch(str(name)) is not None


def cache_folder(url: str) -> Path:
    """Where this machine keeps what belongs to a URL: under $FEWBITS_CACHE, else ~/.cache/fewbits."""
    home = os.environ.get("FEWBITS_CACHE") or Path.home() / ".cache" / "fewbits"
    return Path(home) / "urls" / sha256(url.encode()).hexdigest()[:16]


@contextmanager
def store_of(url: str) -> Iterator[tuple[Any, str]]:
    """The store of a URL, as a file system of fsspec, and the path in it.

    Raises:
        FewbitsError: fsspec or what it needs for this kind of store is not installed; or what the store says within.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise FewbitsError(f"{url}: URLs need fsspec.", "pip install 'fewbits[cluster]'") from None
    try:
        yield url_to_fs(url)
    except ImportError as error:
        raise FewbitsError(f"{url}: {error}.", "pip install what it names.") from None
    except FileNotFoundError:
        raise FewbitsError(f"{url}: there is no such file or directory.", "Check the URL.") from None
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FewbitsError(f"{url}: {reason}.", "Check the URL, and who may read and write there.") from None


def fetch_url(url: str) -> Path:
    """The model directory or GGUF file of a URL on this machine.

    Raises:
        FewbitsError: nothing there, no connection, or something is not installed.
    """
    # the last part is what formats name a model after
    folder = cache_folder(url) / re.sub(r"[^\w.-]", "_", url.rstrip("/").rsplit("/", 1)[1])
    folder.mkdir(parents=True, exist_ok=True)
    # workers side by side fetch it once
    with FileLock(folder / LOCK), store_of(url) as (store, path):
        from fsspec import filesystem

        files = _wanted(store, path)
        if not files:
            raise FewbitsError(f"{url}: no model there.", "Name a model directory or a GGUF file.")
        names = {PurePosixPath(file).name for file in files}
        for old in folder.iterdir():
            if old.name not in (*names, METADATA, LOCK):
                old.unlink()
        kept = {"cache_storage": str(folder), "same_names": True, "check_files": True, "expiry_time": None}
        cached = filesystem("filecache", fs=store, skip_instance_cache=True, **kept)
        for file in files:
            cached.open(file).close()
    return folder / PurePosixPath(path).name if path.endswith(".gguf") else folder


def _wanted(store: Any, path: str) -> list[str]:
    """The files of a model."""
    name = PurePosixPath(path).name
    if split := SPLIT_NAME.match(name):
        pattern = f"{split['stem']}-*-of-{split['count']}.gguf"
        return [file for file in store.ls(path.removesuffix(name), detail=False) if fnmatch(_name(file), pattern)]
    if name.endswith(".gguf"):
        return [path] if store.isfile(path) else []
    files = [entry["name"] for entry in store.ls(path, detail=True) if entry["type"] == "file"]
    return [file for file in files if any(fnmatch(_name(file), pattern) for pattern in WANTED)]


def _name(file: str) -> str:
    return PurePosixPath(file).name
