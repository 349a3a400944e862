"""How much memory a model takes, where, and whether it fits: before it is downloaded, quantized or loaded."""

from __future__ import annotations

from pathlib import Path

from fewbits.errors import FewbitsError
from fewbits.memory.engines import Engine
from fewbits.memory.engines import engine as engine_named
from fewbits.memory.estimate import Estimator, Setting, checked_kv
from fewbits.memory.hardware import GPU, Hardware, detect, named, parse_memory
from fewbits.memory.report import DeviceMemory, LayerRow, Lever, MemoryReport, Parts, UsedFact
from fewbits.memory.shape import LayerCache, ModelShape
from fewbits.memory.source import Described, describe
from fewbits.memory.weights import load

__all__ = [
    "GPU",
    "Described",
    "DeviceMemory",
    "Hardware",
    "LayerCache",
    "LayerRow",
    "Lever",
    "MemoryReport",
    "ModelShape",
    "describe",
    "detect",
    "memory",
    "named",
    "parse_memory",
]


def memory(
    source: str | Path | Described,
    *,
    target: str | None = None,
    context: int | None = None,
    batch: int = 1,
    kv: str = "f16",
    engine: str = "llama.cpp",
    layers_on_gpu: int | None = None,
    hardware: Hardware | None = None,
) -> MemoryReport:
    """How much memory a model takes in an engine, from headers or config.json alone.

    Args:
        source: a GGUF file, a model directory, a config.json, a directory with only that, or a hub id; or what
            `describe` made of one of them.
        target: what it would be quantized to (`Q4_K_M`, `gptq:w4g128`); None: as it is.
        context: tokens of each sequence; None: the engine's default, which mostly is the model's whole context.
        batch: sequences side by side, each with a context of its own.
        kv: type of the KV cache: `f16`, `q8_0`, `q4_0`, `fp8`, ... as the engine has it.
        engine: `llama.cpp`, `ollama`, `vllm`, `transformers`, `exllamav2` or `onnxruntime`.
        layers_on_gpu: layers to offload, counted as llama.cpp's `-ngl` does; None: all, or none without a GPU.
        hardware: the machine (`detect()`, `named("RTX 4090")`); None: no verdict, and a GPU large enough.

    Returns:
        Bytes for each part, device and layer; whether it fits, and what to change if not.

    Raises:
        FewbitsError: nothing there, an unknown engine, target or type of cache, or numbers that cannot be.
    """
    _positive("context", context)
    _positive("batch", batch)
    found = engine_named(engine)
    described = source if isinstance(source, Described) else describe(source)
    shape = described.shape(llama_cpp=found.rule == "llama.cpp")
    loaded = load(described, found, shape, target)
    estimator = Estimator(shape, found, loaded, hardware)
    setting = _setting(estimator, context, batch, checked_kv(found, kv), layers_on_gpu)
    return _report(estimator, setting, described.name)


def _positive(name: str, value: int | None) -> None:
    if value is not None and not 1 <= value <= 2**31:
        raise FewbitsError(f"The {name} is {value}, which it cannot be.")


def _setting(estimator: Estimator, context: int | None, batch: int, kv: str, layers_on_gpu: int | None) -> Setting:
    hardware, most = estimator.hardware, estimator.n_layers
    if layers_on_gpu is None:
        layers_on_gpu = 0 if hardware is not None and not hardware.gpus else most
    elif layers_on_gpu < 0:
        raise FewbitsError(f"The number of layers on the GPU is {layers_on_gpu}.", f"Choose 0 to {most}.")
    layers_on_gpu = min(layers_on_gpu, most)
    if 0 < layers_on_gpu < most and not estimator.engine.partial:
        raise FewbitsError(
            f"{estimator.engine.name} holds a model on the GPU as a whole.", "Leave out --layers-on-gpu."
        )
    if context is None:
        context = _default_context(estimator.engine, estimator.shape, hardware)
    return Setting(context, batch, kv, layers_on_gpu)


