"""What can be made from what, generated from the registries."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict

from fewbits import arch
from fewbits.codecs import CODECS
from fewbits.layouts import LAYOUTS, Layout
from fewbits.layouts.engines import engines_of
from fewbits.methods import METHODS
from fewbits.methods.gptq import feedback_span
from fewbits.plan import PRESETS
from fewbits.plan.directory import directory_targets, methods_for, nearest


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


class OpenRow(_Row):
    """A target that makes a model directory and leaves the bits open: a budget or a saved plan chooses them by layer.

    Attributes:
        widths: the bits that it chooses among.
        named_widths: those of them that it takes only where `--types` names them.
        least, most: bits per weight of a linear of 4096 x 4096, scales and zero points included.
        methods: ways of choosing its codes, the usual one first.
    """

    name: str
    widths: list[int]
    named_widths: list[int]
    least: float
    most: float
    methods: list[str]
    engines: list[EngineRow]

    @property
    def choice(self) -> str:
        """The bits in words."""
        usual = ", ".join(str(width) for width in self.widths if width not in self.named_widths)
        named = ", ".join(str(width) for width in self.named_widths)
        return f"{usual}; {named} by --types" if named else usual


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
    open_directories: list[OpenRow]
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
        open_directories=_open_directories(),
        gguf_engines=_engines("Q4_K_M"),
        codecs=[
            CodecRow(
                name=codec.name,
                bits_per_weight=codec.bits_per_weight(),
                block=codec.block,
                weighted=codec.weighted,
                feedback=feedback_span(codec) > 0,
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
    kind = LAYOUTS[family]
    members = kind.members(spec)
    # where a mean is named, a layout near to it stands for the mixture
    rate = kind.rate(spec) if members else None
    layout = kind.from_spec(spec) if rate is None else nearest(members, rate)
    return DirectoryRow(
        name=name,
        bits_per_weight=_stored_bits(layout) if rate is None else rate,
        methods=list(methods_for(layout)),
        summary=summary,
        engines=_engines(name),
    )


def _open_directories() -> list[OpenRow]:
    """Of each target with bits in its name the one without, where there is such."""
    specs = [name.partition(":") for name in directory_targets()]
    names = dict.fromkeys((family, re.sub(r"^(w|int)\d+", "", spec)) for family, _, spec in specs)
    found = [(f"{family}:{spec}", LAYOUTS[family], LAYOUTS[family].members(spec)) for family, spec in names]
    return [_open(name, kind, members) for name, kind, members in found if members and name not in directory_targets()]


def _open(name: str, kind: type[Layout], members: tuple[Layout, ...]) -> OpenRow:
    bits = [_stored_bits(layout) for layout in members]
    return OpenRow(
        name=name,
        widths=list(kind.widths),
        named_widths=list(kind.rare_widths),
        least=min(bits),
        most=max(bits),
        methods=list(methods_for(nearest(members, 4))),
        engines=_engines(name),
    )


def _stored_bits(layout: Layout) -> float:
    """Of a linear of 4096 x 4096, bits per weight."""
    parts = layout.for_floats("F16").parts((4096, 4096))
    return 8 * sum(part.nbytes for part in parts.values()) / 4096**2


def _engines(target: str) -> list[EngineRow]:
    return [
        EngineRow(engine=f.engine, hardware=f.hardware, verdict=f.verdict, date=f.date, note=f.note)
        for f in engines_of(target)
    ]
