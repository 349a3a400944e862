"""How a chat template frames conversations, found out by rendering probes; and the same as a Go template for Ollama.

A template is learned, not recognized by its text: conversations with known contents go through the model's own
template, and what stands between the contents are the frames. From them a Go template is written, and it counts only if
it renders every probe exactly as the model's own does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fewbits.errors import FewbitsError
from fewbits.export.go_template import conversation, render
from fewbits.export.jinja import ChatTemplate, Messages, Refused

NAMES: tuple[tuple[str, str], ...] = (
    ("<|im_start|>user\n", "ChatML"),
    ("<|im_start|>user<|im_sep|>", "Phi-4"),
    ("<|start_header_id|>user<|end_header_id|>", "Llama 3"),
    ("<|header_start|>user<|header_end|>", "Llama 4"),
    ("<<SYS>>", "Llama 2"),
    ("[INST]", "Mistral or Llama 2"),
    ("<start_of_turn>user", "Gemma"),
    ("<|user|>\n", "Phi-3, Zephyr or their like"),
    ("<|user|>", "Phi-3, Zephyr or their like"),
    ("<｜User｜>", "DeepSeek"),
    ("### Instruction:", "Alpaca"),
    ("USER: ", "Vicuna"),
    ("<|start_of_role|>user<|end_of_role|>", "Granite"),
    ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "Command R"),
    ("GPT4 Correct User: ", "OpenChat"),
)
"""What begins a user's turn -> what people call it. A name for humans; nothing else depends on it."""

_SYSTEM, _ASK, _SAY, _ASK_AGAIN = "SYSTEMxTEXT", "FIRSTxQUESTION", "FIRSTxANSWER", "SECONDxQUESTION"


@dataclass(frozen=True)
class Frames:
    """What stands around the contents.

    Attributes:
        opening: before everything without a system message: BOS left out, a built-in system message.
        system: (before, after) a system message, at the very beginning.
        where: of the system message: before the first user's turn, inside of it, inside of the last one, or refused.
        user, assistant: (before, after) a message.
        generation: after the last user's turn.
    """

    opening: str
    system: tuple[str, str]
    where: Literal["before", "inside", "last", "refused"]
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str


@dataclass(frozen=True)
class Translation:
    """A Go template that renders every probe as the model's own does.

    Attributes:
        name: what people call this way of framing, or `learned`.
        stops: strings that end a turn.
    """

    name: str
    template: str
    frames: Frames
    stops: tuple[str, ...]


class Unknown(FewbitsError):
    """The template cannot be translated; the message says why."""


def translate(template: ChatTemplate, drop: str = "") -> Translation:
    """The Go template of a model's own.

    Args:
        drop: what Ollama puts in front of every prompt itself (BOS).

    Raises:
        Unknown: no Go template of the shapes tried renders all probes as this one does.
    """
    try:
        frames = learn(template, drop)
    except Refused as error:
        raise Unknown(error.message) from None
    text = go_template(frames)
    for messages in probes(frames.where != "refused"):
        try:
            wanted = _rendered(template, messages, True, drop)
        except Refused as error:
            raise Unknown(error.message) from None
        if render(text, conversation(messages)) != wanted:
            raise Unknown("it frames messages in a way that depends on more than their role")
    begins = "".join((frames.opening, frames.system[0], frames.user[0]))
    name = next((name for mark, name in NAMES if mark in begins or mark in frames.user[0]), "learned")
    return Translation(name, text, frames, _stops(frames, drop))


def probes(system: bool) -> Iterator[list[dict[str, str]]]:
    """Conversations that end with a user's turn: other contents and lengths than those that frames are learned from."""
    words = ("How many?", "Seven, I think.\nOr eight.", "why <not> {{ nine }}?", "Because.", "And then?", "Ten", "So?")
    for length in (1, 3, 5, 7):
        turns = [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words[:length])]
        yield turns
        if system:
            yield [{"role": "system", "content": 'Answer in few words, and "quote" nothing.'}, *turns]


def learn(template: ChatTemplate, drop: str) -> Frames:
    """The frames of a template.

    Raises:
        Unknown: contents that do not come out as they went in.
        Refused: it does not take a plain conversation.
    """
    user, answer = {"role": "user", "content": _ASK}, {"role": "assistant", "content": _SAY}
    again = {"role": "user", "content": _ASK_AGAIN}
    before, after = _cut(_rendered(template, [user], False, drop), _ASK)
    same, answering = _cut(_rendered(template, [user], True, drop), _ASK)
    if same != before:
        raise Unknown("a prompt for generation changes what stands before it")
    talk = _rendered(template, [user, answer, again], False, drop)
    _, rest = _cut(talk, _ASK)
    between, rest = _cut(rest, _SAY)
    behind, _ = _cut(rest, _ASK_AGAIN)
    if not (between.startswith(after) and answering.startswith(after)):
        # some end the text where nobody is to speak next; what ends the turn is then what comes either way
        after = _common_end(between[::-1], answering[::-1])[::-1]
    generation = answering[len(after) :]
    ending = _ending(template, [user, answer], drop)
    if not behind.startswith(ending):
        ending = behind[: len(behind) - len(_common_end(behind, before))]
    opens = behind[len(ending) :]
    if not before.endswith(opens):
        # later turns begin with more than the first one, e.g. with a BOS of their own: that counts as the answer's end
        opens = _common_end(behind, before)
        ending = behind[: len(behind) - len(opens)]
    opening = before[: len(before) - len(opens)]
    where, system = _system(template, opens, drop)
    return Frames(opening, system, where, (opens, after), (between[len(after) :], ending), generation)


