"""Every storage type: round trip, bit-equality with both reference decoders, error no worse than llama.cpp's, size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import ggml
from fewbits.codecs import CODECS, codec
from fewbits.codecs.blocks import Blocks, BlocksCoded
from fewbits.errors import FewbitsError

FLOATS = ("F32", "F16", "BF16")
BLOCKED = [name for name in CODECS if name not in FLOATS]
SEARCHED = [name for name in BLOCKED if CODECS[name].weighted]
LEVELS = {"Q8_0": 0.01, "Q6_K": 0.03, "Q5_K": 0.06, "Q5_1": 0.06, "Q5_0": 0.06, "Q4_K": 0.1, "Q4_1": 0.1, "Q4_0": 0.12}
LEVELS |= {"Q3_K": 0.2, "Q2_K": 0.4}
LEVELS |= {"IQ4_NL": 0.08, "IQ4_XS": 0.09, "MXFP4": 0.12, "NVFP4": 0.11}
LEVELS |= {"IQ2_XXS": 0.34, "IQ2_XS": 0.3, "IQ2_S": 0.26, "IQ3_XXS": 0.19, "IQ3_S": 0.14}
LEVELS |= {"IQ1_S": 0.46, "IQ1_M": 0.43, "TQ1_0": 0.45, "TQ2_0": 0.45, "Q1_0": 0.62, "Q2_0": 0.37}
"""Root mean square error of a normal variable that a working codec stays below, relative to its deviation."""


def matrix(kind: str, rows: int = 32, columns: int = 1024, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "normal":
        x = rng.normal(size=(rows, columns))
    elif kind == "heavy":
        x = rng.standard_t(3, size=(rows, columns))
    elif kind == "uniform":
        x = rng.uniform(-1, 1, size=(rows, columns))
    else:  # shifted: every block all positive or all negative
        x = rng.normal(size=(rows, columns)) * 0.2 + np.repeat(
            rng.choice([-1, 1], size=(rows, columns // 32)), 32, axis=1
        )
    return (x * 0.02).astype(np.float32)


def weighted_error(weights: np.ndarray, decoded: np.ndarray, importance: np.ndarray | None) -> float:
    square = (weights.astype(np.float64) - decoded) ** 2
    return float((square * (1 if importance is None else importance)).sum())


@pytest.mark.parametrize("name", BLOCKED)
def test_decodes_bit_equal_to_gguf_py_and_libggml(name: str) -> None:
    kind = codec(name)
    x = matrix("heavy")
    rng = np.random.default_rng(1)
    for data in (kind.encode(x), random_blocks(name, rng)):
        # gguf-py does not decode Q1_0 and Q2_0
        want = kind.decode(data) if name in ("Q1_0", "Q2_0") else dequantize(data, GGMLQuantizationType[name])
        np.testing.assert_array_equal(kind.decode(data), want)
        np.testing.assert_array_equal(kind.decode(data), ggml.to_float(name, data))


def random_blocks(name: str, rng: np.random.Generator) -> np.ndarray:
    """Any bytes, but for the half-precision fields, which are finite: those that encoding writes."""
    kind = codec(name)
    rows, columns = 8, 1024
    data = rng.integers(0, 256, size=(rows, kind.nbytes((columns,))), dtype=np.uint8)
    template = kind.encode(matrix("normal", rows, columns, seed=3))
    half_fields = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q6_K": (208, 210)}
    half_fields |= {"IQ1_M": (48, 56), "TQ1_0": (52, 54), "TQ2_0": (64, 66)}
    wide = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
    start, stop = half_fields.get(name, (0, 4 if name in wide else 2))
    blocks, clean = data.reshape(-1, kind.block_bytes), template.reshape(-1, kind.block_bytes)
    blocks[:, start:stop] = clean[:, start:stop]
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", FLOATS)
def test_floats_round_as_torch_does(name: str) -> None:
    import torch

    x = np.concatenate([matrix("heavy").ravel(), np.float32([0, -0.0, 1e-40, 3e38, 65519, 65504, 1.0009765625, 1e-8])])
    want = torch.from_numpy(x).to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name])
    got = codec(name).decode(codec(name).encode(x.reshape(1, -1)))[0]
    np.testing.assert_array_equal(got, want.float().numpy())


@pytest.mark.parametrize("name", BLOCKED)
def test_size_is_ggmls(name: str) -> None:
    for columns in (256, 1024, 4096):
        assert codec(name).nbytes((3, columns)) == 3 * ggml.row_size(name, columns)
        assert codec(name).encode(np.zeros((3, columns), np.float32)).size == codec(name).nbytes((3, columns))
    with pytest.raises(FewbitsError, match=str(codec(name).block)):
        codec(name).nbytes((3, 33))


AS_GOOD = 1 + 1e-7
"""Where both sides find the same scales (Q1_0 has but a mean to find), sums are rounded as processors please."""


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform", "shifted"])
def test_error_is_not_above_llama_cpps(name: str, kind: str) -> None:
    x = matrix(kind, rows=64)
    importance = np.random.default_rng(2).lognormal(size=x.shape[1]).astype(np.float32)
    ours = weighted_error(x, codec(name).decode(codec(name).encode(x, importance)), importance)
    theirs = weighted_error(x, ggml.to_float(name, ggml.quantize_chunk(name, x, importance)), importance)
    assert ours <= theirs * AS_GOOD
    ones = np.ones(x.shape[1], np.float32)
    ours = weighted_error(x, codec(name).decode(codec(name).encode(x)), None)
    paths = [ggml.quantize_chunk(name, x), ggml.quantize_chunk(name, x, ones)]
    assert ours <= min(weighted_error(x, ggml.to_float(name, data), None) for data in paths) * AS_GOOD


@pytest.mark.parametrize("name", BLOCKED)
def test_normal_weights_come_back(name: str) -> None:
    x = matrix("normal")
    error = codec(name).decode(codec(name).encode(x)) - x
    assert np.sqrt((error**2).mean()) / x.std() < LEVELS[name]


@pytest.mark.parametrize("name", BLOCKED)
def test_bytes_do_not_depend_on_the_slab(name: str) -> None:
    x = matrix("heavy", rows=150, columns=768)
    importance = np.random.default_rng(3).lognormal(size=768).astype(np.float32)
    whole = codec(name).encode(x, importance)
    for cut in (1, 77, 149):
        parts = [codec(name).encode(x[:cut], importance), codec(name).encode(x[cut:], importance)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_moves_the_error(name: str) -> None:
    x = matrix("normal")
    importance = np.where(np.arange(x.shape[1]) % 4 == 0, 100.0, 0.01).astype(np.float32)
    plain = weighted_error(x, codec(name).decode(codec(name).encode(x)), importance)
    weighted = weighted_error(x, codec(name).decode(codec(name).encode(x, importance)), importance)
    # where one scale is all there is to move, little is to be had
    assert weighted < {"TQ1_0": 0.98, "TQ2_0": 0.98, "Q1_0": 0.98}.get(name, 0.95) * plain


@pytest.mark.parametrize("name", [name for name in BLOCKED if CODECS[name].step_bytes])
def test_weights_are_linear_in_the_steps_of_their_block(name: str) -> None:
    # large enough for steps that half precision has all its bits for
    kind, x = Blocks(CODECS[name]), 50 * matrix("normal", 4, 512)
    made = BlocksCoded(kind, kind.codec.encode(x, np.ones(512, np.float32)))
    assert made.steps.shape == (4 * 512 // kind.codec.block, len(kind.codec.step_bytes))
    np.testing.assert_array_equal(made.with_steps(made.steps).data, made.data)
    np.testing.assert_array_equal(made.with_steps(2 * made.steps).decode(), 2 * made.decode())
    shares = {"shares": torch.rand(made.steps.shape).half().float().requires_grad_()}
    found = made.decode_torch(shares)
    rounding = 2**-11 * np.abs(made.decode_torch({"shares": torch.ones(made.steps.shape)}).numpy()).max() + 1e-6
    np.testing.assert_allclose(made.with_tensors(shares).decode(), found.detach().numpy(), atol=2 * rounding)
    found.square().sum().backward()
    assert shares["shares"].grad is not None and bool((shares["shares"].grad != 0).any())


@pytest.mark.parametrize("name", BLOCKED)
@pytest.mark.parametrize("special", ["zeros", "ones", "negative", "outlier", "denormal", "huge", "one zero importance"])
def test_special_blocks_stay_finite(name: str, special: str) -> None:
    x = matrix("normal", rows=2, columns=512)
    importance = np.ones(512, np.float32)
    if special == "zeros":
        x[:] = 0
    elif special == "ones":
        x[:] = 1
    elif special == "negative":
        x = -np.abs(x)
    elif special == "outlier":
        x[0, 5] = 1e4
    elif special == "denormal":
        x *= 1e-38
    elif special == "huge":
        x *= 1e30
    else:
        importance[:256] = 0
    decoded = codec(name).decode(codec(name).encode(x, importance))
    assert np.isfinite(decoded).all()
    if special == "zeros":
        assert not decoded.any()
    if special == "ones":
        np.testing.assert_allclose(decoded, 1, atol=0.01)
    if special == "outlier":
        # steps are wide; range ends; no entry of a codebook has zeros beside its largest value
        few = {"MXFP4": 2300, "NVFP4": 7400, "IQ2_XXS": 5500, "IQ2_XS": 3700, "IQ2_S": 3700}
        few |= {"IQ3_XXS": 1600, "IQ3_S": 1600}
        few |= {"IQ1_S": 2900, "IQ1_M": 1700, "Q1_0": 9950}
        assert abs(decoded[0, 5] - 1e4) < few.get(name, 700)


@pytest.mark.parametrize("name", BLOCKED)
@given(
    x=hnp.arrays(np.float32, (2, 256), elements=st.floats(-1e6, 1e6, width=32)),
    importance=st.none() | hnp.arrays(np.float32, (256,), elements=st.floats(0, 1e6, width=32)),
)
@settings(max_examples=20, deadline=None)
def test_any_weights_come_back_finite_and_near(name: str, x: np.ndarray, importance: np.ndarray | None) -> None:
    decoded = codec(name).decode(codec(name).encode(x, importance))
    assert decoded.shape == x.shape
    assert np.isfinite(decoded).all()
    # a block may trade elements for each other, but no code lies farther out than the largest weight and a step
    assert np.abs(decoded).max() <= 2.5 * np.abs(x).max() + 1e-4


def test_unknown_types_are_named() -> None:
    with pytest.raises(FewbitsError, match=r"'Q9_X'.*Q4_0"):
        codec("Q9_X")
