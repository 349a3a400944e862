"""What a machine has: processor, memory, graphics cards; asked of it, or named."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from fewbits.errors import FewbitsError
from fewbits.memory.cards import CARDS, Card

GIB, MIB = 2**30, 2**20
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
USABLE = 0.98
"""Part of a card's memory that programs get: torch tells of 7.79 of 8, 11.76 of 12, 23.69 of 24 and 79.2 of 80 GiB in
its out-of-memory messages, llama.cpp of 24077 of 24576 MiB on an RTX 4090 (tools/fit-params/README.md)."""
TIMEOUT = 10
"""Seconds that a vendor's tool may take: a card that hangs must not hang us."""


@dataclass(frozen=True)
class GPU:
    """One graphics card.

    Attributes:
        vram: bytes, as the maker or the driver says.
        arch: compute capability (`8.9`), AMD's target (`gfx1100`) or Apple's chip (`M3 Max`); empty if not known.
        bandwidth: bytes a second, 0 if not known.
    """

    name: str
    kind: Literal["nvidia", "amd", "apple", "intel", "unknown"]
    vram: int
    arch: str = ""
    bandwidth: int = 0


@dataclass(frozen=True)
class Hardware:
    """A machine.

    Attributes:
        cpu: the processor's name.
        cores: that programs can use.
        simd: its widest instructions that matter here: `avx512f`, `avx2`, `avx`, `neon` or empty.
        ram: bytes.
        unified: whether GPU and processor share the memory (Apple).
    """

    cpu: str
    cores: int
    simd: str
    ram: int
    gpus: tuple[GPU, ...] = ()
    unified: bool = False

    @property
    def vram(self) -> int:
        """Bytes of all cards together."""
        return sum(gpu.vram for gpu in self.gpus)

    @property
    def usable_vram(self) -> int:
        """Bytes of all cards that programs get; see `USABLE`."""
        return self.vram if self.unified else int(self.vram * USABLE)


Run = Callable[[Sequence[str]], str | None]


