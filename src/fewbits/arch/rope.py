"""Rotary position embeddings: the spellings of config.json, the keys and tensors of GGUF.

llama.cpp keeps Llama 3's frequency rescaling as a tensor of factors (``rope_freqs.weight``) without its parameters, and
LongRoPE's two lists as tensors; linear and YaRN scaling are metadata.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fewbits.arch.families import Family
from fewbits.errors import FewbitsError

Floats = npt.NDArray[np.float32]
Parameters = dict[str, Any]

LLAMA3, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (LLAMA3, LONG, SHORT)
_NEEDED = {
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_NUMBERS = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    "attention_factor", "mscale", "mscale_all_dim", "partial_rotary_factor",
)  # fmt: skip
_LISTS = ("long_factor", "short_factor")
_YARN_FIXED = {"beta_fast": 32, "beta_slow": 1, "truncate": True}


def canonical_rope(config: Mapping[str, Any], family: Family) -> Parameters:
    """``rope_parameters`` as transformers 5 writes it, from that or from the older ``rope_theta``/``rope_scaling``.

    Raises:
        FewbitsError: a kind of scaling that llama.cpp does not compute for this family.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = isinstance(given, Mapping) and ("full_attention" in given or "sliding_attention" in given)
    if not all(isinstance(part, Mapping) for part in (given, *(given.values() if nested else ()))):
        raise FewbitsError(f"config.json: the RoPE parameters are {given!r}.")
    full: Parameters = dict(given.get("full_attention") or {}) if nested else dict(given)
    kind = str(full.pop("type", None) or full.get("rope_type") or "default")
    full["rope_type"] = "longrope" if kind == "su" else kind
    if full.get("rope_theta") is None:
        full["rope_theta"] = config.get("rope_theta") or family.defaults["rope_theta"]
    for name in ("partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(name) is not None and (name != "original_max_position_embeddings" or kind != "default"):
            full.setdefault(name, config[name])
    if full["rope_type"] not in family.rope_types:
        known = ", ".join(family.rope_types)
        raise FewbitsError(
            f"RoPE scaling {full['rope_type']!r} of {family.architecture} is not supported.", f"Known: {known}."
        )
    _check_numbers(full, _NEEDED.get(full["rope_type"], ()))
    if not family.rope_local:
        return full
    local = dict(given.get("sliding_attention") or {}) if nested else {}
    local.setdefault("rope_type", "default")
    local.setdefault("rope_theta", config.get("rope_local_base_freq") or family.defaults["rope_local_base_freq"])
    if local["rope_type"] != "default":
        raise FewbitsError(f"RoPE scaling {local['rope_type']!r} of sliding layers is not supported.")
    _check_numbers(local, ())
    return {"sliding_attention": local, "full_attention": full}


def _check_numbers(parameters: Mapping[str, Any], needed: tuple[str, ...]) -> None:
    for name in _NUMBERS:
        value = parameters.get(name)
        if value is None and name not in ("rope_theta", *needed):
            continue
        least = 2 if name == "original_max_position_embeddings" else 1e-30
        most = 1 if name == "partial_rotary_factor" else 1e30
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise FewbitsError(f"{name} of the RoPE parameters is {value!r}, which it cannot be.")


def rotary_dims(config: Mapping[str, Any], family: Family) -> int:
    """How many dimensions of a head are rotated (`config` canonical)."""
    heads = config[family.key("attention.head_count")]
    head_dim = config.get("head_dim") or config[family.key("embedding_length")] // heads
    return int(head_dim * _full(config).get("partial_rotary_factor", 1.0))


def rope_metadata(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The ``rope.*`` keys without the architecture's prefix (`config` canonical)."""
    if not family.rope_types:
        return {}
    rope, full = config["rope_parameters"], _full(config)
    keys: dict[str, Any] = {}
    if family.rope_dims:
        keys["rope.dimension_count"] = rotary_dims(config, family)
    keys["rope.freq_base"] = float(full["rope_theta"])
    if family.rope_local:
        keys["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
    kind = full["rope_type"]
    if kind in ("linear", "yarn"):
        keys["rope.scaling.type"] = kind
        keys["rope.scaling.factor"] = float(full["factor"])
    if kind == "yarn":
        odd = [name for name, value in _YARN_FIXED.items() if full.get(name) not in (None, value)]
        if odd:
            raise FewbitsError(f"YaRN with {odd[0]} = {full[odd[0]]} is not supported.", "llama.cpp does not read it.")
        keys["rope.scaling.original_context_length"] = _original_context(config, full)
        scale = _yarn_attention(full) / _yarn_default(float(full["factor"]))
        if abs(scale - 1) > 1e-6:
            keys["rope.scaling.attn_factor"] = scale
    if kind == "longrope":
        keys["rope.scaling.type"] = kind
        keys["rope.scaling.attn_factor"] = _longrope_attention(config, full)
    if "longrope" in family.rope_types:
        keys["rope.scaling.original_context_length"] = _original_context(config, full)
    return keys


def rope_tensors(config: Mapping[str, Any], family: Family) -> dict[str, Floats]:
    """The factor tensors of a GGUF file: name -> float32 [rotated dimensions / 2] (`config` canonical).

    Raises:
        FewbitsError: LongRoPE lists of the wrong length.
    """
    if not family.rope_types:
        return {}
    full, dims = _full(config), rotary_dims(config, family)
    if full["rope_type"] == "llama3":
        return {LLAMA3: llama3_factors(full, dims)}
    if full["rope_type"] != "longrope":
        return {}
    lists = {name: full.get(key) for name, key in zip((LONG, SHORT), _LISTS, strict=True)}
    if not all(_is_numbers(values, dims // 2) for values in lists.values()):
        raise FewbitsError(f"rope_scaling: long_factor and short_factor must be {dims // 2} numbers.")
    return {name: np.asarray(values, np.float32) for name, values in lists.items()}


def _is_numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(isinstance(v, int | float) for v in values)


def llama3_factors(full: Mapping[str, Any], dims: int) -> Floats:
    """What Llama 3.1 divides each rotation frequency by: 1 for short wavelengths, `factor` for long ones."""
    context = full["original_max_position_embeddings"]
    low, high = full["low_freq_factor"], full["high_freq_factor"]
    wavelengths = 2 * np.pi * full["rope_theta"] ** (np.arange(0, dims, 2) / dims)
    between = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - between) / full["factor"] + between)).astype(np.float32)


def rope_from_gguf(
    keys: Mapping[str, Any], family: Family, config: Mapping[str, Any], factors: Callable[[str], Floats | None]
) -> Parameters:
    """The inverse: ``rope_parameters`` from a GGUF file.

    Args:
        keys: the ``rope.*`` values by their name without prefix.
        config: what is already known of the configuration.
        factors: values of one of `TENSORS`, None if the file lacks it.

    Raises:
        FewbitsError: factors that belong to no known parameters.
    """
    theta = keys.get("rope.freq_base", 10000.0)
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0.0))
    kind = keys.get("rope.scaling.type", "linear")
    full: Parameters = {"rope_type": "default", "rope_theta": theta}
    if kind in ("linear", "yarn") and factor not in (0, 1):
        full |= {"rope_type": kind, "factor": factor}
    context = keys.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    if full["rope_type"] == "yarn":
        full["original_max_position_embeddings"] = context
        if "rope.scaling.attn_factor" in keys:
            full["attention_factor"] = keys["rope.scaling.attn_factor"] * _yarn_default(factor)
    heads = config[family.key("attention.head_count")]
    head_dim = config.get("head_dim") or config[family.key("embedding_length")] // heads
    dims = keys.get("rope.dimension_count", head_dim)
    if dims != head_dim:
        full["partial_rotary_factor"] = dims / head_dim
    if (values := factors(LLAMA3)) is not None:
        full |= recognise_llama3(values, theta)
    if (values := factors(LONG)) is not None:
        short = factors(SHORT)
        full |= {
            "rope_type": "longrope",
            "original_max_position_embeddings": context,
            "long_factor": [shortest(v) for v in values],
            "short_factor": [shortest(v) for v in (values if short is None else short)],
        }
        _check_numbers(full, ())
        attention = keys.get("rope.scaling.attn_factor")
        if attention is not None and abs(attention / _longrope_attention(config, full) - 1) > 1e-6:
            full["attention_factor"] = attention
    if not family.rope_local:
        return full
    local = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10000.0)}
    return {"sliding_attention": local, "full_attention": full}


