"""Models by hub id, through huggingface_hub and its cache."""

from __future__ import annotations

import re
from pathlib import Path

from fewbits.errors import FewbitsError

WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "LICEN[CS]E*", "NOTICE*"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def fetch(source: str) -> Path:
    """The local folder of a hub id, downloaded if it is not in the cache. Pickled weights are never fetched.

    Raises:
        FewbitsError: neither a path nor a hub id, no such model, or no connection.
    """
    if not HUB_ID.fullmatch(source):
        raise FewbitsError(f"{source}: there is no such file or directory.", "Check the path.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=WANTED))
    except (RepositoryNotFoundError, HFValidationError):
        raise FewbitsError(f"{source}: neither a path here nor a model on the hub.", "Check the spelling.") from None
    except (LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FewbitsError(
            f"{source}: not a path here, and the hub cannot be reached ({reason}).",
            "Name a local directory or go online.",
        ) from None
