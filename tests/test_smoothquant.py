"""SmoothQuant: outliers of activations move into the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fewbits.checkpoint import open_model
from fewbits.codecs.scaled import Scaled
from fewbits.forward.streamed import StreamedModel
from fewbits.methods.channel_scales import round_trip_of
from fewbits.methods.smoothquant import ALPHAS, SmoothReader, round_tokens, smooth
from fewbits.quantize.rescaling import Rescaling
from tiny_models import save_tiny

INT8 = Scaled("INT", 8, (1, 0), "middle", "BF16")
WINDOWS = np.random.default_rng(7).integers(0, 256, (4, 40)).astype(np.int64)


def reader(outlier: float, seed: int = 0) -> SmoothReader:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 64, generator=generator)
    inputs[:, 9] *= outlier
    return SmoothReader(torch.randn(96, 64, generator=generator), inputs.abs().amax(0), inputs)


def loss(one: SmoothReader, scales: torch.Tensor) -> float:
    exact = one.inputs @ one.weight.T
    rounded = round_tokens(one.inputs / scales) @ round_trip_of(INT8)(one.weight * scales).T
    return float((rounded - exact).square().sum())


def test_tokens_are_rounded_to_integers_of_their_own_scale() -> None:
    x = torch.tensor([[127.0, -63.4, 0.6], [0.0, 0.0, 0.0], [-2.54, 1.0, 0.009]])
    expected = torch.tensor([[127.0, -63.0, 1.0], [0.0, 0.0, 0.0], [-2.54, 1.0, 0.0]])
    assert torch.allclose(round_tokens(x), expected, atol=1e-6)


def test_an_outlier_channel_is_smoothed() -> None:
    one = reader(100.0)
    found = smooth([one], torch.arange(64), round_trip_of(INT8))
    assert found is not None and found.error < 0.2
    assert found.values.argmax() == 9 and found.values[9] > 3 * found.values.median()
    assert loss(one, found.values) == pytest.approx(found.error * loss(one, torch.ones(64)), rel=1e-3)


def test_the_best_alpha_is_taken() -> None:
    one = reader(30.0)
    found = smooth([one], torch.arange(64), round_trip_of(INT8))
    each = [smooth([one], torch.arange(64), round_trip_of(INT8), [alpha]) for alpha in ALPHAS]
    assert found is not None
    assert found.error == min(scales.error for scales in each if scales is not None)


def test_the_papers_formula() -> None:
    one = reader(100.0)
    found = smooth([one], torch.arange(64), round_trip_of(INT8), [0.5])
    assert found is not None
    ratio = found.values / (one.peaks / one.weight.abs().amax(0)).sqrt()
    assert torch.allclose(ratio, ratio[0].expand(64), rtol=1e-4)


def test_nothing_moves_where_nothing_is_gained() -> None:
    silent = SmoothReader(torch.randn(8, 64), torch.zeros(64), torch.zeros(10, 64))
    assert smooth([silent], torch.arange(64), round_trip_of(INT8)) is None
    even = torch.ones(40, 64)
    flat = SmoothReader(torch.ones(8, 64), torch.ones(64), even)  # all levels are exact
    assert smooth([flat], torch.arange(64), lambda weights: weights.clone()) is None


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3-moe"])
@torch.no_grad()
def test_blocks_with_outliers_lose_less(name: str, tmp_path: Path) -> None:
    streamed = StreamedModel(open_model(save_tiny(tmp_path, name)))
    stream = streamed.enter(WINDOWS)
    stream.hidden[..., 3] *= 300
    before = stream.hidden.clone()
    linears = [n for n in streamed.model.names if ".layers.0." in n and "proj" in n]
    errors = {}
    for smoothed in (False, True):
        block = streamed.block(0)
        stream.hidden = before.clone()
        streamed.run_block(0, block, stream)
        exact, stream.hidden = stream.hidden, before.clone()
        if smoothed:
            step = Rescaling(streamed, dict.fromkeys(linears, INT8), "smoothquant", torch.bfloat16)
            step(block, 0, lambda block=block: streamed.watch_block(0, block, stream))
            assert any("input_layernorm" in place for place in step.found)
            streamed.run_block(0, block, stream)
            assert (stream.hidden - exact).abs().max() < 1e-5 * exact.abs().max()
            stream.hidden = before.clone()
        attention = block.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.weight.copy_(round_trip_of(INT8)(linear.weight))
            linear.register_forward_pre_hook(lambda _, args: (round_tokens(args[0].flatten(0, 1)).view_as(args[0]),))
        streamed.run_block(0, block, stream)
        errors[smoothed] = float((stream.hidden - exact).square().mean())
    assert errors[True] < 0.7 * errors[False]
