"""What changes of a model that cost nothing at run time leave of the error of some decoder blocks' linears.

    python benchmarks/equivalents.py MODEL --type Q4_0 --text wiki.valid.raw --text c4.txt [--blocks 2 8 16 24]

Each line is one input of one block. Its linears are quantized with error feedback after AWQ's scales, as by default;
their outputs' squared error on windows held out, as a share of that, follows for:

- no scales: AWQ's scales left out.
- sorted, by inputs, kurtosis: the input's channels in another order, by the weights' columns (their mean square, or
  the fourth moment over its square) or by the inputs' mean square. For attention output within each value head.
- Hadamard, PCA: rotations; of the value heads, or of the residual stream before the norm in parts of 64 channels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from fewbits.calibration.collect import ENERGY_CAP
from fewbits.codecs.base import codec
from fewbits.codecs.blocks import Blocks
from fewbits.methods import Known, factorize, method
from fewbits.methods.awq import Reader, choose_scales
from fewbits.methods.channel_scales import group_of, round_trip_of

WINDOW, HELD_OUT = 512, 4
"""Tokens of a window, and which share of the windows is held out: one in so many."""
READERS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
NORMS = {"self_attn.q_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm"}
PART = 64
"""Channels of the residual stream that are rotated together."""
Matrices = list[torch.Tensor]


@dataclass
class Place:
    """An input and the linears that read it.

    Attributes:
        weights: float32 [rows, columns] each.
        seen, held: Hessians of two parts of the windows, float32 [columns, columns].
    """

    weights: Matrices
    seen: torch.Tensor
    held: torch.Tensor

    def scaled(self, by: torch.Tensor) -> Place:
        """Columns times `by`, float32 [columns], and inputs divided by it."""
        both = by[:, None] * by
        return Place([weight * by for weight in self.weights], self.seen / both, self.held / both)

    def turned(self, by: torch.Tensor) -> Place:
        """Inputs in another orthonormal basis, float32 [columns, columns]."""
        return Place([weight @ by.T for weight in self.weights], by @ self.seen @ by.T, by @ self.held @ by.T)

    def ordered(self, by: torch.Tensor) -> Place:
        """Columns in descending order of `by`, float32 [columns]."""
        order = by.argsort(descending=True)
        seen, held = (hessian[order][:, order] for hessian in (self.seen, self.held))
        return Place([weight[:, order] for weight in self.weights], seen, held)

    def with_awq(self, kind: Blocks, channel: torch.Tensor) -> Place:
        readers = [Reader(weight, self.seen) for weight in self.weights]
        found = choose_scales(readers, channel, group_of(kind), round_trip_of(kind))
        return self if found is None else self.scaled(found.values[channel])

    def lost(self, kind: Blocks) -> float:
        """Squared error of the outputs on what was held out, all linears together."""
        hessian, total = np.ascontiguousarray(self.seen.numpy()), 0.0
        known = Known(np.ascontiguousarray(hessian.diagonal()), factorize(hessian), hessian)
        for weight in self.weights:
            rows = np.ascontiguousarray(weight.numpy())
            wrong = (method("gptq").make(rows, kind, known).decode() - rows).astype(np.float64)
            total += float(((wrong @ self.held.double().numpy()) * wrong).sum())
        return total


def hessians(model: PreTrainedModel, blocks: list[int], windows: Matrices) -> dict[tuple[int, str, bool], torch.Tensor]:
    """x x^T summed, up to a factor, unusual energies capped; by block, first reader, and held out or not."""
    found: dict[tuple[int, str, bool], torch.Tensor] = {}
    held = False

    def listener(block: int, name: str) -> Callable[..., None]:
        def listen(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(0, 1)
            energy = x.square().mean(1, keepdim=True)
            x = x * (ENERGY_CAP * energy.median() / energy.clamp(min=1e-30)).clamp(max=1).sqrt()
            found[block, name, held] = found.get((block, name, held), 0) + x.T @ x / len(x)

        return listen

    for block in blocks:
        for name in READERS:
            model.model.layers[block].get_submodule(name).register_forward_pre_hook(listener(block, name))
    with torch.no_grad():
        for number, window in enumerate(windows):
            held = number % HELD_OUT == HELD_OUT - 1
            model.model(window[None])
    return found


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's, orthonormal; of the largest power of two that divides `size`, in blocks."""
    part = torch.ones(1, 1)
    while size % (2 * len(part)) == 0 and len(part) < PART:
        part = torch.cat([torch.cat([part, part], 1), torch.cat([part, -part], 1)]) / 2**0.5
    return torch.block_diag(*[part] * (size // len(part)))


def principal(hessian: torch.Tensor, channel: torch.Tensor, head: int) -> torch.Tensor:
    """The principal axes of each value head's channels, over all heads of queries that read it."""
    shared = torch.zeros(int(channel.max()) + 1, head)
    for start in range(0, len(channel), head):
        own = slice(start, start + head)
        shared[channel[own]] += hessian[own, own]
    axes = [torch.linalg.eigh(part)[1].T.flip(0) for part in shared.split(head)]
    return torch.block_diag(*[axes[int(channel[start]) // head] for start in range(0, len(channel), head)])


def changed(
    name: str, plain: Place, scaled: Place, channel: torch.Tensor, head: int, turned: Place
) -> dict[str, Place]:
    """An input's place after every change, by the change's name in the output."""
    size = scaled.weights[0].shape[1]
    power = torch.stack([each.square().mean(0) / each.square().mean() for each in scaled.weights]).sum(0)
    fourth = torch.stack([each.pow(4).mean(0) for each in scaled.weights]).sum(0) / power.square()
    if name == "self_attn.o_proj":
        shared = torch.zeros(int(channel.max()) + 1).index_add_(0, channel, power)[channel]
        # heads stay where they are
        inside = shared / shared.max() / 2 - torch.arange(size) // head
        return {
            "sorted": scaled.ordered(inside),
            "Hadamard": plain.turned(hadamard(size)),
            "PCA": plain.turned(principal(plain.seen, channel, head)),
        }
    orders = {"sorted": scaled.ordered(power), "by inputs": scaled.ordered(scaled.seen.diagonal())}
    if name == "mlp.down_proj":
        return orders | {"kurtosis": scaled.ordered(fourth)}
    return orders | {"Hadamard": turned}


def value_channels(config: PretrainedConfig, size: int) -> torch.Tensor:
    """int64 [columns]: which output of the value projection each input of the attention output is."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    head = size // heads
    column = torch.arange(size)
    return column // head // (heads // shared) * head + column % head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--type", default="Q4_0")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--windows", type=int, default=16, help="of each text")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 8, 16, 24])
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows: Matrices = []
    for text in options.text:
        ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8")[: 1 << 19]).input_ids)
        windows += ids[: ids.numel() // WINDOW * WINDOW].view(-1, WINDOW)[::2][: options.windows]
    found, kind = hessians(model, options.blocks, windows), Blocks(codec(options.type))
    for block in options.blocks:
        layer = model.model.layers[block]
        for name, readers in READERS.items():
            weights = [layer.get_submodule(reader).weight.detach() for reader in readers]
            plain = Place(weights, found[block, name, False], found[block, name, True])
            size = weights[0].shape[1]
            channel = value_channels(model.config, size) if name == "self_attn.o_proj" else torch.arange(size)
            scaled = plain.with_awq(kind, channel)
            norm = layer.get_submodule(NORMS[name]).weight.detach() if name in NORMS else torch.ones(size)
            turned = plain.scaled(norm).turned(hadamard(size)).with_awq(kind, channel) if name in NORMS else plain
            head = size // model.config.num_attention_heads
            base, changes = scaled.lost(kind), changed(name, plain, scaled, channel, head, turned)
            shares = {"no scales": plain, **changes}
            told = ", ".join(f"{what} {place.lost(kind) / base:.3f}" for what, place in shares.items())
            print(f"block {block}, {name}: {told}", flush=True)


if __name__ == "__main__":
    main()
