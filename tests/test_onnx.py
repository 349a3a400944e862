"""ONNX directories: packing, the graph, and what onnxruntime and onnxruntime-genai make of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fewbits import api
from fewbits.codecs.scaled import Quantized, Scaled
from fewbits.demo import MODEL
from fewbits.errors import FewbitsError
from fewbits.forward.streamed import build_skeleton
from fewbits.layouts.base import Part
from fewbits.layouts.onnx import BITS, BLOCKS, ONNX
from tiny_models import VOCAB, save_tiny

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
genai = pytest.importorskip("onnxruntime_genai")

PROMPT = "And it came to pass in those days, that the people of the city"
NEW_TOKENS = 64
SIZES = {"U8": "u1", "F16": "<f2", "BF16": "<u2", "F32": "<f4"}


def described(arrays: dict[str, np.ndarray]) -> dict[str, Part]:
    types = {"uint8": "U8", "float32": "F32"}
    return {suffix: Part(types[array.dtype.name], array.shape) for suffix, array in arrays.items()}


def random_matrix(kind: Scaled, rows: int, columns: int, seed: int) -> Quantized:
    """Every code used, scales of both signs, zero points at the ends of their range."""
    random = np.random.default_rng(seed)
    top = 1 << kind.bits
    codes = random.integers(0, top, (rows, columns)).astype(np.uint8)
    scales = random.standard_normal(kind.grid((rows, columns))).astype(np.float16).astype(np.float32)
    zeros = random.integers(0, top, scales.shape).astype(np.float32) if kind.zero == "integer" else None
    return Quantized(kind, codes, scales, zeros)


def by_the_book(arrays: dict[str, np.ndarray], bits: int, block: int) -> np.ndarray:
    """MatMulNBits' weights by its documentation, bit by bit: float64 [N, K]."""
    data, scales = arrays[f".weight_Q{bits}"], arrays[".weight_scales"]
    rows, blocks = scales.shape
    zeros = arrays.get(".weight_zp")
    out = np.empty((rows, blocks * block))

    def code(line: np.ndarray, at: int) -> int:
        return sum(int(line[(at * bits + bit) // 8] >> ((at * bits + bit) % 8) & 1) << bit for bit in range(bits))

    for row in range(rows):
        for b in range(blocks):
            zero = 1 << (bits - 1) if zeros is None else code(zeros[row], b)
            for k in range(block):
                out[row, b * block + k] = (code(data[row, b], k) - zero) * float(scales[row, b])
    return out


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    block=st.sampled_from(BLOCKS[:3]),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 5),
    asymmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_are_packed_by_the_book(
    bits: int, block: int, rows: int, blocks: int, asymmetric: bool, seed: int
) -> None:
    layout = ONNX.from_spec(f"int{bits}g{block}{'-asym' if asymmetric else ''}")
    shape = (rows, blocks * block)
    matrix = random_matrix(layout.type, *shape, seed)
    arrays = layout.pack(matrix)
    assert described(arrays) == layout.parts(shape)
    found, same = ONNX.from_spec("int4").identify(described(arrays), {})
    assert (found.type, same) == (layout.type, shape)
    assert np.array_equal(layout.unpack(arrays, shape), matrix.decode())
    np.testing.assert_allclose(layout.unpack(arrays, shape), by_the_book(arrays, bits, block), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("spec", ["int2g16-asym", "int4", "int4g128-asym", "int8", "int8g64-asym"])
def test_the_operator_multiplies_with_what_is_decoded(spec: str) -> None:
    layout, shape = ONNX.from_spec(spec), (24, 384)
    matrix = random_matrix(layout.type, *shape, 1)
    arrays = {suffix[1:]: array for suffix, array in layout.pack(matrix).items()}
    options = {"K": shape[1], "N": shape[0], "bits": layout.type.bits, "block_size": layout.block}
    node = onnx.helper.make_node("MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft", **options)
    kind = onnx.TensorProto.FLOAT
    ends = [onnx.helper.make_tensor_value_info(name, kind, ["n", size]) for name, size in (("x", 384), ("y", 24))]
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], stored)
    versions = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=versions, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(2).standard_normal((7, 384)).astype(np.float32)
    wanted = x.astype(np.float64) @ matrix.decode().astype(np.float64).T
    assert np.linalg.norm(session.run(["y"], {"x": x})[0] - wanted) < 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("spec", ["int3", "int4g24", "int4-exact-exact", "fp8", "int4g512", ""])
def test_unknown_targets(spec: str) -> None:
    with pytest.raises(FewbitsError, match="Unknown target"):
        ONNX.from_spec(spec)


def test_parts_that_do_not_fit_are_refused() -> None:
    layout = ONNX.from_spec("int4-asym")
    good = layout.parts((8, 64))
    for suffix, part in (
        (".weight_Q4", Part("U8", (8, 2, 12))),
        (".weight_Q4", Part("U8", (8, 3, 16))),
        (".weight_scales", Part("F32", (8, 3))),
        (".weight_zp", Part("U8", (8, 2))),
        (".weight_zp", Part("F32", (8, 1))),
    ):
        with pytest.raises(FewbitsError, match=r"weight_"):
            layout.identify({**good, suffix: part}, {})
    with pytest.raises(FewbitsError, match="missing"):
        layout.identify({".weight_Q4": good[".weight_Q4"]}, {})
    arrays = layout.pack(random_matrix(layout.type, 8, 64, 0))
    with pytest.raises(FewbitsError, match="finite"):
        layout.unpack({**arrays, ".weight_scales": np.full((8, 2), np.nan, np.float32)}, (8, 64))
    with pytest.raises(FewbitsError, match="int4g16"):
        layout.check((8, 48))


def run(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits of plain onnxruntime, float32 [n, vocabulary]."""
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    config = json.loads((folder / "config.json").read_text())
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    feeds: dict[str, Any] = {"input_ids": ids[None], "attention_mask": np.ones_like(ids[None])}
    for entry in session.get_inputs():
        if entry.name.startswith("past"):
            feeds[entry.name] = np.zeros((1, config["num_key_value_heads"], 0, size), np.float32)
        elif entry.name == "position_ids":
            feeds[entry.name] = np.arange(ids.size)[None]
    return session.run(["logits"], feeds)[0][0]


def decoded(folder: Path) -> Any:
    """transformers' model with the weights that the directory holds, as we read them."""
    model = api.open(folder)
    found = AutoModelForCausalLM.from_config(
        build_skeleton(model).config, dtype=torch.float32, attn_implementation="eager"
    )
    weights = {name: torch.from_numpy(np.ascontiguousarray(model.read(name))) for name in model.names}
    if "lm_head.weight" in weights:  # a head of its own, quantized, where it was the embeddings
        found.lm_head.weight = torch.nn.Parameter(weights["lm_head.weight"])
    missing = found.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
    return found.eval()


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids[None])).logits[0].numpy()


