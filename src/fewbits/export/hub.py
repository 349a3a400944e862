"""Handing a file or directory over to the hub, through huggingface_hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from fewbits.checkpoint import GGUFCheckpoint, open_model
from fewbits.checkpoint.hub import HUB_ID
from fewbits.errors import FewbitsError
from fewbits.export.card import gguf_card

SKIPPED = [".git*", "*.part", "*.tmp", ".cache/*", "*.pt", "*.pth", "*.bin", "*.pkl"]
"""Never uploaded: leftovers, and pickles that readers would have to trust."""


class Pushed(BaseModel):
    """What was uploaded.

    Attributes:
        files: names in the repository.
    """

    model_config = ConfigDict(extra="forbid")
    repo: str
    url: str
    files: list[str]
    private: bool


def push(source: str | Path, repo: str, *, private: bool = False, extra: dict[str, bytes] | None = None) -> Pushed:
    """Upload a GGUF file (all shards of a split one) or a model directory.

    Args:
        repo: `owner/name`; made if it is not there.
        private: for a new repository.
        extra: further small files by name, e.g. a Modelfile. A GGUF file gets a model card if the repository has none.

    Raises:
        FewbitsError: nothing there, no token, no right to write, or no connection.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if not HUB_ID.fullmatch(repo):
        raise FewbitsError(f"{repo!r} is no repository.", "Write it as owner/name.")
    path = Path(source)
    if not path.exists():
        raise FewbitsError(f"{path}: there is no such file or directory.", "Check the path.")
    token = get_token()
    if not token:
        raise FewbitsError("There is no token to push with.", "Log in with `hf auth login`, or set HF_TOKEN.")
    files, small = _contents(path, repo, extra or {})
    api = HfApi(token=token)
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        if path.is_dir():
            api.upload_folder(repo_id=repo, folder_path=str(path), ignore_patterns=SKIPPED, commit_message=_MESSAGE)
        else:
            _upload_files(api, repo, files, small)
    except HfHubHTTPError as error:
        raise FewbitsError(
            f"{repo}: the hub refuses ({str(error).splitlines()[0]}).", "Does the token have the right to write there?"
        ) from None
    except FewbitsError:
        raise
    except Exception as error:  # what a broken connection raises depends on the HTTP library underneath
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FewbitsError(f"{repo}: the hub cannot be reached ({reason}).", "Go online and try again.") from None
    names = [file.relative_to(path).as_posix() if path.is_dir() else file.name for file in files]
    return Pushed(repo=repo, url=str(made), files=[*names, *small], private=private)


_MESSAGE = "Upload with fewbits"


def _contents(path: Path, repo: str, extra: dict[str, bytes]) -> tuple[list[Path], dict[str, bytes]]:
    """The files to upload, and what goes along with them."""
    if path.is_dir():
        from huggingface_hub.utils import filter_repo_objects

        found = sorted(file for file in path.rglob("*") if file.is_file() and not file.is_symlink())
        kept = set(filter_repo_objects([f.relative_to(path).as_posix() for f in found], ignore_patterns=SKIPPED))
        files = [file for file in found if file.relative_to(path).as_posix() in kept]
        if not files:
            raise FewbitsError(f"{path}: there is nothing to upload.", "Name a model directory.")
        return files, {}
    model = open_model(path)
    checkpoint = model.checkpoint
    if not isinstance(checkpoint, GGUFCheckpoint):
        raise FewbitsError(f"{path}: neither a GGUF file nor a directory.", "Name the model directory.")
    shards = sorted({info.file for info in checkpoint.tensors.values()} | {path})
    return shards, {"README.md": gguf_card(model, repo), **extra}


def _upload_files(api: Any, repo: str, files: list[Path], small: dict[str, bytes]) -> None:
    for file in files:
        api.upload_file(
            repo_id=repo, path_or_fileobj=str(file), path_in_repo=file.name, commit_message=f"{_MESSAGE}: {file.name}"
        )
    for name, data in small.items():
        if name == "README.md" and api.file_exists(repo, name):
            continue  # somebody may have written it by hand
        api.upload_file(repo_id=repo, path_or_fileobj=data, path_in_repo=name, commit_message=f"{_MESSAGE}: {name}")
