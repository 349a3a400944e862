"""Load a checkpoint in transformers with GPTQModel's kernels, on the CPU; EXL3, which transformers does not know, by
GPTQModel itself.

Runs in the environment of the engine, one process a checkpoint: python gptqmodel_check.py JOB. See run.py.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from common import Job, Logits, Outcome, check
from transformers import AutoModelForCausalLM


def load(checkpoint: str, dtype: torch.dtype) -> Any:
    config = json.loads((Path(checkpoint) / "config.json").read_text()).get("quantization_config", {})
    if config.get("quant_method") != "exl3":
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, device_map="cpu").eval()
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(checkpoint, backend=BACKEND.EXL3_TORCH, device="cpu", dtype=dtype).model.eval()


def run(job: Job) -> tuple[Logits, Outcome]:
    """Logits of the text and a greedy continuation of the prompt."""
    start = time.perf_counter()
    model = load(job.checkpoint, getattr(torch, job.dtype))
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}
    with torch.inference_mode():
        logits = model(torch.tensor([job.text])).logits[0, :-1].float().numpy()
        prompt = torch.tensor([job.prompt])
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=job.new_tokens, do_sample=False
        )
    tokens = out[0, len(job.prompt) :].tolist()
    return logits, Outcome(", ".join(sorted(kinds)), tokens, time.perf_counter() - start)


if __name__ == "__main__":
    check(run, __doc__)
