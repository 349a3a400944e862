"""Moving scales between layers, AWQ's choice of them, and the search for scales of groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.checkpoint import open_model
from fewbits.codecs.scaled import Scaled
from fewbits.errors import FewbitsError
from fewbits.forward.streamed import Stream, StreamedModel
from fewbits.kernels.group_error import best_candidates
from fewbits.methods.awq import Reader, choose_scales
from fewbits.methods.base import Known
from fewbits.methods.channel_scales import round_trip_of
from fewbits.methods.group_search import search_groups, searchable
from fewbits.methods.rescaled import AWQ
from fewbits.quantize.folding import Place, places
from fewbits.quantize.rescaling import Rescaling, block_prefix
from tiny_models import TINY, save_tiny

WINDOWS = np.random.default_rng(7).integers(0, 256, (4, 40)).astype(np.int64)
UINT4 = Scaled("INT", 4, (1, 16), "integer", "F16")
INT4 = Scaled("INT", 4, (1, 16), "middle", "F16")


def open_tiny(folder: Path, name: str) -> StreamedModel:
    return StreamedModel(open_model(save_tiny(folder, name)))


def places_of(streamed: StreamedModel, index: int, block: torch.nn.Module) -> list[Place]:
    views = streamed.weights_of(index, block)
    family = streamed.model.family
    return places(family, streamed.config.num_attention_heads, block_prefix(family, index, views), views)


def output_of(streamed: StreamedModel, index: int, block: torch.nn.Module, stream: Stream) -> torch.Tensor:
    """What a block makes of its input; the stream stays where it is."""
    before = stream.hidden.clone()
    streamed.run_block(index, block, stream)
    after, stream.hidden = stream.hidden, before
    return after


def correlated(rows: int, columns: int, seed: int) -> np.ndarray:
    """X^T X of inputs with a common mean and a few loud columns."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns)) * np.exp(rng.normal(size=columns)) + rng.normal(size=columns)
    return (x.T @ x).astype(np.float32)


def output_error(wrong: np.ndarray, hessian: np.ndarray) -> float:
    return float(((wrong.astype(np.float64) @ hessian) * wrong).sum())


