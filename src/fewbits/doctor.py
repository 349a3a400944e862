"""Is the installation sound, and what does this machine offer?"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from fewbits.codecs import CODECS
from fewbits.version import __version__

NEEDED = ("torch", "transformers", "gguf", "numba", "tokenizers", "safetensors")
OPTIONAL = {"llama_cpp": ("llama-cpp-python", "runs and measures GGUF files in the real engine")}


class Check(BaseModel):
    """One line of the diagnosis; `state` is ok, missing (optional) or broken."""

    model_config = ConfigDict(extra="forbid")
    name: str
    state: str
    detail: str


class Diagnosis(BaseModel):
    """All checks."""

    model_config = ConfigDict(extra="forbid")
    checks: list[Check]

    @property
    def healthy(self) -> bool:
        return all(check.state != "broken" for check in self.checks)


def doctor() -> Diagnosis:
    """Check versions, engines, cores and memory, and send a matrix through every kernel."""
    checks = [
        Check(name="fewbits", state="ok", detail=__version__),
        Check(name="python", state="ok", detail=f"{platform.python_version()} on {platform.platform()}"),
        Check(name="processor", state="ok", detail=f"{os.cpu_count()} cores, {_simd()}"),
        Check(name="memory", state="ok", detail=_memory()),
        Check(
            name="temporary folder",
            state="ok",
            detail=f"{shutil.disk_usage(tempfile.gettempdir()).free / 1e9:.1f} GB free",
        ),
    ]
    checks += [_package(name, name, "needed") for name in NEEDED]
    checks += [_package(module, name, use) for module, (name, use) in OPTIONAL.items()]
    return Diagnosis(checks=[*checks, _kernels()])


def _package(module: str, name: str, use: str) -> Check:
    if importlib.util.find_spec(module) is None:
        state = "missing" if module in OPTIONAL else "broken"
        return Check(name=name, state=state, detail=f"not installed: {use}")
    try:
        found = version(name)
    except PackageNotFoundError:
        found = "version unknown"
    return Check(name=name, state="ok", detail=found)


def _kernels() -> Check:
    weights = np.random.default_rng(0).normal(size=(2, 512)).astype(np.float32)
    for codec in CODECS.values():
        error = np.abs(codec.decode(codec.encode(weights)) - weights).max()
        # one bit with its scale keeps even the rarest of these normal variables within four standard deviations
        if not error < 4:
            return Check(name="kernels", state="broken", detail=f"{codec.name} comes back with an error of {error}")
    return Check(name="kernels", state="ok", detail=f"{len(CODECS)} types round trip")


def _simd() -> str:
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    except (OSError, IndexError):
        return platform.machine()
    best = next((name for name in ("avx512f", "avx2", "avx", "sse4_2") if name in flags), "")
    return f"{platform.machine()} {best}".strip()


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    except (AttributeError, ValueError, OSError):
        return "unknown"
