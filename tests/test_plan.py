"""Plans as files: round trip, damaged and hostile JSON, edits by hand, tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbits.codecs.base import codec
from fewbits.errors import FewbitsError
from fewbits.plan import (
    TENSOR_TYPES,
    MixtureOptions,
    ModelFacts,
    Plan,
    PlannedFile,
    PlannedTensor,
    SourceTensor,
    apply_edits,
    plan_tensors,
)


def make(target: str = "Q4_K_M", options: MixtureOptions | None = None) -> Plan:
    """Eight layers with rows of 512 and 576."""
    tensors = [
        SourceTensor("token_embd.weight", (1000, 512), "BF16"),
        SourceTensor("output_norm.weight", (512,), "F32"),
    ]
    for i in range(8):
        tensors += [
            SourceTensor(f"blk.{i}.attn_norm.weight", (512,), "F32"),
            SourceTensor(f"blk.{i}.attn_v.weight", (512, 512), "BF16"),
            SourceTensor(f"blk.{i}.ffn_up.weight", (576, 512), "BF16"),
            SourceTensor(f"blk.{i}.ffn_down.weight", (512, 576), "BF16"),
        ]
    planned, notes = plan_tensors(ModelFacts("llama", 8, 8, 8), tensors, target, options)
    return Plan(
        tool="fewbits 0.1.0",
        target=target,
        format="gguf",
        model="some/model",
        architecture="llama",
        tensors=planned,
        files=[PlannedFile(name="model-Q4_K_M.gguf", size=123)],
        notes=notes,
    )


def edit(plan: Plan, **changes: dict[str, Any]) -> Plan:
    """The plan as if read from a file in which tensors' fields were changed: {tensor name: {field: value}}."""
    content = json.loads(plan.to_json())
    for tensor in content["tensors"]:
        tensor.update(changes.get(tensor["name"], {}))
    return Plan.from_json(json.dumps(content))


def test_sizes() -> None:
    plan = make()
    assert plan.weights_bytes == sum(t.nbytes for t in plan.tensors)
    assert plan.n_weights == 1000 * 512 + 512 + 8 * (512 + 512 * 512 + 2 * 576 * 512)
    assert plan.bits_per_weight == pytest.approx(plan.weights_bytes * 8 / plan.n_weights)
    assert plan.file_size == 123
    by_name = {t.name: t for t in plan.tensors}
    assert by_name["output_norm.weight"].nbytes == 2048 and by_name["output_norm.weight"].method == "copy"
    assert by_name["token_embd.weight"].codec == "Q6_K" and by_name["token_embd.weight"].nbytes == 1000 * 2 * 210
    assert {t.name for t in plan.fallbacks} == {f"blk.{i}.ffn_down.weight" for i in range(8)}
    assert by_name["blk.0.ffn_down.weight"].wanted == "Q6_K" and by_name["blk.0.ffn_down.weight"].codec == "Q8_0"
    assert by_name["blk.1.ffn_down.weight"].wanted == "Q4_K" and by_name["blk.1.ffn_down.weight"].codec == "Q5_0"


def test_round_trip(tmp_path: Path) -> None:
    for target in ("Q4_K_M", "F16", "COPY"):
        plan = make(target, MixtureOptions(tensor_types=[("nothing", "Q8_0")]))
        assert plan.notes == ["The override 'nothing'=Q8_0 matches no tensor."]
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan
        assert Plan.from_json(plan.to_json().encode()) == plan
        assert apply_edits(plan, Plan.from_json(plan.to_json())) is plan


names = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=40)


@given(
    st.lists(
        st.builds(
            PlannedTensor,
            name=names,
            shape=st.lists(st.integers(1, 2**48), min_size=1, max_size=4).map(tuple),
            source_dtype=names,
            codec=names,
            method=names,
            nbytes=st.integers(0, 2**63 - 1),
            reason=names,
            wanted=st.none() | names,
        ),
        min_size=1,
        max_size=5,
        unique_by=lambda tensor: tensor.name,
    )
)
def test_any_plan_survives_json(tensors: list[PlannedTensor]) -> None:
    plan = Plan(tool="t", target="t", format="gguf", model="m", architecture="a", tensors=tensors)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    headers, rows = again.table(per_tensor=True)
    assert len(rows) == len(tensors) and all(len(row) == len(headers) for row in rows)


def broken(change: Any) -> str:
    content = json.loads(make().to_json())
    change(content)
    return json.dumps(content)


def put(field: str, value: Any) -> Any:
    return lambda plan: plan.update({field: value})


