"""The forward pass of any supported architecture by transformers, with one decoder block in memory at a time.

No code per family: the model is built on the meta device, its own `forward` runs once with recorders in place of the
decoder blocks (they keep what each block is called with: masks, rotary embeddings), the real blocks then run one after
another over all windows, and the model's own code does the final norm and the head. All arithmetic is float32.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fewbits.codecs import CODECS
from fewbits.errors import FewbitsError
from fewbits.spill import Spill

if TYPE_CHECKING:
    from fewbits.checkpoint import Model

Progress = Callable[[int, int, str], None]
BATCH_TOKENS = 2048
"""Windows run together up to so many tokens: enough to keep the matrix products busy, small beside a block."""
ROWS_WEIGHTS = 1 << 23
"""Weights of an embedding that are read at a time."""
FUSED_EXPERTS = {
    "experts.gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "experts.down_proj": (("down_proj",), ("w2",)),
}
"""transformers keeps all experts of a block in one tensor [experts, out, in]; on disk each expert has its own matrices,
named after Qwen's or Mixtral's fashion. Parts are joined along the rows."""
RENAMED = ((".mlp.", ".block_sparse_moe."),)
"""Module names of transformers whose tensors are called otherwise on disk."""
PREFIXES = ("", "language_model.", "model.language_model.", "model.", "transformer.")


def bf16_round(x: torch.Tensor) -> torch.Tensor:
    """Nearest bfloat16 of each value (ties to even), as float32."""
    return x.to(torch.bfloat16).to(torch.float32)


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Run torch with this many threads, then restore."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


class _Recorder(nn.Module):
    """Stands for a decoder block: keeps its arguments, passes the hidden states on."""

    def __init__(self) -> None:
        super().__init__()
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.hidden: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.hidden, self.call = hidden_states, (args, kwargs)
        return hidden_states


class _Given(nn.Module):
    """Stands for all decoder blocks once they have run: returns their result."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.hidden


