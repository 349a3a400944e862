"""What `fewbits memory` tells: parts in bytes, for each device and each layer, and what to change."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Bytes = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Parts(_Strict):
    """Bytes by what they are for.

    Attributes:
        weights: the stored tensors that are loaded.
        kv_cache: keys and values of all sequences, at the whole context.
        recurrent_state: of recurrent layers, all sequences.
        compute: working memory of one step.
        runtime: driver, libraries, contexts.
        margin: left free, for the engine's own rule or for the rest of the machine.
    """

    weights: Bytes
    kv_cache: Bytes
    recurrent_state: Bytes
    compute: Bytes
    runtime: Bytes
    margin: Bytes

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in Parts.model_fields)


class DeviceMemory(Parts):
    """One device's parts.

    Attributes:
        device: `GPU` (all of them together) or `host`.
        needed: the sum.
        available: bytes that the device has; None where the hardware is not known.
        fits: whether it is enough; None likewise.
    """

    device: Literal["GPU", "host"]
    needed: Bytes
    available: Bytes | None = None
    fits: bool | None = None


class LayerRow(_Strict):
    """What one layer keeps.

    Attributes:
        kind: see `fewbits.memory.shape.Kind`.
        cells: tokens kept of each sequence.
        window: tokens that it sees, None for all.
        kv_bytes, state_bytes: all sequences together.
    """

    layer: int
    kind: str
    cells: int
    window: int | None
    kv_bytes: Bytes
    state_bytes: Bytes


class Lever(_Strict):
    """One thing to change, and what comes of it.

    Attributes:
        name: `smaller quant`, `shorter context`, `quantized KV cache`, `experts in RAM` or `partial offload`.
        change: what to do, in words that name the option.
        option: the options of `fewbits memory` that say the same.
        gpu, host: bytes needed then.
    """

    name: str
    change: str
    option: str
    gpu: Bytes
    host: Bytes


class UsedFact(_Strict):
    """Something that is taken to be so of an engine, with its date and source."""

    what: str
    date: str
    source: str


class MemoryReport(_Strict):
    """How much memory a model takes in an engine.

    Attributes:
        source: file, directory or hub id.
        architecture: as GGUF (llama.cpp, ollama) or transformers calls it.
        target: what the model would be quantized to; None: as it is.
        context: tokens of each sequence.
        batch: sequences side by side.
        kv: type of the KV cache.
        certain: whether the architecture is known; if not, the figures are an upper bound.
        weights, kv_cache, recurrent_state, compute, runtime, margin: over all devices.
        total: their sum.
        devices: the same for each device.
        layers: what each layer keeps.
        n_layers: layers that can be offloaded, the output layer included (`-ngl`).
        layers_on_gpu: how many of them are on the GPU in these figures.
        fits: whether all devices have enough; None where the hardware is not known.
        layers_that_fit: most layers that fit on the GPU at this context; None likewise.
        max_context: longest context that fits, at most the model's own; 0 if none does; None likewise.
        tokens_that_fit: of engines that claim a share of the GPU: tokens that what is left of it holds.
        levers: what to change, in the order in which to try it; empty where it fits.
        notes: what the user should know.
        facts: what is taken to be so of the engine.
    """

    format_version: Literal[1] = 1
    source: str
    architecture: str
    engine: str
    target: str | None
    context: int
    batch: int
    kv: str
    certain: bool
    weights: Bytes
    kv_cache: Bytes
    recurrent_state: Bytes
    compute: Bytes
    runtime: Bytes
    margin: Bytes
    total: Bytes
    devices: list[DeviceMemory]
    layers: list[LayerRow]
    n_layers: int
    layers_on_gpu: int
    fits: bool | None
    layers_that_fit: int | None
    max_context: int | None
    tokens_that_fit: int | None
    levers: list[Lever]
    notes: list[str]
    facts: list[UsedFact]

    def device(self, name: str) -> DeviceMemory | None:
        """The device of this name, None where nothing is on it."""
        return next((device for device in self.devices if device.device == name), None)
