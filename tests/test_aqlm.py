"""AQLM: nearest sums of codewords, learning them, the tensors of a checkpoint, tuning, and the engine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import fewbits
from fewbits.checkpoint import open_model
from fewbits.codecs import codec
from fewbits.codecs.additive import Additive, AdditiveCoded
from fewbits.codecs.blocks import Blocks
from fewbits.codecs.storage import StorageType
from fewbits.codecs.trellis import Trellis
from fewbits.errors import FewbitsError
from fewbits.forward.streamed import StreamedModel, load_whole
from fewbits.kernels.additive import nearest_pairs, nearest_words
from fewbits.layouts.aqlm import AQLM as AQLMLayout
from fewbits.layouts.aqlm import unwrap, wrap
from fewbits.layouts.base import Part
from fewbits.methods import Known, Method, Search, nearest_torch
from fewbits.methods.aqlm import AQLM, prepare
from fewbits.quantize.tuning import Tuning
from tiny_models import save_tiny

MODEL = Path(fewbits.__file__).parent / "demo" / "model"
TYPES = {"float16": "F16", "float32": "F32", "int8": "I8", "int16": "I16"}
TWO = Additive(2, 8, 8)
ORACLE = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM
from aqlm import QuantizedLinear
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
found = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
assert len(found) == 7 and all(name.startswith("model.layers.1.") for name in found), found
ids = torch.from_numpy(numpy.load(sys.argv[2]))
with torch.no_grad():
    numpy.save(sys.argv[3], model(ids).logits.numpy())
"""


def described(arrays: dict[str, np.ndarray]) -> dict[str, Part]:
    return {suffix: Part(TYPES[array.dtype.name], array.shape) for suffix, array in arrays.items()}


def random_matrix(kind: Additive, rows: int, groups: int, seed: int) -> AdditiveCoded:
    random = np.random.default_rng(seed)
    codes = random.integers(0, kind.words, (rows, groups, kind.books)).astype(np.uint16)
    codebooks = random.standard_normal((kind.books, kind.words, kind.group)).astype(np.float16)
    return AdditiveCoded(kind, codes, codebooks, random.standard_normal(rows).astype(np.float16))