# ------------------------------------------------------------------------------------------------ folding


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_folding_keeps_what_a_block_computes(name: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    streamed = open_tiny(tmp_path, name)
    generator = torch.Generator().manual_seed(3)
    for index in range(2):
        stream = streamed.enter(WINDOWS)
        block = streamed.block(index)
        expected = output_of(streamed, index, block, stream)
        found = places_of(streamed, index, block)
        family = streamed.model.family
        assert {place.source.split(f".{index}.", 1)[1] for place in found} >= {
            f"{pair.source}.weight" for pair in family.pairs if "{e}" not in pair.source
        }
        for place in found:
            old = {target: weight.clone() for target, weight in place.targets.items()}
            place.fold(torch.exp(0.7 * torch.randn(place.channels, generator=generator)), dtype)
            assert all(not torch.equal(old[target], weight) for target, weight in place.targets.items())
            if dtype is not None and place.weight.ndim == 1:
                assert torch.equal(place.weight, place.weight.to(dtype).float())
        change = (output_of(streamed, index, block, stream) - expected).abs().max() / expected.abs().max()
        assert change < 1e-5, f"{name}, block {index}: {change:.1e}"


@torch.no_grad()
def test_every_expert_has_its_own_place_and_one_norm_feeds_them_all(tmp_path: Path) -> None:
    streamed = open_tiny(tmp_path, "mixtral")
    found = places_of(streamed, 1, streamed.block(1))
    norm = next(place for place in found if "post_attention" in place.source)
    assert len(norm.targets) == 1 + 2 * 4
    assert "model.layers.1.block_sparse_moe.gate.weight" in norm.targets
    ups = [place for place in found if place.source.endswith("w3.weight")]
    assert [list(place.targets) for place in ups] == [
        [f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"] for e in range(4)
    ]


@torch.no_grad()
def test_query_heads_share_the_scales_of_their_value_head(tmp_path: Path) -> None:
    streamed = open_tiny(tmp_path, "llama")  # 4 query heads, 2 of keys and values, 16 wide
    place = next(p for p in places_of(streamed, 0, streamed.block(0)) if "v_proj" in p.source)
    assert place.channels == 32
    heads = place.channel.reshape(4, 16)
    assert heads[:, 0].tolist() == [0, 0, 16, 16]
    assert torch.equal(heads[3], torch.arange(16, 32))


@torch.no_grad()
def test_scales_that_are_none_are_refused(tmp_path: Path) -> None:
    streamed = open_tiny(tmp_path, "llama")
    place = places_of(streamed, 0, streamed.block(0))[0]
    for bad in (torch.ones(3), torch.zeros(place.channels), torch.full((place.channels,), float("nan"))):
        with pytest.raises(FewbitsError, match="input_layernorm"):
            place.fold(bad)


@torch.no_grad()
def test_a_norm_value_that_would_vanish_in_storage_stays() -> None:
    weight = torch.tensor([1.0, 0.0, 1.0])
    place = Place("n", weight, None, False, {"t": torch.ones(2, 3)}, torch.arange(3))
    place.fold(torch.tensor([1e9, 2.0, 3.0]), torch.float16)
    assert weight[0] == 1 and weight[1] == 0
    product = weight * place.targets["t"]
    assert torch.equal(product, torch.tensor([1.0, 0.0, 1.0]).expand(2, 3))


# ------------------------------------------------------------------------------------------------ AWQ's scales


@pytest.mark.parametrize("kind", [UINT4, INT4, Scaled("INT", 3, (1, 0), "middle", "BF16")], ids=lambda k: k.name)
def test_the_fast_round_trip_is_the_types_own(kind: Scaled) -> None:
    weights = np.random.default_rng(0).normal(size=(24, 64)).astype(np.float32)
    weights[3] = 0
    weights[4] = np.abs(weights[4])
    ours = round_trip_of(kind)(torch.from_numpy(weights)).numpy()
    own = kind.settle(weights).decode()
    # a tie may go either way, or a scale differ in its last bit
    assert np.mean(np.abs(ours - own) > 1e-6) < 0.01
    assert np.isfinite(ours).all()


def test_scales_lower_the_output_error_where_channels_are_loud() -> None:
    rng = np.random.default_rng(1)
    weights = torch.from_numpy(rng.normal(size=(96, 64)).astype(np.float32))
    hessian = torch.from_numpy(correlated(512, 64, 2))
    hessian[5] *= 30
    hessian[:, 5] *= 30
    round_trip = round_trip_of(UINT4)
    found = choose_scales([Reader(weights, hessian)], torch.arange(64), 16, round_trip)
    assert found is not None and found.error < 0.9
    assert found.values[5] > 2 * found.values.median()
    each = found.values

    def loss(decoded: torch.Tensor) -> float:
        return output_error((decoded - weights).numpy(), hessian.numpy())

    told = loss(round_trip(weights * each) / each) / loss(round_trip(weights))
    assert told == pytest.approx(found.error, rel=1e-3)  # 96 rows are all sampled


def test_no_scales_where_nothing_is_known_or_gained() -> None:
    weights = torch.randn(8, 32)
    assert choose_scales([Reader(weights, torch.zeros(32, 32))], torch.arange(32), 16, round_trip_of(UINT4)) is None
    assert choose_scales([Reader(weights, torch.eye(32))], torch.arange(32), 16, lambda w: w.clone()) is None


def test_shared_channels_get_one_scale() -> None:
    channel = torch.arange(16).repeat(4)
    weights = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    readers = [Reader(weights, torch.from_numpy(correlated(256, 64, 3)))]
    found = choose_scales(readers, channel, 16, round_trip_of(INT4))
    assert found is not None and found.values.shape == (16,)


@pytest.mark.parametrize("name", ["llama-bias", "gemma3", "mixtral", "phi3"])
@torch.no_grad()
def test_rescaling_makes_rounding_hurt_less(name: str, tmp_path: Path) -> None:
    streamed = open_tiny(tmp_path, name)
    stream = streamed.enter(WINDOWS)
    # loud channels, as trained models have them
    stream.hidden[..., ::9] *= 12
    errors = {}
    for rescaled in (False, True):
        block = streamed.block(0)
        expected = output_of(streamed, 0, block, stream)
        views = streamed.weights_of(0, block)
        linears = [name for name, view in views.items() if view.ndim == 2 and "block_sparse_moe.gate" not in name]
        if rescaled:
            step = Rescaling(streamed, dict.fromkeys(linears, UINT4), "awq", torch.bfloat16)
            step(block, 0, lambda block=block: streamed.watch_block(0, block, stream))
            assert step.found and max(step.found.values()) < 1
            change = (output_of(streamed, 0, block, stream) - expected).abs().max() / expected.abs().max()
            assert change < 1e-5
        for linear in linears:
            views[linear].copy_(round_trip_of(UINT4)(views[linear]))
        errors[rescaled] = float((output_of(streamed, 0, block, stream) - expected).square().mean())
    assert errors[True] < 0.9 * errors[False]


# ------------------------------------------------------------------------------------------------ scales of groups


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 150),
    columns=st.sampled_from([3, 8, 16, 33]),
    uniform=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_best_candidate_is_found(rows: int, columns: int, uniform: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(columns, rows)).astype(np.float32)
    hessian = correlated(2 * columns, columns, seed % 1000)
    hessian /= hessian.diagonal().max()
    pull = (0.1 * rng.normal(size=(columns, rows))).astype(np.float32)
    levels = np.arange(-8, 8, dtype=np.float32) if uniform else np.sort(rng.normal(size=16)).astype(np.float32)
    scales = rng.uniform(0.1, 0.6, (5, rows)).astype(np.float32)
    zeros = rng.integers(-3, 4, (5, rows)).astype(np.float32) * np.float32(uniform)
    chosen = np.zeros(rows, np.uint8)
    best_candidates(weights, hessian, pull, scales, zeros, levels, uniform, chosen)
    errors = np.empty((5, rows))
    for candidate in range(5):
        decoded = (levels[:, None, None] - zeros[candidate]) * scales[candidate]
        nearest = np.abs(decoded - weights).argmin(axis=0)
        wrong = np.take_along_axis(decoded, nearest[None], 0)[0].astype(np.float64) - weights
        errors[candidate] = np.einsum("ir,ij,jr->r", wrong, hessian, wrong) + 2 * (pull * wrong).sum(axis=0)
    picked = errors[chosen, np.arange(rows)]
    # rounding at a tie may go either way
    assert np.all(picked <= errors.min(axis=0) + 1e-3 * np.abs(errors).max())


KINDS = [
    UINT4,
    INT4,
    Scaled("INT", 3, (1, 32), "middle", "BF16"),
    Scaled("INT", 8, (1, 64), "middle", "F16"),
    Scaled("NF4", 4, (1, 64), "none", "F32"),
    Scaled("E2M1", 4, (1, 16), "none", "E4M3"),
    Scaled("E2M1", 4, (1, 32), "none", "E8M0"),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name}-{kind.scale}")
def test_group_search_beats_the_importance_search_on_the_output(kind: Scaled) -> None:
    assert searchable(kind)
    weights = np.random.default_rng(4).normal(size=(200, 128)).astype(np.float32)
    weights[7] = 0
    hessian = correlated(1024, 128, 5)
    found = search_groups(weights, kind, hessian)
    searched = kind.search(weights, np.ascontiguousarray(hessian.diagonal()))
    errors = [output_error(quantized.decode() - weights, hessian) for quantized in (found, searched)]
    assert errors[0] < 0.97 * errors[1]
    again = kind.round(weights, found.scales, found.zeros, found.global_scale)
    assert np.array_equal(again, found.codes)
    assert np.isfinite(found.decode()).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name}-{kind.scale}")
