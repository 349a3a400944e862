"""One model at one target on one machine: bytes, fit, speed limit and loss, as an option to rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from fewbits.advise.engines import LEAST_ARCH, EngineChoice, can_make, nearest, nominal_bits, runs_in
from fewbits.advise.losses import LOSSLESS, expected_loss
from fewbits.advise.schema import ExpectedLoss, Fit, Option
from fewbits.advise.situation import Situation
from fewbits.errors import FewbitsError
from fewbits.memory import Described, Lever, MemoryReport, ModelShape, memory
from fewbits.memory.engines import engine as memory_engine
from fewbits.memory.weights import Loaded, load
from fewbits.plan import PRESETS

AS_IT_IS = "as it is"
QUANTIZED = 9.0
"""Bits per weight of a whole file below which it has been quantized already."""
EXPERTS_IN_RAM = "experts in RAM"
"""The name of a lever of `fewbits.memory`."""
RESERVE = 0.02
"""Share of a budget that is kept back: prediction is not measurement."""


@dataclass(frozen=True)
class Case:
    """One model in one engine on one machine.

    Attributes:
        context: tokens that memory is predicted for.
        fixed: whether the user asked for that context.
    """

    described: Described
    choice: EngineChoice
    situation: Situation
    context: int
    fixed: bool = False

    @property
    def name(self) -> str:
        return self.described.name

    @cached_property
    def shape(self) -> ModelShape:
        return self.described.shape(llama_cpp=True)

    @cached_property
    def _native(self) -> Loaded:
        """The model's tensors as they are, as GGUF names them."""
        return load(self.described, memory_engine("llama.cpp"), self.shape, None)

    @cached_property
    def quantized(self) -> bool:
        """Whether the model comes quantized already."""
        if self.described.kind != "gguf":
            return "quantization_config" in self.described.config
        return self.native_bits < QUANTIZED

    @cached_property
    def n_weights(self) -> int:
        if self.described.kind == "directory" and self.quantized:
            # packed tensors have other shapes: two 4-bit weights lie in a byte
            assert self.described.checkpoint is not None
            return 2 * sum(info.nbytes for info in self.described.checkpoint.tensors.values())
        return sum(prod(weight.shape) for weight in self._native.weights)

    @cached_property
    def native_bits(self) -> float:
        return 8 * self._native.nbytes / max(self.n_weights, 1)

    @property
    def experts(self) -> bool:
        return self.shape.experts > 0

    def option(self, target: str, kv: str = "f16", context: int | None = None) -> Option:
        """The model at a target.

        Args:
            target: of `fewbits quantize`, a target that it cannot make, or `AS_IT_IS`.
            context: instead of the case's own.
        """
        context = context or self.context
        if target != AS_IT_IS and not can_make(target):
            return self._nominal(target, context, kv)
        report, name = self._report(target, context, kv)
        if report is None:
            return self._nominal(name, context, kv, note="this model's rows do not take it")
        return self._measured(name, report, context, kv)

    def levers(self, target: str) -> tuple[int, list[Lever]]:
        """The longest context at which a target fits whole, and what else would make it fit."""
        report = self._report(target, self.context, "f16")[0]
        return (report.max_context or 0, list(report.levers)) if report is not None else (0, [])

    def _report(self, target: str, context: int, kv: str, layers: int | None = None) -> tuple[MemoryReport | None, str]:
        """The prediction, and the target as it fits this model: groups of 128 do not divide every row."""
        for name in (target, *(target.replace("g128", f"g{size}") for size in (64, 32) if "g128" in target)):
            try:
                return self._predict(None if name == AS_IT_IS else name, context, kv, layers), name
            except FewbitsError:
                if name == AS_IT_IS or ":" not in name:
                    raise
        return None, target

    def _predict(self, target: str | None, context: int, kv: str, layers: int | None) -> MemoryReport:
        return memory(
            self.described,
            target=target,
            context=context,
            kv=kv,
            engine=self.choice.memory,
            layers_on_gpu=layers,
            hardware=self.situation.hardware,
        )

    def _measured(self, target: str, report: MemoryReport, context: int, kv: str) -> Option:
        fits, layers = self._fit(target, report, context, kv)
        if fits == "partly" and layers is not None:
            report = self._report(target, context, kv, layers)[0] or report
        loaded = self._loaded(target)
        gpu, host = report.device("GPU"), report.device("host")
        decides = gpu or host
        return Option(
            model=self.name,
            target=target,
            can_make=True,
            nearest=None,
            engine=self.choice.name,
            runs_in=[] if target == AS_IT_IS else runs_in(target),
            bits_per_weight=round(8 * loaded.nbytes / max(self.n_weights, 1), 2),
            file_bytes=loaded.nbytes,
            gpu_bytes=gpu.needed if gpu else 0,
            host_bytes=host.needed if host else 0,
            available=decides.available if decides else None,
            fits=fits,
            context=context,
            kv=kv,
            layers_on_gpu=layers,
            n_layers=report.n_layers,
            max_context=report.max_context,
            tokens_per_second_at_most=self._speed(loaded) if fits == "whole" else None,
            loss=self._loss(target),
            note=self._note(target),
        )

    def _fit(self, target: str, report: MemoryReport, context: int, kv: str) -> tuple[Fit, int | None]:
        if report.fits:
            return "whole", None
        if not self.situation.hardware.gpus or self.situation.hardware.unified:
            return "no", None
        layers = report.layers_that_fit or 0
        if layers == 0 and not memory_engine(self.choice.memory).partial:
            return "no", None
        partial = self._report(target, context, kv, layers)[0]
        return ("partly", layers) if partial is not None and partial.fits else ("no", None)

    def _loaded(self, target: str) -> Loaded:
        engine = memory_engine(self.choice.memory)
        if engine.rule == "llama.cpp":
            return self._native if target == AS_IT_IS else self._native.at(target)
        shape = self.described.shape(llama_cpp=False)
        return load(self.described, engine, shape, None if target == AS_IT_IS else target)

    def _loss(self, target: str) -> ExpectedLoss:
        if target != AS_IT_IS:
            return expected_loss(target, self.n_weights)
        text = "has happened already" if self.quantized else "none"
        return ExpectedLoss(low=None, high=None, models=[], text=text, figures=[])

    def _note(self, target: str) -> str:
        if target == AS_IT_IS or not self.quantized:
            return ""
        return "made from a quantized model, both losses add up"

    def _speed(self, loaded: Loaded) -> float | None:
        """Tokens a second if every active weight is read once at the full bandwidth of the GPU."""
        bandwidth = self.situation.bandwidth
        if not bandwidth:
            return None
        share = self.shape.experts_used / self.shape.experts if self.shape.experts else 1.0
        read = sum(w.nbytes * (share if w.experts else 1.0) for w in loaded.weights if w.name != "token_embd.weight")
        return round(bandwidth / max(read, 1.0), 1)

    def _nominal(self, target: str, context: int, kv: str, note: str = "") -> Option:
        """A target whose tensors are not known: its size by its name, everything else by a stand-in's."""
        bits, instead = nominal_bits(target), nearest(target)
        size = int(self.n_weights * bits / 8) if bits else None
        stand_in = self._stand_in(context, kv) if size else None
        gpu = host = available = None
        fits: Fit | None = None
        if stand_in is not None and size is not None:
            report, loaded = stand_in
            moved = {
                d.device: d.needed - loaded.nbytes + size for d in report.devices if d.weights >= loaded.nbytes // 2
            }
            decides = next((d for d in report.devices if d.device in moved), None)
            gpu, host = moved.get("GPU", 0), moved.get("host", 0)
            available = decides.available if decides else None
            fits = "whole" if available is not None and (gpu or host) <= available else "no"
        return Option(
            model=self.name,
            target=target,
            can_make=False,
            nearest=instead[0] if instead else None,
            engine=self.choice.name,
            runs_in=[],
            bits_per_weight=bits,
            file_bytes=size,
            gpu_bytes=gpu,
            host_bytes=host,
            available=available,
            fits=fits,
            context=context,
            kv=kv,
            layers_on_gpu=None,
            n_layers=None,
            max_context=None,
            tokens_per_second_at_most=None,
            loss=expected_loss(target, self.n_weights),
            note=note or "not made by fewbits yet; size by its name",
        )

    def _stand_in(self, context: int, kv: str) -> tuple[MemoryReport, Loaded] | None:
        """Another target in the same engine: cache and working memory do not depend on how weights are stored."""
        name = "TQ2_0" if memory_engine(self.choice.memory).rule == "llama.cpp" else "gptq:w4g128"
        report, fitting = self._report(name, context, kv)
        return (report, self._loaded(fitting)) if report is not None else None

    def spare(self, option: Option) -> float:
        """Share of the deciding device that an option leaves free."""
        if option.fits != "whole" or not option.available:
            return 0.0
        used = option.gpu_bytes or option.host_bytes or 0
        return 1 - used / option.available

    def budget(self, option: Option) -> int | None:
        """Bytes of a file that fills the memory, given an option whose rest is known; None where there is no point."""
        if not self.choice.gguf or not option.available or option.file_bytes is None:
            return None
        used = option.gpu_bytes or option.host_bytes or 0
        size = int((option.file_bytes + option.available - used) * (1 - RESERVE))
        return size if size > 0 else None

    def ladder(self) -> list[str]:
        """Targets of the engine that make sense for this model, from the least loss to the most."""
        arch = self.situation.arch
        if not self.quantized:
            return [target for target in self.choice.ladder if not 0 < arch < LEAST_ARCH.get(target, 0)]
        levels = [target for target in self.choice.ladder if target not in LOSSLESS]
        return [AS_IT_IS, *(target for target in levels if (_bits(target) or 0) < 0.95 * self.native_bits)]


def _bits(target: str) -> float | None:
    return PRESETS[target].bits_per_weight if target in PRESETS else nominal_bits(target)
