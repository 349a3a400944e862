"""What the result of a run follows from: see `formats.facts`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbits.checkpoint import Checkpoint
from fewbits.forward.identity import digests, model_facts
from fewbits.quantize.budget import Budget
from fewbits.version import __version__

if TYPE_CHECKING:
    from fewbits.calibration.texts import CalibrationText


def common_facts(
    checkpoint: Checkpoint, target: str, effort: str, budget: Budget | None, edited: Path | None
) -> dict[str, Any]:
    """Those of every run."""
    return {
        "version": __version__,
        "target": target,
        "effort": effort,
        "budget": {name: value for name, value in asdict(budget).items() if value} if budget else None,
        "saved plan": digests([edited]) if edited else None,
        "model": model_facts(checkpoint),
    }


def text_facts(text: CalibrationText | None, threads: int | None, device: str = "cpu") -> dict[str, Any]:
    """Those of a run that takes a text through the model: sums of products are split among threads."""
    if text is None:
        return {}
    import torch

    from fewbits.quantize.blockwise import rough_products

    return {
        **text.facts,
        "device": device,
        "threads": threads or os.cpu_count() or 1,
        "torch": str(torch.__version__),
        "products in bfloat16": rough_products(device),
    }
