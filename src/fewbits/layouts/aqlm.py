"""AQLM checkpoints (aqlm 1.1.7, transformers 5.23): codes into codebooks of the matrix; see `codecs.additive`.

A module of in = K, out = N has `codes` [N, K/group, codebooks], int8 or, of more than 8 bits, int16: codes beyond the
type's largest number are stored less 2^bits. `codebooks` float16 [codebooks, 2^bits, 1, group] and `scales` float16
[N, 1, 1, 1]; a bias stays a bias. All modules of a checkpoint are of one type, which the configuration names: files of
others may have a group of several outputs, too, which is not read.

transformers 5 looks for what is not quantized by the names of modules, version 4 by those of weights: both are written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fewbits.codecs.additive import GROUPS, MOST_BITS, MOST_BOOKS, Additive, AdditiveCoded, Codes
from fewbits.codecs.base import Floats
from fewbits.errors import FewbitsError
from fewbits.layouts.base import Arrays, Layout, Part
from fewbits.layouts.values import DAMAGED, compare, from_stored, get, setting

_SPEC = re.compile(r"(\d{1,2})x(\d{1,2})g(\d{1,2})")


@dataclass(frozen=True)
class AQLM(Layout):
    """Sums of codewords, for groups of inputs of one output."""

    name: ClassVar[str] = "aqlm"
    quant_method: ClassVar[str] = "aqlm"
    markers: ClassVar[tuple[str, ...]] = (".codes",)
    float_dtype: ClassVar[str] = "F16"
    epochs: ClassVar[Mapping[str, int]] = {"fast": 0, "default": 3, "thorough": 10}
    """Of tuning, by effort: see `quantize.tuning`."""
    methods: ClassVar[tuple[str, ...]] = ("aqlm",)

    type: Additive

    @property
    def engine_dtype(self) -> str:
        return "F16"

    @classmethod
    def examples(cls) -> Mapping[str, str]:
        return {
            "2x8g8": "2 bits: two codebooks of 256 for groups of 8 (1 to 8 codebooks, groups of 8 or 16): aqlm",
            "1x16g8": "2 bits: one codebook of 65536, 1 MiB a matrix: for large models, where it is the better one",
        }

    @classmethod
    def from_spec(cls, spec: str) -> AQLM:
        found = _SPEC.fullmatch(spec)
        books, bits, group = map(int, found.groups()) if found else (0, 0, 0)
        if not (group in GROUPS and ((bits == 8 and 1 <= books <= 8) or (8 < bits <= MOST_BITS and books == 1))):
            raise FewbitsError(
                f"Unknown target 'aqlm:{spec}'.",
                "Take aqlm:2x8g8 (1x8 to 8x8) or aqlm:1x16g8 (1x9 to 1x16), with g8 or g16.",
            )
        return cls(Additive(books, bits, group))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AQLM:
        keys = {"num_codebooks": 1, "nbits_per_codebook": 16, "in_group_size": 8, "out_group_size": 1}
        books, bits, group, out_group = (setting(config, key, default) for key, default in keys.items())
        if out_group != 1:
            raise FewbitsError(
                f"quantization_config: groups of {out_group} outputs are not read.", "Take a version with groups of 1."
            )
        if not (1 <= books <= MOST_BOOKS and 1 <= bits <= MOST_BITS and 1 <= group <= 1024):
            raise FewbitsError(
                f"quantization_config: {books} codebooks of {bits} bits for groups of {group} cannot be.",
                "Mend config.json.",
            )
        return cls(Additive(books, bits, group))

    def check(self, shape: tuple[int, int]) -> None:
        if shape[0] < 1 or shape[1] < 1 or shape[1] % self.type.group:
            other = "Keep this tensor" if shape[1] % GROUPS[0] else "Take aqlm:2x8g8, or keep this tensor"
            raise FewbitsError(
                f"{self.type.name} takes multiples of {self.type.group} inputs, and these are {shape[1]}.",
                f"{other} as it is with --keep.",
            )

    @property
    def _code(self) -> str:
        return "I8" if self.type.code_bits <= 8 else "I16"

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        kind = self.type
        return {
            ".codes": Part(self._code, (shape[0], shape[1] // kind.group, kind.books)),
            ".codebooks": Part("F16", (kind.books, kind.words, 1, kind.group)),
            ".scales": Part("F16", (shape[0], 1, 1, 1)),
        }

    def pack(
        self, matrix: AdditiveCoded, g_idx: npt.NDArray[np.integer] | None = None, input_peak: float | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        self.check(matrix.shape)
        return {
            ".codes": wrap(matrix.codes, self.type.code_bits),
            ".codebooks": np.ascontiguousarray(matrix.codebooks[:, :, None]),
            ".scales": np.ascontiguousarray(matrix.scales[:, None, None, None]),
        }

    def shape_of(self, parts: Mapping[str, Part]) -> tuple[int, int]:
        rows, groups, _ = get(parts, ".codes", 3).shape
        shape = rows, groups * self.type.group
        self.check(shape)
        compare(parts, self.parts(shape))
        return shape

    def unpack(self, arrays: Arrays, shape: tuple[int, int]) -> Floats:
        return self.coded(arrays).decode()

    def coded(self, arrays: Arrays) -> AdditiveCoded:
        """The matrix that stored tensors hold, as it is coded.

        Raises:
            FewbitsError: a value that cannot be.
        """
        codebooks = from_stored(arrays[".codebooks"], ".codebooks")[:, :, 0]
        scales = from_stored(arrays[".scales"], ".scales").reshape(-1)
        codes = unwrap(arrays[".codes"], self.type.code_bits)
        return AdditiveCoded(self.type, codes, codebooks, scales)

    def config(self, kept: Sequence[str], quantized: Sequence[str] = ()) -> dict[str, Any]:
        return {
            "quant_method": "aqlm",
            "in_group_size": self.type.group,
            "out_group_size": 1,
            "num_codebooks": self.type.books,
            "nbits_per_codebook": self.type.code_bits,
            "linear_weights_not_to_quantize": [name for module in kept for name in (module, f"{module}.weight")],
        }


def wrap(codes: Codes, bits: int) -> npt.NDArray[Any]:
    """Codes as they are stored, int8 or int16: those of 2^(bits - 1) and more are less by 2^bits."""
    signed = codes.astype(np.int32)
    signed[signed >= 1 << (bits - 1)] -= 1 << bits
    return signed.astype(np.int8 if bits <= 8 else np.int16)


def unwrap(stored: npt.NDArray[Any], bits: int) -> Codes:
    """The codes, uint16.

    Raises:
        FewbitsError: a number that a code of so many bits cannot be.
    """
    signed = stored.astype(np.int32)
    half = 1 << (bits - 1)
    # aqlm itself takes numbers modulo 2^bits; those of its own making are within these
    if signed.size and (signed.min() < -half or signed.max() >= 2 * half):
        raise FewbitsError(f".codes holds numbers that are no codes of {bits} bits.", DAMAGED)
    return (signed & (2 * half - 1)).astype(np.uint16)
