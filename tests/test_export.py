"""Handing over: chat templates as Ollama takes them, Modelfiles, model cards, uploads."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fewbits.api import quantize
from fewbits.checkpoint import open_model
from fewbits.cli.export import command
from fewbits.demo import MODEL as DEMO
from fewbits.errors import FewbitsError
from fewbits.export import export_ollama, gguf_card, push
from fewbits.export.dialects import Frames, Unknown, go_template, probes, translate
from fewbits.export.go_template import conversation, render
from fewbits.export.jinja import ChatTemplate, Refused
from tiny_models import save_tiny

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
SPLIT = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
)

# family -> (Jinja that frames as the family does, a conversation with a system message as its makers document it)
FAMILIES: dict[str, tuple[str, str]] = {
    "ChatML": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
        "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n",
    ),
    "ChatML, as Qwen 2.5 with a built-in system message": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
        "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n",
    ),
    "Llama 3": (
        "{% for m in messages %}{% set content = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
        "m.content | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nA<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nC"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "Llama 2": (
        SPLIT + "{% for m in rest %}{% if loop.first and system %}{% set text = '<<SYS>>\n' + system + "
        "'\n<</SYS>>\n\n' + m.content %}{% else %}{% set text = m.content %}{% endif %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + text + ' [/INST]' }}{% else %}{{ ' ' + text + ' ' + eos_token }}{% endif %}"
        "{% endfor %}",
        "[INST] <<SYS>>\nS\n<</SYS>>\n\nA [/INST] B </s><s>[INST] C [/INST]",
    ),
    "Mistral, without system messages": (
        "{{ bos_token }}" + ALTERNATE + "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
        "' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        "[INST] S\n\nA [/INST]B</s>[INST] C [/INST]",
    ),
    "Mistral, system message in the last turn": (
        SPLIT + "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}{% if loop.last and system %}"
        "{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}{% else %}{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% endif %}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        "[INST] A[/INST] B</s>[INST] S\n\nC[/INST]",
    ),
    "Gemma": (
        SPLIT + "{{ bos_token }}{% for m in rest %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + (system + '\n\n' if loop.first and system else '') + m.content | trim + "
        "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<start_of_turn>user\nS\n\nA<end_of_turn>\n<start_of_turn>model\nB<end_of_turn>\n<start_of_turn>user\nC"
        "<end_of_turn>\n<start_of_turn>model\n",
    ),
    "Phi-3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|system|>\nS<|end|>\n<|user|>\nA<|end|>\n<|assistant|>\nB<|end|>\n<|user|>\nC<|end|>\n<|assistant|>\n",
    ),
    "Zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<|system|>\nS</s>\n<|user|>\nA</s>\n<|assistant|>\nB</s>\n<|user|>\nC</s>\n<|assistant|>\n",
    ),
    "DeepSeek": (
        SPLIT + "{{ bos_token + system }}{% for m in rest %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
        "{% else %}{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}",
        "S<｜User｜>A<｜Assistant｜>B<｜end▁of▁sentence｜><｜User｜>C<｜Assistant｜><think>\n",
    ),
    "Alpaca": (
        SPLIT + "{{ bos_token + (system + '\n\n' if system else '') }}{% for m in rest %}{% if m.role == 'user' %}"
        "{{ '### Instruction:\n' + m.content + '\n\n' }}{% else %}{{ '### Response:\n' + m.content }}{{ eos_token }}"
        "{{ '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
        "S\n\n### Instruction:\nA\n\n### Response:\nB</s>\n\n### Instruction:\nC\n\n### Response:\n",
    ),
    "with braces that Go would take for an action": (
        "{% for m in messages %}{{ '{{' + m.role + '}}' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '{{assistant}}' }}{% endif %}",
        "{{system}}S\n{{user}}A\n{{assistant}}B\n{{user}}C\n{{assistant}}",
    ),
}  # fmt: skip
TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "A"},
    {"role": "assistant", "content": "B"},
    {"role": "user", "content": "C"},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_becomes_gos(family: str) -> None:
    source, documented = FAMILIES[family]
    template = ChatTemplate(source, SPECIAL)
    found = translate(template, "<s>")
    assert render(found.template, conversation(TALK)) == documented
    for messages in probes(found.frames.where != "refused"):
        wanted = template.render(messages, True).removeprefix("<s>")
        assert render(found.template, conversation(messages)) == wanted
    assert found.stops and "<s>" not in found.stops


def test_stops_end_turns() -> None:
    assert translate(ChatTemplate(FAMILIES["ChatML"][0], {}), "").stops == ("<|im_end|>", "<|im_start|>user")
    assert translate(ChatTemplate(FAMILIES["Llama 2"][0], SPECIAL), "<s>").stops == ("</s>", "[INST]")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ messages[0].content | upper }}", "do not come out"),
        ("{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}", "more than their role"),
        ("{% for m in messages %}{{ m.content }}{{ strftime_now('%d') }}{% endfor %}", "today's date"),
        ("{{ raise_exception('no') }}", "refuses"),
        ("{{ messages.__class__.__mro__ }}", "fails|do not come out"),
    ],
)
def test_what_cannot_be_translated_is_left(source: str, reason: str) -> None:
    with pytest.raises(Unknown, match=reason):
        translate(ChatTemplate(source, {}))


def test_templates_are_sandboxed() -> None:
    for source in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"):
        with pytest.raises(Refused):
            ChatTemplate(source, {}).render(TALK, True)
    with pytest.raises(FewbitsError, match="not valid Jinja"):
        ChatTemplate("{% for %}", {})


_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=12)


@given(
    frames=st.builds(
        Frames,
        _TEXT,
        st.tuples(_TEXT, _TEXT),
        st.sampled_from(["before", "inside", "last", "refused"]),
        st.tuples(_TEXT, _TEXT),
        st.tuples(_TEXT, _TEXT),
        _TEXT,
    )
)
def test_frames_come_back_from_go_word_for_word(frames: Frames) -> None:
    """Whatever stands around the contents, braces, quotes and line breaks included, arrives in the prompt."""
    values = conversation(TALK)
    (head, tail), (opens, closes), (begins, ends) = frames.system, frames.user, frames.assistant
    first = f"{head}S{tail}" + {"before": opens, "inside": "", "refused": "", "last": opens}[frames.where]
    if frames.where == "refused":
        first = f"{frames.opening}{opens}S{tail}"
    if frames.where == "last":
        first = frames.opening + opens
    system = f"{head}S{tail}" if frames.where == "last" else ""
    wanted = f"{first}A{closes}{begins}B{ends}{opens}{system}C{closes}{frames.generation}"
    assert render(go_template(frames), values) == wanted


def test_the_go_subset_is_parsed_as_go_does() -> None:
    values = {"System": "s", "Messages": [{"Role": "user", "Content": "x"}, {"Role": "tool", "Content": "y"}]}
    cases = {
        "a {{- if .System }} b {{ else }} c {{ end -}} d": "a b d",
        '{{ if and .System (not (eq .System "t" "u")) }}1{{ end }}': "1",
        '{{ range $i, $m := .Messages }}{{ $i }}{{ .Role }}{{ if ne $m.Role "user" }}!{{ end }}{{ end }}': None,
        "{{ range .Messages }}{{ .Content }}{{ end }}": "xy",
        '{{ if eq .System "a" }}1{{ else if eq .System "s" }}2{{ else }}3{{ end }}': "2",
        r'{{ "\n{{" }}': "\n{{",
    }
    for template, wanted in cases.items():
        if wanted is None:
            with pytest.raises(FewbitsError, match="not understood"):
                render(template, values)
        else:
            assert render(template, values) == wanted, template
    for broken in ("{{ if .System }}", "{{ end }}", "{{ }}", "{{ if (eq 1 1 }}{{ end }}", "{{ printf .System }}"):
        with pytest.raises(FewbitsError):
            render(broken, values)


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a tiny model with a ChatML template."""
    folder = tmp_path_factory.mktemp("chat")
    model = save_tiny(folder / "tiny", "llama")
    (model / "chat_template.jinja").write_text(FAMILIES["ChatML"][0])
    quantize(model, "Q8_0", folder / "tiny.gguf")
    (folder / "generation_config.json").write_text('{"temperature": 0.7, "top_p": 0.95, "top_k": 20}')
    (folder / "LICENSE").write_text("Do what you like.\n")
    return folder / "tiny.gguf"


