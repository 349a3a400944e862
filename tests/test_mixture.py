"""The type of every tensor: against the executable description of llama-quantize, and against figures it printed."""

from __future__ import annotations

import importlib.util
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from zlib import crc32

import pytest

from fewbits.codecs.base import CODECS, codec
from fewbits.errors import FewbitsError
from fewbits.plan import (
    ALIASES,
    PRESETS,
    TENSOR_TYPES,
    MixtureOptions,
    ModelFacts,
    SourceTensor,
    choose_types,
    converted_dtype,
    plan_tensors,
    preset,
    quantizable,
    requires_imatrix,
    role,
)

GOLDEN = Path(__file__).parent / "data" / "mixture.tsv"
QUANTIZED = [p.name for p in PRESETS.values() if p.quantized]


def build(
    facts: ModelFacts,
    width: int = 512,
    ffn: int = 1024,
    vocab: int = 1000,
    tied: bool = False,
    fused: bool = False,
    shared_expert: bool = False,
    dtype: str = "F16",
) -> list[SourceTensor]:
    """Headers of a made-up model, in the order of its layers."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, width), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (vocab, width)
    head = max(1, width // max(1, facts.n_head))
    kv = head * facts.n_head_kv
    for i in range(facts.n_layer):
        b = f"blk.{i}."
        shapes[b + "attn_norm.weight"] = (width,)
        shapes[b + "attn_norm.bias"] = (width,)
        if fused:
            shapes[b + "attn_qkv.weight"] = (width + 2 * kv, width)
        else:
            shapes |= {b + "attn_q.weight": (width, width), b + "attn_q.bias": (width,)}
            shapes |= {b + "attn_k.weight": (kv, width), b + "attn_v.weight": (kv, width)}
        shapes[b + "attn_output.weight"] = (width, width)
        if facts.n_expert:
            shapes[b + "ffn_gate_inp.weight"] = (facts.n_expert, width)
            shapes |= {b + f"ffn_{x}_exps.weight": (facts.n_expert, ffn, width) for x in ("gate", "up")}
            shapes[b + "ffn_down_exps.weight"] = (facts.n_expert, width, ffn)
        if not facts.n_expert or shared_expert:
            end = "_shexp.weight" if facts.n_expert else ".weight"
            shapes |= {b + "ffn_gate" + end: (ffn, width), b + "ffn_up" + end: (ffn, width)}
            shapes[b + "ffn_down" + end] = (width, ffn)
    return [SourceTensor(n, s, "F32" if len(s) == 1 or "gate_inp" in n else dtype) for n, s in shapes.items()]


def random_case(rng: random.Random, number: int) -> tuple[ModelFacts, list[SourceTensor], str, MixtureOptions]:
    """A model, a preset (each in turn) and options, within what llama-quantize does not abort on."""
    names = [*QUANTIZED, "F16", "BF16", "F32"]
    name = names[number % len(names)]
    arch = rng.choice(["llama", "llama", "llama", "falcon", "qwen2", "phi3"])
    n_head_kv = rng.choice([1, 2, 4])
    facts = ModelFacts(
        arch=arch,
        n_layer=rng.choice([3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 60, 80, 80]),
        n_head=n_head_kv * rng.choice([1, 3, 4, 8]),
        n_head_kv=n_head_kv,
        n_expert=rng.choice([0, 0, 0, 4, 8, 64]) if arch == "llama" else 0,
    )
    step = 64 if name == "Q1_0" else 32  # llama-quantize aborts where a row is no multiple of 128
    width = rng.choice([256, 512, 768]) if rng.random() < 0.5 or name == "Q1_0" else step * rng.randint(1, 20)
    if rng.random() < 0.1 and name not in ("Q1_0",):
        width = rng.choice([80, 100, 144, 250])
    ffn = rng.choice([1024, 2048]) if rng.random() < 0.7 or name == "Q1_0" else step * rng.randint(8, 40)
    tensors = build(
        facts,
        width,
        ffn,
        tied=rng.random() < 0.4,
        fused=arch in ("falcon", "phi3"),
        shared_expert=rng.random() < 0.5,
        dtype=rng.choice(["F16", "BF16", "F32"]),
    )
    fitting = [t for t in ("F16", "Q8_0", "Q5_1", "Q4_K", "Q6_K", "Q3_K") if codec(t).fits(width)]
    pool = [
        ("ffn_down", "q6_K"),
        (r"blk\.[0-3]\.", "Q8_0"),
        ("attn_v", "IQ4_XS"),
        (r"_exps", "q3_k"),
        ("output", "Q4_0"),
    ]
    options = MixtureOptions(
        has_imatrix=rng.random() < 0.5,
        pure=rng.random() < 0.1,
        tensor_types=rng.sample(pool, rng.randint(1, 3)) if rng.random() < 0.3 and PRESETS[name].quantized else (),
        output_type=rng.choice(fitting) if rng.random() < 0.2 else None,
        token_embedding_type=rng.choice(fitting) if rng.random() < 0.2 else None,
        leave_output=rng.random() < 0.1,
    )
    return facts, tensors, name, options


GOLDEN_MODELS: dict[str, tuple[ModelFacts, list[SourceTensor]]] = {
    label: (facts, build(facts, **shape))  # type: ignore[arg-type]
    for label, facts, shape in (
        ("dense32", ModelFacts("llama", 32, 8, 2), {}),
        ("llama80", ModelFacts("llama", 80, 8, 1), {}),
        ("experts8", ModelFacts("llama", 24, 8, 2, 8), {"width": 256, "ffn": 512}),
        ("falcon60", ModelFacts("falcon", 60, 4, 4), {"fused": True}),
        ("narrow30", ModelFacts("llama", 30, 9, 3), {"width": 576, "ffn": 1536, "tied": True}),
    )
}


def summarize(types: dict[str, str]) -> tuple[str, str]:
    """Checksum over every tensor's type, and how many there are of each: equal exactly where all types are."""
    lines = "".join(f"{name}={types[name]}\n" for name in sorted(types))
    counts = Counter(types.values())
    return f"{crc32(lines.encode()):08x}", " ".join(f"{t}:{counts[t]}" for t in sorted(counts))


