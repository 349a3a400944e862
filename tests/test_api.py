"""The verbs as Python functions."""

from __future__ import annotations

import importlib
import subprocess
import sys

import fewbits


def test_every_verb_is_a_function_whatever_was_imported_before() -> None:
    for module in ("measure", "plan", "quantize"):
        importlib.import_module(f"fewbits.{module}")
    for name in fewbits.__all__:
        if name not in ("FewbitsError", "__version__"):
            assert callable(getattr(fewbits, name)), name
            assert callable(getattr(fewbits, name)), name


def test_quantizing_needs_no_torch() -> None:
    """torch and transformers cost seconds and hundreds of megabytes that a big job does not have."""
    code = "import fewbits, sys; fewbits.quantize; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
