"""Files of strangers: whatever their bytes are, reading them works or is one clear error, and costs no more than they
are large. Campaigns of the same targets: tools/fuzz/campaign.py; what they found stands here."""

from __future__ import annotations

import json
import os
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from fewbits import api
from fewbits.arch.config import _number
from fewbits.calibration.imatrix_files import read_statistics
from fewbits.checkpoint import GGUFCheckpoint, SafetensorsCheckpoint
from fewbits.checkpoint.safetensors import read_json
from fewbits.errors import FewbitsError
from fewbits.export.jinja import ChatTemplate
from fewbits.formats.gguf.source import gguf_source
from fewbits.tokenizer import gguf_tokenizer, load_tokenizer, templates
from fewbits.tokenizer.templates import chat_text

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools" / "fuzz"))
from campaign import run_case  # type: ignore[import-not-found]
from targets import CONFIG, TARGETS, Case, model_case  # type: ignore[import-not-found]

EXAMPLES = {"tokenizer-load": 15, "gguf-tokenizer": 15, "safetensors": 40, "gguf": 40}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[tuple[Case, Path]]]:
    """The valid files of a target, each kind made once."""
    known: dict[str, list[tuple[Case, Path]]] = {}

    def of(name: str) -> list[tuple[Case, Path]]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            known[name] = [(case, folder / str(i)) for i, case in enumerate(TARGETS[name].cases(folder / "made", True))]
            for case, place in known[name]:
                case.write(place)
        return known[name]

    return of


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_changed_files_are_read_or_refused(name: str, made: Callable[[str], list[tuple[Case, Path]]]) -> None:
    target, cases = TARGETS[name], made(name)

    @given(st.data())
    @settings(
        max_examples=EXAMPLES.get(name, 80), deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    def changed(data: st.DataObject) -> None:
        case, folder = cases[data.draw(st.integers(0, len(cases) - 1))]
        error, _ = run_case(target, case, folder, lambda n: data.draw(st.integers(0, n - 1)))
        if error is not None:
            raise error

    changed()


# finds of the campaigns, and what was looked for by hand


def model(folder: Path, **files: Any) -> Path:
    """The valid model with some files replaced: bytes, or what becomes JSON; `__` stands for a dot in names."""
    Case({**model_case().files, **{n.replace("__", "."): as_bytes(f) for n, f in files.items()}}).write(folder / "m")
    return folder / "m"


def as_bytes(content: Any) -> bytes:
    return content if isinstance(content, bytes) else json.dumps(content).encode()


def told(name: str, **changes: Any) -> dict[str, Any]:
    """One of the valid model's JSON files with some keys replaced."""
    return {**json.loads(model_case().files[name]), **changes}


def gguf(tensors: list[tuple[bytes, tuple[int, ...], int]], keys: bytes = b"", n_keys: int = 0) -> bytes:
    entries = b"".join(
        struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, 0)
        for name, shape, kind in tensors
    )
    return b"GGUF" + struct.pack("<IQQ", 3, len(tensors), n_keys) + keys + entries + bytes(256)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gguf([(b"w\xfc", (4,), 0)]), "no name"),
        (gguf([(b"w\x1b[31m", (4,), 0)]), "no name"),
        (gguf([], struct.pack("<Q", 2) + b"\0a" + struct.pack("<II", 4, 1), 1), "no name"),
        (gguf([(b"w", (0, 2**60), 0)]), "impossible shape"),
        (gguf([(b"w", (2**60, 0), 12)]), "impossible shape"),
    ],
)
def test_gguf_headers(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(FewbitsError, match=message):
        GGUFCheckpoint(tmp_path / "x.gguf")


def test_empty_tensors_and_files(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(gguf([(b"w", (0, 7), 0)]))
    checkpoint = GGUFCheckpoint(file)
    assert checkpoint.lines("w", 0, 7).shape == (7, 0)
    file.write_bytes(gguf([]))
    with pytest.raises(FewbitsError, match="holds no tensors"):
        gguf_source(GGUFCheckpoint(file))


def test_lying_headers_cost_nothing(tmp_path: Path) -> None:
    """Lengths of 2^60 in every place where a header has one."""
    huge = struct.pack("<Q", 2**60)
    key = struct.pack("<Q", 1) + b"k"
    contents = [
        b"GGUF" + struct.pack("<I", 3) + huge + huge,
        gguf([], huge, 1),
        gguf([], key + struct.pack("<I", 8) + huge, 1),
        *(gguf([], key + struct.pack("<II", 9, kind) + huge, 1) for kind in (0, 8, 12)),
        gguf([(b"w", (2**60,), 0)]),
    ]
    for content in contents:
        (tmp_path / "x.gguf").write_bytes(content)
        tracemalloc.start()
        with pytest.raises(FewbitsError):
            GGUFCheckpoint(tmp_path / "x.gguf")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config__json": {**CONFIG, "architectures": 5}}, "architectures is no list"),
        ({"config__json": {**CONFIG, "architectures": {"0": "x"}}}, "architectures is no list"),
        ({"config__json": b'{"a": "\\ud800"}'}, "not valid JSON"),
        ({"config__json": {**CONFIG, "layer_types": 3}}, "layer_types is no list"),
        ({"model__safetensors__index__json": {"weight_map": {"a": "x" * 5000}}}, "no name of a shard"),
        ({"model__safetensors__index__json": {"weight_map": {"a": "\0.safetensors"}}}, "no name of a shard"),
        ({"model__safetensors__index__json": {"weight_map": {"a": "../model.safetensors"}}}, "outside"),
        ({"model__safetensors__index__json": {"weight_map": {"a": "/etc/passwd"}}}, "outside"),
        ({"model__safetensors__index__json": {"weight_map": {"a": ".."}}}, "no name of a shard"),
        ({"model__safetensors__index__json": {"weight_map": {"a": "config.json"}}}, "no name of a shard"),
        ({"tokenizer__json": told("tokenizer.json", normalizer=[1])}, "malformed"),
        ({"tokenizer__json": told("tokenizer.json", post_processor="x")}, "malformed"),
        ({"tokenizer__json": told("tokenizer.json", pre_tokenizer="x")}, "malformed"),
        ({"tokenizer__json": told("tokenizer.json", added_tokens=[{"id": 2**40, "content": "x"}])}, "has the id"),
        ({"tokenizer__json": told("tokenizer.json", added_tokens=[{"id": 1e999, "content": "x"}])}, "malformed"),
    ],
)
def test_directories(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(FewbitsError, match=message) as caught:
        api.plan(model(tmp_path, **files), "Q4_0")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}, "unknown type"),
        ({"dtype": "F32", "shape": [0, 2**50], "data_offsets": [0, 0]}, "impossible shape"),
        ({"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]}, "impossible shape"),
    ],
)
def test_safetensors_entries(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    header = json.dumps({"w": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(16)
    with pytest.raises(FewbitsError, match=message):
        SafetensorsCheckpoint(model(tmp_path, model__safetensors=data))


def test_names_that_cannot_be_shown(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="no name") as caught:
        SafetensorsCheckpoint(model(tmp_path, model__safetensors=save({"w\x1b[2J": np.zeros(2, np.float32)})))
    assert "\x1b" not in str(caught.value)


def test_a_vocabulary_of_billions(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="vocab_size is 2147483648"):
        gguf_tokenizer(model(tmp_path), {**CONFIG, "vocab_size": 2**31})


def test_a_tokenizer_class_that_is_a_model(tmp_path: Path) -> None:
    config = told("tokenizer_config.json", tokenizer_class="LlamaForCausalLM")
    with pytest.raises(FewbitsError, match="no tokenizer's class"):
        load_tokenizer(model(tmp_path, tokenizer_config__json=config))


def test_a_tokenizer_that_fails_at_the_first_unknown_character(tmp_path: Path) -> None:
    tokenizer = told("tokenizer.json")
    tokenizer["model"]["unk_token"] = "BPE"
    with pytest.raises(FewbitsError, match="cannot be loaded"):
        load_tokenizer(model(tmp_path, tokenizer__json=tokenizer))


def test_numbers_beyond_every_type() -> None:
    assert _number({"a": 2**70}, "a") == 2**70
    with pytest.raises(FewbitsError, match="a number is expected"):
        _number({"a": float("nan")}, "a")


def test_imatrix_files(tmp_path: Path) -> None:
    name = b"blk.0\x07"
    entry = struct.pack("<i", len(name)) + name + struct.pack("<iif", 1, 1, 1.0)
    (tmp_path / "x.dat").write_bytes(struct.pack("<i", 1) + entry)
    with pytest.raises(FewbitsError, match="no name"):
        read_statistics(tmp_path / "x.dat")
    case = next(case for case in TARGETS["imatrix"].cases(tmp_path, True) if "imatrix.gguf" in case.files)
    data = case.files["imatrix.gguf"].replace(struct.pack("<f", 512), struct.pack("<f", 1e-40))
    (tmp_path / "y.gguf").write_bytes(data)
    with pytest.raises(FewbitsError, match="no numbers of tokens"):
        read_statistics(tmp_path / "y.gguf")


def test_what_is_no_file(tmp_path: Path) -> None:
    """To open a pipe would wait for ever."""
    folder = model(tmp_path)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(FewbitsError, match="not a file"):
        SafetensorsCheckpoint(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(FewbitsError, match="not a file"):
        read_json(folder / "config.json")
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(FewbitsError, match="not a file"):
        GGUFCheckpoint(tmp_path / "x.gguf")


def test_links_out_of_a_directory(tmp_path: Path) -> None:
    folder = model(tmp_path)
    secret = tmp_path / "secret"
    secret.write_text("x")
    (folder / "LICENSE").symlink_to(secret)
    with pytest.raises(FewbitsError, match="leads out of the model directory"):
        SafetensorsCheckpoint(folder)
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to("config.json")
    (tmp_path / "named").symlink_to(folder)
    SafetensorsCheckpoint(tmp_path / "named")


def test_links_of_the_hubs_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    model_case().write(snapshot)
    blob = tmp_path / "models--a--b" / "blobs" / "ab"
    (snapshot / "config.json").rename(blob)
    (snapshot / "config.json").symlink_to(Path("../../blobs/ab"))
    assert SafetensorsCheckpoint(snapshot).tensors


MESSAGES = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' | center(10**12) }}",
        "{{ 'x' * 10**11 }}",
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s | length }}",
        "{{ '%1000000000000d' % 3 }}",
        "{{ 10 ** (10 ** 9) }}",
        "{{ " + "(" * 50000,
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_templates_are_bounded(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.3)
    started = time.thread_time()
    with pytest.raises(FewbitsError):
        ChatTemplate(template, {}).render(MESSAGES, True)
    assert time.thread_time() - started < 3


def test_the_limits_end_with_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.3)
    tokenizer = load_tokenizer(model(tmp_path))
    assert chat_text(tokenizer, MESSAGES) == "<|user|>x<|end|>"
    assert sys.gettrace() is None or "watch" not in repr(sys.gettrace())
    bytearray(512 << 20)
    tokenizer.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(FewbitsError, match="computes for more than"):
        chat_text(tokenizer, MESSAGES)
