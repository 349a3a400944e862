"""config.json <-> GGUF metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fewbits.arch.families import Family, Key, family_of, family_of_gguf
from fewbits.arch.rope import canonical_rope, rope_from_gguf, rope_metadata, shortest
from fewbits.errors import FewbitsError

REST = "fewbits.config"
"""GGUF key that holds, as JSON, what config.json says and no other key does. llama.cpp ignores keys it does not know.
"""

_MOST = {"block_count": 4096, "expert_count": 4096, "attention.key_length": 65536, "embedding_length": 2**24}
"""Values past these come from a damaged header, not from a model; lists and arrays of that length are made."""
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "quantization_config", "auto_map")
_OTHER_SPELLINGS = (
    "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor",
    "sliding_window_pattern", "_sliding_window_pattern", "torch_dtype",
)  # fmt: skip


def canonical(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in one spelling: transformers 5's names, the family's defaults filled in.

    Raises:
        FewbitsError: unknown architecture, or something that llama.cpp does not compute for it.
    """
    family = family_of(config)
    out = {name: value for name, value in config.items() if name not in (*_NOT_OF_THE_MODEL, *_OTHER_SPELLINGS)}
    out["model_type"] = family.model_type
    if "dtype" in config or "torch_dtype" in config:
        out["dtype"] = config.get("dtype") or config.get("torch_dtype")
    for key in family.keys:
        named = [out.pop(name) for name in key.hf if name in out]
        if named:
            out[key.hf[0]] = named[0]
    defaults = {name: value for name, value in family.defaults.items() if name not in _OTHER_SPELLINGS}
    out = defaults | out
    _fill_in(out, family)
    types = out.get("layer_types") or []
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise FewbitsError("config.json: layer_types is no list of names.")
    if family.swa_every:
        every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or family.swa_every
        if not isinstance(every, int) or every < 1:
            raise FewbitsError(f"config.json: sliding_window_pattern is {every!r}.")
        out["layer_types"] = out.get("layer_types") or _layer_types(out["num_hidden_layers"], every)
        if not isinstance(out["layer_types"], list) or len(out["layer_types"]) != out["num_hidden_layers"]:
            raise FewbitsError("config.json: layer_types is not a list with one entry for each layer.")
    if family.rope_types:
        out["rope_parameters"] = canonical_rope(config, family)
    return out


def _fill_in(config: dict[str, Any], family: Family) -> None:
    """Values that follow from others where they are absent or null."""
    names = {key.hf[0] for key in family.keys}
    for name in ("embedding_length", "attention.head_count"):
        _check_number(config, next(key for key in family.keys if key.gguf == name))
    heads = config[family.key("attention.head_count")]
    width = config[family.key("embedding_length")]
    if heads > width:
        raise FewbitsError(f"The configuration has {heads} attention heads in {width} dimensions.")
    derived = {"num_key_value_heads": heads, "head_dim": width // heads, "n_inner": 4 * width}
    for name, value in derived.items():
        if name in names and config.get(name) is None:
            config[name] = value
    for key in family.keys:
        _check_number(config, key)


def _check_number(config: Mapping[str, Any], key: Key) -> None:
    name, value = key.hf[0], config.get(key.hf[0])
    if value is None and (key.null is not None or not key.required):
        return
    if value is None:
        raise FewbitsError(f"The configuration lacks {name}.")
    most = _MOST.get(key.gguf, 2**32 - 1)
    kinds = int | float if key.real else int
    if isinstance(value, bool) or not isinstance(value, kinds) or not (0 if key.real else 1) <= value <= most:
        raise FewbitsError(f"The configuration's {name} is {value!r}, which it cannot be.")


def _layer_types(layers: int, every: int) -> list[str]:
    return ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)]


