"""Common graphics cards and Apple chips: memory, bandwidth, architecture. Makers' data sheets, 2026-10."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DATE = "2026-10"


@dataclass(frozen=True)
class Card:
    """One card as it is sold.

    Attributes:
        vram: bytes; of Apple chips the most common size of the shared memory.
        bandwidth: bytes a second.
        arch: compute capability, AMD's target or the chip.
    """

    name: str
    kind: Literal["nvidia", "amd", "apple", "intel"]
    vram: int
    bandwidth: int
    arch: str


_TABLE: tuple[tuple[Literal["nvidia", "amd", "apple", "intel"], str, str], ...] = (
    (
        "nvidia",
        "12.0",
        """
        RTX 5090: 32 1792; RTX 5080: 16 960; RTX 5070 Ti: 16 896; RTX 5070: 12 672; RTX 5060 Ti 16GB: 16 448;
        RTX 5060 Ti 8GB: 8 448; RTX 5060: 8 448; RTX PRO 6000: 96 1792; RTX PRO 5000: 48 1344
        """,
    ),
    ("nvidia", "12.1", "DGX Spark: 128 273"),
    (
        "nvidia",
        "8.9",
        """
        RTX 4090: 24 1008; RTX 4080 Super: 16 736; RTX 4080: 16 717; RTX 4070 Ti Super: 16 672; RTX 4070 Ti: 12 504;
        RTX 4070 Super: 12 504; RTX 4070: 12 504; RTX 4060 Ti 16GB: 16 288; RTX 4060 Ti: 8 288; RTX 4060: 8 272;
        RTX 4090 Laptop: 16 576; RTX 4060 Laptop: 8 256; RTX 4050 Laptop: 6 192;
        RTX 6000 Ada: 48 960; RTX 4000 Ada: 20 360; L40S: 48 864; L40: 48 864; L4: 24 300
        """,
    ),
    (
        "nvidia",
        "8.6",
        """
        RTX 3090 Ti: 24 1008; RTX 3090: 24 936; RTX 3080 Ti: 12 912; RTX 3080 12GB: 12 912; RTX 3080: 10 760;
        RTX 3070 Ti: 8 608; RTX 3070: 8 448; RTX 3060 Ti: 8 448; RTX 3060: 12 360; RTX 3050: 8 224;
        RTX A6000: 48 768; RTX A5000: 24 768; RTX A4000: 16 448; A40: 48 696; A10: 24 600; A10G: 24 600
        """,
    ),
    ("nvidia", "8.0", "A100 80GB: 80 2039; A100-SXM4-80GB: 80 2039; A100: 40 1555; A30: 24 933"),
    ("nvidia", "9.0", "H200: 141 4800; H100 NVL: 94 3900; H100: 80 3350; GH200: 96 4000"),
    ("nvidia", "10.0", "B200: 180 8000; B100: 180 8000"),
    ("nvidia", "10.3", "B300: 270 8000"),
    (
        "nvidia",
        "7.5",
        """
        RTX 2080 Ti: 11 616; RTX 2080: 8 448; RTX 2070: 8 448; RTX 2060: 6 336; GTX 1660: 6 192; T4: 16 320
        """,
    ),
    ("nvidia", "7.0", "V100 32GB: 32 900; V100: 16 900"),
    ("nvidia", "6.1", "GTX 1080 Ti: 11 484; GTX 1080: 8 320; GTX 1070: 8 256; GTX 1060: 6 192; P40: 24 346"),
    ("amd", "gfx1201", "RX 9070 XT: 16 640; RX 9070: 16 640; AI PRO R9700: 32 640"),
    ("amd", "gfx1200", "RX 9060 XT: 16 320"),
    ("amd", "gfx1100", "RX 7900 XTX: 24 960; RX 7900 XT: 20 800; RX 7900 GRE: 16 576; PRO W7900: 48 864"),
    ("amd", "gfx1101", "RX 7800 XT: 16 624; RX 7700 XT: 12 432"),
    ("amd", "gfx1102", "RX 7600 XT: 16 288; RX 7600: 8 288"),
    ("amd", "gfx1030", "RX 6900 XT: 16 512; RX 6800 XT: 16 512; RX 6800: 16 512; RX 6700 XT: 12 384"),
    ("amd", "gfx1151", "Ryzen AI Max+ 395: 96 256"),
    ("amd", "gfx942", "Instinct MI300X: 192 5300; Instinct MI325X: 256 6000"),
    ("amd", "gfx950", "Instinct MI355X: 288 8000"),
    ("amd", "gfx90a", "Instinct MI250X: 128 3277; Instinct MI210: 64 1638"),
    ("intel", "xe2", "Arc B580: 12 456; Arc B570: 10 380"),
    ("intel", "xe", "Arc A770: 16 560; Arc A750: 8 512"),
    (
        "apple",
        "",
        """
        M1: 16 68; M1 Pro: 16 200; M1 Max: 32 400; M1 Ultra: 64 800; M2: 16 100; M2 Pro: 16 200; M2 Max: 32 400;
        M2 Ultra: 64 800; M3: 16 100; M3 Pro: 18 150; M3 Max: 36 400; M3 Ultra: 96 819; M4: 16 120; M4 Pro: 24 273;
        M4 Max: 36 546; M5: 16 153
        """,
    ),
)
"""Name: memory in GiB, bandwidth in GB/s; by maker and architecture."""


def _cards() -> tuple[Card, ...]:
    found = []
    for kind, arch, text in _TABLE:
        for entry in " ".join(text.split()).split("; "):
            name, _, figures = entry.rpartition(": ")
            size, speed = figures.split()
            found.append(Card(name, kind, int(size) * 2**30, int(speed) * 10**9, arch or name))
    return tuple(found)


CARDS = _cards()
