"""Saving and restoring sharded state in the middle of a run, on the same or another world size (docs/design.md §8).

``checkpoint/position-<n>/``: one safetensors file a rank, plus ``state.json``. Every tensor is flat and cut into parts
named ``<key>@<first element>``; together they are the whole, whatever the number of ranks and wherever expert
parallelism has laid what. A folder gets its name when all of it is on disk; the one before it is removed only then.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from esi_ds.artifacts import replace_folder, wait_until_visible, write_json_atomic
from esi_ds.zero import runtime
from esi_ds.zero.files import save_tensors

PREFIX = "position-"
Parts = Mapping[str, Sequence[tuple[int, Tensor]]]  # key → this rank's parts [n], and where each begins in the whole


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
    parts = {f"{key}@{low}": values for key, found in tensors.items() for low, values in found if len(values)}
    save_tensors({name: values.detach().cpu().contiguous() for name, values in parts.items()}, file)
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
        for found in tensors.values():
            for _, values in found:
                values.zero_()
        return
    old_ranks = read_state(checkpoint)["world_size"]
    stored: dict[str, list[tuple[int, int, Any]]] = defaultdict(list)
    for rank in range(old_ranks):
        opened = safe_open(checkpoint / f"rank-{rank}.safetensors", "pt")
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            key, _, low = name.rpartition("@")
            part = opened.get_slice(name)
            stored[key].append((int(low), int(low) + part.get_shape()[0], part))
    for parts in stored.values():
        parts.sort(key=lambda entry: entry[0])
    for key, found in tensors.items():
        for low, values in found:
            if len(values):
                values.copy_(_read_range(stored[key], low, low + len(values)))


def _read_range(stored: list[tuple[int, int, Any]], low: int, high: int) -> Tensor:
    """Elements [low, high) of a tensor, put together from the parts that were stored: (low, high, slice) in order."""
    parts = []
    for start, end, part in stored:
        first, last = max(low, start), min(high, end)
        if first < last:
            parts.append(part[first - start : last - start])
    if sum(map(len, parts)) != high - low:
        raise RuntimeError(f"the checkpoint does not hold all of a tensor's elements {low} to {high}")
    return torch.cat(parts)
