"""Which targets to try for which engine, and how its memory is predicted. Dated data."""

from __future__ import annotations

from dataclasses import dataclass

from fewbits.errors import FewbitsError
from fewbits.layouts import LAYOUTS
from fewbits.layouts.engines import engines_of
from fewbits.plan import PRESETS

GGUF_LADDER = (
    *("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS"),
    *("Q3_K_M", "IQ3_M", "IQ3_XXS", "Q2_K", "IQ2_S"),
)
"""From the least loss to the most."""


@dataclass(frozen=True)
class EngineChoice:
    """An engine that a user can ask about.

    Attributes:
        memory: the engine of `fewbits.memory` whose rules it follows.
        ladder: targets it runs, from the least loss to the most.
        date: when that was read or seen.
        note: what must be known of it.
    """

    name: str
    memory: str
    ladder: tuple[str, ...]
    date: str
    note: str = ""

    @property
    def gguf(self) -> bool:
        """Whether it runs GGUF files."""
        return self.ladder == GGUF_LADDER


_SERVED = ("ct:fp8", "ct:w8a8", "gptq:w8g128", "awq:w4g128", "ct:w4a16g128", "gptq:w4g128")

ENGINES: dict[str, EngineChoice] = {
    choice.name: choice
    for choice in (
        EngineChoice("llama.cpp", "llama.cpp", GGUF_LADDER, "2026-11"),
        EngineChoice("ollama", "ollama", GGUF_LADDER, "2026-11"),
        EngineChoice("lm-studio", "llama.cpp", GGUF_LADDER, "2026-11", "LM Studio runs llama.cpp inside."),
        EngineChoice("vllm", "vllm", _SERVED, "2026-11"),
        EngineChoice("tgi", "vllm", _SERVED, "2026-11", "TGI's memory is predicted by vLLM's rules."),
        EngineChoice(
            "transformers",
            "transformers",
            ("bnb:int8", "bnb:nf4", "gptq:w4g128", "awq:w4g128", "gptq:w3g128", "gptq:w2g64"),
            "2026-11",
        ),
        EngineChoice(
            "exllamav2",
            "exllamav2",
            ("exl2:6.0bpw", "exl2:5.0bpw", "exl2:4.5bpw", "exl2:4.0bpw", "gptq:w4g128", "exl2:3.0bpw"),
            "2026-08",
            "ExLlamaV2 also loads 4-bit GPTQ.",
        ),
        EngineChoice(
            "exllamav3",
            "exllamav2",
            ("exl3:6.0bpw", "exl3:5.0bpw", "exl3:4.0bpw", "exl3:3.0bpw", "exl3:2.0bpw"),
            "2026-08",
            "Its memory is predicted by ExLlamaV2's rules.",
        ),
        EngineChoice("onnxruntime", "onnxruntime", ("onnx:int8", "onnx:int4"), "2026-08"),
        EngineChoice(
            "bitnet.cpp",
            "llama.cpp",
            ("bitnet:i2_s",),
            "2026-08",
            "BitNet is for models that were trained with three levels; others come out as noise.",
        ),
        EngineChoice("hqq", "transformers", ("hqq:w4g64", "hqq:w3g64", "hqq:w2g16"), "2026-11"),
    )
}
"""By name as `--engine` takes it."""

NAMES = {"lmstudio": "lm-studio", "llamacpp": "llama.cpp", "llama-cpp": "llama.cpp", "bitnet": "bitnet.cpp"}

NOMINAL = {"bitnet:i2_s": 2.0}
"""Bits per weight of targets that have no layout here."""

LEAST_ARCH = {"ct:fp8": 8.9, "ct:w8a8": 7.5}
"""NVIDIA's compute capability from which the GPU multiplies these numbers itself (layouts/engines.py, 2026-11)."""

NEAREST = {
    "exl2": ("gptq:w4g128", "ExLlamaV2 loads 4-bit GPTQ, too"),
    "exl3": ("Q4_K_M", "GGUF runs in llama.cpp on the same GPU; `gguf --bpw` makes any size"),
    "bitnet": ("Q4_K_M", "for a model that was not trained with three levels; for one that was, TQ2_0 in llama.cpp"),
    "quip#": ("IQ2_S", "2 bits in llama.cpp, with calibration"),
}
"""By family, of what fewbits may not make: what does the same job, and why."""


def engine_choice(name: str) -> EngineChoice:
    """The engine of this name.

    Raises:
        FewbitsError: unknown; the message lists the known ones.
    """
    wanted = name.strip().lower()
    wanted = NAMES.get(wanted, wanted)
    if wanted not in ENGINES:
        raise FewbitsError(f"Unknown engine {name!r}.", f"Known: {', '.join(ENGINES)}.")
    return ENGINES[wanted]


def can_make(target: str) -> bool:
    """Whether fewbits makes a target today."""
    family, colon, spec = target.partition(":")
    if not colon or family not in LAYOUTS:
        return target in PRESETS
    try:
        return LAYOUTS[family].mixed(spec) or bool(LAYOUTS[family].from_spec(spec))
    except FewbitsError:
        return False


def nearest(target: str) -> tuple[str, str] | None:
    """What does the job of a target that cannot be made, and why; None for one that can."""
    return None if can_make(target) else NEAREST.get(target.partition(":")[0], ("Q4_K_M", "in llama.cpp"))


def nominal_bits(target: str) -> float | None:
    """Bits per weight by the target's name, where there is nothing better."""
    if target in NOMINAL:
        return NOMINAL[target]
    spec = target.partition(":")[2]
    return float(spec.removesuffix("bpw")) if spec.endswith("bpw") else None


def runs_in(target: str) -> list[str]:
    """Engines that are known to load a target: `(seen)` or only `(read)`."""
    found: dict[str, str] = {}
    for fact in engines_of(target):
        engine = fact.engine.split(" (")[0]
        if fact.verdict != "refuses":
            found[engine] = "seen" if fact.verdict == "runs" or found.get(engine) == "seen" else "read"
    return [f"{engine} ({how})" for engine, how in found.items()]
