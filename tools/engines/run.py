"""Make checkpoints with fewbits, load them in an engine with an environment of its own, compare logits.

    python tools/engines/run.py gptqmodel --models DIR --calibration c4.txt
    python tools/engines/run.py vllm --models DIR --calibration c4.txt [--venv DIR] [--work DIR] [--only 'ct:*']

DIR holds the models smollm2-576 and smollm2-768. The environment is made on first use (gigabytes, some minutes) and
kept. What the reference says is fewbits' own reading of the checkpoint: its decoded weights in transformers, float32.
The result replaces the engine's section of docs/engines.md; a target that is not equal or does not load makes the exit
code 1.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    ENGINES,
    NEW_TOKENS,
    PROMPT,
    TEXT,
    TEXT_TOKENS,
    UNQUANTIZED,
    Difference,
    Engine,
    Job,
    Logits,
    Outcome,
    Target,
    difference,
)

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent.parent / "docs" / "engines.md"
EQUAL = 2.0
"""Logits are equal if they differ at most so many times more than the reference does in the engine's type."""
EXACT = 1e-5
"""And differences up to this are the order of float32 sums."""
ROUNDED, ROUNDED_WHOLE = 0.01, 0.3
"""The largest relative difference where the engine rounds activations: in a few blocks, and in the whole model."""
CALIBRATED = ("gptq:", "awq:", "exl3:")
CHUNKS = 16
"""Windows to calibrate on: what is looked at here is whether every value is read as it was written."""
TIME_LIMIT = 1800
"""Seconds for one checkpoint in an engine; the first one compiles kernels."""


@dataclass(frozen=True)
class Row:
    """A line of the section."""

    target: Target
    verdict: str
    found: Difference | None = None
    outcome: Outcome | None = None
    said: str = ""
    reference_said: str = ""
    rounding: float = 0.0

    @property
    def good(self) -> bool:
        return self.verdict == "equal" or (self.target.refused and self.verdict.startswith("refused"))


