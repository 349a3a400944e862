"""Ollama's recipe for a GGUF file. Syntax: ollama docs/modelfile.mdx and parser/parser.go (2026-06)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fewbits.checkpoint import GGUFCheckpoint
from fewbits.checkpoint.safetensors import read_json
from fewbits.errors import FewbitsError
from fewbits.export.dialects import Unknown, translate
from fewbits.export.jinja import ChatTemplate

CONTEXT = 8192
"""Tokens, unless said otherwise: with Ollama's own 4096 the beginning of a conversation is soon forgotten."""
SAMPLING = (
    ("temperature", "general.sampling.temp", "temperature"),
    ("top_k", "general.sampling.top_k", "top_k"),
    ("top_p", "general.sampling.top_p", "top_p"),
    ("min_p", "general.sampling.min_p", "min_p"),
    ("repeat_penalty", "general.sampling.penalty_repeat", "repetition_penalty"),
)
"""Ollama's parameter, the GGUF key, the name in generation_config.json."""
LLAMA_IDS = {"bos": 1, "eos": 2}
"""Ids that llama.cpp takes where a SentencePiece file names none."""
SHORT = {"unknown": "unk", "padding": "pad"}
BEGINS_WITH_BOS = ("llama-bpe", "llama3", "llama-v3", "tekken")
"""Pre-tokenizers for which llama.cpp adds BOS although the file does not say so (llama-vocab.cpp, 2026-10)."""
MAX_LICENSE = 1 << 18


@dataclass(frozen=True)
class Modelfile:
    """What goes into a Modelfile.

    Attributes:
        source: the GGUF file as FROM names it.
        template: Go; None leaves it to Ollama.
        dialect: what people call the template's framing; None where it is not known.
        parameters: name and value, `stop` more than once.
        notes: what the user should know.
    """

    source: str
    template: str | None
    dialect: str | None
    parameters: list[tuple[str, str]]
    system: str | None
    license: str | None
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The file.

        Raises:
            FewbitsError: a text that Modelfiles cannot hold.
        """
        lines = [f"FROM {self.source}"]
        if self.template is not None:
            lines.append(f"TEMPLATE {_block('template', self.template)}")
        lines += [f"PARAMETER {name} {_value(name, value)}" for name, value in self.parameters]
        if self.system:
            lines.append(f"SYSTEM {_block('system message', self.system)}")
        if self.license:
            lines.append(f"LICENSE {_block('license', self.license)}")
        return "\n".join(lines) + "\n"

    def repository_files(self) -> dict[str, str]:
        """Template, parameters and system message as files (hub docs, "Use Ollama with any GGUF Model", 2026-08)."""
        params: dict[str, Any] = {}
        for name, value in self.parameters:
            if name == "stop":
                params.setdefault("stop", []).append(value)
            else:
                params[name] = int(value) if value.isdigit() else float(value)
        files = {"params": json.dumps(params, indent=2) + "\n"}
        if self.template is not None:
            files["template"] = self.template
        if self.system:
            files["system"] = self.system
        return files


def modelfile(checkpoint: GGUFCheckpoint, at: Path, context: int | None = None, system: str | None = None) -> Modelfile:
    """The recipe for a GGUF file.

    Args:
        at: where the Modelfile will stand.
        context: tokens of a conversation; None: 8192, or what the model has.
        system: a system message for every conversation.

    Raises:
        FewbitsError: a split file.
    """
    metadata = checkpoint.metadata
    if int(metadata.get("split.count", 0)) > 1:
        raise FewbitsError(
            f"{checkpoint.path}: Ollama does not load split files.",
            f"Join it: fewbits quantize {checkpoint.path} COPY -o joined.gguf",
        )
    special = special_tokens(metadata)
    notes: list[str] = []
    template, dialect, stops = _template(metadata, special, notes)
    ends = [special[name] for name in ("eos_token", "eot_token", "eom_token") if name in special]
    if template is not None:
        stops = [*ends, *stops]
    architecture = str(metadata.get("general.architecture", ""))
    own = int(metadata.get(f"{architecture}.context_length", 0))
    parameters = [("stop", stop) for stop in dict.fromkeys(stops)]
    parameters += _sampling(metadata, checkpoint.path.parent)
    parameters.append(("num_ctx", str(context or min(CONTEXT, own or CONTEXT))))
    if context and own and context > own:
        notes.append(f"the model was made for {own} tokens, not {context}")
    return Modelfile(
        source=_relative(checkpoint.path, at),
        template=template,
        dialect=dialect,
        parameters=parameters,
        system=system,
        license=_license(metadata, checkpoint.path.parent),
        notes=notes,
    )


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens' texts by transformers' names (`bos_token`, ...), as templates and stops need them."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    defaults = LLAMA_IDS if metadata.get("tokenizer.ggml.model") == "llama" else {}
    found = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        number = metadata.get(f"tokenizer.ggml.{name}_token_id", defaults.get(name))
        if isinstance(number, int | np.integer) and isinstance(tokens, list) and 0 <= int(number) < len(tokens):
            found[{"unknown": "unk_token", "padding": "pad_token"}.get(name, f"{name}_token")] = str(
                tokens[int(number)]
            )
    return found


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether llama.cpp, and so Ollama, puts BOS in front of every prompt."""
    told = metadata.get("tokenizer.ggml.add_bos_token")
    if told is not None:
        return bool(told)
    return metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in BEGINS_WITH_BOS