def recognise_llama3(values: Floats, theta: float) -> Parameters:
    """Parameters of Llama 3's rescaling whose factors these are.

    Raises:
        FewbitsError: none with low and high frequency factor 1 and 4 and a context of a power of two.
    """
    for context in (8192, *(2**n for n in range(5, 18))):
        full: Parameters = {
            "rope_type": "llama3",
            "factor": shortest(values.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": context,
        }
        if np.allclose(values, llama3_factors({**full, "rope_theta": theta}, 2 * len(values)), rtol=1e-4):
            return full
    raise FewbitsError(
        f"{LLAMA3}: these factors come from no Llama 3 RoPE parameters that are known.",
        "Start from the original Hugging Face model.",
    )


def shortest(value: Any) -> float:
    """The float64 with the fewest digits that rounds to this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _full(config: Mapping[str, Any]) -> Mapping[str, Any]:
    rope: Mapping[str, Any] = config["rope_parameters"]
    return rope.get("full_attention", rope)


def _original_context(config: Mapping[str, Any], full: Mapping[str, Any]) -> int:
    named = full.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return int(named or config["max_position_embeddings"])


def _yarn_default(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_attention(full: Mapping[str, Any]) -> float:
    """What cosines and sines are multiplied by, as transformers computes it."""
    named, factor = full.get("attention_factor"), float(full["factor"])
    if named is not None:
        return float(named)
    if full.get("mscale") and full.get("mscale_all_dim"):
        return _yarn_default(factor, full["mscale"]) / _yarn_default(factor, full["mscale_all_dim"])
    return _yarn_default(factor)


def _longrope_attention(config: Mapping[str, Any], full: Mapping[str, Any]) -> float:
    if full.get("attention_factor") is not None:
        return float(full["attention_factor"])
    context = _original_context(config, full)
    factor = full.get("factor") or config["max_position_embeddings"] / context
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
