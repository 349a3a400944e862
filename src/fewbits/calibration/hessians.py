"""Hessians on disk: one safetensors file for each decoder block, so that a method reads one block at a time.

`blk.0.safetensors` holds, for each distinct input of the block, under the GGUF name of the first weight that gets it,
the mean of x x^T over the tokens: F32 [columns, columns], or [experts, columns, columns]; and `NAME.counts` F32
[experts], the tokens seen. The header's `same` says which weights share an input: a JSON object, weight -> stored name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fewbits.calibration.collect import Inputs
from fewbits.errors import FewbitsError

Floats = npt.NDArray[np.float32]
BLOCK_FILE = re.compile(r"blk\.\d+\.safetensors|\.blk\.\d+\.safetensors\.\d+\.partial")


def block_file(folder: Path, block: int) -> Path:
    return folder / f"blk.{block}.safetensors"


def write_hessians(folder: Path, block: int, inputs: Sequence[Inputs]) -> None:
    """Write the Hessians of one block; the file appears whole or not at all.

    Raises:
        FewbitsError: it cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    same: dict[str, str] = {}
    for record in inputs:
        columns = record.sums.shape[1]
        means = [
            torch.zeros((columns, columns)) if hessian is None else (hessian / max(1, count)).cpu()
            for hessian, count in zip(record.hessians, record.counts, strict=True)
        ]
        stored = record.names[0]
        tensors[stored] = torch.stack(means) if len(means) > 1 else means[0]
        tensors[f"{stored}.counts"] = torch.tensor(record.counts, dtype=torch.float32)
        same |= dict.fromkeys(record.names, stored)
    final = block_file(folder, block)
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, {"same": json.dumps(same)})
        os.replace(partial, final)
    except (OSError, SafetensorError) as error:
        raise FewbitsError(
            f"{final}: cannot be written ({error}).", "Free some room or choose another folder."
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def stored_under(folder: str | Path, name: str) -> tuple[Path, str]:
    """The file with the Hessian of a weight, and the name it has there: weights with the same input share one.

    Args:
        name: GGUF name of the weight.

    Raises:
        FewbitsError: there is none, or the file is damaged.
    """
    match = re.match(r"blk\.(\d+)\.", name)
    path = block_file(Path(folder), int(match[1])) if match else Path(folder)
    if not match or not path.is_file():
        raise FewbitsError(f"{folder}: there is no Hessian of {name}.", "Make it with `fewbits calibrate --hessians`.")
    try:
        with safe_open(path, "numpy") as file:
            stored = json.loads((file.metadata() or {}).get("same", "{}")).get(name)
    except (SafetensorError, ValueError, AttributeError, OSError) as error:
        raise FewbitsError(f"{path}: cannot be read ({error}).", "Make it again.") from None
    if not isinstance(stored, str):
        raise FewbitsError(f"{path}: there is no Hessian of {name}.", "It was made from another model.")
    return path, stored


def read_hessian(folder: str | Path, name: str) -> tuple[Floats, Floats]:
    """The Hessian of one weight.

    Args:
        name: GGUF name of the weight.

    Returns:
        float32 [experts, columns, columns] (one expert for a plain weight), mean over the tokens; float32 [experts],
        the tokens seen.

    Raises:
        FewbitsError: there is none, or the file is damaged.
    """
    path, stored = stored_under(folder, name)
    try:
        with safe_open(path, "numpy") as file:
            hessian, counts = file.get_tensor(stored), file.get_tensor(f"{stored}.counts")
    except (SafetensorError, OSError) as error:
        raise FewbitsError(f"{path}: cannot be read ({error}).", "Make it again.") from None
    columns = hessian.shape[-1] if hessian.ndim else 0
    if hessian.size != counts.size * columns * columns or not np.isfinite(hessian).all():
        raise FewbitsError(f"{path}: the Hessian of {name} is damaged.", "Make it again.")
    return hessian.reshape(-1, columns, columns), counts


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder of Hessians that cannot be made, before any work is done.

    Raises:
        FewbitsError: it exists (without `overwrite`), or holds other things.
    """
    if not folder.parent.is_dir():
        raise FewbitsError(f"{folder}: the folder {folder.parent} does not exist.", "Create it first.")
    if not folder.exists():
        return
    if not folder.is_dir() or any(not BLOCK_FILE.fullmatch(entry.name) for entry in folder.iterdir()):
        raise FewbitsError(f"{folder}: it exists and is no folder of Hessians.", "Choose another name.")
    if not overwrite and any(folder.iterdir()):
        raise FewbitsError(f"{folder}: the output exists.", "Choose another name or pass --overwrite.")


def publish(partial: Path, folder: Path) -> None:
    """Give a finished folder its final name, in place of what stands there."""
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
