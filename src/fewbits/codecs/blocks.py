"""Matrices in a GGUF storage type, for methods and runs that work on whole matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from fewbits.codecs.base import Bytes, Codec, Floats
from fewbits.codecs.storage import Coded, StorageType
from fewbits.kernels.lanes import F16_MAX

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Blocks(StorageType):
    """Rows of a codec's blocks."""

    codec: type[Codec]

    @property
    def name(self) -> str:
        return self.codec.name

    @property
    def bits(self) -> float:  # type: ignore[override]
        return 8 * self.codec.block_bytes / self.codec.block

    @property
    def rows_apart(self) -> bool:
        return True


@dataclass(frozen=True)
class BlocksCoded(Coded):
    """A matrix as rows of blocks.

    Attributes:
        data: uint8 [rows, row bytes].
    """

    type: Blocks
    data: Bytes

    def decode(self) -> Floats:
        return self.type.codec.decode(self.data)

    @property
    def steps(self) -> Floats:
        """float32 [blocks, numbers]: what the weights of each block are linear in, see `Codec.step_bytes`."""
        blocks = self.data.reshape(-1, self.type.codec.block_bytes)
        parts = [np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16) for at in self.type.codec.step_bytes]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def with_steps(self, steps: Floats) -> BlocksCoded:
        """The same codes with other steps, float32 [blocks, numbers], rounded to half precision."""
        data = np.array(self.data, order="C")
        blocks = data.reshape(-1, self.type.codec.block_bytes)
        halves = np.clip(steps, -F16_MAX, F16_MAX).astype(np.float16)
        for number, at in enumerate(self.type.codec.step_bytes):
            blocks[:, at : at + 2] = np.ascontiguousarray(halves[:, number : number + 1]).view(np.uint8)
        return replace(self, data=data)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What gradients can change: `shares` of the steps, float32 [blocks, numbers]. Shares rather than the steps
        themselves, which differ by orders of magnitude."""
        import torch  # takes a second

        return {"shares": torch.ones(self.steps.shape)} if self.type.codec.step_bytes else {}

    def decode_torch(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`decode` with such shares, float32 [rows, columns], which gradients reach."""
        import torch

        if not tensors:
            return torch.from_numpy(self.decode())
        shares, parts = tensors["shares"][..., None], self._parts.to(tensors["shares"].device)
        # no product of matrices: calibration takes those in bfloat16, which has no steps small enough for shares near 1
        weights = shares[:, 0] * parts[:, 0]
        for number in range(1, parts.shape[1]):
            weights = torch.addcmul(weights, shares[:, number], parts[:, number])
        return weights.view(len(self.data), -1)

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> BlocksCoded:
        return self.with_steps(self.steps * tensors["shares"].detach().cpu().numpy()) if tensors else self

    @cached_property
    def _parts(self) -> torch.Tensor:
        """float32 [blocks, numbers, weights]: what each step adds to the weights of its block."""
        import torch

        steps, parts = self.steps, []
        for number in range(steps.shape[1]):
            alone = np.zeros_like(steps)
            alone[:, number] = steps[:, number]
            parts.append(self.with_steps(alone).decode().reshape(len(steps), -1))
        return torch.from_numpy(np.stack(parts, axis=1))
