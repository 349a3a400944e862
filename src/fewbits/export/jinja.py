"""Rendering a model's own chat template, in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fewbits.errors import FewbitsError
from fewbits.tokenizer.templates import TooMuch, bounded

MAX_CHARACTERS = 1 << 18
"""The longest published chat templates have some 20 thousand."""
MAX_EXPONENT = 64
Messages = Sequence[Mapping[str, str]]


class _Generation(Extension):
    """`{% generation %}`: transformers marks what a model said; it changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own way)

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


class _Sandbox(ImmutableSandboxedEnvironment):
    """With bounds of its own: no limit of time ends a power of whole numbers, which is one step."""

    intercepted_binops = frozenset({"**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not isinstance(right, int | float) or abs(right) > MAX_EXPONENT:
            raise OverflowError(f"an exponent of more than {MAX_EXPONENT}")
        return super().call_binop(context, operator, left, right)


class Refused(FewbitsError):
    """The template does not take this conversation."""


class ChatTemplate:
    """A model's own template.

    Args:
        source: Jinja, as in `tokenizer.chat_template`.
        special: `bos_token`, `eos_token` and so on.

    Raises:
        FewbitsError: no Jinja, or absurdly long.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        if len(source) > MAX_CHARACTERS:
            raise FewbitsError(f"The chat template has {len(source)} characters.", "No real one is so long.")
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.globals["raise_exception"] = _refuse
        self.special = dict(special)
        try:
            with bounded():
                self._template = _compiled(environment, source)
        except TooMuch:
            raise
        except Exception as error:  # of nesting too deep and numbers too long, too
            raise FewbitsError(f"The chat template is not valid Jinja ({_short(error)}).") from None

    def render(self, messages: Messages, generation: bool) -> str:
        """The text of a conversation.

        Args:
            generation: whether the model is to speak next.

        Raises:
            Refused: the template does not take it, or fails.
        """
        values = {"messages": [dict(m) for m in messages], "add_generation_prompt": generation, "tools": None}
        try:
            with bounded():
                return str(self._template.render({**self.special, **values}))
        except TooMuch as error:
            raise Refused(error.message) from None
        except FewbitsError:
            raise
        except Exception as error:  # a stranger's template can fail in any way
            if "strftime_now" in str(error):
                raise Refused("the chat template writes today's date, which Go templates cannot") from None
            raise Refused(f"the chat template fails ({_short(error)})") from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _compiled(environment: Environment, source: str) -> Any:
    return environment.from_string(source)


def _refuse(message: str = "") -> None:
    raise Refused(f"the chat template refuses ({message})")
