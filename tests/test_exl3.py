"""EXL3: the trellis and its search, LDLQ on it, and the tensors of a checkpoint."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import exl3_oracle
from fewbits.codecs.trellis import BITS, CODEBOOKS, Trellis, TrellisCoded, codebook, tile_order
from fewbits.errors import FewbitsError
from fewbits.layouts.base import Made, Part
from fewbits.layouts.exl3 import EXL3
from fewbits.methods import Known
from fewbits.methods.ldlq import DAMPING, DISTORTION, GAIN, LDLQ, decompose, expected_errors, random_signs

TYPES = {"float16": "F16", "int32": "I32", "int16": "I16"}
KINDS = [Trellis(bits, name) for bits in BITS for name in CODEBOOKS]


def described(arrays: dict[str, np.ndarray]) -> dict[str, Part]:
    return {suffix: Part(TYPES[array.dtype.name], array.shape) for suffix, array in arrays.items()}


def random_matrix(kind: Trellis, rows: int, columns: int, seed: int = 0) -> TrellisCoded:
    """Every bit used, scales of both signs."""
    random = np.random.default_rng(seed)
    words = random.integers(0, 1 << 16, (columns // 16, rows // 16, 16 * kind.bits), np.uint16).view(np.int16)
    suh, svh = (random.standard_normal(size).astype(np.float16) for size in (columns, rows))
    return TrellisCoded(kind, words, suh, svh)


def gaussian(tiles: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tiles, 256)).astype(np.float32)


def layer(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights with heavy tails, rows and columns of different size; moments of inputs that depend on one another."""
    random = np.random.default_rng(rows + columns)
    matrix = random.standard_t(5, (rows, columns)) * np.exp(random.normal(-3, 0.4, (rows, 1)))
    matrix *= np.exp(random.normal(0, 0.4, columns))
    x = random.standard_normal((4 * columns, 48)) @ random.standard_normal((48, columns))
    x = (x + 2 * random.standard_normal((4 * columns, columns))) * np.exp(random.normal(0, 0.7, columns))
    return matrix.astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


