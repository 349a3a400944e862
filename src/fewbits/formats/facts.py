"""What a result follows from, as named facts, and in words what has changed of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Facts = Mapping[str, Any]
"""By name: a string, a number, a boolean, None, a list of such, or facts again. `digest:...` stands for contents."""
DIGEST = "digest:"
SHOWN = 3


def changes(before: Facts, now: Facts) -> str:
    """The facts that differ, in one line: `the target: Q4_K_M -> Q5_K_M`; empty where none do."""
    old, new = dict(_flat(before)), dict(_flat(now))
    found = [_change(name, old, new) for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(found[:SHOWN]) + more


def _flat(facts: Facts, above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name} ")
        elif value is not None:
            yield above + name, value


def _change(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if name not in new:
        return f"{name} is missing" if _is_digest(old[name]) else f"{name}: {old[name]} -> nothing"
    if name not in old:
        return f"{name} is new" if _is_digest(new[name]) else f"{name}: nothing -> {new[name]}"
    return f"{name} has changed" if _is_digest(new[name]) else f"{name}: {old[name]} -> {new[name]}"


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(DIGEST)
