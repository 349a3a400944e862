"""Hessians on disk: one safetensors file for each decoder block, so that a method reads one block at a time.

`blk.0.safetensors` holds, for each distinct input of the block, under the GGUF name of the first weight that gets it,
the mean of x x^T over the tokens: F32 [columns, columns], or [experts, columns, columns]; and `NAME.counts` F32
[experts], the tokens seen. The header's `fewbits` is a JSON object: `same` says which weights share an input (weight ->
stored name), `texts` the SHA-256 of each text, `run` which calibration made the file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fewbits.calibration.collect import Inputs
from fewbits.errors import FewbitsError
from fewbits.formats.journal import sync

Floats = npt.NDArray[np.float32]
BLOCK_FILE = re.compile(r"blk\.\d+\.safetensors|\.blk\.\d+\.safetensors\.\d+\.partial")


def block_file(folder: Path, block: int) -> Path:
    return folder / f"blk.{block}.safetensors"


def write_hessians(folder: Path, block: int, inputs: Sequence[Inputs], run: str, texts: Sequence[str]) -> None:
    """Write the Hessians of one block; the file appears whole or not at all.

    Args:
        run: identity of the calibration.
        texts: SHA-256 of each text.

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
        save_file(tensors, partial, {"fewbits": json.dumps({"same": same, "texts": list(texts), "run": run})})
        sync(partial)
        os.replace(partial, final)
    except (OSError, SafetensorError) as error:
        raise FewbitsError(
            f"{final}: cannot be written ({error}).", "Free some room or choose another folder."
        ) from None
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class BlockHessians:
    """The header of one block's file.

    Attributes:
        same: weight -> the name under which its Hessian is stored.
        shapes: by stored name, [columns, columns] or [experts, columns, columns].
        counts: by stored name, tokens seen: float32 [experts].
    """

    path: Path
    run: str
    texts: list[str]
    same: dict[str, str]
    shapes: dict[str, list[int]]
    counts: dict[str, Floats]

    def read(self, name: str, expert: int = 0) -> Floats:
        """The mean of x x^T over the tokens of a weight's expert: float32 [columns, columns].

        Raises:
            FewbitsError: the file is damaged.
        """
        stored = self.same[name]
        try:
            with safe_open(self.path, "numpy") as file:
                whole = file.get_slice(stored)
                hessian: Floats = whole[expert] if len(self.shapes[stored]) == 3 else whole[:]
        except (SafetensorError, OSError) as error:
            raise FewbitsError(f"{self.path}: cannot be read ({error}).", "Make it again.") from None
        if not np.isfinite(hessian).all():
            raise FewbitsError(f"{self.path}: the Hessian of {name} is damaged.", "Make it again.")
        return hessian


def open_block(folder: str | Path, block: int) -> BlockHessians:
    """Read the header of one block's file, and the tokens that its experts saw.

    Raises:
        FewbitsError: there is none, or it is damaged.
    """
    path = block_file(Path(folder), block)
    if not path.is_file():
        raise FewbitsError(
            f"{folder}: there is no Hessian of block {block}.", "Make it with `fewbits calibrate --hessians`."
        )
    try:
        with safe_open(path, "numpy") as file:
            told = json.loads((file.metadata() or {}).get("fewbits", "{}"))
            same = {str(weight): str(stored) for weight, stored in told.get("same", {}).items()}
            shapes = {stored: file.get_slice(stored).get_shape() for stored in set(same.values())}
            counts = {stored: file.get_tensor(f"{stored}.counts") for stored in shapes}
            texts = [str(text) for text in told.get("texts", [])]
    except (SafetensorError, ValueError, AttributeError, TypeError, OSError) as error:
        raise FewbitsError(f"{path}: cannot be read ({error}).", "Make it again.") from None
    for stored, shape in shapes.items():
        experts = shape[0] if len(shape) == 3 else 1
        if len(shape) not in (2, 3) or shape[-1] != shape[-2] or counts[stored].shape != (experts,):
            raise FewbitsError(f"{path}: the Hessian of {stored} is damaged.", "Make it again.")
    return BlockHessians(path, str(told.get("run", "")), texts, same, shapes, counts)


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


def unfinished(folder: Path) -> Path:
    """Where a folder of Hessians is until it is whole."""
    return folder.with_name(f"{folder.name}.partial")


def publish(partial: Path, folder: Path) -> None:
    """Give a finished folder its final name, in place of what stands there."""
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
