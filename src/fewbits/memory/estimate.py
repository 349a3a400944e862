"""The answer: weights, cache, working memory and overhead on each device, what fits, and what to change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from fewbits.errors import FewbitsError
from fewbits.memory.cache import CacheRule, CacheUse, cache_of, padded
from fewbits.memory.compute import FLOAT, Batch, compute_buffer
from fewbits.memory.engines import Engine
from fewbits.memory.hardware import Hardware
from fewbits.memory.report import DeviceMemory, Lever
from fewbits.memory.shape import ModelShape
from fewbits.memory.weights import EMBEDDINGS, Loaded, smaller_presets

LONGEST = 2**24
"""Tokens: past every model's context."""
SMALLER_CACHES = ("q8_0", "q8", "fp8", "q6", "q4_0", "q4")


@dataclass(frozen=True)
class Setting:
    """What is asked about.

    Attributes:
        layers_on_gpu: how many layers are offloaded, counted from the last, the output layer first (`-ngl`).
        experts_in_ram: whether the experts stay in RAM, whatever is offloaded (`--cpu-moe`).
    """

    context: int
    batch: int
    kv: str
    layers_on_gpu: int
    experts_in_ram: bool = False


@dataclass(frozen=True)
class _Placement:
    """Bytes of weights by where they can go."""

    embedding: int
    outside: int
    tied: int
    blocks: tuple[int, ...]
    experts: tuple[int, ...]


