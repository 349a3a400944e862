"""Where scales of channels can move within a decoder block without changing what it computes: out of a norm or a linear
layer, into the linear layers that read it.

AWQ (arXiv 2306.00978) and SmoothQuant (arXiv 2211.10438) both live on it; the places are the families' data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fewbits import arch
from fewbits.errors import FewbitsError


@dataclass(frozen=True)
class Place:
    """One source and all that reads its output; tensors are views of the block's own parameters.

    Attributes:
        source: stored name of the norm's or linear's weight.
        weight: the part of the source whose values are divided: [channels] of a norm, [channels, in] of a linear.
        bias: [channels], or None.
        plus_one: the norm multiplies by weight + 1 (Gemma).
        targets: stored name -> [out, columns], the weights whose columns are multiplied.
        channel: int64 [columns], the source's channel that each column reads. Columns and channels are the same but
            for the values of grouped-query attention, which several query heads read.
    """

    source: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    plus_one: bool
    targets: dict[str, torch.Tensor]
    channel: torch.Tensor

    @property
    def channels(self) -> int:
        return self.weight.shape[0]

    def fold(self, scales: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        """Divide the source and multiply the targets, in place.

        Args:
            scales: float32 [channels], finite and above zero.
            dtype: in which a norm is stored: its values become such as this type has, and the targets take what was
                truly divided by. Without, Gemma's norms would lose much: w + 1 near zero is stored as w near -1.

        Raises:
            FewbitsError: they are not.
        """
        if scales.shape != (self.channels,) or not bool((torch.isfinite(scales) & (scales > 0)).all()):
            raise FewbitsError(
                f"{self.source}: no scale for each of its {self.channels} channels that is finite and above zero."
            )
        if self.weight.ndim == 1:
            scales = self._fold_norm(scales, dtype)
        else:
            self.weight.div_(scales[:, None])
        if self.bias is not None:
            self.bias.div_(scales)
        for target in self.targets.values():
            target.mul_(scales[self.channel])

    def _fold_norm(self, scales: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """Divide a norm; returns what it was truly divided by."""
        one = 1 if self.plus_one else 0
        before = self.weight + one
        after = before / scales - one
        if dtype is None:
            self.weight.copy_(after)
            return scales
        after = after.to(dtype).float()
        true = before / (after + one)
        # a channel that is zero keeps any scale; one that the type would make zero or infinite stays as it was
        zero = before == 0
        good = torch.isfinite(true) & (true > 0)
        self.weight.copy_(torch.where(good | zero, after, self.weight))
        return torch.where(good, true, torch.where(zero, scales, torch.ones_like(scales)))


def places(family: arch.Family, heads: int, prefix: str, views: Mapping[str, torch.Tensor]) -> list[Place]:
    """The places of a decoder block, in the order of the family's table, of every expert its own.

    Pairs of which a tensor is not there (a dense layer among layers with experts, experts stored in one tensor) are
    left out: nothing moves there.

    Args:
        heads: query heads of an attention layer.
        prefix: of the block's stored names, with the dot at its end.
        views: stored name -> parameter, as `StreamedModel.weights_of` gives them.
    """
    roles = {role.hf: role for role in family.block_roles}
    inside = {name.removeprefix(prefix): name for name in views if name.startswith(prefix)}
    experts = 1 + max((int(n) for name in inside for n in re.findall(r"\bexperts\.(\d+)\.", name)), default=-1)
    found = []
    for pair in family.pairs:
        for source, targets in _expanded(pair, experts):
            named = [inside.get(f"{module}.weight") for module in (source, *targets)]
            known = [name for name in named if name is not None]
            if len(known) < len(named):
                continue
            transposed = roles[pair.source].change == "transpose", roles[pair.targets[0]].change == "transpose"
            found.append(
                _place(known, inside.get(f"{source}.bias"), views, transposed, pair.grouped, heads, roles[pair.source])
            )
    return found


def _expanded(pair: arch.ScalePair, experts: int) -> list[tuple[str, tuple[str, ...]]]:
    """A norm feeds all experts at once, an expert's layer only its own next one."""

    def of(names: Sequence[str], numbers: Sequence[int]) -> tuple[str, ...]:
        per_name = ([name.replace("{e}", str(e)) for e in numbers] if "{e}" in name else [name] for name in names)
        return tuple(name for group in per_name for name in group)

    if "{e}" in pair.source:
        return [(of([pair.source], [e])[0], of(pair.targets, [e])) for e in range(experts)]
    return [(pair.source, of(pair.targets, range(experts)))]


def _place(
    names: Sequence[str],
    bias: str | None,
    views: Mapping[str, torch.Tensor],
    transposed: tuple[bool, bool],
    grouped: bool,
    heads: int,
    role: arch.Role,
) -> Place:
    weight = views[names[0]].T if transposed[0] else views[names[0]]
    targets = {name: views[name].T if transposed[1] else views[name] for name in names[1:]}
    columns = next(iter(targets.values())).shape[1]
    channel = torch.arange(columns)
    if grouped:
        # a fused matrix holds the rows of query, key and value, the values last
        rows = weight.shape[0] if weight.shape[0] <= columns else (weight.shape[0] - columns) // 2
        size = columns // heads
        head = torch.arange(heads) // (columns // rows)
        channel = (head[:, None] * size + torch.arange(size)).reshape(-1)
    count = int(channel.max()) + 1
    return Place(
        source=names[0],
        weight=weight[-count:],
        bias=views[bias][-count:] if bias is not None else None,
        plus_one=role.change == "plus_one",
        targets=targets,
        channel=channel.to(weight.device),
    )