def put_first(field: str, value: Any) -> Any:
    return lambda plan: plan["tensors"][0].update({field: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "EOF"),
        ("{", "EOF"),
        ("[]", "valid dict|object"),
        ("null", "valid dict|object"),
        ("[" * 100_000, "recursion"),
        (b"\xff\xfe\x00", "JSON"),
        ('{"format_version": 1}', "tool: Field required"),
        (broken(put("format_version", 2)), "format_version: Input should be 1"),
        (broken(put("format_version", "1")), "format_version: Input should be 1"),
        (broken(put("surprise", 1)), "surprise: Extra inputs"),
        (broken(put("tensors", [])), "tensors: List should have at least 1"),
        (broken(put("tensors", {})), "tensors: Input should be a valid array"),
        (broken(put("files", [{"name": "../../etc/passwd", "size": 1}])), r"files\[0\].name: must be a file name"),
        (broken(put("files", [{"name": "..", "size": 1}])), r"files\[0\].name: must be a file name"),
        (broken(put("files", [{"name": "a", "size": 1}] * 2)), "two files are named 'a'"),
        (broken(put("notes", ["\x1b[2J"])), r"notes\[0\]: String should match"),
        (broken(put("split_max_size", 0)), "split_max_size: "),
        (broken(put_first("nbytes", -1)), r"tensors\[0\].nbytes: .*greater than or equal to 0"),
        (broken(put_first("nbytes", 10**30)), r"tensors\[0\].nbytes"),
        (broken(put_first("nbytes", "12")), r"tensors\[0\].nbytes: Input should be a valid integer"),
        (broken(put_first("nbytes", 1.5)), r"tensors\[0\].nbytes: Input should be a valid integer"),
        (broken(put_first("shape", [])), r"tensors\[0\].shape"),
        (broken(put_first("shape", [0, 4])), r"tensors\[0\].shape\[0\]"),
        (broken(put_first("shape", [2] * 5)), r"tensors\[0\].shape"),
        (broken(put_first("name", "")), r"tensors\[0\].name"),
        (broken(put_first("name", "a\nb")), r"tensors\[0\].name"),
        (broken(put_first("name", None)), r"tensors\[0\].name: Input should be a valid string"),
        (broken(put_first("name", "output_norm.weight")), "two tensors are named 'output_norm.weight'"),
        (broken(put_first("name\x1b[31m", 1)), r"tensors\[0\].name\?\[31m: Extra inputs"),
    ],
    ids=lambda value: ascii(value)[-30:],
)
def test_damaged_plans_name_file_and_field(text: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "my-plan.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FewbitsError, match=rf"my-plan\.json: .*({message})") as caught:
        Plan.load(path)
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match=r"no-such\.json: No such file"):
        Plan.load(tmp_path / "no-such.json")
    with pytest.raises(FewbitsError, match="directory"):
        Plan.load(tmp_path)
    with pytest.raises(FewbitsError, match=r"x\.json: No such file"):
        make().save(tmp_path / "missing" / "x.json")


def test_edited_type() -> None:
    made = make()
    name = "blk.1.ffn_down.weight"
    # the size in the file is stale, as after any edit by hand, and not believed
    plan = apply_edits(made, edit(made, **{name: {"codec": "q4_0"}}))
    tensor = next(t for t in plan.tensors if t.name == name)
    assert (tensor.codec, tensor.nbytes) == ("Q4_0", codec("Q4_0").nbytes((512, 576)))
    assert (tensor.reason, tensor.wanted, tensor.method) == ("edited plan", None, "search")
    assert plan.files == [] and plan.notes == ["1 tensors take their type from the edited plan."]
    assert [t for t in plan.tensors if t.name != name] == [t for t in made.tensors if t.name != name]
    # a size alone is no edit
    assert apply_edits(made, edit(made, **{name: {"nbytes": 7}})) is made


