"""The target gguf: files of a given size, with the types that lose least."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fewbits
from fewbits.calibration.run import calibrate
from fewbits.checkpoint import GGUFCheckpoint
from fewbits.errors import FewbitsError
from fewbits.plan import MixtureOptions
from fewbits.quantize.budget import Budget
from tiny_models import save_tiny

DEMO = Path(fewbits.__file__).parent / "demo"
MODEL = DEMO / "model"


@pytest.fixture(scope="module")
def statistics(texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("statistics") / "demo.imatrix.gguf"
    calibrate(MODEL, texts[0], file, chunks=8, output_tensor=True, sensitivity=True)
    return file


def loss(file: Path, text: Path) -> float:
    found = fewbits.measure(file, text, reference=MODEL, chunks=8, context=256).comparison
    assert found is not None
    return found.kl.mean.value


@pytest.mark.parametrize("preset", ["Q4_K_M", "Q3_K_M"])
def test_a_file_of_a_presets_size_loses_less(
    preset: str, texts: tuple[Path, Path], statistics: Path, tmp_path: Path
) -> None:
    usual = fewbits.quantize(MODEL, preset, tmp_path / "usual.gguf", calibration=statistics)
    budget = Budget(like=preset)
    plan = fewbits.plan(MODEL, "gguf", output=tmp_path / "ours.gguf", calibration=statistics, budget=budget)
    ours = fewbits.quantize(MODEL, "gguf", tmp_path / "ours.gguf", calibration=statistics, budget=budget)
    assert plan.file_size == ours.size == (tmp_path / "ours.gguf").stat().st_size <= usual.size
    assert ours.size > 0.97 * usual.size  # the demo model's tensors are coarse steps
    assert loss(tmp_path / "ours.gguf", texts[1]) < 0.95 * loss(tmp_path / "usual.gguf", texts[1])
    assert any("expected KL divergence" in note for note in plan.notes)


def test_a_saved_plan_makes_the_same_file(statistics: Path, tmp_path: Path) -> None:
    plan = fewbits.plan(MODEL, "gguf", calibration=statistics, budget=Budget(bpw=4.5))
    assert 4.3 < plan.bits_per_weight <= 4.5
    plan.save(tmp_path / "plan.json")
    fewbits.quantize(MODEL, "gguf", tmp_path / "a.gguf", calibration=statistics, budget=Budget(bpw=4.5))
    fewbits.quantize(MODEL, "gguf", tmp_path / "b.gguf", calibration=statistics, edited=tmp_path / "plan.json")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_texts_are_run_and_what_they_give_is_kept(texts: tuple[Path, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": texts[0], "calibration_chunks": 4, "budget": Budget(bpw=4.0)}
    made = fewbits.quantize(MODEL, "gguf", tmp_path / "a.gguf", **options)
    assert made.bits_per_weight <= 4.0
    kept = tmp_path / "a.imatrix.gguf"
    fewbits.quantize(MODEL, "gguf", tmp_path / "b.gguf", **{**options, "calibration": [kept, texts[0]]})
    types = [
        {name: info.dtype for name, info in GGUFCheckpoint(tmp_path / file).tensors.items()}
        for file in ("a.gguf", "b.gguf")
    ]
    assert types[0] == types[1]


def test_feedback_to_come_moves_bits_to_what_has_none(
    texts: tuple[Path, Path], statistics: Path, tmp_path: Path
) -> None:
    """Embeddings are searched only: what all others are spared goes to them."""
    taken = dict.fromkeys(("fast", "default"), 0)
    for bpw in (3.5, 6.0):
        for effort, sources in (("fast", [statistics]), ("default", [statistics, texts[0]])):
            chunks = 4 if effort == "default" else None
            options = {"calibration": sources, "calibration_chunks": chunks, "effort": effort}
            plan = fewbits.plan(MODEL, "gguf", budget=Budget(bpw=bpw), **options)
            taken[effort] += next(tensor.nbytes for tensor in plan.tensors if tensor.name == "token_embd.weight")
    assert taken["default"] > taken["fast"]


def test_a_types_size_is_no_size_of_directories(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="Name bytes"):
        fewbits.plan(MODEL, "hqq:g64", budget=Budget(like="Q4_K_M"))
    done = subprocess.run(
        [sys.executable, "-m", "fewbits", "plan", str(MODEL), "gguf", "--size", "q4_k_m", "--json"],
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["files"][0]["size"] <= fewbits.plan(MODEL, "Q4_K_M").file_size


def test_what_the_user_chose_stays(statistics: Path) -> None:
    mixture = MixtureOptions(tensor_types=[("ffn_down", "Q8_0")])
    plan = fewbits.plan(MODEL, "gguf", mixture=mixture, budget=Budget(bpw=5.0, types=("Q3_K", "Q5_K", "Q6_K")))
    kinds = {tensor.codec for tensor in plan.tensors if "ffn_down" in tensor.name}
    others = {tensor.codec for tensor in plan.tensors if tensor.reason.startswith("least loss")}
    assert kinds == {"Q8_0"}
    assert others <= {"Q3_K", "Q5_K", "Q6_K", "F16", "BF16"}
    assert plan.bits_per_weight <= 5.0


def test_what_fits_into_memory_leaves_room_for_everything_else(tmp_path: Path) -> None:
    def on_gpu(model: Path, target: str | None = None) -> int:
        device = fewbits.memory(model, target=target, context=256, kv="q8_0").device("GPU")
        assert device is not None
        return device.needed

    room = on_gpu(MODEL, "Q4_K_M") + 10**5
    budget = Budget(fit=room, context=256, kv="q8_0")
    plan = fewbits.plan(MODEL, "gguf", budget=budget)
    made = fewbits.quantize(MODEL, "gguf", tmp_path / "a.gguf", budget=budget)
    assert plan.file_size == made.size
    assert room - 5 * 10**5 < on_gpu(tmp_path / "a.gguf") <= room
    with pytest.raises(FewbitsError, match="shorter --context"):
        fewbits.plan(MODEL, "gguf", budget=Budget(fit=10**6))


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_count_on_the_card_where_they_are_the_head(tied: bool, tmp_path: Path) -> None:
    """llama.cpp leaves them in RAM; of a tied pair it copies the head's share to the card."""
    source = save_tiny(tmp_path / "model", "llama", {"tie_word_embeddings": tied, "hidden_size": 256})

    def on_gpu(model: Path, target: str | None = None) -> int:
        device = fewbits.memory(model, target=target, context=256).device("GPU")
        assert device is not None
        return device.needed

    room = on_gpu(source, "Q4_K_M") + 20_000
    plan = fewbits.plan(source, "gguf", budget=Budget(fit=room, context=256))
    made = fewbits.quantize(source, "gguf", tmp_path / "a.gguf", budget=Budget(fit=room, context=256))
    embedding = next(tensor for tensor in plan.tensors if tensor.name == "token_embd.weight")
    assert made.size == plan.file_size and room - 40_000 < on_gpu(tmp_path / "a.gguf") <= room
    assert (embedding.reason == "stays in RAM, beside the card") != tied
    assert any("stays in RAM" in note for note in plan.notes) != tied
    if not tied:
        assert embedding.codec == "Q8_0"
        few = fewbits.plan(source, "gguf", budget=Budget(fit=room, context=256, types=("Q3_K", "Q6_K")))
        assert next(t.codec for t in few.tensors if t.name == "token_embd.weight") == "Q6_K"


