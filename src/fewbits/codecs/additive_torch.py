"""What additive codes stand for, with gradients: apart, since torch takes a second to import."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fewbits.codecs.additive import Codes
from fewbits.kernels.additive import add_words, collect_words


class Decode(torch.autograd.Function):
    """float32 [out, in] of codebooks, float32 [codebooks, codewords, group], and scales, float32 [out]."""

    @staticmethod
    def forward(ctx: Any, words: torch.Tensor, scales: torch.Tensor, codes: Codes) -> torch.Tensor:
        ctx.save_for_backward(words, scales)
        ctx.codes = codes
        return torch.from_numpy(_sums(words, scales, codes)).to(words.device)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        words, scales = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        to_words = np.zeros(tuple(words.shape), np.float32)
        collect_words(ctx.codes, gradient.cpu().numpy(), scales.detach().cpu().numpy(), to_words)
        sums = torch.from_numpy(_sums(words, torch.ones_like(scales), ctx.codes)).to(words.device)
        return torch.from_numpy(to_words).to(words.device), (gradient * sums).sum(1), None


def _sums(words: torch.Tensor, scales: torch.Tensor, codes: Codes) -> Any:
    out = np.empty((codes.shape[0], codes.shape[1] * words.shape[2]), np.float32)
    add_words(codes, words.detach().cpu().numpy(), scales.detach().cpu().numpy(), out)
    return out
