"""Storage types of matrices: what bitsandbytes and compressed-tensors make of the same weights, and what must hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fewbits.codecs.scaled import Quantized, Scaled, dynamic_map
from fewbits.codecs.scaled_levels import E4M3, TABLES, ladder
from fewbits.codecs.scaled_scales import FINITE, SCALE_MIN, nest, store
from fewbits.errors import FewbitsError
from fewbits.kernels.lanes import usable_importance

NF4 = Scaled("NF4", 4, (1, 64), "none", "F32")
INT8_ROW = Scaled("INT", 8, (1, 0), "middle", "BF16")
LLM_INT8 = Scaled("INT", 8, (1, 0), "middle", "F32")
NVFP4 = Scaled("E2M1", 4, (1, 16), "none", "E4M3")
MXFP4 = Scaled("E2M1", 4, (1, 32), "none", "E8M0")
HQQ4 = Scaled("INT", 4, (1, 64), "float", "F32")
TYPES = [
    *(Scaled("INT", bits, (1, 64), "middle", "F16") for bits in (2, 3, 4, 8)),
    Scaled("INT", 4, (1, 128), "middle", "BF16"),
    Scaled("INT", 4, (1, 0), "middle", "F16"),
    *(Scaled("INT", bits, (1, 64), "integer", "F16") for bits in (2, 3, 4, 8)),
    Scaled("INT", 4, (1, 0), "integer", "BF16"),
    *(Scaled("INT", bits, (1, 64), "float", "F32") for bits in (1, 2, 3, 4, 8)),
    Scaled("INT", 4, (1, 64), "float", "F16"),
    Scaled("INT", 4, (64, 1), "float", "F32", strided=True),
    NF4,
    Scaled("NF4", 4, (1, 64), "none", "NESTED"),
    Scaled("FP4", 4, (1, 64), "none", "F32"),
    Scaled("FP4", 4, (1, 64), "none", "NESTED"),
    INT8_ROW,
    LLM_INT8,
    *(Scaled("E4M3", 8, block, "none", "F32") for block in ((0, 0), (1, 0), (128, 128))),
    Scaled("E4M3", 8, (1, 0), "none", "BF16"),
    NVFP4,
    MXFP4,
]
EACH = pytest.mark.parametrize("kind", TYPES, ids=lambda kind: f"{kind.name}-{kind.scale}")
BY_ROWS = [kind for kind in TYPES if kind.block[0] == 1 and kind.scale not in ("NESTED", "E4M3")]
"""No number of theirs belongs to several rows."""
SHAPE = (192, 256)
STORED = (("F16", torch.float16, 65504), ("BF16", torch.bfloat16, FINITE), ("E4M3", torch.float8_e4m3fn, 448))


def weights_of(seed: int, shape: tuple[int, int] = SHAPE, spread: float = 0.05, exact: bool = False) -> np.ndarray:
    """Heavy-tailed weights; exact: values of bfloat16, as checkpoints have them."""
    values = (np.random.default_rng(seed).standard_t(4, shape) * spread).astype(np.float32)
    return cast(values, torch.bfloat16) if exact else values


def cast(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """What torch rounds float32 values to."""
    return torch.from_numpy(values).to(dtype).float().numpy()


def error(found: Quantized, weights: np.ndarray, importance: np.ndarray | None = None) -> float:
    difference = found.decode().astype(np.float64) - weights
    return float((np.square(difference) * usable_importance(importance, weights.shape[1])).sum())


def parts_of(found: Quantized) -> list[np.ndarray]:
    return [found.codes, found.scales, *([] if found.zeros is None else [found.zeros])]


# what the ecosystems make of the same weights


@pytest.mark.parametrize("levels", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_as_bitsandbytes(levels: str, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weights = weights_of(1, (192, 576))
    weights[5, :64] = 0
    packed, state = functional.quantize_4bit(
        torch.from_numpy(weights), quant_type=levels, compress_statistics=nested, blocksize=64
    )
    kind = Scaled(levels.upper(), 4, (1, 64), "none", "NESTED" if nested else "F32")  # type: ignore[arg-type]
    found = kind.settle(weights)
    packed = packed.numpy().reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(weights.shape)
    # FP4 has a code for a negative zero: it decodes to the same
    table = TABLES[kind.levels]
    np.testing.assert_array_equal(table[found.codes], table[codes])
    if nested:
        assert found.nested is not None
        ours, theirs = found.nested.codes.reshape(-1).astype(int), state.absmax.numpy().reshape(-1).astype(int)
        # bitsandbytes looks codes up in a way that misses the nearest level by a hair now and then
        assert (ours != theirs).mean() < 0.005
        decoded = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        exact, decoded = np.abs(weights).reshape(-1, 64).max(axis=1), decoded.numpy().reshape(-1)
        assert (np.abs(found.scales.reshape(-1) - exact) <= np.abs(decoded - exact) * (1 + 1e-5) + 1e-7).all()
        assert found.nested.offset == pytest.approx(float(state.offset), rel=1e-6)
        np.testing.assert_allclose(found.nested.absmax, state.state2.absmax.numpy(), rtol=1e-5)
    else:
        np.testing.assert_array_equal(found.scales.reshape(-1), state.absmax.numpy())
        decoded = functional.dequantize_4bit(torch.from_numpy(packed), state, quant_type=levels)
        np.testing.assert_array_equal(found.decode(), decoded.numpy().reshape(weights.shape))


def test_nested_scales_decode_as_bitsandbytes_does() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    np.testing.assert_array_equal(dynamic_map(), functional.create_dynamic_map().numpy())
    scales = np.abs(weights_of(2, (30, 9)))
    nested = nest(scales)
    state = functional.QuantState(
        absmax=torch.from_numpy(nested.absmax),
        code=torch.from_numpy(dynamic_map().copy()),
        blocksize=256,
        dtype=torch.float32,
    )
    theirs = functional.dequantize_blockwise(torch.from_numpy(nested.codes.reshape(-1)), state) + nested.offset
    np.testing.assert_array_equal(nested.decode().reshape(-1), theirs.numpy())
    assert np.abs(nested.decode() - scales).max() < 0.02 * np.abs(scales - nested.offset).max()


def test_rows_of_integers_as_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weights = weights_of(3, (64, 576))
    codes, rows, _ = functional.int8_vectorwise_quant(torch.from_numpy(weights).half())
    found = LLM_INT8.settle(weights.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(found.scales.reshape(-1), rows.numpy() / np.float32(127))
    # half precision rounds the places of a few weights to where they tie
    wrong = found.codes.astype(int) - 128 != codes.numpy()
    assert wrong.mean() < 0.01
    single, _, _ = functional.int8_vectorwise_quant(torch.from_numpy(weights))
    np.testing.assert_array_equal(LLM_INT8.settle(weights).codes.astype(int) - 128, single.numpy())


def ct_settled(
    weights: np.ndarray, kind: Scaled, **settings: object
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """compressed-tensors' scales, weights decoded with them, and zero points."""
    ct = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    args = ct.QuantizationArgs(**settings)
    low, high = (torch.from_numpy(part) for part in kind.extremes(weights))
    whole = helpers.generate_gparam(low.min(), high.max()) if kind.scale == "E4M3" else None
    # BF16 checkpoints: their scales are computed and kept in BF16
    if kind.scale == "BF16":
        low, high = low.bfloat16(), high.bfloat16()
    scales, zeros = helpers.calculate_qparams(low, high, args, global_scale=whole)
    scales = scales.float()
    decoded = forward.fake_quantize(torch.from_numpy(weights), scales, zeros, args, global_scale=whole)
    return scales.numpy(), decoded.numpy(), None if args.symmetric else zeros.numpy()


FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True}
CT = {
    "fp8-channel": (Scaled("E4M3", 8, (1, 0), "none", "BF16"), {**FLOAT8, "strategy": "channel"}),
    "fp8-tensor": (Scaled("E4M3", 8, (0, 0), "none", "BF16"), {**FLOAT8, "strategy": "tensor"}),
    "fp8-block": (
        Scaled("E4M3", 8, (128, 128), "none", "BF16"),
        {**FLOAT8, "strategy": "block", "block_structure": [128, 128]},
    ),
    "int8-channel": (INT8_ROW, {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}),
    "nvfp4": (
        NVFP4,
        {**FLOAT4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn},
    ),
    "mxfp4": (MXFP4, {**FLOAT4, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}),
    **{
        f"w{bits}{'' if symmetric else '-asym'}": (
            Scaled("INT", bits, (1, 64), *(("middle", "BF16") if symmetric else ("integer", "F32"))),
            {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 64},
        )
        for bits in (3, 4, 8)
        for symmetric in (True, False)
    },
}


@pytest.mark.parametrize("name", CT)
def test_settles_as_compressed_tensors(name: str) -> None:
    kind, chosen = CT[name]
    # blocks at the ends are smaller than the others
    weights = weights_of(4, (320, 576), exact=True)
    weights[7] = 0
    found = kind.settle(weights)
    scales, decoded, zeros = ct_settled(weights, kind, **chosen)
    np.testing.assert_array_equal(found.scales, scales.reshape(found.scales.shape))
    if zeros is None:
        np.testing.assert_array_equal(found.decode(), decoded)
        return
    assert found.zeros is not None
    # their integers are signed, and zero points may tie
    apart = np.abs(found.zeros - (1 << (kind.bits - 1)) - zeros)
    apart[7] = 0  # of zeros alone, any zero point will do
    assert apart.max() <= 1 and (apart != 0).mean() < 0.05
    same = kind.spread(apart, (320, 576)) == 0
    # here the zero point is added after rounding, as GPTQ and AWQ do, there before: places that tie differ
    differ = same & (found.decode() != decoded)
    assert differ.mean() < 0.005
    assert np.abs(found.decode() - decoded)[same].max() <= found.scales.max() * 1.01


