"""What can be made from what, generated from the registries."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from fewbits import arch
from fewbits.codecs import CODECS
from fewbits.layouts import LAYOUTS
from fewbits.layouts.engines import engines_of
from fewbits.methods import METHODS
from fewbits.plan import PRESETS
from fewbits.plan.directory import directory_targets, methods_for


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PresetRow(_Row):
    """A target: its name, the bits per weight of a whole 8B model, what to expect."""

    name: str
    bits_per_weight: float | None
    summary: str


class EngineRow(_Row):
    """What an engine does with a target on some hardware, when that was seen (`runs`, `refuses`) or read."""

    engine: str
    hardware: str
    verdict: str
    date: str
    note: str


class DirectoryRow(_Row):
    """A target that makes a model directory.

    Attributes:
        bits_per_weight: of a linear of 4096 x 4096, scales and zero points included.
        methods: ways of choosing its codes, the usual one first.
    """

    name: str
    bits_per_weight: float
    methods: list[str]
    summary: str
    engines: list[EngineRow]


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
    directories: list[DirectoryRow]
    gguf_engines: list[EngineRow]
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
        directories=[_directory(name, summary) for name, summary in directory_targets().items()],
        gguf_engines=_engines("Q4_K_M"),
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


def _directory(name: str, summary: str) -> DirectoryRow:
    family, _, spec = name.partition(":")
    layout = LAYOUTS[family].from_spec(spec).for_floats("F16")
    stored = sum(part.nbytes for part in layout.parts((4096, 4096)).values())
    return DirectoryRow(
        name=name,
        bits_per_weight=8 * stored / 4096**2,
        methods=list(methods_for(layout)),
        summary=summary,
        engines=_engines(name),
    )


def _engines(target: str) -> list[EngineRow]:
    return [
        EngineRow(engine=f.engine, hardware=f.hardware, verdict=f.verdict, date=f.date, note=f.note)
        for f in engines_of(target)
    ]
