"""GPTQ checkpoints, as GPTQModel (7.x) writes them and it, vLLM and transformers read them.

A module of in = K, out = N and G groups has `qweight` int32 [K*b/32, N], a dense stream of codes along the inputs;
`qzeros` int32 [G, N*b/32], a stream along the outputs; `scales` float16 [G, N]; `g_idx` int32 [K], the group of each
input. weight[n, k] = scales[g_idx[k], n] * (code - zero). The first version of the format stores zero - 1.

Modules may have bits of their own: `dynamic` in the configuration maps a regular expression to what differs from the
rest (GPTQModel 7.7 `QuantizeConfig.dynamic`, vLLM 0.32 `get_dynamic_override`: both match from the beginning of a name,
the first rule wins). vLLM looks up the name of the fused module only (`qkv_proj`, `gate_up_proj`, `experts`), GPTQModel
those of its parts, so a rule matches all of them. transformers' loader (optimum 2.3) does not read `dynamic`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fewbits.codecs.packing import pack_columns, pack_rows, unpack_columns, words_for
from fewbits.codecs.scaled import Codes, Quantized, Scaled
from fewbits.errors import FewbitsError
from fewbits.layouts.base import Arrays, Layout, Others, Part
from fewbits.layouts.values import (
    GROUPS,
    compare,
    decode_groups,
    from_stored,
    get,
    integers,
    nearest_group,
    setting,
    to_stored,
)
from fewbits.version import __version__

BITS = (2, 3, 4, 8)
FUSED_NAMES = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}
"""What engines call the modules that they fuse these into."""
STORED_KEYS = ("bits", "group_size", "sym", "desc_act", "pack_dtype", "format")
"""Keys of `dynamic` that shape what is stored."""
MAKING_KEYS = (
    *("mse", "damp_percent", "damp_auto_increment", "static_groups", "act_group_aware", "fallback", "hessian"),
    *("gptaq", "foem", "smoother", "smooth"),
)
"""Those that say only how codes were chosen."""
_SPEC = re.compile(r"w(\d+)g(-1|\d+)((?:-(?:asym|actorder|v2))*)")


@dataclass(frozen=True)
class GPTQ(Layout):
    """Integers in groups along the inputs.

    Attributes:
        act_order: groups are made of inputs in order of their importance, so `g_idx` is no plain ramp.
        v2: zeros are stored as they are (`checkpoint_format: gptq_v2`), not less one.
        others: modules of the same checkpoint with other bits, for the configuration.
    """

    name: ClassVar[str] = "gptq"
    quant_method: ClassVar[str] = "gptq"
    markers: ClassVar[tuple[str, ...]] = (".qweight",)
    float_dtype: ClassVar[str] = "F16"
    open_specs: ClassVar[str] = r"g(-1|\d+)(-(asym|actorder|v2))*"
    widths: ClassVar[tuple[int, ...]] = BITS

    type: Scaled
    act_order: bool = False
    v2: bool = False
    others: Others = ()

    @classmethod
    def examples(cls) -> Mapping[str, str]:
        return {
            "w4g128": "4 bits, groups of 128 (also 64, 32), symmetric: what every engine takes",
            "w4g-1": "one scale a row",
            "w8g128": "8 bits",
            "w3g128": "3 bits: transformers with gptqmodel only",
            "w2g64": "2 bits: transformers with gptqmodel only",
            "w4g128-asym": "with zero points: transformers with gptqmodel only",
            "w4g128-actorder": "groups by importance of the inputs (desc_act): transformers with gptqmodel only",
            "w4g128-asym-v2": "zero points stored as they are (gptq_v2)",
        }

    @classmethod
    def from_spec(cls, spec: str) -> GPTQ:
        found = _SPEC.fullmatch(spec)
        if found:
            bits, group, flags = int(found[1]), int(found[2]), found[3].split("-")[1:]
            if bits in BITS and group in (-1, *GROUPS) and len(set(flags)) == len(flags):
                return cls(integers(bits, group, "asym" not in flags, "F16"), "actorder" in flags, "v2" in flags)
        raise FewbitsError(
            f"Unknown target 'gptq:{spec}'.",
            "Take gptq:w{2,3,4,8}g{32,64,128,-1} with -asym, -actorder or -v2 behind it, e.g. gptq:w4g128.",
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GPTQ:
        bits, group = setting(config, "bits"), setting(config, "group_size", -1)
        kind = config.get("checkpoint_format") or config.get("format") or "gptq"
        if kind not in ("gptq", "gptq_v2") or bits not in BITS or group == 0 or group < -1:
            raise FewbitsError(
                f"quantization_config: GPTQ of {bits} bits, group_size {group}, format {kind!r} cannot be read.",
                f"Known are {', '.join(map(str, BITS))} bits in the formats gptq and gptq_v2.",
            )
        _check_dynamic(config.get("dynamic"))
        symmetric = config.get("sym", True) is not False
        return cls(integers(bits, group, symmetric, "F16"), bool(config.get("desc_act", False)), kind == "gptq_v2")

    @property
    def min_zero(self) -> int:
        """The least zero point that this layout holds.

        1 where zero - 1 is stored: readers add one to every code of a word at once, and a stored -1 would carry into
        the neighbouring column.
        """
        return 0 if self.v2 or self.type.zero == "middle" else 1

    @property
    def group(self) -> int:
        """As in configurations: -1 for the whole row."""
        return self.type.block[1] or -1

    def spec(self, group: int | None = None) -> str:
        """The target that names this layout, or one like it with another group."""
        flags = (("-asym", self.type.zero != "middle"), ("-actorder", self.act_order), ("-v2", self.v2))
        suffix = "".join(flag for flag, on in flags if on)
        return f"gptq:w{self.type.bits}g{self.group if group is None else group}{suffix}"

    def check(self, shape: tuple[int, int]) -> None:
        rows, columns = shape
        words = 32 // gcd(32, self.type.bits)
        if columns % words:
            raise FewbitsError(
                f"{self.spec()} packs {words} inputs into whole words, and rows of {columns} are no multiple of that.",
                "Take ct:w4a16, which pads, or keep this tensor as it is.",
            )
        if self.group > 0 and columns % self.group:
            raise FewbitsError(
                f"Rows of {columns} are no multiple of the group {self.group}.",
                f"Take {self.spec(nearest_group(columns) or -1)}.",
            )
        if rows % words:
            raise FewbitsError(
                f"{self.spec()} packs the zero points of {words} outputs into whole words, and {rows} outputs are no "
                "multiple of that.",
                "Take ct:w4a16, which has no such words, or keep this tensor as it is.",
            )

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        rows, columns = shape
        bits, groups = self.type.bits, self._groups(columns)
        return {
            ".qweight": Part("I32", (words_for(columns, bits), rows)),
            ".qzeros": Part("I32", (groups, words_for(rows, bits))),
            ".scales": Part("F16", (groups, rows)),
            ".g_idx": Part("I32", (columns,)),
        }

    def _groups(self, columns: int) -> int:
        return columns // self.group if self.group > 0 else 1

    def pack(
        self, matrix: Quantized, g_idx: npt.NDArray[np.integer] | None = None, input_peak: float | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """The arrays of `parts`.

        Args:
            matrix: codes in the original order of columns, [out, in].
            g_idx: group of each column [in], for `act_order`: the scale of column k is scales[:, g_idx[k]]. None:
                groups are neighbours.

        Zero points below `min_zero` are raised to it along with their codes: exact, unless a code is at the top.
        """
        columns, bits = matrix.codes.shape[1], self.type.bits
        neighbours = np.arange(columns) // (self.type.block[1] or columns)
        index = neighbours if g_idx is None else np.asarray(g_idx)
        codes, zeros = matrix.codes, np.full(matrix.scales.shape, 1 << (bits - 1), np.uint8)
        if matrix.zeros is not None:
            codes, zeros = self._raised(codes, matrix.zeros.astype(np.uint8), index)
        return {
            ".qweight": np.ascontiguousarray(pack_columns(codes, bits).T),
            ".qzeros": np.ascontiguousarray(pack_rows(zeros - np.uint8(not self.v2), bits).T),
            ".scales": to_stored(matrix.scales.T, "F16"),
            ".g_idx": index.astype(np.int32),
        }

    def _raised(self, codes: Codes, zeros: Codes, index: npt.NDArray[np.integer]) -> tuple[Codes, Codes]:
        """Codes and zeros of groups whose zero lies below `min_zero`, one higher: exact but for codes at the top."""
        low = zeros < self.min_zero
        if not low.any():
            return codes, zeros
        top = np.uint8((1 << self.type.bits) - 1)
        raised = np.minimum(codes, top - np.uint8(1)) + np.uint8(1)
        return np.where(low[:, index], raised, codes), np.where(low, np.uint8(1), zeros)

    def shape_of(self, parts: Mapping[str, Part]) -> tuple[int, int]:
        words, rows = get(parts, ".qweight").shape
        # whole words: K * bits is a multiple of 32 (see `check`)
        shape = (rows, words * 32 // self.type.bits)
        if self.group > 0 and shape[1] % self.group:
            raise FewbitsError(f".qweight has rows of {shape[1]}, no multiple of the group {self.group}.")
        expected = self.parts(shape)
        if ".g_idx" not in parts:  # AutoRound and early tools leave it out where groups are neighbours
            del expected[".g_idx"]
        compare(parts, expected)
        return shape

    def identify(self, parts: Mapping[str, Part], values: Arrays) -> tuple[GPTQ, tuple[int, int]]:
        """GPTQModel's `dynamic` may give a module other bits and groups than the rest: its own parts tell them."""
        layout = self
        words, rows = get(parts, ".qweight").shape
        groups = max(1, get(parts, ".scales").shape[0])
        if ".g_idx" in parts:
            bits = words * 32 // max(1, get(parts, ".g_idx", 1).shape[0])
        else:
            bits = get(parts, ".qzeros").shape[1] * 32 // max(1, rows)
        columns = words * 32 // max(1, bits)
        group = -1 if groups == 1 and self.group == -1 else columns // groups
        if bits in BITS and group != 0:
            layout = replace(self, type=integers(bits, group, self.type.zero == "middle", "F16"))
        return layout, layout.shape_of(parts)

    def unpack(self, arrays: Arrays, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
        rows, columns = shape
        bits = self.type.bits
        codes = unpack_columns(arrays[".qweight"].T, bits, columns)
        stored = unpack_columns(arrays[".qzeros"], bits, rows).T
        zeros = (stored + np.uint8(not self.v2)) & np.uint8((1 << bits) - 1)
        scales = np.ascontiguousarray(from_stored(arrays[".scales"], ".scales").T)
        # the zeros that are stored count, whatever the configuration says of symmetry
        matrix = Quantized(replace(self.type, zero="integer"), codes, scales, np.ascontiguousarray(zeros, np.float32))
        return decode_groups(matrix, arrays.get(".g_idx"))

    def config(self, kept: Sequence[str], quantized: Sequence[str] = ()) -> dict[str, Any]:
        """config.json's `quantization_config`.

        Args:
            kept: names of the linear modules that stay unquantized.
            quantized: names of the others. transformers' loader needs them where modules inside of decoder blocks stay
                unquantized; the other loaders go by `dynamic`.
        """
        kind = "gptq_v2" if self.v2 else "gptq"
        inside = [name for name in kept if name != "lm_head"]
        dynamic: dict[str, dict[str, int]] = {f"-:^{re.escape(name)}$": {} for name in inside}
        for other, names in self.others:
            assert isinstance(other, GPTQ)
            dynamic[f"+:{_pattern(names)}"] = {"bits": other.type.bits, "group_size": other.group}
        return {
            "quant_method": "gptq",
            "method": "gptq",
            "bits": self.type.bits,
            "group_size": self.group,
            "sym": self.type.zero == "middle",
            "desc_act": self.act_order,
            "checkpoint_format": kind,
            "format": kind,
            "pack_dtype": "int32",
            "lm_head": False,
            **({"dynamic": dynamic} if dynamic else {}),
            **({"modules_in_block_to_quantize": [list(quantized)]} if inside and quantized else {}),
            "meta": {"quantizer": [f"fewbits:{__version__}"]},
        }

    def beside(self, others: Others) -> GPTQ:
        return replace(self, others=others)

    def extra_files(self, kept: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {"quantize_config.json": self.config(kept)}


def _pattern(names: Sequence[str]) -> str:
    """A regular expression of modules that engines fuse into one, and of what they call that."""
    experts = re.match(r"(.*\.experts)\.\d+\.", names[0])
    if experts:
        return rf"^{re.escape(experts[1])}(\.|$)"
    ends = [name.rpartition(".")[2] for name in names]
    fused = next((whole for parts, whole in FUSED_NAMES.items() if set(ends) <= set(parts) and len(ends) > 1), None)
    prefix = re.escape(names[0].removesuffix(ends[0]))
    every = "|".join(re.escape(end) for end in [*ends, *([fused] if fused else [])])
    return f"^{prefix}({every})$" if len(ends) > 1 else f"^{prefix}{every}$"


def _check_dynamic(dynamic: Any) -> None:
    """Refuse rules that make modules something that their own tensors do not tell.

    Bits and groups need no look-up by name: see `GPTQ.identify`. Zero points are read whatever `sym` says, and groups
    in any order whatever `desc_act` says.

    Raises:
        FewbitsError: a key that is not known, or another packing.
    """
    if dynamic is None:
        return
    if not isinstance(dynamic, dict) or not all(isinstance(rule, dict) for rule in dynamic.values()):
        raise FewbitsError("quantization_config: dynamic is no table of rules.", "Mend config.json.")
    for pattern, rule in dynamic.items():
        known = {"pack_dtype": ("int32",), "format": ("gptq", "gptq_v2"), "bits": BITS}
        wrong = [key for key in rule if key not in (*STORED_KEYS, *MAKING_KEYS)]
        wrong += [key for key, values in known.items() if rule.get(key, values[0]) not in values]
        if wrong:
            raise FewbitsError(
                f"quantization_config: the dynamic rule {pattern!r} sets {wrong[0]!r} to {rule[wrong[0]]!r}, which "
                "cannot be read.",
                "Start from the unquantized model.",
            )