def test_scales_and_codes_of_symmetric_groups_by_hand() -> None:
    kind = Scaled("INT", 4, (1, 4), "middle", "F16")
    weights = np.array([[-0.75, 0.0, 0.05, 0.75, 0.1, 0.2, 0.3, 1.5]], np.float32)
    found = kind.settle(weights)
    np.testing.assert_array_equal(found.scales, np.array([[0.1, 0.2]], np.float16).astype(np.float32))
    # the halves nearest to 0.1 and 0.2 are a little less: no place is a tie
    np.testing.assert_array_equal(found.codes, [[0, 8, 9, 15, 9, 9, 10, 15]])


def test_minmax_with_zero_points_by_hand() -> None:
    kind = Scaled("INT", 2, (1, 4), "integer", "F32")
    found = kind.settle(np.array([[-1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], np.float32))
    np.testing.assert_array_equal(found.scales, [[1, 2]])
    np.testing.assert_array_equal(found.zeros, [[1, 0]])
    np.testing.assert_array_equal(found.codes, [[0, 1, 2, 3, 2, 2, 2, 3]])  # 1.5 and 2.5 go to even


# rounding to the types of scales and levels


@given(hnp.arrays(np.float32, (1, 64), elements=st.floats(-600, 600, width=32)))
def test_rounding_to_8_bit_floats_is_torchs(numbers: np.ndarray) -> None:
    kind = Scaled("E4M3", 8, (0, 0), "none", "F32")
    codes = kind.round(numbers, np.ones((1, 1), np.float32), None)
    theirs = torch.from_numpy(numbers).clamp(-448, 448).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(E4M3[codes], theirs.float().numpy())
    np.testing.assert_array_equal(ladder("E4M3").nearest(numbers), codes)


def test_the_table_of_8_bit_floats_is_torchs() -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3, theirs)


@given(hnp.arrays(np.float32, 64, elements=st.floats(-8, 8, width=32)))
def test_rounding_to_4_bit_floats_is_compressed_tensors(numbers: np.ndarray) -> None:
    utils = pytest.importorskip("compressed_tensors.quantization.utils.fp4_utils")
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    numbers = np.concatenate([numbers, ties, -ties])
    theirs = utils.cast_to_fp4(torch.from_numpy(numbers)).numpy()
    np.testing.assert_array_equal(TABLES["E2M1"][ladder("E2M1").nearest(numbers)], theirs)


@given(hnp.arrays(np.float32, 64, elements=st.floats(0, 2.0**127, width=32)))
def test_stored_scales_are_the_nearest_of_their_type(scales: np.ndarray) -> None:
    for kind, dtype, top in STORED:
        stored = store(kind, scales)  # type: ignore[arg-type]
        nearest = cast(np.minimum(scales, np.float32(top)), dtype)
        normal = nearest >= SCALE_MIN[kind]
        np.testing.assert_array_equal(stored[normal], nearest[normal])
        assert (stored > 0).all() and np.isfinite(stored).all()
        np.testing.assert_array_equal(store(kind, stored), stored)  # type: ignore[arg-type]
    powers = store("E8M0", scales)
    assert (np.frexp(powers)[0] == 0.5).all()


# what holds for every type


