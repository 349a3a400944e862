"""What we say of a model's memory against what llama.cpp itself prints when it makes a context.

llama.cpp builds a model from metadata alone (`llama_model_init_from_user`) and, with `no_alloc`, sizes every buffer
without allocating one: so models are checked at their real sizes.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewbits import api
from fewbits.checkpoint import GGUFCheckpoint, open_checkpoint
from fewbits.formats.gguf.source import gguf_source
from fewbits.memory import describe, memory
from fewbits.memory.cache import CacheRule, cache_of
from fewbits.memory.compute import Batch, compute_buffer
from fewbits.memory.gguf_shape import shape_from_gguf
from fewbits.memory.hardware import Hardware, detect
from fewbits.memory.shape import ModelShape
from fewbits.quantize import PlanRequest, make_plan
from fewbits.quantize.planning import shards_of
from tiny_models import TINY, save_tiny

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.engine

MIB = 2**20
GGUF_MODELS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "memory" / "gguf" / "models.json").read_text()
)
"""Metadata of published models, as far as it decides their memory."""
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}
NO_GPU = Hardware("", 1, "", 2**40)
_LOG = llama_cpp.llama_log_callback


@dataclass(frozen=True)
class Printed:
    """Buffers that llama.cpp prints, in MiB with two decimals.

    Attributes:
        kv, state: one figure for each cache.
    """

    model: dict[str, float]
    kv: list[float]
    state: list[float]
    compute: float
    lines: list[str]


class Engine:
    """llama.cpp, listened to."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.callback = _LOG(lambda level, text, data: self.lines.append(text.decode("utf-8", "replace")))
        self.no_data = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(lambda tensor, data: None)
        folder = Path(llama_cpp.__file__).parent / "lib"
        self.ggml = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
        self.ggml.gguf_init_empty.restype = ctypes.c_void_p
        self.ggml.gguf_free.argtypes = [ctypes.c_void_p]
        self.llama = ctypes.CDLL(str(next(folder.glob("libllama.*"))))
        self.from_metadata = self.llama.llama_model_init_from_user
        self.from_metadata.restype = ctypes.c_void_p
        self.from_metadata.argtypes = [
            ctypes.c_void_p,
            type(self.no_data),
            ctypes.c_void_p,
            llama_cpp.llama_model_params,
        ]

    def metadata(self, values: dict[str, Any]) -> ctypes.c_void_p:
        gguf = ctypes.c_void_p(self.ggml.gguf_init_empty())
        for name, value in values.items():
            key = name.encode()
            if isinstance(value, list):
                flags = isinstance(value[0], bool)
                array = np.array(value, np.int8 if flags else np.uint32)
                pointer = array.ctypes.data_as(ctypes.c_void_p)
                self.ggml.gguf_set_arr_data(gguf, key, 7 if flags else 4, pointer, ctypes.c_size_t(len(value)))
            elif isinstance(value, bool):
                self.ggml.gguf_set_val_bool(gguf, key, ctypes.c_bool(value))
            elif isinstance(value, str):
                self.ggml.gguf_set_val_str(gguf, key, value.encode())
            elif isinstance(value, float):
                self.ggml.gguf_set_val_f32(gguf, key, ctypes.c_float(value))
            else:
                self.ggml.gguf_set_val_u32(gguf, key, ctypes.c_uint32(value))
        return gguf

    def run(
        self,
        source: dict[str, Any] | Path,
        context: int = 4096,
        kv: str = "f16",
        sequences: int = 1,
        flash: bool = True,
        outputs: int = 0,
        step: int = 512,
    ) -> Printed:
        """Make a context of a file, or, sized only, of metadata."""
        self.lines.clear()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        if isinstance(source, Path):
            model = llama_cpp.llama_model_load_from_file(str(source).encode(), params)
        else:
            params.no_alloc = True
            gguf = self.metadata(source)
            model = self.from_metadata(gguf, self.no_data, None, params)
            self.ggml.gguf_free(gguf)
        assert model, "".join(self.lines[-3:])
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max, wanted.n_ubatch = context, sequences, step
        wanted.n_batch = max(step, 2048)
        wanted.type_k = wanted.type_v = TYPES[kv]
        wanted.flash_attn_type, wanted.n_outputs_max = int(flash), outputs
        wanted.swa_full = False  # as llama.cpp's own programs ask; the bare library keeps whole caches
        made = llama_cpp.llama_init_from_model(model, wanted)
        assert made, "".join(self.lines[-3:])
        llama_cpp.llama_free(made)
        llama_cpp.llama_model_free(model)
        return self._printed()

    def _printed(self) -> Printed:
        text = "".join(self.lines)
        caches = re.findall(r"size = +([\d.]+) MiB \(.*?\), ([KR]) \(", text)
        model = re.findall(r"(\S+) model buffer size = +([\d.]+) MiB", text)
        return Printed(
            model={name: float(size) for name, size in model},
            kv=[float(size) for size, kind in caches if kind == "K"],
            state=[float(size) for size, kind in caches if kind == "R"],
            compute=sum(float(size) for size in re.findall(r"compute buffer size = +([\d.]+) MiB", text)),
            lines=text.splitlines(),
        )


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    if "no_alloc" not in dict(llama_cpp.llama_model_params._fields_):
        pytest.skip("this llama.cpp cannot size without allocating")
    os.environ["GGML_NO_BACKTRACE"] = "1"
    found = Engine()
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(found.callback, ctypes.c_void_p(0))
    yield found
    llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))


