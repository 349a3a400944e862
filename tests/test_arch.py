"""Model families: names, transforms and metadata, against transformers, the official tensor map and llama.cpp."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fewbits import arch
from fewbits.arch.rope import llama3_factors, recognise_llama3
from fewbits.arch.tensors import Read
from fewbits.errors import FewbitsError
from tiny_models import MERGES, TINY, VOCAB, WINDOW, save_tiny, tiny_model, tiny_tokenizer

IDS = np.random.default_rng(0).integers(0, VOCAB, 4 * WINDOW).tolist()
Arrays = Mapping[str, npt.NDArray[np.float32]]
Tiny = Callable[[str], tuple[Path, dict[str, Any], Arrays]]


def reader(arrays: Arrays) -> Read:
    """Gives tensors out of a dict, as a checkpoint gives them out of a file."""

    def read(name: str, rows: slice | npt.NDArray[np.integer] | None = None, /) -> npt.NDArray[np.float32]:
        return np.asarray(arrays[name] if rows is None else arrays[name][rows], np.float32)

    return read


def shapes_of(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: values.shape for name, values in arrays.items()}


def lines(tensor: arch.GGUFTensor) -> int:
    return prod(tensor.shape[:-1])


def to_gguf(config: Mapping[str, Any], arrays: Arrays) -> dict[str, npt.NDArray[np.float32]]:
    tensors = arch.gguf_tensors(config, shapes_of(arrays))
    return {t.name: t.read(reader(arrays), 0, lines(t)).reshape(t.shape) for t in tensors}


def to_hf(config: Mapping[str, Any], arrays: Arrays) -> dict[str, npt.NDArray[np.float32]]:
    return {t.name: t.read(reader(arrays)) for t in arch.hf_tensors(config, shapes_of(arrays))}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """name -> directory, config.json and tensors of a tiny model, made once."""
    torch.set_num_threads(1)

    @cache
    def make(name: str) -> tuple[Path, dict[str, Any], Arrays]:
        directory = save_tiny(tmp_path_factory.mktemp(name), name)
        return (
            directory,
            json.loads((directory / "config.json").read_text()),
            load_file(directory / "model.safetensors"),
        )

    return make


def transformers_logits(directory: Path) -> npt.NDArray[np.float32]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        logits: npt.NDArray[np.float32] = model.eval()(torch.tensor([IDS])).logits[0].numpy()
    return logits


def write_gguf(path: Path, metadata: Mapping[str, Any], arrays: Arrays) -> None:
    """A float32 GGUF file by the official writer, with the tiny tokenizer."""
    tokenizer = tiny_tokenizer()
    unused = [f"[PAD{i}]" for i in range(len(tokenizer), VOCAB)]
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for name, value in metadata.items():
        if isinstance(value, np.ndarray):
            writer.add_array(name, value.tolist())
        elif name != "general.architecture":
            add[type(value)](name, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*(tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))), *unused])
    writer.add_token_types([3] + [1] * (len(tokenizer) - 1) + [5] * len(unused))
    writer.add_token_merges([f"{a} {b}" for a, b in MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, values in arrays.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def relative(found: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32]) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.engine
@pytest.mark.parametrize("name", TINY)
def test_llama_cpp_computes_what_transformers_does(name: str, tiny: Tiny, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    directory, config, arrays = tiny(name)
    write_gguf(tmp_path / "m.gguf", arch.gguf_metadata(config), to_gguf(config, arrays))
    f32 = 0  # a float32 KV cache: the default float16 would hide small errors
    engine = llama_cpp.Llama(
        str(tmp_path / "m.gguf"), n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
        type_k=f32, type_v=f32, flash_attn=False,
    )  # fmt: skip
    engine.eval(IDS)
    # ggml's GELU is a table in float16, everything else is exact to float32
    limit = 1e-3 if name.startswith(("gemma", "gpt2")) else 2e-5
    assert relative(np.array(engine.scores[: len(IDS)]), transformers_logits(directory)) < limit


@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "foreign"])
@pytest.mark.parametrize("name", TINY)
def test_gguf_gives_the_model_back(name: str, foreign: bool, tiny: Tiny, tmp_path: Path) -> None:
    """`foreign`: without the key that only fewbits writes, so that llama.cpp's own keys and tensors must do."""
    directory, config, arrays = tiny(name)
    converted, metadata = to_gguf(config, arrays), arch.gguf_metadata(config)
    if foreign:
        del metadata[arch.REST]
    back = arch.config_from_gguf(metadata, shapes_of(converted), reader(converted))
    if not foreign:
        assert back == arch.canonical(config)
    tensors = to_hf(back, converted)
    assert tensors.keys() == arrays.keys()
    (tmp_path / "config.json").write_text(json.dumps(back))
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, tmp_path / "model.safetensors")
    assert relative(transformers_logits(tmp_path), transformers_logits(directory)) < 1e-5