@EACH
def test_parts_have_their_shapes_and_round_trip(kind: Scaled) -> None:
    weights = weights_of(5)
    for found in (kind.settle(weights), kind.search(weights)):
        grid = kind.grid(SHAPE)
        assert found.codes.shape == SHAPE and found.codes.dtype == np.uint8
        assert found.scales.shape == grid and found.scales.dtype == np.float32
        assert (found.zeros is None) == (kind.zero in ("none", "middle"))
        assert found.zeros is None or (found.zeros.shape == grid and found.zeros.dtype == np.float32)
        assert set(np.unique(found.codes)) <= set(kind.ladder()[1].tolist())
        decoded = found.decode()
        assert decoded.dtype == np.float32 and decoded.shape == SHAPE
        relative = np.sqrt(np.square(decoded - weights).sum() / np.square(weights).sum())
        assert relative < {1: 2.2, 2: 0.7, 3: 0.4, 4: 0.25, 8: 0.05}[kind.bits]
        if kind.zero != "float":
            again = kind.round(decoded, found.scales, found.zeros, found.global_scale)
            codes = found.codes
            if kind.scale == "NESTED":
                # bitsandbytes chooses codes before it nests scales; some scales come back as zero or below
                again, codes = again[:, :0], codes[:, :0]
            np.testing.assert_array_equal(again, codes)


@EACH
def test_scales_are_as_stored(kind: Scaled) -> None:
    for found in (kind.settle(weights_of(6)), kind.search(weights_of(6))):
        if kind.scale == "NESTED":
            assert found.nested is not None
            np.testing.assert_array_equal(found.scales, found.nested.decode())
        else:
            np.testing.assert_array_equal(np.abs(found.scales), store(kind.scale, np.abs(found.scales)))
        assert kind.signed or kind.scale == "NESTED" or (found.scales >= 0).all()
        if kind.zero == "integer":
            assert found.zeros is not None
            np.testing.assert_array_equal(found.zeros, np.clip(np.rint(found.zeros), 0, (1 << kind.bits) - 1))