def losses(found: np.ndarray, wanted: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """e^T H e of each output, of the damped Hessian."""
    damped = hessian + DAMPING * hessian.diagonal().mean() * np.eye(len(hessian))
    wrong = (found - wanted).astype(np.float64)
    return ((wrong @ damped) * wrong).sum(axis=1)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_codebooks_are_those_of_the_description(name: str) -> None:
    table = codebook(name)
    for state in range(0, 1 << 16, 97):
        assert table[state] == exl3_oracle.value(state, name)


def test_steps_lie_in_tiles_as_described() -> None:
    assert [(at // 16, at % 16) for at in tile_order()] == exl3_oracle.places()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_decoding_is_that_of_the_description(kind: Trellis) -> None:
    matrix = random_matrix(kind, 256, 128)
    arrays = EXL3(kind).pack(matrix)
    wanted = exl3_oracle.decode(arrays)
    found = EXL3(kind).unpack(arrays, (256, 128))
    assert found.dtype == np.float32 and found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())
    states = [exl3_oracle.value(state, kind.codebook) for state in exl3_oracle.states(matrix.trellis[1, 3])]
    tile = matrix.inner()[48:64, 16:32]
    assert [tile[right, down] for down, right in exl3_oracle.places()] == states


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_half_bits_are_read_and_not_made(bits: int) -> None:
    kind = Trellis(bits, half=True)
    random = np.random.default_rng(bits)
    arrays = {
        ".trellis": random.integers(-(1 << 15), 1 << 15, (16, 8, 16 * bits + 8)).astype(np.int16),
        ".suh": random.standard_normal(256).astype(np.float16),
        ".svh": random.standard_normal(128).astype(np.float16),
        ".mul1": np.array(1, np.int32),
    }
    layout, shape = EXL3(Trellis(4)).identify(described(arrays), {})
    assert layout.type == kind and shape == (128, 256) and kind.name == f"EXL3_{bits}.5"
    assert described(arrays) == layout.parts(shape)
    wanted = exl3_oracle.decode(arrays)
    np.testing.assert_allclose(layout.unpack(arrays, shape), wanted, atol=2e-6 * np.abs(wanted).max())
    with pytest.raises(FewbitsError, match="not made"):
        kind.search(gaussian(1))
    with pytest.raises(FewbitsError, match="Unknown trellis"):
        Trellis.from_name(kind.name)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_reference_of_the_specs_agrees(kind: Trellis, shared_dir: Path) -> None:
    spec = importlib.util.spec_from_file_location("exl3_of_specs", shared_dir / "specs/reference/exl3.py")
    assert spec and spec.loader
    reference: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    matrix = random_matrix(kind, 128, 256, seed=1)
    wanted = reference.reconstruct(matrix.trellis, matrix.suh, matrix.svh, kind.codebook).T
    np.testing.assert_allclose(matrix.decode(), wanted, atol=2e-6 * np.abs(wanted).max())
    states = reference.unpack(matrix.trellis).astype(np.uint16)
    assert np.array_equal(kind.pack(states), reference.pack(states, kind.bits))


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), tiles=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_packing_goes_there_and_back(bits: int, tiles: int, seed: int) -> None:
    kind = Trellis(bits)
    steps = np.random.default_rng(seed).integers(0, 1 << bits, (tiles, 256)).astype(np.uint16)
    states = kind.states(steps)
    packed = kind.pack(states)
    assert packed.shape == (tiles, 16 * bits) and packed.dtype == np.int16
    assert exl3_oracle.states(packed[-1]) == states[-1].tolist()
    assert np.array_equal(kind.pack(kind.states(steps + (1 << bits))), packed)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", ["mul1", "3inst"])
def test_the_search_is_as_good_as_the_slow_one(bits: int, name: str) -> None:
    if name != "mul1" and bits not in (2, 3):
        return
    table = codebook(name).astype(np.float64)
    tile = gaussian(1, seed=bits)[0] * table.std() * GAIN[bits]
    tile[7] = 5.0  # beyond the codebook
    found = Trellis(bits, name).search(tile[None].astype(np.float32))[0]
    best = exl3_oracle.best_walk(tile.astype(np.float64), table, bits)
    lost, least = (np.square(table[states] - tile).sum() for states in (found, best))
    assert lost <= least * 1.002
    assert np.array_equal(found[1:] >> bits, found[:-1] & (0xFFFF >> bits))
    assert found[0] >> bits == found[-1] & (0xFFFF >> bits)


def test_tiles_do_not_depend_on_their_neighbours() -> None:
    tiles = gaussian(19)
    kind = Trellis(4)
    whole = kind.search(tiles)
    work = kind.workspace()
    alone = [kind.search(tiles[i : i + 1], work) for i in (0, 15, 16, 18)]
    assert np.array_equal(np.concatenate(alone), whole[[0, 15, 16, 18]])


@pytest.mark.parametrize(("bits", "most"), [(2, 0.0696), (3, 0.0176), (4, 0.00449)])
def test_the_distortion_is_that_of_good_trellises(bits: int, most: float) -> None:
    tiles = gaussian(320) * np.float32(GAIN[bits])
    kind = Trellis(bits)
    coded = codebook(kind.codebook)[kind.search(tiles)]
    distortion = float(np.square(coded - tiles).sum() / np.square(tiles).sum())
    assert distortion < most
    assert distortion == pytest.approx(DISTORTION[bits], rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_loses_less_than_rounding_and_what_was_expected(bits: int) -> None:
    weights, hessian = layer(256, 256)
    kind = Trellis(bits)
    rounded = losses(LDLQ.make(weights, kind, Known()).decode(), weights, hessian)
    made = LDLQ.make(weights, kind, Known(hessian=hessian))
    fed = losses(made.decode(), weights, hessian)
    assert fed.sum() < 0.7 * rounded.sum()
    expected = expected_errors(weights, hessian, [bits])[bits]
    assert expected.shape == (256,)
    # in real layers 1 to 3 %; here there are many scales for few weights
    assert expected.sum() == pytest.approx(fed.sum(), rel=0.15)
    assert np.corrcoef(np.log(expected), np.log(fed))[0, 1] > 0.8
    for factor in (0.99, 1.01):  # the scales are the best for these codes
        other = replace(made, svh=(made.svh * np.float16(factor)).astype(np.float16))
        assert losses(other.decode(), weights, hessian).sum() > fed.sum()


def test_the_result_does_not_depend_on_threads() -> None:
    weights, hessian = layer(512, 128)
    kind, known = Trellis(4), Known(hessian=hessian)
    alone = LDLQ.make(weights, kind, known)
    with ThreadPoolExecutor(3) as pool:
        together = LDLQ.make(weights, kind, known, pool)
    assert np.array_equal(alone.trellis, together.trellis)
    assert np.array_equal(alone.suh, together.suh) and np.array_equal(alone.svh, together.svh)


def test_zeros_stay_zeros() -> None:
    weights, hessian = layer(128, 128)
    weights[3], weights[:, 5], hessian[5], hessian[:, 5] = 0, 0, 0, 0
    decoded = LDLQ.make(weights, Trellis(4), Known(hessian=hessian)).decode()
    assert np.isfinite(decoded).all() and np.abs(decoded[3]).max() < 1e-6
    nothing = LDLQ.make(np.zeros_like(weights), Trellis(4), Known(hessian=hessian)).decode()
    assert np.abs(nothing).max() < 1e-6


def test_decomposing_gives_the_factors() -> None:
    _, hessian = layer(128, 256)
    scales = random_signs(256) * np.linspace(0.5, 2, 256, dtype=np.float32)
    found = decompose(hessian, scales)
    lower = found.lower.astype(np.float64)
    damped = hessian + DAMPING * hessian.diagonal().mean() * np.eye(256)
    turn = np.kron(np.eye(2), exl3_oracle.hadamard())
    rotated = turn @ (damped * scales * scales[:, None]) @ turn
    rest = np.linalg.solve(lower, np.linalg.solve(lower, rotated).T)
    blocks = rest.reshape(16, 16, 16, 16)
    apart = [np.abs(blocks[i, :, j]).max() for i in range(16) for j in range(16) if i != j]
    assert max(apart) < 1e-4 * np.abs(rest).max()
    np.testing.assert_allclose([np.trace(blocks[i, :, i]) for i in range(16)], found.spread, rtol=1e-3)
    np.testing.assert_allclose([lower[i * 16 : i * 16 + 16, i * 16 : i * 16 + 16] for i in range(16)],
                               [np.eye(16)] * 16, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_broken_hessian_is_refused(wrong: float) -> None:
    _, hessian = layer(128, 128)
    hessian[1, 2] = wrong
    with pytest.raises(FewbitsError, match="not finite"):
        decompose(hessian, random_signs(128))
    with pytest.raises(FewbitsError, match="not positive"):
        decompose(1001 * np.eye(128, dtype=np.float32) - 1000, random_signs(128))


@pytest.mark.parametrize("kind", KINDS[::5], ids=lambda kind: kind.name)
def test_what_is_packed_is_what_was_planned(kind: Trellis) -> None:
    layout, shape = EXL3(kind), (384, 128)
    arrays = layout.pack(random_matrix(kind, *shape))
    assert described(arrays) == layout.parts(shape)
    assert sum(array.nbytes for array in arrays.values()) == sum(part.nbytes for part in layout.parts(shape).values())
    assert arrays[".trellis"].nbytes * 8 == kind.bits * 384 * 128
    found, read = layout.identify(described(arrays), {})
    assert (found, read) == (layout, shape)
    assert Trellis.from_name(kind.name) == kind


def test_targets() -> None:
    assert EXL3.from_spec("3").type == Trellis(3) and EXL3.from_spec("8-3inst").type == Trellis(8, "3inst")
    assert [layout.type.bits for layout in EXL3.members("3.25")] == list(BITS) and not EXL3.members("3")
    for spec in ("9", "0", "3-mul2", "w4g128", "3-mcg-mcg", ""):
        with pytest.raises(FewbitsError, match="Unknown target"):
            EXL3.from_spec(spec)
    with pytest.raises(FewbitsError, match="out of reach"):
        EXL3.members("8.5")
    with pytest.raises(FewbitsError, match="no trellis"):
        Trellis(9)


def test_the_configuration_tells_of_every_module() -> None:
    modules = {
        "model.layers.0.mlp.up_proj": (EXL3(Trellis(3)), (256, 128)),
        "lm_head": (EXL3(Trellis(6, "mcg")), (512, 128)),
    }
    layout = EXL3(Trellis(4)).told(Made(3.25, 6, 16, 512, "wiki", modules))
    config = layout.config([])
    assert (config["bits"], config["head_bits"], config["calibration"]) == (3.25, 6, {"rows": 16, "cols": 512})
    head = config["tensor_storage"]["lm_head"]
    assert head["bits_per_weight"] == 6 and head["mcg_multiplier"] == 0xCBAC1FED
    assert head["stored_tensors"]["lm_head.trellis"]["shape"] == [8, 32, 96]
    assert head["stored_tensors"]["lm_head.mcg"] == {
        "shape": [], "n_bytes": 4, "dtype": "torch.int32", "torch_dtype": "int32",
    }  # fmt: skip
    assert "version" not in config  # GPTQModel 7.7 takes it for a format
    assert layout.extra_files([])["quantization_config.json"] == config | {"version": "1.6.5"}
    assert EXL3.from_config(config).average_bits == 3.25
    assert EXL3.from_config({"bits": "x", "head_bits": [1]}).head_bits is None


def test_signs_of_the_first_version_are_read() -> None:
    kind = Trellis(2, "3inst")
    arrays = EXL3(kind).pack(random_matrix(kind, 128, 256))
    signs = {suffix: np.where(arrays[suffix] < 0, -1, 1).astype(np.float16) for suffix in (".suh", ".svh")}
    wanted = EXL3(kind).unpack({**arrays, **signs}, (128, 256))
    old = {
        name: np.packbits(signs[suffix] < 0, bitorder="little").view(np.int16)
        for name, suffix in ((".su", ".suh"), (".sv", ".svh"))
    } | {".trellis": arrays[".trellis"]}
    layout, shape = EXL3(Trellis(4)).identify(described(old), {})
    assert layout.type == kind and np.array_equal(layout.unpack(old, shape), wanted)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({".trellis": Part("I16", (8, 16, 72)), ".mul1": Part("I32", ())}, "no trellis of 4.5 bits"),
        ({".trellis": Part("I16", (8, 16, 24)), ".mul1": None}, "no trellis of 1.5 bits with the codebook '3inst'"),
        ({".trellis": Part("I16", (8, 16, 52))}, "52 words"),
        ({".trellis": Part("I16", (8, 16, 144))}, "144 words"),
        ({".trellis": Part("I16", (8, 16, 0))}, "0 words"),
        ({".trellis": Part("I16", (8, 16))}, "not 3 axes"),
        ({".trellis": Part("I16", (7, 16, 48))}, "multiples of 128"),
        ({".trellis": Part("I16", (0, 16, 48))}, "multiples of 128"),
        ({".trellis": Part("I32", (8, 16, 48))}, "is I32"),
        ({".suh": Part("F16", (127,))}, ".suh is"),
        ({".svh": Part("I16", (256,))}, ".svh is"),
        ({".svh": None}, ".svh is missing"),
        ({".trellis": None}, ".trellis is missing"),
        ({".suh": None, ".su": Part("I16", (9,))}, ".su is"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Part | None], said: str) -> None:
    parts = {**EXL3(Trellis(3)).parts((256, 128)), **change}
    with pytest.raises(FewbitsError, match=said):
        EXL3(Trellis(3)).identify({suffix: part for suffix, part in parts.items() if part}, {})


@pytest.mark.parametrize(("suffix", "wrong"), [(".suh", np.nan), (".svh", np.inf)])
def test_scales_that_are_no_numbers_are_refused(suffix: str, wrong: float) -> None:
    kind = Trellis(3)
    arrays = EXL3(kind).pack(random_matrix(kind, 128, 128))
    arrays[suffix] = arrays[suffix].copy()
    arrays[suffix][5] = wrong
    with pytest.raises(FewbitsError, match="not finite"):
        EXL3(kind).unpack(arrays, (128, 128))
    with pytest.raises(FewbitsError, match="not finite"):
        EXL3(kind).unpack({**arrays, suffix: arrays[suffix].astype(np.float32)}, (128, 128))


@pytest.mark.parametrize("shape", [(192, 256), (256, 576), (0, 128)])
def test_other_sizes_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(FewbitsError, match="multiples of 128"):
        EXL3(Trellis(3)).check(shape)
