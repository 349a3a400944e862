"""How fast a candidate runs on this machine and what memory it takes there, in an engine that is installed.

That is llama.cpp on the processor, for GGUF files; of model directories nothing is measured. Each candidate is loaded
in a process of its own (see `probe`), so that what others took does not count.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from fewbits.checkpoint import GGUFCheckpoint, Model
from fewbits.checkpoint.gguf import GGML_TYPES
from fewbits.compare import probe
from fewbits.errors import FewbitsError
from fewbits.measure.llama_cpp_engine import engine_version
from fewbits.memory import Hardware, MemoryReport, detect, memory
from fewbits.report.schema import Footprint, Speed, Timing

PROMPT, GENERATION, REPEATS = 512, 64, 5
MIB = 2**20
BUFFERS = {
    "weights": r"(?!\S*REPACK)\S+ model buffer size",
    "rearranged": r"\S*REPACK\S* model buffer size",
    "kv_cache": r"\S+ KV buffer size",
    "recurrent_state": r"\S+ (?:RS|DSV4 \S+ state) buffer size",
    "compute": r"\S+ compute buffer size",
    "output": r"\S+ +output buffer size",
}
"""How llama.cpp prints its buffers (src/llama-model.cpp, llama-kv-cache.cpp, llama-memory-recurrent.cpp,
llama-context.cpp; seen with llama-cpp-python 0.3.36)."""
PARTS = ("weights", "kv_cache", "recurrent_state", "compute")


@dataclass(frozen=True)
class Trial:
    """What is tried out of each candidate.

    Attributes:
        speed: tokens a second.
        peak_memory: what is reserved and touched.
        kv: type of the KV cache, None for f16.
        threads: of the engine.
    """

    speed: bool
    peak_memory: bool
    kv: str | None
    threads: int

    @property
    def wanted(self) -> bool:
        return self.speed or self.peak_memory

    def check(self, any_gguf: bool) -> None:
        """Refuse what cannot be done, before any work.

        Args:
            any_gguf: whether one candidate is a GGUF file.

        Raises:
            FewbitsError: no engine is installed, or it runs none of the candidates.
        """
        if not self.wanted:
            return
        if find_spec("llama_cpp") is None:
            raise FewbitsError(
                "Speed and peak memory are measured in llama.cpp, which is not installed.",
                'Install it with: pip install "fewbits[llama]".',
            )
        if not any_gguf:
            raise FewbitsError(
                "Speed and peak memory are measured in llama.cpp, and no candidate is a GGUF file.",
                "Leave out --speed and --peak-memory.",
            )

    @cached_property
    def machine(self) -> Hardware:
        """This machine, without its graphics cards."""
        return replace(detect(), gpus=(), unified=False)

    def run(self, model: Model, context: int) -> tuple[Speed | None, Footprint | None, list[str]]:
        """Try a candidate out.

        Args:
            context: tokens for which memory is measured.

        Returns:
            What was asked for, None where it cannot be had, and complaints.
        """
        if not self.wanted or not isinstance(model.checkpoint, GGUFCheckpoint):
            return None, None, []
        longest = model.config.get("max_position_embeddings")
        room = min(PROMPT, longest) if isinstance(longest, int) else PROMPT
        context = context if self.peak_memory else room
        try:
            predicted = memory(model.path, context=context, kv=self.kv or "f16", hardware=self.machine)
        except FewbitsError as error:
            return None, None, [f"not tried out: what memory it takes is not known: {error}"]
        if predicted.total - predicted.margin > self.machine.ram:
            gigabytes = f"{(predicted.total - predicted.margin) / 1e9:.1f} GB at a context of {context}"
            return None, None, [f"not tried out: it takes {gigabytes}, the machine has {self.machine.ram / 1e9:.1f}"]
        request = {
            "path": str(model.path),
            "context": context,
            "threads": self.threads,
            "kv": GGML_TYPES[self.kv.upper()] if self.kv else None,
            "prompt": min(room, context),
            "generation": min(GENERATION, room, context),
            "repeats": REPEATS if self.speed else 0,
        }
        answer, complaint = _ask(request)
        if answer is None:
            return None, None, [f"not tried out: {complaint}"]
        speed = self._speed(request, answer) if self.speed else None
        return speed, footprint(predicted, answer) if self.peak_memory else None, []

    def _speed(self, request: Mapping[str, Any], answer: Mapping[str, Any]) -> Speed:
        return Speed(
            engine=engine_version(),
            processor=self.machine.cpu,
            threads=self.threads,
            context=request["context"],
            prompt=timing(request["prompt"], answer["prompt"]),
            generation=timing(request["generation"], answer["generation"]),
        )


def timing(n_tokens: int, seconds: Sequence[float]) -> Timing:
    """Tokens a second from the seconds of each run."""
    rates = [n_tokens / max(each, 1e-9) for each in seconds]
    return Timing(n_tokens=n_tokens, runs=len(rates), median=median(rates), low=min(rates), high=max(rates))


def footprint(predicted: MemoryReport, answer: Mapping[str, Any]) -> Footprint:
    """What an engine took, beside what was predicted.

    Args:
        predicted: for the processor alone.
        answer: of `probe`.
    """
    reserved = printed(answer["log"])
    rearranged = reserved.pop("rearranged", 0)
    parts = {part: int(getattr(predicted, part)) for part in PARTS if getattr(predicted, part)}
    total, told = sum(parts.values()), sum(reserved.values())
    before, after = answer["before"], answer["after"]
    resident = mapped = None
    if before and after:
        resident = after["peak"] - before.get("resident", before["peak"])
        mapped = after["mapped"] - before["mapped"] if "mapped" in after else None
    return Footprint(
        engine=engine_version(),
        context=predicted.context,
        kv=predicted.kv,
        reserved=reserved,
        rearranged=rearranged,
        resident=resident,
        mapped=mapped,
        predicted=parts,
        deviation=total / told - 1 if told else 0.0,
        deviation_resident=total / resident - 1 if resident else None,
    )


def printed(log: str) -> dict[str, int]:
    """Bytes of the buffers that llama.cpp prints, to a hundredth of a MiB; several of a kind are added up."""
    found: dict[str, int] = {}
    for part, words in BUFFERS.items():
        sizes = [float(size) for size in re.findall(rf"(?<!\S){words} += +([\d.]+) MiB", log)]
        if any(sizes):
            found[part] = round(sum(sizes) * MIB)
    return found


def _ask(request: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The probe's answer; or None and why there is none."""
    # -P: the folder of the script must not hide modules of the same names
    command = [sys.executable, "-P", str(Path(probe.__file__))]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout), ""
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else "failed"
    return None, f"the engine {how}: {last}"
