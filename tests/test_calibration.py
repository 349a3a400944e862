"""Calibration: the statistics against transformers' whole model, llama.cpp's files, texts, merging, resuming."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import fewbits
from fewbits.calibration import Statistics, TensorStatistics, read_statistics, write_statistics
from fewbits.calibration.hessians import open_block
from fewbits.calibration.run import calibrate
from fewbits.calibration.texts import read_texts
from fewbits.errors import FewbitsError
from fewbits.formats import journal
from fewbits.forward import streamed
from fewbits.forward.text import encode
from tiny_models import TINY, save_tiny, tiny_tokenizer

WORDS = ["the", "and", "other", "in", "winter", "banner", "hand", "tin", "θ", "inner"]
CONTEXT, CHUNKS = 24, 7
TEMPLATE = "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(0)
    file.write_text(" ".join(rng.choice(WORDS, 600)) + "\n", "utf-8")
    return file


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "llama", "llama")


def sample() -> Statistics:
    rng = np.random.default_rng(1)
    experts = TensorStatistics(rng.uniform(0, 9, (3, 8)).astype(np.float32), np.array([512, 0, 100], np.float32))
    experts.sums[1] = 0
    plain = TensorStatistics(rng.uniform(0, 9, (1, 16)).astype(np.float32), np.array([1024], np.float32))
    tensors = {"blk.0.attn_q.weight": plain, "blk.0.ffn_up_exps.weight": experts}
    return Statistics(tensors, ["wiki.txt", "ä.txt"], 2, 512, ["00ff"], 1024)


# statistics


def test_importance_of_an_expert_without_data_is_the_mean_of_the_others() -> None:
    tensor = sample().tensors["blk.0.ffn_up_exps.weight"]
    importance = tensor.importance()
    assert np.allclose(importance[0], tensor.sums[0] / 512) and np.allclose(importance[2], tensor.sums[2] / 100)
    assert np.allclose(importance[1], importance[[0, 2]].mean()) and importance.dtype == np.float32
    nothing = TensorStatistics(np.zeros((2, 4), np.float32), np.zeros(2, np.float32))
    assert (nothing.importance() == 1).all() and nothing.without_data == [0, 1]


def test_merging_adds_and_keeps_where_it_came_from() -> None:
    first = sample()
    second = Statistics({"blk.0.attn_q.weight": first.tensors["blk.0.attn_q.weight"]}, ["code.txt"], 3, 512, ["aa"], 9)
    both = first.merged([second])
    assert np.allclose(both.tensors["blk.0.attn_q.weight"].sums, 2 * first.tensors["blk.0.attn_q.weight"].sums)
    assert both.tensors["blk.0.attn_q.weight"].counts == [2048]
    assert both.datasets == ["wiki.txt", "ä.txt", "code.txt"] and both.texts_sha256 == ["00ff", "aa"]
    assert both.chunk_count == 5 and both.tokens == 1033
    assert (both.tensors["blk.0.ffn_up_exps.weight"].counts == [512, 0, 100]).all()
    assert first.tensors["blk.0.attn_q.weight"].counts == [1024]


def test_merging_refuses_another_model() -> None:
    other = Statistics({"blk.0.attn_q.weight": TensorStatistics(np.ones((1, 8), np.float32), np.ones(1, np.float32))})
    with pytest.raises(FewbitsError, match="attn_q"):
        sample().merged([other])


def test_merging_splits_the_single_row_of_older_files() -> None:
    first = sample()
    flat = TensorStatistics(np.ones((1, 24), np.float32), np.array([5], np.float32))
    both = first.merged([Statistics({"blk.0.ffn_up_exps.weight": flat})])
    tensor = both.tensors["blk.0.ffn_up_exps.weight"]
    assert tensor.shape == (3, 8) and (tensor.counts == [517, 5, 105]).all()


# files


def test_gguf_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "stats.gguf"
    write_statistics(sample(), path)
    found, wanted = read_statistics(path), sample()
    assert (found.datasets, found.chunk_count, found.chunk_size) == (wanted.datasets, 2, 512)
    assert found.texts_sha256 == ["00ff"] and found.tokens == 1024
    for name, tensor in wanted.tensors.items():
        assert (found.tensors[name].sums == tensor.sums).all() and (found.tensors[name].counts == tensor.counts).all()
    with pytest.raises(FewbitsError, match="exists"):
        write_statistics(sample(), path)
    write_statistics(sample(), path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["stats.gguf"]


def test_dat_round_trip_keeps_the_importance(tmp_path: Path) -> None:
    path = tmp_path / "stats.dat"
    write_statistics(sample(), path, "dat")
    found = read_statistics(path)
    assert found.datasets == ["ä.txt"] and found.chunk_count == 2
    for name, tensor in sample().tensors.items():
        split = found.tensors[name].split(*tensor.shape)
        np.testing.assert_allclose(split.importance(), tensor.importance(), rtol=1e-6)


def test_dat_layout(tmp_path: Path) -> None:
    """A file as older versions of llama-imatrix write it, without the trailing fields."""
    name = b"blk.0.attn_q.weight"
    values = np.array([2.0, 4.0], "<f4")
    path = tmp_path / "old.dat"
    path.write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 2, 2) + values.tobytes())
    found = read_statistics(path).tensors["blk.0.attn_q.weight"]
    assert found.importance().tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("format", ["gguf", "dat"])
def test_every_truncation_is_refused(tmp_path: Path, format: str) -> None:
    path = tmp_path / "whole"
    write_statistics(sample(), path, format)  # type: ignore[arg-type]
    whole = path.read_bytes()
    for length in range(0, len(whole) - 32 if format == "gguf" else len(whole), 3):
        (tmp_path / "cut").write_bytes(whole[:length])
        try:
            assert read_statistics(tmp_path / "cut").tensors.keys() == sample().tensors.keys()  # lost only the end
            assert format == "dat" and length > len(whole) - 32
        except FewbitsError as error:
            assert str(tmp_path / "cut") in str(error)


@settings(max_examples=150, deadline=None)
@given(format=st.sampled_from(["gguf", "dat"]), at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, format: str, at: int, byte: int
) -> None:
    path = tmp_path_factory.mktemp("damage") / "file"
    write_statistics(sample(), path, format)  # type: ignore[arg-type]
    data = bytearray(path.read_bytes())
    data[at % len(data)] = byte
    path.write_bytes(data)
    try:
        found = read_statistics(path)
    except FewbitsError:
        return
    for tensor in found.tensors.values():
        assert np.isfinite(tensor.sums).all() and (tensor.sums >= 0).all() and (tensor.counts >= 0).all()


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused_or_read(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "file"
    path.write_bytes(data)
    with contextlib.suppress(FewbitsError):
        read_statistics(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_sums_are_refused(tmp_path: Path, bad: float) -> None:
    statistics = sample()
    statistics.tensors["blk.0.attn_q.weight"].sums[0, 3] = bad
    for format in ("gguf", "dat"):
        write_statistics(statistics, tmp_path / format, format)  # type: ignore[arg-type]
        with pytest.raises(FewbitsError, match=r"blk\.0\.attn_q\.weight"):
            read_statistics(tmp_path / format)


def test_other_files_are_refused(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(FewbitsError, match="cannot be read"):
        read_statistics(tmp_path / "none")
    (tmp_path / "text").write_text("no importance matrix at all")
    with pytest.raises(FewbitsError, match="importance matrix"):
        read_statistics(tmp_path / "text")
    fewbits.quantize(tiny, "F16", tmp_path / "model.gguf")
    with pytest.raises(FewbitsError, match="model"):
        read_statistics(tmp_path / "model.gguf")


# texts


def test_windows_begin_with_bos_and_files_take_turns(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    (tmp_path / "a.txt").write_text("the and " * 100)
    (tmp_path / "b.txt").write_text("inner " * 100)
    both = read_texts([tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer, 16)
    first = encode(tokenizer, "the and " * 100)[0]
    second = encode(tokenizer, "inner " * 100)[0]
    assert both.inputs[0].tolist() == first[:16] and both.inputs[1].tolist() == second[:16]
    assert len(both.inputs) == (len(first) // 16 + len(second) // 16) + (len(first) % 16 + len(second) % 16) // 16
    few = read_texts([tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer, 16, chunks=3)
    assert (few.inputs == both.inputs[:3]).all() and len(few.sha256) == 2


def test_only_the_beginning_of_a_long_text_is_tokenized(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(" ".join(np.random.default_rng(0).choice(WORDS, 20_000)))
    tokenizer = tiny_tokenizer()
    all_of_it = read_texts([tmp_path / "long.txt"], tokenizer, 32)
    few = read_texts([tmp_path / "long.txt"], tokenizer, 32, chunks=20)
    assert (few.inputs == all_of_it.inputs[:20]).all()


def test_documents_and_conversations(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    lines = [
        {"text": "the hand"},
        {"messages": [{"role": "user", "content": "in"}, {"role": "assistant", "content": "and"}]},
        {"conversations": [{"from": "human", "value": "tin"}, {"from": "gpt", "value": "winter"}]},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    wanted = encode(tokenizer, "the hand")[0] + [0]
    for chat in (
        "<|endoftext|>user: in\n<|endoftext|>assistant: and\n",
        "<|endoftext|>user: tin\n<|endoftext|>assistant: winter\n",
    ):
        wanted += tokenizer(chat, add_special_tokens=False)["input_ids"]
    assert wanted.count(0) == 5
    found = read_texts([path], tokenizer, 8)
    assert found.inputs.ravel().tolist() == wanted[: len(wanted) // 8 * 8]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not an object"),
        ('{"txt": "a"}', "line 2: there is neither"),
        ('{"messages": []}', "line 2: there is neither"),
        ('{"messages": [{"role": "user"}]}', "line 2: a turn"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no chat template"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "the"}\n' + line + "\n")
    with pytest.raises(FewbitsError, match=message):
        read_texts([tmp_path / "bad.jsonl"], tiny_tokenizer(), 4)


def test_a_refusing_template_is_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    with pytest.raises(FewbitsError, match=r"line 1.*roles must alternate"):
        read_texts([tmp_path / "chat.jsonl"], tokenizer, 4)


def test_short_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the")
    with pytest.raises(FewbitsError, match="one window needs 16"):
        read_texts([tmp_path / "short.txt"], tiny_tokenizer(), 16)
    with pytest.raises(FewbitsError, match="0 windows"):
        read_texts([tmp_path / "short.txt"], tiny_tokenizer(), 16, chunks=0)


# collecting


def naive(folder: Path, inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs [tokens, columns] of every layer of transformers' own whole model, by module name; of experts
    `NAME.gate_up.E` and `NAME.down.E`, caught on their way into the matrix product."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    seen: dict[str, list[np.ndarray]] = {}

    def keep(name: str, x: torch.Tensor) -> None:
        seen.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]).numpy().astype(np.float64))

    places = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
        for kind in ("gate_up_proj", "down_proj"):
            weight = getattr(module, kind, None)
            if isinstance(weight, torch.nn.Parameter):
                for expert in range(len(weight)):
                    places[weight[expert].data_ptr()] = f"{name}.{kind}.{expert}"

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.nn.functional.linear and args[1].data_ptr() in places:
                keep(places[args[1].data_ptr()], args[0])
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        for window in torch.from_numpy(inputs):
            model(window[None], use_cache=False)
    return {name: np.concatenate(parts) for name, parts in seen.items()}


LAYERS = {
    "llama": {
        "attn_q": "model.layers.{i}.self_attn.q_proj", "attn_k": "model.layers.{i}.self_attn.k_proj",
        "attn_v": "model.layers.{i}.self_attn.v_proj", "attn_output": "model.layers.{i}.self_attn.o_proj",
        "ffn_gate": "model.layers.{i}.mlp.gate_proj", "ffn_up": "model.layers.{i}.mlp.up_proj",
        "ffn_down": "model.layers.{i}.mlp.down_proj",
    },
    "gpt2": {
        "attn_qkv": "transformer.h.{i}.attn.c_attn", "attn_output": "transformer.h.{i}.attn.c_proj",
        "ffn_up": "transformer.h.{i}.mlp.c_fc", "ffn_down": "transformer.h.{i}.mlp.c_proj",
    },
    "phi3": {
        "attn_qkv": "model.layers.{i}.self_attn.qkv_proj", "attn_output": "model.layers.{i}.self_attn.o_proj",
        "ffn_up": "model.layers.{i}.mlp.gate_up_proj", "ffn_down": "model.layers.{i}.mlp.down_proj",
    },
}  # fmt: skip
LAYERS["gemma2"] = LAYERS["llama"]
EXPERTS = {"ffn_gate_exps": "gate_up_proj", "ffn_up_exps": "gate_up_proj", "ffn_down_exps": "down_proj"}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3"])
def test_sums_and_hessians_are_those_of_the_whole_model(
    tmp_path: Path, text: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "BATCH_TOKENS", 3 * CONTEXT)  # the last batch is not full
    folder = save_tiny(tmp_path / "model", name)
    found = calibrate(
        folder, text, context=CONTEXT, chunks=CHUNKS, hessians=tmp_path / "h", output_tensor=True, threads=1
    )
    tensors = found.statistics.tensors
    seen = naive(folder, read_texts([text], tiny_tokenizer(), CONTEXT, CHUNKS).inputs)
    layers = 3 if name == "gemma2" else 2
    wanted = {f"blk.{i}.{k}.weight": seen[v.format(i=i)] for i in range(layers) for k, v in LAYERS[name].items()}
    head = "output.weight" if name in ("llama", "phi3") else "token_embd.weight"
    assert set(tensors) == set(wanted) | {head} and not found.report.warnings
    for tensor, x in [*wanted.items(), (head, seen["lm_head"])]:
        assert tensors[tensor].counts == [CONTEXT * CHUNKS]
        np.testing.assert_allclose(tensors[tensor].sums[0], (x**2).sum(0), rtol=2e-4)
        if tensor != head:
            known = open_block(tmp_path / "h", int(tensor.split(".")[1]))
            assert known.counts[known.same[tensor]] == [CONTEXT * CHUNKS]
            assert known.texts == found.statistics.texts_sha256
            np.testing.assert_allclose(known.read(tensor), x.T @ x / len(x), rtol=1e-3, atol=1e-4 * (x**2).mean())


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_every_expert_has_its_own_sums(tmp_path: Path, text: Path, name: str) -> None:
    folder = save_tiny(tmp_path / "model", name)
    found = calibrate(folder, text, context=CONTEXT, chunks=CHUNKS, hessians=tmp_path / "h", threads=1)
    seen = naive(folder, read_texts([text], tiny_tokenizer(), CONTEXT, CHUNKS).inputs)
    for block in range(2):
        for kind, parameter in EXPERTS.items():
            tensor = found.statistics.tensors[f"blk.{block}.{kind}.weight"]
            known, weight = open_block(tmp_path / "h", block), f"blk.{block}.{kind}.weight"
            assert tensor.counts.sum() == 2 * CONTEXT * CHUNKS
            assert (known.counts[known.same[weight]] == tensor.counts).all()
            for expert in range(4):
                x = seen.get(f"model.layers.{block}.mlp.experts.{parameter}.{expert}", np.zeros((0, tensor.shape[1])))
                assert tensor.counts[expert] == len(x)
                np.testing.assert_allclose(tensor.sums[expert], (x**2).sum(0), rtol=1e-3, atol=1e-6)
                mean = x.T @ x / max(1, len(x))
                np.testing.assert_allclose(
                    known.read(weight, expert), mean, rtol=1e-3, atol=1e-3 * max(1e-9, mean.max())
                )
    assert len(found.report.experts) == 2 and sum(found.report.experts[0].counts) == 2 * CONTEXT * CHUNKS


def test_experts_without_data_are_named(tmp_path: Path, text: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen3-moe", {"num_experts": 64})
    report = calibrate(folder, text, context=8, chunks=1).report
    assert report.experts[0].without_data and report.experts[0].least == 0
    assert "experts" in report.warnings[0] and "blk.0" in report.warnings[0]
    assert report.expert_rows()[0][0] == "blk.0"


@pytest.mark.parametrize("name", sorted(set(TINY) - {"gemma3-pattern"}))
def test_every_family_has_statistics_of_every_linear(tmp_path: Path, text: Path, name: str) -> None:
    """From the directory and from the GGUF file made of it."""
    folder = save_tiny(tmp_path / "model", name)
    fewbits.quantize(folder, "F32", tmp_path / "model.gguf")
    direct = calibrate(folder, text, context=16, chunks=2)
    through = calibrate(tmp_path / "model.gguf", text, context=16, chunks=2)
    assert not direct.report.warnings or "experts" in direct.report.warnings[0]
    assert set(direct.statistics.tensors) == set(through.statistics.tensors)
    for key, tensor in direct.statistics.tensors.items():
        np.testing.assert_allclose(tensor.sums, through.statistics.tensors[key].sums, rtol=1e-3, err_msg=key)


def test_inputs_that_are_not_finite_are_named(tmp_path: Path, text: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[1].mlp.up_proj.weight.data[3] = float("inf")
    model.save_pretrained(folder)
    with pytest.raises(FewbitsError, match=r"blk\.1\.ffn_down\.weight"):
        calibrate(folder, text, tmp_path / "out.gguf", context=CONTEXT)
    assert not (tmp_path / "out.gguf").exists()


# the whole verb


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    folder = save_tiny(tmp_path / "model", "qwen3-moe", {"num_hidden_layers": 5})
    options = {"context": CONTEXT, "threads": 1}
    whole, parts = tmp_path / "whole.gguf", tmp_path / "parts.gguf"
    calibrate(folder, text, whole, hessians=tmp_path / "h-whole", **options)  # type: ignore[arg-type]
    monkeypatch.setattr(journal, "SAFE_EVERY", 0.0)
    monkeypatch.setattr(journal, "SAFE_SHARE", 1e9)

    def stop(done: int, total: int, what: str) -> None:
        if done == after:
            raise Stop

    with pytest.raises(Stop):
        calibrate(folder, text, parts, hessians=tmp_path / "h", progress=stop, **options)  # type: ignore[arg-type]
    assert not parts.exists() and not (tmp_path / "h").exists()
    with pytest.raises(FewbitsError, match="unfinished"):
        calibrate(folder, text, parts, context=CONTEXT, chunks=3)
    done = calibrate(folder, text, parts, hessians=tmp_path / "h", **options)  # type: ignore[arg-type]
    assert done.report.resumed_after == after
    assert parts.read_bytes() == whole.read_bytes()
    for file in (tmp_path / "h-whole").iterdir():
        assert file.read_bytes() == (tmp_path / "h" / file.name).read_bytes()
    assert not list(tmp_path.glob("*.partial*"))


def test_hessians_of_another_run_are_not_gone_on_with(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two interrupted runs share the folder of Hessians: each finds out that what lies there is not its own."""
    monkeypatch.setattr(journal, "SAFE_EVERY", 0.0)
    monkeypatch.setattr(journal, "SAFE_SHARE", 1.0)
    folder = save_tiny(tmp_path / "model", "llama", {"num_hidden_layers": 4})
    other = tmp_path / "other.txt"
    other.write_text("winter banner tin " * 300, "utf-8")

    class Stop(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        if done == 2 and what == "decoder blocks":
            raise Stop

    options = {"context": CONTEXT, "chunks": CHUNKS, "hessians": tmp_path / "h", "threads": 1}
    for source, name in ((text, "a"), (other, "b")):
        with pytest.raises(Stop):
            calibrate(folder, source, tmp_path / name, progress=stop, **options)
    found = calibrate(folder, text, tmp_path / "a", **options)
    for block in range(4):
        weight = f"blk.{block}.attn_q.weight"
        sums = found.statistics.tensors[weight].sums[0] / (CONTEXT * CHUNKS)
        np.testing.assert_allclose(open_block(tmp_path / "h", block).read(weight).diagonal(), sums, rtol=1e-4)


def test_a_file_in_the_way_is_named(tmp_path: Path, text: Path, tiny: Path) -> None:
    (tmp_path / "s.gguf.partial").write_text("mine")
    with pytest.raises(FewbitsError, match="in the way"):
        calibrate(tiny, text, tmp_path / "s.gguf", context=CONTEXT, chunks=1)


def test_a_damaged_state_means_beginning_anew(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    monkeypatch.setattr(journal, "SAFE_EVERY", 0.0)

    def stop(done: int, total: int, what: str) -> None:
        raise Stop

    output = tmp_path / "out.gguf"
    with pytest.raises(Stop):
        calibrate(folder, text, output, context=CONTEXT, progress=stop)
    state = tmp_path / "out.gguf.partial" / "activations" / "after-00001" / "hidden.npy"
    state.write_bytes(state.read_bytes()[:100])
    assert calibrate(folder, text, output, context=CONTEXT).report.resumed_after == 0
    with pytest.raises(Stop):
        calibrate(folder, text, output, context=CONTEXT, progress=stop, overwrite=True)
    assert calibrate(folder, text, output, context=CONTEXT, chunks=3, overwrite=True).report.windows == 3
    assert not (tmp_path / "out.gguf.partial").exists()


def test_merging_on_the_way_and_alone(tmp_path: Path, text: Path, tiny: Path) -> None:
    one = calibrate(tiny, text, tmp_path / "one.gguf", context=CONTEXT, chunks=2)
    both = calibrate(tiny, text, tmp_path / "both.gguf", context=CONTEXT, chunks=2, merge=[tmp_path / "one.gguf"])
    alone = calibrate(tiny, merge=[tmp_path / "one.gguf", tmp_path / "one.gguf"])
    for name, tensor in one.statistics.tensors.items():
        for merged in (both, alone):
            assert np.allclose(merged.statistics.tensors[name].sums, 2 * tensor.sums)
            assert merged.statistics.tensors[name].counts == 2 * tensor.counts
    assert both.statistics.chunk_count == 4


def test_requests_that_cannot_be_met(tmp_path: Path, text: Path, tiny: Path) -> None:
    (tmp_path / "there.gguf").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter.txt").write_text("")
    (tmp_path / "way.partial").mkdir()
    (tmp_path / "way.partial" / "letter.txt").write_text("")
    for options, message in (
        ({"output": tmp_path / "there.gguf"}, "exists"),
        ({"output": tmp_path / "no" / "out.gguf"}, "does not exist"),
        ({"hessians": tmp_path / "folder"}, "no folder of Hessians"),
        ({"hessians": tmp_path / "folder", "overwrite": True}, "no folder of Hessians"),
        ({"hessians": tmp_path / "no" / "h"}, "does not exist"),
        ({"hessians": tmp_path / "way"}, "no folder of Hessians"),
        ({"output": tmp_path / "way"}, "in the way"),
        ({"format": "npz"}, "format"),
        ({"device": "tpu"}, "device"),
        ({"context": 0}, "context"),
        ({"context": 1000}, "512 positions"),
        ({"merge": [tmp_path / "none.gguf"]}, "cannot be read"),
    ):
        with pytest.raises(FewbitsError, match=message):
            calibrate(tiny, text, **options)  # type: ignore[arg-type]
    with pytest.raises(FewbitsError, match="nothing to calibrate"):
        calibrate(tiny)
    with pytest.raises(FewbitsError, match="no Hessian"):
        open_block(tmp_path, 0)


def test_the_verb(tmp_path: Path, text: Path, tiny: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fewbits",
        "calibrate",
        str(tiny),
        "--text",
        str(text),
        "--context",
        "16",
        "--chunks",
        "2",
    ]
    done = subprocess.run([*command, "-o", str(tmp_path / "a.gguf")], capture_output=True, text=True, check=True)
    assert "ffn_down" in done.stdout and "32 tokens in 2 windows" in done.stderr
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "a.dat"), "--format", "dat", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["tokens"] == 32
    assert read_statistics(tmp_path / "a.dat").tensors.keys() == read_statistics(tmp_path / "a.gguf").tensors.keys()
    again = subprocess.run([*command, "-o", str(tmp_path / "a.gguf")], capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "exists" in again.stderr


# llama.cpp's own tools


def _llama_cpp() -> Path | None:
    """Folder of llama.cpp's executables: $FEWBITS_LLAMA_CPP_BIN, else that of llama-imatrix on the path."""
    named, found = os.environ.get("FEWBITS_LLAMA_CPP_BIN"), shutil.which("llama-imatrix")
    folder = Path(named) if named else Path(found).parent if found else None
    return folder if folder and (folder / "llama-imatrix").exists() else None


LLAMA_CPP = _llama_cpp()


def llama_imatrix_finds_the_same(tmp_path: Path, name: str) -> None:
    assert LLAMA_CPP
    wide = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 288} if name != "gpt2" else {"n_embd": 256}
    folder = save_tiny(tmp_path / "model", name, wide)
    source = tmp_path / "text.txt"
    source.write_text(" ".join(np.random.default_rng(3).choice(WORDS, 3000)))
    fewbits.quantize(folder, "F32", tmp_path / "model.gguf")
    theirs = tmp_path / "theirs.gguf"
    run = [LLAMA_CPP / "llama-imatrix", "-m", tmp_path / "model.gguf", "-f", source, "-c", "64", "--chunks", "6"]
    subprocess.run([*run, "-o", theirs, "-t", "1", "--no-ppl"], check=True, capture_output=True)
    peer = read_statistics(theirs)
    ours = calibrate(folder, source, tmp_path / "ours.gguf", context=64, chunks=6).statistics
    assert set(peer.tensors) == set(ours.tensors) and peer.chunk_size == ours.chunk_size == 64
    for key, tensor in peer.tensors.items():
        assert tensor.shape == ours.tensors[key].shape
        assert abs(tensor.counts - ours.tensors[key].counts).max() <= 2, key  # a tie in the routing
        used = tensor.counts > 4
        a, b = tensor.importance()[used], ours.tensors[key].importance()[used]
        assert np.median(abs(a / b - 1)) < 0.005, key
    for format in ("gguf", "dat"):
        write_statistics(ours, tmp_path / f"again.{format}", format, overwrite=True)  # type: ignore[arg-type]
        quantize = [LLAMA_CPP / "llama-quantize", "--imatrix", tmp_path / f"again.{format}", tmp_path / "model.gguf"]
        done = subprocess.run([*quantize, tmp_path / "q.gguf", "Q4_K"], check=True, capture_output=True, text=True)
        assert f"have {len(ours.tensors)} importance matrix entries" in done.stdout
        assert "did not find weights for blk." not in done.stdout + done.stderr


if LLAMA_CPP:  # no package installs these: where they are not, there is nothing to skip
    test_llama_imatrix_finds_the_same = pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])(
        llama_imatrix_finds_the_same
    )
