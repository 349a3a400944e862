"""Which bytes of weights an engine loads, tensor by tensor, as they are or as they would be quantized."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from fewbits import arch
from fewbits.checkpoint import GGUFCheckpoint, Model, SafetensorsCheckpoint
from fewbits.codecs import CODECS
from fewbits.errors import FewbitsError
from fewbits.memory.config_shape import text_config
from fewbits.memory.engines import REPACKED, Engine
from fewbits.memory.shape import ModelShape
from fewbits.memory.skeleton import Skeleton, bound_tensors, gguf_skeleton
from fewbits.memory.source import Described
from fewbits.plan import MixtureOptions, ModelFacts, SourceTensor, plan_tensors
from fewbits.plan.directory import is_directory_target, nbytes_on_average, plain_dtype, plan_directory, target
from fewbits.plan.presets import PRESETS, preset

ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight", "position_embd.weight", "token_types.weight")
"""What llama.cpp keeps in RAM whatever is offloaded."""


@dataclass(frozen=True)
class Weight:
    """One tensor that is loaded.

    Attributes:
        dtype: storage type.
        block: number of its block, -1 outside.
        experts: whether it holds the experts of a block.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    block: int
    experts: bool

    def repacked(self, simd: str) -> bool:
        """Whether llama.cpp rearranges it when it is used on a CPU of this kind."""
        rows = self.shape[-2] if len(self.shape) > 1 else 0
        return rows % 8 == 0 and rows > 0 and self.dtype in REPACKED.get(simd, ()) and self.name not in EMBEDDINGS


@dataclass(frozen=True)
class Loaded:
    """The weights of one model in one engine.

    Attributes:
        target: what they were quantized to, None as they are.
        planned: the tensors that another target could be planned from, with what the plan needs to know.
    """

    weights: tuple[Weight, ...]
    target: str | None
    notes: tuple[str, ...] = ()
    planned: tuple[ModelFacts, tuple[SourceTensor, ...]] | None = None
    certain: bool = True
    made: dict[str, Loaded] = field(default_factory=dict, compare=False, repr=False)
    """The same model at the presets that were asked for before."""

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    def at(self, name: str) -> Loaded:
        """The same model at another preset of GGUF."""
        if self.planned is None:
            raise FewbitsError("This model's tensors are not known one by one.")
        chosen = preset(name)
        if chosen.name in self.made:
            return self.made[chosen.name]
        facts, tensors = self.planned
        # levels that ask for an importance matrix will have one; it moves a few types
        options = MixtureOptions(has_imatrix=chosen.needs_imatrix)
        planned, _ = plan_tensors(facts, tensors, chosen.name, options)
        weights = tuple(_weight(t.name, t.shape, t.codec, t.nbytes) for t in planned)
        self.made[chosen.name] = replace(self, weights=weights, target=chosen.name)
        return self.made[chosen.name]


def _weight(name: str, shape: tuple[int, ...], dtype: str, nbytes: int) -> Weight:
    found = re.match(r"blk\.(\d+)\.|.*?\.(?:layers|h|blocks)\.(\d+)\.", name)
    block = int(found[1] or found[2]) if found else -1
    return Weight(name, shape, dtype, nbytes, block, "_exps" in name or ".experts." in name)


def load(described: Described, engine: Engine, shape: ModelShape, wanted: str | None) -> Loaded:
    """The weights that an engine loads.

    Args:
        wanted: a preset of GGUF or a directory target; None: as they are.

    Raises:
        FewbitsError: an engine that does not load it, an unknown target, or a model whose tensors are not known.
    """
    directory = is_directory_target(wanted) if wanted else described.kind == "directory"
    if "gguf" in engine.formats:
        if wanted and directory:
            raise FewbitsError(
                f"{wanted}: {engine.name} runs GGUF files.",
                "Choose a preset such as Q4_K_M, or another engine: --engine vllm, --engine transformers.",
            )
        return _as_gguf(described, shape, wanted)
    if wanted and not directory:
        raise FewbitsError(
            f"{wanted}: {engine.name} loads model directories, not GGUF files.",
            "Choose a target such as gptq:w4g128, or --engine llama.cpp.",
        )
    if described.kind == "gguf" and not wanted:
        raise FewbitsError(
            f"{described.name}: {engine.name} loads model directories, not GGUF files.",
            "Name what it would become, e.g. --target gptq:w4g128, or take --engine llama.cpp.",
        )
    return _as_directory(described, shape, wanted)


def _as_gguf(described: Described, shape: ModelShape, wanted: str | None) -> Loaded:
    if "gguf" not in described.memo:
        described.memo["gguf"] = _source_tensors(described, shape)
    loaded: Loaded = described.memo["gguf"]
    if wanted:
        return loaded.at(wanted)
    if described.kind == "gguf":
        return loaded
    note = "as a GGUF of the model's own type; --target says what it would be quantized to"
    return replace(loaded.at("COPY"), target=None, notes=(*loaded.notes, note))


