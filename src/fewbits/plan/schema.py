"""The plan: for each tensor its type, method and exact size, as a file that can be read, edited and executed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fewbits.errors import FewbitsError
from fewbits.plan.tensors import layer_of

Line = Annotated[str, Field(min_length=1, max_length=4000, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""Text that is printed to terminals: one line, no control characters."""
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PlannedTensor(_Strict):
    """One tensor of the output.

    Attributes:
        name: in the output file.
        shape: row-major, the last axis contiguous.
        source_dtype: the type it has before.
        codec: the type it gets, e.g. `Q4_K`.
        method: how its codes are chosen: `copy` (bytes as they are), `convert` (to another float type), `search`, ...
        nbytes: exact size in the file, without padding.
        reason: why this type, e.g. `mixture`, `override 'ffn_down'`.
        wanted: the type that its rows do not divide by and that `codec` stands in for, or None.
    """

    name: Line
    shape: Annotated[tuple[Annotated[int, Field(ge=1, le=2**48)], ...], Field(min_length=1, max_length=4)]
    source_dtype: Line
    codec: Line
    method: Line
    nbytes: Count
    reason: Line
    wanted: Line | None = None

    @property
    def n_weights(self) -> int:
        return prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / self.n_weights


class PlannedFile(_Strict):
    """One file of the output: its name within the output's folder and its size in bytes."""

    name: Line
    size: Count

    @field_validator("name")
    @classmethod
    def _no_path(cls, name: str) -> str:
        if name in (".", "..") or re.search(r"[/\\:]", name):
            raise ValueError("must be a file name without folders")
        return name


class TableRow(NamedTuple):
    """A row for people: tensors of one kind and type, or a single tensor.

    Attributes:
        name: with `*` in place of the layer number, or the tensor's own.
        layers: the layer numbers, e.g. `0-3, 6, 9`; empty outside the layers.
        share: of all bytes, 0 to 1.
    """

    name: str
    layers: str
    source_dtype: str
    codec: str
    n_tensors: int
    n_weights: int
    nbytes: int
    bits_per_weight: float
    share: float
    reason: str