def test_modelfile(chat_file: Path, tmp_path: Path) -> None:
    made = export_ollama(chat_file, chat_file.with_name("Modelfile"), system='Say "yes".')
    text = chat_file.with_name("Modelfile").read_text()
    assert text == made.text and made.dialect == "ChatML"
    parsed = parse_modelfile(text)
    assert parsed["FROM"] == ["./tiny.gguf"]
    assert parsed["SYSTEM"] == ['Say "yes".']
    assert parsed["LICENSE"] == ["Do what you like."]
    assert "<|im_start|>user" in parsed["TEMPLATE"][0]
    assert {"temperature 0.7", "top_p 0.95", "top_k 20", "num_ctx 512"} <= set(parsed["PARAMETER"])
    assert {"stop <|im_end|>", "stop <|endoftext|>"} <= set(parsed["PARAMETER"])
    assert json.loads(made.repository["params"])["stop"] == made.stops
    with pytest.raises(FewbitsError, match="exists"):
        export_ollama(chat_file, chat_file.with_name("Modelfile"))
    elsewhere = export_ollama(chat_file, tmp_path / "Modelfile", context=1024)
    assert f"FROM {chat_file}" in elsewhere.text and any("made for 512" in note for note in elsewhere.notes)


def parse_modelfile(text: str) -> dict[str, list[str]]:
    """As ollama's parser reads it: instructions, values bare, in quotes, or between triple quotes over lines."""
    found: dict[str, list[str]] = {}
    rest = text
    while rest.strip():
        name, _, rest = rest.lstrip().partition(" ")
        prefix = ""
        if name == "PARAMETER":
            prefix, _, rest = rest.partition(" ")
            prefix += " "
        if rest.startswith('"""'):
            value, _, rest = rest[3:].partition('"""\n')
        else:
            value, _, rest = rest.partition("\n")
            value = value[1:-1] if value.startswith('"') else value
        found.setdefault(name, []).append(prefix + value)
    return found


