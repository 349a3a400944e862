"""Trains the small model that fewbits carries for its demo, and writes src/fewbits/demo/model and held_out.txt.

The model is a real one: a Llama of 4.2 million parameters that predicts Elizabethan English far better than chance, so
that quantizing it loses something that can be measured. Both texts are in the public domain:

* Shakespeare: the 1.1 MB of plays known as "tiny shakespeare" (any plain text of the plays will do).
* The King James Bible, as Debian packages it, one verse a line:
      apt-get install bible-kjv bible-kjv-text
      bible -f 'gen1:1-rev22:21' | sed 's/^[^ ]* //' > bible.txt

    python tools/train_demo_model.py --text shakespeare.txt bible.txt --work build/demo

The last 5 % of each file is never trained on, not even the tokenizer. The end of that part becomes held_out.txt, which
is looked at once, after training; the rest of it chooses the checkpoint. The run can be stopped and started again: it
goes on from its last checkpoint in --work. The same seed on the same number of threads gives the same model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
CONTEXT = 512
HELD_OUT_SHARE = 0.05
# One window in four begins with <|endoftext|>, so that the model knows it as a start and does not depend on it.
MARKED_SHARE = 0.25
# Attention over 256 tokens is cheaper; the whole context is learned while the learning rate falls.
SHORT = 256
DECAY_SHARE = 0.3
DEMO = Path(__file__).resolve().parent.parent / "src" / "fewbits" / "demo"


def demo_config() -> LlamaConfig:
    """The architecture: every linear has rows of 256 or 768 weights, whole super-blocks of the K- and IQ-quants."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )


