"""The memory that each candidate needs, as `fewbits memory` predicts it, and what the user has."""

from __future__ import annotations

from dataclasses import dataclass

from fewbits.checkpoint import GGUFCheckpoint, Model
from fewbits.errors import FewbitsError
from fewbits.memory import Hardware, memory, named
from fewbits.report.schema import MemoryLine, MemoryUsed

DEFAULT_CONTEXT = 8192
PARTS = ("weights", "kv_cache", "recurrent_state", "compute", "runtime", "margin")


@dataclass(frozen=True)
class MemoryQuestion:
    """What memory is asked for, and on what.

    Attributes:
        context: tokens; None for `DEFAULT_CONTEXT`, or the model's longest where that is shorter.
        kv: type of the KV cache, None for f16.
        hardware: the user's; None for a graphics card that is large enough.
        name: what the user calls it.
    """

    context: int | None
    kv: str | None
    hardware: Hardware | None
    name: str

    @staticmethod
    def of(context: int | None, kv: str | None, gpu: str | None, size: str | None) -> MemoryQuestion:
        """From a card's name and a size of memory such as `8GB`; without both the user's hardware plays no part.

        Raises:
            FewbitsError: a card that is not known, or what is no size.
        """
        hardware = named(gpu, size) if gpu is not None or size is not None else None
        return MemoryQuestion(context, kv, hardware, ", ".join(part for part in (gpu, size) if part))

    def line(self) -> MemoryLine | None:
        """What the user has: the memory of the graphics cards, or of the machine where there is none."""
        if self.hardware is None:
            return None
        size = sum(gpu.vram for gpu in self.hardware.gpus) or self.hardware.ram
        return MemoryLine(label=self.name, size=size)

    def tokens(self, model: Model) -> int:
        """The context that is meant."""
        longest = model.config.get("max_position_embeddings")
        return self.context or min(DEFAULT_CONTEXT, longest if isinstance(longest, int) else DEFAULT_CONTEXT)

    def ask(self, model: Model) -> tuple[MemoryUsed | None, list[str]]:
        """What the graphics card (without one, the machine) needs with every layer on it; or why that is not known."""
        context = self.tokens(model)
        engine = "llama.cpp" if isinstance(model.checkpoint, GGUFCheckpoint) else "transformers"
        try:
            found = memory(model.path, context=context, kv=self.kv or "f16", engine=engine, hardware=self.hardware)
        except FewbitsError as error:
            return None, [f"its memory is not known: {error}"]
        device = found.device("GPU") or found.devices[0]
        used = MemoryUsed(
            total=device.needed,
            device=device.device,
            parts={part: int(getattr(device, part)) for part in PARTS if getattr(device, part)},
            engine=engine,
            context=found.context,
            certain=found.certain,
            notes=list(found.notes),
        )
        return used, []
