"""The part of Go's template language that our Modelfiles use, as a parser and a renderer.

It exists to prove a translation before it is handed out: what Ollama would make of a conversation is computed here and
compared with what the model's own template makes of it. Source of the semantics: pkg.go.dev/text/template, and
ollama/template/template.go (2026-06) for the variables. Anything outside of the subset is refused, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fewbits.errors import FewbitsError

_ACTION = re.compile(r"\{\{(-(?=\s))?\s*(.*?)\s*((?<=\s)-)?\}\}", re.DOTALL)
_WORD = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\(|\)|[^\s()"]+)')


@dataclass
class _Block:
    """An `if` or `range` with its branches; the root is one that always holds."""

    kind: str
    words: list[str]
    body: list[Any] = field(default_factory=list)
    otherwise: list[Any] = field(default_factory=list)


def render(template: str, values: Mapping[str, Any]) -> str:
    """What Go's text/template makes of it.

    Args:
        values: the fields of the root, e.g. `System` and `Messages`.

    Raises:
        FewbitsError: something that is not in the subset.
    """
    return "".join(_Renderer(values).run(parse(template), values))


def conversation(messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The values that Ollama hands to a template: system messages joined, all messages in turn."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    return {
        "System": system,
        "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages],
        "Response": "",
        "Tools": [],
    }


def parse(template: str) -> list[Any]:
    """Text and actions as a tree."""
    root = _Block("root", [])
    stack: list[tuple[_Block, list[Any]]] = [(root, root.body)]
    for part in _parts(template):
        into = stack[-1][1]
        if isinstance(part, str):
            into.append(part)
            continue
        head, rest = part[0], part[1:]
        if head in ("if", "range"):
            block = _Block(head, rest)
            into.append(block)
            stack.append((block, block.body))
        elif head == "else":
            block = stack.pop()[0]
            if rest:  # `else if` is an `if` inside of the `else`, closed by the same `end`
                inner = _Block("if", rest[1:])
                block.otherwise.append(inner)
                stack.append((inner, inner.body))
            else:
                stack.append((block, block.otherwise))
        elif head == "end":
            if len(stack) == 1:
                raise FewbitsError("Go template: an `end` too many.")
            stack.pop()
        else:
            into.append(tuple(part))
    if len(stack) != 1:
        raise FewbitsError("Go template: an `end` is missing.")
    return root.body


def _parts(template: str) -> Iterator[str | list[str]]:
    """Texts, trimmed where an action asks for it, and the words of actions."""
    at, trim = 0, False
    for found in _ACTION.finditer(template):
        text = template[at : found.start()]
        text = text.lstrip() if trim else text
        yield text.rstrip() if found[1] else text
        words = [word for word in _WORD.findall(found[2]) if word]
        if not words:
            raise FewbitsError("Go template: an empty action.")
        yield words
        at, trim = found.end(), bool(found[3])
    yield template[at:].lstrip() if trim else template[at:]


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda a, *b: any(a == c for c in b),
    "ne": lambda a, b: a != b,
    "not": lambda a: not a,
    "len": len,
    "slice": lambda items, start=0, stop=None: items[start:stop],
}


@dataclass
class _Renderer:
    root: Mapping[str, Any]
    variables: dict[str, Any] = field(default_factory=dict)

    def run(self, nodes: Sequence[Any], dot: Any) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, str):
                yield node
            elif isinstance(node, _Block):
                yield from self._block(node, dot)
            elif len(node) > 2 and node[1] == ":=":
                self.variables[node[0]] = self._value(list(node[2:]), dot)
            else:
                yield str(self._value(list(node), dot))

    def _block(self, node: _Block, dot: Any) -> Iterator[str]:
        if node.kind == "if":
            yield from self.run(node.body if self._value(node.words, dot) else node.otherwise, dot)
            return
        words, names = node.words, []
        if ":=" in words:
            at = words.index(":=")
            names, words = [word.rstrip(",") for word in words[:at]], words[at + 1 :]
        for index, item in enumerate(self._value(words, dot)):
            values = (index, item) if len(names) == 2 else (item,)
            self.variables.update(zip(names, values, strict=False))
            yield from self.run(node.body, item)

    def _value(self, words: list[str], dot: Any) -> Any:
        value, rest = self._call(words, dot)
        if rest:
            raise FewbitsError(f"Go template: {' '.join(words)!r} is not understood.")
        return value

    def _call(self, words: list[str], dot: Any) -> tuple[Any, list[str]]:
        """One call or value up to a closing bracket, and the words after it."""
        name, rest = words[0], words[1:]
        if name not in _FUNCTIONS and name not in ("and", "or"):
            return self._operand(words, dot)
        arguments: list[Any] = []
        while rest and rest[0] != ")":
            value, rest = self._operand(rest, dot)
            arguments.append(value)
        if name == "and":
            return next((a for a in arguments if not a), arguments[-1]), rest
        if name == "or":
            return next((a for a in arguments if a), arguments[-1]), rest
        return _FUNCTIONS[name](*arguments), rest

    def _operand(self, words: list[str], dot: Any) -> tuple[Any, list[str]]:
        word, rest = words[0], words[1:]
        if word == "(":
            value, rest = self._call(rest, dot)
            if not rest or rest[0] != ")":
                raise FewbitsError("Go template: a bracket is not closed.")
            return value, rest[1:]
        if word.startswith('"'):
            return re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), word[1:-1]), rest
        if re.fullmatch(r"-?\d+", word):
            return int(word), rest
        if word == ".":
            return dot, rest
        if word.startswith("$."):
            return self.root.get(word[2:], ""), rest
        if word.startswith("."):
            return dot.get(word[1:], ""), rest
        if word in self.variables:
            return self.variables[word], rest
        raise FewbitsError(f"Go template: {word!r} is not understood.")
