"""docs/memory.md: its answers are made by `python tests/test_memory_docs.py`, and right by hand calculation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from fewbits.memory import GPU, Described, Hardware, MemoryReport, describe, memory
from fewbits.memory.weights import RECOMMENDED
from test_memory_published import EXACT, NEAR

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "memory.md"
MIB, GIB = 2**20, 2**30
CONTEXT = 16384
CARDS = (8, 12, 24, 80)
MODELS = {
    "Llama-3-8B": "llama-3-8b",
    "Qwen3-30B-A3B": "qwen3-30b-a3b",
    "Gemma-3-27B": "gemma-3-27b",
    "DeepSeek-V3": "deepseek-v3",
}


@cache
def known(name: str) -> Described:
    return describe(ROOT / "tests" / "data" / "memory" / f"{MODELS[name]}.json")


def card(gib: int) -> Hardware:
    """A card, in a machine with RAM for anything."""
    return Hardware("", 8, "avx2", 2**50, (GPU(f"{gib} GB", "nvidia", gib * GIB),))


def ask(name: str, target: str, gib: int) -> MemoryReport:
    return memory(known(name), target=target, context=CONTEXT, hardware=card(gib))


def rows() -> Iterator[str]:
    yield "| model | card | largest level all on it | GPU MiB | or Q4_K_M, partly in RAM |"
    yield "|---|---|---|---|---|"
    for name in MODELS:
        for gib in CARDS:
            found = ((level, ask(name, level, gib)) for level in ("BF16", *RECOMMENDED))
            level, report = next(((level, report) for level, report in found if report.fits), ("-", None))
            gpu = report.device("GPU") if report else None
            needs = f"{round(gpu.needed / MIB):,}" if gpu else ""
            yield f"| {name} | {gib} GB | {level} | {needs} | {partly(name, gib)} |"


def partly(name: str, gib: int) -> str:
    """What can be done where Q4_K_M does not fit."""
    report = ask(name, "Q4_K_M", gib)
    if report.fits:
        return ""
    ways = []
    for lever in report.levers:
        if lever.name in ("experts in RAM", "partial offload"):
            what = lever.name if lever.name == "experts in RAM" else lever.change.split(" on the GPU")[0]
            ways.append(f"{what}: {lever.gpu / GIB:.1f} + {lever.host / GIB:.1f} GiB")
    return "; ".join(ways) or "-"


def comparisons() -> Iterator[str]:
    yield "| what | published | ours | off |"
    yield "|---|---|---|---|"
    for what, (ours, published) in {**EXACT, **NEAR}.items():
        value = ours()
        figure = f"{value:,.2f}" if published < 100 else f"{value:,.0f}"
        yield f"| {what} | {published:,} | {figure} | {value / published - 1:+.1%} |".replace("-0.0%", "+0.0%")


TABLES = {"answers": rows, "published": comparisons}


@pytest.mark.parametrize("table", TABLES)
def test_the_page_is_generated(table: str) -> None:
    shown = PAGE.read_text().split(f"<!-- {table} -->")[1].split(f"<!-- end of {table} -->")[0].strip()
    assert shown == "\n".join(TABLES[table]()), "run: python tests/test_memory_docs.py"


# ------------------------------------------------------------------------------------------- by hand calculation

Q4_K, Q6_K, Q8_0, Q5_0, F32 = 144 / 256, 210 / 256, 34 / 32, 22 / 32, 4
RUNTIME, MARGIN, USABLE = 450 * MIB, 1024 * MIB, 0.98


def finer(layers: int) -> int:
    """Layers whose values and down projections Q4_K_M gives Q6_K: the first and last eighth, every third between."""
    eighth = layers // 8
    return sum(i < eighth or i >= 7 * layers // 8 or (i - eighth) % 3 == 2 for i in range(layers))


def llama() -> float:
    """32 blocks of 4096, 8 of 32 heads kept, 14336 wide; logits of 512 tokens and two copies of the stream."""
    fine, coarse = finer(32), 32 - finer(32)
    same = 4096 * (4096 + 4096 + 1024 + 2 * 14336) * Q4_K + 2 * 4096 * F32
    mixed = 4096 * (1024 + 14336)
    weights = 32 * same + mixed * (fine * Q6_K + coarse * Q4_K) + 128256 * 4096 * Q6_K + 4096 * F32
    return weights + CONTEXT * 32 * 2 * 1024 * 2 + 512 * (128256 + 2 * 4096) * 4


def qwen() -> float:
    """48 blocks of 2048 with 128 experts of 768; 4 of 32 heads of 128 kept; a router and two norms of heads."""
    fine, coarse = finer(48), 48 - finer(48)
    same = 2048 * (4096 + 4096 + 512) * Q4_K + 2 * 128 * 768 * 2048 * Q4_K
    same += (128 * 2048 + 2 * 2048 + 2 * 128) * F32
    mixed = 2048 * 512 + 128 * 768 * 2048
    weights = 48 * same + mixed * (fine * Q6_K + coarse * Q4_K) + 151936 * 2048 * Q6_K + 2048 * F32
    return weights + CONTEXT * 48 * 2 * 512 * 2 + 512 * (151936 + 2 * 2048) * 4


def gemma() -> float:
    """62 blocks of 5376, 16 of 32 heads of 128 kept, 21504 wide; ten layers see all, 52 a window of 1024 and a step."""
    fine, coarse = finer(62), 62 - finer(62)
    same = 5376 * (4096 + 4096 + 2048 + 2 * 21504) * Q4_K + (4 * 5376 + 2 * 128) * F32
    mixed = 5376 * (2048 + 21504)
    weights = 62 * same + mixed * (fine * Q6_K + coarse * Q4_K) + 262208 * 5376 * Q6_K + 5376 * F32
    cells = 10 * CONTEXT + 52 * (1024 + 512)
    return weights + cells * 2 * 2048 * 2 + 512 * (262208 + 2 * 5376) * 4


def deepseek() -> float:
    """61 blocks of 7168, three of them dense, 256 experts of 2048 and a shared one; a latent vector of 576 kept."""
    fine = [i for i in range(61) if i < 7 or i >= 53 or (i - 7) % 3 == 2]
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 128 * 128 * 512 + 128 * 128 * 7168
    same = attention * Q4_K + 128 * 512 * 128 * Q5_0 + (1536 + 512 + 2 * 7168) * F32
    dense = 7168 * 18432
    sparse = 7168 * 2048 * 257
    weights = 61 * same + 58 * (256 * 7168 + 256) * F32 + 2 * (3 * dense + 58 * sparse) * Q4_K
    for index in range(61):
        weights += (dense if index < 3 else sparse) * (Q6_K if index in fine else Q4_K)
    weights += 129280 * 7168 * Q6_K + 7168 * F32
    # the largest moment: queries of 576 and what attention gives, of 512, before the heads are brought back
    compute = 512 * 4 * (128 * (576 + 512 + 192 + 128) + 4 * 7168) + 512 * CONTEXT * 2
    return weights + CONTEXT * 61 * 576 * 2 + compute


HAND = {"Llama-3-8B": llama, "Qwen3-30B-A3B": qwen, "Gemma-3-27B": gemma, "DeepSeek-V3": deepseek}


@pytest.mark.parametrize("name", MODELS)
def test_by_hand(name: str) -> None:
    """Everything on the GPU at Q4_K_M, embeddings in RAM; what is left free and the driver's share on top."""
    gpu = ask(name, "Q4_K_M", 1024).device("GPU")
    assert gpu is not None
    assert gpu.needed == pytest.approx(HAND[name]() + RUNTIME + MARGIN, rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_verdicts_by_hand(name: str) -> None:
    for gib in CARDS:
        assert ask(name, "Q4_K_M", gib).fits == (HAND[name]() + RUNTIME + MARGIN <= gib * GIB * USABLE)


if __name__ == "__main__":
    text = PAGE.read_text()
    for name, made in TABLES.items():
        first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
        text = re.sub(f"{first}.*?{last}", "\n".join([first, *made(), last]), text, flags=re.DOTALL)
    PAGE.write_text(text)
