"""Advice: every row of the field guide's table, the choice among models, what cannot be made, commands that exist."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.advise import PROBLEMS, SCENARIOS, USES, advise, scenario_of
from fewbits.advise.engines import ENGINES, NEAREST, can_make, engine_choice, nearest
from fewbits.advise.losses import SERIES, expected_loss
from fewbits.advise.scenarios import LAST_RESORT, TIGHT
from fewbits.advise.schema import Advice
from fewbits.advise.situation import Situation
from fewbits.advise.sizes import SIZE_CLASSES
from fewbits.api import quantize
from fewbits.cli import application
from fewbits.cli.advise import command, show
from fewbits.errors import FewbitsError
from fewbits.layouts.engines import engines_of
from fewbits.memory import Described, Hardware
from fewbits.memory.hardware import GPU
from fewbits.plan import PRESETS
from fewbits.plan.directory import target as directory_target
from tiny_models import save_tiny

GIB = 2**30
BY_NAME = {size.name: size.described() for size in SIZE_CLASSES}
MODEL = BY_NAME["8B"]


def machine(vram: float = 0, arch: str = "8.9", kind: Any = "nvidia", ram: float = 32, name: str = "card") -> Hardware:
    """A machine with one GPU of so many GiB, or none."""
    gpus = (GPU(name, kind, int(vram * GIB), arch if kind == "nvidia" else "", 10**12),) if vram else ()
    return Hardware("processor", 8, "avx2", int(ram * GIB), gpus, unified=kind == "apple" and bool(vram))


# the field guide's rows: name, model, hardware, what the user says, one of which is recommended
ROWS: list[tuple[str, Described, Hardware, dict[str, Any], set[str]]] = [
    ("Ollama", MODEL, machine(12), {"engine": "ollama"}, {"Q4_K_M"}),
    ("LM Studio", MODEL, machine(24), {"engine": "lm-studio"}, {"Q4_K_M"}),
    ("Apple Silicon", MODEL, machine(10.6, kind="apple", ram=16), {}, {"Q4_K_M"}),
    ("Apple Silicon, memory to spare", MODEL, machine(36, kind="apple", ram=48), {}, {"Q5_K_M"}),
    ("AMD", MODEL, machine(16, kind="amd"), {}, {"Q4_K_M"}),
    ("CPU only", MODEL, machine(ram=16), {}, {"Q4_K_M", "Q5_K_M"}),
    ("CPU only, plenty of RAM", MODEL, machine(ram=64), {}, {"Q5_K_M"}),
    ("consumer GPU, 8 GB", MODEL, machine(8), {}, {"Q4_K_M", "Q5_K_M"}),
    ("consumer GPU, 12 GB", MODEL, machine(12), {}, {"Q4_K_M", "Q5_K_M"}),
    ("24 GB", MODEL, machine(24), {}, {"Q8_0", "BF16"}),
    ("24 GB, 32B", BY_NAME["32B"], machine(24), {}, {"Q4_K_M", "Q5_K_M"}),
    ("48 GB, 70B", BY_NAME["70B"], machine(48), {}, {"Q4_K_M"}),
    ("plenty of VRAM", MODEL, machine(16), {}, {"Q5_K_M"}),
    ("VRAM tight, larger model wanted", BY_NAME["14B"], machine(10), {}, {"Q3_K_M", "IQ3_M"}),
    ("4-6 GB", MODEL, machine(5.5), {}, {"Q2_K", "IQ2_S", "IQ3_M"}),
    ("edge", BY_NAME["3B"], machine(ram=4.4), {"use": "edge"}, {"Q2_K", "Q3_K_M"}),
    ("vLLM on Ampere", MODEL, machine(24, "8.6"), {"engine": "vllm"}, {"awq:w4g128"}),
    ("TGI on Ada", MODEL, machine(24, "8.9"), {"engine": "tgi"}, {"awq:w4g128"}),
    ("vLLM on Turing", MODEL, machine(16, "7.5"), {"engine": "vllm"}, {"gptq:w4g128"}),
    ("serving on Ampere", MODEL, machine(24, "8.6"), {"use": "serving"}, {"awq:w4g128"}),
    ("serving on Pascal", MODEL, machine(24, "6.1"), {"use": "serving"}, {"gptq:w4g128"}),
    ("H100", MODEL, machine(80, "9.0"), {}, {"ct:fp8"}),
    ("A100", MODEL, machine(80, "8.0"), {}, {"ct:w8a8"}),
    ("H100, vLLM", MODEL, machine(80, "9.0"), {"engine": "vllm"}, {"ct:fp8"}),
    ("fine-tuning", MODEL, machine(24), {"use": "finetune"}, {"bnb:nf4"}),
    ("research", MODEL, machine(24), {"use": "research"}, {"Q8_0", "BF16"}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "hardware", "said", "targets"), [r[1:] for r in ROWS], ids=[r[0] for r in ROWS])
def test_row_of_the_field_guide(model: Described, hardware: Hardware, said: dict[str, Any], targets: set[str]) -> None:
    advice = advise(model, hardware, **said)
    option = advice.recommended
    assert option is not None and option.target in targets, advice.sentence
    assert option.fits == "whole"
    assert option.target in advice.sentence
    assert advice.scenario is not None and advice.scenario.reason in advice.why
    check_commands(advice)


@pytest.mark.parametrize(
    ("said", "wanted", "instead"),
    [
        ({"use": "speed"}, {"exl2:4.5bpw", "exl2:4.0bpw"}, "gptq:w4g128"),
        ({"engine": "exllamav2"}, {"exl2:5.0bpw"}, "gptq:w4g128"),
        ({"engine": "exllamav3"}, {"exl3:5.0bpw", "exl3:4.0bpw"}, "Q4_K_M"),
        ({"engine": "onnxruntime"}, {"onnx:int4"}, "Q4_K_M"),
        ({"engine": "bitnet.cpp"}, {"bitnet:i2_s"}, "Q4_K_M"),
    ],
)
def test_what_cannot_be_made_is_named_and_replaced(said: dict[str, str], wanted: set[str], instead: str) -> None:
    """The row `fastest tokens on one NVIDIA GPU`, and engines whose formats are not written yet."""
    advice = advise(MODEL, machine(24), **said)
    option, others = advice.recommended, advice.options[1]
    if can_make(next(iter(wanted))):
        assert option is not None and option.target in wanted
        return
    assert option is not None and option.target == instead and option.can_make and option.fits == "whole"
    assert others.target in wanted and not others.can_make and others.nearest == instead
    assert "cannot make" in advice.sentence and any(row.target in wanted for row in advice.not_yet)
    check_commands(advice)


def test_memory_that_is_tight_gets_a_file_of_its_size() -> None:
    advice = advise(BY_NAME["14B"], machine(10))
    filled = advice.options[1]
    assert filled.target.startswith("gguf --size ")
    first = advice.recommended
    assert first is not None and first.file_bytes is not None and filled.file_bytes is not None
    assert first.file_bytes < filled.file_bytes
    assert filled.gpu_bytes is not None and filled.available is not None
    assert 0.9 * filled.available < filled.gpu_bytes <= filled.available
    assert any(f" {filled.target} " in step.command for step in advice.steps)


def test_code_and_reasoning_stay_at_four_bits() -> None:
    """Where chat goes down to 3 bits, code takes another lever."""
    hardware = machine(10)
    assert advise(BY_NAME["14B"], hardware, use="chat").recommended.target == "Q3_K_M"  # type: ignore[union-attr]
    for use in ("code", "reasoning"):
        option = advise(BY_NAME["14B"], hardware, use=use).recommended
        assert option is not None and (option.bits_per_weight or 0) > 4
        assert any("4 bits or more" in reason for reason in advise(BY_NAME["14B"], hardware, use=use).why)


@pytest.mark.parametrize(
    ("vram", "use", "expected"),
    [
        (24, None, ("14B", "Q5_K_M")),  # the larger one fits at 4 bits and more
        (10, None, ("14B", "Q3_K_M")),  # only at 3 bits
        (10, "code", ("8B", "Q4_K_M")),  # 3 bits are too few for code: the smaller one
        (8, None, ("8B", "Q4_K_M")),
        (6.4, None, ("8B", "Q3_K_M")),
    ],
)
def test_larger_model_or_more_bits(vram: float, use: str | None, expected: tuple[str, str]) -> None:
    advice = advise([BY_NAME["8B"], BY_NAME["14B"]], machine(vram), engine="llama.cpp", use=use)
    option = advice.recommended
    assert option is not None
    assert expected[0] in option.model
    assert option.target == expected[1] or (vram == 24 and option.target in ("Q8_0", "Q6_K", "Q5_K_M")), option.target
    assert any("Of several models" in reason for reason in advice.why)


def test_a_model_that_is_hardly_larger_does_not_win_at_three_bits() -> None:
    close = Described("9B", "config", {**MODEL.config, "num_hidden_layers": 35})
    advice = advise([close, MODEL], machine(6.8))
    assert advice.recommended is not None and advice.recommended.model == MODEL.name


def test_never_below_q2_k_by_itself() -> None:
    """What does not fit at 2 bits is offloaded in part, not squeezed further."""
    option = advise(BY_NAME["70B"], machine(24, ram=64)).recommended
    assert option is not None and option.fits == "partly" and option.target == "Q4_K_M"
    assert option.layers_on_gpu is not None and 0 < option.layers_on_gpu < 81
    nothing = advise(BY_NAME["70B"], machine(4, ram=8))
    assert nothing.recommended is None and not nothing.steps and "smaller model" in nothing.sentence
    squeezed = advise(MODEL, machine(5.5)).recommended
    assert squeezed is not None and squeezed.target == "Q2_K" and (squeezed.context < 8192 or squeezed.kv == "q8_0")


def test_levers_come_in_the_guides_order() -> None:
    advice = advise(BY_NAME["32B"], machine(16, ram=64), use="code")
    names = [lever.name for lever in advice.levers if lever.kind == "memory"]
    order = ["smaller quant", "shorter context", "quantized KV cache", "partial offload"]
    assert names == [name for name in order if name in names] and len(names) >= 2
    assert {"flash attention", "speculative decoding"} <= {r.name for r in advice.levers if r.kind == "speed"}


def test_without_a_model_sizes_are_compared() -> None:
    advice = advise((), machine(12))
    assert advice.recommended is not None and len(advice.options) >= 4
    cpu = advise((), machine(ram=64))
    assert cpu.recommended is not None and "8B" in cpu.recommended.model  # 3 to 7B without a GPU, whatever would fit
    edge = advise((), machine(ram=8), use="edge")
    assert edge.recommended is not None and "3B" in edge.recommended.model
    for advice in (advise((), machine(12)), cpu, edge):
        check_commands(advice)


def test_a_mixture_of_experts_is_told_of() -> None:
    config = json.loads((Path(__file__).parent / "data" / "memory" / "qwen3-30b-a3b.json").read_text())
    advice = advise(Described("moe", "config", config), machine(8, ram=64))
    assert any("mixture of experts" in reason for reason in advice.why)
    assert "experts in RAM" in [lever.name for lever in advice.levers]
    assert advice.recommended is not None and advice.recommended.note == "experts in RAM"
    assert any("--cpu-moe" in step.command for step in advice.steps)


def test_a_context_that_was_asked_for_is_kept() -> None:
    """Otherwise it is the second lever, after fewer bits."""
    hardware = machine(24, ram=16)
    shorter = advise(BY_NAME["32B"], hardware, use="code", engine="llama.cpp").recommended
    asked = advise(BY_NAME["32B"], hardware, use="code", engine="llama.cpp", context=16384).recommended
    assert shorter is not None and shorter.kv == "f16"
    assert asked is not None and asked.context == 16384


def test_every_scenario_is_reached_and_its_targets_are_known() -> None:
    reached = {"tight", "last-resort"}
    kinds = [machine(vram, arch, kind) for vram in (0, 5, 8, 16, 24, 80) for arch in ("", "7.5", "8.0", "8.9", "9.0")
             for kind in ("nvidia", "amd", "apple")]  # fmt: skip
    for hardware in kinds:
        for engine in (None, *ENGINES):
            for use in (None, *USES):
                named = engine_choice(engine) if engine else None
                reached.add(scenario_of(Situation(hardware, engine, use), named).name)
    assert {scenario.name for scenario in SCENARIOS} <= reached
    for scenario in (*SCENARIOS, TIGHT, LAST_RESORT):
        for pick in scenario.picks:
            if not can_make(pick.target):
                assert nearest(pick.target) is not None
            elif ":" in pick.target:
                directory_target(pick.target, None, calibrated=True)
            else:
                assert pick.target in PRESETS


def test_ladders_hold_only_what_the_engine_is_not_known_to_refuse() -> None:
    names = {"vllm": "vLLM", "transformers": "transformers"}
    for name, begins in names.items():
        for target in ENGINES[name].ladder:
            facts = [fact for fact in engines_of(target) if fact.engine.startswith(begins)]
            assert any(fact.verdict != "refuses" and fact.hardware != "CPU" for fact in facts), (name, target)
    for instead, _ in NEAREST.values():
        assert can_make(instead)


def test_losses_are_data_with_sources() -> None:
    for series in SERIES:
        assert series.source and series.ruler and series.model
        assert series.kind == "measured" or series.baseline
    loss = expected_loss("Q4_K_M", 8e9)
    assert loss.low is not None and loss.high is not None and 1 < loss.low < loss.high < 4
    assert {figure.kind for figure in loss.figures} == {"measured", "published"}
    assert "70B" in expected_loss("Q4_K_M", 7e10).models[0]
    assert expected_loss("Q4_K_M", 1e8).text.startswith("KL ")
    assert expected_loss("ct:nvfp4", 8e9).text == "no figure known"


@settings(max_examples=12, deadline=None)
@given(
    vram=st.sampled_from([0.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 48.0, 80.0]),
    arch=st.sampled_from(["6.1", "7.5", "8.0", "8.6", "8.9", "9.0"]),
    kind=st.sampled_from(["nvidia", "amd", "apple"]),
    engine=st.sampled_from([None, *ENGINES]),
    use=st.sampled_from([None, *USES]),
    context=st.sampled_from([None, 512, 16384]),
)
def test_advice_keeps_its_promises(
    vram: float, arch: str, kind: str, engine: str | None, use: str | None, context: int | None
) -> None:
    """Whatever is asked: what is said to fit fits, one option at most is recommended, commands parse."""
    small = Described("tiny", "config", {**BY_NAME["1B"].config, "num_hidden_layers": 2})
    advice = advise(small, machine(vram, arch, kind), engine=engine, use=use, context=context)
    assert [option.recommended for option in advice.options].count(True) <= 1
    assert len({option.target for option in advice.options}) == len(advice.options)
    for option in advice.options:
        if option.fits == "whole" and option.available is not None:
            assert (option.gpu_bytes or option.host_bytes or 0) <= option.available
    if advice.recommended is not None:
        assert advice.recommended.can_make and advice.options[0].recommended
    check_commands(advice)
    assert Advice.model_validate_json(advice.model_dump_json()) == advice


def check_commands(advice: Advice) -> None:
    """Every command of fewbits parses: its verb, options and values exist."""
    group = typer.main.get_command(application())
    extra = typer.Typer()
    extra.command("advise")(command)
    extra.callback()(lambda: None)
    known = {**group.commands, **typer.main.get_command(extra).commands}  # type: ignore[attr-defined]
    assert advice.steps or advice.recommended is None
    for step in advice.steps:
        words = shlex.split(step.command)
        if step.foreign:
            assert words[0] in ("llama-server", "vllm", "ollama")
            continue
        assert words[0] == "fewbits"
        assert words[1] in known or words[1] in ("memory", "export"), step.command
        if words[1] in known and words[1] != "export":
            known[words[1]].make_context(words[1], list(words[2:]))
        if words[1] == "quantize":
            name = words[3]
            assert name == "gguf" or can_make(name)


def test_the_suggested_quantization_can_be_planned_and_made(tmp_path: Path) -> None:
    """The commands do what they say on a real model."""
    model = save_tiny(tmp_path / "tiny", "llama", {"hidden_size": 256, "intermediate_size": 512})
    advice = advise(str(model), machine(ram=8))
    step = next(step for step in advice.steps if " quantize " in step.command)
    words = shlex.split(step.command)
    assert words[2] == str(model)
    made = quantize(words[2], words[3], tmp_path / words[words.index("-o") + 1])
    option = advice.recommended
    assert option is not None and option.file_bytes is not None
    assert made.tensor_bytes == option.file_bytes if hasattr(made, "tensor_bytes") else made.size > option.file_bytes
    # and the file itself gets advice: it is there already
    again = advise(str(tmp_path / words[words.index("-o") + 1]), machine(ram=8))
    assert again.recommended is not None and again.recommended.target == "as it is"
    check_commands(again)


def test_groups_that_do_not_divide_become_smaller(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny", "llama", {"hidden_size": 192, "intermediate_size": 320})
    option = advise(str(model), machine(24, "8.6"), engine="vllm").recommended
    assert option is not None and option.target == "awq:w4g64"


@pytest.fixture(scope="module")
def low_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF at 2 bits, without calibration and without a chat template."""
    folder = tmp_path_factory.mktemp("low")
    model = save_tiny(folder / "tiny", "llama", {"hidden_size": 256, "intermediate_size": 512})
    quantize(model, "Q2_K", folder / "low.gguf")
    return folder / "low.gguf"


