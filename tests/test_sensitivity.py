"""Sensitivities against what errors in the weights really do to a model's distributions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fewbits
from fewbits.calibration.imatrix_files import read_statistics, write_statistics
from fewbits.calibration.run import calibrate
from fewbits.calibration.sensitivity import sensitivities
from fewbits.calibration.statistics import Sensitivity, Statistics, TensorStatistics
from fewbits.calibration.texts import read_texts
from fewbits.checkpoint import open_model
from fewbits.errors import FewbitsError
from fewbits.forward.streamed import load_whole
from tiny_models import save_tiny

DEMO = Path(fewbits.__file__).parent / "demo"


def divergence(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Mean KL divergence in nats a token."""
    logs, others = torch.log_softmax(logits.double(), -1), torch.log_softmax(others.double(), -1)
    return float((logs.exp() * (logs - others)).sum(-1).mean())


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
        ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"),
        ("model.layers.2.mlp.down_proj.weight", "blk.2.ffn_down.weight"),
        ("model.layers.3.mlp.gate_proj.weight", "blk.3.ffn_gate.weight"),
        ("model.embed_tokens.weight", "token_embd.weight"),
    ],
)
def test_the_divergence_that_noise_costs_is_foretold(stored: str, name: str) -> None:
    model = open_model(DEMO / "model")
    text = read_texts([DEMO / "held_out.txt"], model.tokenizer(), 256, 24)
    known = sensitivities(model, text, 24)[name]
    whole = load_whole(model)
    ids = torch.from_numpy(text.inputs)
    with torch.no_grad():
        before = whole(ids).logits
        weight = whole.get_parameter(stored)
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(weight.shape, generator=generator) * 0.02 * weight.square().mean().sqrt()
        weight += noise
        found = divergence(before, whole(ids).logits)
    squares = noise.square().double().numpy()
    foretold = 0.0
    for one in known:
        rows = one.rows if one.rows is not None else np.full(len(squares), 1 / len(squares))
        foretold += float(rows @ squares @ one.columns[0]) / 2
    assert 0.5 < foretold / found < 2


def test_experts_have_their_own(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "qwen3-moe")
    model = open_model(source)
    text = read_texts([DEMO / "held_out.txt"], model.tokenizer(), 32, 4)
    known = sensitivities(model, text)
    experts, _, columns = next(
        (shape for n, shape in shapes_of(source) if n == "blk.0.ffn_down_exps.weight"), (0, 0, 0)
    )
    assert known["blk.0.ffn_down_exps.weight"][0].columns.shape == (experts, columns)
    assert len({float(row.sum()) for row in known["blk.0.ffn_down_exps.weight"][0].columns}) > 1
    assert {name for name, shape in shapes_of(source) if len(shape) > 1 and "norm" not in name} <= known.keys()


def shapes_of(source: Path) -> list[tuple[str, tuple[int, ...]]]:
    return [(tensor.name, tensor.shape) for tensor in fewbits.plan(source, "F16").tensors]


def test_statistics_keep_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    known = {
        "blk.0.ffn_up.weight": [Sensitivity(rng.random((2, 8), np.float32))],
        "token_embd.weight": [
            Sensitivity(rng.random((1, 8), np.float32), rng.random(5, np.float32)),
            Sensitivity(rng.random((1, 8), np.float32), rng.random(5, np.float32)),
        ],
    }
    sums = {"blk.0.ffn_up.weight": TensorStatistics(np.ones((2, 8), np.float32), np.ones(2, np.float32))}
    write_statistics(Statistics(sums, sensitivities=known), tmp_path / "s.gguf")
    back = read_statistics(tmp_path / "s.gguf")
    assert back.tensors.keys() == sums.keys()
    assert back.sensitivities.keys() == known.keys()
    for name, wanted in known.items():
        for one, other in zip(wanted, back.sensitivities[name], strict=True):
            assert np.array_equal(one.columns, other.columns)
            assert (one.rows is None) == (other.rows is None)
            assert one.rows is None or np.array_equal(one.rows, other.rows)
    assert back.merged([Statistics(sums)]).sensitivities.keys() == known.keys()


def test_they_need_a_text_and_the_format_that_holds_them(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="format gguf"):
        calibrate(DEMO / "model", DEMO / "held_out.txt", tmp_path / "s.dat", sensitivity=True, format="dat")