def run_tool(command: Sequence[str]) -> str | None:
    """What a tool prints, None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def detect(run: Run = run_tool) -> Hardware:
    """Ask this machine. What cannot be found out is left out; nothing is raised.

    Args:
        run: runs a vendor's tool and gives what it prints.
    """
    ram = _ram(run)
    machine = Hardware(_cpu_name(run), _cores(), _simd(), ram)
    gpus = (*nvidia(run), *amd(run))
    if gpus:
        return replace(machine, gpus=gpus)
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return replace(machine, gpus=(apple(machine.cpu, ram),), unified=True)
    return machine


def nvidia(run: Run = run_tool) -> tuple[GPU, ...]:
    """NVIDIA cards, by nvidia-smi."""
    query = "name,memory.total,compute_cap"
    text = run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"])
    if text is None:  # drivers before 2021 do not tell the compute capability
        text = run(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"])
    found = []
    for row in csv.reader((text or "").splitlines(), skipinitialspace=True):
        if len(row) >= 2 and row[1].strip().isdigit():
            known = _card(row[0])
            found.append(
                GPU(
                    row[0].strip(),
                    "nvidia",
                    int(row[1]) * MIB,
                    row[2].strip() if len(row) > 2 else "",
                    known.bandwidth if known else 0,
                )
            )
    return tuple(found)


def amd(run: Run = run_tool) -> tuple[GPU, ...]:
    """AMD cards, by rocm-smi."""
    text = run(["rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json"])
    try:
        cards = json.loads(text or "{}")
    except ValueError:
        return ()
    found = []
    for key, card in sorted(cards.items()) if isinstance(cards, dict) else ():
        total = card.get("VRAM Total Memory (B)") if isinstance(card, dict) else None
        if not key.startswith("card") or not str(total).isdigit():
            continue
        names = ("Card Series", "Card series", "Card Model", "Device Name")
        name = next((str(card[n]) for n in names if card.get(n)), key)
        known = _card(name)
        arch = str(card.get("GFX Version", known.arch if known else ""))
        found.append(GPU(name, "amd", int(str(total)), arch, known.bandwidth if known else 0))
    return tuple(found)


def apple(chip: str, ram: int) -> GPU:
    """The GPU of an Apple chip: of the shared memory Metal recommends two thirds up to 36 GB, three quarters above."""
    share = 2 / 3 if ram <= 36 * GIB else 3 / 4
    known = _card(chip)
    return GPU(chip, "apple", int(ram * share), chip.removeprefix("Apple "), known.bandwidth if known else 0)


def named(gpu: str | None = None, memory: str | None = None) -> Hardware:
    """A machine that the user describes; what is not said is this machine's.

    Args:
        gpu: a card of the table (`RTX 4090`, `2x RTX 3090`, `M3 Max`), or `none`.
        memory: of the card if one is named or there is none in the table, e.g. `24GB`; else of the machine's RAM.

    Raises:
        FewbitsError: a card that is not in the table (the message lists the nearest), or no size.
    """
    machine = detect()
    size = parse_memory(memory) if memory else None
    if gpu is None:
        if size is None:
            return machine
        if machine.gpus:
            first = replace(machine.gpus[0], vram=size)
            return replace(machine, gpus=(first, *machine.gpus[1:]))
        return replace(machine, gpus=(GPU(f"GPU with {memory}", "unknown", size),))
    if gpu.strip().lower() in ("none", "cpu"):
        return replace(machine, gpus=(), unified=False, ram=size or machine.ram)
    count, name = _count(gpu)
    card = _card(name)
    if card is None and size is None:
        near = get_close_matches(_key(name), [_key(known.name) for known in CARDS], n=4, cutoff=0.4)
        nearest = [known.name for key in near for known in CARDS if _key(known.name) == key]
        raise FewbitsError(
            f"Unknown card {name!r}.",
            f"Nearest: {', '.join(nearest)}. Or say how much it has: --memory 24GB."
            if nearest
            else "Say how much it has: --memory 24GB.",
        )
    if card is None:
        assert size is not None
        return replace(machine, gpus=(GPU(name, "unknown", size),) * count)
    if card.kind == "apple":
        ram = size or card.vram
        return replace(machine, cpu=card.name, simd="neon", ram=ram, unified=True, gpus=(apple(card.name, ram),))
    found = GPU(card.name, card.kind, size or card.vram, card.arch, card.bandwidth)
    return replace(machine, gpus=(found,) * count, unified=False)


def parse_memory(text: str) -> int:
    """Bytes of a size as cards are sold: 24GB and 24GiB both mean 24 * 2^30; sums as `16GB+24GB` add up.

    Raises:
        FewbitsError: no size.
    """
    total = 0
    for part in text.split("+"):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)I?B?\s*", part.upper())
        if not found or not float(found[1]):
            raise FewbitsError(f"{text!r} is no size of memory.", "Write e.g. 24GB.")
        # memory is sold in powers of two whatever the unit says
        total += int(float(found[1]) * UNITS[f"{found[2]}I" if found[2] else ""])
    return total


def _count(gpu: str) -> tuple[int, str]:
    found = re.fullmatch(r"\s*(\d{1,2})\s*[x*]\s*(.+)", gpu, re.IGNORECASE)
    return (max(int(found[1]), 1), found[2].strip()) if found else (1, gpu.strip())


def _key(name: str) -> str:
    """A card's name as it is compared: without maker, marks and spaces."""
    plain = re.sub(r"\((tm|r)\)", "", name.lower())
    plain = re.sub(r"\b(nvidia|geforce|amd|radeon|apple|intel|graphics|gpu|tesla)\b", "", plain)
    return re.sub(r"[^a-z0-9+]", "", plain)


def _card(name: str) -> Card | None:
    """The card of the table that this name means: the same, or the longest that it begins with."""
    wanted = _key(name)
    for series in ("", "rtx", "gtx", "rx"):  # people say 4090
        exact = [card for card in CARDS if _key(card.name) == series + wanted]
        if exact:
            return exact[0]
    # "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB": the table's name and something more
    begins = [card for card in CARDS if wanted.startswith(_key(card.name)) and not _differs(wanted, _key(card.name))]
    return max(begins, key=lambda card: len(_key(card.name)), default=None)


def _differs(name: str, known: str) -> bool:
    """Whether what follows makes it another card: `4070 Ti`, `4070 Super`, `M3 Max`, a longer number."""
    rest = name[len(known) :]
    return bool(re.match(r"\d|ti|super|s$|max|pro|ultra|xt|d$|laptop|mobile|m$", rest)) and not re.match(r"\d+gb", rest)


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _cpu_name(run: Run) -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return found[1].strip()
    told = run(["sysctl", "-n", "machdep.cpu.brand_string"])
    return (told or "").strip() or platform.processor() or platform.machine()


def _simd() -> str:
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    except (OSError, IndexError):
        return "neon" if platform.machine() in ("arm64", "aarch64") else ""
    return next((name for name in ("avx512f", "avx2", "avx") if name in flags), "")


def _ram(run: Run) -> int:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        told = run(["sysctl", "-n", "hw.memsize"])
        total = int(told) if told and told.strip().isdigit() else 0
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:  # in a container, what it may use is what counts
            text = Path(limit).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and 0 < int(text) < total:
            total = int(text)
    return total