def layer(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and moments of inputs that depend on one another and differ in size."""
    random = np.random.default_rng(rows + columns)
    weights = random.standard_normal((rows, columns)) * np.exp(random.normal(-3, 0.4, (rows, 1)))
    x = random.standard_normal((2048, 24)) @ random.standard_normal((24, columns))
    x = (x + 2 * random.standard_normal((2048, columns))) * np.exp(random.normal(0, 0.7, columns))
    return weights.astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


def loss(found: AdditiveCoded, weights: np.ndarray, hessian: np.ndarray) -> float:
    """Of the outputs, as a share of their energy."""
    wrong = found.decode() - weights
    return float(((wrong @ hessian) * wrong).sum() / ((weights @ hessian) * weights).sum())


def halves(words: np.ndarray) -> np.ndarray:
    return (0.5 * np.square(words).sum(axis=1)).astype(np.float32)


@pytest.mark.parametrize("size", [8, 16])
def test_searches_find_the_nearest(size: int) -> None:
    random = np.random.default_rng(size)
    targets = random.standard_normal((37, size)).astype(np.float32)
    one, other = (random.standard_normal((count, size)).astype(np.float32) for count in (32, 64))
    found, others = np.empty(37, np.uint16), np.empty(37, np.uint16)
    nearest_words(targets, other, halves(other), found)
    distances = np.square(targets[:, None] - other[None]).sum(axis=2)
    assert np.array_equal(found, distances.argmin(axis=1))
    nearest_pairs(targets, one, other, halves(one), halves(other), one @ other.T, found, others)
    sums = (one[:, None] + other[None]).reshape(-1, size)
    best = np.square(targets[:, None] - sums[None]).sum(axis=2).argmin(axis=1)
    assert np.array_equal(found.astype(int) * 64 + others, best)


@settings(max_examples=40, deadline=None)
@given(
    books=st.integers(1, 4),
    bits=st.integers(1, 12),
    group=st.sampled_from([8, 16]),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_packing_goes_there_and_back(books: int, bits: int, group: int, rows: int, groups: int, seed: int) -> None:
    kind = Additive(books, bits, group)
    matrix = random_matrix(kind, rows, groups, seed)
    layout = AQLMLayout(kind)
    arrays = layout.pack(matrix)
    assert described(arrays) == layout.parts(matrix.shape)
    assert layout.identify(described(arrays), {}) == (layout, matrix.shape)
    assert np.array_equal(layout.coded(arrays).codes, matrix.codes)
    words, scales = matrix.codebooks.astype(np.float32), matrix.scales.astype(np.float32)
    wanted = sum(words[book, matrix.codes[:, :, book]] for book in range(books)).reshape(rows, -1) * scales[:, None]
    np.testing.assert_allclose(layout.unpack(arrays, matrix.shape), wanted, rtol=1e-5, atol=1e-5)


def test_codes_wrap_around() -> None:
    assert wrap(np.array([0, 127, 128, 255], np.uint16), 8).tolist() == [0, 127, -128, -1]
    assert wrap(np.array([32767, 32768, 65535], np.uint16), 16).tolist() == [32767, -32768, -1]
    assert wrap(np.array([2048, 4095], np.uint16), 12).dtype == np.int16
    assert unwrap(np.array([-1, 3], np.int8), 3).tolist() == [7, 3]


@pytest.mark.parametrize("spec", ["2x8g8", "1x8g16", "3x8g8"])
def test_the_hessian_pays(spec: str) -> None:
    """What inputs are tells more than plain k-means knows, also of inputs that were not looked at."""
    kind = AQLMLayout.from_spec(spec).type
    weights, hessian = layer(256, 192)
    plain = AQLM.make(weights, kind, Known())
    found = AQLM.make(weights, kind, Known(hessian=hessian))
    assert loss(found, weights, hessian) < 0.75 * loss(plain, weights, hessian)
    assert loss(plain, weights, np.eye(192)) < loss(found, weights, np.eye(192))


def test_more_effort_loses_less_and_threads_change_nothing() -> None:
    weights, hessian = layer(512, 160)
    losses = []
    for effort in ("fast", "thorough"):
        known = Known(hessian=hessian, effort=effort)  # type: ignore[arg-type]
        found = AQLM.make(weights, TWO, known)
        losses.append(loss(found, weights, hessian))
    assert losses[1] < losses[0]
    with ThreadPoolExecutor(2) as pool:
        other = AQLM.make(weights, TWO, known, pool)
    assert all(np.array_equal(getattr(found, part), getattr(other, part)) for part in ("codes", "codebooks", "scales"))


@pytest.mark.parametrize("kind", [Additive(2, 6, 8), Additive(1, 8, 16), Additive(3, 5, 8)], ids=lambda kind: kind.name)
def test_a_device_does_as_well(kind: Additive) -> None:
    """The device is torch's processor by another name: what is computed is a GPU's."""
    weights, hessian = layer(96, 160)
    here = AQLM.make(weights, kind, Known(hessian=hessian))
    there = AQLM.make(weights, kind, Known(hessian=hessian, device="cpu:0"))
    assert loss(there, weights, hessian) == pytest.approx(loss(here, weights, hessian), rel=0.02)


def test_on_a_device_the_search_finds_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is looked at together."""
    random = np.random.default_rng(1)
    targets, words = (
        torch.from_numpy(random.standard_normal(size).astype(np.float32)) for size in ((50, 8), (2, 16, 8))
    )
    books = [nearest_torch.Words(each) for each in words]
    distances = (targets[:, None] - words[0]).square().sum(2)
    sums = (targets[:, None, None] - words[0][:, None] - words[1]).square().sum(3).flatten(1)
    for scores in (1, 700, 1 << 20):
        monkeypatch.setattr(nearest_torch, "SCORES", scores)
        assert torch.equal(books[0].nearest(targets), distances.argmin(1))
        one, other = nearest_torch.nearest_pairs(targets, books)
        assert torch.equal(16 * one + other, sums.argmin(1))


def test_odd_matrices_and_hessians() -> None:
    weights, hessian = layer(40, 64)
    weights[3] = 0
    hessian[:, 5] = hessian[5] = 0
    found = AQLM.make(weights, TWO, Known(hessian=hessian))
    assert not found.decode()[3].any() and np.isfinite(found.decode()).all()
    moments = prepare(hessian, 8)
    lower = moments.lower.astype(np.float64)
    blocks = np.zeros_like(lower)
    for at, factor in enumerate(moments.spread.astype(np.float64)):
        blocks[8 * at : 8 * at + 8, 8 * at : 8 * at + 8] = factor @ factor.T
    np.testing.assert_allclose(lower @ blocks @ lower.T, moments.hessian, atol=1e-5 * moments.hessian.max())
    assert AQLM.make(np.zeros((8, 64), np.float32), TWO, Known()).decode().any() == np.False_
    tiny = AQLM.make(layer(64, 64)[0] * np.float32(1e-19), TWO, Known())  # squares are below float32
    assert np.isfinite(tiny.decode()).all()
    hessian[2, 2] = -1
    with pytest.raises(FewbitsError, match="not finite and positive"):
        AQLM.make(weights, TWO, Known(hessian=hessian))
    with pytest.raises(FewbitsError, match="does not make EXL3_2"):
        AQLM.make(weights, Trellis(2), Known())


def test_gradients_are_those_of_the_weights() -> None:
    matrix = random_matrix(Additive(2, 4, 8), 6, 3, 0)
    tensors = {name: tensor.requires_grad_(True) for name, tensor in matrix.tensors().items()}
    pull = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0))
    (matrix.decode_torch(tensors) * pull).sum().backward()
    for name, tensor in tensors.items():
        own = {key: value.detach().clone() for key, value in tensors.items()}
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        ends = []
        for step in (-0.5, 0.5):
            moved = own | {name: own[name] + step * direction}
            ends.append(float((matrix.decode_torch(moved).double() * pull).sum()))
        assert ends[1] - ends[0] == pytest.approx(float((tensor.grad * direction).sum()), rel=1e-4)
    assert np.array_equal(matrix.with_tensors(tensors).decode(), matrix.decode())


