"""The tensors of a model under their GGUF names and under their Hugging Face names, each made from the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fewbits.arch.config import canonical
from fewbits.arch.families import Change, Family, Fused, Role, family_of
from fewbits.arch.rope import TENSORS, rope_tensors
from fewbits.errors import FewbitsError

Floats = npt.NDArray[np.float32]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


class Read(Protocol):
    """Gives a stored tensor as float32, or only the given indices of its first axis."""

    def __call__(self, name: str, rows: slice | npt.NDArray[np.integer] | None = None, /) -> Floats: ...


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a GGUF file and how it is made from Hugging Face tensors.

    Attributes:
        name: GGUF name.
        shape: row-major; GGUF writes it reversed.
        sources: the Hugging Face tensors: one, one for each expert, or none where `values` holds the content.
        change: what happens to the values on the way, see `Role`.
        heads: how many attention heads share the rows, for the rotary changes.
        fused: which part of the one source this is, in checkpoints with all experts in one tensor.
        values: float32 content that follows from the configuration.
    """

    name: str
    shape: Shape
    sources: tuple[str, ...]
    change: Change = "copy"
    heads: int = 1
    fused: Fused | None = None
    values: Floats | None = field(default=None, compare=False, repr=False)

    def read(self, read: Read, start: int, stop: int) -> Floats:
        """Rows `start:stop` of the tensor seen as [prod(shape[:-1]), shape[-1]]; a vector is one row.

        Args:
            read: gives Hugging Face tensors; asked for no more rows than the slab needs, except for ``transpose``
                (needs the columns) and experts in one tensor (needs each expert whole).

        Returns:
            float32 [stop - start, shape[-1]].
        """
        if self.values is not None:
            return self.values.reshape(-1, self.shape[-1])[start:stop]
        if len(self.shape) == 3:
            return self._experts(read, start, stop)
        source = self.sources[0]
        if self.change == "transpose" and len(self.shape) == 2:
            return np.ascontiguousarray(read(source)[:, start:stop].T)
        if (order := self.row_order()) is not None:
            if len(self.shape) == 1:
                return read(source)[order][None][start:stop]
            return read(source, order[start:stop])
        values = read(source)[None][start:stop] if len(self.shape) == 1 else read(source, slice(start, stop))
        return values + np.float32(1) if self.change == "plus_one" else values

    def row_order(self) -> npt.NDArray[np.int64] | None:
        """Which row of the Hugging Face tensor each row is; None where they are the same."""
        return _interleaved(self.heads, self.shape[0]) if self.change in ("rope_q", "rope_k") else None

    def _experts(self, read: Read, start: int, stop: int) -> Floats:
        height = self.shape[1]
        slabs = []
        for expert in range(start // height, -(-stop // height)):
            first, last = max(start - expert * height, 0), min(stop - expert * height, height)
            if self.fused:
                offset = self.fused.part * height
                slabs.append(read(self.sources[0], slice(expert, expert + 1))[0, offset + first : offset + last])
            else:
                slabs.append(read(self.sources[expert], slice(first, last)))
        return np.concatenate(slabs) if slabs else np.empty((0, self.shape[-1]), np.float32)


@dataclass(frozen=True)
class HFTensor:
    """A Hugging Face tensor and how it is made from a GGUF file's: the inverse of `GGUFTensor`.

    Attributes:
        sources: the one GGUF tensor.
        expert: which index of the source's first axis, or None for the whole.
    """

    name: str
    shape: Shape
    sources: tuple[str, ...]
    change: Change = "copy"
    heads: int = 1
    expert: int | None = None

    def read(self, read: Read) -> Floats:
        """The whole tensor, float32 [shape].

        Args:
            read: gives GGUF tensors.
        """
        source = self.sources[0]
        if self.expert is not None:
            return read(source, slice(self.expert, self.expert + 1))[0]
        values = read(source)
        if self.change == "transpose" and values.ndim == 2:
            return np.ascontiguousarray(values.T)
        if self.change in ("rope_q", "rope_k"):
            return values[np.argsort(_interleaved(self.heads, self.shape[0]))]
        return values - np.float32(1) if self.change == "plus_one" else values


@lru_cache(maxsize=8)
def _interleaved(heads: int, rows: int) -> npt.NDArray[np.int64]:
    """Which HF row is each GGUF row: halves of a head [first, second] become pairs (first[0], second[0]), ..."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).ravel()


@dataclass(frozen=True)
class _Place:
    """A role in one place: the names of its weight or bias.

    Attributes:
        block: prefix of the block's Hugging Face names.
        hf: one name, or one for each expert.
    """

    role: Role
    block: str
    gguf: str
    hf: tuple[str, ...]
    bias: bool


def _places(config: Mapping[str, Any], family: Family) -> Iterator[_Place]:
    """Every weight and bias that the family can have, in file order."""
    experts = range(config[family.key("expert_count")]) if family.moe else range(0)
    embeddings = [role for role in family.roles if role.kind in ("embedding", "position")]
    for role in embeddings:
        yield from _weight_and_bias(role, "", "", experts)
    for layer in range(config[family.key("block_count")]):
        for role in family.block_roles:
            yield from _weight_and_bias(role, family.block.format(i=layer), f"blk.{layer}.", experts)
    for role in family.roles:
        if role not in embeddings and not (role.kind == "head" and config["tie_word_embeddings"]):
            yield from _weight_and_bias(role, "", "", experts)


def _weight_and_bias(role: Role, block: str, gguf: str, experts: range) -> Iterator[_Place]:
    for kind in ("weight",) if role.bias == "no" else ("weight", "bias"):
        modules = [role.hf.replace("{e}", str(e)) for e in experts] if role.per_expert else [role.hf]
        names = tuple(f"{block}{module}.{kind}" for module in modules)
        yield _Place(role, block, f"{gguf}{role.gguf}.{kind}", names, kind == "bias")


def _heads(config: Mapping[str, Any], family: Family, change: Change) -> int:
    keys = {"rope_q": "attention.head_count", "rope_k": "attention.head_count_kv"}
    return int(config[family.key(keys[change])]) if change in keys else 1


def gguf_tensors(config: Mapping[str, Any], shapes: Shapes) -> list[GGUFTensor]:
    """The tensors of the GGUF file of this model, from headers alone.

    Args:
        config: config.json.
        shapes: every Hugging Face tensor of the checkpoint.

    Raises:
        FewbitsError: unknown architecture; a tensor that is missing, has the wrong shape or has no place in GGUF.
    """
    config, family = canonical(config), family_of(config)
    out: list[GGUFTensor] = []
    used: set[str] = set()
    for place in _places(config, family):
        tensor = _gguf_tensor(place, config, family, shapes)
        if tensor is None:
            continue
        out.append(tensor)
        used |= set(tensor.sources)
    vocab, found = config.get("vocab_size"), out[0].shape[0]
    if vocab not in (None, found):
        raise FewbitsError(f"{out[0].sources[0]}: it has {found} rows where config.json's vocab_size says {vocab}.")
    for name in shapes:
        tied_head = name == "lm_head.weight" and config["tie_word_embeddings"]
        if name not in used and not tied_head and not name.endswith(family.dropped):
            raise FewbitsError(f"{name}: {family.architecture} has no such tensor in GGUF.")
    for name, values in rope_tensors(config, family).items():
        out.append(GGUFTensor(name, values.shape, (), values=values))
    return out


def head_source(config: Mapping[str, Any], shapes: Shapes) -> str:
    """Stored name of the head's matrix: its own, or the embeddings' where the two are one.

    Raises:
        FewbitsError: as for `gguf_tensors`.
    """
    found = {tensor.name: tensor.sources for tensor in gguf_tensors(config, shapes)}
    return next(found[name][0] for name in ("output.weight", "token_embd.weight") if name in found)


@dataclass(frozen=True)
class DecoderLinear:
    """A linear of a decoder block, as quantizers of Hugging Face directories see it.

    Attributes:
        weight: stored name of its weight.
        module: within its block, with the expert's number in it.
        block: index of the block.
        plain: False where transformers' module is no `nn.Linear` of its own: GPT-2's Conv1D, experts in one tensor.
    """

    weight: str
    module: str
    block: int
    plain: bool


def decoder_linears(config: Mapping[str, Any], shapes: Shapes) -> list[DecoderLinear]:
    """The linears of all decoder blocks, routers left out, in file order.

    Args:
        config: config.json.
        shapes: every Hugging Face tensor of the checkpoint.

    Raises:
        FewbitsError: as for `gguf_tensors`.
    """
    gguf_tensors(config, shapes)  # refuses what does not fit together
    config, family = canonical(config), family_of(config)
    found = []
    for place in _places(config, family):
        if place.bias or place.role.kind != "linear" or not place.block:
            continue
        tensor = _gguf_tensor(place, config, family, shapes)
        assert tensor is not None  # a weight that is missing has been refused
        plain = tensor.change != "transpose" and tensor.fused is None
        for stored, full in zip(tensor.sources, place.hf, strict=False):
            module = full.removeprefix(place.block).removesuffix(".weight")
            found.append(DecoderLinear(stored, module, int(place.gguf.split(".")[1]), plain))
    return found


def _gguf_tensor(place: _Place, config: Mapping[str, Any], family: Family, shapes: Shapes) -> GGUFTensor | None:
    role, names, fused = place.role, place.hf, None
    if names[0] not in shapes:
        if role.fused and place.block + role.fused.name in shapes:
            names, fused = (place.block + role.fused.name,), role.fused
        elif role.also and f"{place.block}{role.also}.weight" in shapes:
            names = (f"{place.block}{role.also}.weight",)
        elif family.base and names[0].removeprefix(family.base) in shapes:
            names = (names[0].removeprefix(family.base),)
    if place.bias and role.bias == "maybe" and names[0] not in shapes:
        return None
    for name in names:
        if name not in shapes:
            raise FewbitsError(f"{name} is missing from the checkpoint.", "Fetch the model again.")
        if shapes[name] != shapes[names[0]]:
            raise FewbitsError(f"{name} has the shape {shapes[name]}, {names[0]} has {shapes[names[0]]}.")
    shape = tuple(shapes[names[0]])
    heads = _heads(config, family, role.change)
    _check_shape(names[0], shape, 1 if place.bias or role.kind == "norm" else 3 if fused else 2, heads, role.change)
    if fused:
        if shape[1] % fused.parts or shape[0] != len(place.hf):
            raise FewbitsError(f"{names[0]} has the shape {shape}, where {len(place.hf)} experts are expected.")
        shape = (shape[0], shape[1] // fused.parts, shape[2])
    elif role.per_expert:
        shape = (len(names), *shape)
    elif role.change == "transpose":
        shape = shape[::-1]
    return GGUFTensor(place.gguf, shape, names, role.change, heads, fused)


def _check_shape(name: str, shape: Shape, axes: int, heads: int, change: Change) -> None:
    if len(shape) != axes:
        raise FewbitsError(f"{name} has the shape {shape}, where {axes} axes are expected.")
    if change in ("rope_q", "rope_k") and shape[0] % (2 * heads):
        raise FewbitsError(f"{name}: its {shape[0]} rows are not {heads} heads.")


def hf_tensors(config: Mapping[str, Any], shapes: Shapes) -> list[HFTensor]:
    """The Hugging Face tensors that a GGUF file holds, from headers alone.

    Args:
        config: as `config_from_gguf` gives it.
        shapes: every tensor of the GGUF file, row-major.

    Raises:
        FewbitsError: a tensor that is missing, or that the family does not have.
    """
    config, family = canonical(config), family_of(config)
    out: list[HFTensor] = []
    used = set(rope_tensors(config, family))
    for place in _places(config, family):
        role = place.role
        if place.gguf not in shapes:
            if place.bias and role.bias == "maybe":
                continue
            raise FewbitsError(f"{place.gguf} is missing from the GGUF file.", "Fetch the model again.")
        used.add(place.gguf)
        shape = tuple(shapes[place.gguf])
        heads = _heads(config, family, role.change)
        axes = 1 if place.bias or role.kind == "norm" else 3 if role.per_expert else 2
        _check_shape(place.gguf, shape, axes, heads, role.change)
        if role.per_expert:
            if shape[0] != len(place.hf):
                raise FewbitsError(f"{place.gguf} has the shape {shape}, where {len(place.hf)} experts are expected.")
            out += [HFTensor(name, shape[1:], (place.gguf,), expert=e) for e, name in enumerate(place.hf)]
            continue
        if role.change == "transpose":
            shape = shape[::-1]
        out.append(HFTensor(place.hf[0], shape, (place.gguf,), role.change, heads))
    for name in shapes:
        if name not in used:
            what = "its RoPE scaling is not in the configuration" if name in TENSORS else "it is not known"
            raise FewbitsError(f"{name}: {what} for {family.architecture}.", "Convert the original model again.")
    return out