def _system(
    template: ChatTemplate, opens: str, drop: str
) -> tuple[Literal["before", "inside", "last", "refused"], tuple[str, str]]:
    system, user = {"role": "system", "content": _SYSTEM}, {"role": "user", "content": _ASK}
    answer, again = {"role": "assistant", "content": _SAY}, {"role": "user", "content": _ASK_AGAIN}
    try:
        text = _rendered(template, [system, user], False, drop)
        longer = _rendered(template, [system, user, answer, again], False, drop)
    except Refused:
        return "refused", ("", "\n\n")
    if _SYSTEM not in text:
        return "refused", ("", "\n\n")
    if longer.index(_SYSTEM) > longer.index(_ASK):
        head, rest = _cut(text, _SYSTEM)
        middle, _ = _cut(rest, _ASK)
        if not head.startswith(opens):
            raise Unknown("the system message stands at an unusual place")
        return "last", (head[len(opens) :], middle)
    head, rest = _cut(text, _SYSTEM)
    middle, _ = _cut(rest, _ASK)
    if opens and middle.endswith(opens):
        return "before", (head, middle[: len(middle) - len(opens)])
    return "inside", (head, middle)


def _ending(template: ChatTemplate, messages: Messages, drop: str) -> str:
    """What follows an answer that ends the conversation: so it can be told from what begins the next turn."""
    try:
        return _cut(_rendered(template, messages, False, drop), _SAY)[1]
    except (Refused, Unknown):
        return ""


def _rendered(template: ChatTemplate, messages: Messages, generation: bool, drop: str) -> str:
    text = template.render(messages, generation)
    return text[len(drop) :] if drop and text.startswith(drop) else text


def _cut(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise Unknown("contents do not come out as they went in")
    before, _, after = text.partition(mark)
    return before, after


def _common_end(a: str, b: str) -> str:
    length = 0
    while length < min(len(a), len(b)) and a[-1 - length] == b[-1 - length]:
        length += 1
    return a[len(a) - length :]


def go_template(frames: Frames) -> str:
    """The frames as Ollama takes them: Go's text/template over `.System` and `.Messages`.

    Actions follow one another without line breaks and without trimming: frames often end in line breaks that matter.
    """
    text = _quoted
    opens, closes = map(text, frames.user)
    begins, ends = map(text, frames.assistant)
    head, tail = map(text, frames.system)
    top, ask = "", opens
    if frames.where == "before":
        top = f"{{{{ if .System }}}}{head}{{{{ .System }}}}{tail}{{{{ else }}}}{text(frames.opening)}{{{{ end }}}}"
    elif frames.where == "last":
        top = text(frames.opening)
        ask = f"{opens}{{{{ if and $last $.System }}}}{head}{{{{ $.System }}}}{tail}{{{{ end }}}}"
    else:
        plain = text(frames.opening) + opens
        head = plain if frames.where == "refused" else head
        # the first user's turn is message 0, or message 1 after a system message
        ask = (
            f"{{{{ if or (eq $i 0) (and $.System (eq $i 1)) }}}}{{{{ if $.System }}}}{head}{{{{ $.System }}}}{tail}"
            f"{{{{ else }}}}{plain}{{{{ end }}}}{{{{ else }}}}{opens}{{{{ end }}}}"
        )
    return (
        f"{top}{{{{ range $i, $m := .Messages }}}}{{{{ $last := eq (len (slice $.Messages $i)) 1 }}}}"
        f'{{{{ if eq .Role "user" }}}}{ask}{{{{ .Content }}}}{closes}'
        f"{{{{ if $last }}}}{text(frames.generation)}{{{{ end }}}}"
        f'{{{{ else if eq .Role "assistant" }}}}{begins}{{{{ .Content }}}}'
        f"{{{{ if not $last }}}}{ends}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
    )


def _quoted(text: str) -> str:
    """Literal text: braces that Go would read as an action, or as the beginning of the next one, go in as strings."""
    return text.replace("{", '{{ "{" }}') if "{{" in text or text.endswith("{") else text


def _stops(frames: Frames, drop: str) -> tuple[str, ...]:
    """What ends an answer, and what would begin the next turn if the model went on."""
    ends = _marks(frames.assistant[1], drop)
    # words such as `User:` may stand in an answer: only where nothing else ends one
    begins = [mark for mark in _marks(frames.user[0], drop) if not ends or set(mark) & set("<[|#")]
    return tuple(dict.fromkeys((*ends, *begins)))


def _marks(text: str, drop: str) -> list[str]:
    lines = text.replace(drop, "\n").splitlines() if drop else text.splitlines()
    return [line.strip() for line in lines if len(line.strip()) > 2]
