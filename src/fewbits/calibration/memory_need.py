"""What running text through a model takes in memory, from headers alone. All terms are bytes and upper bounds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from fewbits import arch
from fewbits.calibration.collect import HELD_COLUMNS
from fewbits.checkpoint import Model
from fewbits.forward.streamed import BATCH_TOKENS
from fewbits.limits import HESSIANS, Limits, Need, largest, resident
from fewbits.methods.inverse_cholesky import PANEL
from fewbits.spill import Spill

LIBRARIES = 450 << 20
"""What a process that has loaded torch still loads: the model's classes, kernels, and buffers of matrix products."""
SPILLED = 1 << 26
"""Where memory is short, arrays of more bytes are put into files."""
ROUNDS = (HESSIANS, HESSIANS >> 2, HESSIANS >> 4, 0)
"""Bytes of experts' Hessians at once: what is tried. The last is one Hessian."""
OF_GRADIENTS, OF_TUNING = 12, 16
"""Bytes by the weight of a block: weights, their gradients and the squares of these; in tuning what each of two steps
adds to a weight, the weight, its copy in bfloat16, its code."""
LESS_TEXT = "Allow more memory, or take fewer --calibration-chunks"


@dataclass(frozen=True)
class Block:
    """The decoder block of a model that has most parameters.

    Attributes:
        name: prefix of its tensors.
        weights: its parameters.
        matrix: parameters of its largest tensor.
        inputs: columns of the inputs of its linears -> how many experts have one of their own.
        widest: the linear with most columns.
        outside: shape of the largest tensor outside of the blocks: the embeddings, or the head.
        scores: attention scores of a token that are held at once.
        filed: parameters of those linears that go to files where memory is scarce.
    """

    name: str
    weights: int
    matrix: int
    inputs: dict[int, int]
    widest: str
    outside: tuple[int, ...]
    scores: int
    filed: int = 0

    @staticmethod
    def of(model: Model, context: int) -> Block:
        shapes = {name: model.shape(name) for name in model.names}
        inside: dict[str, list[str]] = {}
        for name in shapes:
            if found := re.match(r".*?\.\d+(?=\.)", name):
                inside.setdefault(found[0], []).append(name)
        block = max(inside, key=lambda one: sum(prod(shapes[name]) for name in inside[one]))
        linears = [x for x in arch.decoder_linears(model.config, shapes) if x.weight.startswith(f"{block}.")]
        # GPT-2 stores [in, out]; experts in one tensor are [experts, out, in]
        columns = {x.weight: shapes[x.weight][-1] if x.plain else max(shapes[x.weight][-2:]) for x in linears}
        alike = Counter(re.sub(r"\.\d+\.", ".*.", x.module) for x in linears)
        inputs: dict[int, int] = {}
        for linear in linears:
            stored = shapes[linear.weight]
            experts = stored[0] if len(stored) == 3 else alike[re.sub(r"\.\d+\.", ".*.", linear.module)]
            inputs[columns[linear.weight]] = max(inputs.get(columns[linear.weight], 1), experts)
        others = [shape for name, shape in shapes.items() if not any(name in names for names in inside.values())]
        heads = model.config.get("num_attention_heads") or model.config.get("n_head") or 1
        return Block(
            block,
            sum(prod(shapes[name]) for name in inside[block]),
            max(prod(shapes[name]) for name in inside[block]),
            inputs,
            max(columns, key=lambda name: columns[name]),
            max(others, key=prod),
            int(heads) * context if model.config.get("attn_logit_softcapping") else 0,
            sum(prod(shapes[x.weight]) for x in linears if x.plain and 4 * prod(shapes[x.weight]) > SPILLED),
        )

    @property
    def columns(self) -> int:
        return max(self.inputs)

    @property
    def hidden(self) -> int:
        return self.outside[-1]