@dataclass(frozen=True)
class Estimator:
    """One model in one engine, on hardware that may not be known."""

    shape: ModelShape
    engine: Engine
    loaded: Loaded
    hardware: Hardware | None

    @property
    def n_layers(self) -> int:
        """Layers that can be offloaded; the output layer counts as one."""
        return self.shape.stored_layers + 1 if self.engine.rule == "llama.cpp" else self.shape.stored_layers

    @cached_property
    def _placement(self) -> _Placement:
        count = self.shape.stored_layers
        blocks, experts = [0] * count, [0] * count
        embedding = outside = tied = 0
        head = any(weight.name == "output.weight" for weight in self.loaded.weights)
        for weight in self.loaded.weights:
            if 0 <= weight.block < count:
                (experts if weight.experts else blocks)[weight.block] += weight.nbytes
            elif self.engine.rule == "llama.cpp" and weight.name in EMBEDDINGS:
                embedding += weight.nbytes
                # the output layer gets a copy of its own where it is somewhere else
                tied += weight.nbytes if weight.name == "token_embd.weight" and not head else 0
            else:
                outside += weight.nbytes
        return _Placement(embedding, outside, tied, tuple(blocks), tuple(experts))

    def cache(self, setting: Setting) -> list[CacheUse]:
        """What each layer keeps."""
        return cache_of(self.shape.layers, self._rule, setting.kv, setting.context, setting.batch)

    @property
    def _rule(self) -> CacheRule:
        return self.engine.cache

    def devices(self, setting: Setting) -> list[DeviceMemory]:
        """What is needed where."""
        where = self._by_llama_cpp(setting) if self.engine.rule == "llama.cpp" else self._by_torch(setting)
        return [self._device(name, parts) for name, parts in where.items() if any(parts.values())]

    def _by_llama_cpp(self, setting: Setting) -> dict[str, dict[str, int]]:
        place, uses, layers = self._placement, self.cache(setting), setting.layers_on_gpu
        first = max(self.n_layers - layers, 0)  # blocks from here on are on the GPU
        on_gpu = range(first, len(self.shape.layers)) if layers else range(0)
        kept = range(0, min(first, len(self.shape.layers))) if layers else range(len(self.shape.layers))
        moved = sum(place.experts[index] for index in on_gpu)
        gpu = {
            "weights": sum(place.blocks[index] for index in on_gpu) + (0 if setting.experts_in_ram else moved),
            "kv_cache": sum(uses[index].nbytes for index in on_gpu),
            "recurrent_state": sum(uses[index].state_bytes for index in on_gpu),
        }
        host = {
            "weights": place.embedding + sum(place.blocks[index] + place.experts[index] for index in kept),
            "kv_cache": sum(uses[index].nbytes for index in kept),
            "recurrent_state": sum(uses[index].state_bytes for index in kept),
        }
        host["weights"] += moved if setting.experts_in_ram else 0
        step = self._batch(setting)
        whole = compute_buffer(self.shape, step)
        inputs = self._inputs(setting)
        logits = self.shape.vocabulary * FLOAT * setting.batch
        if layers:
            gpu["weights"] += place.outside + place.tied
            # llama.cpp brings weights that lie in RAM to the GPU to compute prompts (op_offload)
            left = [
                w.nbytes for w in self.loaded.weights if 0 <= w.block < first or (setting.experts_in_ram and w.experts)
            ]
            gpu["compute"] = compute_buffer(self.shape, replace(step, staged=2 * max(left, default=0)))
            host["compute"] = (whole if kept or setting.experts_in_ram else inputs) + logits
            gpu["runtime"] = self.engine.runtime * max(len(self.hardware.gpus) if self.hardware else 1, 1)
            gpu["margin"] = self.engine.margin * max(len(self.hardware.gpus) if self.hardware else 1, 1)
        else:
            host["weights"] += place.outside
            host["compute"] = whole + logits
        host["margin"] = self._host_margin
        return {"GPU": gpu, "host": host}

    @property
    def _host_margin(self) -> int:
        """RAM for the rest of the machine; small boards run little else."""
        return min(self.engine.host_margin, self.hardware.ram // 4) if self.hardware else 0

    def _batch(self, setting: Setting) -> Batch:
        context = padded(setting.context, self._rule.pad)
        windows = [
            use.cells
            for use, layer in zip(self.cache(setting), self.shape.layers, strict=True)
            if layer.window is not None
        ]
        step = min(self.engine.step or setting.context, context)
        outputs = step if self.engine.every_output else min(setting.batch, step)
        return Batch(step, outputs, context, max(windows, default=0), flash=True)

    def _inputs(self, setting: Setting) -> int:
        """What llama.cpp prepares in RAM for a step: the tokens' embeddings and the masks."""
        batch = self._batch(setting)
        return (self.shape.hidden + batch.cells + batch.window_cells) * batch.tokens * FLOAT

    def _by_torch(self, setting: Setting) -> dict[str, dict[str, int]]:
        place, uses, layers = self._placement, self.cache(setting), setting.layers_on_gpu
        count = len(self.shape.layers)
        on_gpu = range(min(layers, count)) if layers else range(0)
        kept = range(len(on_gpu), count)
        parts: dict[str, dict[str, int]] = {}
        for name, blocks in (("GPU", on_gpu), ("host", kept)):
            parts[name] = {
                "weights": sum(place.blocks[index] + place.experts[index] for index in blocks),
                "kv_cache": sum(uses[index].nbytes for index in blocks),
                "recurrent_state": sum(uses[index].state_bytes for index in blocks),
            }
        main = parts["GPU" if layers else "host"]
        main["weights"] += place.outside + place.embedding
        main["compute"] = self._activations(setting)
        cards = max(len(self.hardware.gpus) if self.hardware else 1, 1)
        if layers:
            main["runtime"] = self.engine.runtime * cards
            share = self.engine.share
            if share is None:
                main["margin"] = self.engine.margin * cards
            elif self.hardware is not None:
                main["margin"] = int(self.hardware.usable_vram * (1 - share))
        if any(parts["host"].values()):
            parts["host"]["margin"] = self._host_margin
        return parts

    def _activations(self, setting: Setting) -> int:
        """Of one step: gate, up and their product, the residual stream and its copies; then the logits."""
        shape, engine = self.shape, self.engine
        step = engine.step or setting.context * setting.batch
        inner = 3 * max(shape.feed_forward, shape.experts_used * shape.expert_width, shape.inner)
        inner += shape.experts_used * shape.hidden
        logits = (
            min(engine.sampled, max(setting.batch, engine.sampled)) * shape.vocabulary * FLOAT * engine.logit_copies
        )
        return step * (inner + 4 * shape.hidden) * engine.activation_bytes + logits

    def _device(self, name: str, parts: dict[str, int]) -> DeviceMemory:
        names = ("weights", "kv_cache", "recurrent_state", "compute", "runtime", "margin")
        values = {part: parts.get(part, 0) for part in names}
        needed = sum(values.values())
        available = None
        if self.hardware is not None:
            available = self.hardware.usable_vram if name == "GPU" else self.hardware.ram
        fits = None if available is None else needed <= available
        return DeviceMemory(device=name, needed=needed, available=available, fits=fits, **values)  # type: ignore[arg-type]

    def fits(self, setting: Setting) -> bool | None:
        """Whether every device has enough; None where the hardware is not known."""
        if self.hardware is None:
            return None
        devices = self.devices(setting)
        if self.hardware.unified and sum(device.needed for device in devices) > self.hardware.ram:
            return False
        return all(device.fits for device in devices)

    def layers_that_fit(self, setting: Setting) -> int:
        """Most layers that the GPU holds, and the RAM the rest; 0 too where nothing fits anywhere."""
        if self.hardware is None or not self.hardware.gpus:
            return 0
        for layers in range(self.n_layers, 0, -1):
            if layers < self.n_layers and not self.engine.partial:
                return 0
            gpu = next((d for d in self.devices(replace(setting, layers_on_gpu=layers)) if d.device == "GPU"), None)
            if gpu is not None and gpu.fits:
                return layers
        return 0

    def longest(self, setting: Setting) -> int:
        """Longest context that fits, a multiple of 256; at most the model's own; 0 if none does."""
        most = min(max(self.shape.context_length, setting.context) or LONGEST, LONGEST)
        return 256 * last_true(lambda n: bool(self.fits(replace(setting, context=256 * n))), max(most // 256, 1))

    def tokens(self, setting: Setting) -> int | None:
        """Tokens that fit into what is left of an engine's share of the GPU."""
        if self.engine.share is None or self.hardware is None or not self.hardware.gpus:
            return None
        gpu = next(d for d in self.devices(setting) if d.device == "GPU")
        left = self.hardware.usable_vram - (gpu.needed - gpu.kv_cache - gpu.recurrent_state)

        def holds(blocks: int) -> bool:
            uses = self.cache(replace(setting, context=blocks * self._rule.pad, batch=1))
            return sum(use.nbytes + use.state_bytes for use in uses) <= left

        return last_true(holds, LONGEST * 64 // self._rule.pad) * self._rule.pad

    def levers(self, setting: Setting) -> list[Lever]:
        """What to change so that it fits, in the field guide's order; what does not help is left out."""
        found = []
        smaller = self._smaller(setting)
        if smaller is not None:
            found.append(smaller)
        longest = self.longest(setting)
        if 0 < longest < setting.context:
            change = f"a context of {longest} tokens instead of {setting.context}"
            found.append(
                self._lever("shorter context", change, f"--context {longest}", replace(setting, context=longest))
            )
        for kind in SMALLER_CACHES:
            other = replace(setting, kv=kind)
            if kind in self.engine.cache_types and kind != setting.kv and self.fits(other):
                change = f"a KV cache in {kind} instead of {setting.kv}"
                found.append(self._lever("quantized KV cache", change, f"--kv {kind}", other))
                break
        if self.engine.rule == "llama.cpp" and self.shape.experts and setting.layers_on_gpu:
            other = replace(setting, experts_in_ram=True)
            if self.fits(other):
                found.append(self._lever("experts in RAM", "the experts in RAM (llama.cpp's --cpu-moe)", "", other))
        layers = self.layers_that_fit(setting)
        if 0 < layers < setting.layers_on_gpu:
            other = replace(setting, layers_on_gpu=layers)
            if self.fits(other):
                change = f"{layers} of {self.n_layers} layers on the GPU, the others in RAM: slower"
                found.append(self._lever("partial offload", change, f"--layers-on-gpu {layers}", other))
        return found

    def _smaller(self, setting: Setting) -> Lever | None:
        if self.engine.rule != "llama.cpp":
            return None
        for name in smaller_presets(self.loaded):
            other = replace(self, loaded=self.loaded.at(name))
            if other.fits(setting):
                return other._lever("smaller quant", f"{name} instead", f"--target {name}", setting)
        return None

    def _lever(self, name: str, change: str, option: str, setting: Setting) -> Lever:
        needed = {device.device: device.needed for device in self.devices(setting)}
        return Lever(name=name, change=change, option=option, gpu=needed.get("GPU", 0), host=needed.get("host", 0))


def last_true(holds: Callable[[int], bool], most: int) -> int:
    """The largest n in 1..most for which a condition holds that holds up to some n; 0 if for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def checked_kv(engine: Engine, kv: str) -> str:
    """The type of the KV cache as the engine knows it.

    Raises:
        FewbitsError: it has no such type.
    """
    if kv.lower() not in engine.cache_types:
        raise FewbitsError(f"{engine.name} has no KV cache in {kv!r}.", f"It has: {', '.join(engine.cache_types)}.")
    return kv.lower()
