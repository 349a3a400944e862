"""Models on a hub, by config.json and headers: a hub of our own, with files of gigabytes that are mostly holes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewbits.formats.gguf.writer import TensorEntry, lay_out
from fewbits.memory import memory
from fewbits.memory.skeleton import skeleton_of

DATA = Path(__file__).parent / "data" / "memory"
CONFIG = json.loads((DATA / "llama-3-8b.json").read_text())
METADATA = json.loads((DATA / "gguf" / "models.json").read_text())["llama3-8b"]
MIB = 2**20


class Hub(BaseHTTPRequestHandler):
    """Serves ranges of files as the hub does, and counts the bytes."""

    root: Path
    served = 0

    def do_GET(self) -> None:
        owner, repo, _, _, *rest = self.path.lstrip("/").split("?")[0].split("/")
        path = self.root / owner / repo / "/".join(rest)
        if not path.is_file():
            missing = "EntryNotFound" if (self.root / owner / repo).is_dir() else "RepoNotFound"
            self.send_response(404)
            self.send_header("X-Error-Code", missing)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = path.stat().st_size
        first, last = self.headers["range"].removeprefix("bytes=").split("-")
        stop = min(int(last) + 1, size)
        with open(path, "rb") as file:
            file.seek(int(first))
            data = file.read(stop - int(first))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        type(self).served += len(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[type[Hub]]:
    handler = type("LocalHub", (Hub,), {"root": tmp_path / "hub", "served": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    handler.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    yield handler
    server.shutdown()


def ask(hub: type[Hub], *names: str) -> list[dict[str, Any] | str]:
    """Reports, or the errors, of models on a hub of our own, from a process of its own: the address is read once."""
    code = (
        "import sys, json\nfrom fewbits.memory import memory\nfrom fewbits.errors import FewbitsError\nfound = []\n"
        "for name in sys.argv[1:]:\n"
        "    try: found.append(json.loads(memory(name, context=4096).model_dump_json()))\n"
        "    except FewbitsError as error: found.append(str(error))\n"
        "print(json.dumps(found))"
    )
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}  # type: ignore[attr-defined]
    env = {key: value for key, value in env.items() if "proxy" not in key.lower()}
    done = subprocess.run([sys.executable, "-c", code, *names], env=env, capture_output=True, text=True, check=True)
    found: list[dict[str, Any] | str] = json.loads(done.stdout)
    return found


def test_models_on_the_hub_by_headers_alone(hub: type[Hub], tmp_path: Path) -> None:
    """Files of gigabytes, of which headers are fetched."""
    root = tmp_path / "hub" / "owner"
    skeleton = skeleton_of(CONFIG)
    assert skeleton is not None
    for repo in ("whole", "sharded", "only-config", "ggufs"):
        (root / repo).mkdir(parents=True)
    for repo in ("whole", "sharded", "only-config"):
        (root / repo / "config.json").write_bytes((DATA / "llama-3-8b.json").read_bytes())
    names = list(skeleton.tensors)
    _hollow_safetensors(root / "whole" / "model.safetensors", skeleton.tensors, names)
    halves = {"a.safetensors": names[:100], "b.safetensors": names[100:]}
    for file, some in halves.items():
        _hollow_safetensors(root / "sharded" / file, skeleton.tensors, some)
    weight_map = {name: file for file, some in halves.items() for name in some}
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tokens = [f"token {number}" for number in range(60000)]
    _hollow_gguf(root / "ggufs" / "model.Q8_0.gguf", tokens)
    whole, sharded, alone, gguf, wrong, missing, ggufs = ask(
        hub,
        *("owner/whole", "owner/sharded", "owner/only-config", "owner/ggufs/model.Q8_0.gguf"),
        *("owner/ggufs/other.gguf", "owner/nothing", "owner/ggufs"),
    )
    local = memory(DATA / "llama-3-8b.json", context=4096)
    for found in (whole, sharded, alone):
        assert isinstance(found, dict)
        assert (found["weights"], found["kv_cache"]) == (local.weights, local.kv_cache)
    assert isinstance(gguf, dict) and gguf["architecture"] == "llama"
    assert gguf["kv_cache"] == local.kv_cache
    assert hub.served < 64 * MIB
    assert isinstance(wrong, str) and "there is no file other.gguf" in wrong
    assert isinstance(missing, str) and "neither a path here nor a model on the hub" in missing
    assert isinstance(ggufs, str) and "name one: owner/ggufs/FILE.gguf" in ggufs


def _hollow_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], names: list[str]) -> None:
    header, at = {}, 0
    for name in names:
        size = 2 * int(np.prod(shapes[name]))
        header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [at, at + size]}
        at += size
    data = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + at)


def _hollow_gguf(path: Path, tokens: list[str]) -> None:
    metadata = {**METADATA, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens}
    entry = TensorEntry("token_embd.weight", (128256, 4096), "Q8_0", 128256 * 4096 // 32 * 34)
    shard = lay_out(path, metadata, [entry], None)[0]
    assert len(shard.header) > MIB  # more than is fetched at first
    with open(path, "wb") as file:
        file.write(shard.header)
        file.truncate(shard.nbytes)


def test_no_connection(tmp_path: Path) -> None:
    class Nowhere(Hub):
        url = "http://127.0.0.1:9"

    (answer,) = ask(Nowhere, "owner/name")
    assert isinstance(answer, str) and "the hub cannot be reached" in answer
