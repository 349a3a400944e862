"""What runs on a card must have all of its tensors there: whole runs on a device that refuses what a card refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elsewhere import NAME, elsewhere
from tiny_models import save_tiny
from triton_interpreter import interpreted

MAKE = """
import importlib, sys
from pathlib import Path
import fewbits
from fewbits.calibration import run
from fewbits.forward import streamed
from fewbits.kernels import feedback_triton, groups_triton, viterbi_triton
from elsewhere import There, elsewhere, runs_there

run.resolve_device = lambda wanted: wanted
importlib.import_module("fewbits.quantize.blockwise").rough_products = lambda device: False  # as on a GPU
streamed.BATCH_TOKENS = 1024
kernels = ((feedback_triton, "round_columns"), (groups_triton, "search_scales"), (groups_triton, "search_pairs"))
for module, name in (*kernels, (viterbi_triton, "walk")):
    setattr(module, name, runs_there(getattr(module, name)))

model, text, folder, *targets = sys.argv[1:]
for target in targets:
    with elsewhere():
        effort = "fast" if target.startswith(("aqlm", "quip")) else "default"
        options = {"calibration": text, "calibration_chunks": 4, "device": "cuda", "threads": 1, "effort": effort}
        fewbits.quantize(model, target, Path(folder, target.replace(":", "-")), **options)
    print(target, There.made > 0)
    There.made = 0
"""
SIZES = {"num_hidden_layers": 1, "intermediate_size": 128}


@pytest.mark.parametrize(
    "targets", [("gptq:w4g32", "awq:w4g32", "exl2:4.0", "quip:2"), ("IQ3_XXS", "aqlm:1x8g8", "Q4_0")]
)
def test_no_tensor_is_left_behind(targets: tuple[str, ...], tmp_path: Path, texts: tuple[Path, Path]) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux only")
    model = save_tiny(tmp_path / "model", "llama", SIZES)
    told = interpreted(MAKE, model, texts[0], tmp_path, *targets)
    assert told.split() == [word for target in targets for word in (target, "True")]


def test_the_device_refuses_what_a_card_refuses() -> None:
    here = torch.arange(6.0).view(2, 3)
    with elsewhere():
        there = here.to(NAME)
        assert there.device.type == NAME and torch.zeros(2, device=NAME).device.type == NAME
        assert torch.equal((there @ there.T + 1)[:1].cpu(), (here @ here.T + 1)[:1])
        there[0] = 7.0
        assert there.cpu()[0, 0] == 7
        for wrong in (lambda: there + here, lambda: there @ here.T, lambda: there[:, torch.tensor([0])]):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
