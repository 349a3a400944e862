"""What each part of `--effort default` brings: GGUF files made without one part at a time, measured in llama.cpp.

    python benchmarks/ablation.py MODEL --bin DIR --work DIR --text wiki.test.raw \\
        --calibration wiki.valid.raw --calibration c4.txt --levels Q4_0 Q2_K

Options and rows are those of quality.py, whose `--work` may be named; the parts are `PARTS`. Levels that name one type
keep it, others their size, with the types chosen freely.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from quality import ONE_TYPE, PEERS, Bench, arguments, share

from fewbits.calibration import collect
from fewbits.methods import method
from fewbits.methods.base import DAMPING, Factor
from fewbits.methods.gptq import GPTQ
from fewbits.quantize import blockwise, gguf_blockwise
from fewbits.quantize.rescaling import Rescaling

Floats = npt.NDArray[np.float32]
HEAD, TYPES = "feedback for the head", "types chosen freely"
"""What only levels bring that keep no type."""


def unquantized(_: blockwise.BlockwiseRun, name: str, arrays: dict[str, Any], weights: torch.Tensor) -> Floats:
    return weights.cpu().numpy()


def by_importance(_: Factor, importance: Floats) -> Floats:
    return importance


PARTS: dict[str, list[tuple[object, str, object]]] = {
    "error feedback": [(GPTQ, "quantize", method("search").quantize)],
    "channels rescaled (AWQ)": [(Rescaling, "__call__", lambda *_: None)],
    "each block calibrated on what the quantized ones before it give": [
        (blockwise.BlockwiseRun, "_decoded", unquantized)
    ],
    HEAD: [(gguf_blockwise, "OUTPUT", None)],
    TYPES: [],
    "scales searched with feedback in view": [(Factor, "expected", by_importance)],
    "damping by held-out text": [(blockwise, "choose_damping", lambda *_: DAMPING)],
    "tokens of great energy count less": [(blockwise, "ENERGY_CAP", None), (collect, "ENERGY_CAP", None)],
}
"""What is left out -> what is put in its place: owner, name, value."""


@contextmanager
def without(part: str) -> Iterator[None]:
    """Files are made without this part."""
    with ExitStack() as stack:
        for owner, name, value in PARTS[part]:
            stack.enter_context(patch.object(owner, name, value))
        yield


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    bench = Bench.of(options)
    texts = [text.name for text in bench.texts]
    print(f"| level | left out | {' | '.join(texts)} |")
    print("|---|---|" + "---|" * len(texts))
    for level in options.levels:
        fixed = level in ONE_TYPE
        maker = "default" if fixed else "size, default"
        full = bench.row(maker, level)
        rows = {"nothing": full}
        for part in PARTS:
            if fixed and part in (HEAD, TYPES):
                continue
            with without(part):
                rows[part] = bench.row("default" if part == TYPES else maker, level, f".without {part}")
            print(level, part, rows[part], file=sys.stderr, flush=True)
        rows["everything: llama.cpp with imatrix"] = bench.row(PEERS[1], level)
        for part, row in rows.items():
            cells = [share(row["texts"][text]["kl"], full["texts"][text]["kl"]) for text in texts]
            print(f"| {level} | {part} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