def gguf_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of the GGUF file of this model: ``general.architecture`` and ``<arch>.*``, nothing of the tokenizer.

    Besides llama.cpp's keys it holds `REST`, so that `config_from_gguf` gives the configuration back.

    Raises:
        FewbitsError: unknown architecture, a missing value, or something that llama.cpp does not compute.
    """
    config, family = canonical(config), family_of(config)
    _check(config, family)
    keys: dict[str, Any] = {}
    for key in family.keys:
        value = config.get(key.hf[0])
        value = key.null if value is None else value
        if value is not None:
            keys[key.gguf] = float(value) if key.real else value
    keys |= rope_metadata(config, family)
    if family.swa_every and config["layer_types"] != _layer_types(config["num_hidden_layers"], family.swa_every):
        sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
        keys["attention.sliding_window_pattern"] = np.array(sliding, np.bool_)
    metadata = {"general.architecture": family.gguf, **{f"{family.gguf}.{name}": v for name, v in keys.items()}}
    known = config_from_gguf(metadata)
    rest = {name: value for name, value in config.items() if name not in known or known[name] != value}
    return {**metadata, REST: json.dumps(rest, ensure_ascii=False)}


def _check(config: Mapping[str, Any], family: Family) -> None:
    allowed = dict(family.fixed)
    allowed |= {name: (value,) for name, value in family.implied(config).items() if config.get(name) is not None}
    problems = [
        f"{name} is {config.get(name)!r} where llama.cpp computes with {values[0]!r}"
        for name, values in allowed.items()
        if config.get(name) not in values
    ]
    if problems:
        raise FewbitsError(f"{family.architecture} cannot become GGUF: {'; '.join(problems)}.")


def gguf_notes(config: Mapping[str, Any]) -> list[str]:
    """What llama.cpp will compute differently from transformers, in sentences; empty for most models."""
    config, family = canonical(config), family_of(config)
    notes = []
    window = config.get("sliding_window")
    types = config.get("layer_types")
    slides = "sliding_attention" in types if types else config.get("use_sliding_window", True)
    if window and slides and not family.swa_every:
        notes.append(f"llama.cpp lets {family.architecture} attend beyond its sliding window of {window} tokens")
    rope = config.get("rope_parameters", {})
    if rope.get("rope_type") == "dynamic":
        notes.append("llama.cpp does not rescale RoPE beyond the trained context (dynamic NTK)")
    return notes


def config_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    read: Callable[[str], npt.NDArray[np.float32]] | None = None,
) -> dict[str, Any]:
    """The Hugging Face configuration of a GGUF file, in transformers 5's spelling.

    Args:
        shapes: the file's tensors. They tell whether embeddings are tied, whether there are biases and how many tokens
            there are; without them that is taken from `REST` or left out.
        read: gives a tensor as float32. Needed for RoPE factors of files that fewbits did not write.

    Raises:
        FewbitsError: unknown architecture, missing keys, per-layer head counts, unknown RoPE factors.
    """
    arch = str(metadata.get("general.architecture", "(none)"))
    rest = _rest(metadata)
    named = rest.get("architectures")
    experts = int(_number(metadata, f"{arch}.expert_count") or 0)
    family = family_of_gguf(arch, experts, named[0] if isinstance(named, list) and named else None)
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
    }
    for key in family.keys:
        _take(config, key, _number(metadata, f"{arch}.{key.gguf}"), arch)
    if "vocab_size" not in config and "tokenizer.ggml.tokens" in metadata:
        config["vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # null and not absent: transformers' own defaults belong to the original models' vocabularies
        config[name] = _number(metadata, f"tokenizer.ggml.{name.replace('pad', 'padding')}")
    _fill_in(config, family)
    if family.swa_every:
        config["layer_types"] = _layer_types(config["num_hidden_layers"], family.swa_every)
        pattern = metadata.get(f"{arch}.attention.sliding_window_pattern")
        if isinstance(pattern, np.ndarray | list):
            config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
        elif pattern is not None:
            every = int(_number(metadata, f"{arch}.attention.sliding_window_pattern") or family.swa_every)
            config["layer_types"] = _layer_types(config["num_hidden_layers"], every)
        if len(config["layer_types"]) != config["num_hidden_layers"]:
            raise FewbitsError(f"{arch}.attention.sliding_window_pattern has not one value for each layer.")
    if family.rope_types:
        _take_rope(config, family, metadata, {} if "rope_parameters" in rest else shapes or {}, read)
    config |= rest
    if shapes is not None:
        config["tie_word_embeddings"] = "output.weight" not in shapes
        config |= {flag: tensor in shapes for flag, tensor in family.bias_flags.items()}
        if "token_embd.weight" in shapes:
            config["vocab_size"] = shapes["token_embd.weight"][0]
    taken_for_granted = {name: values[0] for name, values in family.fixed.items() if values[0] is not None}
    return taken_for_granted | family.implied(config) | config


def _rest(metadata: Mapping[str, Any]) -> dict[str, Any]:
    try:
        rest = json.loads(str(metadata.get(REST, "{}")))
    except ValueError:
        rest = None
    if not isinstance(rest, dict):
        raise FewbitsError(f"The GGUF file's {REST} is not a JSON object.", "Convert the original model again.")
    return rest


def _take(config: dict[str, Any], key: Key, value: int | float | None, arch: str) -> None:
    name = key.hf[0]
    if value is None:
        optional = not key.required or name in ("num_key_value_heads", "head_dim", "n_inner", "sliding_window")
        if not optional and name not in config:
            raise FewbitsError(f"The GGUF file lacks {arch}.{key.gguf}.", "Fetch the file again.")
    elif name in config and config[name] != value:
        raise FewbitsError(f"{arch}.{key.gguf} is {value}, where {config[name]} is the only value supported.")
    else:
        config[name] = None if value == key.null else value


def _take_rope(
    config: dict[str, Any],
    family: Family,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], npt.NDArray[np.float32]] | None,
) -> None:
    prefix = f"{family.gguf}."
    keys: dict[str, Any] = {}
    for name, value in metadata.items():
        if name.startswith(prefix + "rope.") and value is not None:
            keys[name.removeprefix(prefix)] = str(value) if name.endswith(".type") else _number(metadata, name)
    if "longrope" in family.rope_types and "rope.scaling.original_context_length" in keys:
        config["original_max_position_embeddings"] = keys["rope.scaling.original_context_length"]

    def factors(name: str) -> npt.NDArray[np.float32] | None:
        if name not in shapes:
            return None
        if read is None:
            raise FewbitsError(f"{name}: its values are needed to know the model's RoPE scaling.")
        return read(name)

    config["rope_parameters"] = rope_from_gguf(keys, family, config, factors)


def _number(metadata: Mapping[str, Any], name: str) -> int | float | None:
    value = metadata.get(name)
    if value is None:
        return None
    if isinstance(value, np.ndarray | list):
        distinct = set(np.asarray(value).ravel().tolist())
        if len(distinct) != 1:
            raise FewbitsError(f"{name} differs from layer to layer, which is not supported.")
        value = distinct.pop()
    whole = isinstance(value, int | np.integer)
    if not whole and not (isinstance(value, float | np.floating) and np.isfinite(value)):
        raise FewbitsError(f"{name} is {value!r}, where a number is expected.")
    return shortest(value) if isinstance(value, float | np.floating) else int(value)