def test_group_search_elsewhere_is_that_of_the_processor_but_for_rounding(
    kind: Scaled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer than 1 % of the codes differ, and the output's error by less than 0.1 %; of torch, on its processor."""
    weights, hessian = np.random.default_rng(4).normal(size=(200, 128)).astype(np.float32), correlated(1024, 128, 5)
    weights[7] = 0
    # the search that comes before is Triton's, which tests/test_groups_triton.py looks at
    search = Scaled.search
    monkeypatch.setattr(Scaled, "search", lambda kind, *given: search(kind, *given[:3]))
    here, there = (search_groups(weights, kind, hessian, device=device) for device in ("cpu", "cpu:0"))
    assert np.mean(here.codes != there.codes) < 0.01
    errors = [output_error(found.decode() - weights, hessian) for found in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


@pytest.mark.parametrize("kind", [UINT4, INT4], ids=lambda kind: kind.name)
def test_rows_do_not_depend_on_one_another(kind: Scaled) -> None:
    weights = np.random.default_rng(6).normal(size=(160, 64)).astype(np.float32)
    hessian = correlated(300, 64, 6)
    whole = search_groups(weights, kind, hessian)
    part = search_groups(weights[30:50], kind, hessian)
    assert np.mean(whole.codes[30:50] != part.codes) < 0.01  # sums of products may differ in their last bits


def test_awq_without_a_hessian_or_with_long_groups_searches_by_importance() -> None:
    weights = np.random.default_rng(8).normal(size=(16, 512)).astype(np.float32)
    importance = np.ones(512, np.float32)
    row = Scaled("INT", 4, (1, 0), "middle", "F16")
    assert not searchable(row)
    for kind, hessian in ((UINT4, None), (row, np.eye(512, dtype=np.float32))):
        found = AWQ.fit(weights, kind, Known(importance, hessian=hessian))
        assert np.array_equal(found.decode(), kind.search(weights, importance).decode())
    hessian = correlated(600, 512, 9)
    found = AWQ.fit(weights, UINT4, Known(importance, hessian=hessian))
    assert np.array_equal(found.decode(), search_groups(weights, UINT4, hessian).decode())
