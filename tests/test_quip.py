"""QuIP#: E8P and its search, Hadamard transforms of any size, error feedback, and the tensors of a checkpoint."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fewbits
import quip_oracle
from fewbits.codecs import hadamard
from fewbits.codecs.lattice import FINER, LatticeCoded, LatticeE8, e8_near, e8p, magnitudes
from fewbits.errors import FewbitsError
from fewbits.layouts.base import Part
from fewbits.layouts.quip import QuIP as Stored
from fewbits.methods import Known
from fewbits.methods.ldlq import DAMPING
from fewbits.methods.quip import DISTORTION, GAIN, QuIP

MODEL = Path(fewbits.__file__).parent / "demo" / "model"
TYPES = {"float16": "F16", "int64": "I64", "float32": "F32"}
KINDS = [LatticeE8(bits) for bits in (2, 3, 4)]
SIZES = [576, 768, 896, 1152, 1536, 2048, 2560, 3072, 3584, 4096, 4864, 5120, 5632, 6912, 8192, 8960, 9216, 9728, 11008,
         12288, 13824, 14336, 18944, 22016, 25600, 27648, 28672, 29568, 32768]  # fmt: skip
"""Hidden and intermediate sizes of well-known families."""


def described(arrays: dict[str, np.ndarray]) -> dict[str, Part]:
    return {suffix: Part(TYPES[array.dtype.name], array.shape) for suffix, array in arrays.items()}


def random_matrix(kind: LatticeE8, rows: int, columns: int, seed: int = 0) -> LatticeCoded:
    """Every index used, scales of both signs."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << 16, (kind.stages, rows, columns // 8), np.uint16)
    if kind.bits == 3:
        codes[1] &= 255
    su, sv = (random.standard_normal(size).astype(np.float16) for size in (columns, rows))
    return LatticeCoded(kind, codes, su, sv, 0.75)


