"""What is fuzzed: small valid files of every kind, and all the ways in which the verbs read them."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

import fewbits
from fewbits import arch
from fewbits.calibration.imatrix_files import read_statistics, write_statistics
from fewbits.calibration.statistics import Statistics, TensorStatistics
from fewbits.checkpoint import GGUFCheckpoint, Model, SafetensorsCheckpoint
from fewbits.checkpoint.gguf import GGML_TYPES
from fewbits.codecs import CODECS
from fewbits.export.jinja import ChatTemplate
from fewbits.export.modelfile import modelfile
from fewbits.formats.gguf.source import gguf_source
from fewbits.formats.gguf.writer import TensorEntry, lay_out, write_shards
from fewbits.layouts import LAYOUTS
from fewbits.memory.gguf_shape import shape_from_gguf
from fewbits.plan import Plan, apply_edits
from fewbits.tokenizer import gguf_tokenizer, tokenizer_from_gguf
from fewbits.verify import verify

SAMPLED = 8
SMALL = 1 << 10
"""Weights of a tensor that are read where the reader of headers is what is fuzzed."""
HIDDEN, FF, VOCAB = 128, 128, 40
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FF,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCAB, "head_dim": 64,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "dtype": "float32",
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{% endfor %}{{ bos_token }}"
QUANTIZED = (
    "gptq:w4g32", "gptq:w8g128-asym", "awq:w4g32", "hqq:w4g64", "hqq:w3g64", "bnb:nf4", "bnb:int8", "ct:w4a16g32",
    "ct:w8a8", "ct:nvfp4", "ct:fp8", "fp8:block128", "bitnet:autobitlinear", "exl2:4_g32", "exl3:3", "quip:2", "quip:3",
    "aqlm:2x8g8",
)  # fmt: skip
CALIBRATED = ("gptq", "awq", "ct", "exl2", "exl3", "quip", "aqlm")


@dataclass(frozen=True)
class Case:
    """A valid model: its files by name within a folder."""

    files: dict[str, bytes]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)

    @staticmethod
    def read(folder: Path) -> Case:
        return Case({path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()})

    def kind(self, name: str) -> str:
        return Path(name).suffix.removeprefix(".")


@dataclass(frozen=True)
class Target:
    """One kind of file.

    Attributes:
        cases: makes valid ones below a folder; given True, only those that take no text.
        changed: regular expression of the names that are changed.
        read: everything that reads such files, given their folder.
    """

    name: str
    cases: Callable[[Path, bool], list[Case]]
    changed: str
    read: Callable[[Path], None]

    def mutable(self, case: Case) -> list[str]:
        return [name for name in sorted(case.files) if re.fullmatch(self.changed, name)]


def model_case() -> Case:
    """A random Llama of one block with a byte-level BPE tokenizer of forty tokens."""
    rng = np.random.default_rng(0)
    linears = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN, HIDDEN), "v": (HIDDEN, HIDDEN), "o": (HIDDEN, HIDDEN)}
    mlp = {"gate": (FF, HIDDEN), "up": (FF, HIDDEN), "down": (HIDDEN, FF)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    block = "model.layers.0."
    shapes |= {f"{block}self_attn.{name}_proj.weight": shape for name, shape in linears.items()}
    shapes |= {f"{block}mlp.{name}_proj.weight": shape for name, shape in mlp.items()}
    shapes |= {f"{block}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    tensors = {name: rng.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}
    pieces = ["<|end|>", *(chr(33 + i) for i in range(VOCAB - 3)), "AB", "ABC"]
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {"id": 0, "content": "<|end|>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": step,
        "added_tokens": [{**added, "normalized": False}], "post_processor": None, "decoder": step,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": [["A", "B"], ["AB", "C"]],
        },
    }  # fmt: skip
    told = {"bos_token": "<|end|>", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    told |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    return Case(
        {
            "config.json": json.dumps(CONFIG).encode(),
            "model.safetensors": save(tensors),
            "tokenizer.json": json.dumps(tokenizer).encode(),
            "tokenizer_config.json": json.dumps(told).encode(),
        }
    )


def _made(folder: Path) -> Path:
    """The model's folder."""
    if not (folder / "model").exists():
        model_case().write(folder / "model")
    return folder / "model"