def _source_tensors(described: Described, shape: ModelShape) -> Loaded:
    """What a GGUF file holds, or would be planned from; in the latter case without weights yet."""
    checkpoint = described.checkpoint
    if isinstance(checkpoint, GGUFCheckpoint):
        stored = [(n, info.shape, info.dtype, info.nbytes) for n, info in checkpoint.tensors.items()]
        tensors = tuple(SourceTensor(name, sizes, dtype) for name, sizes, dtype, _ in stored)
        facts = ModelFacts.from_metadata(checkpoint.metadata)
        return Loaded(tuple(_weight(*each) for each in stored), None, (), (facts, tensors))
    skeleton = _skeleton(described)
    if skeleton is None:
        facts = ModelFacts(shape.architecture, shape.stored_layers, shape.heads, shape.heads, shape.experts)
        return Loaded((), None, (_BOUND,), (facts, tuple(bound_tensors(shape))), certain=False)
    facts, found, notes = gguf_skeleton(skeleton, shape)
    return Loaded((), None, tuple(notes), (facts, tuple(found)), certain=not notes)


_BOUND = "unknown architecture: the weights are a bound, from the sizes in config.json"


def _skeleton(described: Described) -> Skeleton | None:
    """The model's tensors: those of its files, or those that config.json implies."""
    config, checkpoint = described.config, described.checkpoint
    if isinstance(checkpoint, SafetensorsCheckpoint) and text_config(config).keys() == dict(config).keys():
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        sizes: dict[str, int] = {}
        for info in checkpoint.tensors.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + prod(info.shape)
        return Skeleton(config, shapes, max(sizes, key=lambda dtype: sizes[dtype]))
    return described.skeleton


def _as_directory(described: Described, shape: ModelShape, wanted: str | None) -> Loaded:
    checkpoint = described.checkpoint
    if wanted is None and checkpoint is not None:
        stored = [_weight(n, info.shape, info.dtype, info.nbytes) for n, info in checkpoint.tensors.items()]
        return Loaded(tuple(stored), None)
    if wanted is None:
        skeleton = described.skeleton
        if skeleton is None:
            loaded = [_plain(t.name, t.shape, t.dtype) for t in bound_tensors(shape)]
            return Loaded(tuple(loaded), None, (_BOUND,), certain=False)
        return Loaded(tuple(_plain(n, s, skeleton.dtype) for n, s in skeleton.tensors.items()), None)
    config, tensors = _hf_tensors(described, shape)
    chosen = target(wanted, None, calibrated=True)
    chosen = replace(chosen, layout=chosen.layout.for_floats(plain_dtype(tensors, chosen.layout)))
    planned, notes = plan_directory(config, tensors, chosen)
    weights = tuple(_weight(t.name, t.shape, t.codec, nbytes_on_average(t, chosen)) for t in planned)
    return Loaded(weights, chosen.name, tuple(notes))


def _plain(name: str, shape: tuple[int, ...], dtype: str) -> Weight:
    return _weight(name, shape, dtype, prod(shape) * ITEM_BYTES[dtype])


def _hf_tensors(
    described: Described, shape: ModelShape
) -> tuple[Mapping[str, object], dict[str, tuple[tuple[int, ...], str]]]:
    """config.json and what a checkpoint of the model stores: experts one by one."""
    if described.checkpoint is not None:
        model = Model(described.checkpoint)
        return model.config, {name: (model.shape(name), model.dtype(name)) for name in model.names}
    config = described.config
    arch.family_of(config)  # a directory can be planned for known families only
    skeleton = described.skeleton
    if skeleton is None:
        raise FewbitsError(f"{described.name}: its tensors are not known from config.json.", "Name the whole model.")
    views = arch.gguf_tensors(config, skeleton.tensors)
    named = arch.hf_tensors(config, {view.name: view.shape for view in views})
    return config, {tensor.name: (tensor.shape, skeleton.dtype) for tensor in named}


def smaller_presets(loaded: Loaded) -> Iterable[str]:
    """Presets that take fewer bytes than these weights, the largest first."""
    if loaded.planned is None:
        return
    n_weights = sum(prod(tensor.shape) for tensor in loaded.planned[1])
    now = loaded.nbytes * 8 / max(n_weights, 1)
    sized = [(p.bits_per_weight, p.name) for p in PRESETS.values() if p.bits_per_weight and p.base in CODECS]
    for bits, name in sorted(sized, reverse=True):
        if bits < now and name in RECOMMENDED:
            yield name


RECOMMENDED = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "IQ3_M", "IQ3_XXS", "Q2_K")
"""Levels worth going down by, in the field guide's words: never below Q2_K."""