@pytest.mark.parametrize("name", TINY)
def test_names_are_the_official_ones(name: str, tiny: Tiny) -> None:
    _, config, arrays = tiny(name)
    kinds = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    official = gguf.get_tensor_name_map(kinds[arch.family_of(config).gguf], 8)
    for tensor in arch.gguf_tensors(config, shapes_of(arrays)):
        # gguf-py 0.19 knows the norms that BitNet alone has by an earlier model's names
        if len(tensor.sources) == 1 and "_sub_norm" not in tensor.name:
            assert official.get_name(tensor.sources[0], try_suffixes=(".weight", ".bias")) == tensor.name


@pytest.mark.parametrize("name", ["llama-bias", "mixtral", "gemma2", "gpt2", "llama-llama3", "fused-mixtral"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_slabs_are_rows_of_the_whole(name: str, tiny: Tiny, data: st.DataObject) -> None:
    _, config, arrays = tiny(name.removeprefix("fused-"))
    if name.startswith("fused"):
        arrays = in_memory(name.removeprefix("fused-"))
    tensor = data.draw(st.sampled_from(arch.gguf_tensors(config, shapes_of(arrays))))
    start = data.draw(st.integers(0, lines(tensor)))
    stop = data.draw(st.integers(start, lines(tensor)))
    whole = tensor.read(reader(arrays), 0, lines(tensor))
    slab = tensor.read(reader(arrays), start, stop)
    assert whole.dtype == slab.dtype == np.float32
    assert whole.shape == (lines(tensor), tensor.shape[-1])
    np.testing.assert_array_equal(slab, whole[start:stop])


@cache
def in_memory(name: str) -> Arrays:
    """Tensors as transformers holds them, all experts in one."""
    return {key: value.numpy() for key, value in tiny_model(name).state_dict().items()}


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_in_one_tensor_give_the_same_file(name: str, tiny: Tiny) -> None:
    _, config, arrays = tiny(name)
    apart, together = to_gguf(config, arrays), to_gguf(config, in_memory(name))
    assert len(in_memory(name)) < len(arrays)
    assert apart.keys() == together.keys()
    for key, values in apart.items():
        np.testing.assert_array_equal(values, together[key])


def test_a_slab_reads_no_more_rows_than_it_has(tiny: Tiny) -> None:
    _, config, arrays = tiny("mixtral")
    asked: list[int] = []

    def read(name: str, rows: slice | npt.NDArray[np.integer] | None = None, /) -> npt.NDArray[np.float32]:
        part = reader(arrays)(name, rows)
        asked.append(len(part))
        return part

    for tensor in arch.gguf_tensors(config, shapes_of(arrays)):
        if len(tensor.shape) > 1:
            asked.clear()
            assert len(tensor.read(read, 1, 4)) == sum(asked) == 3


def test_gpt2_names_without_the_base_prefix(tiny: Tiny) -> None:
    _, config, arrays = tiny("gpt2")
    bare = {key.removeprefix("transformer."): value for key, value in arrays.items()}
    bare["h.0.attn.bias"] = bare["h.0.attn.masked_bias"] = np.zeros((1, 1), np.float32)  # buffers of old checkpoints
    wanted, found = to_gguf(config, arrays), to_gguf(config, bare)
    assert wanted.keys() == found.keys()
    assert all(np.array_equal(wanted[key], found[key]) for key in wanted)


def older(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as transformers 4 wrote it."""
    out = {key: value for key, value in config.items() if key not in ("rope_parameters", "layer_types", "dtype")}
    rope = config["rope_parameters"]
    if "sliding_attention" in rope:
        out["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        out["sliding_window_pattern"] = 6
    full = dict(rope.get("full_attention", rope))
    out["rope_theta"] = full.pop("rope_theta")
    full.pop("original_max_position_embeddings", None) if config["model_type"] == "phi3" else None
    if full["rope_type"] != "default":
        full["type"] = full.pop("rope_type").replace("longrope", "su")
        out["rope_scaling"] = full
    else:
        out["rope_scaling"] = None
    return {**out, "torch_dtype": config["dtype"]}


@pytest.mark.parametrize("name", [name for name in TINY if name not in ("gpt2", "gemma3-pattern")])
def test_older_configurations_mean_the_same(name: str, tiny: Tiny) -> None:
    _, config, arrays = tiny(name)
    new, old = arch.gguf_metadata(config), arch.gguf_metadata(older(config))
    del new[arch.REST], old[arch.REST]
    assert new == old
    wanted, found = to_gguf(config, arrays), to_gguf(older(config), arrays)
    assert wanted.keys() == found.keys()
    assert all(np.array_equal(wanted[key], found[key]) for key in wanted)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_factors_are_recognised(factor: float) -> None:
    full = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    factors = llama3_factors({**full, "rope_theta": 500000.0}, 128)
    assert recognise_llama3(factors, 500000.0) == full
    with pytest.raises(FewbitsError, match=r"rope_freqs\.weight"):
        recognise_llama3(factors[::-1].copy(), 500000.0)


def test_llama3_factors_equal_those_of_transformers(tiny: Tiny) -> None:
    _, config, _ = tiny("llama-llama3")
    rotary = tiny_model("llama-llama3").model.rotary_emb
    plain = config["rope_parameters"]["rope_theta"] ** -(np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(
        plain / llama3_factors(config["rope_parameters"], 16), rotary.inv_freq.numpy(), rtol=1e-6
    )


REFUSED = {
    "architecture": ("llama", {"architectures": ["GlmForCausalLM"]}, r"GlmForCausalLM.*LlamaForCausalLM"),
    "llama under another name": ("llama", {"architectures": ["LlamaModel"]}, "LlamaModel"),
    "activation": ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    "router": ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    "dense layers": ("qwen3-moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    "attention scale": ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar is 100"),
    "rope of layers": ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 1]}, "no_rope_layers"),
    "rope scaling": ("qwen3", {"rope_parameters": {"rope_type": "longrope"}}, "'longrope' of Qwen3ForCausalLM"),
    "yarn": (
        "llama-yarn",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 16}},
        "beta_fast = 16",
    ),
    "no number": ("llama", {"intermediate_size": "big"}, "intermediate_size is 'big'"),
    "missing": ("llama", {"max_position_embeddings": None}, "lacks max_position_embeddings"),
    "damaged header": ("llama-llama3", {"head_dim": 2**32 - 1}, "head_dim is 4294967295"),
    "no layers": ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_configurations(case: str, tiny: Tiny) -> None:
    name, changes, message = REFUSED[case]
    with pytest.raises(FewbitsError, match=message):
        arch.gguf_metadata({**tiny(name)[1], **changes})


def test_tensors_that_do_not_fit_are_named(tiny: Tiny) -> None:
    _, config, arrays = tiny("mixtral")
    shapes = shapes_of(arrays)
    expert = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    for change, message in (
        ({expert: None}, f"{expert} is missing"),
        ({expert: (64, 95)}, expert),
        ({"model.layers.0.self_attn.q_proj.bias": (64,)}, r"q_proj\.bias: MixtralForCausalLM has no such tensor"),
        ({"model.embed_tokens.weight": (VOCAB + 1, 64)}, "embed_tokens.*289 rows"),
        ({"model.norm.weight": (64, 1)}, "model.norm.weight has the shape"),
        ({"lm_head.weight": None}, "lm_head.weight is missing"),
    ):
        changed = {key: value for key, value in {**shapes, **change}.items() if value is not None}
        with pytest.raises(FewbitsError, match=message):
            arch.gguf_tensors(config, changed)
    extra = {"lm_head.weight": (VOCAB, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}
    _, config, arrays = tiny("llama-tied")
    names = [tensor.name for tensor in arch.gguf_tensors(config, {**shapes_of(arrays), **extra})]
    assert "output.weight" not in names


def test_gguf_files_that_do_not_fit_are_refused(tiny: Tiny) -> None:
    _, config, arrays = tiny("mixtral")
    metadata, shapes = arch.gguf_metadata(config), shapes_of(to_gguf(config, arrays))
    back = arch.config_from_gguf(metadata, shapes)
    with pytest.raises(FewbitsError, match=r"blk\.0\.ffn_gate\.0\.weight"):
        arch.hf_tensors(back, {**shapes, "blk.0.ffn_gate.0.weight": (96, 64)})
    with pytest.raises(FewbitsError, match=r"blk\.1\.attn_q\.weight is missing"):
        arch.hf_tensors(back, {key: shape for key, shape in shapes.items() if key != "blk.1.attn_q.weight"})
    with pytest.raises(FewbitsError, match="GGUF architecture mamba"):
        arch.config_from_gguf({"general.architecture": "mamba"})
    with pytest.raises(FewbitsError, match=r"lacks llama\.context_length"):
        arch.config_from_gguf({"general.architecture": "llama", "llama.block_count": np.uint32(2)})
    heads = {"llama.attention.head_count": np.array([4, 2], np.int32)}
    with pytest.raises(FewbitsError, match="differs from layer to layer"):
        arch.config_from_gguf({**metadata, **heads})
    with pytest.raises(FewbitsError, match=r"rope_freqs\.weight"):
        arch.config_from_gguf({**metadata, arch.REST: "{}"}, {**shapes, "rope_freqs.weight": (8,)})
    same = {"llama.attention.head_count_kv": np.array([2, 2], np.int32)}
    assert arch.config_from_gguf({**metadata, **same}, shapes) == back


def test_what_llama_cpp_leaves_out_is_said(tiny: Tiny) -> None:
    for name in TINY:
        assert arch.gguf_notes(tiny(name)[1]) == []
    assert "sliding window of 64" in arch.gguf_notes({**tiny("mistral")[1], "sliding_window": 64})[0]
    assert arch.gguf_notes({**tiny("qwen2")[1], "sliding_window": 64, "use_sliding_window": False}) == []


@pytest.mark.parametrize("family", arch.FAMILIES, ids=lambda family: family.name)
def test_the_table_is_consistent(family: arch.Family) -> None:
    modules = {role.hf for role in family.block_roles}
    linears = {role.hf for role in family.block_roles if role.kind == "linear"}
    assert {name for group in family.groups for name in group} <= linears
    for pair in family.pairs:
        assert {pair.source, *pair.targets} <= modules
    assert len({role.gguf for role in family.block_roles}) == len(family.block_roles)
    assert any(tiny.config.startswith(family.architecture.split("For")[0].split("LM")[0]) for tiny in TINY.values())


JUNK = [0, 1, 7, 2**32 - 1, -1, 0.0, -1.5, float("nan"), float("inf"), "", "x", True, None, [], ["a"], [1.5], {"a": 1}]


@pytest.mark.parametrize("name", ["llama-llama3", "mixtral", "gemma3-pattern", "phi3-long", "qwen2-yarn", "gpt2"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_junk_is_refused_and_never_crashes(name: str, tiny: Tiny, data: st.DataObject) -> None:
    _, config, arrays = tiny(name)
    metadata, converted = arch.gguf_metadata(config), to_gguf(config, arrays)
    if data.draw(st.booleans()):
        metadata[arch.REST] = data.draw(
            st.sampled_from(["{}", "[", "[1]", '{"architectures": 3}', '{"layer_types": 5}'])
        )
    key = data.draw(st.sampled_from([key for key in metadata if key != arch.REST]))
    arrays_of_junk = [np.array([], np.int32), np.array([1, 2], np.int32), np.array([np.nan], np.float32)]
    metadata[key] = data.draw(st.sampled_from([*JUNK, *arrays_of_junk]))
    changed = {**config, data.draw(st.sampled_from(sorted(config))): data.draw(st.sampled_from(JUNK))}
    try:
        back = arch.config_from_gguf(metadata, shapes_of(converted), reader(converted))
        arch.hf_tensors(back, shapes_of(converted))
    except FewbitsError:
        pass
    try:
        arch.gguf_metadata(changed)
        arch.gguf_tensors(changed, shapes_of(arrays))
    except FewbitsError:
        pass


@pytest.mark.parametrize("name", TINY)
def test_shapes_are_checked_against_the_configuration(name: str, tiny: Tiny) -> None:
    """Every family's own shapes pass; one row less anywhere among the linears does not."""
    _, config, arrays = tiny(name)
    metadata, views = arch.gguf_metadata(config), arch.gguf_tensors(config, shapes_of(arrays))
    arch.check_shapes(metadata, views)
    for view in views:
        if view.name.endswith(("ffn_down.weight", "ffn_up.weight", "attn_output.weight", "ffn_down_exps.weight")):
            cut = dataclasses.replace(view, shape=(view.shape[0] - 1, *view.shape[1:]))
            with pytest.raises(FewbitsError, match="json says"):
                arch.check_shapes(metadata, [cut])
