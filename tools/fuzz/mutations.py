"""Small changes of valid files: of bytes, of a JSON document, of a safetensors header with its length kept true."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

Draw = Callable[[int], int]
"""draw(n) gives a number of 0 to n - 1: `random.Random.randrange`, or what hypothesis draws."""
NUMBERS = (0, 1, 2, 3, 7, 8, 31, 32, 127, 128, 255, 256, 65535, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
           2**40, 2**47, 2**53, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 4, 64, -(2**31), 2**31, 2**40, 2**63, 2**64, 10**30, 0.5, -0.5, 1e308, -1e308,
    float("nan"), float("inf"), "", " ", "0", "-1", "../x", "/etc/passwd", "a/b", "..", "\0", "\ud800", "x" * 5000,
    "{{ 1 }}", [], {}, [[]], [None], [0], [-1], [2**63], [[], {}], {"": None}, {"type": "Sequence"},
    "F32", "BF16", "I32", "U8", "gptq", "awq", "llama", "LlamaForCausalLM", "yarn", "Q4_K", "sliding_attention",
)  # fmt: skip
WORDS = (b"\0", b"\xff\xff\xff\xff", b"GGUF", b"general.alignment", b"split.count", b"[", b"{", b"}", b"]", b'"', b"\\",
         b"null", b"NaN", b"1e999", b"-", b"../", b"{% for i in range(999999999) %}", b"{{", b"}}")  # fmt: skip


def mutated(data: bytes, kind: str, draw: Draw) -> bytes:
    """A file's bytes, changed in one to six places.

    Args:
        kind: `json` and `safetensors` are changed as documents four times of five, else as bytes; `gguf` mostly in its
            first part, where the header is.
    """
    changes = 1 + draw(6)
    if kind in ("json", "safetensors") and draw(5):
        return (_json if kind == "json" else _safetensors)(data, changes, draw)
    out = bytearray(data)
    for _ in range(changes):
        near = kind == "gguf" and draw(8)
        _bytes(out, min(len(out), 1 << 12) if near else len(out), draw)
    return bytes(out)


def _bytes(out: bytearray, reach: int, draw: Draw) -> None:
    """One change among the first `reach` bytes."""
    if not out or not reach:
        out += b"x"
        return
    at, which = draw(reach), draw(10)
    length = 1 + draw(16)
    if which == 0:
        out[at] ^= 1 << draw(8)
    elif which == 1:
        out[at] = draw(256)
    elif which in (2, 3):
        width = 1 << draw(4)
        out[at : at + width] = (NUMBERS[draw(len(NUMBERS))] % (1 << 8 * width)).to_bytes(width, "little")
    elif which == 4:
        width = 1 << draw(4)
        value = int.from_bytes(out[at : at + width], "little") + draw(71) - 35
        out[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    elif which == 5:
        del out[at : at + length]
    elif which == 6:
        out[at:at] = out[at : at + length]
    elif which == 7:
        source = draw(reach)
        out[at : at + length] = out[source : source + length]
    elif which == 8:
        word = WORDS[draw(len(WORDS))]
        out[at : at + (len(word) if draw(2) else 0)] = word
    elif draw(4) == 0:
        del out[at:]
    else:
        out[at : at + length] = bytes(draw(256) for _ in range(length))


def _json(data: bytes, changes: int, draw: Draw) -> bytes:
    document = json.loads(data)
    for _ in range(changes):
        document = _changed(document, draw)
    return json.dumps(document).encode()


def _safetensors(data: bytes, changes: int, draw: Draw) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = _json(data[8 : 8 + length], changes, draw)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _changed(document: Any, draw: Draw) -> Any:
    """One change somewhere in a document: in depth by chance, so that places near the root are as likely as leaves."""
    holder, key, node = None, None, document
    while isinstance(node, dict | list) and node and draw(8):
        holder = node
        key = list(node)[draw(len(node))] if isinstance(node, dict) else draw(len(node))
        node = holder[key]
    if holder is None:
        return deepcopy(VALUES[draw(len(VALUES))]) if draw(4) == 0 else document
    which = draw(6)
    if which == 0:
        del holder[key]
    elif which == 1 and isinstance(node, int | float) and not isinstance(node, bool):
        holder[key] = (node + 1, node - 1, -node, node * 2, node // 2, node * 2**20)[draw(6)]
    elif which == 2 and isinstance(holder, dict):
        other = list(holder)[draw(len(holder))]
        holder[key], holder[other] = holder[other], holder[key]
    elif which == 3 and isinstance(holder, dict):
        names = [*holder, "x", "", "__metadata__", "../x"]
        holder[names[draw(len(names))]] = holder.pop(key)
    elif which == 4 and isinstance(holder, list):
        holder.insert(key, deepcopy(node))
    else:
        holder[key] = deepcopy(VALUES[draw(len(VALUES))])
    return document
