"""The recommendation and its reasons in words."""

from __future__ import annotations

from fewbits.advise.candidates import AS_IT_IS, EXPERTS_IN_RAM, Case
from fewbits.advise.engines import nearest
from fewbits.advise.rules import Verdict
from fewbits.advise.scenarios import USES
from fewbits.advise.schema import Option
from fewbits.advise.situation import Situation

GB, GIB = 10**9, 2**30


def size(nbytes: int | None) -> str:
    return "?" if nbytes is None else f"{nbytes / GB:.1f} GB" if nbytes >= GB else f"{nbytes / 1e6:.0f} MB"


def gib(nbytes: int | None) -> str:
    return "?" if nbytes is None else f"{nbytes / GIB:.1f}"


def sentence(verdict: Verdict, situation: Situation, several: bool) -> str:
    """The recommendation."""
    chosen, case = verdict.chosen, verdict.case
    here = situation.phrase
    if chosen is None:
        return f"No usable form of {case.name} runs on this machine ({here}): take a smaller model."
    choice = f"{case.name} "
    if not chosen.can_make:
        target, why = nearest(chosen.target) or ("Q4_K_M", "in llama.cpp")
        return (
            f"Others would run {case.name} as {chosen.target} here; fewbits cannot make that yet. Take {target}: {why}."
        )
    what = f"Run {choice}as it is" if chosen.target == AS_IT_IS else f"Take {choice}at {chosen.target}"
    if several:
        what = f"Of these models: {what[0].lower()}{what[1:]}"
    told = f"{what}: {size(chosen.file_bytes)} of weights, "
    if verdict.lever:
        return f"{told}with {verdict.lever}, in {chosen.engine} on {here}."
    used = chosen.gpu_bytes or chosen.host_bytes
    return (
        f"{told}{gib(used)} of {gib(chosen.available)} GiB in {chosen.engine} with {chosen.context} tokens of context, "
        f"on {here}."
    )


def reasons(verdict: Verdict, situation: Situation, several: bool, option: Option | None) -> list[str]:
    """Why, for somebody who does this for the first time.

    Args:
        option: that is recommended in the end.
    """
    chosen, case, scenario = verdict.chosen, verdict.case, verdict.scenario
    found = [f"{scenario.reason}"]
    if situation.use and situation.use in USES and scenario.name not in ("fine-tuning", "research", "edge", "fastest"):
        found.append(USES[situation.use].reason)
    if chosen is not None and verdict.tier == "four bits" and verdict.scenario.picks:
        picks = [pick.target for pick in scenario.picks]
        if chosen.target not in (*picks, AS_IT_IS) and ("g128" not in picks[-1] or chosen.target[:3] != picks[-1][:3]):
            found.append(f"{picks[-1]} does not fit here; {chosen.target} is the next smaller that does.")
    if several:
        found.append(
            "Of several models: the larger one at 4 bits if it fits; else at 3 bits, where the use bears it; else the "
            "smaller one at 4 or 5 bits; never below Q2_K."
        )
    if case.experts:
        found.append(
            "It is a mixture of experts: all of them must be in memory, few are read for each token. Such models bear "
            "fewer bits, and their experts can lie in RAM at little cost in speed."
        )
    if option is not None:
        found += _about(option, case)
    return found


def _about(chosen: Option, case: Case) -> list[str]:
    found = []
    loss = chosen.loss
    if loss.low is not None and loss.models:
        found.append(
            f"Expected loss of {chosen.target}: {loss.text} more perplexity, as published for {_listed(loss.models)}."
        )
    measured = [figure for figure in loss.figures if figure.kind == "measured"]
    if measured:
        values = sorted(figure.kl_divergence or 0.0 for figure in measured)
        spread = f"{values[0]:.3g}" if len(values) == 1 else f"{values[0]:.3g} to {values[-1]:.3g}"
        found.append(
            f"Measured by us: a KL divergence of {spread} on {_listed([f.model.split(',')[0] for f in measured])}; "
            "small models lose more than large ones."
        )
    if chosen.target != AS_IT_IS and chosen.can_make and not loss.figures and loss.text != "none":
        found.append(f"For the loss of {chosen.target} no figure is known: measure it with `fewbits measure`.")
    if chosen.max_context and chosen.fits == "whole":
        found.append(f"The longest context that fits is {chosen.max_context} tokens.")
    if chosen.fits == "partly" and chosen.note != EXPERTS_IN_RAM:
        found.append("Layers in RAM make every token slower: expect the speed of the processor for their share.")
    if chosen.tokens_per_second_at_most:
        found.append(
            f"At most {chosen.tokens_per_second_at_most:.0f} tokens a second by this GPU's memory bandwidth; engines "
            "reach about half."
        )
    if case.choice.note:
        found.append(case.choice.note)
    return found


def _listed(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
