"""Which model, at which level, for which engine, on this machine: a recommendation with reasons and commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fewbits.advise.candidates import AS_IT_IS, Case
from fewbits.advise.engines import EngineChoice, can_make, engine_choice, nearest
from fewbits.advise.problems import PROBLEMS, diagnose
from fewbits.advise.rules import Verdict, choose, judge
from fewbits.advise.scenarios import OTHERS, SCENARIOS, SPEED_LEVERS, USES, Scenario
from fewbits.advise.schema import Advice, ExpectedLoss, LeverRow, NotYet, Option, ScenarioRow, Step
from fewbits.advise.situation import Situation
from fewbits.advise.sizes import SIZE_CLASSES
from fewbits.advise.steps import steps, why_not
from fewbits.advise.words import reasons, sentence
from fewbits.errors import FewbitsError
from fewbits.memory import Described, Hardware, describe, detect, memory

__all__ = ["PROBLEMS", "SCENARIOS", "USES", "Advice", "advise"]

CONTEXT = 8192
"""Tokens to predict memory for, unless said otherwise: a long conversation."""
BETTER, WORSE = 2, 3
"""Rows of the table on either side of the recommended one."""
NO_POINT = 4.9
"""Bits per weight from which choosing types by loss gains nothing (IST gptq-gguf-toolkit README, 2025-09)."""


def advise(
    models: str | Path | Described | Sequence[str | Path | Described] = (),
    hardware: Hardware | None = None,
    engine: str | None = None,
    use: str | None = None,
    context: int | None = None,
    problem: str | None = None,
) -> Advice:
    """Recommend what to run.

    Args:
        models: GGUF files, model directories, config.json's or hub ids, or what `fewbits.memory.describe` made of one;
            of several, one is chosen. Without: advice by the size of models.
        hardware: `fewbits.memory.detect()` or `named(...)`; None asks this machine.
        engine: `llama.cpp`, `ollama`, `lm-studio`, `vllm`, `tgi`, `transformers`, `exllamav2`, `exllamav3`,
            `onnxruntime`, `bitnet.cpp` or `hqq`; None: what suits the hardware and the use.
        use: `chat`, `code`, `reasoning`, `translation`, `edge`, `serving`, `finetune`, `research` or `speed`.
        context: tokens of each sequence; None: 8192, or what the model has.
        problem: `slow`, `nonsense` or `out-of-memory`: find its cause instead.

    Raises:
        FewbitsError: an unknown engine, use or problem, or a model whose headers cannot be read.
    """
    if use is not None and use not in USES:
        raise FewbitsError(f"Unknown use {use!r}.", f"Known: {', '.join(USES)}.")
    if context is not None and context < 1:
        raise FewbitsError(f"The context is {context}, which it cannot be.")
    named = engine_choice(engine) if engine else None
    situation = Situation(hardware or detect(), named.name if named else None, use)
    listed = [models] if isinstance(models, str | Path | Described) else list(models)
    described = [model if isinstance(model, Described) else describe(model) for model in listed]
    if problem is not None:
        return diagnose(described, situation, named or engine_choice("llama.cpp"), context, problem)
    scenario = scenario_of(situation, named)
    choice = named or engine_choice(scenario.engine)
    if not described:
        return _by_size(situation, choice, scenario, context)
    cases = [Case(model, choice, situation, _context(model, context), context is not None) for model in described]
    verdicts = [judge(case, scenario) for case in cases]
    best = choose(verdicts)
    options = [*_around(best), *(v.chosen for v in verdicts if v is not best and v.chosen is not None)]
    budget, filled = _filled(best)
    if filled is not None:
        options.insert(1, filled)
    return _advice(
        best,
        situation,
        options,
        steps(best.case, options[0] if best.chosen else None, budget),
        context,
        len(verdicts) > 1,
    )


def scenario_of(situation: Situation, named: EngineChoice | None) -> Scenario:
    """The first row of the table that applies, and whose targets the named engine runs."""
    for scenario in SCENARIOS:
        runs = named is None or any(pick.target in named.ladder for pick in scenario.picks)
        if runs and scenario.when.holds(situation):
            return scenario
    # an engine without rows of its own for this situation
    assert named is not None
    return next(s for s in SCENARIOS if s.engine == named.name or any(p.target in named.ladder for p in s.picks))


def _context(model: Described, context: int | None) -> int:
    own = model.shape(llama_cpp=True).context_length or CONTEXT
    return context or min(CONTEXT, own)


def _advice(
    best: Verdict,
    situation: Situation,
    options: list[Option],
    found: list[Step],
    context: int | None,
    several: bool,
) -> Advice:
    scenario, chosen = best.scenario, best.chosen
    return Advice(
        sentence=sentence(best, situation, several),
        machine=situation.machine(),
        engine=best.case.choice.name,
        use=situation.use,
        context=chosen.context if chosen else best.case.context,
        scenario=ScenarioRow(
            name=scenario.name,
            title=scenario.title,
            targets=[pick.target for pick in scenario.picks],
            reason=scenario.reason,
            source=scenario.source,
        ),
        options=options,
        why=reasons(best, situation, several, options[0] if chosen and options else None),
        levers=_levers(best),
        not_yet=_not_yet(best),
        steps=found,
        notes=_notes(best, situation, context),
    )


def _around(best: Verdict) -> list[Option]:
    """The chosen option first, then what stands beside it on the ladder."""
    case, chosen = best.case, best.chosen
    ladder = case.ladder()
    if chosen is None:
        return [case.option(target) for target in ladder[-BETTER:]]
    first = [_makeable(best).model_copy(update={"recommended": True})]
    if not chosen.can_make:
        first.append(chosen)
    names = [pick.target for pick in best.scenario.picks]
    if chosen.target in ladder:
        at = ladder.index(chosen.target)
        names += [*ladder[max(0, at - BETTER) : at], *ladder[at + 1 : at + 1 + WORSE]]
    else:
        base = chosen.target.partition(":")[0]
        names += [target for target in ladder if target.partition(":")[0] != base or "g128" not in target]
    names = [name for name in dict.fromkeys(names) if name in ladder and name not in {o.target for o in first}]
    names.sort(key=ladder.index)
    others = [case.option(name) for name in names]
    return [*first, *(option for option in others if option.target not in {o.target for o in first})]


def _makeable(best: Verdict) -> Option:
    """The chosen option, or what does its job today: mostly in llama.cpp."""
    case, chosen = best.case, best.chosen
    assert chosen is not None
    if chosen.can_make or chosen.nearest is None:
        return chosen
    if chosen.nearest not in case.choice.ladder:
        case = replace(case, choice=engine_choice("llama.cpp"))
    return case.option(chosen.nearest)


def _filled(best: Verdict) -> tuple[str | None, Option | None]:
    """A file of exactly the size that fits, where choosing types by loss gains something."""
    case, chosen = best.case, best.chosen
    if chosen is None or not case.choice.gguf or case.quantized or chosen.fits != "whole" or not chosen.file_bytes:
        return None, None
    bits = chosen.bits_per_weight or 0
    nbytes = case.budget(chosen)
    most = int(case.n_weights * NO_POINT / 8)
    if nbytes is None or bits > NO_POINT:
        return None, None
    nbytes = min(nbytes, most)
    if nbytes <= chosen.file_bytes * 1.02:
        return None, None
    option = f"--size {nbytes / 1e9:.2f}GB" if nbytes >= 1e9 else f"--size {nbytes // 10**6}MB"
    grown = nbytes - chosen.file_bytes
    on_gpu = bool(chosen.gpu_bytes)
    filled = chosen.model_copy(
        update={
            "target": f"gguf {option}",
            "bits_per_weight": round(8 * nbytes / case.n_weights, 2),
            "file_bytes": nbytes,
            "gpu_bytes": (chosen.gpu_bytes or 0) + (grown if on_gpu else 0),
            "host_bytes": (chosen.host_bytes or 0) + (0 if on_gpu else grown),
            "max_context": None,
            "tokens_per_second_at_most": None,
            "loss": ExpectedLoss(low=None, high=None, models=[], text=f"less than {chosen.target}", figures=[]),
            "note": "fills the memory; types chosen by measured loss",
        }
    )
    return option, filled


def _levers(best: Verdict) -> list[LeverRow]:
    case, engine = best.case, best.case.choice.name
    rows = []
    wanted = best.chosen.target if best.tier == "four bits" and best.chosen else "Q4_K_M"
    if wanted in case.choice.ladder and can_make(wanted) and not case.quantized:
        report = memory(
            case.described,
            target=wanted,
            context=case.context,
            engine=case.choice.memory,
            hardware=case.situation.hardware,
        )
        for lever in report.levers:
            needs = f"{lever.gpu / 2**30:.1f} GiB of VRAM, {lever.host / 2**30:.1f} GiB of RAM"
            change = f"{lever.change[:-7]}instead of {wanted}" if lever.change.endswith("instead") else lever.change
            if wanted not in change:
                change = f"{wanted} with {change}"
            rows.append(LeverRow(kind="memory", name=lever.name, change=change, effect=needs))
    rows += [
        LeverRow(kind="speed", name=lever.name, change=lever.change, effect=lever.effect)
        for lever in SPEED_LEVERS
        if not lever.engines or engine in lever.engines
    ]
    return rows


def _not_yet(best: Verdict) -> list[NotYet]:
    others = list(OTHERS.get(best.scenario.name, ()))
    others += [(pick.target, f"what is recommended for {best.scenario.title}") for pick in best.scenario.picks]
    return [
        NotYet(target=target, what=what, nearest=why_not(target))
        for target, what in dict(reversed(others)).items()
        if nearest(target) is not None
    ]


def _notes(best: Verdict, situation: Situation, context: int | None) -> list[str]:
    case, use = best.case, situation.use
    notes = []
    if context is None:
        notes.append(f"memory is for a context of {case.context} tokens: --context says another one")
    if best.scenario.billions and case.n_weights > best.scenario.billions[1] * 1e9 and best.chosen is not None:
        most = best.scenario.billions[1]
        notes.append(f"models of up to {most:.0f}B are the usual choice here: this one will be slow or squeezed")
    if use == "finetune" and best.scenario.name != "fine-tuning":
        notes.append(f"{case.choice.name} does not fine-tune: --engine transformers does, with bnb:nf4")
    if use == "finetune":
        notes.append("the memory is that of running the model; training adds adapters, gradients and activations")
    if case.quantized:
        notes.append(f"{case.name} is quantized already: other levels are better made from the original model")
    if best.chosen is not None and best.chosen.target == AS_IT_IS and case.choice.gguf:
        notes.append(f"{case.name} has {case.native_bits:.2f} bits per weight")
    return notes


def _by_size(situation: Situation, choice: EngineChoice, scenario: Scenario, context: int | None) -> Advice:
    """Without a model: what each size of models comes to, and which to look for."""
    least, most = scenario.billions or (0.0, 1e6)
    room = situation.hardware.vram + situation.hardware.ram
    sizes = [size for size in SIZE_CLASSES if size.least_bytes < room] or list(SIZE_CLASSES[:1])
    verdicts = [
        judge(Case(size.described(), choice, situation, context or CONTEXT, context is not None), scenario)
        for size in sizes
    ]
    fitting = [v for v, size in zip(verdicts, sizes, strict=True) if least <= size.billions <= most]
    best = choose(fitting or verdicts)
    options = [
        _makeable(verdict).model_copy(update={"recommended": verdict is best})
        for verdict in sorted(verdicts, key=lambda verdict: verdict is not best)
        if verdict.chosen is not None
    ]
    return _advice(
        best, situation, options, steps(None, options[0] if best.chosen else None, None), context, several=False
    )
