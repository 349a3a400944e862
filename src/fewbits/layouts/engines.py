"""Which engine runs which target on which hardware: data with dates, as seen or as read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["runs", "refuses", "should run"]


@dataclass(frozen=True)
class EngineFact:
    """What one engine does with some targets.

    Attributes:
        targets: regular expression that matches whole target names.
        hardware: where.
        verdict: `runs` and `refuses` were seen; `should run` was read in its sources.
        date: of the observation.
        note: the reason, or what must be known.
    """

    engine: str
    hardware: str
    targets: str
    verdict: Verdict
    date: str
    note: str = ""


TRANSFORMERS, GPTQMODEL, VLLM = "transformers 5.23", "transformers 5.23 + gptqmodel 7.7", "vLLM 0.32"
BITSANDBYTES, CT = "transformers 5.23 + bitsandbytes 0.50", "transformers 5.23 + compressed-tensors 0.20"
_GGUF = r"[^:]+"

ENGINE_FACTS = (
    EngineFact("llama.cpp b7000+ (llama-cpp-python 0.3.36)", "CPU", _GGUF, "runs", "2026-11-20"),
    EngineFact("llama.cpp b7000+ (llama-cpp-python 0.3.36)", "CUDA, Metal, Vulkan", _GGUF, "should run", "2026-11-20"),
    EngineFact(GPTQMODEL, "CPU", r"gptq:w\d+g(32|64|128)", "runs", "2026-11-21"),
    EngineFact(GPTQMODEL, "CPU", r"gptq:w\d+g(32|64|128)(-asym|-actorder|-v2)+", "runs", "2026-11"),
    EngineFact(
        GPTQMODEL, "CPU", r"gptq:w\d+g-1.*", "refuses", "2026-11", "its CPU kernel takes groups of 32 to 256 only"
    ),
    EngineFact(GPTQMODEL, "CPU", r"awq:.*", "runs", "2026-11"),
    EngineFact(GPTQMODEL, "CUDA", r"(gptq:w|awq:).*", "should run", "2026-11"),
    EngineFact("gptqmodel 7.7", "CPU", r"gptq:g(32|64|128).*", "runs", "2026-11-21", "GPTQModel.load"),
    EngineFact(GPTQMODEL, "CPU, CUDA", r"gptq:g.*", "refuses", "2026-11", "gives all layers the same bits"),
    EngineFact(VLLM, "CPU", r"gptq:w4g(32|64|128|-1)(-v2)?", "runs", "2026-11-21"),
    EngineFact(VLLM, "CPU", r"gptq:w[238].*", "refuses", "2026-11", "no CPU kernel for these bits"),
    EngineFact(VLLM, "CPU, CUDA", r"gptq:.*-asym.*", "refuses", "2026-11", "zero points were dropped upstream"),
    EngineFact(VLLM, "CPU, CUDA", r"gptq:.*-actorder.*", "refuses", "2026-11", "desc_act was dropped upstream"),
    EngineFact(VLLM, "CUDA", r"gptq:w[48]g(32|64|128|-1)", "should run", "2026-11"),
    EngineFact(VLLM, "CPU", r"awq:.*", "runs", "2026-11-21"),
    EngineFact(VLLM, "CUDA", r"awq:.*", "should run", "2026-11"),
    EngineFact(VLLM, "CPU", r"ct:(w4a16.*|w8a8|fp8)", "runs", "2026-11-21"),
    EngineFact(VLLM, "CPU", r"ct:(w[238]a16.*|fp8-.*|nvfp4.*|mxfp4)", "refuses", "2026-11", "no CPU kernel"),
    EngineFact(VLLM, "CUDA", r"ct:.*", "should run", "2026-11", "FP8 from compute capability 8.9, FP4 from 10.0"),
    EngineFact(VLLM, "CUDA", r"fp8:.*", "should run", "2026-11", "from compute capability 8.9"),
    EngineFact(VLLM, "CPU, CUDA", r"(bnb|hqq):.*", "refuses", "2026-11", "not among its methods"),
    EngineFact(
        CT, "CPU", r"ct:(?!(w\d+)?a16.*-asym).*", "runs", "2026-11-21", "FP4 in bfloat16 only, NVFP4 without experts"
    ),
    EngineFact(
        CT, "CPU", r"ct:(w\d+)?a16.*-asym", "refuses", "2026-11-21", "expects zero points unpacked; 5.17 reads them"
    ),
    EngineFact(BITSANDBYTES, "CPU", r"bnb:.*", "runs", "2026-11-21"),
    EngineFact(BITSANDBYTES, "CUDA", r"bnb:.*", "should run", "2026-11"),
    EngineFact(TRANSFORMERS, "CPU", r"fp8:.*", "runs", "2026-11-21", "decoded to plain linears"),
    EngineFact(TRANSFORMERS, "CPU, CUDA", r"hqq:.*", "refuses", "2026-11", "HQQ is not available in transformers 5"),
    EngineFact(
        *("exllamav2 0.3.2", "CUDA, ROCm", r"exl2:.*", "should run", "2026-11"),
        "never run here; stands in for it: its arithmetic, simulated bit by bit",
    ),
    EngineFact("exllamav3 1.6", "CUDA", r"exl3:.*", "should run", "2026-11", "never run here"),
    EngineFact("gptqmodel 7.7", "CPU", r"exl3:.*", "runs", "2026-11-21", "BACKEND.EXL3_TORCH, plain torch"),
    EngineFact(VLLM, "CPU, CUDA", r"exl[23]:.*", "refuses", "2026-11", "not among its methods"),
    EngineFact(TRANSFORMERS, "CPU", r"bitnet(:.*)?", "runs", "2026-11-21", "torch.compile needs a C++ compiler"),
    EngineFact(VLLM, "CPU, CUDA", r"quip:.*", "refuses", "2026-11", "not among its methods"),
    EngineFact("onnxruntime-genai 0.18", "CPU", r"onnx:.*", "runs", "2026-11-21"),
    EngineFact("onnxruntime 1.31", "CPU", r"onnx:.*", "runs", "2026-11-21", "model.onnx alone"),
    EngineFact(
        *("transformers 5.23 + aqlm 1.1.7", "CPU", r"aqlm:.*", "runs", "2026-11-21"),
        "float32 and NUMBA_NUM_THREADS=1: with more threads its kernel adds up in a race",
    ),
    EngineFact("hqq 0.2.8", "CPU", r"hqq:.*", "runs", "2026-11-21", "layer by layer, see docs/checkpoints.md"),
)


def engines_of(target: str) -> list[EngineFact]:
    """What is known of a target, by name."""
    return [fact for fact in ENGINE_FACTS if re.fullmatch(fact.targets, target)]


def runs_in(target: str, engine: str) -> bool:
    """Whether an engine whose name begins so is known to run a target, or should."""
    return any(fact.engine.startswith(engine) and fact.verdict != "refuses" for fact in engines_of(target))
