"""Troubleshooting: a model is slow, talks nonsense, or runs out of memory. Which cause is it likely to be?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from fewbits.advise.candidates import AS_IT_IS, Case
from fewbits.advise.engines import EngineChoice
from fewbits.advise.scenarios import MEMORY_LEVERS, SPEED_LEVERS
from fewbits.advise.schema import Advice, Finding, LeverRow, Option, Step
from fewbits.advise.situation import Situation
from fewbits.advise.steps import shown
from fewbits.checkpoint import GGUFCheckpoint
from fewbits.errors import FewbitsError
from fewbits.memory import Described, MemoryReport, memory

CONTEXT = 8192
ENGINE_CONTEXT = {"ollama": 4096, "lm-studio": 4096}
"""Tokens that an engine keeps unless told otherwise (Ollama below 24 GB of VRAM, 2026-06)."""
FEW_BITS, VERY_FEW_BITS = 3.5, 2.8
"""Bits per weight of a file below which nonsense is possible, and likely for models under `SMALL` weights."""
SMALL = 4e9
SLOW_ON_CPU = ("IQ1", "IQ2", "IQ3")
"""Types that are looked up in codebooks: on a CPU several times slower than K types of the same size."""
SLOW_SPEED = 10.0
"""Tokens a second that feel slow."""
CPU_BANDWIDTH = (40e9, 90e9)
"""Bytes a second of two channels of DDR4-2666 to DDR5-5600."""
ORDER = {"likely": 0, "possible": 1, "unlikely": 2}


@dataclass(frozen=True)
class Patient:
    """A model that makes trouble, if one was named, and where it runs."""

    described: Described | None
    situation: Situation
    choice: EngineChoice
    context: int

    @property
    def name(self) -> str:
        return self.described.name if self.described else "the model"

    @cached_property
    def metadata(self) -> dict[str, Any] | None:
        """Of a GGUF file."""
        checkpoint = self.described.checkpoint if self.described else None
        return checkpoint.metadata if isinstance(checkpoint, GGUFCheckpoint) else None

    @cached_property
    def types(self) -> Counter[str]:
        """Bytes by storage type."""
        found: Counter[str] = Counter()
        checkpoint = self.described.checkpoint if self.described else None
        for info in checkpoint.tensors.values() if checkpoint else ():
            found[info.dtype] += info.nbytes
        return found

    @cached_property
    def n_weights(self) -> int:
        checkpoint = self.described.checkpoint if self.described else None
        return sum(prod(info.shape) for info in checkpoint.tensors.values()) if checkpoint else 0

    @property
    def bits(self) -> float | None:
        """Bits per weight of a GGUF file."""
        if self.metadata is None:
            return None
        return 8 * sum(self.types.values()) / max(self.n_weights, 1)

    @cached_property
    def report(self) -> MemoryReport | None:
        """What it needs, as it is."""
        if self.described is None:
            return None
        try:
            return memory(
                self.described,
                context=self.context,
                engine=self.choice.memory,
                hardware=self.situation.hardware,
            )
        except FewbitsError:
            return None

    @cached_property
    def option(self) -> Option | None:
        if self.report is None or self.described is None:
            return None
        return Case(self.described, self.choice, self.situation, self.context).option(AS_IT_IS)


Check = Callable[[Patient], Finding]


def _finding(cause: str, verdict: Any, evidence: str, remedy: str) -> Finding:
    return Finding(cause=cause, verdict=verdict, evidence=evidence, remedy=remedy)


def _does_not_fit(patient: Patient) -> Finding:
    cause = "the model does not fit into the fast memory"
    remedy = "take a smaller level, a shorter context or a KV cache in q8_0, so that all layers are on the GPU"
    report, option = patient.report, patient.option
    if report is None or option is None:
        return _finding(cause, "possible", "no file was named that this engine loads", remedy)
    gpu, host = report.device("GPU"), report.device("host")
    if gpu is not None and not gpu.fits:
        told = f"needs {gpu.needed / 2**30:.1f} GiB of the GPU's {(gpu.available or 0) / 2**30:.1f}"
        layers = f"; {report.layers_that_fit} of {report.n_layers} layers fit" if report.layers_that_fit else ""
        return _finding(cause, "likely", f"{told} at a context of {patient.context}{layers}", remedy)
    if host is not None and not host.fits:
        told = f"needs {host.needed / 2**30:.1f} GiB of {(host.available or 0) / 2**30:.1f} GiB of RAM, and swaps"
        return _finding(cause, "likely", told, "take a smaller level or a smaller model")
    return _finding(cause, "unlikely", f"it fits, up to a context of {report.max_context} tokens", "")


def _not_offloaded(patient: Patient) -> Finding:
    cause = "the layers are not on the GPU"
    if not patient.situation.hardware.gpus:
        evidence = "no GPU was found: the processor does all the work"
        remedy = "if there is a GPU, install its driver and a llama.cpp built for it; else take a smaller model"
        return _finding(cause, "likely", evidence, remedy)
    remedy = "llama.cpp: pass -ngl 99 and look for `offloaded N/N layers` in its log; Ollama: `ollama ps` says 100% GPU"
    return _finding(cause, "possible", f"{patient.situation.phrase} is there; whether it is used, the log says", remedy)


def _slow_types(patient: Patient) -> Finding:
    cause = "its types are slow on a processor"
    remedy = "take Q4_K_M or Q4_0, or IQ4_XS; types by budget: fewbits quantize MODEL gguf --types Q4_K,Q5_K,Q6_K"
    share = sum(n for name, n in patient.types.items() if name.startswith(SLOW_ON_CPU)) / max(patient.types.total(), 1)
    partly = patient.option is not None and patient.option.fits == "partly"
    if not patient.types:
        return _finding(cause, "possible", "no file was named", remedy)
    if share > 0.2 and (not patient.situation.hardware.gpus or partly):
        return _finding(cause, "likely", f"{share:.0%} of its bytes are codebook types (IQ1 to IQ3)", remedy)
    return _finding(cause, "unlikely", f"{share:.0%} of its bytes are codebook types", "")


def _too_large(patient: Patient) -> Finding:
    cause = "every token reads all of its weights, and that is what the memory gives"
    remedy = "fewer bits or a smaller model; a mixture of experts reads only a part; or speculative decoding"
    option = patient.option
    if option is None or option.file_bytes is None:
        return _finding(cause, "possible", "no file was named", remedy)
    if option.tokens_per_second_at_most:
        least = most = option.tokens_per_second_at_most
    elif patient.situation.hardware.gpus and option.fits == "whole":
        return _finding(cause, "possible", "the bandwidth of this GPU is not known", remedy)
    else:
        least, most = (speed / option.file_bytes for speed in CPU_BANDWIDTH)
    told = f"{least:.0f}" if least == most else f"{least:.0f} to {most:.0f}"
    verdict = "likely" if most < 2 * SLOW_SPEED else "unlikely"
    return _finding(cause, verdict, f"at most {told} tokens a second; engines reach about half", remedy)


def _too_few_bits(patient: Patient) -> Finding:
    cause = "too few bits"
    remedy = "take Q4_K_M, or make the file again with --calibration TEXT; `fewbits measure` says what was lost"
    bits = patient.bits
    if bits is None:
        return _finding(cause, "possible", "no GGUF file was named", remedy)
    small = patient.n_weights < SMALL
    told = f"{bits:.2f} bits per weight, {patient.n_weights / 1e9:.1f}B weights"
    if bits < VERY_FEW_BITS or (bits < FEW_BITS and small):
        return _finding(cause, "likely", told, remedy)
    return _finding(cause, "possible" if bits < FEW_BITS else "unlikely", told, remedy if bits < FEW_BITS else "")


def _no_calibration(patient: Patient) -> Finding:
    cause = "quantized to few bits without a calibration text"
    remedy = "make it again with --calibration TEXT, from the original model"
    if patient.metadata is None or patient.bits is None:
        return _finding(cause, "possible", "no GGUF file was named", remedy)
    known = [key for key in patient.metadata if key.startswith(("quantize.imatrix.", "fewbits.calibration"))]
    if known:
        return _finding(cause, "unlikely", "the file tells of an importance matrix", "")
    few = patient.bits < FEW_BITS
    evidence = f"the file tells of none, at {patient.bits:.2f} bits per weight"
    return _finding(cause, "likely" if few else "unlikely", evidence, remedy if few else "")


def _template(patient: Patient) -> Finding:
    cause = "wrong or missing chat template"
    remedy = "chat through the model's own template (fewbits run --chat, llama-server --jinja); for Ollama: " + (
        f"fewbits export ollama {patient.name}" if patient.metadata is not None else "fewbits export ollama FILE"
    )
    if patient.metadata is None:
        return _finding(cause, "possible", "no GGUF file was named", remedy)
    if not patient.metadata.get("tokenizer.chat_template"):
        evidence = (
            "the file has no chat template: a base model, which continues texts and does not answer, or a lost one"
        )
        return _finding(cause, "likely", evidence, "take the instruct model, or name the template in the engine")
    return _finding(cause, "possible", "the file has a template; whether the engine uses it, its log says", remedy)


def _tokenizer(patient: Patient) -> Finding:
    cause = "text is cut into tokens differently than in training"
    remedy = "convert the original model again: fewbits quantize MODEL Q8_0, with --pre-tokenizer if it asks for it"
    if patient.metadata is None:
        return _finding(cause, "possible", "no GGUF file was named", remedy)
    kind = patient.metadata.get("tokenizer.ggml.model")
    pre = patient.metadata.get("tokenizer.ggml.pre")
    if kind is None:
        return _finding(cause, "likely", "the file has no tokenizer", remedy)
    if kind == "gpt2" and pre in (None, "default"):
        return _finding(cause, "likely", "the file names no pre-tokenizer, as those before 2024-05", remedy)
    return _finding(cause, "unlikely", f"the file names its pre-tokenizer ({pre or kind})", "")


def _short_context(patient: Patient) -> Finding:
    cause = "the conversation is longer than the context: its beginning is forgotten"
    remedy = "llama.cpp: -c 8192; Ollama: PARAMETER num_ctx 8192 (fewbits export ollama writes it)"
    own = 0
    if patient.described is not None:
        own = patient.described.shape(llama_cpp=True).context_length
    default = ENGINE_CONTEXT.get(patient.choice.name)
    if default and (own == 0 or default < own):
        told = f"{patient.choice.name} keeps {default} tokens unless told otherwise"
        return _finding(cause, "possible", told + (f"; the model has {own}" if own else ""), remedy)
    if own and own < patient.context:
        return _finding(cause, "likely", f"the model was made for {own} tokens", "keep conversations shorter")
    return _finding(cause, "possible", f"the model has {own} tokens" if own else "no file was named", remedy)


def _out_of_memory(patient: Patient) -> Finding:
    found = _does_not_fit(patient)
    return found.model_copy(update={"cause": "the model and its context are larger than the memory"})


def _long_context(patient: Patient) -> Finding:
    cause = "the KV cache of a long context"
    remedy = "say how long: llama.cpp -c 8192, vLLM --max-model-len 8192; or a cache in q8_0 (fp8 in vLLM)"
    if patient.described is None or patient.report is None:
        return _finding(
            cause, "possible", "no file was named; engines take the model's whole context by themselves", remedy
        )
    own = patient.described.shape(llama_cpp=True).context_length
    per_token = patient.report.kv_cache / max(patient.report.context, 1)
    whole = own * per_token
    evidence = (
        f"at {patient.context} tokens it takes {patient.report.kv_cache / 2**30:.1f} GiB, at the model's own {own} up "
        f"to {whole / 2**30:.1f} GiB"
    )
    most = patient.report.max_context or 0
    return _finding(cause, "likely" if most < own else "unlikely", f"{evidence}; {most} tokens fit", remedy)


def _others(patient: Patient) -> Finding:
    cause = "something else holds the memory"
    remedy = "nvidia-smi (or Task Manager, Activity Monitor) shows who; a browser and a desktop take up to 1 GB"
    return _finding(cause, "possible", "cannot be seen from here", remedy)


PROBLEMS: dict[str, tuple[str, tuple[Check, ...]]] = {
    "slow": ("slow", (_does_not_fit, _not_offloaded, _too_large, _slow_types)),
    "nonsense": ("talking nonsense", (_too_few_bits, _no_calibration, _template, _tokenizer, _short_context)),
    "out-of-memory": ("out of memory", (_out_of_memory, _long_context, _others)),
}
"""By name as `--problem` takes it: what it is, and the causes to look for (field guide, troubleshooting)."""


def diagnose(
    models: Sequence[Described], situation: Situation, choice: EngineChoice, context: int | None, problem: str
) -> Advice:
    """Look for the cause of a problem.

    Args:
        models: at most one.

    Raises:
        FewbitsError: an unknown problem, or several models.
    """
    if problem not in PROBLEMS:
        raise FewbitsError(f"Unknown problem {problem!r}.", f"Known: {', '.join(PROBLEMS)}.")
    if len(models) > 1:
        raise FewbitsError("A problem is looked for in one model.", "Name one.")
    described = models[0] if models else None
    patient = Patient(described, situation, choice, context or CONTEXT)
    title, checks = PROBLEMS[problem]
    findings = sorted((check(patient) for check in checks), key=lambda found: ORDER[found.verdict])
    likely = [found for found in findings if found.verdict == "likely"]
    possible = [found.cause for found in findings if found.verdict == "possible"]
    if likely:
        told = f"{patient.name} is {title}: most likely {likely[0].cause} ({likely[0].evidence})."
    else:
        told = f"{patient.name} is {title}: nothing that can be seen here is the cause; look at: {'; '.join(possible)}."
    option = patient.option
    return Advice(
        sentence=told[0].upper() + told[1:] if described is None else told,
        machine=situation.machine(),
        engine=choice.name,
        use=situation.use,
        problem=problem,
        context=patient.context,
        scenario=None,
        options=[option] if option is not None else [],
        why=[],
        levers=_levers(patient, problem),
        not_yet=[],
        findings=findings,
        steps=_steps(patient, problem),
        notes=[],
    )


def _levers(patient: Patient, problem: str) -> list[LeverRow]:
    if problem == "slow":
        return [
            LeverRow(kind="speed", name=lever.name, change=lever.change, effect=lever.effect)
            for lever in SPEED_LEVERS
            if not lever.engines or patient.choice.name in lever.engines
        ]
    if problem == "nonsense" or patient.report is None:
        return []
    levers = sorted(patient.report.levers, key=lambda lever: MEMORY_LEVERS.index(lever.name))
    return [
        LeverRow(
            kind="memory",
            name=lever.name,
            change=lever.change,
            effect=f"{lever.gpu / 2**30:.1f} GiB of VRAM, {lever.host / 2**30:.1f} GiB of RAM",
        )
        for lever in levers
    ]


def _steps(patient: Patient, problem: str) -> list[Step]:
    name = shown(patient.name) if patient.described else "model.gguf"
    if problem == "nonsense":
        return [
            Step(command=f'fewbits run {name} "What is the capital of France?" --chat', what="ask it something easy"),
            Step(
                command=f"fewbits measure {name} --reference ./MODEL --text wiki.test.raw --chunks 24",
                what="measure what it lost against the original",
            ),
        ]
    look = f"fewbits memory {name} --context {patient.context} --engine {patient.choice.memory}"
    return [
        Step(command=look, what="see what it needs, and what to change"),
        Step(command=f"fewbits advise {name} --engine {patient.choice.name}", what="or what to take instead"),
    ]
