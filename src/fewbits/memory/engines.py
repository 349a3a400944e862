"""What is known of the engines: defaults, cache layouts, and what they need beside weights and cache. Dated data.

Each fact names where it was read or measured. Defaults change from release to release: what is older than a year
deserves a look.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fewbits.errors import FewbitsError
from fewbits.memory.cache import CacheRule

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Fact:
    """One thing known of an engine, when it was read, and where."""

    what: str
    date: str
    source: str


@dataclass(frozen=True)
class Engine:
    """What decides how much memory an engine takes.

    Attributes:
        formats: what it loads: `gguf` files, model `directory`.
        cache: how it lays out its cache.
        cache_types: what `--kv` can be, the default first.
        contexts: (least VRAM in bytes, default context) in falling order; empty: the model's own context.
        step: tokens of a prompt that are computed at once; None: all of them.
        every_output: whether logits are computed for every token of a step, not the last alone.
        activation_bytes: of an activation.
        logit_copies: copies of the logits that sampling makes.
        sampled: sequences whose logits a step holds at most.
        runtime: bytes that libraries and the driver take on a GPU, and how far they are from that (least, most).
        margin: bytes on a GPU that the engine leaves free, or that should be.
        host_margin: bytes of RAM for everything else on the machine.
        share: part of a GPU's memory that the engine claims, whatever it needs; None: what it needs.
        partial: whether some layers can stay in RAM.
    """

    name: str
    formats: tuple[Literal["gguf", "directory"], ...]
    cache: CacheRule
    cache_types: tuple[str, ...]
    facts: tuple[Fact, ...]
    contexts: tuple[tuple[int, int], ...] = ()
    step: int | None = None
    every_output: bool = False
    activation_bytes: int = 2
    logit_copies: int = 1
    sampled: int = 1
    runtime: int = 0
    runtime_range: tuple[int, int] = (0, 0)
    margin: int = 0
    host_margin: int = 2 * GIB
    share: float | None = None
    partial: bool = False
    rule: Literal["llama.cpp", "torch"] = field(default="torch")


_LLAMA_CACHE = CacheRule(pad=256, step=512, window_pad=256)
_CUDA = Fact(
    "a CUDA context takes 107 MiB (RTX 4060 Ti) to 555 MiB (RTX PRO 6000); 451 MiB unaccounted for on an RTX 4090",
    "2026-08",
    "llama.cpp #23604, #20595, #15860",
)
_HOST = Fact("2 GiB of RAM are left to the rest of the machine", "2026-10", "our choice")

ENGINES: dict[str, Engine] = {
    "llama.cpp": Engine(
        name="llama.cpp",
        formats=("gguf",),
        cache=_LLAMA_CACHE,
        cache_types=("f16", "f32", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"),
        contexts=(),
        step=512,
        every_output=True,
        activation_bytes=4,
        runtime=450 * MIB,
        runtime_range=(107 * MIB, 555 * MIB),
        margin=1024 * MIB,
        partial=True,
        rule="llama.cpp",
        facts=(
            Fact("contexts and windows are padded to 256 cells", "2026-10", "llama.cpp src/llama-context.cpp, #17037"),
            Fact("steps of 512 tokens (--ubatch-size)", "2026-10", "llama.cpp common/common.h"),
            Fact(
                "logits of every token of a step are reserved; llama-server reserves those of the last ones only",
                "2026-10",
                "llama.cpp src/llama-context.cpp (n_outputs_max), tools/server/server-context.cpp",
            ),
            Fact("1024 MiB of each GPU are left free (--fit-target)", "2026-10", "llama.cpp common/common.h"),
            _CUDA,
            _HOST,
        ),
    ),
    "ollama": Engine(
        name="ollama",
        formats=("gguf",),
        cache=_LLAMA_CACHE,
        cache_types=("f16", "q8_0", "q4_0"),
        contexts=((48 * GIB, 262144), (24 * GIB, 32768), (0, 4096)),
        step=512,
        every_output=True,
        activation_bytes=4,
        runtime=450 * MIB,
        runtime_range=(107 * MIB, 555 * MIB),
        margin=457 * MIB,
        partial=True,
        rule="llama.cpp",
        facts=(
            Fact(
                "a context of 4k below 24 GiB of VRAM, 32k below 48 GiB, 256k above",
                "2026-06",
                "ollama docs/context-length.mdx",
            ),
            Fact("457 MiB of each GPU are kept free", "2025-06", "ollama discover/gpu.go (cudaMinimumMemory)"),
            _CUDA,
            _HOST,
        ),
    ),
    "vllm": Engine(
        name="vllm",
        formats=("directory",),
        cache=CacheRule(pad=16, step=8192, window_pad=16, state_bytes=2),
        cache_types=("f16", "bf16", "fp8"),
        step=8192,
        logit_copies=3,
        sampled=256,
        activation_bytes=2,
        runtime=int(1.79 * GIB),
        runtime_range=(GIB // 2, 2 * GIB),
        share=0.92,
        facts=(
            Fact("claims 92 % of a GPU (--gpu-memory-utilization)", "2026-09", "vllm config/cache.py"),
            Fact("blocks of 16 tokens", "2026-09", "vllm config/cache.py"),
            Fact(
                "1.79 GiB outside of torch, 1.26 GiB of activations for Llama-3-8B on an H100", "2024-11", "vllm #10511"
            ),
        ),
    ),
    "transformers": Engine(
        name="transformers",
        formats=("directory",),
        cache=CacheRule(expands=True, state_bytes=2),
        cache_types=("f16", "bf16", "f32"),
        runtime=500 * MIB,
        runtime_range=(300 * MIB, 800 * MIB),
        margin=512 * MIB,
        partial=True,
        facts=(
            Fact(
                "torch's CUDA context takes about 300 MiB, its libraries more",
                "2026-08",
                "llama.cpp #23604 and our choice",
            ),
            Fact(
                "a prompt is computed in one go; latent caches are kept decompressed; windows are honoured",
                "2026-10",
                "transformers 5.23: generation/utils.py, cache_utils.py, models/deepseek_v3",
            ),
        ),
    ),
    "exllamav2": Engine(
        name="exllamav2",
        formats=("directory",),
        cache=CacheRule(pad=256, windows=False),
        cache_types=("f16", "q8", "q6", "q4", "fp8"),
        step=2048,
        runtime=700 * MIB,
        runtime_range=(512 * MIB, 1536 * MIB),
        margin=256 * MIB,
        facts=(
            Fact(
                "the cache of the whole context is made beforehand, windows are not used",
                "2025-08",
                "exllamav2 cache.py",
            ),
            Fact("0.5 to 1.5 GiB beside weights and cache", "2026-08", "exllamav3 #50, exllamav2 #3"),
        ),
    ),
    "onnxruntime": Engine(
        name="onnxruntime",
        formats=("directory",),
        cache=CacheRule(windows=False),
        cache_types=("f16", "f32"),
        runtime=600 * MIB,
        runtime_range=(300 * MIB, 1024 * MIB),
        margin=512 * MIB,
        facts=(
            Fact("past and present share one buffer of the whole context", "2026-08", "onnxruntime-genai genai_config"),
            Fact("300 to 1024 MiB of libraries and arena", "2026-10", "our estimate"),
        ),
    ),
}
"""By name as `--engine` takes it."""


def engine(name: str) -> Engine:
    """The engine of this name.

    Raises:
        FewbitsError: unknown; the message lists the known ones.
    """
    if name.lower() not in ENGINES:
        raise FewbitsError(f"Unknown engine {name!r}.", f"Known: {', '.join(ENGINES)}.")
    return ENGINES[name.lower()]


REPACKED: dict[str, tuple[str, ...]] = {
    "avx2": ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4"),
    "avx512f": ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4", "Q2_K"),
    "neon": ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4", "Q8_0"),
}
"""Types that llama.cpp rearranges for the CPU when it loads them, if a matrix has a multiple of 8 rows
(ggml-cpu/repack.cpp, 2026-10). Their bytes in the mapped file are read once and never touched again."""