def test_short_rows_have_types_that_fit(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "llama", {"hidden_size": 96, "intermediate_size": 160})
    plan = fewbits.plan(source, "gguf", budget=Budget(bpw=5.5))
    assert plan.bits_per_weight <= 5.5
    assert {t.codec for t in plan.tensors if len(t.shape) > 1} & {"Q4_0", "IQ4_NL", "Q5_0", "Q5_1", "Q4_1"}


@pytest.mark.parametrize(
    ("target", "budget", "message"),
    [
        ("gguf", None, "needs a budget or a saved plan"),
        ("Q4_K_M", {"size": 10**6}, "for the target gguf"),
        ("gptq:w4g64", {"size": 10**6}, "without bits in their name"),
        ("gguf", {"size": 10**4}, "smallest mixture"),
        ("gguf", {"bpw": 0.5}, "smallest mixture"),
        ("gguf", {"bpw": 4.0, "types": ("Q9_K",)}, "Unknown type"),
        ("gguf", {"size": 10**6, "bpw": 4.0}, "either a size"),
        ("gguf", {}, "either a size"),
        ("gguf", {"bpw": 4.0, "context": 100}, "Pass --fit"),
    ],
)
def test_refused(target: str, budget: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        fewbits.plan(MODEL, target, budget=None if budget is None else Budget(**budget))
