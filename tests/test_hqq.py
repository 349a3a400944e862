"""HQQ: codes, scales and zero points to the last bit those of the hqq package."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fewbits.codecs.scaled import Quantized, Scaled
from fewbits.errors import FewbitsError
from fewbits.kernels.powers import powers
from fewbits.methods.hqq import STEPS, hqq

SHAPE = (192, 576)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """torch splits sums among threads, and then they round otherwise: hqq's own results depend on that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def type_of(bits: int, group: int, axis: int) -> Scaled:
    return Scaled("INT", bits, (group, 1) if axis == 0 else (1, group), "float", "F32", strided=axis == 0)


def theirs(weights: np.ndarray, bits: int, group: int, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """hqq's codes, scales and zero points."""
    pytest.importorskip("hqq")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from hqq.core.quantize import Quantizer

        codes, meta = Quantizer.quantize(
            torch.from_numpy(weights), nbits=bits, group_size=group, axis=axis, device="cpu", bitpack=False
        )
    return codes.numpy().astype(np.uint8).reshape(weights.shape), meta["scale"].numpy(), meta["zero"].numpy()


def assert_equal(found: Quantized, expected: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    codes, scales, zeros = expected
    assert found.zeros is not None
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scales.reshape(-1), scales.reshape(-1))
    np.testing.assert_array_equal(found.zeros.reshape(-1), zeros.reshape(-1))


def weights_of(spread: float, shape: tuple[int, int] = SHAPE, seed: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, shape) * spread).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("spread", [0.03, 0.4])
def test_equals_hqq(bits: int, axis: int, spread: float) -> None:
    # the larger weights leave errors that are outliers: the other branch of the shrinkage
    weights = weights_of(spread)
    assert_equal(hqq(weights, type_of(bits, 64, axis)), theirs(weights, bits, 64, axis))


@pytest.mark.parametrize(
    ("shape", "group", "axis"),
    [
        ((64, 576), 8, 1),
        ((64, 576), 16, 1),
        ((64, 240), 40, 1),
        ((64, 576), 576, 1),
        ((64, 2048), 1024, 1),  # long enough for torch to add in levels
        ((5, 36), 12, 1),
        ((192, 100), 64, 0),  # columns that do not fill torch's vectors
        ((128, 3), 32, 0),
        ((64, 4100), 16, 0),
        ((600, 40), 600, 0),
        ((40, 64), 8, 0),
    ],
)
def test_equals_hqq_in_other_groups(shape: tuple[int, int], group: int, axis: int) -> None:
    weights = weights_of(0.1, shape)
    assert_equal(hqq(weights, type_of(3, group, axis)), theirs(weights, 3, group, axis))


def test_equals_hqq_on_real_sizes() -> None:
    weights = weights_of(0.02, (1536, 576), 3)
    for axis in (0, 1):
        assert_equal(hqq(weights, type_of(4, 64, axis)), theirs(weights, 4, 64, axis))


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (16, 32), elements=st.floats(-100, 100, width=32)),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(0, 1),
)
def test_equals_hqq_on_odd_weights(weights: np.ndarray, bits: int, axis: int) -> None:
    assert_equal(hqq(weights, type_of(bits, 16, axis)), theirs(weights, bits, 16, axis))


@pytest.mark.parametrize("kind", [type_of(4, 64, 1), type_of(2, 64, 0)], ids=["rows", "columns"])
@pytest.mark.parametrize("power", [-44, -20, 6, 30, 38])
def test_extreme_weights_stay_finite(kind: Scaled, power: int) -> None:
    weights = np.clip(weights_of(1.0, (64, 128)).astype(np.float64) * 10.0**power, -3e38, 3e38).astype(np.float32)
    found = hqq(weights, kind)
    assert np.isfinite(found.decode()).all() and (found.scales > 0).all()


def test_equal_weights_are_kept() -> None:
    weights = np.full((4, 64), 0.37, np.float32)
    np.testing.assert_allclose(hqq(weights, type_of(4, 64, 1)).decode(), weights, rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_the_range_alone(bits: int) -> None:
    kind = type_of(bits, 64, 1)
    weights = weights_of(0.05)
    before, after = (np.abs(found.decode() - weights) for found in (kind.settle(weights), hqq(weights, kind)))
    assert (after**0.7).mean() < 0.99 * (before**0.7).mean()
    assert after.mean() < before.mean()


def test_stops_where_the_mean_error_no_longer_falls() -> None:
    # steps of 8 bits soon gain nothing; hqq goes on at most so often
    weights = weights_of(0.05, (16, 64))
    kind = type_of(8, 64, 1)
    assert STEPS == 20
    assert_equal(hqq(weights, kind), theirs(weights, 8, 64, 1))


def test_scales_and_zeros_in_half_precision_are_rounded_in_the_end() -> None:
    weights = weights_of(0.05)
    single, half = (hqq(weights, Scaled("INT", 4, (1, 64), "float", scale)) for scale in ("F32", "F16"))
    assert single.zeros is not None and half.zeros is not None
    np.testing.assert_array_equal(half.codes, single.codes)
    np.testing.assert_array_equal(half.scales, single.scales.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(half.zeros, single.zeros.astype(np.float16).astype(np.float32))


def test_other_zero_points_are_refused() -> None:
    with pytest.raises(FewbitsError, match="UINT4_G64"):
        hqq(weights_of(0.1), Scaled("INT", 4, (1, 64), "integer", "F16"))
    with pytest.raises(FewbitsError, match="do not divide"):
        hqq(weights_of(0.1, (64, 100)), type_of(4, 64, 1))


def test_powers_are_torch_s() -> None:
    bits = np.arange(np.float32(0.17).view(np.int32), np.float32(64).view(np.int32), 16, dtype=np.int32)
    values = bits[: bits.size // 64 * 64].view(np.float32)  # whole vectors: torch computes what is left otherwise
    for exponent in (-0.3, 0.7):
        assert np.array_equal(powers(values, exponent), torch.from_numpy(values).pow(exponent).numpy())