def golden_lines() -> Iterator[tuple[str, ...]]:
    return (tuple(line.split("\t")) for line in GOLDEN.read_text().splitlines() if not line.startswith("#"))


@pytest.fixture(scope="session")
def oracle(shared_dir: Path) -> ModuleType:
    path = shared_dir / "specs" / "gguf_mixture.py"
    spec = importlib.util.spec_from_file_location("gguf_mixture", path)
    if spec is None or spec.loader is None or not path.exists():
        pytest.skip(f"no {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("model", "name", "imatrix", "checksum", "counts"), list(golden_lines()), ids=lambda value: str(value)[:12]
)
def test_types_that_llama_quantize_printed(model: str, name: str, imatrix: str, checksum: str, counts: str) -> None:
    facts, tensors = GOLDEN_MODELS[model]
    for has_imatrix in {"yes": [True], "no": [False], "either": [False, True]}[imatrix]:
        types = {c.name: c.codec for c in choose_types(facts, tensors, name, MixtureOptions(has_imatrix))}
        assert summarize(types) == (checksum, counts)


def test_golden_covers_every_quantized_preset() -> None:
    assert {(line[0], line[1]) for line in golden_lines()} == {(m, p) for m in GOLDEN_MODELS for p in QUANTIZED}


def test_same_choice_as_the_executable_description(oracle: ModuleType) -> None:
    rng, compared = random.Random(20), 0
    for number in range(760):
        facts, tensors, name, options = random_case(rng, number)
        model = {
            "arch": facts.arch,
            "n_layer": facts.n_layer,
            "n_head": facts.n_head,
            "n_head_kv": facts.n_head_kv,
            "n_expert": facts.n_expert,
            "is70b": facts.is_70b,
        }
        expected = oracle.choose(
            model,
            [(t.name, tuple(reversed(t.shape)), t.dtype) for t in tensors],
            name,
            options.has_imatrix,
            options.pure,
            options.output_type,
            options.token_embedding_type,
            [(pattern, to.upper()) for pattern, to in options.tensor_types],
            options.leave_output,
        )
        rng.shuffle(tensors)  # the order of the tensors in the file has no say
        got = {choice.name: choice.codec for choice in choose_types(facts, tensors, name, options)}
        assert got == expected, (facts, name, options)
        compared += 1
    assert compared >= 500


def test_presets_are_llama_quantize_s() -> None:
    assert len(PRESETS) + len(ALIASES) == 40  # GGUF, with a budget, is ours
    assert preset("q4_k").name == preset("15").name == preset(" Q4_K_M ").name == "Q4_K_M"
    assert preset("0").name == "F32" and preset("12").name == "Q3_K_M" and preset("41").name == "Q2_0"
    assert preset("copy").file_type is None
    numbers = [p.file_type for p in PRESETS.values() if p.file_type is not None]
    assert len(set(numbers)) == len(numbers)
    gguf = pytest.importorskip("gguf")
    for p in PRESETS.values():
        member = "ALL_F32" if p.name == "F32" else f"MOSTLY_{p.name}"
        if p.file_type is not None and hasattr(gguf.LlamaFileType, member):
            assert p.file_type == getattr(gguf.LlamaFileType, member)
    for wrong in ("Q9_K", "", "4", "-1", "15.0"):
        with pytest.raises(FewbitsError, match=r"Known:.*Q4_K_M"):
            preset(wrong)