def _ggufs(folder: Path, _: bool = False) -> list[Case]:
    """A model as it is, a quantized one, and every storage type in a file of its own making."""
    model, cases = _made(folder), []
    for target in ("F16", "Q4_0"):
        out = folder / f"{target}.gguf"
        fewbits.quantize(model, target, out, threads=1)
        cases.append(Case({"model.gguf": out.read_bytes()}))
    rng = np.random.default_rng(1)
    entries = [
        TensorEntry(name, (2, 256), name, CODECS[name].nbytes((2, 256))) for name in CODECS if name in GGML_TYPES
    ]
    shards = lay_out(
        folder / "types.gguf", {"general.architecture": "none", "a": [""], "b": np.arange(3)}, entries, None
    )
    write_shards(shards, iter([[rng.bytes(entry.nbytes)] for entry in entries]), overwrite=False)
    return [*cases, Case({"model.gguf": shards[0].path.read_bytes()})]


def _read_gguf(folder: Path) -> None:
    path = folder / "model.gguf"
    fewbits.inspect(path)
    checkpoint = GGUFCheckpoint(path)
    for name, info in checkpoint.tensors.items():
        if info.dtype in CODECS and info.shape:
            checkpoint.lines(name, 0, prod(info.shape[:-1]))
    if sampled(path):
        verify(path, quick=True, threads=1)
    if checkpoint.metadata.get("general.architecture") == "none":
        return
    shape_from_gguf(checkpoint.metadata)
    gguf_source(checkpoint)
    model = Model(checkpoint)
    for name in model.names:
        model.read(name)
    if sampled(path):
        fewbits.plan(path, "Q4_K_M")
        modelfile(checkpoint, path)


def _parse_gguf(folder: Path) -> None:
    """The parser alone, some fifty times as often in the same time."""
    checkpoint = GGUFCheckpoint(folder / "model.gguf")
    if checkpoint.metadata.get("general.architecture") != "none":
        shape_from_gguf(checkpoint.metadata)


def _small_ggufs(folder: Path, _: bool) -> list[Case]:
    """Headers of each kind of value, with little behind them."""
    metadata = {
        "general.architecture": "none", "a": [""], "b": np.arange(3), "c": True, "d": 1.5, "e": ["x", "yz"],
        "split.count": np.uint16(1), "split.no": np.uint16(0),
    }  # fmt: skip
    rng, cases = np.random.default_rng(1), []
    folder.mkdir(parents=True, exist_ok=True)
    for names in (("F32", "Q4_0"), ("Q2_K", "IQ2_XS", "BF16"), tuple(CODECS)[:0]):
        entries = [TensorEntry(name, (256,), name, CODECS[name].nbytes((256,))) for name in names]
        shards = lay_out(folder / f"small-{len(entries)}.gguf", metadata, entries, None)
        write_shards(shards, iter([[rng.bytes(entry.nbytes)] for entry in entries]), overwrite=False)
        cases.append(Case({"model.gguf": shards[0].path.read_bytes()}))
    return cases


def sampled(path: Path) -> bool:
    """Whether a file, by its bytes, is one of the few that the slow readers get, too."""
    return zlib.crc32(path.read_bytes()) % SAMPLED == 0


def _read_gguf_tokenizer(folder: Path) -> None:
    checkpoint = GGUFCheckpoint(folder / "model.gguf")
    tokenizer_from_gguf(checkpoint.metadata).encode("ABC AB <|end|> \N{SNOWMAN}")


def _directories(folder: Path, few: bool) -> list[Case]:
    """The model in every layout, and in shards."""
    model, text = _made(folder), folder / "text.txt"
    text.write_text("".join(np.random.default_rng(3).choice(list("ABCDEFGH"), 4000)))
    cases = [Case.read(model)]
    for target in QUANTIZED:
        out = folder / re.sub(r"\W", "-", target)
        texts = [text] if target.startswith(CALIBRATED) else []
        if few and texts:
            continue
        fewbits.quantize(
            model, target, out, threads=1, calibration=texts, calibration_chunks=2 if texts else None, effort="fast",
            head_bits=16 if target.startswith("exl") else None,
        )  # fmt: skip
        files = Case.read(out).files
        cases.append(Case({n: d for n, d in files.items() if n.endswith((".safetensors", ".json"))}))
    return [*cases, _sharded(model)]


