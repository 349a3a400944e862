"""What stands beside the weights of a model directory: what is copied, what never is, and the model card."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.checkpoint import open_model
from fewbits.demo import MODEL
from fewbits.errors import FewbitsError
from fewbits.formats.directory import card as cards
from fewbits.formats.directory.card import CalibrationUsed, CardFacts, Measured, Origin, model_card, origin_of
from fewbits.formats.directory.companions import companions, config_json
from fewbits.formats.directory.snippets import snippets
from fewbits.formats.directory.writer import lay_out
from test_directory_format import writing
from tiny_models import save_tiny, tiny_model, tiny_tokenizer


def test_what_goes_along_from_a_directory(tmp_path: Path) -> None:
    source = save_tiny(tmp_path, "llama")
    wanted = {
        "chat_template.jinja": "{{ x }}", "additional_chat_templates/tools.jinja": "y", "LICENSE": "free",
        "NOTICE.txt": "note", "merges.txt": "", "tokenizer.model": "\0",
    }  # fmt: skip
    unwanted = {"modeling_evil.py": "", "LICENSE.py": "", "training_args.bin": "", "notes.txt": "", "README.md": ""}
    for name, content in {**wanted, **unwanted}.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(content)
    found = companions(open_model(source))
    assert found.notes == []
    assert found.files.keys() == wanted.keys() | {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert all(data == (source / name).read_bytes() for name, data in found.files.items())
    with writing(tmp_path / "m", lay_out([]), {}) as opened:
        for name, data in found.files.items():
            opened.add_file(name, data)
    assert (tmp_path / "m" / "additional_chat_templates" / "tools.jinja").read_text() == "y"


def test_remote_code_does_not_go_along(tmp_path: Path) -> None:
    source = save_tiny(tmp_path, "llama")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((source / name).read_text())
        content["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
        (source / name).write_text(json.dumps(content))
    model = open_model(source)
    found = companions(model).files
    assert b"auto_map" not in found["tokenizer_config.json"] and b"auto_map" not in config_json(model, None, "")
    assert json.loads(found["tokenizer_config.json"])["eos_token"] == "<|endoftext|>"


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    found = companions(open_model(tmp_path))
    assert found.files.keys() == {"generation_config.json"}
    assert len(found.notes) == 1 and "no tokenizer" in found.notes[0]


def test_absurd_and_malformed_files_are_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path, "llama")
    (source / "tokenizer_config.json").write_text('{"auto_map": ')
    with pytest.raises(FewbitsError, match=r"tokenizer_config.json: not valid JSON"):
        companions(open_model(source))
    os.truncate(source / "tokenizer_config.json", 300 << 20)
    with pytest.raises(FewbitsError, match=r"tokenizer_config.json: too large"):
        companions(open_model(source))


def test_what_goes_along_from_a_gguf(tmp_path: Path) -> None:
    from fewbits import quantize

    source = save_tiny(tmp_path / "source", "llama")
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    quantize(source, "F32", tmp_path / "m.gguf")
    model = open_model(tmp_path / "m.gguf")
    found = companions(model)
    assert found.notes == []
    out = tmp_path / "out"
    with writing(out, lay_out([]), {**found.files, "config.json": config_json(model, None, "BF16")}):
        pass
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("the end and").input_ids == tiny_tokenizer()("the end and").input_ids
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == 0
    config = transformers.AutoConfig.from_pretrained(out)
    assert config.dtype == torch.bfloat16 and config.num_key_value_heads == 2


def test_the_ends_of_a_chat_model_come_from_a_gguf(tmp_path: Path) -> None:
    from fewbits import quantize

    quantize(save_tiny(tmp_path / "source", "llama"), "F32", tmp_path / "m.gguf")
    model = open_model(tmp_path / "m.gguf")
    metadata = model.checkpoint.metadata  # type: ignore[union-attr]
    metadata |= {"tokenizer.ggml.eot_token_id": np.uint32(5), "tokenizer.ggml.eom_token_id": "hostile"}
    assert json.loads(companions(model).files["generation_config.json"])["eos_token_id"] == [0, 5]
    metadata["tokenizer.ggml.model"] = "t5"
    found = companions(model)
    assert found.files.keys() == {"generation_config.json"}
    assert "no tokenizer" in found.notes[0]


def test_config_json(tmp_path: Path) -> None:
    source = save_tiny(tmp_path, "llama")
    before = json.loads((source / "config.json").read_text())
    old = {"quantization_config": {"quant_method": "fp8"}, "_name_or_path": "/home/somebody/model"}
    (source / "config.json").write_text(json.dumps({**before, **old}))
    model = open_model(source)
    quantization = {"quant_method": "gptq", "bits": 4}
    dtypes = {"dtype": "float16", "torch_dtype": "float16"}
    config = json.loads(config_json(model, quantization, "F16"))
    assert config == {**before, **dtypes, "quantization_config": quantization}
    assert json.loads(config_json(model, None, "")) == before


# --- the card ---

HOSTILE = """---
license: "mit\\n---\\nbase_model: evil/evil"
language: [en, no, "de\\ninjected: true", {a: b}, 3, "x: y"]
tags:
- good tag
- "evil\\n---\\n# Owned"
- "{{ 7 * 7 }}"
- gguf
- "\\u202Eevil"
- [nested]
pipeline_tag: "text-generation\\nx: y"
license_link: "javascript:alert(1)"
base_model: [../../etc, "a/b\\nc: d"]
base_model_relation: quantized
---
# Theirs
"""


def facts(**changes: object) -> CardFacts:
    values: dict = {
        "target": "gptq:w4g64",
        "format": "gptq",
        "storage": "INT4_G64",
        "method": "gptq",
        "command": "fewbits quantize model gptq:w4g64 -o out --calibration c4.txt",
        "bits_per_weight": 4.75,
        "size_before": 2_500_000_000,
        "size_after": 700_000_000,
    }
    return CardFacts(**{**values, **changes})


def test_rope_settings_under_their_old_names(tmp_path: Path) -> None:
    rope = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    folder = save_tiny(tmp_path / "tiny", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    made = json.loads(config_json(open_model(folder), None, "F16", old_rope_keys=True))
    assert made["rope_theta"] == 5e5 and made["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert "rope_theta" not in json.loads(config_json(open_model(folder), None, "F16"))
    plain = {**config, "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}
    (folder / "config.json").write_text(json.dumps(plain))
    made = json.loads(config_json(open_model(folder), None, "F16", old_rope_keys=True))
    assert made["rope_theta"] == 1e5 and "rope_scaling" not in made


def test_the_card_takes_over_what_the_source_says(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "models--some--model.x" / "snapshots" / "0123abc", "llama")
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\nlanguage: no\n"
        "tags: [math, gptq, awq]\npipeline_tag: image-text-to-text\n---\n# x\n"
    )
    origin = origin_of(open_model(source))
    read = ModelCard(model_card(origin, facts()).decode())
    assert read.data.to_dict() == {
        "base_model": "some/model.x",
        "base_model_relation": "quantized",
        "language": ["no"],
        "license": "other",
        "license_name": "llama3",
        "license_link": "LICENSE",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["math", "gptq", "fewbits"],
    }


def test_the_card_says_how_it_was_made() -> None:
    text = model_card(
        Origin("tiny"),
        facts(
            calibration=CalibrationUsed([("c4.txt", "ab" * 32)], 32768),
            measured=Measured(
                [("KL divergence, mean", "0.0123", "0.0120 .. 0.0126")], "hf convention (2048).", "wiki.txt"
            ),
            snippets=snippets("gptq"),
            notes=["3 matrices stayed as they were"],
            kept="lm_head, embeddings",
        ),
    ).decode()
    for said in (
        "fewbits quantize model gptq:w4g64 -o out --calibration c4.txt", "ab" * 32, "32,768 tokens", "4.750",
        "2.50 GB", "700.0 MB", "| KL divergence, mean | 0.0123 | 0.0120 .. 0.0126 |", "hf convention", "vllm serve",
        "from_pretrained", "3 matrices stayed", "lm_head, embeddings", "gptqmodel",
    ):  # fmt: skip
        assert said in text, said
    assert "base_model" not in text
    plain = model_card(Origin("tiny"), facts()).decode()
    assert "Not measured" in plain and "the weights alone decided" in plain and "## Notes" not in plain
    assert "\n\n\n" not in text.replace("\n\n\n#", "\n\n#") and "\n\n\n" not in plain


def test_hostile_front_matter_does_not_break_the_card(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m", "llama")
    (source / "README.md").write_text(HOSTILE)
    text = model_card(origin_of(open_model(source)), facts()).decode()
    assert ModelCard(text).data.to_dict() == {
        "language": ["en", "no"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["good tag", "gptq", "fewbits"],
    }
    assert "evil" not in text and "Owned" not in text and "49" not in text.split("##")[0]


@pytest.mark.parametrize(
    "content",
    [
        "---\n" + "[" * 100_000 + "\n---\n",
        "---\n!!python/object/apply:os.system [exit]\n---\n",
        "---\n- a\n- b\n---\n",
        "---\nlicense: *missing\n---\n",
        "---\na: &a [x,x]\nlanguage: [*a, *a]\n---\n",
        "\0\ud800".encode("utf-8", "surrogatepass"),
        "",
    ],
)
def test_broken_front_matter_is_left_out(tmp_path: Path, content: str | bytes) -> None:
    source = save_tiny(tmp_path / "m", "llama")
    (source / "README.md").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert origin_of(open_model(source)) == Origin("m")


@given(text=st.text(max_size=60), value=st.recursive(st.text() | st.none() | st.booleans(), st.lists, max_leaves=4))
@settings(max_examples=100, deadline=None)
def test_no_text_breaks_the_card(text: str, value: object) -> None:
    origin = Origin(
        cards._one_line(text), tags=cards._texts(value, cards._TAG), license=cards._text(value, cards._LICENSE)
    )
    made = model_card(
        origin,
        facts(
            command=text,
            calibration=CalibrationUsed([(text, "00")], 1),
            measured=Measured([(text, text, text)], text, text),
            notes=[text],
        ),
    )
    read = ModelCard(made.decode())
    assert read.data.to_dict().keys() <= {"license", "library_name", "pipeline_tag", "tags"}
    assert read.data.tags[-2:] == ["gptq", "fewbits"]
    # the text opens no section of its own
    fence, heads = "", []
    for line in read.text.splitlines():
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if len(ticks) >= 3 and (not fence or line == fence):
            fence = "" if fence else ticks
        elif line.startswith("#") and not fence:
            heads.append(line)
    assert heads[1:] == ["## Calibration", "## Loss", "## Notes"] and fence == ""


@pytest.mark.parametrize(
    ("named", "base"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("models/llama", None),
        ("run/checkpoint-500", None),
        ("/home/x/model", None),
        ("../x", None),
        ("gpt2", None),
        (7, None),
    ],
)
def test_the_base_model_is_a_hub_id_or_nothing(tmp_path: Path, named: object, base: str | None) -> None:
    source = save_tiny(tmp_path / "m", "llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "_name_or_path": named}))
    assert origin_of(open_model(source)).base_model == base


def test_the_base_of_a_quantization_is_what_it_was_made_of(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "models--other--Model-AWQ" / "snapshots" / "0", "llama")
    (source / "README.md").write_text("---\nbase_model: some/model\nbase_model_relation: quantized\n---\n")
    assert origin_of(open_model(source)).base_model == "some/model"
    (source / "README.md").write_text("---\nbase_model: some/model\n---\n")  # a fine-tune: itself
    assert origin_of(open_model(source)).base_model == "other/Model-AWQ"


def test_the_card_of_a_gguf() -> None:
    origin = origin_of(open_model(MODEL))
    assert origin.base_model is None and origin.name
    model_card(origin, facts())
