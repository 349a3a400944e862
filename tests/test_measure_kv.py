"""A quantized KV cache: ggml's rounding, llama.cpp's rotation, the simulation beside the real engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fewbits.api import quantize
from fewbits.checkpoint import open_model
from fewbits.cli import measure as measure_verb
from fewbits.errors import FewbitsError
from fewbits.measure import KV_TYPES, measure
from fewbits.measure.kv import BLOCK_TYPES, CachedModel, hadamard, rotations, round_head
from tiny_models import TINY, save_tiny

ORACLE = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""What the gguf package rounds as ggml does."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "reference", "llama-tied")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(0)
    file.write_text(" ".join(rng.choice(["the", "and", "winter", "hand", "tin"], 900)), "utf-8")
    return file


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(ORACLE), st.floats(1e-3, 1e3), st.integers(0, 2**31), st.booleans())
def test_rounding_is_ggmls(kv: str, spread: float, seed: int, constant: bool) -> None:
    rng = np.random.default_rng(seed)
    values = (spread * rng.standard_normal((5, 64))).astype(np.float32)
    if constant:
        values[2] = values[2, 0]
        values[3] = 0
    kind = GGMLQuantizationType[kv.upper()]
    expected = quants.dequantize(quants.quantize(values, kind), kind)
    got = round_head(torch.from_numpy(values), kv).numpy()
    # an odd value may fall on the other side of the middle between two codes, where 1/x is rounded differently
    step = np.abs(values).max() / 7
    assert np.mean(~np.isclose(got, expected, rtol=1e-5, atol=1e-6 * spread)) < 0.01
    assert np.abs(got - expected).max() <= 1.01 * step


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(KV_TYPES), st.integers(0, 2**31), st.sampled_from([64, 128, 192]))
def test_what_is_rounded_stays_near(kv: str, seed: int, head: int) -> None:
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, head)).astype(np.float32))
    rotation = rotations(head)[0] if kv in BLOCK_TYPES else 0
    error = ((round_head(values, kv, rotation) - values) ** 2).mean().sqrt()
    bound = {"f16": 1e-3, "bf16": 4e-3, "fp8": 0.04, "q8_0": 0.01, "q5_1": 0.06, "q5_0": 0.06}.get(kv, 0.12)
    assert 0 < error < bound


def test_rotation_is_its_own_inverse_and_of_llama_cpps_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = hadamard(128)
    torch.testing.assert_close(matrix @ matrix, torch.eye(128), atol=1e-5, rtol=0)
    monkeypatch.delenv("LLAMA_ATTN_ROT_DISABLE", raising=False)
    assert rotations(64) == (64, 64) and rotations(128) == (128, 64) and rotations(192) == (64, 64)
    assert rotations(80) == (0, 0) and rotations(96) == (0, 0)
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    assert rotations(64) == (0, 0)


def test_rotation_helps_against_outliers() -> None:
    keys = torch.from_numpy(np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32))
    keys[:, 5] *= 20  # one loud channel, as keys have it

    def error(rotation: int) -> float:
        return float(((round_head(keys, "q4_0", rotation) - keys) ** 2).mean())

    assert error(64) < 0.5 * error(0)


@pytest.mark.parametrize("name", TINY)
def test_every_family_reads_keys_and_values_from_the_cache(name: str, tmp_path: Path) -> None:
    """With a cache that gives back what it gets nothing changes; with one that turns the values all does."""
    ids = np.random.default_rng(1).integers(0, 288, (2, 40))
    folder = save_tiny(tmp_path, name)
    model = CachedModel(open_model(folder), "f16")
    calls: list[int] = []

    class Plain:
        turn = 0

        def update(
            self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object
        ) -> tuple[torch.Tensor, torch.Tensor]:
            calls.append(layer)
            return keys, values.roll(self.turn, -1)

    from fewbits.forward.streamed import StreamedModel

    expected = StreamedModel(open_model(folder)).final_states(ids, 0)
    model.cache = Plain()  # type: ignore[assignment]
    np.testing.assert_allclose(model.final_states(ids, 0), expected, rtol=1e-5, atol=1e-5)
    assert sorted(set(calls)) == list(range(len(model.layers)))
    Plain.turn = 1
    assert np.abs(model.final_states(ids, 0) - expected).max() > 1e-2


def test_fewer_bits_lose_more(tiny: Path, text: Path) -> None:
    found = {}
    for kv in (None, "f16", "q8_0", "q4_0"):
        report = measure(tiny, text, reference=tiny, context=32, chunks=9, kv=kv, cache=False, threads=1)
        assert report.kv == kv and report.comparison is not None
        found[kv] = report.comparison.kl.mean.value
        assert ("KV cache of q8_0 (simulated)" in report.ruler()) == (kv == "q8_0")
    assert abs(found[None]) < 1e-9 < found["f16"] < found["q8_0"] < found["q4_0"]


def test_bad_requests_are_explained(tiny: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="no KV cache type 'q3_k'"):
        measure(tiny, text, kv="q3_k")
    narrow = save_tiny(tmp_path, "llama")  # heads of 16
    with pytest.raises(FewbitsError, match="head of 16 values"):
        measure(narrow, text, context=32, kv="q8_0", cache=False)
    report = measure(narrow, text, context=32, chunks=2, kv="fp8", cache=False)
    assert report.perplexity.value > 1


def test_the_verb_takes_it(tiny: Path, text: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(measure_verb.command)
    arguments = [str(tiny), "--text", str(text), "--reference", str(tiny), "--context", "32", "--chunks", "9"]
    done = CliRunner().invoke(app, [*arguments, "--kv", "q4_0", "--no-cache", "--json"])
    assert done.exit_code == 0 and '"kv": "q4_0"' in done.output


@pytest.fixture(scope="module")
def real(test_models: Path, shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with smollm2-576 as an F16 GGUF, the beginning of a text, and room for the reference's answers."""
    folder = tmp_path_factory.mktemp("real")
    quantize(str(test_models / "smollm2-576"), "F16", folder / "model.gguf")
    wiki = (shared_dir / "data" / "wikitext-2" / "wiki.test.raw").read_text("utf-8")
    (folder / "wiki.txt").write_text(wiki[:10_000], "utf-8")
    return folder


@pytest.mark.engine
@pytest.mark.shared
@pytest.mark.parametrize("kv", ["q4_0", "q5_1"])
def test_the_simulation_loses_what_the_engine_loses(kv: str, real: Path, test_models: Path) -> None:
    """KL divergence of both on the same windows: mean and median agree within a quarter."""
    pytest.importorskip("llama_cpp")
    directory = test_models / "smollm2-576"
    options = {"reference": directory, "chunks": 2, "threads": 1, "kv": kv, "cache": real / "cache"}
    simulated = measure(directory, real / "wiki.txt", **options)  # type: ignore[arg-type]
    engine = measure(real / "model.gguf", real / "wiki.txt", engine="llama.cpp", **options)  # type: ignore[arg-type]
    assert simulated.comparison is not None and engine.comparison is not None
    assert simulated.comparison.kl.mean.value == pytest.approx(engine.comparison.kl.mean.value, rel=0.25)
    assert simulated.comparison.kl.median == pytest.approx(engine.comparison.kl.median, rel=0.25)


@pytest.mark.engine
def test_fp8_is_not_llama_cpps() -> None:
    from fewbits.measure.kv import check_kv

    check_kv("fp8", "torch")
    with pytest.raises(FewbitsError, match="no fp8 KV cache"):
        check_kv("fp8", "llama.cpp")
