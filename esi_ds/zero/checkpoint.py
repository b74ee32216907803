"""Saving and restoring gradient sums in the middle of a pass, on the same or another world size (DESIGN §8).

``checkpoint/position-<n>/``: one safetensors file a rank, keyed by parameter name, plus ``state.json``. A folder gets
its name when all of it is on disk; the one before it is removed only then.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from esi_ds.artifacts import replace_folder, write_json_atomic
from esi_ds.core.units import Parameter, shard_bounds
from esi_ds.zero import runtime
from esi_ds.zero.gradients import GradientShards

PREFIX = "position-"


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = [path for path in folder.glob(f"{PREFIX}*") if (path / "state.json").is_file()]
    return max(found, key=lambda path: int(path.name.removeprefix(PREFIX)), default=None)


def save(folder: Path, position: int, state: dict, gradients: GradientShards) -> None:
    """Write every rank's sums and rank 0's ``state``. Two barriers."""
    target = folder / f"{PREFIX}{position}"
    temporary = folder / f".{target.name}.tmp"
    if runtime.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    runtime.barrier()
    sums = {name: values.cpu() for name, values in gradients.sums.items() if len(values)}
    save_file(sums, temporary / f"rank-{runtime.rank()}.safetensors")
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


def restore(checkpoint: Path | None, gradients: GradientShards) -> None:
    """Put a checkpoint's sums into the shards (zeros where there is none yet). No collectives."""
    if checkpoint is None:
        for values in gradients.sums.values():
            values.zero_()
        return
    old_ranks = read_state(checkpoint)["world_size"]
    files = [safe_open(checkpoint / f"rank-{rank}.safetensors", "pt") for rank in range(old_ranks)]
    for parameter in gradients.scored:
        low, high = shard_bounds(parameter.numel, runtime.rank(), runtime.world_size())
        gradients.sums[parameter.name].copy_(_read_range(files, parameter, low, high))


def _read_range(files: list, parameter: Parameter, low: int, high: int) -> Tensor:
    """Flat elements [low, high) of a parameter, from the parts of the ranks that had them."""
    parts = [torch.zeros(0)]
    for rank, opened in enumerate(files):
        old_low, old_high = shard_bounds(parameter.numel, rank, len(files))
        first, last = max(low, old_low), min(high, old_high)
        if first < last:
            parts.append(opened.get_slice(parameter.name)[first - old_low : last - old_low])
    return torch.cat(parts)