def split(text: str, held_out_bytes: int) -> tuple[str, str, str]:
    """Cuts a text at line ends into the part to train on, the part that chooses the checkpoint and the held-out end.

    The last two together are the last 5 %, of which the held-out end takes about `held_out_bytes` bytes.
    """
    first = text.index("\n", int(len(text) * (1 - HELD_OUT_SHARE))) + 1
    second = max(text.index("\n", len(text) - held_out_bytes) + 1, first)
    return text[:first], text[first:second], text[second:]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with exactly the pre-tokenizer of GPT-2, which llama.cpp knows as "gpt-2"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line for text in texts for line in text.splitlines(keepends=True)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        add_bos_token=False,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> NDArray[np.int64]:
    """The tokens of a text, line ends included, none added."""
    return np.array(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def batch(parts: list[NDArray[np.int64]], seed: int, step: int, rows: int, length: int) -> torch.Tensor:
    """Random windows [rows, length + 1], a pure function of seed and step, so that a resumed run sees the same ones.

    A file is drawn in proportion to the square root of its size: the small one is seen more often than its share.
    """
    random = np.random.default_rng((seed, step))
    weights = np.sqrt([len(part) for part in parts])
    windows = np.empty((rows, length + 1), dtype=np.int64)
    for row, which in enumerate(random.choice(len(parts), size=rows, p=weights / weights.sum())):
        start = random.integers(len(parts[which]) - length)
        windows[row] = parts[which][start : start + length + 1]
        if random.random() < MARKED_SHARE:
            windows[row, 0] = 0
    return torch.from_numpy(windows)


def loss_of(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods [rows, length] in nats of each token but the first of windows [rows, length + 1]."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.training):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    flat = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return flat.view(len(windows), -1)


@torch.no_grad()
def token_losses(model: LlamaForCausalLM, tokens: NDArray[np.int64], limit: int | None = None) -> NDArray[np.float64]:
    """The losses [windows, 511] of consecutive windows of 512 tokens, the incomplete last one left out."""
    count = min(len(tokens) // CONTEXT, limit or len(tokens))
    windows = torch.from_numpy(tokens[: count * CONTEXT].reshape(count, CONTEXT))
    model.eval()
    losses = torch.cat([loss_of(model, rows) for rows in windows.split(8)])
    return losses.double().numpy()


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Up in a line, then level, then down to zero in a line over the last `DECAY_SHARE` of the steps."""
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / (steps * DECAY_SHARE))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def write_whole(state: object, path: Path) -> None:
    """torch.save that never leaves half a file behind."""
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def train(
    model: LlamaForCausalLM,
    parts: list[NDArray[np.int64]],
    validation: list[NDArray[np.int64]],
    arguments: argparse.Namespace,
) -> dict[str, float]:
    """Trains in place with AdamW, leaves the weights that were best on `validation`, and returns the run's figures."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": arguments.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=arguments.learning_rate,
        betas=(0.9, 0.99),
    )
    saved = arguments.work / "state.pt"
    step, seconds, stale, best, best_step, best_weights = 0, 0.0, 0, math.inf, 0, model.state_dict()
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, stale = state["step"], state["seconds"], state["stale"]
        best, best_step, best_weights = state["best"], state["best_step"], state["best_weights"]
        print(f"goes on from step {step}", flush=True)
    running, running_steps = 0.0, 0
    started = time.monotonic() - seconds
    while step < arguments.steps and stale < arguments.patience:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.learning_rate, arguments.warmup)
        model.train()
        length = SHORT if step < arguments.steps * (1 - DECAY_SHARE) else CONTEXT
        windows = batch(parts, arguments.seed, step, arguments.tokens // length, length)
        loss = loss_of(model, windows).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running, running_steps, step = running + loss.item(), running_steps + 1, step + 1
        if step % arguments.every and step < arguments.steps:
            continue
        # Per file, so that the long Bible does not decide alone.
        now = float(np.mean([token_losses(model, tokens, limit=12).mean() for tokens in validation]))
        stale = 0 if now < best else stale + 1
        if now < best:
            best, best_step = now, step
            best_weights = {name: value.clone() for name, value in model.state_dict().items()}
        seconds = time.monotonic() - started
        print(
            f"step {step} of {arguments.steps}, {seconds:.0f} s: "
            f"train {running / running_steps:.4f}, validation {now:.4f}, best {best:.4f}",
            flush=True,
        )
        running, running_steps = 0.0, 0
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
        state |= {"stale": stale, "best": best, "best_step": best_step, "best_weights": best_weights}
        write_whole(state, saved)
    model.load_state_dict(best_weights)
    return {
        "steps": step,
        "kept step": best_step,
        "tokens seen": step * arguments.tokens,
        "seconds": round(seconds),
    }


def perplexities(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: NDArray[np.int64]
) -> dict[str, float]:
    """Perplexity by both conventions over windows of 512 tokens, and the bits that each byte costs."""
    losses = token_losses(model, tokens)
    # Byte-level tokens spell each byte as one character, so a token's length is its number of bytes.
    lengths = np.array([len(token) for token in tokenizer.convert_ids_to_tokens(range(VOCABULARY))])
    scored = tokens[: len(losses) * CONTEXT].reshape(-1, CONTEXT)[:, 1:]
    return {
        "tokens": int(losses.size),
        "perplexity, all positions": float(np.exp(losses.mean())),
        # llama.cpp scores the predictions at positions 256 to 510 of each window.
        "perplexity, second half": float(np.exp(losses[:, CONTEXT // 2 :].mean())),
        "bits per byte": float(losses.sum() / math.log(2) / lengths[scored].sum()),
    }


def unigram(train_tokens: NDArray[np.int64], tokens: NDArray[np.int64]) -> float:
    """The perplexity of a model that knows only how frequent each token is in the training text."""
    counts = np.bincount(train_tokens, minlength=VOCABULARY) + 1.0
    return float(np.exp(-np.log(counts / counts.sum())[tokens].mean()))


def figures(
    texts: list[tuple[str, str, str]],
    names: list[str],
    tokenizer: PreTrainedTokenizerFast,
    model: LlamaForCausalLM,
    untrained: LlamaForCausalLM,
) -> Iterator[tuple[str, dict[str, float]]]:
    """One row a text: the baselines and the model, measured on the training text's start and on the held-out text."""
    train_tokens = np.concatenate([encode(tokenizer, parts[0]) for parts in texts])
    for name, (trained_on, _, held_out) in zip(names, texts, strict=True):
        yield f"{name}, trained on", perplexities(model, tokenizer, encode(tokenizer, trained_on[:120_000]))
        tokens = encode(tokenizer, held_out)
        yield f"{name}, held out", perplexities(model, tokenizer, tokens)
    tokens = encode(tokenizer, "".join(parts[2] for parts in texts))
    yield "held_out.txt", perplexities(model, tokenizer, tokens)
    yield "held_out.txt, untrained model", perplexities(untrained, tokenizer, tokens)
    yield "held_out.txt, unigram", {"perplexity, all positions": unigram(train_tokens, tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 texts to train on")
    parser.add_argument(
        "--held-out-bytes",
        type=int,
        nargs="+",
        default=[44_000, 16_000],
        metavar="N",
        help="for each text, the bytes at its end that go into held_out.txt (default: 44000 16000)",
    )
    parser.add_argument("--out", type=Path, default=DEMO, help="where model/ and held_out.txt go")
    parser.add_argument("--work", type=Path, required=True, help="a folder for checkpoints and figures.json")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a step, a multiple of 512")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--patience", type=int, default=5, help="stop after so many checkpoints that were no better")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if len(arguments.held_out_bytes) != len(arguments.text):
        parser.error("--held-out-bytes needs one number for each --text")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.work.mkdir(parents=True, exist_ok=True)

    names = [path.name for path in arguments.text]
    sizes = arguments.held_out_bytes
    texts = [split(path.read_text("utf-8"), size) for path, size in zip(arguments.text, sizes, strict=True)]
    tokenizer = train_tokenizer([trained_on for trained_on, _, _ in texts])
    parts = [encode(tokenizer, trained_on) for trained_on, _, _ in texts]
    validation = [encode(tokenizer, chooses) for _, chooses, _ in texts]
    for name, text, part in zip(names, texts, parts, strict=True):
        share = len(text[0].encode()) / len(part)
        print(f"{name}: {len(part)} tokens to train on, {share:.2f} bytes each", flush=True)

    untrained = LlamaForCausalLM(demo_config())
    model = LlamaForCausalLM(demo_config())
    model.load_state_dict(untrained.state_dict())
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    report: dict[str, dict[str, float]] = {"run": train(model, parts, validation, arguments)}

    folder = arguments.out / "model"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # What save_pretrained writes of its own accord is for one version of transformers only, or says nothing.
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    (arguments.out / "held_out.txt").write_text("".join(held_out for _, _, held_out in texts), "utf-8")
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone, a wheel would keep that
    # The figures are those of the file that was written, bf16 rounding included.
    written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    report |= figures(texts, names, tokenizer, written, untrained)
    print(json.dumps(report, indent=2))
    write_json(arguments.work / "figures.json", report)


if __name__ == "__main__":
    main()