class Plan(_Strict):
    """What will be written, decided from headers alone.

    Attributes:
        tool: who made the plan, e.g. `fewbits 0.1.0`.
        target: what was asked for, e.g. `Q4_K_M`.
        format: on-disk layout, e.g. `gguf`.
        model: path or name of the source.
        architecture: `general.architecture` in GGUF terms.
        tensors: in the order in which they are written.
        split_max_size: most bytes of tensor data in one file, or None for a single file.
        files: predicted files, headers included; empty until the format has laid them out.
        notes: what the user should know, e.g. overrides without effect.
    """

    format_version: Literal[1] = 1
    tool: Line
    target: Line
    format: Line
    model: Line
    architecture: Line
    tensors: Annotated[list[PlannedTensor], Field(min_length=1)]
    split_max_size: Annotated[int, Field(ge=1, le=2**63 - 1)] | None = None
    files: list[PlannedFile] = []
    notes: list[Line] = []

    @model_validator(mode="after")
    def _unique_names(self) -> Plan:
        for kind, names in (("tensor", [t.name for t in self.tensors]), ("file", [f.name for f in self.files])):
            seen: set[str] = set()
            for name in names:
                if name in seen:
                    raise ValueError(f"two {kind}s are named {name!r}")
                seen.add(name)
        return self

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors, without header and padding."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def n_weights(self) -> int:
        return sum(tensor.n_weights for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of every tensor, embeddings and norms included, as llama.cpp counts."""
        return self.weights_bytes * 8 / self.n_weights

    @property
    def file_size(self) -> int:
        """Bytes of all output files together; 0 until the format has laid them out."""
        return sum(file.size for file in self.files)

    @property
    def fallbacks(self) -> list[PlannedTensor]:
        """Tensors that get another type than wanted because of their shape."""
        return [tensor for tensor in self.tensors if tensor.wanted is not None]

    def table(self, per_tensor: bool = False) -> tuple[list[str], list[list[str]]]:
        """Headers and rows as text; see `rows`."""
        headers = ["tensor", "layers", "from", "to", "count", "M weights", "MB", "bits/weight", "share", "why"]
        rows = [
            [
                *(row.name, row.layers, row.source_dtype, row.codec, str(row.n_tensors), f"{row.n_weights / 1e6:,.3f}"),
                *(f"{row.nbytes / 1e6:,.3f}", f"{row.bits_per_weight:.2f}", f"{row.share:.1%}", row.reason),
            ]
            for row in self.rows(per_tensor)
        ]
        if per_tensor:  # every layer is in the name, every count is 1
            keep = [i for i, header in enumerate(headers) if header not in ("layers", "count")]
            return [headers[i] for i in keep], [[row[i] for i in keep] for row in rows]
        return headers, rows

    def rows(self, per_tensor: bool = False) -> list[TableRow]:
        """Tensors grouped by kind, type and reason, in order of appearance.

        Args:
            per_tensor: one row for each tensor instead.
        """
        groups: dict[tuple[str, ...], list[PlannedTensor]] = {}
        for tensor in self.tensors:
            kind = tensor.name if per_tensor else re.sub(r"^blk\.\d+\.", "blk.*.", tensor.name)
            groups.setdefault((kind, tensor.source_dtype, tensor.codec, tensor.reason), []).append(tensor)
        order = {kind: i for i, kind in reversed(list(enumerate(key[0] for key in groups)))}
        total = self.weights_bytes or 1
        rows = []
        for (kind, source_dtype, codec, reason), members in sorted(groups.items(), key=lambda g: order[g[0][0]]):
            nbytes, n_weights = sum(t.nbytes for t in members), sum(t.n_weights for t in members)
            rows.append(
                TableRow(
                    name=kind,
                    layers=number_ranges(n for n in (layer_of(t.name) for t in members) if n >= 0),
                    source_dtype=source_dtype,
                    codec=codec,
                    n_tensors=len(members),
                    n_weights=n_weights,
                    nbytes=nbytes,
                    bits_per_weight=nbytes * 8 / n_weights,
                    share=nbytes / total,
                    reason=reason,
                )
            )
        return rows

    def check_made_for(self, request: Plan) -> None:
        """Refuse to follow this plan where something else is asked for.

        Args:
            request: a fresh plan of the model and target at hand.

        Raises:
            FewbitsError: another target, format or architecture.
        """
        for field in ("target", "format", "architecture"):
            planned, asked = getattr(self, field), getattr(request, field)
            if planned != asked:
                raise FewbitsError(
                    f"The edited plan has the {field} {planned!r}, this model and request have {asked!r}.",
                    "Use the plan with the model and target that it was made for.",
                )

    def to_json(self) -> str:
        """The plan as JSON, one field a line."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str | Path = "plan") -> Plan:
        """Read a plan.

        Args:
            text: JSON as `to_json` writes it, perhaps edited.
            where: the file's name, for messages.

        Raises:
            FewbitsError: names the file and the field. Types and sizes are not yet checked: see `apply_edits`.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise FewbitsError(
                f"{where}: {first_problem(error)}.", "Correct the field, or make the plan anew with `fewbits plan`."
            ) from None

    def save(self, path: str | Path) -> None:
        """Write the plan to a file. Raises FewbitsError where that fails."""
        try:
            Path(path).write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise FewbitsError(f"{path}: {error.strerror or error}.", "Name a place that can be written.") from None

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a file. Raises FewbitsError as `from_json`, and where the file cannot be read."""
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise FewbitsError(
                f"{path}: {error.strerror or error}.", "Name a plan that `fewbits plan` wrote."
            ) from None
        return cls.from_json(text, path)


def number_ranges(numbers: Iterable[int]) -> str:
    """`0-3, 6, 9` for 0 1 2 3 6 9."""
    ordered = enumerate(sorted(set(numbers)))
    runs = [[n for _, n in run] for _, run in groupby(ordered, key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def first_problem(error: ValidationError) -> str:
    """One line for the first problem, naming the field as a person would look for it."""
    problems = error.errors(include_url=False, include_input=False)
    first = problems[0]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    message = first["msg"].removeprefix("Value error, ")
    more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
    # a field's name comes from the file: keep it printable
    return f"{_printable(field)}: {_printable(message)}{more}" if field else f"{_printable(message)}{more}"


def _printable(text: str) -> str:
    return re.sub(r"[^\x20-\x7e\xa0-\U0010ffff]", "?", text)[:300]
