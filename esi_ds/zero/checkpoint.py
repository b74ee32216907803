"""Saving and restoring sharded state in the middle of a run, on the same or another world size (docs/design.md §8).

``checkpoint/position-<n>/`` holds one safetensors file per rank and ``state.json``. Every tensor is flat and split into
parts named ``<key>@<first element>``; together they make up the whole, for any number of ranks and any placement of
experts. A folder gets its name once all of it is on disk, and only then is the previous one removed.
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
Parts = Mapping[str, Sequence[tuple[int, Tensor]]]  # key → (first flat index, values [n]) of this rank's parts


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None. Rank 0 decides: other hosts may see an older state. One broadcast."""
    newest: Path | None = None
    if runtime.is_main():
        complete = [path for path in folder.glob(f"{PREFIX}*") if (path / "state.json").is_file()]
        newest = max(complete, key=lambda path: int(path.name.removeprefix(PREFIX)), default=None)
    newest = runtime.broadcast_object(newest)
    return newest and wait_until_visible(newest / "state.json").parent


def save(folder: Path, position: int, state: dict[str, Any], tensors: Parts) -> None:
    """Write every rank's parts and rank 0's ``state``. Three barriers."""
    target = folder / f"{PREFIX}{position}"
    temporary = folder / f".{target.name}.tmp"
    if runtime.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    runtime.barrier()
    file = wait_until_visible(temporary) / f"rank-{runtime.rank()}.safetensors"
    named = {f"{key}@{low}": values for key, parts in tensors.items() for low, values in parts if len(values)}
    save_tensors({name: values.detach().cpu().contiguous() for name, values in named.items()}, file)
    runtime.barrier()
    if runtime.is_main():
        write_json_atomic(temporary / "state.json", {**state, "position": position, "world_size": runtime.world_size()})
        replace_folder(temporary, target)
        for old in folder.glob(f"{PREFIX}*"):
            if old != target:
                shutil.rmtree(old)
    runtime.barrier()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The ``state`` that was saved, with its ``position`` and ``world_size``."""
    return json.loads((checkpoint / "state.json").read_text())


def restore(checkpoint: Path | None, tensors: Parts) -> None:
    """Fill this rank's parts from a checkpoint of any world size, or with 0 where it is None. No collectives."""
    if checkpoint is None:
        for parts in tensors.values():
            for _, values in parts:
                values.zero_()
        return
    old_ranks = read_state(checkpoint)["world_size"]
    stored: dict[str, list[tuple[int, int, Any]]] = defaultdict(list)
    for rank in range(old_ranks):
        opened = safe_open(checkpoint / f"rank-{rank}.safetensors", "pt")
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            key, _, low = name.rpartition("@")
            part = opened.get_slice(name)
            stored[key].append((int(low), int(low) + part.get_shape()[0], part))
    for entries in stored.values():
        entries.sort(key=lambda entry: entry[0])
    for key, parts in tensors.items():
        for low, values in parts:
            if len(values):
                values.copy_(_read_range(stored[key], low, low + len(values)))


def _read_range(stored: list[tuple[int, int, Any]], low: int, high: int) -> Tensor:
    """Elements [low, high) of a tensor. stored: (low, high, safetensors slice) of its parts, in order."""
    parts = []
    for start, end, part in stored:
        first, last = max(low, start), min(high, end)
        if first < last:
            parts.append(part[first - start : last - start])
    if sum(map(len, parts)) != high - low:
        raise RuntimeError(f"the checkpoint does not hold all elements {low} to {high} of a tensor")
    return torch.cat(parts)