@dataclass(frozen=True)
class TextRun:
    """Windows of text on their way through a model, one decoder block in memory.

    Attributes:
        hessians: what methods use of them, as `Method.hessian` has it; empty: none are made.
        of_weight: bytes that quantizing takes for each weight of a matrix.
        of_square: and for each square of its columns.
        all_inputs: whether the Hessians of all inputs of a block are held at once.
        copies: further copies of all activations.
        gradients: bytes by the weight of a block that gradients take, with what they need; 0: none are taken.
        waits: whether windows wait within a block.
        head: weights of the head, where it is quantized, too.
    """

    block: Block
    windows: int
    context: int
    hessians: Collection[str] = ()
    of_weight: float = 0.0
    of_square: float = 0.0
    all_inputs: bool = False
    copies: int = 0
    gradients: int = 0
    waits: bool = False
    head: int = 0
    way_out: str = f"{LESS_TEXT}."

    @property
    def together(self) -> int:
        return min(self.windows, max(1, BATCH_TOKENS // self.context))

    @property
    def batches(self) -> int:
        return -(-self.windows // self.together)

    def needs(self, limits: Limits) -> Iterator[Need]:
        """The moments that may be the worst."""
        block, spilled = self.block, limits.spill.above
        tokens, batch, hidden = self.windows * self.context, self.together * self.context, self.block.hidden
        program = {"program": resident() + LIBRARIES}
        embedding = 4 * prod(block.outside)
        # what goes to a file is read by rows
        yield Need("the embedding", program | {"weights": 4 * SPILLED if embedding > spilled else 3 * embedding // 2})
        kept = 4 * tokens * hidden
        # of linears in files one is in memory; tuning and folded scales go through all of them
        filed = block.filed if limits.spill.scarce and not (self.gradients or self.all_inputs) else 0
        base = program | {
            "block": 4 * (block.weights - filed + (block.matrix if filed else 0)),
            "activations": (1 + self.copies) * (4 * batch * hidden if kept > spilled else kept),
        }
        # also as read, or rounded to bfloat16
        running = {
            "its largest tensor once more": 4 * block.matrix,
            "a batch of windows": 4 * batch * (8 * hidden + 4 * block.columns + 2 * block.scores),
        }
        yield Need(block.name, base | running, self.way_out)
        if self.gradients:
            # of the head a window's logits
            taken = {"gradients": self.gradients * block.weights}
            yield Need(block.name, base | running | taken, self.way_out)
            logits = 6 * 4 * self.context * block.outside[0]
            yield Need("the head", program | {"weights": 3 * embedding // 2, "logits and gradients": logits})
        if self.head:
            work = round((6 + self.of_weight) * self.head)
            yield Need("the head", program | {"activations": base["activations"], "quantizing it": work}, self.way_out)
        if self.waits:
            waiting = self.batches if limits.parked is None else min(self.batches, limits.parked)
            base["windows that wait"] = waiting * 4 * batch * (4 * hidden + block.columns)
            quantizing = {"quantizing a matrix": round(self.of_weight * block.matrix)}
            yield Need(block.name, base | quantizing, self.way_out)
        if self.hessians:
            for columns, experts in block.inputs.items():
                if self.waits:  # in rounds of experts
                    experts = min(experts, max(1, limits.hessians // (4 * columns * columns)))
                yield from self._hessian(columns, experts, base, running, spilled)

    def _hessian(
        self, columns: int, experts: int, base: dict[str, int], running: dict[str, int], spilled: int
    ) -> Iterator[Need]:
        """Of one input, while it is summed, factored and used.

        Args:
            experts: whose Hessians are summed at once.
        """
        what = f"{self.block.widest if columns == self.block.columns else self.block.name} with {columns} columns"
        square, panel = columns * columns, 8 * min(PANEL, columns) * columns
        feeds_back = "factor" in self.hessians
        # experts have no part of the text held out; what else has as many columns may
        held = feeds_back and columns <= HELD_COLUMNS
        every = 2 * sum(4 * each * each * count for each, count in self.block.inputs.items())
        # and the product of one batch
        summed = every if self.all_inputs else 4 * square * max(experts, 2 if held else 1)
        yield Need(what, base | running | {"its Hessian, being summed": summed + square}, self.way_out)
        if not self.waits:
            # of all windows, and of a group of them; then the mean, and once more for the file
            yield Need(what, base | running | {"Hessians": 2 * summed}, self.way_out)
            yield Need(what, base | {"Hessians": summed, "their means": 8 * square * experts}, self.way_out)
            return
        rest = every if self.all_inputs else 0
        others = rest + 4 * square * (experts - 1)
        mean = panel // 4 if 4 * square > spilled else 4 * square
        wide = 3 * panel if 8 * square > spilled else 8 * square + 3 * panel
        if feeds_back:
            made = max(others + mean + wide + 4 * square, rest + 16 * square + wide if held else 0)
            yield Need(what, base | {"its Hessian and the factor": made}, self.way_out)
        matrix = self.of_weight * self.block.matrix + self.of_square * square
        used = {"its Hessian and the factor": others + mean + (4 * square if feeds_back else 0)}
        yield Need(what, base | used | {"quantizing a matrix": round(matrix)}, self.way_out)

    def check(self, most: int) -> None:
        """Refuse what takes more, where nothing can be made smaller.

        Raises:
            FewbitsError: it takes more.
        """
        worst = largest(self.needs(Limits()))
        if worst.total > most:
            raise worst.refusal(most)

    def limits(self, most: int | None, folder: Path | None, threads: int | None) -> Limits:
        """How to keep within so many bytes.

        Args:
            folder: where spilled arrays go.

        Raises:
            FewbitsError: that cannot be.
        """
        usual = Limits(threads, Spill(folder=folder))
        if most is None:
            return usual
        tight = replace(usual, spill=Spill(SPILLED, folder), threads=1)
        for start in (usual, tight):
            for parked in (None, self.batches // 2, self.batches // 4, 1, 0) if self.waits else (None,):
                # more rounds cost nothing to windows that wait
                for hessians in ROUNDS if self.waits else (HESSIANS,):
                    tried = replace(start, parked=parked, hessians=hessians)
                    if largest(self.needs(tried)).total <= most:
                        return tried
        raise largest(self.needs(replace(tight, parked=0, hessians=0))).refusal(most)
