"""From options to a recommendation: the picks of a scenario, then fewer bits, then the other levers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fewbits.advise.candidates import AS_IT_IS, EXPERTS_IN_RAM, Case
from fewbits.advise.losses import SMALL
from fewbits.advise.scenarios import LAST_RESORT, SMALL_MODEL, TIGHT, USES, Scenario
from fewbits.advise.schema import Option
from fewbits.memory.engines import engine as memory_engine
from fewbits.plan import PRESETS

MUCH_LARGER = 1.25
"""A larger model at 3 bits is taken only if it is larger by so much: else more bits are worth more. Our choice."""
LEAST_CONTEXT = 2048
"""Shorter conversations are no use."""
FOUR_BITS = 4.0
BELOW = ("IQ2_S",)
"""Targets below Q2_K: the guide never goes there, but for cards of 4 to 6 GB."""

Tier = Literal["four bits", "three bits", "last resort", "lever", "nothing"]


@dataclass(frozen=True)
class Verdict:
    """What one model comes to on one machine.

    Attributes:
        scenario: the row that applied in the end.
        chosen: None if nothing runs.
        tier: how good that is.
        lever: what had to be changed beside the target, in words.
    """

    case: Case
    scenario: Scenario
    chosen: Option | None
    tier: Tier
    lever: str = ""


def judge(case: Case, scenario: Scenario) -> Verdict:
    """Find what to take for one model."""
    floor = USES[case.situation.use].floor if case.situation.use else 0.0
    if case.quantized:
        option = case.option(AS_IT_IS) if _loads_as_is(case) else None
        if option is not None and option.fits == "whole":
            return Verdict(case, scenario, option, "four bits")
    elif case.choice.gguf and case.n_weights < SMALL and scenario.name not in ("edge", "research"):
        pick = SMALL_MODEL.picks[0]
        option = case.option(pick.target)
        if option.fits == "whole" and case.spare(option) >= pick.spare:
            return Verdict(case, SMALL_MODEL, option, "four bits")
    unknown: Option | None = None
    for pick in scenario.picks if not case.quantized else ():
        option = case.option(pick.target)
        if option.fits is None:
            unknown = unknown or (option if pick.spare == 0 else None)
        elif option.fits == "whole" and case.spare(option) >= pick.spare and _allowed(pick.target, floor):
            if pick.target in BELOW and (saved := _saved(case, scenario)) is not None:
                return saved
            return Verdict(case, scenario, option, _tier(pick.target))
    if unknown is not None:
        return Verdict(case, scenario, unknown, "four bits")
    return _smaller(case, scenario, floor)


def _loads_as_is(case: Case) -> bool:
    return (case.described.kind == "gguf") == case.choice.gguf


def _tier(target: str) -> Tier:
    preset = PRESETS.get(target)
    if preset is None or preset.bits_per_weight is None or preset.bits_per_weight > FOUR_BITS:
        return "four bits"
    return "three bits" if target in {pick.target for pick in TIGHT.picks} else "last resort"


def _allowed(target: str, floor: float) -> bool:
    preset = PRESETS.get(target)
    return preset is None or preset.bits_per_weight is None or preset.bits_per_weight > floor


def _smaller(case: Case, scenario: Scenario, floor: float) -> Verdict:
    """Nothing that was recommended fits: down the ladder, then the other levers in the guide's order."""
    ladder = [target for target in case.ladder() if target != AS_IT_IS]
    if case.choice.gguf:
        four = [t for t in ladder if t in ("Q4_K_M", "Q4_K_S", "IQ4_XS")]
        rows: list[tuple[Scenario, Sequence[str]]] = [(scenario, four)]
        rows += [(row, [pick.target for pick in row.picks if pick.target in ladder]) for row in (TIGHT, LAST_RESORT)]
    else:
        four = ladder[-1:]
        rows = [(scenario, ladder)]
    for row, targets in rows:
        for target in targets:
            if _allowed(target, floor):
                option = case.option(target)
                if option.fits == "whole":
                    saved = _saved(case, row) if target in BELOW else None
                    return saved or Verdict(case, row, option, _tier(target))
    return _levers(case, scenario, (four or ladder)[0] if four or ladder else AS_IT_IS)


def _saved(case: Case, scenario: Scenario) -> Verdict | None:
    """Q2_K with a somewhat shorter context or a cache in 8 bits: better than fewer bits still."""
    longest, _ = case.levers("Q2_K")
    if case.context // 2 <= longest < case.context and not case.fixed:
        words = f"a context of {longest} tokens instead of {case.context}"
        return Verdict(case, scenario, case.option("Q2_K", context=longest), "last resort", words)
    option = case.option("Q2_K", kv="q8_0")
    return Verdict(case, scenario, option, "last resort", "the KV cache in q8_0") if option.fits == "whole" else None


def _levers(case: Case, scenario: Scenario, target: str) -> Verdict:
    """Shorter context, quantized cache, partial offload."""
    if case.quantized and _loads_as_is(case):
        target = AS_IT_IS
    longest, levers = case.levers(target)
    if min(LEAST_CONTEXT, case.context) <= longest < case.context and not case.fixed:
        shorter = case.option(target, context=longest)
        return Verdict(case, scenario, shorter, "lever", f"a context of {longest} tokens instead of {case.context}")
    for kv in ("q8_0", "fp8"):
        if kv in _cache_types(case):
            option = case.option(target, kv=kv)
            if option.fits == "whole":
                return Verdict(case, scenario, option, "lever", f"the KV cache in {kv}")
    plain = case.option(target)
    for lever in levers:
        if lever.name == EXPERTS_IN_RAM:
            moved = {
                "gpu_bytes": lever.gpu,
                "host_bytes": lever.host,
                "fits": "partly",
                "layers_on_gpu": plain.n_layers,
                "note": EXPERTS_IN_RAM,
            }
            words = "the experts in RAM and everything else on the GPU"
            return Verdict(case, scenario, plain.model_copy(update=moved), "lever", words)
    if plain.fits == "partly":
        words = f"{plain.layers_on_gpu} of {plain.n_layers} layers on the GPU, the others in RAM"
        return Verdict(case, scenario, plain, "lever", words)
    return Verdict(case, scenario, None, "nothing")


def _cache_types(case: Case) -> tuple[str, ...]:
    return memory_engine(case.choice.memory).cache_types


def choose(verdicts: Sequence[Verdict]) -> Verdict:
    """Which of several models: the larger at Q4_K_M if it fits; else at Q3_K_M; else the smaller at Q5_K_M or Q4_K_M;
    never below Q2_K. (field guide, larger model or more bits)

    Args:
        verdicts: at least one, of different models.
    """
    ordered = sorted(verdicts, key=lambda verdict: -verdict.case.n_weights)
    for index, verdict in enumerate(ordered):
        if verdict.tier == "four bits":
            return verdict
        smaller = ordered[index + 1] if index + 1 < len(ordered) else None
        much = smaller is None or verdict.case.n_weights >= MUCH_LARGER * smaller.case.n_weights
        if verdict.tier == "three bits" and much:
            return verdict
    order: tuple[Tier, ...] = ("three bits", "last resort", "lever", "nothing")
    return min(ordered, key=lambda verdict: (order.index(verdict.tier), verdict.case.n_weights))