def _rule(step: int) -> CacheRule:
    return CacheRule(pad=256, step=step, window_pad=256)


def _sums(shape: ModelShape, kv: str, context: int, sequences: int, step: int = 512) -> tuple[float, float]:
    uses = cache_of(shape.layers, _rule(step), kv, context, sequences)
    return sum(use.nbytes for use in uses) / MIB, sum(use.state_bytes for use in uses) / MIB


def _same(ours: float, printed: list[float]) -> bool:
    """Equal to all the digits that are printed."""
    return abs(ours - sum(printed)) <= 0.00501 * max(len(printed), 1)


SETTINGS = [
    ("f16", 4096, 1),
    ("f16", 32768, 1),
    ("f16", 1000, 1),
    ("q8_0", 8192, 1),
    ("f16", 2048, 4),
    ("q4_0", 512, 2),
]


@pytest.mark.parametrize("name", GGUF_MODELS)
def test_kv_cache_and_states_are_exact(engine: Engine, name: str) -> None:
    metadata = GGUF_MODELS[name]
    shape = shape_from_gguf(metadata)
    assert shape.certain
    for kv, context, sequences in SETTINGS:
        # contexts of several sequences are given together
        printed = engine.run(metadata, context * sequences, kv, sequences)
        kv_bytes, states = _sums(shape, kv, context, sequences)
        assert _same(kv_bytes, printed.kv), (kv, context, sequences, printed)
        assert _same(states, printed.state), (kv, context, sequences, printed)


def test_many_kinds_of_architecture_are_among_them() -> None:
    kinds = {layer.kind for metadata in GGUF_MODELS.values() for layer in shape_from_gguf(metadata).layers}
    assert kinds == {"attention", "sliding", "chunked", "latent", "recurrent", "parallel", "shared", "none"}
    assert len({metadata["general.architecture"] for metadata in GGUF_MODELS.values()}) >= 30


@pytest.mark.parametrize("step", [256, 1024])
def test_windows_grow_with_the_step(engine: Engine, step: int) -> None:
    metadata = GGUF_MODELS["gemma3-27b"]
    printed = engine.run(metadata, 16384, step=step)
    assert _same(_sums(shape_from_gguf(metadata), "f16", 16384, 1, step)[0], printed.kv)


FAR = {"minimax-01": 160}
"""MiB by which compute buffers may be off where the operators are not those of the others (lightning attention)."""