def test_nonsense_is_traced_to_bits_and_template(low_bits: Path) -> None:
    advice = advise(str(low_bits), machine(ram=16), problem="nonsense")
    verdicts = {finding.cause: finding.verdict for finding in advice.findings}
    assert verdicts["too few bits"] == "likely"
    assert verdicts["wrong or missing chat template"] == "likely"
    assert verdicts["quantized to few bits without a calibration text"] == "likely"
    assert [f.verdict for f in advice.findings] == sorted(
        verdicts.values(), key=["likely", "possible", "unlikely"].index
    )
    check_commands(advice)


def test_slow_is_traced_to_the_missing_gpu(low_bits: Path) -> None:
    verdicts = {f.cause: f.verdict for f in advise(str(low_bits), machine(ram=16), problem="slow").findings}
    assert verdicts["the layers are not on the GPU"] == "likely"
    assert verdicts["the model does not fit into the fast memory"] == "unlikely"
    verdicts = {f.cause: f.verdict for f in advise(str(low_bits), machine(1), problem="slow").findings}
    assert verdicts["the model does not fit into the fast memory"] == "likely"  # margins alone are more


def test_out_of_memory_names_what_to_change() -> None:
    advice = advise(BY_NAME["14B"], machine(8), problem="out-of-memory", context=16384)
    assert advice.findings[0].verdict == "likely" and advice.levers
    assert advice.levers[0].name == "smaller quant" or advice.levers[0].kind == "memory"
    fits = advise(BY_NAME["1B"], machine(24), problem="out-of-memory", context=4096)
    assert fits.findings[0].verdict != "likely"


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problems_without_a_file_list_what_to_look_at(problem: str) -> None:
    advice = advise((), machine(12), problem=problem)
    assert advice.findings and all(finding.remedy for finding in advice.findings if finding.verdict != "unlikely")
    check_commands(advice)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"engine": "vllama"}, "Unknown engine 'vllama'"),
        ({"use": "poetry"}, "Unknown use 'poetry'"),
        ({"problem": "boredom"}, "Unknown problem 'boredom'"),
        ({"context": 0}, "The context is 0"),
        ({"problem": "slow", "models": [MODEL, MODEL]}, "in one model"),
    ],
)
def test_bad_questions_are_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        advise(said.pop("models", MODEL), machine(12), **said)


def test_what_people_read(capsys: pytest.CaptureFixture[str]) -> None:
    """The recommendation first, the commands last."""
    show(advise(MODEL, machine(8, name="RTX 4060")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Take an 8B model") and "Q4_K_M" in lines[0]
    where = [next(i for i, line in enumerate(lines) if line.startswith(word)) for word in ("->", "Why", "Next")]
    assert where == sorted(where)
    assert len(lines) < 40