def test_a_base_model_gets_no_template(tmp_path: Path) -> None:
    quantize(DEMO, "Q8_0", tmp_path / "demo.gguf")
    made = export_ollama(tmp_path / "demo.gguf")
    assert "TEMPLATE" not in made.text and made.dialect is None and made.file is None
    assert any("no chat template" in note for note in made.notes)


def test_what_ollama_does_not_take_is_refused(tmp_path: Path) -> None:
    quantize(DEMO, "Q8_0", tmp_path / "split.gguf", split_max_size=2_000_000)
    shard = sorted(tmp_path.glob("split-*.gguf"))[0]
    with pytest.raises(FewbitsError, match=r"split files.*COPY"):
        export_ollama(shard)
    with pytest.raises(FewbitsError, match="no such file"):
        export_ollama(tmp_path / "none.gguf")
    with pytest.raises(FewbitsError, match="no such file"):
        export_ollama(DEMO)


def test_card(chat_file: Path) -> None:
    card = gguf_card(open_model(chat_file), "me/tiny-GGUF").decode()
    assert "library_name: gguf" in card and "- gguf" in card
    assert "llama-server -hf me/tiny-GGUF" in card and "ollama run hf.co/me/tiny-GGUF" in card
    assert "`Q8_0`" in card


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as uploads need: making a repository and committing files to it."""

    repos: dict[str, dict[str, bytes]]
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.status != 200:
            self._answer({"error": "no right to write"})
        elif self.path == "/api/repos/create":
            told = json.loads(body)
            name = "/".join(part for part in (told.get("organization"), told["name"]) if part)
            self.repos.setdefault(name, {})
            self._answer({"url": f"http://{self.headers['host']}/{name}"})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            repo = self.repos["/".join(self.path.split("/")[3:5])]
            for line in body.splitlines():
                part = json.loads(line)
                if part["key"] == "file":
                    repo[part["value"]["path"]] = part["value"]["content"].encode()
            self._answer({"commitUrl": f"http://{self.headers['host']}/me/tiny/commit/1", "commitOid": "1"})
        else:
            self._answer({})

    def do_HEAD(self) -> None:
        _, owner, name, _, _, file = (*self.path.split("/", 5), "")[:6]
        there = file in self.repos.get(f"{owner}/{name}", {})
        self.send_response(200 if there else 404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", "1")
        self.send_header("Content-Length", "1")
        self.end_headers()

    def _answer(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(self.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def _endpoint(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """What HF_ENDPOINT does when it is set before the package is imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    url = f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("Handler", (Hub,), {"repos": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _endpoint(monkeypatch, server.server_port)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield handler
    server.shutdown()
    server.server_close()


def test_push_of_a_file_brings_a_card(chat_file: Path, hub: type[Hub]) -> None:
    pushed = push(chat_file, "me/tiny", extra={"template": b"x"})
    assert set(hub.repos["me/tiny"]) == {"tiny.gguf", "README.md", "template"} == set(pushed.files)
    hub.repos["me/tiny"]["README.md"] = b"by hand"
    push(chat_file, "me/tiny")
    assert hub.repos["me/tiny"]["README.md"] == b"by hand"


def test_push_of_a_directory_leaves_pickles_behind(tmp_path: Path, hub: type[Hub]) -> None:
    model = save_tiny(tmp_path / "tiny", "llama")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    pushed = push(model, "me/tiny")
    assert "pytorch_model.bin" not in hub.repos["me/tiny"]
    assert {"config.json", "model.safetensors"} <= set(hub.repos["me/tiny"]) == set(pushed.files)


def test_push_that_cannot_be(chat_file: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="owner/name"):
        push(chat_file, "tiny")
    with pytest.raises(FewbitsError, match="no such file"):
        push(tmp_path / "none", "me/tiny")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FewbitsError, match="nothing to upload"):
        push(tmp_path / "empty", "me/tiny")
    monkeypatch.setattr(hub, "status", 403)
    with pytest.raises(FewbitsError, match="refuses"):
        push(chat_file, "me/tiny")
    _endpoint(monkeypatch, 9)
    with pytest.raises(FewbitsError, match="cannot be reached"):
        push(chat_file, "me/tiny")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(FewbitsError, match="no token"):
        push(chat_file, "me/tiny")


def test_command(chat_file: Path, hub: type[Hub], tmp_path: Path) -> None:
    app = typer.Typer()
    app.command("export")(command)
    run = CliRunner().invoke
    shown = run(app, ["ollama", str(chat_file)])
    assert shown.exit_code == 0 and shown.stdout.startswith("FROM ")
    told = json.loads(run(app, ["ollama", str(chat_file), "-o", str(tmp_path / "Modelfile"), "--json"]).stdout)
    assert (tmp_path / "Modelfile").read_text() == told["text"]
    assert run(app, ["card", str(chat_file), "-o", str(tmp_path / "README.md")]).exit_code == 0
    assert (tmp_path / "README.md").read_text().startswith("---\n")
    pushed = run(app, ["ollama", str(chat_file), "--push", "me/chat"])
    assert pushed.exit_code == 0 and {"template", "params"} <= set(hub.repos["me/chat"])
    for bad in (["hub", str(chat_file)], ["card", str(chat_file), "--context", "1"], ["card", str(tmp_path)]):
        assert isinstance(run(app, bad).exception, FewbitsError), bad
