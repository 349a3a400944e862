"""The packers of the specs beside the checkout, whose output real engines have read (checkpoints.md, section 1)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def load(shared_dir: Path) -> ModuleType:
    """specs/reference/packing.py as a module."""
    spec = importlib.util.spec_from_file_location("packing_oracle_of_specs", shared_dir / "specs/reference/packing.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
