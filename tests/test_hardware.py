"""What a machine is said to have: asked of tools whose output is recorded, or named from the table of cards."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbits.errors import FewbitsError
from fewbits.memory.cards import CARDS
from fewbits.memory.hardware import Hardware, amd, apple, detect, named, nvidia, parse_memory, run_tool

GIB, MIB = 2**30, 2**20

SMI = "NVIDIA GeForce RTX 4090, 24564, 8.9\nNVIDIA GeForce RTX 3060, 12288, 8.6\n"
ROCM = """{"card0": {"VRAM Total Memory (B)": "25753026560", "VRAM Total Used Memory (B)": "27254784",
 "Card Series": "Radeon RX 7900 XTX", "Card Model": "0x744c", "GFX Version": "gfx1100"},
 "system": {"Driver version": "6.7.0"}}"""


def tools(**answers: str | None) -> Callable[[Sequence[str]], str | None]:
    """Vendors' tools that print what they once printed on a real machine."""
    return lambda command: answers.get(command[0].replace("-", "_"))


def test_this_machine() -> None:
    machine = detect()
    assert machine.cores >= 1 and machine.cores <= (os.cpu_count() or 1)
    assert machine.ram > 256 * MIB
    assert machine.cpu
    if platform.machine() == "x86_64":
        assert machine.simd in ("avx512f", "avx2", "avx", "")
    assert isinstance(machine, Hardware)


def test_nvidia_cards() -> None:
    first, second = nvidia(tools(nvidia_smi=SMI))
    assert (first.name, first.kind, first.vram, first.arch) == (
        "NVIDIA GeForce RTX 4090",
        "nvidia",
        24564 * MIB,
        "8.9",
    )
    assert first.bandwidth == 1008 * 10**9
    assert second.vram == 12 * GIB
    assert detect(tools(nvidia_smi=SMI)).vram == first.vram + second.vram


def test_drivers_that_do_not_know_compute_capabilities() -> None:
    def old(command: Sequence[str]) -> str | None:
        return None if "compute_cap" in command[1] else "Tesla P40, 24576\n"

    (card,) = nvidia(old)
    assert (card.vram, card.arch) == (24 * GIB, "")


def test_amd_cards() -> None:
    (card,) = amd(tools(rocm_smi=ROCM))
    assert (card.kind, card.vram, card.arch) == ("amd", 25753026560, "gfx1100")
    assert card.bandwidth == 960 * 10**9


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"card0": 3}', '{"card0": {"VRAM Total Memory (B)": "N/A"}}'])
def test_nonsense_from_a_tool_is_no_card(text: str) -> None:
    assert amd(tools(rocm_smi=text)) == ()
    assert nvidia(tools(nvidia_smi=text)) == ()
    assert detect(tools(rocm_smi=text, nvidia_smi=text)).gpus in ((), detect().gpus)


def test_apple_shares_its_memory() -> None:
    assert apple("Apple M3 Max", 36 * GIB).vram == 24 * GIB
    assert apple("Apple M3 Max", 64 * GIB).vram == 48 * GIB
    machine = named("M3 Max", "64GB")
    assert machine.unified and machine.ram == 64 * GIB and machine.vram == 48 * GIB
    assert machine.gpus[0].bandwidth == 400 * 10**9


def test_tools_that_are_missing_or_fail(tmp_path: Path) -> None:
    assert run_tool(["no-such-tool-anywhere"]) is None
    assert run_tool(["false"]) is None
    assert run_tool(["echo", "yes"]) == "yes\n"


@pytest.mark.parametrize(
    ("name", "card", "size"),
    [
        ("RTX 4090", "RTX 4090", 24),
        ("rtx4090", "RTX 4090", 24),
        ("4090", "RTX 4090", 24),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super", 16),
        ("4070 ti", "RTX 4070 Ti", 12),
        ("NVIDIA H100 80GB HBM3", "H100", 80),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB", 80),
        ("NVIDIA A100-SXM4-40GB", "A100", 40),
        ("AMD Radeon RX 7900 XTX", "RX 7900 XTX", 24),
        ("Radeon RX 7900 XT", "RX 7900 XT", 20),
        ("MI300X", "Instinct MI300X", 192),
    ],
)
def test_cards_by_the_names_people_use(name: str, card: str, size: int) -> None:
    if card.startswith("Instinct"):
        name = f"Instinct {name}"
    found = named(name)
    assert found.gpus[0].name == card
    assert found.vram == size * GIB


def test_several_cards() -> None:
    assert named("2x RTX 3090").vram == 48 * GIB
    assert len(named("4 * A100 80GB").gpus) == 4


def test_programs_get_a_little_less() -> None:
    assert named("RTX 4090").usable_vram / MIB == pytest.approx(24077, rel=0.001)
    assert named("M3 Max", "64GB").usable_vram == 48 * GIB


def test_memory_goes_before_the_table() -> None:
    assert named("RTX 3080", "12GB").vram == 12 * GIB
    assert named("a card of tomorrow", "48GB").vram == 48 * GIB
    assert named(None, "8GB").gpus[0].vram == 8 * GIB
    assert named("none").gpus == ()
    assert named("none", "64GB").ram == 64 * GIB


def test_unknown_cards_get_the_nearest_names() -> None:
    with pytest.raises(FewbitsError, match=r"Unknown card 'RTX 4095'. Nearest: RTX 4090") as caught:
        named("RTX 4095")
    assert "--memory 24GB" in caught.value.hint
    with pytest.raises(FewbitsError, match="Say how much it has"):
        named("qqq")


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0GB", "a lot", "1e3GB", "24 cows"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(FewbitsError, match="no size of memory"):
        parse_memory(text)


@given(st.integers(1, 4096), st.sampled_from(["GB", "GiB", "gb", "G", " GB"]))
def test_memory_is_sold_in_powers_of_two(count: int, unit: str) -> None:
    assert parse_memory(f"{count}{unit}") == count * GIB


def test_sizes_add_up() -> None:
    assert parse_memory("16GB+8GB") == 24 * GIB


def test_the_table_is_sound() -> None:
    assert len(CARDS) >= 60
    assert len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert 4 * GIB <= card.vram <= 512 * GIB
        assert 50 * 10**9 <= card.bandwidth <= 10**13
        assert named(card.name).gpus[0].name == card.name