class _Output(tuple):
    """What a base model returns, with the hidden states alone: every other field is None."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


class _Normed(nn.Module):
    """Stands for the base model: returns hidden states that are already normed."""

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> _Output:
        return _Output((inputs_embeds,))


@dataclass
class Stream:
    """Windows of text on their way through the decoder blocks.

    Attributes:
        hidden: float32 [n_windows, context, hidden], the input of the next block.
        batches: windows that run together.
        calls: windows in a batch -> for each block its further arguments.
    """

    hidden: torch.Tensor
    batches: list[slice]
    calls: dict[int, list[Any]]


class StreamedModel:
    """A model whose weights are read when they are needed and dropped at once.

    Args:
        model: the weights, by Hugging Face names.
        bf16: round the weights and, after the embedding, every block and the final norm, the activations to bfloat16:
            the noise floor. Arithmetic stays float32.
        spill: where activations go that are too large for memory.

    Raises:
        FewbitsError: transformers does not know the architecture.
    """

    def __init__(self, model: Model, bf16: bool = False, spill: Spill | None = None) -> None:
        self.model = model
        self.spill = spill or Spill()
        self.names = frozenset(model.names)
        self.round = bf16_round if bf16 else (lambda x: x)
        self.skeleton = build_skeleton(model)
        self.base = getattr(self.skeleton, self.skeleton.base_model_prefix)
        self.config = self.skeleton.config
        count = self.config.num_hidden_layers
        lists = [n for n, m in self.base.named_children() if isinstance(m, nn.ModuleList) and len(m) == count]
        if len(lists) != 1:
            raise FewbitsError(f"{model.path}: cannot tell the decoder blocks of {type(self.skeleton).__name__}.")
        self.layers_name = lists[0]
        self.layers = list(getattr(self.base, self.layers_name))

    @property
    def n_vocab(self) -> int:
        return int(self.skeleton.get_output_embeddings().weight.shape[0])

    def final_states(
        self, inputs: npt.NDArray[np.int64], first: int, progress: Progress | None = None
    ) -> npt.NDArray[np.float32]:
        """Run the decoder over all windows.

        Args:
            inputs: token ids [n_windows, context].
            first: the positions from this one to the last but one are scored.
            progress: called with (blocks done, blocks, what) after each block.

        Returns:
            Normed hidden states of the scored positions, float32 [n_windows, context - 1 - first, hidden].

        Raises:
            FewbitsError: a tensor is missing or of the wrong shape, or the context is longer than the model's.
        """
        with torch.no_grad():
            stream = self.enter(inputs)
            for index in range(len(self.layers)):
                block = self.block(index)
                self.run_block(index, block, stream)
                del block
                if progress:
                    progress(index + 1, len(self.layers), "decoder blocks")
            self.norm(stream)
        return stream.hidden[:, first : inputs.shape[1] - 1].numpy()

    def enter(self, inputs: npt.NDArray[np.int64], together: int | None = None) -> Stream:
        """Embed the windows: what the first decoder block gets.

        Args:
            inputs: token ids [n_windows, context].
            together: windows in a batch; None means as many as keep the matrix products busy.

        Raises:
            FewbitsError: as for `final_states`.
        """
        context = inputs.shape[1]
        longest = getattr(self.config, "max_position_embeddings", None)
        if longest and context > longest:
            raise FewbitsError(
                f"{self.model.path}: the model was made for {longest} positions, the windows have {context}.",
                f"Pass a context of at most {longest}.",
            )
        step = together or max(1, BATCH_TOKENS // context)
        batches = [slice(i, min(i + step, len(inputs))) for i in range(0, len(inputs), step)]
        hidden = self.activations((*inputs.shape, self.config.hidden_size))
        return Stream(hidden, batches, self._embed(torch.from_numpy(inputs), batches, hidden))

    def activations(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A float32 tensor in memory, or in a file where it is large."""
        return torch.from_numpy(self.spill.empty(shape))

    def copied(self, hidden: torch.Tensor, to: torch.Tensor | None = None) -> torch.Tensor:
        """Activations once more, window by window; `to` takes them, or new memory."""
        to = self.activations(tuple(hidden.shape)) if to is None else to
        for old, new in zip(hidden, to, strict=True):
            new.copy_(old)
            self.spill.forget()
        return to

    def block_path(self, index: int) -> str:
        """Name of a decoder block within the model: the prefix of its tensors."""
        return f"{self.skeleton.base_model_prefix}.{self.layers_name}.{index}"

    def block(self, index: int) -> nn.Module:
        """A decoder block with its weights in memory; where that is scarce, those of large linears are in files, one
        of them in memory at a time."""
        block = self.materialize(self.layers[index], self.block_path(index), spilled=self.spill.scarce)
        for module in block.modules():
            if self.spill.scarce and isinstance(module, nn.Linear):
                module.register_forward_hook(lambda *_: self.spill.forget())
        return block

    def run_block(self, index: int, block: nn.Module, stream: Stream, device: str = "cpu") -> None:
        """Take all windows through a block that lies on a device; the windows stay where they are."""
        for batch in stream.batches:
            self.run_batch(index, block, stream, batch, device)

    def run_batch(self, index: int, block: nn.Module, stream: Stream, batch: slice, device: str = "cpu") -> None:
        """Take some windows through a block."""
        args, kwargs = _moved(stream.calls[batch.stop - batch.start][index], device)
        out = block(stream.hidden[batch].to(device), *args, **kwargs)
        stream.hidden[batch] = self.round(out if isinstance(out, torch.Tensor) else out[0])
        self.spill.forget()

    def watch_block(
        self, index: int, block: nn.Module, stream: Stream, device: str = "cpu", batches: int | None = None
    ) -> None:
        """Take windows through a block for those who observe its modules; the results are dropped.

        Args:
            batches: at most so many, at even distances from the first on; None means all.
        """
        step = max(1, len(stream.batches) // batches) if batches else 1
        for batch in stream.batches[::step][:batches]:
            args, kwargs = _moved(stream.calls[batch.stop - batch.start][index], device)
            block(stream.hidden[batch].to(device), *args, **kwargs)
            self.spill.forget()

    def weights_of(
        self, index: int, block: nn.Module, of: Callable[[nn.Parameter], torch.Tensor] = lambda found: found.data
    ) -> dict[str, torch.Tensor]:
        """The parameters of a materialized block by stored name: views, of experts' common tensors one for each.

        Args:
            of: what is looked at of a parameter, e.g. its gradient.
        """
        views: dict[str, torch.Tensor] = {}
        for name, parameter in block.named_parameters():
            sources = self.sources(f"{self.block_path(index)}.{name}")
            if parameter.ndim == 3 and sources and ".0." in sources[0]:
                for expert, matrix in enumerate(of(parameter)):
                    parts = matrix.chunk(len(sources))
                    views |= {
                        re.sub(r"\bexperts\.0\.", f"experts.{expert}.", source): part
                        for source, part in zip(sources, parts, strict=True)
                    }
            elif len(sources) == 1:
                views[sources[0]] = of(parameter)
        return views

    def linears(self, index: int, block: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
        """The modules of a block whose weight is one of these stored tensors, by its name."""
        found: dict[str, nn.Module] = {}
        for name, module in block.named_modules():
            stored = self.sources(f"{self.block_path(index)}.{name}.weight") if hasattr(module, "weight") else ()
            found |= {stored[0]: module} if len(stored) == 1 and stored[0] in names else {}
        return found

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The head in memory: normed hidden states [n, hidden] -> float32 logits [n, n_vocab], softcap applied."""
        skeleton = copy.copy(self.skeleton)
        skeleton._modules = dict(self.skeleton._modules)
        setattr(skeleton, skeleton.base_model_prefix, _Normed())
        skeleton.set_output_embeddings(self.output_embeddings())

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return skeleton(inputs_embeds=hidden[None], use_cache=False).logits[0].float()

        return logits

    def top(self, watch: Callable[[torch.Tensor, torch.Tensor], None]) -> Callable[[torch.Tensor], torch.Tensor]:
        """What follows the decoder blocks, for gradients: [n, context, hidden] -> float32 logits [n, context, n_vocab].

        Args:
            watch: called with the head's input and output, before softcap and scaling.
        """
        skeleton = copy.copy(self.skeleton)
        skeleton._modules = dict(self.skeleton._modules)
        given = _Given(torch.empty(0))
        setattr(skeleton, skeleton.base_model_prefix, self._base_with([given] * len(self.layers), final_norm=True))
        head = self.output_embeddings().requires_grad_(False)
        head.register_forward_hook(lambda _, args, out: watch(args[0], out))
        skeleton.set_output_embeddings(head)

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            given.hidden = hidden
            return skeleton(inputs_embeds=torch.zeros(1).expand(hidden.shape), use_cache=False).logits.float()

        return logits

    def output_embeddings(self) -> nn.Module:
        """The head's matrix in memory, as a module."""
        name = self._output_name()
        linear = copy.deepcopy(self.skeleton.get_output_embeddings())
        state = {"weight": self._tensor(name, tuple(linear.weight.shape))}
        if linear.bias is not None:
            state["bias"] = self._tensor(name.removesuffix("weight") + "bias", tuple(linear.bias.shape))
        linear.load_state_dict(state, assign=True)
        return linear.eval()

    def _embed(self, ids: torch.Tensor, batches: list[slice], hidden: torch.Tensor) -> dict[int, list[Any]]:
        """Fill `hidden` with the first block's input; returns each block's further arguments by batch size."""
        recorders = [_Recorder() for _ in self.layers]
        base = self._base_with(recorders, final_norm=False)
        calls: dict[int, list[Any]] = {}
        for batch in batches:
            base(input_ids=ids[batch], use_cache=False)
            entered = recorders[0].hidden
            assert entered is not None
            hidden[batch] = self.round(entered)
            self.spill.forget()
            calls.setdefault(batch.stop - batch.start, [recorder.call for recorder in recorders])
        return calls

    def norm(self, stream: Stream) -> None:
        """The final norm by the model's own code, in place."""
        hidden = stream.hidden
        given = _Given(hidden[:0])
        base = self._base_with([given] * len(self.layers), final_norm=True)
        for batch in stream.batches:
            given.hidden = hidden[batch]
            # only the shape and type of the input matter: masks and rotary embeddings go to blocks that ignore them
            stand_in = torch.zeros(1).expand(given.hidden.shape)
            hidden[batch] = self.round(base(inputs_embeds=stand_in, use_cache=False).last_hidden_state)
            self.spill.forget()

    def _base_with(self, blocks: list[Any], final_norm: bool) -> nn.Module:
        """The base model with other decoder blocks and the weights outside of them in place.

        The embeddings are read only where `final_norm` is False, the final norm only where it is True; what is not
        read stays unset and its result unused.
        """
        base = copy.copy(self.base)
        base._modules = dict(self.base._modules)
        setattr(base, self.layers_name, nn.ModuleList(blocks))
        for name, module in self.base._modules.items():
            if module is None or name == self.layers_name:
                continue
            embedding = isinstance(module, nn.Embedding)
            path = f"{self.skeleton.base_model_prefix}.{name}"
            if embedding and final_norm and module is self.base.get_input_embeddings():
                continue
            if not embedding and not final_norm and any(True for _ in module.parameters()):
                base._modules[name] = nn.Identity()  # the norm: its result would be thrown away
                continue
            base._modules[name] = self.materialize(module, path, spilled=embedding)
        return base

    def materialize(self, meta: nn.Module, path: str, spilled: bool = False) -> nn.Module:
        """A copy of a meta module with its weights read and its buffers computed.

        Args:
            spilled: whether weights that are too large for memory go to a file, e.g. embeddings, of which few rows are
                used.
        """
        module = copy.deepcopy(meta)
        for part in module.modules():
            lost = {name: buffer for name, buffer in part._buffers.items() if buffer is not None and buffer.is_meta}
            for name, buffer in lost.items():
                part._buffers[name] = torch.empty_like(buffer, device="cpu")
            if lost:
                # how transformers itself restores buffers that no file holds; weights on meta are not touched
                self.skeleton._init_weights(part)
        state = {
            name: self._tensor(f"{path}.{name}", tuple(parameter.shape), spilled)
            for name, parameter in module.named_parameters()
        }
        module.load_state_dict(state, strict=False, assign=True)
        return module.eval()

    def sources(self, name: str) -> tuple[str, ...]:
        """The stored tensors that a parameter is read from; of experts, those of the first one."""
        found = self._on_disk(name)
        if found:
            return (found,)
        match = re.fullmatch(r"(.*\.)(experts\.\w+)", name)
        for parts in FUSED_EXPERTS.get(match[2], ()) if match else ():
            assert match is not None
            first = [self._on_disk(f"{match[1]}experts.0.{part}.weight") for part in parts]
            if all(first):
                return tuple(stored for stored in first if stored)
        return ()

    def _tensor(self, name: str, shape: tuple[int, ...], spilled: bool = False) -> torch.Tensor:
        found = self._on_disk(name)
        if found and spilled and self.model.shape(found) == shape and 4 * prod(shape) > self.spill.above:
            return self._spilled(found, shape)
        value = self._read(found) if found else self._fused(name, shape)
        if value is None:
            raise FewbitsError(f"{self.model.path}: tensor {name!r} is missing.")
        if tuple(value.shape) != shape:
            raise FewbitsError(
                f"{self.model.path}: tensor {name!r} has shape {list(value.shape)}, the config says {list(shape)}."
            )
        return self.round(value)

    def _spilled(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        out = self.activations(shape)
        # what is decoded as a whole would be kept for the next rows
        step = max(1, ROWS_WEIGHTS // prod(shape[1:])) if self.model.dtype(name) in CODECS else shape[0]
        for start in range(0, shape[0], step):
            rows = np.ascontiguousarray(self.model.read(name, slice(start, start + step)), np.float32)
            out[start : start + step] = self.round(torch.from_numpy(rows))
            self.spill.forget()
        return out

    def _read(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.model.read(name), np.float32))

    def _on_disk(self, name: str) -> str | None:
        for candidate in (name, *(name.replace(new, old) for new, old in RENAMED)):
            stem = candidate.removeprefix(f"{self.skeleton.base_model_prefix}.")
            for full in (candidate, *(prefix + stem for prefix in PREFIXES)):
                if full in self.names:
                    return full
        return None

    def _fused(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """All experts of a block in one tensor, from the matrices of each."""
        match = re.fullmatch(r"(.*\.)(experts\.\w+)", name)
        for parts in FUSED_EXPERTS.get(match[2], ()) if match else ():
            assert match is not None
            first = self._on_disk(f"{match[1]}experts.0.{parts[0]}.weight")
            if first is None:
                continue
            # filled in place: a list of experts beside their stack would double the block
            out = torch.empty(shape)
            for expert in range(shape[0]):
                start = 0
                for part in parts:
                    found = self._on_disk(f"{match[1]}experts.{expert}.{part}.weight")
                    if found is None:
                        raise FewbitsError(f"{self.model.path}: expert {expert} of {name!r} has no {part}.")
                    value = self._read(found)
                    out[expert, start : start + value.shape[0]] = value
                    start += value.shape[0]
            return out
        return None

    def _output_name(self) -> str:
        """Name on disk of the head: its own tensor, or the embedding where the two are tied."""
        names = {id(module): name for name, module in self.skeleton.named_modules()}
        for module in (self.skeleton.get_output_embeddings(), self.skeleton.get_input_embeddings()):
            found = self._on_disk(f"{names[id(module)]}.weight")
            if found:
                return found
        raise FewbitsError(f"{self.model.path}: there is neither a head nor an embedding.")


def load_whole(model: Model) -> Any:
    """The complete transformers model in memory, float32: for generating text.

    Raises:
        FewbitsError: as for `StreamedModel`.
    """
    streamed = StreamedModel(model)
    skeleton = streamed.skeleton
    paths = {id(module): name for name, module in skeleton.named_modules()}
    for name, module in list(skeleton.named_children()):
        if module is not streamed.base and module is not skeleton.get_output_embeddings():
            setattr(skeleton, name, streamed.materialize(module, paths[id(module)]))
    setattr(skeleton, skeleton.base_model_prefix, streamed.materialize(streamed.base, skeleton.base_model_prefix))
    skeleton.set_output_embeddings(streamed.output_embeddings())
    return skeleton.eval()


def build_skeleton(model: Model) -> Any:
    """The transformers model of a config on the meta device, in evaluation mode.

    Raises:
        FewbitsError: transformers does not know the model type.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    entries = {
        k: v for k, v in model.config.items() if k not in ("quantization_config", "auto_map", "dtype", "torch_dtype")
    }
    kind = str(entries.pop("model_type", ""))
    try:
        config = AutoConfig.for_model(kind, **entries).get_text_config()
        # eager where attention scores are capped: the fused kernel cannot
        attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise FewbitsError(f"{model.path}: transformers cannot build a model of type {kind!r} ({reason}).") from None
    return skeleton.eval()


def _moved(value: Any, device: str) -> Any:
    """The tensors in nested tuples, lists and dicts on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device) for item in value)
    return value
