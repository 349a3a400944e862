"""The commands to run next."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from fewbits.advise.candidates import AS_IT_IS, EXPERTS_IN_RAM, Case
from fewbits.advise.engines import engine_choice, nearest
from fewbits.advise.scenarios import USES
from fewbits.advise.schema import Option, Step
from fewbits.plan import PRESETS

TEXT = "calibration.txt"
PLACEHOLDER = "./MODEL"
TEXTLESS = ("bnb", "hqq", "fp8", "ct:fp8", "ct:mxfp4", "ct:nvfp4")
"""Beginnings of directory targets that usually do without a text."""
TWICE = 5.0
"""Bits per weight below which a text is worth while: KL divergence 0.208 -> 0.101 at Q4_K_M on 135M weights
(docs/benchmarks.md), 0.0313 -> 0.0282 on 8B (llama.cpp tools/perplexity/README.md)."""


def steps(case: Case | None, option: Option | None, budget: str | None) -> list[Step]:
    """What to run to get an option, with fewbits and then with the engine.

    Args:
        case: of the option; None where no model was named.
        budget: options of the target `gguf` for a file that fills the memory.
    """
    if option is None:
        return []
    if option.target == AS_IT_IS:
        return _run(option, option.model)
    target = option.target
    source, before = _source(case, option, target)
    extra = _text_option(target)
    output = _output(source, target)
    what = "make the file" if ":" not in target else "make the directory"
    found = [*before, Step(command=f"fewbits quantize {shown(source)} {target}{extra} -o {output}", what=what)]
    if not extra and ":" not in target and (PRESETS[target].bits_per_weight or 0) < TWICE:
        use = USES.get(case.situation.use or "") if case else None
        text = use.text if use else USES["edge"].text
        command = f"fewbits quantize {shown(source)} {target} --calibration {TEXT} -o {output}"
        found.append(Step(command=command, what=f"better, with {text} in {TEXT}"))
    if budget:
        filled = _output(source, "gguf")
        command = f"fewbits quantize {shown(source)} gguf {budget} --calibration {TEXT} -o {filled}"
        found.append(Step(command=command, what="or a file that fills the memory, its types chosen by measured loss"))
    return [*found, *_run(option, output, target)]


def shown(name: str) -> str:
    """A name as a shell takes it."""
    return shlex.quote(name)


def _source(case: Case | None, option: Option, target: str) -> tuple[str, list[Step]]:
    """What to quantize, and what to look at first where the weights are not there."""
    if case is None:
        return PLACEHOLDER, []
    name = case.name
    if case.described.kind == "config" and Path(name).exists():
        look = f"fewbits memory {shown(name)} --target {target} --context {option.context}"
        engine = f" --engine {engine_choice(option.engine).memory}" if ":" in target else ""
        return PLACEHOLDER, [Step(command=look + engine, what="look at the memory; then, with the weights:")]
    return name, []


def _text_option(target: str) -> str:
    """The calibration text, where the target needs one."""
    if ":" in target:
        return "" if target.startswith(TEXTLESS) else f" --calibration {TEXT}"
    return f" --calibration {TEXT}" if target in PRESETS and PRESETS[target].needs_imatrix else ""


def _output(source: str, target: str) -> str:
    path = Path(source)
    stem = (
        path.name.removesuffix(".gguf")
        if path.suffix == ".gguf"
        else path.resolve().name
        if path.exists()
        else path.name
    )
    stem = re.sub(r"[^\w.-]+", "-", stem) or "model"
    return f"{stem}-{target}.gguf" if ":" not in target else f"{stem}-{re.sub('[:]', '-', target)}"


def _run(option: Option, made: str, target: str = "") -> list[Step]:
    """How the engine takes it."""
    made = shown(made)
    directory = ":" in target
    if directory and option.engine in ("vllm", "tgi"):
        return [Step(command=f"vllm serve {made} --max-model-len {option.context}", what="serve it", foreign=True)]
    if directory:
        return [Step(command=f'fewbits run {made} "Why is the sky blue?" --chat', what="try it")]
    if option.engine == "ollama":
        create = "ollama create my-model -f Modelfile"
        return [
            Step(command=f"fewbits export ollama {made} -o Modelfile", what="write Ollama's recipe"),
            Step(command=create, what="and hand it over", foreign=True),
        ]
    found = [Step(command=f'fewbits run {made} "Why is the sky blue?" --chat', what="try it")]
    experts = option.note == EXPERTS_IN_RAM
    layers = option.layers_on_gpu if option.fits == "partly" and not experts else 99 if option.gpu_bytes else 0
    server = f"llama-server -m {made} -c {option.context}" + (f" -ngl {layers}" if layers else "")
    server += " --cpu-moe" if experts else ""
    if option.kv != "f16":
        server += f" -fa on -ctk {option.kv} -ctv {option.kv}"
    if option.engine in ("llama.cpp", "lm-studio"):
        found.append(Step(command=server, what="or serve it with llama.cpp", foreign=True))
    return found


def why_not(target: str) -> str:
    """What to take instead of a target that cannot be made, and why."""
    instead = nearest(target)
    return f"{instead[0]}: {instead[1]}" if instead else ""