@pytest.mark.parametrize(("kind", "by", "left"), [(TWO, AQLM, 0.95), (Blocks(codec("Q6_K")), Search, 0.98)])
def test_tuning_helps_on_text_that_it_has_not_seen(kind: StorageType, by: type[Method], left: float) -> None:
    """Whether there is much to be gained or little."""
    model = open_model(MODEL)
    streamed = StreamedModel(model)
    ids = np.random.default_rng(0).integers(0, 2048, (28, 96))
    with torch.no_grad():
        stream = streamed.enter(ids[:24], together=4)
        fresh = streamed.enter(ids[24:], together=4)
        given, block = fresh.hidden.clone(), streamed.block(0)
        tuning = Tuning(streamed, stream, 0, block, dtype=torch.float16)
        streamed.run_block(0, block, fresh)
        wanted, coded = fresh.hidden.clone(), {}
        for name, values in streamed.weights_of(0, block).items():
            if values.ndim == 2:
                coded[name] = by.make(values.numpy(), kind, Known(effort="fast"))
                values.copy_(torch.from_numpy(coded[name].decode()))

        def error() -> float:
            fresh.hidden.copy_(given)
            streamed.run_block(0, block, fresh)
            return float((fresh.hidden - wanted).square().mean())

        before = error()
        assert tuning(coded, 0) is None
        found = tuning(coded, 3)
        assert found and found.after < left * found.before
        for name, values in streamed.weights_of(0, block).items():
            if name in coded:
                values.copy_(torch.from_numpy(found.coded[name].decode()))
                if kind == TWO:
                    assert np.array_equal(found.coded[name].codes, coded[name].codes)
        tuning.apply(found.plain)
        assert all(tensor.equal(tensor.half().float()) for tensor in found.plain.values())
        assert error() < left * before


@pytest.mark.parametrize("batches", [4, 5])
def test_tuning_takes_five_batches(batches: int) -> None:
    """One is held out, where there are enough; with fewer nothing is tuned."""
    streamed = StreamedModel(open_model(MODEL))
    with torch.no_grad():
        stream = streamed.enter(np.random.default_rng(0).integers(0, 2048, (batches, 64)), together=1)
        block = streamed.block(0)
        tuning = Tuning(streamed, stream, 0, block)
        name = "model.layers.0.self_attn.v_proj.weight"
        values = streamed.weights_of(0, block)[name]
        coded = AQLM.make(values.numpy(), Additive(1, 8, 16), Known(effort="fast"))
        values.copy_(torch.from_numpy(coded.decode()))
        assert len(tuning.held_out) == batches - 4
        assert (tuning({name: coded}, 3) is not None) == (batches == 5)


