"""Windows of text go through a decoder block group by group, here or by a cluster's workers. What is seen of the inputs
is added in the order of the groups, so that the sums do not depend on who has made which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fewbits.calibration.collect import BlockRecorder, Inputs, owners
from fewbits.checkpoint import Model
from fewbits.forward.streamed import Stream, StreamedModel, torch_threads
from fewbits.workers import Deferred, Pending, Workers, in_order

Floats = npt.NDArray[np.float32]
Group = list[slice]
"""Batches of windows that follow one another."""
GROUP = {False: 1, True: 8}
"""How many batches are one group, without and with Hessians: these take a while to send, and to add."""


def grouped(batches: list[slice], hessians: bool) -> list[Group]:
    """The batches in groups, which depend on nothing else."""
    return [batches[start : start + GROUP[hessians]] for start in range(0, len(batches), GROUP[hessians])]


class GroupPass:
    """Takes groups of windows through decoder blocks and notes their inputs. Pickled, it is the model's path.

    Args:
        calls: see `Stream`.
        hessians: whether to note these, too.
    """

    def __init__(self, streamed: StreamedModel, calls: dict[int, list[Any]], hessians: bool, device: str) -> None:
        self.streamed, self.owned = streamed, owners(streamed.model)
        self.calls, self.hessians, self.device = calls, hessians, device
        self.threads: int | None = None
        self.block: tuple[int, nn.Module] | None = None

    def __getstate__(self) -> tuple[Model, dict[int, list[Any]], bool]:
        return self.streamed.model, self.calls, self.hessians

    def __setstate__(self, state: tuple[Model, dict[int, list[Any]], bool]) -> None:
        model, calls, hessians = state
        self.__init__(StreamedModel(model), calls, hessians, "cpu")  # type: ignore[misc]
        self.threads = 1

    def __call__(self, index: int, hidden: Floats, sizes: list[int]) -> tuple[Floats, list[Inputs]]:
        """A group through a block.

        Args:
            hidden: float32 [windows, context, hidden], changed in place.
            sizes: windows in each batch.

        Returns:
            The block's output, and what was seen of each distinct input of its layers.
        """
        ends = np.cumsum(sizes).tolist()
        batches = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        with torch.no_grad(), torch_threads(self.threads):
            if self.block is None or self.block[0] != index:
                self.block = None
                self.block = index, self.streamed.block(index).to(self.device)
            recorder = BlockRecorder(self.hessians)
            recorder.attach(self.block[1], self.streamed.block_path(index), self.streamed, self.owned)
            stream = Stream(torch.from_numpy(hidden), batches, self.calls)
            self.streamed.run_block(index, self.block[1], stream, self.device)
            recorder.detach()
        return hidden, recorder.inputs()


class BlockPasses:
    """All windows through one block after another.

    Args:
        workers: who takes the groups; None for this process, one after another.
    """

    def __init__(self, here: GroupPass, stream: Stream, workers: Workers | None = None) -> None:
        self.here, self.stream, self.workers = here, stream, workers
        self.groups = grouped(stream.batches, here.hessians)
        self.job = workers.job(here) if workers else None

    def __call__(self, index: int) -> list[Inputs]:
        """One block.

        Returns:
            Of each distinct input of its layers what all windows say.
        """
        found: list[Inputs] = []
        for windows, (hidden, inputs) in in_order(self._tasks(index), self.workers.ahead if self.workers else 1):
            if self.job:
                self.stream.hidden[windows] = torch.from_numpy(hidden)
            for mine, more in zip(found, inputs, strict=bool(found)):
                mine.merge(more)
            found = found or inputs
        self.here.block = None
        return found

    def _tasks(self, index: int) -> Iterator[tuple[slice, Callable[[], Pending[tuple[Floats, list[Inputs]]]]]]:
        for group in self.groups:
            windows = slice(group[0].start, group[-1].stop)
            hidden, sizes = self.stream.hidden[windows].numpy(), [batch.stop - batch.start for batch in group]
            if self.job:
                yield windows, partial(self.job.submit, f"decoder block {index}", index, hidden, sizes)
            else:
                yield windows, partial(Deferred, partial(self.here, index, hidden, sizes))
