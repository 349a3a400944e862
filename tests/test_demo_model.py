"""The embedded demo model: it loads, it has learned its text, and its shapes suit every codec."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import fewbits.demo
from fewbits.checkpoint import open_model
from fewbits.tokenizer import gguf_tokenizer

DEMO = Path(fewbits.demo.__file__).parent
FOLDER = DEMO / "model"
CONTEXT = 512


@pytest.fixture(scope="module")
def held_out() -> str:
    return (DEMO / "held_out.txt").read_text("utf-8")


def test_folder_is_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= 10_000_000
    assert 40_000 <= (DEMO / "held_out.txt").stat().st_size <= 80_000


def test_every_linear_has_rows_of_whole_super_blocks_and_sane_weights() -> None:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.bfloat16, name
            assert torch.isfinite(tensor).all(), name
            if tensor.ndim == 2:
                assert tensor.shape[1] % 256 == 0 and tensor.shape[0] % 32 == 0, name
                # Trained, not degenerate: no dead rows, and no single outlier that would swamp a block's scale.
                assert (tensor.float().std(dim=1) > 1e-4).all(), name
                assert tensor.float().abs().max() < 60 * tensor.float().std(), name


def test_it_predicts_held_out_text_far_better_than_token_frequencies(held_out: str) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    tokens = torch.tensor(tokenizer(held_out)["input_ids"])
    counts = np.bincount(tokens.numpy(), minlength=len(tokenizer))
    frequencies = counts[counts > 0] / counts.sum()
    # The best that any unigram model can do on this very text.
    unigram = np.exp(-(frequencies * np.log(frequencies)).sum())
    # Spread over the whole text: its first five windows end a play that was trained on, and are far easier.
    whole = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    windows = whole[np.linspace(0, len(whole) - 1, 4).astype(int)]
    with torch.no_grad():
        logits = model(windows).logits[:, CONTEXT // 2 : -1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, CONTEXT // 2 + 1 :].flatten())
    assert loss.exp() < unigram / 4, (loss.exp(), unigram)


def test_tokenizer_round_trips_and_is_one_that_llama_cpp_knows(held_out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    for text in (
        held_out[:5000],
        "Caf\u00e9, na\u00efve; \u65e5\u672c \U0001f600\t  two  spaces\n\n\nI'll 1234\r\n",
        " leading",
        "",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # Plain text gets no mark, the mark itself is one token.
    assert tokenizer("<|endoftext|>Now")["input_ids"][0] == tokenizer.eos_token_id == 0
    metadata = gguf_tokenizer(FOLDER, json.loads((FOLDER / "config.json").read_text("utf-8")))
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert len(metadata["tokenizer.ggml.tokens"]) == len(tokenizer) == 2048


def test_fewbits_opens_it() -> None:
    model = open_model(FOLDER)
    assert model.shape("lm_head.weight") == (2048, 256)
    assert model.shape("model.layers.3.mlp.down_proj.weight") == (256, 768)


def test_held_out_text_is_the_end_of_its_source(shared_dir: Path, held_out: str) -> None:
    source = (shared_dir / "data" / "calibration" / "shakespeare.txt").read_text("utf-8")
    last_plays = source[-42_000:]
    assert held_out.index(last_plays) < 3_000
    assert source.index(held_out[: held_out.index(last_plays) + 42_000]) > 0.95 * len(source)