def _sharded(model: Path) -> Case:
    """One tensor a file."""
    files = Case.read(model).files
    tensors = load(files.pop("model.safetensors"))
    places = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
    index = json.dumps({"metadata": {}, "weight_map": places}).encode()
    shards = {place: save({name: tensors[name]}) for name, place in places.items()}
    return Case({**files, **shards, "model.safetensors.index.json": index})


def _read_directory(folder: Path) -> None:
    fewbits.inspect(folder)
    checkpoint = SafetensorsCheckpoint(folder)
    for name, info in checkpoint.tensors.items():
        if info.dtype not in ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"):
            checkpoint.read(name)
    if any(sampled(file) for file in folder.glob("*.safetensors")):
        verify(folder, quick=True, threads=1)


def _small_safetensors(folder: Path, _: bool) -> list[Case]:
    """Few and small tensors, in one file and in three."""
    config = json.dumps(CONFIG).encode()
    tensors = {name: np.zeros((2, 4), kind) for name, kind in (("a", np.float16), ("b", np.float32), ("c.d", np.int8))}
    shards = {f"model-{name}.safetensors": save({name: tensor}) for name, tensor in tensors.items()}
    places = {name: f"model-{name}.safetensors" for name in tensors}
    index = json.dumps({"metadata": {"total_size": 56}, "weight_map": places}).encode()
    return [
        Case({"config.json": config, "model.safetensors": save(tensors, {"format": "pt"})}),
        Case({"config.json": config, **shards, "model.safetensors.index.json": index}),
    ]


def _parse_safetensors(folder: Path) -> None:
    """The reader alone."""
    checkpoint = SafetensorsCheckpoint(folder)
    for name, info in checkpoint.tensors.items():
        if info.dtype in ("F16", "BF16", "F32") and prod(info.shape) <= SMALL:
            checkpoint.read(name)


def _read_config(folder: Path) -> None:
    """What config.json is asked for without transformers, which takes milliseconds and checks by itself."""
    checkpoint = SafetensorsCheckpoint(folder)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    views = arch.gguf_tensors(checkpoint.config, shapes)
    metadata = arch.gguf_metadata(checkpoint.config)
    arch.check_shapes(metadata, views)
    arch.gguf_notes(checkpoint.config)
    arch.decoder_linears(checkpoint.config, shapes)
    arch.config_from_gguf(metadata)
    shape_from_gguf(metadata)
    gguf_tokenizer(folder, checkpoint.config)


def _configs(folder: Path, _: bool) -> list[Case]:
    """The model under the configuration of every family that has its tensors, and of each quantizer."""
    files = Case.read(_made(folder)).files
    window = {"sliding_window": 8, "layer_types": ["full_attention"]}
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    changes = (
        {}, {"rope_parameters": rope}, {"architectures": ["MistralForCausalLM"], **window},
        {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]},
    )  # fmt: skip
    configs = [json.dumps({**CONFIG, **change}).encode() for change in changes]
    return [Case({**files, "config.json": config}) for config in configs] + [_sharded(_made(folder))]


def _layout_configs(folder: Path, _: bool) -> list[Case]:
    """Each layout's `quantization_config`, and made-up ones with every key that any layout looks at."""
    known = [json.dumps(layout.config(["lm_head"])).encode() for layout in _examples()]
    return [Case({"config.json": config}) for config in known]


def _examples() -> Iterator[object]:
    for layout in LAYOUTS.values():
        for spec in layout.examples():
            if not layout.mixed(spec) and not layout.members(spec):
                try:
                    yield layout.from_spec(spec)
                except fewbits.FewbitsError:
                    continue