@pytest.mark.parametrize("name", GGUF_MODELS)
def test_compute_buffers_are_close(engine: Engine, name: str) -> None:
    metadata = GGUF_MODELS[name]
    shape = shape_from_gguf(metadata)
    for context in (4096, 32768):
        for flash in (True, False):
            for outputs in (1, 512):
                printed = engine.run(metadata, context, flash=flash, outputs=outputs).compute
                uses = cache_of(shape.layers, _rule(512), "f16", context)
                pairs = zip(uses, shape.layers, strict=True)
                window = max((use.cells for use, layer in pairs if layer.window), default=0)
                ours = compute_buffer(shape, Batch(512, outputs, context, window, flash)) / MIB
                allowed = max(0.05 * printed, FAR.get(name, 52))
                assert abs(ours - printed) <= allowed, (context, flash, outputs, ours, printed)


@pytest.mark.parametrize("name", TINY)
def test_files_of_every_family(engine: Engine, name: str, tmp_path: Path) -> None:
    """config.json and the GGUF made of it tell the same, and the engine, with the file loaded, prints it."""
    # not named after the family: llama.cpp looks for tokens of Phi-3 in whatever is called so
    folder, file = save_tiny(tmp_path / "model", name), tmp_path / "made.gguf"
    api.quantize(folder, "F16", file)
    told = memory(file, context=1024, hardware=NO_GPU)
    planned = memory(folder, target="F16", context=1024, hardware=NO_GPU)
    assert planned.layers == told.layers
    assert planned.weights == told.weights and planned.compute == told.compute
    printed = engine.run(file, 1024)
    assert _same(told.kv_cache / MIB, printed.kv)
    # llama.cpp prints how much of the file it maps, paddings between tensors included
    mapped = sum(printed.model.values()) * MIB
    tensors = GGUFCheckpoint(file).tensors
    assert abs(mapped - told.weights) <= 32 * len(tensors) + 0.006 * MIB
    assert abs(told.compute / MIB - printed.compute) <= 2


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("context", [512, 4096, 16384])
def test_totals_of_a_real_file(engine: Engine, wheel_gguf: Path, context: int, kv: str) -> None:
    told = memory(wheel_gguf, context=context, kv=kv, hardware=NO_GPU)
    printed = engine.run(wheel_gguf, context, kv)
    assert _same(told.kv_cache / MIB, printed.kv)
    total = sum(printed.model.values()) + sum(printed.kv) + printed.compute
    ours = (told.weights + told.kv_cache + told.compute) / MIB
    assert abs(ours - total) <= 0.03 * total


@pytest.mark.parametrize("target", ["Q4_K_M", "Q4_0", "Q8_0", "IQ4_NL"])
def test_weights_that_llama_cpp_rearranges(engine: Engine, test_models: Path, target: str, tmp_path: Path) -> None:
    """The file is a header with a hole behind it: sizes do not depend on the weights' values."""
    source = gguf_source(open_checkpoint(test_models / "smollm2-768"))
    file = tmp_path / "model.gguf"
    plan = make_plan(source, PlanRequest(target, output=file))
    shard = shards_of(plan, source.metadata, file)[0]
    with open(file, "wb") as stream:
        stream.write(shard.header)
        stream.truncate(shard.nbytes)
    machine = detect()
    told = memory(file, context=1024, hardware=Hardware("", 1, machine.simd, 2**40))
    printed = engine.run(file, 1024)
    repacked = next((int(n.split()[2]) for n in told.notes if "CPU_REPACK" in n), 0)
    assert abs(printed.model.get("CPU_REPACK", 0) - repacked) <= 1
    assert sum(printed.model.values()) >= told.weights / MIB - 1
    if not repacked:
        assert abs(sum(printed.model.values()) - told.weights / MIB) <= 0.1
    planned = memory(test_models / "smollm2-768", target=target, context=1024, hardware=NO_GPU)
    assert planned.weights == told.weights == plan.weights_bytes


def test_metadata_is_enough(engine: Engine, wheel_gguf: Path) -> None:
    """Of a real file the shape is the same with and without its tensors."""
    checkpoint = GGUFCheckpoint(wheel_gguf)
    assert shape_from_gguf(checkpoint.metadata) == describe(wheel_gguf).shape(llama_cpp=True)
