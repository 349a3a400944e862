"""EXL2: groups of rows, their scales, error feedback on them, and the tensors of a checkpoint."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import exl2_oracle
from fewbits.codecs.exl2_options import ATTENTION, HEAD, MLP, for_inputs
from fewbits.codecs.row_groups import GroupedRows, RowGroups
from fewbits.errors import FewbitsError
from fewbits.layouts import Part
from fewbits.layouts.exl2 import EXL2
from fewbits.methods import Factor, Known, factorize, method

TYPES = {"float16": "F16", "int32": "I32", "int16": "I16"}
KINDS = tuple(dict.fromkeys([*(kind for menu in (ATTENTION, MLP) for line in menu for kind in line), *HEAD.values()]))


def described(arrays: dict[str, np.ndarray]) -> dict[str, Part]:
    return {suffix: Part(TYPES[array.dtype.name], array.shape) for suffix, array in arrays.items()}


def weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Heavy tails, and rows of different size."""
    random = np.random.default_rng(seed)
    return (random.standard_t(5, (rows, columns)) * random.uniform(0.01, 0.05, (rows, 1))).astype(np.float32)


def correlated(columns: int, seed: int = 0) -> np.ndarray:
    """The second moments of inputs that depend on one another and differ in size."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((3 * columns, columns)) @ random.standard_normal((columns, columns))
    x *= np.exp(random.normal(0, 0.7, columns))
    return (x.T @ x / len(x)).astype(np.float32)


def output_error(found: np.ndarray, wanted: np.ndarray, hessian: np.ndarray) -> float:
    wrong = (found - wanted).astype(np.float64)
    return float(np.sum((wrong @ hessian) * wrong))


def make(matrix: np.ndarray, kind: RowGroups, known: Known | None = None) -> GroupedRows:
    found = method("gptq").make(matrix, kind, known or Known())
    assert isinstance(found, GroupedRows)
    return found


def random_matrix(kind: RowGroups, rows: int, columns: int, seed: int) -> GroupedRows:
    """Codes that no search would choose, so that every bit is used."""
    random = np.random.default_rng(seed)
    groups = kind.groups(columns)
    codes = np.concatenate([random.integers(0, 1 << bits, (size, rows), np.uint8) for bits, size in groups])
    scale_codes = random.integers(0, 16, (len(groups), rows), np.uint8)
    scale_max = (10.0 ** random.uniform(-6, 1, len(groups))).astype(np.float16)
    return GroupedRows(kind, random.permutation(columns), codes, scale_codes, scale_max)


@given(
    kind=st.sampled_from([*KINDS, RowGroups(((8, 32, 0.1), (6, 64, 0.1), (5, 32, 0.2), (4, 32, 0.3), (2, 16, 0.3)))]),
    rows=st.integers(1, 70),
    columns=st.integers(1, 20),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_packs_what_the_oracle_reads(kind: RowGroups, rows: int, columns: int, seed: int) -> None:
    matrix = random_matrix(kind, rows, 32 * columns, seed)
    layout, shape = EXL2(kind), (rows, 32 * columns)
    arrays = layout.pack(matrix)
    assert described(arrays) == layout.parts(shape)
    assert sum(array.nbytes for array in arrays.values()) == kind.nbytes(shape)
    decoded = matrix.decode()
    np.testing.assert_array_equal(exl2_oracle.decode(arrays)[:, :rows].T, decoded)
    np.testing.assert_array_equal(layout.unpack(arrays, shape), decoded)
    # what is left of the name in a file is the groups
    found, stored = EXL2.from_config({}).identify(described(arrays), {".q_groups": arrays[".q_groups"]})
    assert found.type.groups(shape[1]) == kind.groups(shape[1]) and stored == (-(-rows // 32) * 32, shape[1])
    np.testing.assert_array_equal(found.unpack(arrays, stored)[:rows], decoded)
    assert not found.unpack(arrays, stored)[rows:].any(), "padding decodes to zeros"


def test_the_reference_of_the_specs_reads_it(shared_dir: Path) -> None:
    spec = importlib.util.spec_from_file_location("exl2_of_specs", shared_dir / "specs/reference/exl2.py")
    assert spec is not None and spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    for kind in KINDS:
        matrix = random_matrix(kind, 64, 576, 3)
        arrays = {suffix[1:]: array for suffix, array in EXL2(kind).pack(matrix).items()}
        np.testing.assert_array_equal(reference.dequant(arrays).T, matrix.decode())


def test_older_files_have_more_tensors() -> None:
    layout = EXL2(RowGroups.uniform(4))
    arrays = layout.pack(random_matrix(layout.type, 32, 64, 0))
    more = {**arrays, ".q_perm": np.zeros(64, np.int16), ".q_group_map": np.zeros(128, np.int16)}
    assert layout.identify(described(more), more)[1] == (32, 64)
    np.testing.assert_array_equal(layout.unpack(more, (32, 64)), layout.unpack(arrays, (32, 64)))


@pytest.mark.parametrize(
    ("name", "shape", "bits"),
    [
        # exllamav2's QParams.total_bits, shapes [in, out] there
        ("4_G128", (4096, 4096), 67_765_760),
        ("8x.05_4x.1_3x.85_G32-128-128", (768, 2048), 5_726_592),
        ("6x.05_3x.2_2x.75_G32-64-64", (576, 1536), 2_243_040),
    ],
)
def test_bits_are_counted_as_exllamav2_does(name: str, shape: tuple[int, int], bits: int) -> None:
    assert RowGroups.parse(name).total_bits(shape[::-1]) == bits


def test_groups_are_cut_as_exllamav2_does() -> None:
    kind = RowGroups.parse("8x.05_4x.1_3x.85_G32-128-128")
    assert kind.groups(768) == [(8, 32), (8, 32), (4, 128), *[(3, 128)] * 4, (3, 64)]
    assert kind.groups(32) == [(8, 32)]
    assert RowGroups.parse("3x.25_2x.75_G64").groups(1600)[:8] == [(3, 64)] * 7 + [(2, 64)]


def test_names_read_back() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    for kind in KINDS:
        assert RowGroups.parse(kind.name) == kind and EXL2.from_spec(kind.name[5:].lower()).type == kind
    for bad in ("", "4", "4_g", "w4g128", "4_g100", "7_g32", "4x.5_8x.5_g32", "8x.5_4x.4_g32", "4_g32-64", "4x0_g32"):
        with pytest.raises(FewbitsError, match="Unknown target"):
            EXL2.from_spec(bad)


def test_few_inputs_get_small_groups() -> None:
    kind = RowGroups.parse("6x.1_5x.9_G128")
    assert kind.groups(576)[0] == (6, 128) and kind.narrowed(576).groups(576)[:2] == [(6, 64), (5, 128)]
    assert kind.narrowed(4096).groups(4096) == kind.groups(4096)
    menu = for_inputs(MLP, (64, 64, 192))
    for line in menu:
        for kind, n_in in zip(line, (64, 64, 192), strict=True):
            assert sum(rows for _, rows in kind.groups(n_in)) == n_in
    assert len(set(menu)) == len(menu)


def test_the_menu_reaches_low_and_high() -> None:
    for shape, least in (((4096, 4096), 2.05), ((768, 768), 2.08)):
        bits = [[sum(kind.total_bits(shape) for kind in line) for line in menu] for menu in (ATTENTION, MLP)]
        for menu, sums in zip((ATTENTION, MLP), bits, strict=True):
            rates = [total / (len(menu[0]) * shape[0] * shape[1]) for total in sums]
            assert min(rates) < least and max(rates) > 8


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("seed", range(4))
def test_searched_scales_beat_exllamav2s(bits: int, seed: int) -> None:
    size, rows = (32, 64, 128)[seed % 3], (200, 32, 300, 40)[seed]
    kind = RowGroups.uniform(bits, size)
    matrix = weights(rows, 2 * size, seed)
    if seed == 3:
        matrix[0, 0] *= 100  # an outlier takes most of the range of its group's scales
    importance = np.random.default_rng(seed).uniform(0.1, 10, 2 * size).astype(np.float32)
    found = make(matrix, kind, Known(importance=importance))
    wrong = (found.decode() - matrix) ** 2 * importance
    for group in range(2):
        columns = found.order[group * size : (group + 1) * size]
        x = np.ascontiguousarray(matrix[:, columns].T)
        theirs = exl2_oracle.rounded(x, exl2_oracle.absmax_scales(x, bits), bits)
        other = (theirs - x) ** 2 * importance[columns, None]
        assert wrong[:, columns].sum() <= other.sum()


def test_no_scale_leaves_less_error() -> None:
    """One output of a group: all units and all codes gone through."""
    matrix = weights(1, 32, 5)
    found = make(matrix, RowGroups.uniform(4, 32))
    largest = float(np.abs(matrix).max())
    best = min(
        float(((exl2_oracle.rounded(matrix.T, np.array([scale]), 4) - matrix.T) ** 2).sum())
        for scale in np.linspace(largest / 16, largest / 6, 2000)
    )
    assert float(((found.decode() - matrix) ** 2).sum()) < 1.02 * best


@pytest.mark.parametrize("name", ["2_G64", "4_G128", "6x.05_3x.2_2x.75_G32-64-64", "8_G32"])
def test_feedback_lowers_the_error_of_outputs(name: str) -> None:
    matrix, hessian = weights(192, 320), correlated(320)
    factor = factorize(hessian)
    kind = RowGroups.parse(name)
    fed = make(matrix, kind, Known(factor=factor))
    plain = make(matrix, kind, Known(importance=hessian.diagonal().copy()))
    np.testing.assert_array_equal(fed.order, factor.order)
    np.testing.assert_array_equal(plain.order, np.argsort(-hessian.diagonal(), kind="stable"))
    assert output_error(fed.decode(), matrix, hessian) < 0.6 * output_error(plain.decode(), matrix, hessian)


def test_feedback_is_gptq() -> None:
    """Row by row in double precision, with the scales that were found."""
    matrix, factor = weights(40, 96, 2), factorize(correlated(96, 2))
    kind = RowGroups.parse("4x.3_3x.7_G32")
    found = make(matrix, kind, Known(factor=factor))
    left = matrix.T[factor.order].astype(np.float64)
    row = same = 0
    decoded = found.decode().T[factor.order]
    for group, (bits, size) in enumerate(kind.groups(96)):
        scales = (found.scale_codes[group] + 1.0) ** 2 * float(found.scale_max[group]) / 256
        for i in range(row, row + size):
            codes = np.clip(np.rint(left[i] / scales), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            same += int(np.sum(codes + 2 ** (bits - 1) == found.codes[i]))
            wrong = (left[i] - decoded[i]) / factor.upper[i, i]
            left[i + 1 :] -= np.outer(factor.upper[i, i + 1 :], wrong)
        row += size
    assert same > 0.999 * found.codes.size, "all but a few that lie between two codes"


def test_threads_change_nothing() -> None:
    matrix, factor = weights(1100, 160), factorize(correlated(160))
    for kind in (RowGroups.parse("4x.2_2x.8_G32"), RowGroups.uniform(3)):
        one = make(matrix, kind, Known(factor=factor))
        with ThreadPoolExecutor(3) as pool:
            other = method("gptq").make(matrix, kind, Known(factor=factor), pool)
        assert isinstance(other, GroupedRows)
        for part in ("order", "codes", "scale_codes", "scale_max"):
            np.testing.assert_array_equal(getattr(one, part), getattr(other, part))


@given(size=st.sampled_from([0.0, 1e-30, 1e-7, 1e-4, 1.0, 100.0, 3000.0]), bits=st.sampled_from([2, 3, 4, 5, 6, 8]))
@settings(max_examples=30, deadline=None)
def test_weights_of_any_size(size: float, bits: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((33, 64)).astype(np.float32)
    matrix *= np.float32(size / np.abs(matrix).max())
    matrix[1] = 0
    layout = EXL2(RowGroups.uniform(bits, 32))
    found = layout.unpack(layout.pack(make(matrix, layout.type)), (33, 64))
    assert np.isfinite(found).all() and not found[1].any()
    # scales of small weights have coarse steps: half precision goes no further than 2^-24
    rms = float(np.sqrt(np.mean((found - matrix) ** 2)))
    assert rms <= 0.3 * size / 2 ** (bits - 1) + 2.0**-20


def test_a_factor_with_an_idle_input() -> None:
    hessian = correlated(64)
    hessian[5], hessian[:, 5] = 0, 0
    found = make(weights(32, 64), RowGroups.uniform(4, 32), Known(factor=factorize(hessian)))
    assert found.order[-1] == 5 and np.isfinite(found.decode()).all()


def damaged(**changes: Any) -> tuple[dict[str, np.ndarray], EXL2]:
    layout = EXL2(RowGroups.parse("4x.5_2x.5_G32"))
    arrays = layout.pack(random_matrix(layout.type, 32, 128, 0))
    return {**arrays, **{f".{suffix}": np.asarray(array) for suffix, array in changes.items()}}, layout


@pytest.mark.parametrize(
    "heads",
    [
        [],
        [4],
        [4, 0, 4],
        [7, 0, 4, 4, 2, 8, 2, 10],
        [4, 1, 4, 4, 2, 8, 2, 10],
        [4, 0, 4, 0, 2, 8, 2, 10],
        [4, 0, 4, 4, 2, 8, 2, 7],
        [4, 0, 4, 4, 2, 8, 2, 300],
        [2, 0, 4, 4, 2, 8, 2, 10],
        [4, 0, 4, 3, 2, 8, 2, 10],
        [4, 0, 4, 4, 2, 8, 2, -10],
        [4, 0, 4, 4, 4, 8, 2, 10],
        [-4, 0, 4, 4, 2, 8, 2, 10],
    ],
)
def test_hostile_groups_are_refused(heads: list[int]) -> None:
    arrays, layout = damaged(q_groups=np.array(heads, np.int16))
    with pytest.raises(FewbitsError):
        layout.identify(described(arrays), {".q_groups": arrays[".q_groups"]})


@given(heads=st.lists(st.sampled_from([-4, 0, 2, 3, 4, 8, 10, 12, 300]), min_size=8, max_size=8))
@settings(max_examples=100, deadline=None)
def test_any_groups_are_read_or_refused(heads: list[int]) -> None:
    arrays, layout = damaged(q_groups=np.array(heads, np.int16))
    try:
        found, shape = layout.identify(described(arrays), {".q_groups": arrays[".q_groups"]})
    except FewbitsError:
        return
    assert found.unpack(arrays, shape).shape == (32, 128)


def test_hostile_values_are_refused() -> None:
    changes: dict[str, Any]
    for changes, message in (
        ({"q_invperm": np.zeros(128, np.int32)}, "no permutation"),
        ({"q_invperm": np.arange(1, 129, dtype=np.int32)}, "no permutation"),
        ({"q_invperm": np.arange(-1, 127, dtype=np.int32)}, "no permutation"),
        ({"q_scale_max": np.full(4, np.inf, np.float16)}, "not finite"),
        ({"q_scale_max": np.full(4, np.nan, np.float16)}, "not finite"),
        ({"q_scale_max": np.full(4, 60000, np.float16)}, "beyond half precision"),
    ):
        arrays, layout = damaged(**changes)
        with pytest.raises(FewbitsError, match=message):
            layout.unpack(arrays, (32, 128))
    for changes in (
        {"q_weight": np.zeros((12, 33), np.int32)},
        {"q_weight": np.zeros(12, np.int32)},
        {"q_scale": np.zeros((4, 5), np.int32)},
        {"q_scale_max": np.zeros(3, np.float16)},
        {"q_invperm": np.arange(96, dtype=np.int32)},
        {"q_invperm": np.zeros(0, np.int32)},
    ):
        arrays, layout = damaged(**changes)
        with pytest.raises(FewbitsError):
            layout.identify(described(arrays), {".q_groups": arrays[".q_groups"]})
    arrays, layout = damaged()
    for suffix in arrays:
        rest = {key: array for key, array in arrays.items() if key != suffix}
        with pytest.raises(FewbitsError, match="missing"):
            layout.identify(described(rest), {key: rest[key] for key in (".q_groups",) if key in rest})


def test_what_does_not_fit_is_refused() -> None:
    for shape in ((64, 100), (64, 0), (64, 65536), (0, 64)):
        with pytest.raises(FewbitsError, match="multiples of 32"):
            EXL2(RowGroups.uniform(4)).check(shape)
    EXL2(RowGroups.uniform(4)).check((100, 96))
    with pytest.raises(FewbitsError, match="does not make"):
        method("hqq").make(weights(32, 32), RowGroups.uniform(4), Known())


def test_the_configuration_is_exllamav2s() -> None:
    layout = EXL2(RowGroups.uniform(4), head_bits=6, average_bits=4.25, calibration=(115, 2048, "(default)"))
    assert layout.config(["lm_head"]) == {
        "quant_method": "exl2",
        "version": "0.3.2",
        "bits": 4.25,
        "head_bits": 6,
        "calibration": {"rows": 115, "length": 2048, "dataset": "(default)"},
    }
    read = EXL2.from_config(layout.config([]))
    assert read.head_bits == 6 and read.average_bits == 4.25
    EXL2.from_config({"bits": "many", "head_bits": [1]})


def test_rows_need_no_order_of_a_factor() -> None:
    """A factor in natural order gives the same as one in order of activity, on weights so ordered."""
    matrix, hessian = weights(64, 96), correlated(96)
    factor = factorize(hessian)
    kind = RowGroups.uniform(3, 32)
    sorted_ = make(
        np.ascontiguousarray(matrix[:, factor.order]), kind, Known(factor=Factor(np.arange(96), factor.upper))
    )
    np.testing.assert_array_equal(sorted_.codes, make(matrix, kind, Known(factor=factor)).codes)
