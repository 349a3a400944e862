"""Load a checkpoint in transformers with GPTQModel's kernels, on the CPU.

Runs in the environment of the engine, one process a checkpoint: python gptqmodel_check.py JOB. See run.py.
"""

from __future__ import annotations

import time

import torch
from common import Job, Logits, Outcome, check
from transformers import AutoModelForCausalLM


def run(job: Job) -> tuple[Logits, Outcome]:
    """Logits of the text and a greedy continuation of the prompt."""
    start = time.perf_counter()
    dtype = getattr(torch, job.dtype)
    model = AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=dtype, device_map="cpu").eval()
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
