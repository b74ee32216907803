"""Saving and restoring sharded state in the middle of a run, on the same or another world size (DESIGN §8).

``checkpoint/position-<n>/``: one safetensors file a rank, plus ``state.json``. Every tensor is flat and cut over the
ranks in rank order: its parts one behind another are the whole, whatever the number of ranks. A folder gets its name
when all of it is on disk; the one before it is removed only then.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from esi_ds.artifacts import replace_folder, wait_until_visible, write_json_atomic
from esi_ds.zero import runtime
from esi_ds.zero.files import save_tensors

PREFIX = "position-"
Parts = Mapping[str, tuple[int, Tensor]]  # key → where this rank's part begins in the whole, and the part [n]


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None. Rank 0 looks: another host may see an older folder. One broadcast."""
    newest = None
    if runtime.is_main():
        found = [path for path in folder.glob(f"{PREFIX}*") if (path / "state.json").is_file()]
        newest = max(found, key=lambda path: int(path.name.removeprefix(PREFIX)), default=None)
    newest = runtime.broadcast_object(newest)
    return newest and wait_until_visible(newest / "state.json").parent


def save(folder: Path, position: int, state: dict, tensors: Parts) -> None:
    """Write every rank's parts and rank 0's ``state``. Two barriers."""
    target = folder / f"{PREFIX}{position}"
    temporary = folder / f".{target.name}.tmp"
    if runtime.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    runtime.barrier()
    file = wait_until_visible(temporary) / f"rank-{runtime.rank()}.safetensors"
    save_tensors({key: values.detach().cpu().contiguous() for key, (_, values) in tensors.items() if len(values)}, file)
    runtime.barrier()
    if runtime.is_main():
        write_json_atomic(temporary / "state.json", {**state, "position": position, "world_size": runtime.world_size()})
        replace_folder(temporary, target)
        for old in folder.glob(f"{PREFIX}*"):
            if old != target:
                shutil.rmtree(old)
    runtime.barrier()


def read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state.json").read_text())


def restore(checkpoint: Path | None, tensors: Parts) -> None:
    """Fill this rank's parts from a checkpoint of any world size (zeros where there is none yet). No collectives."""
    if checkpoint is None:
        for _, values in tensors.values():
            values.zero_()
        return
    old_ranks = read_state(checkpoint)["world_size"]
    files = [safe_open(checkpoint / f"rank-{rank}.safetensors", "pt") for rank in range(old_ranks)]
    keys = [frozenset(opened.keys()) for opened in files]
    for key, (low, values) in tensors.items():
        stored = [opened.get_slice(key) for opened, known in zip(files, keys, strict=True) if key in known]
        if len(values):
            values.copy_(_read_range(stored, low, low + len(values)))


def _read_range(stored: list, low: int, high: int) -> Tensor:
    """Elements [low, high) of a tensor whose parts lie in the ranks' files, one behind another in rank order."""
    parts, start = [], 0
    for part in stored:
        length = part.get_shape()[0]
        first, last = max(low, start), min(high, start + length)
        if first < last:
            parts.append(part[first - start : last - start])
        start += length
    if sum(map(len, parts)) != high - low:
        raise RuntimeError(f"the checkpoint holds {start} of a tensor's elements, not up to {high}")
    return torch.cat(parts)
