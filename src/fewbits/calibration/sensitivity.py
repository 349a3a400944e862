"""How much an error in each weight changes what the model says: the diagonal of its Fisher information.

For a small error D of the weights, the KL divergence of the new distributions from the old is half of D^T F D, where F
is the mean of g g^T over gradients g of log p(label), the labels drawn from the model itself. Rounding errors of
different weights have independent signs, so the diagonal decides: half of the sum of F_ij D_ij^2. It is kept as column
sums: the rows of a matrix count alike, but for embedding and head, where rows are tokens and few matter.

One decoder block is in memory at a time: the windows' activations in front of each block are kept from the way up, and
each block is run once more on the way down.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fewbits.calibration.collect import owners
from fewbits.calibration.statistics import Sensitivities, Sensitivity
from fewbits.calibration.texts import CalibrationText
from fewbits.checkpoint import Model
from fewbits.forward.streamed import Progress, Stream, StreamedModel
from fewbits.spill import Spill

WINDOWS = 16
"""Windows whose gradients are taken, where nothing else is said: sums over a matrix are then good to some 10 %."""
SEED = 0


def sensitivities(
    model: Model,
    text: CalibrationText,
    windows: int = WINDOWS,
    progress: Progress | None = None,
    spill: Spill | None = None,
) -> Sensitivities:
    """Take the gradients of the log probabilities of labels that the model itself draws.

    Args:
        text: what calibrates the model; `windows` of it, evenly spread, are used.
        progress: called with (blocks done, blocks, what).
        spill: where activations go that are too large for memory.

    Raises:
        FewbitsError: as for `StreamedModel`.
    """
    places = np.linspace(0, len(text.inputs) - 1, min(windows, len(text.inputs))).astype(np.int64)
    return _Descent(model, text.inputs[places], spill).run(progress)


class _Descent:
    """The parts of one run."""

    def __init__(self, model: Model, inputs: npt.NDArray[np.int64], spill: Spill | None = None) -> None:
        self.model = model
        self.inputs = inputs
        self.streamed = StreamedModel(model, spill=spill)
        self.owned = owners(model)
        self.columns: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
        self.out: Sensitivities = defaultdict(list)

    def run(self, progress: Progress | None) -> Sensitivities:
        count = len(self.streamed.layers)
        with torch.no_grad():
            stream = self.streamed.enter(self.inputs, together=1)
            entered = self.streamed.activations((count, *stream.hidden.shape))
            for index in range(count):
                self.streamed.copied(stream.hidden, entered[index])
                self.streamed.run_block(index, self.streamed.block(index), stream)
                if progress:
                    progress(index + 1, 2 * count, "decoder blocks")
        self._head(stream)
        for index in reversed(range(count)):
            self._block(index, entered[index], stream)
            if progress:
                progress(2 * count - index, 2 * count, "gradients of decoder blocks")
        self._embedding(entered[0], stream.hidden)
        for name, experts in self.columns.items():
            self.out[name].append(Sensitivity(_stacked(experts, self.inputs.size)))
        return dict(self.out)

    def _head(self, stream: Stream) -> None:
        """Draw labels, put the gradients of their log probabilities in place of the hidden states."""
        generator = torch.Generator().manual_seed(SEED)
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def watch(x: torch.Tensor, out: torch.Tensor) -> None:
            out.retain_grad()
            seen.append((x, out))

        top = self.streamed.top(watch)
        columns = torch.zeros(stream.hidden.shape[-1], dtype=torch.float64)
        rows = torch.zeros(self.streamed.n_vocab, dtype=torch.float64)
        for batch in stream.batches:
            hidden = stream.hidden[batch].clone().requires_grad_()
            logs = torch.log_softmax(top(hidden)[0], -1)
            labels = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            logs.gather(1, labels).sum().backward()
            x, out = seen.pop()
            assert out.grad is not None and hidden.grad is not None
            squares = out.grad[0].square()
            columns += (squares.sum(1)[:, None] * x.detach()[0].square()).sum(0)
            rows += squares.sum(0)
            stream.hidden[batch] = hidden.grad
        for name in self.owned.get(self.streamed._output_name(), []):
            self._add_tokens(name, columns, rows)

    def _block(self, index: int, entered: torch.Tensor, stream: Stream) -> None:
        """The squared gradients of a block's weights, window by window, and the gradient of what it was given."""
        block = self.streamed.block(index)
        transposed = {id(m.weight) for m in block.modules() if type(m).__name__ == "Conv1D"}
        for parameter in block.parameters():
            parameter.requires_grad_(parameter.ndim >= 2)

        def squares(parameter: nn.Parameter) -> torch.Tensor:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            return (grad.mT if id(parameter) in transposed else grad).square()

        for batch in stream.batches:
            hidden = entered[batch].clone().requires_grad_()
            args, kwargs = stream.calls[1][index]
            out = block(hidden, *args, **kwargs)
            (out if isinstance(out, torch.Tensor) else out[0]).backward(stream.hidden[batch])
            assert hidden.grad is not None
            stream.hidden[batch] = hidden.grad
            for stored, values in self.streamed.weights_of(index, block, squares).items():
                if values.ndim == 2:
                    self._add(stored, values.sum(0, dtype=torch.float64))
            block.zero_grad()

    def _add(self, stored: str, columns: torch.Tensor) -> None:
        found = re.search(r"\bexperts\.(\d+)\.", stored)
        expert = int(found[1]) if found else 0
        for name in self.owned.get(stored, []):
            known = self.columns[name]
            known[expert] = known[expert] + columns if expert in known else columns

    def _embedding(self, entered: torch.Tensor, gradients: torch.Tensor) -> None:
        """Of a token's row only its own occurrences say anything."""
        embedding = self.streamed.base.get_input_embeddings()
        names = {id(module): name for name, module in self.streamed.skeleton.named_modules()}
        for stored in self.streamed.sources(f"{names[id(embedding)]}.weight"):
            # what reaches the first block may be the embedding times a factor
            used = self.model.read(stored)[self.inputs.reshape(-1)]
            factor = float(entered.square().mean()) / max(float(np.square(used, dtype=np.float64).mean()), 1e-30)
            columns = gradients.square().sum((0, 1), dtype=torch.float64) * factor
            counts = np.bincount(self.inputs.reshape(-1), minlength=self.streamed.n_vocab)
            for name in self.owned.get(stored, []):
                self._add_tokens(name, columns, torch.from_numpy(counts.astype(np.float64)))

    def _add_tokens(self, name: str, columns: torch.Tensor, rows: torch.Tensor) -> None:
        share = (rows / rows.sum()).float().numpy()
        self.out[name].append(Sensitivity((columns / self.inputs.size).float().numpy()[None], share))


def _stacked(experts: Mapping[int, torch.Tensor], tokens: int) -> npt.NDArray[np.float32]:
    """float32 [experts, columns], the mean over the tokens."""
    return (torch.stack([experts[expert] for expert in sorted(experts)]) / tokens).float().numpy()