def test_edited_method_and_floats() -> None:
    made = make()
    plan = apply_edits(
        made,
        edit(
            made,
            **{
                "blk.0.ffn_up.weight": {"method": "gptq"},
                "blk.1.ffn_up.weight": {"codec": "F16"},
                "blk.2.ffn_up.weight": {"codec": "BF16", "method": "search"},
                "blk.3.ffn_up.weight": {"codec": "Q8_0", "method": "copy"},
            },
        ),
    )
    got = {t.name: (t.codec, t.method) for t in plan.tensors}
    assert got["blk.0.ffn_up.weight"] == ("Q4_K", "gptq")
    assert got["blk.1.ffn_up.weight"] == ("F16", "convert")
    assert got["blk.2.ffn_up.weight"] == ("BF16", "copy")
    assert got["blk.3.ffn_up.weight"] == ("Q8_0", "search")
    assert apply_edits(made, made.model_copy(update={"split_max_size": 10**9})).split_max_size == 10**9


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        (
            "blk.0.ffn_down.weight",
            "codec",
            "Q4_K",
            r"'blk\.0\.ffn_down\.weight' has rows of 576 .*Types that fit: .*Q5_0",
        ),
        ("blk.0.ffn_down.weight", "codec", "Q9_K", r"'Q9_K' for tensor 'blk\.0\.ffn_down\.weight'.*Known"),
        ("blk.0.ffn_down.weight", "codec", "I32", "'I32' for tensor"),
        ("blk.0.attn_norm.weight", "codec", "Q8_0", "is a vector and cannot be Q8_0.*Leave it F32"),
        ("blk.0.ffn_down.weight", "shape", [512, 512], r"the shape \[512, 512\] in the edited plan and \[512, 576\]"),
        ("blk.0.ffn_down.weight", "source_dtype", "F16", "the source type F16 in the edited plan and BF16"),
        ("blk.0.ffn_down.weight", "name", "blk.0.fnn_down.weight", r"Did you mean 'blk\.0\.ffn_down\.weight'"),
        ("blk.0.ffn_down.weight", "name", "xyzzy", "'xyzzy' that the model does not have"),
    ],
)
def test_edits_that_cannot_be(name: str, field: str, value: Any, message: str) -> None:
    made = make()
    with pytest.raises(FewbitsError, match=message):
        apply_edits(made, edit(made, **{name: {field: value}}))


def test_edits_of_the_whole() -> None:
    made = make()
    with pytest.raises(FewbitsError, match=r"lacks 2 of the model's tensors, the first is 'blk\.7\.ffn_up\.weight'"):
        apply_edits(made, made.model_copy(update={"tensors": made.tensors[:-2]}))
    with pytest.raises(FewbitsError, match="has the target 'Q4_K_M', this model and request have 'Q8_0'"):
        apply_edits(make("Q8_0"), made)
    with pytest.raises(FewbitsError, match="has the architecture 'gemma'"):
        apply_edits(made, made.model_copy(update={"architecture": "gemma"}))


def test_every_type_can_be_asked_for_by_edit() -> None:
    made = make()
    for to in TENSOR_TYPES:
        plan = apply_edits(made, edit(made, **{"blk.0.attn_v.weight": {"codec": to}}))
        tensor = next(t for t in plan.tensors if t.name == "blk.0.attn_v.weight")
        assert tensor.codec == to and tensor.nbytes == codec(to).nbytes((512, 512))


def test_impossible_headers_are_refused_in_one_line() -> None:
    for bad in (SourceTensor("a\x1bb.weight", (8, 512), "F16"), SourceTensor("a.weight", (0, 512), "F16")):
        with pytest.raises(FewbitsError, match="cannot be planned") as caught:
            plan_tensors(ModelFacts("llama", 1, 8, 8), [bad], "Q8_0")
        assert "\x1b" not in str(caught.value)
    with pytest.raises(FewbitsError, match="'WEIRD'"):
        plan_tensors(ModelFacts("llama", 1, 8, 8), [SourceTensor("a.bias", (512,), "WEIRD")], "Q8_0")


def test_table() -> None:
    plan = make()
    headers, rows = plan.table()
    assert [dict(zip(headers, row, strict=True)) for row in rows if "attn_v" in row[0]] == [
        {
            **{"tensor": "blk.*.attn_v.weight", "layers": "0, 3, 6-7", "from": "BF16", "to": "Q6_K", "count": "4"},
            **{"M weights": "1.049", "MB": "0.860", "bits/weight": "6.56", "share": "16.3%", "why": "mixture"},
        },
        {
            **{"tensor": "blk.*.attn_v.weight", "layers": "1-2, 4-5", "from": "BF16", "to": "Q4_K", "count": "4"},
            **{"M weights": "1.049", "MB": "0.590", "bits/weight": "4.50", "share": "11.2%", "why": "base type"},
        },
    ]
    grouped = plan.rows()
    assert sum(row.n_tensors for row in grouped) == len(plan.tensors) == len(plan.rows(per_tensor=True))
    assert sum(row.nbytes for row in grouped) == plan.weights_bytes
    assert sum(row.share for row in grouped) == pytest.approx(1)
    assert len(plan.table(per_tensor=True)[0]) == len(headers) - 2