def _template(
    metadata: Mapping[str, Any], special: Mapping[str, str], notes: list[str]
) -> tuple[str | None, str | None, list[str]]:
    source = metadata.get("tokenizer.chat_template")
    if not isinstance(source, str) or not source:
        notes.append("the file has no chat template: Ollama hands prompts over as they are, as base models want it")
        return None, None, []
    bos = special.get("bos_token", "") if adds_bos(metadata) else ""
    try:
        found = translate(ChatTemplate(source, special), bos)
    except FewbitsError as error:
        reason = error.message if isinstance(error, Unknown) else str(error)
        notes.append(
            f"no TEMPLATE is written ({reason}): Ollama compares the file's own template with those that it knows, and "
            "hands prompts over as they are if none is close. Look at `ollama show --template`, or add a TEMPLATE"
        )
        return None, None, []
    if "tools" in source:
        notes.append("the TEMPLATE holds conversations; the model's format for calling tools is left out")
    if found.frames.where == "refused":
        notes.append("the model has no place for system messages: they go in front of the first question")
    return found.template, found.name, list(found.stops)


def _sampling(metadata: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """What the model's makers recommend: in the file, or in a generation_config.json beside it."""
    beside = folder / "generation_config.json"
    config = read_json(beside) if beside.is_file() else {}
    found = []
    for name, key, other in SAMPLING:
        value = metadata.get(key, config.get(other))
        if isinstance(value, int | float | np.number) and not isinstance(value, bool):
            found.append((name, f"{float(value):.6g}"))
    return found


def _license(metadata: Mapping[str, Any], folder: Path) -> str | None:
    """The license beside the file, else its name in the metadata."""
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        path = folder / name
        if path.is_file() and path.stat().st_size <= MAX_LICENSE:
            text = path.read_text(encoding="utf-8", errors="replace")
            if '"""' not in text:
                return text.strip()
    named = [metadata.get(f"general.license{part}") for part in (".name", "", ".link")]
    told = [value.strip() for value in named if isinstance(value, str) and value.strip() and '"""' not in value]
    return " ".join(dict.fromkeys(told)) or None


def _relative(file: Path, at: Path) -> str:
    """As FROM takes it: relative to the Modelfile where the file is beside or below it."""
    folder, resolved = at.resolve().parent, file.resolve()
    name = f"./{resolved.relative_to(folder)}" if resolved.is_relative_to(folder) else str(resolved)
    if "\n" in name or '"' in name:
        raise FewbitsError(f"{file}: a Modelfile cannot hold this name.", "Rename the file.")
    return f'"{name}"' if " " in name else name


def _block(what: str, text: str) -> str:
    if '"""' in text:
        raise FewbitsError(f'The {what} holds """, which a Modelfile cannot.', "Change it.")
    return f'"""{text}"""'


def _value(name: str, value: str) -> str:
    if name != "stop":
        return value
    return _block("stop string", value) if '"' in value or "\n" in value else f'"{value}"'