def _default_context(engine: Engine, shape: ModelShape, hardware: Hardware | None) -> int:
    own = shape.context_length or 4096
    vram = hardware.vram if hardware is not None else 0
    return min(next((tokens for least, tokens in engine.contexts if vram >= least), own), own)


def _report(estimator: Estimator, setting: Setting, source: str) -> MemoryReport:
    shape, engine, loaded = estimator.shape, estimator.engine, estimator.loaded
    devices = estimator.devices(setting)
    uses = estimator.cache(setting)
    totals = {name: sum(getattr(device, name) for device in devices) for name in Parts.model_fields}
    known = estimator.hardware is not None
    fits = estimator.fits(setting)
    rows = [
        LayerRow(
            layer=index,
            kind=use.kind,
            cells=use.cells,
            window=layer.window,
            kv_bytes=use.nbytes,
            state_bytes=use.state_bytes,
        )
        for index, (layer, use) in enumerate(zip(shape.layers, uses, strict=True))
    ]
    return MemoryReport(
        source=source,
        architecture=shape.architecture,
        engine=engine.name,
        target=loaded.target,
        context=setting.context,
        batch=setting.batch,
        kv=setting.kv,
        certain=shape.certain and loaded.certain,
        **totals,
        total=sum(totals.values()),
        devices=devices,
        layers=rows,
        n_layers=estimator.n_layers,
        layers_on_gpu=setting.layers_on_gpu,
        fits=fits,
        layers_that_fit=estimator.layers_that_fit(setting) if known else None,
        max_context=estimator.longest(setting) if known else None,
        tokens_that_fit=estimator.tokens(setting),
        levers=estimator.levers(setting) if fits is False else [],
        notes=_notes(estimator, setting),
        facts=[UsedFact(what=fact.what, date=fact.date, source=fact.source) for fact in engine.facts],
    )


def _notes(estimator: Estimator, setting: Setting) -> list[str]:
    shape, engine, loaded = estimator.shape, estimator.engine, estimator.loaded
    notes = [*shape.notes, *loaded.notes]
    if shape.context_length and setting.context > shape.context_length:
        notes.append(f"the model was made for {shape.context_length} tokens, not {setting.context}")
    least, most = engine.runtime_range
    if setting.layers_on_gpu and most > least:
        notes.append(f"runtime differs from card to card: {least // 2**20} to {most // 2**20} MiB have been measured")
    spare = shape.stored_layers - len(shape.layers)
    if spare:
        notes.append(f"{spare} layers for multi-token prediction are not loaded")
    if engine.rule == "llama.cpp":
        notes += _notes_on_llama_cpp(estimator, setting)
    if engine.share is not None:
        notes.append(
            f"{engine.name} claims {engine.share:.0%} of the GPU at once and fills what is left with KV cache: a tool "
            "that shows memory shows that share, whatever the model needs"
        )
    return notes


def _notes_on_llama_cpp(estimator: Estimator, setting: Setting) -> list[str]:
    shape, hardware = estimator.shape, estimator.hardware
    notes = []
    bare = estimator.engine.name == "llama.cpp"
    if setting.layers_on_gpu and bare:
        spare = (min(estimator.engine.step or 0, setting.context) - setting.batch) * shape.vocabulary * 4
        notes.append(
            f"llama-server of 2026 takes up to {max(spare, 0) // 2**20} MiB less: it keeps no logits of prompts"
        )
    if shape.windows and bare:
        notes.append(
            "programs that leave swa_full on, as llama-cpp-python does, keep whole caches in sliding layers, too"
        )
    if not setting.layers_on_gpu and hardware is not None:
        again = sum(weight.nbytes for weight in estimator.loaded.weights if weight.repacked(hardware.simd))
        if again:
            notes.append(
                f"llama.cpp rearranges {again // 2**20} MiB of weights for this processor and prints them twice, as "
                "CPU_Mapped and CPU_REPACK; the mapped ones are read once and given up when memory runs short"
            )
    if any(layer.kind in ("recurrent", "parallel") for layer in shape.layers) and setting.batch == 1:
        notes.append("llama-server keeps recurrent states for 4 sequences unless told otherwise: --batch 4")
    return notes