def generated(folder: Path, ids: np.ndarray) -> list[int]:
    """What onnxruntime-genai goes on with, always taking the likeliest token."""
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=ids.size + NEW_TOKENS, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(ids.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> dict[str, Path]:
    """The demo model in every kind of target."""
    folder = tmp_path_factory.mktemp("onnx")
    targets: dict[str, dict[str, Any]] = {
        "onnx:int4-exact": {"calibration": texts[0], "calibration_chunks": 4, "keep": [r"layers\.3\.mlp"]},
        "onnx:int8-asym-exact": {},
        "onnx:fp16": {},
    }
    for target, options in targets.items():
        name = folder / target.replace(":", "-")
        plan = api.plan(MODEL, target, **options)
        report = api.quantize(MODEL, target, name, threads=1, **options)
        on_disk = {file.name: file.stat().st_size for file in name.iterdir()}
        assert {file.name: file.size for file in plan.files} == {
            file: size for file, size in on_disk.items() if file.endswith(".safetensors")
        }
        assert {file.name: file.size for file in report.files} == {
            file: size for file, size in on_disk.items() if file.startswith("model.")
        }
    return {target: folder / target.replace(":", "-") for target in targets}


TARGETS = ["onnx:int4-exact", "onnx:int8-asym-exact", "onnx:fp16"]


@pytest.mark.parametrize("target", TARGETS)
def test_engines_give_what_transformers_gives_with_the_decoded_weights(made: dict[str, Path], target: str) -> None:
    folder = made[target]
    model, tokenizer = decoded(folder), api.open(folder).tokenizer()
    ids = np.array(tokenizer.encode(PROMPT), np.int64)
    assert distance(run(folder, ids), logits(model, ids)) < 1e-5
    inputs = torch.from_numpy(ids[None])
    with torch.no_grad():
        wanted = model.generate(inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
    assert generated(folder, ids) == wanted
    assert list(genai.Tokenizer(genai.Model(str(folder))).encode(PROMPT)) == ids.tolist()


@pytest.mark.parametrize("target", TARGETS)
def test_the_graph_refers_to_the_checkpoint(made: dict[str, Path], target: str) -> None:
    folder = made[target]
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    outside = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    stored = api.open(folder).checkpoint._quantized  # type: ignore[union-attr]
    places = {info.name: info for info in stored.tensors.values() if info.name not in stored}
    for module in stored._modules.values():
        places |= {info.name: info for info in module.parts.values()}
    for tensor in outside:
        told = {entry.key: entry.value for entry in tensor.external_data}
        info = places.pop(tensor.name)
        assert (told["location"], int(told["offset"]), int(told["length"])) == (
            "model.safetensors",
            info.offset,
            info.nbytes,
        )
        assert tuple(tensor.dims) == info.shape
    # what the graph has in itself: norms
    assert all(len(info.shape) == 1 for info in places.values())
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulNBits") == {"onnx:int4-exact": 25, "onnx:int8-asym-exact": 28, "onnx:fp16": 0}[target]
    assert kinds.count("MatMul") == {"onnx:int4-exact": 4, "onnx:int8-asym-exact": 1, "onnx:fp16": 29}[target]


def test_what_was_made_is_read_again(made: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path) -> None:
    types = {share.dtype for share in api.inspect(made["onnx:int4-exact"]).types}
    assert types == {"INT4_G32", "BF16"}
    again = tmp_path / "again"
    api.quantize(made["onnx:int8-asym-exact"], "hqq:w8g32", again, threads=1)
    first, second = (api.open(folder).read("model.layers.0.mlp.up_proj.weight") for folder in (MODEL, again))
    assert distance(second, first) < 0.01
    provenance = json.loads((made["onnx:int4-exact"] / "fewbits.json").read_text())
    assert provenance["method"] == "gptq" and provenance["calibration_tokens"] > 0
    assert "onnxruntime_genai" in (made["onnx:int4-exact"] / "README.md").read_text()


def test_a_damaged_directory_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(made["onnx:int4-exact"], folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FewbitsError, match="truncated"):
        api.open(folder)
    (folder / "model.safetensors").write_bytes(whole.replace(b"q_proj.weight_scales", b"q_proj.weight_scalex"))
    with pytest.raises(FewbitsError, match=r"q_proj: \.weight_scales is missing"):
        api.open(folder)


def test_a_head_can_stay(tmp_path: Path) -> None:
    plan = api.plan(MODEL, "onnx:int4", head_bits=16)
    assert next(t.codec for t in plan.tensors if t.name == "lm_head.weight") == "BF16"


CASES: dict[str, tuple[str, str, dict[str, Any], int | None]] = {
    # onnxruntime-genai's builder takes any linear with as many outputs as there are tokens for the head
    "a trap": ("llama", "onnx:int4-exact", {"intermediate_size": VOCAB}, None),
    "tied, yarn": ("qwen2-yarn", "onnx:int4-exact", {}, 8),
    "one matrix for q, k and v": ("phi3", "onnx:int4-asym-exact", {}, None),
    "norms plus one, two ropes, windows": ("gemma3", "onnx:int8-exact", {}, 4),
    "layers without rope": ("smollm3", "onnx:fp16", {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_families(case: str, tmp_path: Path) -> None:
    name, target, changes, head = CASES[case]
    save_tiny(tmp_path / "tiny", name, changes)
    api.quantize(tmp_path / "tiny", target, tmp_path / "out", threads=1, head_bits=head)
    ids = np.random.default_rng(0).integers(4, VOCAB - 8, 60)
    assert distance(run(tmp_path / "out", ids), logits(decoded(tmp_path / "out"), ids)) < 1e-5


@pytest.mark.parametrize(("target", "method"), [("onnx:dynamic-int8", "smoothquant"), ("onnx:int4", "awq")])
def test_activations_in_8_bits(target: str, method: str, tmp_path: Path, texts: tuple[Path, Path]) -> None:
    """Both methods change norms as well, and the graph must have the changed ones."""
    options: dict[str, Any] = {"calibration": texts[0], "calibration_chunks": 4, "threads": 1}
    api.quantize(MODEL, target, tmp_path / "out", method=method, **options)
    model = decoded(tmp_path / "out")
    ids = np.array(api.open(tmp_path / "out").tokenizer().encode(PROMPT), np.int64)
    found, wanted = run(tmp_path / "out", ids), logits(model, ids)
    assert 1e-4 < distance(found, wanted) < 0.05


def test_a_gguf_file_as_source(tmp_path: Path) -> None:
    api.quantize(MODEL, "Q8_0", tmp_path / "demo.gguf", threads=1)
    api.quantize(tmp_path / "demo.gguf", "onnx:int4", tmp_path / "out", threads=1)
    wanted = api.open(tmp_path / "demo.gguf").tokenizer().encode(PROMPT)
    assert list(genai.Tokenizer(genai.Model(str(tmp_path / "out"))).encode(PROMPT)) == wanted


def test_a_family_that_the_builder_does_not_know(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny", "mixtral")
    with pytest.raises(FewbitsError, match="builder does not make it"):
        api.quantize(tmp_path / "tiny", "onnx:int4", tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime_genai", None)
    with pytest.raises(FewbitsError, match=r"onnxruntime-genai.*fewbits\[onnx\]"):
        api.plan(MODEL, "onnx:int4")
