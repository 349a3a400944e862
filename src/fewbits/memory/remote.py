"""Models on the hub, from config.json and headers alone: no weight is fetched.

Of each file the first bytes are fetched into a scratch file of its full length, with a hole in place of the rest, so
that the same checked parsers read it as if it were here.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fewbits.checkpoint import GGUFCheckpoint, SafetensorsCheckpoint
from fewbits.checkpoint.hub import HUB_ID
from fewbits.checkpoint.safetensors import MAX_HEADER, parse_json
from fewbits.checkpoint.urls import SPLIT_NAME
from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.memory.source import Described

FIRST = 1 << 20
"""Bytes fetched at first: most safetensors headers fit, a GGUF header with its vocabulary takes a few times that."""
MOST = 1 << 28
CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
GGUF_NAME = re.compile(r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>.+\.gguf)")


def describe_remote(name: str) -> Described:
    """The headers of a model on the hub.

    Args:
        name: `owner/name`, or `owner/name/file.gguf`; `hf://` may stand before it.

    Raises:
        FewbitsError: no such model, no connection, or a file that is no model.
    """
    from fewbits.memory.source import Described

    with tempfile.TemporaryDirectory(prefix="fewbits-headers-") as scratch:
        folder = Path(scratch)
        if found := GGUF_NAME.fullmatch(name):
            gguf = _gguf(_Repository(found["repo"], name), found["file"], folder)
            return Described(name, "gguf", {}, gguf)
        repo = name.removeprefix("hf://")
        if not HUB_ID.fullmatch(repo):
            raise FewbitsError(f"{name}: there is no such file or directory.", "Check the path.")
        hub = _Repository(repo, name)
        data = hub.read(CONFIG)
        if data is None:
            raise FewbitsError(f"{name} has no config.json.", f"If it holds GGUF files, name one: {repo}/FILE.gguf.")
        config = parse_json(Path(repo, CONFIG), data)
        files = _shards(hub, folder)
        (folder / CONFIG).write_bytes(data)
        for file in files:
            if not hub.header(file, folder, _safetensors_end) and file != SINGLE:
                raise FewbitsError(f"{name}: shard {file} is missing.", "Ask its owner.")
        if not any(folder.glob("*.safetensors")):
            return Described(name, "config", config)
        checkpoint = SafetensorsCheckpoint(folder)
        checkpoint.path = Path(repo)
        return Described(name, "directory", config, checkpoint)


def _shards(hub: _Repository, folder: Path) -> list[str]:
    index = hub.read(INDEX)
    if index is None:
        return [SINGLE]
    (folder / INDEX).write_bytes(index)
    weight_map = parse_json(Path(hub.repo, INDEX), index).get("weight_map")
    names = sorted({str(file) for file in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not names or any(Path(file).name != file for file in names):
        raise FewbitsError(f"{hub.repo}/{INDEX}: there is no usable weight_map.", "Ask its owner.")
    return names


def _gguf(hub: _Repository, file: str, folder: Path) -> GGUFCheckpoint:
    parts = file.rsplit("/", 1)
    match = SPLIT_NAME.match(parts[-1])
    count = int(match["count"]) if match else 1
    if match and count > 1000:
        raise FewbitsError(f"{hub.name}: one of {count} files.", "Check the name.")
    names = [
        f"{match['stem']}-{number:05}-of-{count:05}.gguf" if match else parts[-1] for number in range(1, count + 1)
    ]
    for name in names:
        whole = "/".join([*parts[:-1], name])
        if not hub.header(whole, folder, _gguf_end):
            raise FewbitsError(f"{hub.name}: there is no file {whole}.", "Check the name.")
    checkpoint = GGUFCheckpoint(folder / names[0])
    checkpoint.path = Path(hub.name)
    return checkpoint


End = Callable[[Path, int], int]
"""(file, bytes that are there) -> bytes that its header needs."""


def _safetensors_end(path: Path, present: int) -> int:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    return min(8 + length, 8 + MAX_HEADER)


def _gguf_end(path: Path, present: int) -> int:
    # under a name that is not one of a split set, so that this file alone is read
    alone = path.with_name("header.gguf")
    path.rename(alone)
    try:
        return min((info.offset for info in GGUFCheckpoint(alone).tensors.values()), default=present)
    except FewbitsError:
        return 2 * present  # the header goes on in the hole
    finally:
        alone.rename(path)


class _Repository:
    """One repository of the hub, read by ranges of bytes.

    Attributes:
        name: as the user named the model.
    """

    def __init__(self, repo: str, name: str) -> None:
        self.repo, self.name = repo, name

    def read(self, file: str) -> bytes | None:
        """A small file, None if there is none."""
        found = self._get(file, 0, MOST)
        return found[0] if found else None

    def header(self, file: str, folder: Path, end: End) -> bool:
        """Fetch a file's header into a scratch file of its length; False if there is no such file."""
        path = folder / Path(file).name
        wanted, have, size = FIRST, 0, 0
        while have < wanted:
            found = self._get(file, have, wanted)
            if found is None:
                return False
            data, size = found
            with open(path, "r+b" if have else "w+b") as scratch:
                scratch.seek(have)
                scratch.write(data)
                scratch.truncate(size)
            have += len(data)
            if have >= size or not data:
                return True
            wanted = min(max(end(path, have), have), size)
            if wanted > MOST:
                raise FewbitsError(f"{self.name}: {file} has no header of a usual length.", "Check the name.")
        return True

    def _get(self, file: str, start: int, stop: int) -> tuple[bytes, int] | None:
        """Bytes start:stop of a file and its whole length; None if there is none."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
        )
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = {**build_hf_headers(), "range": f"bytes={start}-{stop - 1}"}
        try:
            response = get_session().get(hf_hub_url(self.repo, file), headers=headers, timeout=30)
            hf_raise_for_status(response)
        except EntryNotFoundError:
            return None
        except GatedRepoError:
            raise FewbitsError(
                f"{self.name} is gated.", "Accept its terms on the hub and log in: hf auth login."
            ) from None
        except RepositoryNotFoundError:
            raise FewbitsError(
                f"{self.name}: neither a path here nor a model on the hub.", "Check the spelling."
            ) from None
        except HfHubHTTPError as error:
            raise FewbitsError(
                f"{self.name}: the hub answers {str(error).splitlines()[0]}.", "Try again later."
            ) from None
        except Exception as error:  # what a broken connection raises depends on the HTTP library underneath
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise FewbitsError(
                f"{self.name}: not a path here, and the hub cannot be reached ({reason}).",
                "Name a local file or go online.",
            ) from None
        told = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("content-range", ""))
        if told is None and start:
            raise FewbitsError(f"{self.name}: the hub does not serve parts of {file}.", "Fetch the file.")
        return response.content[: stop - start], int(told[1]) if told else len(response.content)
