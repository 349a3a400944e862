"""Programs with Triton kernels, which need a GPU, run step by step by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def interpreted(program: str, *arguments: str | Path) -> str:
    """What a program prints; in a process of its own, as the interpreter is chosen when Triton is imported."""
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()