@pytest.mark.parametrize("target", ["aqlm:2x8g8", "quip:2", "exl3:2"])
def test_a_short_text_is_refused(target: str, texts: tuple[Path, Path]) -> None:
    """512 tokens say nothing of 768 inputs; there is no other method to take instead."""
    with pytest.raises(FewbitsError, match=r"768 columns: too few for \w+\. .* --calibration-chunks\.$"):
        fewbits.plan(MODEL, target, calibration=texts[0], calibration_chunks=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> dict[str, Path]:
    """Directories of the demo model and of a tiny one, of which the second block is quantized."""
    folder = tmp_path_factory.mktemp("aqlm")
    tiny = save_tiny(folder / "tiny", "llama")
    sources = {"demo": (MODEL, "2x8g8"), "2x8g8": (tiny, "2x8g8"), "1x16g8": (tiny, "1x16g8")}
    for name, (source, spec) in sources.items():
        options: dict[str, Any] = {"calibration": texts[0], "calibration_chunks": 4, "keep": [r"layers\.[023]\."]}
        fewbits.quantize(source, f"aqlm:{spec}", folder / name, **options)
    return {name: folder / name for name in sources}


@pytest.mark.parametrize("name", ["2x8g8", "1x16g8"])
def test_the_engine_gives_our_logits(made: dict[str, Path], name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("aqlm") is None:
        pytest.skip("aqlm is not installed")
    ids = np.random.default_rng(0).integers(0, 280, (1, 12))
    np.save(tmp_path / "ids.npy", ids)
    words = [sys.executable, "-c", ORACLE, *map(str, (made[name], tmp_path / "ids.npy", tmp_path / "logits.npy"))]
    # with more threads aqlm's kernel for codebooks of 256 adds up in a race
    run = subprocess.run(
        words, env=os.environ | {"NUMBA_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    with torch.no_grad():
        ours = load_whole(open_model(made[name]))(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), ours, atol=1e-4 * np.abs(ours).max())


def test_the_size_is_as_predicted(made: dict[str, Path], texts: tuple[Path, Path]) -> None:
    plan = fewbits.plan(MODEL, "aqlm:2x8g8", calibration=texts[0], keep=[r"layers\.[023]\."])
    (file,) = made["demo"].glob("*.safetensors")
    stored = {
        name: array for name, array in load_file(file).items() if name.endswith((".codes", ".codebooks", ".scales"))
    }
    assert len(stored) == 3 * 7
    planned = sum(tensor.nbytes for tensor in plan.tensors if tensor.codec == "AQLM_2x8g8")
    assert sum(array.nbytes for array in stored.values()) == planned
    report = fewbits.measure(made["demo"], texts[1], reference=MODEL, context=128, chunks=12, cache=False)
    assert report.comparison is not None
    assert report.comparison.kl.mean.value < 0.5


def test_targets_and_configurations() -> None:
    for name in AQLMLayout.examples():
        layout = AQLMLayout.from_spec(name)
        assert AQLMLayout.from_config(layout.config(["lm_head"])) == layout
        assert Additive.from_name(layout.type.name) == layout.type
    names = AQLMLayout.from_spec("2x8g8").config(["lm_head"])["linear_weights_not_to_quantize"]
    assert names == ["lm_head", "lm_head.weight"]
    for spec in ("", "2x8", "2x8g7", "2x16g8", "1x17g8", "9x8g8", "0x8g8", "1x7g8"):
        with pytest.raises(FewbitsError, match="Unknown target"):
            AQLMLayout.from_spec(spec)
    for name in ("", "AQLM_2x8", "EXL3_2", "AQLM_0x8g8", "AQLM_1x17g8"):
        with pytest.raises(FewbitsError):
            Additive.from_name(name)


@pytest.mark.parametrize(
    "changes",
    [
        {"out_group_size": 8},
        {"nbits_per_codebook": 17},
        {"nbits_per_codebook": "8"},
        {"num_codebooks": 0},
        {"num_codebooks": True},
        {"num_codebooks": 10**9},
        {"in_group_size": 0},
        {"in_group_size": 1.5},
    ],
)
def test_refuses_configurations_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(FewbitsError):
        AQLMLayout.from_config(AQLMLayout(TWO).config([]) | changes)


def test_refuses_damaged_modules() -> None:
    layout = AQLMLayout(TWO)
    good = layout.pack(random_matrix(TWO, 6, 4, 0))
    for suffix in good:
        with pytest.raises(FewbitsError, match="missing"):
            layout.identify(described({name: array for name, array in good.items() if name != suffix}), {})
        with pytest.raises(FewbitsError):
            layout.identify(described(good | {suffix: good[suffix][:-1]}), {})
    with pytest.raises(FewbitsError, match="I16"):
        layout.identify(described(good | {".codes": good[".codes"].astype(np.int16)}), {})
    for suffix in (".codebooks", ".scales"):
        bad = good[suffix].copy()
        bad.flat[0] = np.nan
        with pytest.raises(FewbitsError, match="not finite"):
            layout.unpack(good | {suffix: bad}, (6, 32))
    narrow = replace(layout, type=Additive(2, 4, 8))
    with pytest.raises(FewbitsError, match="no codes of 4 bits"):
        narrow.unpack(good, (6, 32))
    with pytest.raises(FewbitsError, match=r"multiples of 8.*12\. Keep this"):
        layout.check((8, 12))
    with pytest.raises(FewbitsError, match=r"multiples of 16.*24\. Take aqlm:2x8g8"):
        AQLMLayout.from_spec("2x8g16").check((8, 24))


def test_mixtures_of_experts_are_refused(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model", "mixtral")
    (tmp_path / "text.txt").write_text("the cat sat on the mat and ran " * 400)
    with pytest.raises(FewbitsError, match="all experts of a block in one tensor"):
        fewbits.plan(directory, "aqlm:2x8g8", calibration=tmp_path / "text.txt")
