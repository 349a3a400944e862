"""Runs with --device: every step that has a way of its own there takes it, and the result is as good as without.

The device is torch's processor by another name, and Triton's kernels are interpreted.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fewbits
from fewbits.errors import FewbitsError
from tiny_models import save_tiny
from triton_interpreter import interpreted

pytest.importorskip("triton", reason="Triton is for Linux only")

MAKE = """
import importlib, json, sys
import numpy as np
import fewbits
from fewbits.calibration import run
from fewbits.forward import streamed
from fewbits.kernels import feedback_triton, groups_triton
from fewbits.methods import gptq_torch, group_search_torch

run.resolve_device = lambda wanted: {"cuda": "cpu:0"}.get(wanted, wanted)
importlib.import_module("fewbits.quantize.blockwise").rough_products = lambda device: False  # as on a GPU
streamed.BATCH_TOKENS = 1024  # some batches are held out, to choose the damping by
used = set()

def watched(module, name):
    function = getattr(module, name)
    def call(*given):
        used.add(name)
        return function(*given)
    setattr(module, name, call)

for module, name in (
    (feedback_triton, "round_columns"), (groups_triton, "search_scales"), (groups_triton, "search_pairs"),
    (gptq_torch, "inverted"), (gptq_torch, "expected_loss"), (gptq_torch, "feed"),
    (group_search_torch, "picked_candidates"),
):
    watched(module, name)

model, target, text, here, there = sys.argv[1:]
told = {}
for device, out in (("cpu", here), ("cuda", there)):
    made = fewbits.quantize(
        model, target, out, calibration=text, calibration_chunks=8, device=device, threads=1, overwrite=True
    )
    truth, found = fewbits.open(model), fewbits.open(out)
    names = [name for name in truth.names if truth.read(name).ndim == 2]
    told[device] = {name: float(np.square(found.read(name) - truth.read(name)).sum()) for name in names}
    told["same"] = {name: float((found.read(name) == told[name]).mean()) for name in names if name in told}
    told |= {name: found.read(name) for name in names}
print(json.dumps({"used": sorted(used), "same": told["same"], "cpu": told["cpu"], "cuda": told["cuda"]}))
"""
FACTORS = {"inverted", "expected_loss"}
FED = FACTORS | {"feed", "round_columns"}


@pytest.mark.parametrize(
    ("target", "used"),
    [
        ("gptq:w4g32", FED | {"search_scales"}),
        ("awq:w4g32", {"search_pairs", "picked_candidates"}),
        ("Q4_0", FED),
    ],
)
def test_a_run_elsewhere_is_the_run_here_but_for_rounding(
    target: str, used: set[str], tmp_path: Path, texts: tuple[Path, Path]
) -> None:
    model = save_tiny(tmp_path / "model", "llama", {"num_hidden_layers": 1})
    told = json.loads(interpreted(MAKE, model, target, texts[0], tmp_path / "here.gguf", tmp_path / "there.gguf"))
    assert set(told["used"]) == used
    assert np.mean(list(told["same"].values())) > 0.99, told["same"]
    for name, here in told["cpu"].items():
        assert told["cuda"][name] == pytest.approx(here, rel=0.01)


def test_a_device_without_effect_or_that_is_not_there_is_refused(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    model = save_tiny(tmp_path / "model", "llama", {"num_hidden_layers": 1})
    for options, told in (
        ({"device": "cuda"}, "no effect"),
        ({"device": "tpu", "calibration": texts[0]}, "no device 'tpu'"),
    ):
        with pytest.raises(FewbitsError, match=told):
            fewbits.quantize(model, "Q4_0", tmp_path / "out.gguf", **options)
    assert not list(tmp_path.glob("out*"))
