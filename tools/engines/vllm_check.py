"""Load a checkpoint in vLLM, on the CPU.

Runs in the environment of the engine, one process a checkpoint: python vllm_check.py JOB. See run.py.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from common import Job, Logits, Outcome, check
from vllm import LLM, SamplingParams


def run(job: Job) -> tuple[Logits, Outcome]:
    """Logits of the text and a greedy continuation of the prompt."""
    start = time.perf_counter()
    llm = LLM(
        model=job.checkpoint,
        skip_tokenizer_init=True,
        dtype=job.dtype,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=1,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        disable_log_stats=True,
    )
    # -1: of the whole vocabulary; the flat form spares an object per token
    every = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
    scored = _generate(llm, job.text, every).prompt_logprobs
    greedy = SamplingParams(max_tokens=job.new_tokens, temperature=0.0, detokenize=False)
    tokens = list(_generate(llm, job.prompt, greedy).outputs[0].token_ids)
    return _dense(scored), Outcome(", ".join(sorted(_kernels(llm))), tokens, time.perf_counter() - start)


def _generate(llm: LLM, ids: list[int], params: SamplingParams) -> Any:
    return llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)[0]


def _dense(flat: Any) -> Logits:
    """The flat lists as [positions, vocabulary]; the first position has none, the token itself comes twice."""
    ids, values = np.asarray(flat.token_ids), np.asarray(flat.logprobs, np.float32)
    rows = [slice(a, b) for a, b in zip(flat.start_indices, flat.end_indices, strict=True) if b > a]
    out = np.full((len(rows), int(ids.max()) + 1), np.nan, np.float32)
    for index, row in enumerate(rows):
        out[index, ids[row]] = values[row]
    if np.isnan(out).any():
        raise SystemExit("vLLM left tokens of the vocabulary out")
    return out


def _kernels(llm: LLM) -> set[str]:
    """Names of the classes that multiply by the matrices of the first decoder block."""

    def names(model: Any) -> set[str]:
        found = set()
        for name, module in model.named_modules():
            if ".layers.0." in name and name.endswith("_proj"):
                method = getattr(module, "quant_method", None)
                scheme = getattr(module, "scheme", None)
                kernel = getattr(scheme or method, "kernel", None)
                found.add(type(kernel or scheme or method).__name__)
        return found

    return set().union(*llm.apply_model(names))


if __name__ == "__main__":
    check(run, __doc__)
