"""The model card: README.md with what the hub reads in front, and what a person wants to know below."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from fewbits.checkpoint import GGUFCheckpoint, Model
from fewbits.checkpoint.hub import HUB_ID
from fewbits.version import __version__

MAX_CARD_BYTES = 4 << 20
MAX_TAGS = 40
FORMAT_TAGS = {
    "gguf", "gptq", "awq", "exl2", "exl3", "mlx", "bitsandbytes", "compressed-tensors", "hqq", "onnx", "fp8", "fp4",
    "bitnet", "aqlm", "nvfp4", "mxfp4", "int8", "w8a8", "4-bit", "8-bit", "quantized", "quark", "auto-round",
}  # fmt: skip
"""Tags of a source that speak of its storage and not of the model."""
LOCAL_FOLDERS = {
    "models", "model", "output", "outputs", "out", "results", "checkpoint", "checkpoints", "ckpt", "ckpts", "runs",
    "home", "root", "mnt", "data", "tmp", "workspace", "content", "work",
}  # fmt: skip
"""First parts of what looks like `owner/name` and is a folder on somebody's disk."""
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")

_LICENSE = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}")
_LANGUAGE = re.compile(r"[A-Za-z]{2,16}(-[A-Za-z0-9]{1,8}){0,3}")
_TAG = re.compile(r"[^\W_][\w .:/+-]{0,63}")
_LINK = re.compile(r"https?://[\x21-\x7e]{3,300}|[\w.-]{1,80}")
_TASK = re.compile(r"[a-z]+(-[a-z0-9]+){1,6}")


@dataclass(frozen=True)
class Origin:
    """What is known of the model that was quantized; everything of it may come from a stranger's files, checked.

    Attributes:
        name: for the title.
        base_model: hub id, None if it is not known.
    """

    name: str
    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    pipeline_tag: str = "text-generation"


@dataclass(frozen=True)
class CalibrationUsed:
    """The text that was calibrated on: file name and SHA-256 of each, tokens in all."""

    files: Sequence[tuple[str, str]]
    n_tokens: int


@dataclass(frozen=True)
class Measured:
    """A measured loss.

    Attributes:
        rows: name, value and 95 % interval, as text.
        ruler: the convention, in a sentence; without it the figures mean nothing.
        text: file name of what it was measured on.
    """

    rows: Sequence[tuple[str, str, str]]
    ruler: str
    text: str


@dataclass(frozen=True)
class Snippet:
    """How one engine loads the directory."""

    engine: str
    code: str
    language: str = "python"
    note: str = ""


@dataclass(frozen=True)
class CardFacts:
    """What the card tells.

    Attributes:
        target: e.g. `gptq:w4g128`.
        format: the ecosystem's name as the hub tags it, e.g. `gptq`.
        storage: storage type of the quantized weights, in words or by name.
        method: how the codes were chosen; None, as `command`, where the file does not tell.
        command: the exact command line.
        bits_per_weight: of the whole model.
        size_before: bytes of the source's tensors; `size_after` likewise.
        kept: which tensors stayed unquantized, in a phrase.
        library: that loads the directory, by the hub's name.
    """

    target: str
    format: str
    storage: str
    method: str | None
    command: str | None
    bits_per_weight: float
    size_before: int
    size_after: int
    kept: str = ""
    library: str = "transformers"
    calibration: CalibrationUsed | None = None
    measured: Measured | None = None
    snippets: Sequence[Snippet] = ()
    notes: Sequence[str] = ()


