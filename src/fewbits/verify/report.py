"""What verifying found, as data."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Fault(_Record):
    """Something that is wrong: in which tensor or file, and what."""

    where: str
    problem: str


class CheckedFile(_Record):
    """A file.

    Attributes:
        sha256: None where hashes were not asked for.
        recorded: where a hash was recorded that `sha256` was compared with; None where there is none.
    """

    name: str
    size: int
    sha256: str | None = None
    recorded: str | None = None


class TensorError(_Record):
    """How far a tensor is from the reference's.

    Attributes:
        type: storage type.
        bits: stored bits of a weight.
        error: rms(decoded - reference) / rms(reference).
        limit: more than this is no error of rounding to so few bits.
        cosine: of the angle between decoded and reference: near 0 for tensors that have nothing to do with each other.
    """

    name: str
    type: str
    bits: float
    error: float
    limit: float
    cosine: float


class VerifyReport(_Record):
    """The result of `verify`.

    Attributes:
        format: `gguf`, `directory` or `imatrix`.
        decoded: tensors whose every value was decoded.
        errors: against the reference, those that exceed their limit by the largest factor first.
        notes: what could not be checked, and what is odd without being wrong.
    """

    path: str
    format: str
    architecture: str | None
    reference: str | None
    files: list[CheckedFile]
    decoded: int
    n_weights: int
    errors: list[TensorError]
    faults: list[Fault]
    notes: list[str]
    seconds: float

    @property
    def fine(self) -> bool:
        return not self.faults
