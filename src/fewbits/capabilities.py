"""What can be made from what, generated from the registries."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from fewbits import arch
from fewbits.codecs import CODECS
from fewbits.methods import METHODS
from fewbits.plan import PRESETS


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PresetRow(_Row):
    """A target: its name, the bits per weight of a whole 8B model, what to expect."""

    name: str
    bits_per_weight: float | None
    summary: str


class CodecRow(_Row):
    """A storage type."""

    name: str
    bits_per_weight: float
    block: int
    weighted: bool
    feedback: bool


class MethodRow(_Row):
    """A way of choosing codes."""

    name: str
    summary: str


class ArchitectureRow(_Row):
    """A model family: its name in config.json and in a GGUF's `general.architecture`."""

    family: str
    architecture: str
    gguf: str


class Capabilities(_Row):
    """The capability table."""

    presets: list[PresetRow]
    codecs: list[CodecRow]
    methods: list[MethodRow]
    architectures: list[ArchitectureRow]


def capabilities() -> Capabilities:
    """The capability table, as `fewbits list` prints it."""
    return Capabilities(
        presets=[
            PresetRow(
                name=preset.name,
                bits_per_weight=preset.bits_per_weight,
                summary=preset.summary,
            )
            for preset in PRESETS.values()
        ],
        codecs=[
            CodecRow(
                name=codec.name,
                bits_per_weight=codec.bits_per_weight(),
                block=codec.block,
                weighted=codec.weighted,
                feedback=codec.code_bytes is not None,
            )
            for codec in sorted(CODECS.values(), key=lambda c: (c.bits_per_weight(), c.name))
        ],
        methods=[MethodRow(name=method.name, summary=method.summary) for method in METHODS.values()],
        architectures=[
            ArchitectureRow(family=family.name, architecture=family.architecture, gguf=family.gguf)
            for family in arch.FAMILIES
        ],
    )
