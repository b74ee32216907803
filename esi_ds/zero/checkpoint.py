"""Saving and restoring sharded state in the middle of a run, on the same or another world size (docs/design.md §8).

``checkpoint/position-<n>/`` holds one safetensors file per rank and ``state.json``. Every tensor is flat and split into
parts named ``<key>@<first element>``; together they make up the whole, for any number of ranks and any placement of
experts. A folder gets its name once all of it is on disk, and only then is the previous one removed. ``state.json`` has
the sha256 of every file, and of itself, and the id of the run: a checkpoint that was altered, or is of another run, is
refused.
"""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from esi_ds.artifacts import (
    check_same_run,
    file_sha256,
    new_folder,
    replace_folder,
    run_id,
    temporary_name,
    wait_until_visible,
    write_json_atomic,
)
from esi_ds.errors import UserError
from esi_ds.reading import check_regular, check_type, json_sha256, read_json, reading
from esi_ds.zero import runtime
from esi_ds.zero.files import save_tensors

PREFIX = "position-"
STATE = "state.json"
FIELD, REMEDY = (
    "run.output_dir",
    "delete this checkpoint to start its part of the run over, or give a new run.output_dir",
)
WITHOUT_DIGESTS = "{}: a checkpoint of an earlier version, without digests: it is taken as it is"
TensorParts = Mapping[str, Sequence[tuple[int, Tensor]]]  # key → (first flat index, values [n]) of this rank's parts


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None. Rank 0 decides: other hosts may see an older state.

    Raises UserError, on every rank, if it was altered or belongs to another run. The ranks share the reading.
    Collectives: one broadcast and one gather.
    """
    newest = runtime.from_main(lambda: _newest_of_run(folder))
    error: UserError | None = None
    if newest is not None:
        wait_until_visible(newest / STATE)
        if problems := _problems(newest, runtime.rank(), runtime.world_size()):
            error = UserError(FIELD, str(newest), problems[0], REMEDY)
    runtime.raise_first(error)
    return newest


def _newest_of_run(folder: Path) -> Path | None:
    """The newest complete checkpoint. Raises UserError where another run wrote it."""
    newest = _newest(folder)
    if newest is not None:
        check_same_run(newest, read_state(newest).get("run"), REMEDY)
    return newest


def _newest(folder: Path) -> Path | None:
    positions = {
        int(path.name.removeprefix(PREFIX)): path
        for path in folder.glob(f"{PREFIX}*")
        if re.fullmatch(rf"{PREFIX}[0-9]{{1,18}}", path.name) and (path / STATE).is_file()
    }
    return positions[max(positions)] if positions else None


def _problems(checkpoint: Path, rank: int, ranks: int) -> list[str]:
    """What is wrong with every ``ranks``-th file from ``rank`` on, and with the state."""
    try:
        digests = check_type(read_state(checkpoint).get("files", {}), dict[str, str])
        return [
            f"{name} was altered since it was written (its sha256 differs)"
            for name in sorted(digests)[rank::ranks]
            if check_regular(checkpoint / name) and file_sha256(checkpoint / name) != digests[name]
        ]
    except UserError as error:
        return [error.problem]
    except (OSError, ValueError) as error:
        return [f"is not complete ({error})"]


def save(folder: Path, position: int, state: dict[str, Any], tensors: TensorParts) -> None:
    """Write every rank's parts and rank 0's ``state``. Collectives: two barriers and a gather."""
    target = folder / f"{PREFIX}{position}"
    temporary = temporary_name(target)
    if runtime.is_main():
        new_folder(temporary)
    runtime.barrier()
    file = wait_until_visible(temporary) / f"rank-{runtime.rank()}.safetensors"
    named = {f"{key}@{low}": values for key, parts in tensors.items() for low, values in parts if len(values)}
    save_tensors({name: values.detach().cpu().contiguous() for name, values in named.items()}, file)
    files = dict(runtime.gather_objects((file.name, file_sha256(file))))
    if runtime.is_main():
        facts = {"position": position, "world_size": runtime.world_size(), "files": files, "run": run_id(folder)}
        whole = {**state, **facts}
        write_json_atomic(temporary / STATE, {**whole, "sha256": json_sha256(whole)})
        replace_folder(temporary, target)
        for old in folder.glob(f"{PREFIX}*"):
            if old != target:
                shutil.rmtree(old)
    runtime.barrier()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The ``state`` that was saved, with its ``position`` and ``world_size``; ``files``, the sha256 of each by name, is
    absent from checkpoints of earlier versions. Raises UserError where it was altered."""
    state = read_json(checkpoint / STATE, dict[str, Any], FIELD, REMEDY)
    stored = state.pop("sha256", None)
    if (stored is not None or "files" in state) and stored != json_sha256(state):
        raise UserError(FIELD, str(checkpoint), f"{STATE} was altered since it was written", REMEDY)
    with reading(FIELD, checkpoint, REMEDY):
        if check_type(state.get("position"), int) != int(checkpoint.name.removeprefix(PREFIX)):
            raise ValueError(f"its {STATE} was written for another position")
        check_type(state.get("world_size"), int)
    return state


def restore(checkpoint: Path | None, tensors: TensorParts) -> None:
    """Fill this rank's parts from a checkpoint of any world size, or with 0 where it is None. No collectives.

    Raises UserError where it does not hold them.
    """
    if checkpoint is None:
        for parts in tensors.values():
            for _, values in parts:
                values.zero_()
        return
    with reading(FIELD, checkpoint, REMEDY):
        _fill(checkpoint, tensors)


def _fill(checkpoint: Path, tensors: TensorParts) -> None:
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