def _imatrices(folder: Path, _: bool) -> list[Case]:
    rng = np.random.default_rng(2)
    tensors = {
        name: TensorStatistics(rng.random((experts, 8), np.float32), np.full(experts, 512, np.float32))
        for name, experts in (("blk.0.attn_q.weight", 1), ("blk.0.ffn_up_exps.weight", 3))
    }
    statistics = Statistics(tensors, ["a.txt"], 4, 512, ["ab" * 32], 2048)
    cases = []
    for kind in ("gguf", "dat"):
        file = folder / f"imatrix.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_statistics(statistics, file, kind)  # type: ignore[arg-type]
        cases.append(Case({file.name: file.read_bytes()}))
    return cases


def _read_imatrix(folder: Path) -> None:
    (path,) = folder.iterdir()
    for tensor in read_statistics(path).tensors.values():
        tensor.importance()
    verify(path, threads=1)


def _plans(folder: Path, _: bool) -> list[Case]:
    files = Case.read(_made(folder)).files
    return [Case({**files, "plan.json": fewbits.plan(_made(folder), "Q4_0").to_json().encode()})]


_fresh: dict[Path, Plan] = {}


def _read_plan(folder: Path) -> None:
    edited = Plan.load(folder / "plan.json")
    edited.table()
    edited.table(per_tensor=True)
    if folder not in _fresh:
        _fresh[folder] = fewbits.plan(folder, "Q4_0")
    apply_edits(_fresh[folder], edited).table()


def _read_tokenizer(folder: Path) -> None:
    gguf_tokenizer(folder, json.loads((folder / "config.json").read_bytes()))


def _read_loaded_tokenizer(folder: Path) -> None:
    from fewbits.tokenizer import load_tokenizer

    load_tokenizer(folder).encode("ABC AB <|end|>")


def _templates(folder: Path, _: bool) -> list[Case]:
    longer = (
        "{%- macro say(m) -%}{{ m.role ~ ':' ~ m.content }}{%- endmacro -%}{% set ns = namespace(n=0) %}"
        "{% for m in messages %}{% if loop.index0 % 2 == ns.n %}{{ say(m) }}{% endif %}{% endfor %}"
        "{% if not messages %}{{ raise_exception('none') }}{% endif %}{{ 'x' * 3 }}{{ range(3) | join(',') }}"
    )
    return [Case({"chat_template.jinja": text.encode()}) for text in (TEMPLATE, longer)]


def _read_template(folder: Path) -> None:
    source = (folder / "chat_template.jinja").read_bytes().decode("utf-8", "replace")
    ChatTemplate(source, {"bos_token": "<s>"}).render([{"role": "user", "content": "hi"}], True)


def _read_layout_config(folder: Path) -> None:
    from fewbits.checkpoint.quantized import layout_of
    from fewbits.checkpoint.safetensors import read_json

    layout_of(folder, read_json(folder / "config.json"), [])


def _models(folder: Path, _: bool) -> list[Case]:
    return [Case.read(_made(folder))]


TARGETS = {
    target.name: target
    for target in (
        Target("gguf", _ggufs, r".*\.gguf", _read_gguf),
        Target("gguf-header", _small_ggufs, r".*\.gguf", _parse_gguf),
        Target("gguf-tokenizer", lambda folder, _: _ggufs(folder)[:1], r".*\.gguf", _read_gguf_tokenizer),
        Target("safetensors", _directories, r".*\.safetensors|.*index\.json|config\.json", _read_directory),
        Target("safetensors-header", _small_safetensors, r".*\.safetensors|.*index\.json", _parse_safetensors),
        Target("config", _configs, r"config\.json|.*index\.json", _read_config),
        Target("layout", _layout_configs, r"config\.json", _read_layout_config),
        Target("imatrix", _imatrices, r"imatrix\..*", _read_imatrix),
        Target("plan", _plans, r"plan\.json", _read_plan),
        Target("tokenizer", _models, r"tokenizer.*\.json", _read_tokenizer),
        Target("tokenizer-load", _models, r"tokenizer.*\.json", _read_loaded_tokenizer),
        Target("template", _templates, r".*\.jinja", _read_template),
    )
}
