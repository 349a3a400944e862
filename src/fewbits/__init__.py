"""fewbits: turn any language model into any few-bit format, know beforehand how big it gets, measure what it lost."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fewbits.errors import FewbitsError
from fewbits.version import __version__

if TYPE_CHECKING:
    from fewbits.advise import advise
    from fewbits.api import inspect, open, plan, quantize
    from fewbits.calibration.run import calibrate
    from fewbits.capabilities import capabilities
    from fewbits.compare import compare
    from fewbits.doctor import doctor
    from fewbits.export import export_ollama
    from fewbits.generate import generate as run
    from fewbits.measure import measure
    from fewbits.memory import memory
    from fewbits.verify import verify

__all__ = [
    "FewbitsError",
    "__version__",
    "advise",
    "calibrate",
    "capabilities",
    "compare",
    "doctor",
    "export_ollama",
    "inspect",
    "measure",
    "memory",
    "open",
    "plan",
    "quantize",
    "run",
    "verify",
]

# torch and transformers take seconds to import: a verb pays only for what it uses
_VERBS = {
    **{name: ("fewbits.api", name) for name in ("inspect", "open", "plan", "quantize")},
    "advise": ("fewbits.advise", "advise"),
    "calibrate": ("fewbits.calibration.run", "calibrate"),
    "capabilities": ("fewbits.capabilities", "capabilities"),
    "compare": ("fewbits.compare", "compare"),
    "doctor": ("fewbits.doctor", "doctor"),
    "export_ollama": ("fewbits.export", "export_ollama"),
    "measure": ("fewbits.measure", "measure"),
    "memory": ("fewbits.memory", "memory"),
    "run": ("fewbits.generate", "generate"),
    "verify": ("fewbits.verify", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'fewbits' has no attribute {name!r}")
    module, attribute = _VERBS[name]
    return getattr(import_module(module), attribute)


class _Package(ModuleType):
    """Some verbs are named like the subpackage that they live in: the verb keeps the name when that is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _VERBS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