def test_every_type_has_a_codec() -> None:
    assert set(TENSOR_TYPES) <= set(CODECS)
    assert all(set(p.types) <= set(TENSOR_TYPES) for p in PRESETS.values())
    assert PRESETS["Q4_K_M"].types == ("Q4_K", "Q5_K", "Q6_K") and PRESETS["COPY"].types == ()


def llama_3_8b() -> tuple[ModelFacts, list[SourceTensor]]:
    shapes = {"token_embd": (128256, 4096), "output": (128256, 4096), "output_norm": (4096,), "rope_freqs": (64,)}
    square, narrow, norm = (4096, 4096), (1024, 4096), (4096,)
    for i in range(32):
        layer = {"attn_q": square, "attn_k": narrow, "attn_v": narrow, "attn_output": square, "attn_norm": norm}
        layer |= {"ffn_up": (14336, 4096), "ffn_gate": (14336, 4096), "ffn_down": (4096, 14336), "ffn_norm": norm}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    tensors = [SourceTensor(f"{n}.weight", s, "F32" if len(s) == 1 else "BF16") for n, s in shapes.items()]
    return ModelFacts("llama", 32, 32, 8), tensors


@pytest.mark.parametrize("name", [p.name for p in PRESETS.values() if p.bits_per_weight is not None])
def test_promised_bits_per_weight_are_llama_3_8b_s(name: str) -> None:
    planned, _ = plan_tensors(*llama_3_8b(), name, MixtureOptions(has_imatrix=True))
    bits = sum(t.nbytes for t in planned) * 8 / sum(t.n_weights for t in planned)
    assert PRESETS[name].bits_per_weight == pytest.approx(bits, abs=0.0051)
    asks = any(requires_imatrix(t.name, t.codec, name) for t in planned)
    assert PRESETS[name].needs_imatrix == asks


def choose_one(name: str, shape: tuple[int, ...], target: str, options: MixtureOptions, dtype: str = "BF16") -> str:
    tensors = [SourceTensor(name, shape, dtype), SourceTensor("output.weight", (512, 512), "BF16")]
    return choose_types(ModelFacts("llama", 8, 8, 8), tensors, target, options)[0].codec