@EACH
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-45, 38), weighted=st.booleans(), form=st.integers(0, 4))
def test_search_is_never_worse_than_settling(kind: Scaled, seed: int, power: int, weighted: bool, form: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.standard_t(3, (64, 128))
    weights = [weights, np.abs(weights), np.rint(weights), weights * rng.lognormal(0, 8, (64, 1)), weights * 0 + 1][
        form
    ]
    if form % 2:
        weights[rng.integers(64, size=9)] = 0
    with np.errstate(over="ignore", under="ignore"):
        weights = np.clip(weights * 10.0**power, -FINITE, FINITE).astype(np.float32)
    importance = rng.lognormal(0, 3, 128).astype(np.float32) if weighted else None
    settled, found = kind.settle(weights), kind.search(weights, importance)
    assert np.isfinite(settled.decode()).all() and np.isfinite(found.decode()).all()
    size = float((np.square(weights.astype(np.float64)) * usable_importance(importance, 128)).sum())
    # the rounding of products in float32 is no error of a choice
    assert error(found, weights, importance) <= error(settled, weights, importance) * (1 + 1e-5) + 1e-13 * size


@EACH
def test_search_gains(kind: Scaled) -> None:
    importance = np.random.default_rng(8).lognormal(0, 1.5, SHAPE[1]).astype(np.float32)
    weights = weights_of(7)
    gain = error(kind.search(weights, importance), weights, importance) / error(
        kind.settle(weights), weights, importance
    )
    least = {"INT": 0.75, "NF4": 0.75, "FP4": 0.75, "E2M1": 0.97, "E4M3": 0.995}[kind.levels]
    assert gain < (0.95 if kind.bits == 8 and kind.levels == "INT" else 0.85 if kind.strided else least)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_search_finds_what_is_nearly_the_best_scale(bits: int) -> None:
    kind = Scaled("INT", bits, (1, 128), "middle", "F16")
    weights = weights_of(9, (64, 128))
    largest = np.abs(weights).max(axis=1, keepdims=True)
    best = np.full((64, 1), np.inf)
    for reach in np.linspace(-1.6, 1.4, 602) * 2 ** (bits - 1):
        scales = store("F16", largest / abs(np.float32(reach))) * np.sign(np.float32(reach))
        scales = np.where(weights[np.arange(64), np.abs(weights).argmax(axis=1)][:, None] < 0, scales, -scales)
        found = Quantized(kind, kind.round(weights, scales, None), scales)
        best = np.minimum(best, np.square(found.decode() - weights).sum(axis=1, keepdims=True))
    assert error(kind.search(weights), weights) < best.sum() * (1.05 if bits == 8 else 1.015)


@EACH
def test_places_in_the_ladder_decode_as_codes_do(kind: Scaled) -> None:
    weights = weights_of(10)
    found = kind.search(weights)
    low, width = kind.ranges(found, SHAPE)
    levels, uniform = kind.ladder01()
    values, codes = kind.ladder()
    assert (np.diff(values) > 0).all() and levels[0] == 0 and levels[-1] == 1
    assert not uniform or np.allclose(np.diff(levels), levels[1], rtol=1e-4)
    ranks = np.random.default_rng(11).integers(codes.size, size=SHAPE).astype(np.uint8)
    chosen = kind.from_ranks(ranks, found)
    np.testing.assert_array_equal(chosen.codes, codes[ranks])
    np.testing.assert_allclose(low + width * levels[ranks], chosen.decode(), rtol=1e-5, atol=1e-6 * np.abs(width).max())


@pytest.mark.parametrize("kind", BY_ROWS, ids=lambda kind: f"{kind.name}-{kind.scale}")
def test_rows_do_not_depend_on_their_neighbours(kind: Scaled) -> None:
    weights = weights_of(12, (300, 256))
    importance = np.random.default_rng(13).lognormal(0, 1, 256).astype(np.float32)
    whole = kind.search(weights, importance)
    for rows in (slice(0, 1), slice(100, 131), slice(299, 300)):
        for part, alone in zip(parts_of(whole), parts_of(kind.search(weights[rows], importance)), strict=True):
            np.testing.assert_array_equal(part[rows], alone)


@EACH
def test_bits_per_weight_count_what_is_stored(kind: Scaled) -> None:
    found = kind.settle(weights_of(14))
    scale_bits = {"F32": 32, "F16": 16, "BF16": 16, "E8M0": 8, "E4M3": 8, "NESTED": 8}[kind.scale]
    total = found.codes.size * kind.bits + found.scales.size * scale_bits
    if found.zeros is not None:
        total += found.zeros.size * (scale_bits if kind.zero == "float" else kind.bits)
    if found.nested is not None:
        total += 32 * found.nested.absmax.size + 32
    if kind.scale == "E4M3":
        total += 32
    assert kind.bits_per_weight(SHAPE) == pytest.approx(total / found.codes.size, rel=1e-12)


def test_names() -> None:
    names = [kind.name for kind in TYPES]
    assert {"INT4_G64", "UINT4_G64", "INT4_ROW", "E4M3_TENSOR", "E4M3_128x128", "UINT4_S64_FLOAT"} <= set(names)
    assert "NF4_G64_NESTED" in names and "E2M1_G16" in names


@pytest.mark.parametrize(
    ("kind", "shape", "word"),
    [
        (Scaled("INT", 4, (1, 128), "middle", "F16"), (576, 576), "groups of 64"),
        (Scaled("INT", 4, (1, 64), "middle", "F16"), (8, 50), "one scale a row"),
        (Scaled("INT", 4, (64, 1), "float", "F32", strided=True), (100, 64), "100 rows"),
    ],
)
def test_groups_that_do_not_divide_are_refused(kind: Scaled, shape: tuple[int, int], word: str) -> None:
    with pytest.raises(FewbitsError, match=word):
        kind.settle(np.zeros(shape, np.float32))


def test_a_shared_global_scale() -> None:
    weights = weights_of(15)
    shared = NVFP4.settle(weights, amax=2 * float(np.abs(weights).max()))
    alone = NVFP4.settle(weights)
    assert shared.global_scale == pytest.approx(alone.global_scale / 2)
    assert error(shared, weights) == pytest.approx(error(alone, weights), rel=0.1)
    assert NVFP4.search(weights, amax=1.0).global_scale == 448 * 6


def test_scales_may_be_negative_where_that_helps() -> None:
    # one code more lies below zero than above: the largest weight, positive, takes it by way of a negative scale
    weights = np.linspace(-7, 8, 16, dtype=np.float32)[None] * np.float32(0.25)
    found = Scaled("INT", 4, (1, 16), "middle", "F16").search(weights)
    assert found.scales[0, 0] == -0.25
    np.testing.assert_array_equal(found.decode(), weights)
    assert (INT8_ROW.search(weights_of(16)).scales > 0).all()
