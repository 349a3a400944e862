"""GGUF files whose linears are quantized block by block while text runs through the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

import fewbits
from fewbits.checkpoint import GGUFCheckpoint, open_model
from fewbits.errors import FewbitsError
from fewbits.plan import MixtureOptions
from fewbits.quantize import gguf_job
from fewbits.quantize.blockwise import BlockwiseRun
from fewbits.quantize.budget import Budget
from tiny_models import save_tiny, tiny_model

LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    words = np.random.default_rng(3).choice(["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran"], 9000)
    file.write_text(" ".join(words))
    return file


def logits_of(directory: Path, like: Path, text: Path) -> torch.Tensor:
    """Of a GGUF file as our reader decodes it, or of a directory: [tokens, vocabulary]."""
    model = open_model(directory)
    found = transformers.AutoModelForCausalLM.from_pretrained(like, dtype=torch.float32)
    found.load_state_dict({name: torch.from_numpy(model.read(name)) for name in model.names}, strict=False)
    with torch.no_grad():
        return found(torch.tensor([model.tokenizer()(text.read_text()[-900:]).input_ids])).logits[0]


def made(
    directory: Path, target: str, text: Path, effort: str = "default", overwrite: bool = True, chunks: int = 16
) -> Path:
    out = text.parent / f"{effort}-{target}.gguf"
    options = {"calibration": text, "calibration_chunks": chunks, "effort": effort}
    fewbits.quantize(directory, target, out, **options, overwrite=overwrite, threads=1)
    return out


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2"])
def test_rows_norms_and_biases_stand_where_the_engine_wants_them(name: str, tmp_path: Path, text: Path) -> None:
    """What is misplaced, or scaled on one side only, makes noise of the logits."""
    directory = save_tiny(tmp_path / "model", name)
    truth = logits_of(directory, directory, text)
    lost = {}
    for effort in ("fast", "default"):
        found = logits_of(made(directory, "Q5_0", text, effort), directory, text)
        lost[effort] = float((found - truth).norm() / truth.norm())
    assert lost["default"] < 1.05 * lost["fast"] < 0.6
    plan = fewbits.plan(directory, "Q5_0", calibration=text, calibration_chunks=16)
    assert any(tensor.method == "gptq" for tensor in plan.tensors)


def test_size_is_that_of_the_plan(tmp_path: Path, text: Path) -> None:
    directory = save_tiny(tmp_path / "model", "llama", LLAMA)
    plan = fewbits.plan(directory, "Q4_0", calibration=text, calibration_chunks=16)
    out = made(directory, "Q4_0", text)
    assert out.stat().st_size == plan.files[0].size
    assert not out.with_name(out.name + ".partial").exists()


@pytest.mark.parametrize("effort", ["default", "thorough"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    effort: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_tiny(tmp_path / "model", "llama", LLAMA)
    chunks = 20  # enough for some to be held out
    out = made(directory, "Q4_0", text, effort, chunks=chunks)
    whole = out.read_bytes()
    out.unlink()
    out.with_suffix(".imatrix.gguf").unlink()
    kept, seen, texts = BlockwiseRun._block, [], []
    once = gguf_job.calibrate_texts
    monkeypatch.setattr(gguf_job, "calibrate_texts", lambda *all_: texts.append(1) or once(*all_))

    def stop(run: BlockwiseRun, index: int, block: torch.nn.Module) -> None:
        seen.append(index)
        if len(seen) == 2:
            raise KeyboardInterrupt
        kept(run, index, block)

    monkeypatch.setattr("fewbits.formats.journal.SAFE_EVERY", 0.0)
    monkeypatch.setattr(BlockwiseRun, "_block", stop)
    with pytest.raises(KeyboardInterrupt):
        made(directory, "Q4_0", text, effort, overwrite=False, chunks=chunks)
    assert made(directory, "Q4_0", text, effort, overwrite=False, chunks=chunks).read_bytes() == whole
    assert seen == [0, 1, *range(1, max(seen) + 1)], "the first block was done"
    assert len(texts) == 1, "and so was the importance matrix"


def test_a_report_says_what_a_text_was_too_short_for(tmp_path: Path, text: Path) -> None:
    directory = save_tiny(tmp_path / "model", "llama", LLAMA | {"intermediate_size": 1024})
    options = {"calibration": text, "effort": "thorough"}
    plan = fewbits.plan(directory, "Q4_0", **options, calibration_chunks=1)
    methods = {tensor.name: tensor.method for tensor in plan.tensors}
    assert methods["blk.0.ffn_down.weight"] == "search"
    assert methods["blk.0.ffn_up.weight"] == "gptq"
    notes = {}
    for chunks in (1, 20):
        out = tmp_path / f"{chunks}.gguf"
        notes[chunks] = " ".join(fewbits.quantize(directory, "Q4_0", out, **options, calibration_chunks=chunks).notes)
    assert "more columns than the text has tokens (512)" in notes[1]
    assert "nothing is tuned" in notes[1]
    assert "more columns" not in notes[20]
    assert "decoder blocks better on windows held out" in notes[20]


def test_a_budget_s_memory_is_that_of_the_types_it_has_chosen(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_tiny(tmp_path / "model", "llama", LLAMA)
    methods, reckon = [], gguf_job.text_run

    def reckoned(plan, *rest):
        methods.append({tensor.method for tensor in plan.tensors})
        return reckon(plan, *rest)

    monkeypatch.setattr(gguf_job, "text_run", reckoned)
    options = {"calibration": text, "calibration_chunks": 16, "max_memory": 4 << 30, "threads": 1}
    fewbits.quantize(directory, "gguf", tmp_path / "x.gguf", budget=Budget(like="Q4_0"), **options)
    assert "gptq" not in methods[0]
    assert "gptq" in methods[-1]


def test_a_folder_of_somebody_else_s_stays(tmp_path: Path, text: Path) -> None:
    directory = save_tiny(tmp_path / "model", "llama", LLAMA)
    other = tmp_path / "default-Q4_0.gguf.partial" / "letters.txt"
    other.parent.mkdir()
    other.write_text("mine")
    with pytest.raises(FewbitsError, match="in the way"):
        made(directory, "Q4_0", text)
    assert other.read_text() == "mine"


def test_a_gguf_file_is_a_model_like_any_other(tmp_path: Path, text: Path) -> None:
    directory = save_tiny(tmp_path / "model", "llama", LLAMA)
    source = tmp_path / "source.gguf"
    fewbits.quantize(directory, "F32", source)
    from_directory = {
        name: _stored(made(directory, "Q4_0", text), name) for name in ("blk.0.attn_q.weight", "blk.1.ffn_norm.weight")
    }
    out = made(source, "Q4_0", text)
    for name, data in from_directory.items():
        np.testing.assert_array_equal(_stored(out, name), data)


def _stored(file: Path, name: str) -> np.ndarray:
    checkpoint = GGUFCheckpoint(file)
    return checkpoint.raw(name, 0, checkpoint.tensors[name].nbytes)


def weights_of(file: Path) -> dict[str, bytes]:
    return {name: _stored(file, name).tobytes() for name in GGUFCheckpoint(file).tensors}


def test_fast_looks_at_the_text_once(tmp_path: Path, text: Path) -> None:
    directory = save_tiny(tmp_path / "model", "llama", LLAMA)
    plan = fewbits.plan(directory, "Q4_0", calibration=text, calibration_chunks=16, effort="fast")
    assert {tensor.method for tensor in plan.tensors} & {"gptq"} == set()


def test_statistics_beside_a_text_spare_its_first_run(tmp_path: Path, text: Path) -> None:
    directory, other = save_tiny(tmp_path / "model", "llama", LLAMA), tmp_path / "other.txt"
    one = made(directory, "Q4_0", text)
    other.write_text(text.read_text()[::-1])
    known, out = one.with_suffix(".imatrix.gguf"), tmp_path / "x.gguf"
    fewbits.quantize(directory, "Q4_0", out, calibration=[known, text], calibration_chunks=16, threads=1)
    assert weights_of(out) == weights_of(one)
    assert not out.with_suffix(".imatrix.gguf").exists()
    fewbits.quantize(
        directory, "Q4_0", out, calibration=[known, other], calibration_chunks=16, threads=1, overwrite=True
    )
    assert weights_of(out) != weights_of(one)
    for used in (text, other):
        with pytest.raises(FewbitsError, match="was calibrated on"):
            fewbits.measure(out, used, chunks=1, context=64)


def test_a_head_of_its_own_is_fed_back_too(tmp_path: Path, text: Path) -> None:
    found = {}
    for tied in (False, True):
        directory = save_tiny(tmp_path / f"model{tied}", "llama", LLAMA | {"tie_word_embeddings": tied})
        for effort in ("fast", "default"):
            out = tmp_path / f"{tied}-{effort}.gguf"
            mixture = MixtureOptions(output_type="Q4_0", token_embedding_type="Q4_0")
            options = {"calibration": text, "calibration_chunks": 16, "effort": effort, "mixture": mixture}
            fewbits.quantize(directory, "Q4_0", out, **options, threads=1)
            found[tied, effort] = _stored(out, "token_embd.weight" if tied else "output.weight")
    assert (found[True, "fast"] == found[True, "default"]).all()
    assert (found[False, "fast"] != found[False, "default"]).any()


@pytest.mark.parametrize("together", [False, True])
def test_experts_in_one_tensor_are_left_to_the_search(together: bool, tmp_path: Path, text: Path) -> None:
    directory = save_tiny(tmp_path / "model", "mixtral")
    if together:
        held = {name: tensor.contiguous() for name, tensor in tiny_model("mixtral").state_dict().items()}
        save_file(held, directory / "model.safetensors", metadata={"format": "pt"})
    plan = fewbits.plan(directory, "Q4_0", calibration=text, calibration_chunks=16)
    methods = {tensor.name: tensor.method for tensor in plan.tensors}
    assert methods["blk.0.ffn_down_exps.weight"] == ("search" if together else "gptq")
    assert methods["blk.0.attn_q.weight"] == "gptq"
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    found = GGUFCheckpoint(made(directory, "Q4_0", text)).tensors
    assert {name: info.shape for name, info in found.items()} == shapes


def test_loses_less_with_more_effort(tmp_path: Path) -> None:
    demo = Path(fewbits.__file__).parent / "demo"
    words = (demo / "held_out.txt").read_text()
    seen, unseen = tmp_path / "seen.txt", tmp_path / "unseen.txt"
    seen.write_text(words[: len(words) // 2])
    unseen.write_text(words[len(words) // 2 :])
    lost = {}
    for effort in ("fast", "default", "thorough"):
        out = made(demo / "model", "Q2_K", seen, effort, chunks=24)
        lost[effort] = fewbits.measure(out, text=unseen, reference=demo / "model", chunks=6).comparison.kl.mean.value
    assert lost["default"] < 0.9 * lost["fast"]
    assert lost["thorough"] < 0.97 * lost["default"]


def test_the_order_of_a_budget_s_types_says_nothing(tmp_path: Path, text: Path) -> None:
    """Of Q8_0 alone importances would not be asked for."""
    directory = save_tiny(tmp_path / "model", "llama", LLAMA)
    told = []
    for types in (("Q8_0", "Q4_0"), ("Q4_0", "Q8_0")):
        options = {"calibration": text, "calibration_chunks": 16, "budget": Budget(bpw=6.0, types=types)}
        plan = fewbits.plan(directory, "gguf", **options)
        told.append(({tensor.name: tensor.codec for tensor in plan.tensors}, plan.notes))
    assert told[0] == told[1]