def test_overrides() -> None:
    facts, tensors = GOLDEN_MODELS["dense32"]
    options = MixtureOptions(tensor_types=[(r"blk\.\d\.ffn_down", "q8_0"), ("ffn_down", "Q6_K")])
    got = {c.name: c for c in choose_types(facts, tensors, "Q4_K_M", options)}
    assert got["blk.3.ffn_down.weight"].codec == "Q8_0" and got["blk.13.ffn_down.weight"].codec == "Q6_K"
    assert got["blk.3.ffn_down.weight"].reason == r"override 'blk\\.\\d\\.ffn_down'"
    assert got["blk.3.ffn_up.weight"].reason == "base type" and got["output.weight"].reason == "mixture"
    # unlike llama-quantize: obeyed whatever the target, and \D keeps its meaning
    assert (
        choose_one("blk.0.ffn_up.weight", (512, 512), "F16", MixtureOptions(tensor_types=[("ffn_up", "Q8_0")]))
        == "Q8_0"
    )
    assert (
        choose_one("blk.0.ffn_up.weight", (512, 512), "COPY", MixtureOptions(tensor_types=[(r"ffn_\D", "Q4_0")]))
        == "Q4_0"
    )
    embeddings = MixtureOptions(
        token_embedding_type="Q8_0", tensor_types=[("per_layer", "Q4_0"), ("token_embd", "Q5_0")]
    )
    assert choose_one("per_layer_token_embd.weight", (512, 512), "Q4_K_M", embeddings) == "Q4_0"
    assert choose_one("token_embd.weight", (512, 512), "Q4_K_M", embeddings) == "Q8_0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (MixtureOptions(tensor_types=[("ffn_(", "Q8_0")]), "'ffn_\\('.*not a regular expression"),
        (MixtureOptions(tensor_types=[("", "Q8_0")]), "no pattern"),
        (MixtureOptions(tensor_types=[("ffn", "Q9_0")]), "'Q9_0' for the override 'ffn'.*Known: F32"),
        (MixtureOptions(tensor_types=[("ffn", "Q4_K_M")]), "a mixture, not a type"),
        (MixtureOptions(output_type="nope"), "'nope' for the output tensor"),
        (MixtureOptions(token_embedding_type="NF4"), "'NF4' for the token embeddings"),
    ],
)
def test_bad_overrides_are_named(options: MixtureOptions, message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        choose_types(*GOLDEN_MODELS["dense32"], "Q4_K_M", options)


def test_notes_name_what_has_no_effect() -> None:
    facts, tensors = GOLDEN_MODELS["narrow30"]
    options = MixtureOptions(
        tensor_types=[("fnn_down", "Q8_0"), ("attn_norm", "Q8_0"), ("attn", "Q6_K"), ("attn_q", "Q8_0")],
        leave_output=True,
    )
    _, notes = plan_tensors(facts, tensors, "Q4_K_M", options)
    assert len(notes) == 4
    assert "'fnn_down'=Q8_0 matches no tensor" in notes[0]
    assert "'attn_norm'=Q8_0 has no effect: what it matches is never quantized" in notes[1]
    assert "'attn_q'=Q8_0 has no effect: other options decide" in notes[2]
    assert "no output.weight" in notes[3]
    assert "IQ2_XS" in plan_tensors(*GOLDEN_MODELS["dense32"], "IQ2_XS")[1][0]
    assert plan_tensors(*GOLDEN_MODELS["dense32"], "IQ2_XS", MixtureOptions(has_imatrix=True))[1] == []


def test_fallback() -> None:
    facts, tensors = GOLDEN_MODELS["narrow30"]
    choices = {c.name: c for c in choose_types(facts, tensors, "Q4_K_M")}
    query = choices["blk.0.attn_q.weight"]
    assert (query.codec, query.wanted, query.reason) == ("Q5_0", "Q4_K", "shape fallback from Q4_K (base type)")
    assert choices["blk.0.ffn_down.weight"].wanted is None  # 1536 columns
    with pytest.raises(FewbitsError) as caught:
        choose_types(facts, tensors, "Q4_K_M", MixtureOptions(no_fallback=True))
    wanting = [c for c in choices.values() if c.wanted]
    assert caught.value.message.startswith(f"{len(wanting)} of {len(tensors)} tensors, ")
    assert "blk.0.attn_q.weight (576 columns: Q4_K -> Q5_0)" in caught.value.message
    assert "IQ4_NL" in caught.value.hint
    # 576 is a multiple of 64, not of 128; llama-quantize aborts on these three
    assert choose_one("blk.0.ffn_up.weight", (8, 576), "Q1_0", MixtureOptions()) == "Q4_0"
    assert (
        choose_one("blk.0.ffn_up.weight", (8, 96), "Q4_0", MixtureOptions(tensor_types=[("ffn", "NVFP4")])) == "IQ4_NL"
    )
    assert choose_one("token_embd.weight", (8, 576), "Q8_0", MixtureOptions(token_embedding_type="Q6_K")) == "Q8_0"
    assert choose_one("blk.0.ffn_up.weight", (8, 80), "Q4_K_M", MixtureOptions()) == "F16"


def test_never_quantized() -> None:
    for name, shape in {
        "blk.0.attn_norm.weight": (8, 512),
        "blk.0.attn_q.bias": (8, 512),
        "blk.0.ffn_up.weight": (512,),
        "blk.1.ffn_up.weight": (1, 512),
        "position_embd.weight": (8, 512),
        "blk.0.ffn_gate_inp.weight": (8, 512),
        "blk.0.time_mix_w1.weight": (8, 512),
        "v.patch_embd.weight": (8, 512),
    }.items():
        assert not quantizable(name, shape)
        assert choose_one(name, shape, "Q4_0", MixtureOptions(pure=True, tensor_types=[(".", "Q8_0")]), "F32") == "F32"
    assert quantizable("blk.0.ssm_in.weight", (8, 512)) and quantizable(
        "blk.0.attn_k_b.weight", (2, 8, 512), "deepseek2"
    )
    assert not quantizable("blk.0.attn_k_b.weight", (2, 8, 512), "glm5-next")
    assert role("blk.0.attn_qkv.weight") == role("blk.0.attn_kv_b.weight") == "value"
    assert role("blk.0.ffn_gate_exps.weight") == "gate" and role("blk.0.ssm_in.weight") == "other"


def test_70b_is_known_by_its_depth() -> None:
    assert ModelFacts("llama", 80, 64, 8).is_70b and ModelFacts("qwen2", 80, 64, 8).is_70b
    assert not ModelFacts("llama", 80, 64, 64).is_70b and not ModelFacts("llama", 79, 64, 8).is_70b
    assert not ModelFacts("qwen3", 80, 64, 8).is_70b


def test_facts_from_metadata() -> None:
    metadata = {"general.architecture": "lfm2", "lfm2.block_count": 16, "lfm2.attention.head_count": 32}
    assert ModelFacts.from_metadata({**metadata, "lfm2.attention.head_count_kv": [0, 8]}) == ModelFacts(
        "lfm2", 16, 32, 0
    )
    assert ModelFacts("lfm2", 16, 32, 0).gqa == 0
    assert ModelFacts.from_metadata(metadata).gqa == 1
    with pytest.raises(FewbitsError, match="architecture"):
        ModelFacts.from_metadata({})
    with pytest.raises(FewbitsError, match=r"lfm2\.block_count is 'x'"):
        ModelFacts.from_metadata({**metadata, "lfm2.block_count": "x"})


def test_damaged_models_are_refused() -> None:
    up = SourceTensor("blk.0.ffn_up_exps.weight", (8, 512, 512), "F16")
    with pytest.raises(FewbitsError, match=r"two tensors named .blk\.0\.ffn_up_exps\.weight."):
        choose_types(ModelFacts("llama", 4, 8, 8, 8), [up, up], "Q4_K_M")
    far = SourceTensor("blk.9.ffn_up_exps.weight", (8, 512, 512), "F16")
    with pytest.raises(FewbitsError, match=r"'blk\.9\.ffn_up_exps\.weight' is in no layer"):
        choose_types(ModelFacts("llama", 4, 8, 8, 8), [far], "Q4_K_M")


def test_copy_and_requantize() -> None:
    facts, tensors = GOLDEN_MODELS["dense32"]
    stored = [SourceTensor(t.name, t.shape, "Q4_1" if t.dtype == "F16" else t.dtype) for t in tensors]
    copied, _ = plan_tensors(facts, stored, "COPY")
    assert {t.method for t in copied} == {"copy"} and all(t.codec == t.source_dtype for t in copied)
    again, _ = plan_tensors(facts, stored, "Q4_1")
    assert {(t.codec, t.method) for t in again} == {("Q4_1", "copy"), ("F32", "copy"), ("Q6_K", "search")}
    floats, _ = plan_tensors(facts, stored, "F16")
    assert {(t.codec, t.method) for t in floats} == {("F16", "convert"), ("F32", "copy")}
    # a table of integers is carried along, though there is no codec for it
    table = SourceTensor("blk.0.ffn_gate_tid2eid.weight", (100, 6), "I32")
    carried, _ = plan_tensors(facts, [table], "Q4_K_M")
    assert (carried[0].codec, carried[0].nbytes, carried[0].method) == ("I32", 2400, "copy")


@pytest.mark.parametrize(
    ("name", "shape", "source", "arch", "expected"),
    [
        ("blk.0.attn_q.weight", (64, 64), "BF16", "llama", "BF16"),
        ("blk.0.attn_q.weight", (64, 64), "F8_E4M3", "llama", "BF16"),
        ("blk.0.attn_q.weight", (64, 64), "F64", "llama", "F32"),
        ("blk.0.attn_norm.weight", (64,), "BF16", "llama", "F32"),
        ("blk.0.attn_q_norm.weight", (8, 64), "BF16", "llama", "F32"),
        ("blk.0.attn_q.bias", (64,), "F16", "qwen2", "F32"),
        ("blk.0.ffn_gate_inp.weight", (8, 64), "BF16", "qwen3moe", "F32"),
        ("blk.0.ffn_gate_inp.weight", (8, 64), "BF16", "dbrx", "BF16"),
        ("blk.0.ffn_gate_inp_shexp.weight", (1, 64), "BF16", "qwen2moe", "F32"),
        ("position_embd.weight", (100, 64), "F16", "gpt2", "F32"),
        ("token_embd.weight", (100, 64), "F16", "gpt2", "F16"),
        ("blk.0.ssm_conv1d.weight", (64, 4), "BF16", "mamba", "F32"),
        ("blk.0.ssm_a", (64, 16), "BF16", "mamba", "F32"),
        ("blk.0.ssm_in.weight", (64, 16), "BF16", "mamba", "BF16"),
    ],
)
def test_converted_dtype(name: str, shape: tuple[int, ...], source: str, arch: str, expected: str) -> None:
    assert converted_dtype(name, shape, source, arch) == expected