def environment(engine: Engine, venv: Path) -> Path:
    """The python of the engine's environment, which is made where it is missing or another version."""
    python = venv / "bin" / "python"
    if python.exists() and installed(python, (engine.package,)).get(engine.package) == engine.version:
        return python
    print(f"installing {engine.package} {engine.version} in {venv}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    for step in engine.steps:
        # a package that is built needs the environment's own ninja
        subprocess.run([str(python), "-m", "pip", *step], check=True, env=variables(engine, venv))
    return python


def variables(engine: Engine, venv: Path) -> dict[str, str]:
    """The environment variables of a process of the engine: nothing is looked up on a hub."""
    path = f"{venv / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **engine.environment, "PATH": path, "HF_HUB_OFFLINE": "1"}


def installed(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of packages in an environment; those that are missing are left out."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions() if d.metadata['Name']}\n"
        "print(json.dumps({p: have[p] for p in sys.argv[1:] if p in have}))"
    )
    done = subprocess.run([str(python), "-c", code, *packages], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def source(target: Target, options: argparse.Namespace) -> Path:
    """The model that a target is made from; one with few blocks is written first."""
    whole: Path = options.models / target.model
    if not target.blocks:
        return whole
    few: Path = options.work / target.source
    if not (few / "model.safetensors").exists():
        from safetensors.torch import load_file, save_file

        few.mkdir(exist_ok=True)
        for file in whole.iterdir():
            if file.suffix in (".json", ".jinja"):
                shutil.copyfile(file, few / file.name)
        config = json.loads((whole / "config.json").read_text())
        (few / "config.json").write_text(json.dumps({**config, "num_hidden_layers": target.blocks}, indent=1))
        gone = re.compile(r"\.layers\.(\d+)\.")
        tensors = {
            name: tensor
            for name, tensor in load_file(whole / "model.safetensors").items()
            if not (found := gone.search(name)) or int(found[1]) < target.blocks
        }
        save_file(tensors, few / "model.safetensors", metadata={"format": "pt"})
    return few


def make(target: Target, options: argparse.Namespace) -> Path:
    """The checkpoint of a target by `fewbits quantize`, unless it was made before."""
    model = source(target, options)
    if target.name == UNQUANTIZED:
        return model
    out: Path = options.work / target.slug
    if not out.exists():
        command = [sys.executable, "-m", "fewbits", "quantize", str(model), target.name, "-o", str(out)]
        if target.name.startswith(CALIBRATED):
            command += ["--calibration", str(options.calibration), "--calibration-chunks", str(CHUNKS)]
        subprocess.run(command, check=True)
    return out


@dataclass(frozen=True)
class Reference:
    """What fewbits reads out of a checkpoint.

    Attributes:
        logits: of the text, computed in float32.
        tokens: the greedy continuation of the prompt.
        rounding: relative difference of the logits when the same weights and all arithmetic are in the engine's type.
    """

    logits: Logits
    tokens: list[int]
    rounding: float


def reference(target: Target, checkpoint: Path, work: Path, text: list[int], prompt: list[int]) -> Reference:
    """Read a checkpoint with fewbits and run it in transformers, unless that was done before."""
    stem = work / f"{target.slug}-{target.dtype}-reference"
    logits_file, rest_file = stem.with_suffix(".npy"), stem.with_suffix(".json")
    if not rest_file.exists():
        import torch

        import fewbits
        from fewbits.forward.streamed import load_whole

        model = load_whole(fewbits.open(str(checkpoint)))
        if target.activations:
            round_inputs(model, target.activations)
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
            logits = model(torch.tensor([text])).logits[0, :-1].float().numpy()
            rounded = model.to(getattr(torch, target.dtype))(torch.tensor([text])).logits[0, :-1].float().numpy()
        np.save(logits_file, logits)
        rest = {"tokens": out[0, len(prompt) :].tolist(), "rounding": difference(rounded, logits).relative}
        rest_file.write_text(json.dumps(rest))
    return Reference(np.load(logits_file), **json.loads(rest_file.read_text()))


def round_inputs(model: Any, kind: str) -> None:
    """Round what linears of the decoder blocks get as the engine does: one scale a token, int8 or float8_e4m3."""
    import torch

    top = {"int8": 127.0, "fp8": 448.0}[kind]

    def hook(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        scale = inputs[0].abs().amax(-1, keepdim=True).clamp_min(1e-12) / top
        x = inputs[0] / scale
        x = x.round() if kind == "int8" else x.to(torch.float8_e4m3fn).to(x.dtype)
        return (x * scale, *inputs[1:])

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(hook)


def load(engine: Engine, python: Path, job: Job, where: Path) -> tuple[Logits, Outcome] | str:
    """What the engine makes of a checkpoint, or why it does not take it. The output is kept in a log beside the job."""
    job.save(where)
    command = [str(python), str(HERE / f"{engine.name}_check.py"), str(where)]
    log = where.with_suffix(".log")
    with log.open("w") as out:
        try:
            code = subprocess.run(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=variables(engine, python.parent.parent),
                cwd=where.parent,
                timeout=TIME_LIMIT,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"no result after {TIME_LIMIT} s"
    if code:
        return reason(log.read_text(errors="replace"))
    return np.load(job.logits), Outcome(**json.loads(Path(job.result).read_text()))


def reason(log: str) -> str:
    """The line of a log that says what went wrong."""
    lines = [line.strip() for line in log.splitlines() if "Error" in line and "File " not in line]
    text = lines[-1] if lines else "no reason given"
    for line in lines:  # the first error is the cause, what follows is its consequence
        if "Value error" in line or line.startswith(("ValueError", "NotImplementedError", "RuntimeError")):
            text = line
            break
    return text.split(" [type=")[0].replace("|", "/")[:160]


def judge(target: Target, found: Difference, rounding: float) -> str:
    """Whether logits are equal within the engine's own rounding."""
    limit = max(EQUAL * rounding, EXACT)
    if target.activations:
        limit = ROUNDED if target.blocks else ROUNDED_WHOLE
    return "equal" if found.relative <= limit else f"DIFFERS: more than {limit:.1e}"


def compare(engine: Engine, python: Path, options: argparse.Namespace) -> list[Row]:
    """Make, load and compare every target of an engine."""
    from transformers import AutoTokenizer

    rows: list[Row] = []
    for target in engine.targets:
        if target.name != UNQUANTIZED and not any(fnmatch.fnmatch(target.name, only) for only in options.only):
            continue
        tokenizer = AutoTokenizer.from_pretrained(options.models / target.model)
        text, prompt = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (TEXT, PROMPT))
        text = text[:TEXT_TOKENS]
        try:
            checkpoint = make(target, options)
        except subprocess.CalledProcessError as error:
            rows.append(Row(target, f"NOT MADE: exit code {error.returncode}"))
            continue
        stem = options.work / f"{target.slug}-{engine.name}"
        where = {"logits": str(stem) + ".npy", "result": str(stem) + ".result.json"}
        job = Job(str(checkpoint), target.dtype, text, prompt, NEW_TOKENS, **where)
        loaded = load(engine, python, job, Path(str(stem) + ".job.json"))
        if isinstance(loaded, str):
            row = Row(target, f"refused: {loaded}" if target.refused else f"FAILS: {loaded}")
        else:
            logits, outcome = loaded
            expected = reference(target, checkpoint, options.work, text, prompt)
            found = difference(logits, expected.logits)
            verdict = judge(target, found, expected.rounding)
            if target.refused:
                verdict = "LOADS, though it is written down as refused"
            said = {"said": tokenizer.decode(outcome.tokens), "reference_said": tokenizer.decode(expected.tokens)}
            row = Row(target, verdict, found, outcome, **said, rounding=expected.rounding)
        rows.append(row)
        print(line(row), file=sys.stderr, flush=True)
    return rows


def line(row: Row) -> str:
    """A row as Markdown."""
    made_from = row.target.model + (f", {row.target.blocks} blocks" if row.target.blocks else "")
    name = f"`{row.target.name}`" if row.target.name != UNQUANTIZED else UNQUANTIZED
    cells = [made_from, name, row.target.dtype]
    if row.found is None or row.outcome is None:
        cells += ["", "", "", "", "", "", row.verdict]
    else:
        said = f"`{printable(row.said)}`"
        if row.said != row.reference_said:
            said += f" (reference: `{printable(row.reference_said)}`)"
        cells += [
            row.outcome.kernel,
            f"{row.found.relative:.1e}",
            f"{row.rounding:.1e}",
            f"{row.found.kl:.1e}",
            f"{row.found.same_top:.0%}",
            said,
            row.verdict,
        ]
    return f"| {' | '.join(cells)} |"


def printable(text: str) -> str:
    return text.replace("\n", "\\n").replace("`", "'").replace("|", "/").strip()


def section(engine: Engine, python: Path, rows: list[Row]) -> str:
    """An engine's section of the page."""
    import fewbits

    have = {"fewbits": fewbits.__version__, **installed(python, engine.versions)}
    versions = ", ".join(f"{name} {version}" for name, version in have.items())
    heads = [
        "made from",
        "target",
        "computed in",
        "kernel",
        "relative difference",
        "of rounding",
        "KL",
        "same top",
        f'"{PROMPT}"',
        "verdict",
    ]
    table = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(line(row) for row in rows)]
    return "\n".join(
        [
            f"## {engine.title}",
            "",
            f"{date.today().isoformat()}: {versions}.",
            "",
            *engine.notes,
            "",
            *table,
            "",
        ]
    )


def write(page: Path, engine: Engine, text: str) -> None:
    """Replace the engine's section between its marks, or append it."""
    begin, end = f"<!-- {engine.name}: begin -->", f"<!-- {engine.name}: end -->"
    block = f"{begin}\n{text}{end}\n"
    old = page.read_text()
    if begin in old and end in old:
        before, rest = old.split(begin, 1)
        page.write_text(before + block + rest.split(end, 1)[1].removeprefix("\n"))
    else:
        page.write_text(old.rstrip("\n") + "\n\n" + block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewbits" / "engines"
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("--models", type=Path, required=True, help="folder with smollm2-576 and smollm2-768")
    parser.add_argument("--calibration", type=Path, required=True, help="text for GPTQ and AWQ")
    parser.add_argument("--venv", type=Path, help="the engine's environment (default: in the cache folder)")
    parser.add_argument("--work", type=Path, help="keep checkpoints and logs here and use them again")
    parser.add_argument("--only", nargs="+", default=["*"], help="targets, as shell patterns; the page stays as it is")
    options = parser.parse_args()
    engine = ENGINES[options.engine]
    python = environment(engine, (options.venv or cache / engine.name).absolute())
    options.models, options.calibration = options.models.resolve(), options.calibration.resolve()
    with tempfile.TemporaryDirectory(prefix="fewbits-engines-") as scratch:
        options.work = (options.work or Path(scratch)).absolute()
        options.work.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        rows = compare(engine, python, options)
    print(f"{len(rows)} rows, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if options.only == ["*"]:
        write(PAGE, engine, section(engine, python, rows))
    raise SystemExit(0 if all(row.good for row in rows) else 1)


if __name__ == "__main__":
    main()
