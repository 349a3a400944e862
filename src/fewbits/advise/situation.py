"""The situation of a user, reduced to what the decision table asks about."""

from __future__ import annotations

from dataclasses import dataclass

from fewbits.advise.schema import Machine
from fewbits.memory import Hardware

DATACENTER = (8.0, 9.0, 10.0, 10.3)
"""Compute capabilities of A100, H100, B200 and B300: none of them is sold for desktops."""


@dataclass(frozen=True)
class Situation:
    """Where a model is to run and what for.

    Attributes:
        engine, use: as the user named them; None if they did not.
    """

    hardware: Hardware
    engine: str | None
    use: str | None

    @property
    def kind(self) -> str:
        """Of the first GPU; `none` without."""
        return self.hardware.gpus[0].kind if self.hardware.gpus else "none"

    @property
    def vram_gib(self) -> float:
        """Of all GPUs."""
        return self.hardware.vram / 2**30

    @property
    def arch(self) -> float:
        """NVIDIA's compute capability, 0 where there is none or it is not known."""
        if self.kind != "nvidia":
            return 0.0
        try:
            return float(self.hardware.gpus[0].arch)
        except ValueError:
            return 0.0

    @property
    def datacenter(self) -> bool:
        """Whether the GPU is one of those that clouds rent."""
        return self.arch in DATACENTER

    @property
    def bandwidth(self) -> int:
        """Bytes a second that the first GPU reads; 0 if not known."""
        return self.hardware.gpus[0].bandwidth if self.hardware.gpus else 0

    @property
    def phrase(self) -> str:
        """The hardware in a few words."""
        if not self.hardware.gpus:
            return f"{self.hardware.ram / 2**30:.0f} GB of RAM, no GPU"
        names = [gpu.name for gpu in self.hardware.gpus]
        first = names[0] if len(names) == 1 else f"{len(names)}x {names[0]}"
        told = f"{self.vram_gib:.0f} GB"
        shared = "shared with the processor" if self.hardware.unified else "of VRAM"
        return first if told.replace(" ", "") in first.replace(" ", "") else f"{first} ({told} {shared})"

    def machine(self) -> Machine:
        found = self.hardware
        return Machine(
            cpu=found.cpu,
            cores=found.cores,
            ram=found.ram,
            gpus=[gpu.name for gpu in found.gpus],
            vram=found.vram,
            unified=found.unified,
        )