def layer(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights with heavy tails, and moments of inputs that depend on one another."""
    random = np.random.default_rng(rows + columns)
    matrix = random.standard_t(5, (rows, columns)) * np.exp(random.normal(-3, 0.4, (rows, 1)))
    x = random.standard_normal((4 * columns, 48)) @ random.standard_normal((48, columns))
    x = (x + 2 * random.standard_normal((4 * columns, columns))) * np.exp(random.normal(0, 0.7, columns))
    return matrix.astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


def loss(found: np.ndarray, wanted: np.ndarray, hessian: np.ndarray) -> float:
    """tr(E H E^T), of the damped Hessian."""
    damped = hessian + DAMPING * hessian.diagonal().mean() * np.eye(len(hessian))
    wrong = (found - wanted).astype(np.float64)
    return float(((wrong @ damped) * wrong).sum())


def gaussian(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 8)).astype(np.float32)


def test_the_codebook_is_that_of_the_description() -> None:
    padding = magnitudes()[227:]
    assert (np.square(padding).sum(axis=1) == 12).all() and ((padding == 1.5).sum(axis=1) == 5).all()
    table = quip_oracle.table(padding.tolist())
    assert np.array_equal(magnitudes(), np.array(table, np.float32)) and len(table) == 256
    points = e8p()
    assert len(np.unique(points, axis=0)) == 1 << 16
    for index in range(0, 1 << 16, 97):
        assert points[index].tolist() == quip_oracle.point(index, table)
    assert (((points - 0.25).sum(axis=1) % 2 == 0) | ((points + 0.25).sum(axis=1) % 2 == 0)).all()


def test_the_second_points_of_3_bits_are_of_e8() -> None:
    points = e8_near()
    assert len(np.unique(points, axis=0)) == 256
    whole = np.mod(points, 1)
    assert ((whole == 0).all(axis=1) | (whole == 0.5).all(axis=1)).all() and (points.sum(axis=1) % 2 == 0).all()
    assert np.bincount(np.square(points).sum(axis=1).astype(int)).tolist() == [1, 0, 240, 0, 15]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(0.05, 4), count=st.integers(1, 150))
def test_the_search_finds_the_nearest_point(seed: int, size: float, count: int) -> None:
    vectors = gaussian(count, seed) * np.float32(size)
    vectors[0, :3] = 0
    found = LatticeE8(2).search(vectors)[0]
    norms = np.square(e8p()).sum(axis=1)
    least = (norms - 2 * vectors @ e8p().T).min(axis=1)
    mine = norms[found] - 2 * np.einsum("ni,ni->n", vectors, e8p()[found])
    np.testing.assert_allclose(mine, least, atol=1e-4 * (1 + size))


def test_the_second_point_is_the_nearest_to_what_is_missed() -> None:
    vectors = gaussian(200)
    for kind in KINDS[1:]:
        codes = kind.search(vectors)
        missed = vectors - e8p()[codes[0]]
        wrong = np.square(missed[:, None] - kind.second[:4096]).sum(axis=2)
        mine = np.square(missed - kind.second[codes[1]]).sum(axis=1)
        assert (mine <= wrong.min(axis=1) + 1e-5).all()
        np.testing.assert_allclose(kind.values(codes), vectors - missed + kind.second[codes[1]], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_distortion_is_that_of_the_paper(kind: LatticeE8) -> None:
    vectors = gaussian(60_000) * np.float32(GAIN[kind.bits])
    wrong = kind.values(kind.search(vectors)) - vectors
    distortion = float(np.square(wrong).sum() / np.square(vectors).sum())
    assert distortion <= {2: 0.0915, 3: 0.0298, 4: 0.0088}[kind.bits]
    assert distortion == pytest.approx(DISTORTION[kind.bits], rel=0.01)


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 4), rows=st.integers(1, 3), columns=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_packing_goes_there_and_back(bits: int, rows: int, columns: int, seed: int) -> None:
    kind = LatticeE8(bits)
    matrix = random_matrix(kind, 16 * rows, 64 * columns, seed)
    packed = kind.pack(matrix.codes)
    assert packed.dtype == np.int64 and packed.shape == (16 * rows, columns * bits)
    assert np.array_equal(kind.unpack(packed), matrix.codes)
    first = np.ascontiguousarray(packed[:, : 2 * columns])
    at = np.random.default_rng(seed)
    row, block = int(at.integers(16 * rows)), int(at.integers(8 * columns))
    assert quip_oracle.index(first, row, block) == matrix.codes[0, row, block]


def test_the_reference_of_the_specs_packs_alike(shared_dir: Path) -> None:
    source = (shared_dir / "specs/reference/e8p.py").read_text()
    tables, packing = source.split("rng=np.random")[0], source.split("def pack")[1].split("idx=rng")[0]
    reference: dict[str, Any] = {}
    exec(f"{tables}\ndef pack{packing}", reference)  # what is between takes a minute
    assert np.array_equal(magnitudes(), reference["cba"]) and np.array_equal(e8p(), reference["G"])
    codes = random_matrix(KINDS[0], 32, 192).codes
    assert np.array_equal(KINDS[0].pack(codes).view(np.uint64), reference["pack"](codes[0].astype(np.int64)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_decoding_is_that_of_the_description(kind: LatticeE8) -> None:
    matrix = random_matrix(kind, 48, 192)
    arrays = Stored(kind).pack(matrix)
    near = e8_near().astype(np.float64)
    q = quip_oracle.inner(arrays, magnitudes()[227:].tolist(), near, FINER.get(kind.bits, 1))
    assert np.array_equal(matrix.inner(), q)  # to the last bit
    left, right = (np.kron(quip_oracle.paley(12), quip_oracle.sylvester(size // 12)) for size in (48, 192))
    wanted = quip_oracle.decode(arrays, q, left, right)
    found = Stored(kind).unpack(arrays, (48, 192))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())


def test_paleys_matrices_are_orthogonal_and_symmetric() -> None:
    found = {order: hadamard.paley(order) for order in range(4, 400, 4)}
    made = {order: matrix for order, matrix in found.items() if matrix is not None}
    assert {12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 100, 108, 124, 140, 148, 344} <= made.keys()
    assert not {92, 116, 156, 172, 188} & made.keys()  # these are Williamson's, or found by computers
    for order, matrix in made.items():
        assert np.array_equal(np.abs(matrix), np.ones((order, order))) and np.array_equal(matrix, matrix.T)
        assert np.array_equal(matrix @ matrix, order * np.eye(order))
    for order in (12, 20, 36, 60, 76):
        matrix = made[order]
        np.testing.assert_allclose(matrix / np.sqrt(order), quip_oracle.paley(order), atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_transforms_of_known_sizes_are_orthogonal(size: int) -> None:
    random = np.random.default_rng(size)
    x = random.standard_normal((3, size))
    turned = hadamard.rotate_columns(x)
    np.testing.assert_allclose(turned @ turned.T, x @ x.T, rtol=1e-9, atol=1e-9 * size)
    np.testing.assert_allclose(hadamard.rotate_columns(turned), x, atol=1e-11)
    np.testing.assert_allclose(hadamard.rotate_rows(x.T), turned.T, atol=1e-11)
    spike = np.zeros((1, size))
    spike[0, int(random.integers(size))] = 1
    np.testing.assert_allclose(np.abs(hadamard.rotate_columns(spike)), 1 / np.sqrt(size), rtol=1e-9)


def test_the_order_of_the_factors() -> None:
    whole = hadamard.rotate_columns(np.eye(192))
    np.testing.assert_allclose(whole, np.kron(quip_oracle.paley(12), quip_oracle.sylvester(16)), atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_loses_less_than_rounding_and_sweeps_less_still(bits: int) -> None:
    weights, hessian = layer(256, 192)
    kind = LatticeE8(bits)
    rounded = loss(QuIP.make(weights, kind, Known()).decode(), weights, hessian)
    made = {
        effort: QuIP.make(weights, kind, Known(hessian=hessian, effort=effort))
        for effort in ("fast", "default")
    }  # fmt: skip
    fed, swept = (loss(made[effort].decode(), weights, hessian) for effort in made)
    assert fed < 0.5 * rounded and swept < 0.97 * fed
    for factor in (0.99, 1.01):  # the scales are the best for these codes
        other = replace(made["default"], sv=(made["default"].sv * np.float16(factor)).astype(np.float16))
        assert loss(other.decode(), weights, hessian) > swept


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_device_does_as_well(bits: int) -> None:
    """The device is torch's processor by another name: what is computed is a GPU's."""
    weights, hessian = layer(64, 64)
    here, there = (QuIP.make(weights, LatticeE8(bits), Known(hessian=hessian, device=at)) for at in ("cpu", "cpu:0"))
    assert (here.codes == there.codes).mean() > 0.99
    assert loss(there.decode(), weights, hessian) == pytest.approx(loss(here.decode(), weights, hessian), rel=1e-3)
    alone = QuIP.make(weights, LatticeE8(bits), Known(device="cpu:0"))
    assert (QuIP.make(weights, LatticeE8(bits), Known()).codes == alone.codes).all()


def test_the_result_does_not_depend_on_threads() -> None:
    weights, hessian = layer(576, 64)
    kind, known = LatticeE8(3), Known(hessian=hessian)
    alone = QuIP.make(weights, kind, known)
    with ThreadPoolExecutor(3) as pool:
        together = QuIP.make(weights, kind, known, pool)
    assert np.array_equal(alone.codes, together.codes)
    assert np.array_equal(alone.su, together.su) and np.array_equal(alone.sv, together.sv)


def test_zeros_and_broken_hessians() -> None:
    weights, hessian = layer(64, 64)
    weights[3], weights[:, 5], hessian[5], hessian[:, 5] = 0, 0, 0, 0
    decoded = QuIP.make(weights, LatticeE8(4), Known(hessian=hessian)).decode()
    assert np.isfinite(decoded).all() and loss(decoded, weights, hessian) < 0.01 * loss(0 * weights, weights, hessian)
    nothing = QuIP.make(np.zeros_like(weights), LatticeE8(2), Known(hessian=hessian)).decode()
    assert np.abs(nothing).max() < 1e-6
    hessian[1, 2] = np.nan
    with pytest.raises(FewbitsError, match="not finite"):
        QuIP.make(weights, LatticeE8(2), Known(hessian=hessian))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_is_packed_is_what_was_planned(kind: LatticeE8) -> None:
    layout, shape = Stored(kind), (48, 192)
    arrays = layout.pack(random_matrix(kind, *shape))
    assert described(arrays) == layout.parts(shape)
    assert arrays[".Qidxs"].nbytes * 8 == kind.bits * 48 * 192
    assert Stored(LatticeE8(2)).identify(described(arrays), arrays) == (layout, shape)


def test_targets() -> None:
    assert [Stored.from_spec(spec).type.bits for spec in Stored.examples()] == [2, 3, 4]
    for spec in ("1", "5", "2.5", "w2", ""):
        with pytest.raises(FewbitsError, match="Unknown target"):
            Stored.from_spec(spec)
    with pytest.raises(FewbitsError, match="no E8 codebook"):
        LatticeE8(5)


@pytest.mark.parametrize(("shape", "said"), [((48, 96), "multiples of 64"), ((40, 192), "multiples of 64"),
                                             ((0, 64), "multiples of 64"), ((64, 3776), "no Hadamard matrix of 3776"),
                                             ((13696, 64), "no Hadamard matrix of 13696")])  # fmt: skip
def test_other_sizes_are_refused(shape: tuple[int, int], said: str) -> None:
    with pytest.raises(FewbitsError, match=said):
        Stored(LatticeE8(2)).check(shape)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({".Qidxs": Part("I64", (48, 7))}, ".Qidxs is"),
        ({".Qidxs": Part("I32", (48, 9))}, ".Qidxs is I32"),
        ({".Qidxs": None}, ".Qidxs is missing"),
        ({".SU": Part("F16", (190,))}, ".Qidxs is"),
        ({".SU": Part("F16", (192, 1))}, "not 1 axes"),
        ({".SV": None}, ".SV is missing"),
        ({".SV": Part("I16", (48,))}, ".SV is I16"),
        ({".Wscale": Part("F32", (48,))}, ".Wscale is"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Part | None], said: str) -> None:
    parts = {**Stored(LatticeE8(3)).parts((48, 192)), **change}
    with pytest.raises(FewbitsError, match=said):
        Stored(LatticeE8(2)).identify(
            {suffix: part for suffix, part in parts.items() if part}, {".codebook_id": np.array(18)}
        )


@pytest.mark.parametrize("number", [0, 8, -7, None, 7.0, np.nan])
def test_unknown_codebooks_are_refused(number: float | None) -> None:
    values = {} if number is None else {".codebook_id": np.array(number)}
    with pytest.raises(FewbitsError, match="codebook_id is"):
        Stored(LatticeE8(2)).identify(Stored(LatticeE8(2)).parts((48, 192)), values)


@pytest.mark.parametrize(("suffix", "wrong"), [(".SU", np.nan), (".SV", np.inf), (".Wscale", np.nan)])
def test_scales_that_are_no_numbers_are_refused(suffix: str, wrong: float) -> None:
    arrays = Stored(LatticeE8(3)).pack(random_matrix(LatticeE8(3), 48, 192))
    arrays[suffix] = arrays[suffix].copy()
    arrays[suffix][...] = wrong
    with pytest.raises(FewbitsError, match="not finite"):
        Stored(LatticeE8(3)).unpack(arrays, (48, 192))


def test_scales_of_any_float_are_read() -> None:
    layout = Stored(LatticeE8(2))
    arrays = layout.pack(random_matrix(LatticeE8(2), 48, 192))
    for suffix in (".SU", ".SV", ".Wscale"):
        short = np.asarray(arrays[suffix], np.float32).view(np.uint32) >> 16  # bfloat16
        same = (short << 16).view(np.float32)
        found = layout.unpack(arrays | {suffix: short.astype(np.uint16)}, (48, 192))
        assert np.array_equal(found, layout.unpack(arrays | {suffix: same}, (48, 192)))
    largest = np.full(48, 1e5, np.float32)  # beyond float16
    assert np.isfinite(layout.unpack(arrays | {".SV": largest}, (48, 192))).all()


def test_a_model_goes_there_and_back(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    fewbits.quantize(MODEL, "quip:3", out, calibration=texts[0], calibration_chunks=4)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "quip" and config["quip_params"]["codebook"] == "E8P12RVQ3B"
    plan = fewbits.plan(MODEL, "quip:3", calibration=texts[0], calibration_chunks=4)
    assert plan.file_size == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    report = fewbits.measure(out, texts[1], reference=MODEL, context=128, chunks=4, cache=False)
    assert report.comparison is not None and report.comparison.kl.mean.value < 0.02


def test_it_needs_text() -> None:
    with pytest.raises(FewbitsError, match="needs calibration"):
        fewbits.plan(MODEL, "quip:2")