def origin_of(model: Model) -> Origin:
    """Name, base model, license, languages and tags, from the source's model card or GGUF metadata.

    Malformed or hostile metadata is left out, never an error: a card is not worth failing for.
    """
    if isinstance(model.checkpoint, GGUFCheckpoint):
        metadata = model.checkpoint.metadata
        # not general.base_model: that is what the source was trained from
        urls = [metadata.get(f"general.{key}repo_url") for key in ("source.", "")]
        front: Mapping[str, Any] = {
            "license": metadata.get("general.license"),
            "license_name": metadata.get("general.license.name"),
            "license_link": metadata.get("general.license.link"),
            "language": metadata.get("general.languages"),
            "tags": metadata.get("general.tags"),
            "base_model": [url.removeprefix("https://huggingface.co/") for url in urls if isinstance(url, str)],
            "base_model_relation": "quantized",
        }
        title = metadata.get("general.name")
        name = title if isinstance(title, str) and title.strip() else model.path.stem
    else:
        front = _front_matter(model)
        name = model.path.resolve().name
    base = _base_model(model, front)
    return Origin(
        name=base.split("/")[1] if base else _one_line(name)[:120],
        base_model=base,
        license=_text(front.get("license"), _LICENSE),
        license_name=_text(front.get("license_name"), _LICENSE),
        license_link=_text(front.get("license_link"), _LINK),
        language=_texts(front.get("language"), _LANGUAGE),
        tags=[tag for tag in _texts(front.get("tags"), _TAG) if tag.lower() not in FORMAT_TAGS],
        pipeline_tag=_text(front.get("pipeline_tag"), _TASK) or "text-generation",
    )


def _front_matter(model: Model) -> Mapping[str, Any]:
    card = model.path / "README.md"
    try:
        if not card.is_file() or card.stat().st_size > MAX_CARD_BYTES:
            return {}
        from huggingface_hub import metadata_load  # takes long to import

        return metadata_load(card) or {}
    except Exception:  # strangers' YAML can fail in any way, RecursionError among them
        return {}


def _base_model(model: Model, front: Mapping[str, Any]) -> str | None:
    """The hub id of what was quantized: of the source itself, or of its base where the source is a quantization too."""
    if front.get("base_model_relation") == "quantized":
        found = _texts(front.get("base_model"), HUB_ID)
        if found:
            return found[0]
    for part in reversed(model.path.parts):
        if cached := CACHED.fullmatch(part):  # the hub's cache
            return "/".join(cached.groups())
    named = model.config.get("_name_or_path")
    if not isinstance(named, str) or not HUB_ID.fullmatch(named) or len(named) > 120:
        return None
    owner, name = named.split("/")
    return None if owner.lower() in LOCAL_FOLDERS or name.startswith("checkpoint-") else named


def _text(value: Any, allowed: re.Pattern[str]) -> str | None:
    found = _texts(value, allowed)
    return found[0] if found else None


def _texts(value: Any, allowed: re.Pattern[str]) -> list[str]:
    """The strings of a scalar or list that are what they should be."""
    values = value[: 8 * MAX_TAGS] if isinstance(value, list) else [value]
    # YAML 1.1 reads Norwegian, `no`, as False
    texts = ["no" if item is False and allowed is _LANGUAGE else item for item in values]
    kept = [text for text in texts if isinstance(text, str) and allowed.fullmatch(text)]
    return list(dict.fromkeys(kept))[:MAX_TAGS]


def front_matter(origin: Origin, facts: CardFacts) -> str:
    """The YAML block of the card, without its dashes."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=origin.base_model,
        base_model_relation="quantized" if origin.base_model else None,
        language=origin.language or None,
        license=origin.license,
        license_name=origin.license_name,
        license_link=origin.license_link,
        library_name=facts.library,
        pipeline_tag=origin.pipeline_tag,
        tags=[*origin.tags, facts.format, "fewbits"],
    )
    return str(data.to_yaml())


def model_card(origin: Origin, facts: CardFacts) -> bytes:
    """README.md."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=False, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"code": _code, "fenced": _fenced, "cell": _cell, "line": _plain, "megabytes": _megabytes}
    template = resources.files(__package__).joinpath("card.md.jinja").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        front=front_matter(origin, facts), origin=origin, facts=facts, version=__version__
    )
    return text.encode("utf-8", "replace")


def _one_line(text: str) -> str:
    """Whitespace and control characters become single spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _plain(text: str) -> str:
    """A line of text without markup."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", _one_line(text))


def _cell(text: str) -> str:
    """A cell of a table."""
    return _one_line(text).replace("|", "\\|")


def _longest_ticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _code(text: str) -> str:
    """Code within a line, whatever it holds."""
    text = _one_line(text)
    ticks = "`" * (_longest_ticks(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _fenced(text: str, language: str = "") -> str:
    """A block of code, whatever it holds."""
    fence = "`" * max(3, _longest_ticks(text) + 1)
    lines = ["".join(c if c.isprintable() or c == "\t" else " " for c in line) for line in text.splitlines()]
    return "\n".join([fence + language, *lines, fence])


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
