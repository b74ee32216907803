"""What SET saves: every run of a rank's shards under the number of trained weights before it; no bit is read again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mask_folders import write_mask

from esi_ds.core.mask import Mask, num_bytes
from esi_ds.core.trained import Trained
from esi_ds.core.units import Parameter, Shard, Unit
from esi_ds.zero import runtime
from esi_ds.zero.sparse import SparseTuner
from esi_ds.zero.tuner import STATE, Rule

EXPERTS, MATRIX = 16, 37  # no run begins at a byte
SHAPES = {"norm": (5,), "gate_up": (EXPERTS, 2, MATRIX), "down": (11, 9)}
RANKS = 4


def parameters() -> dict[str, Parameter]:
    described, offset = {}, 0
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        described[name] = Parameter(name, shape, offset, "expert", (Unit(name, "expert", 0, None, 0, numel),))
        offset += numel
    return described


def shards_of(rank: int) -> tuple[Shard, ...]:
    """Two groups of two ranks, each with half of the experts: gate and up alternate, so that each is a run of its own;
    the other tensors are partitioned over all ranks."""
    described = parameters()
    experts = range(rank // 2 * EXPERTS // 2, (rank // 2 + 1) * EXPERTS // 2)
    shards = []
    for number, leaf in enumerate(("w1", "w3")):
        lows = [(2 * expert + number) * MATRIX for expert in experts]
        layout = Shard(described["gate_up"], tuple((low, low + MATRIX) for low in lows), f"gate_up.{leaf}")
        size = -(-layout.numel // 2)
        shards.append(layout.cut(rank % 2 * size, (rank % 2 + 1) * size))
    for name in ("norm", "down"):
        numel = described[name].numel
        size = -(-numel // RANKS)
        shards.append(Shard(described[name], ((0, numel),), name).cut(rank * size, (rank + 1) * size))
    return tuple(sorted(shards, key=lambda shard: shard.parameter.offset))


def model_of(rank: int) -> Any:
    """Every weight is its own flat index in its parameter."""
    shards = shards_of(rank)
    weights = {s.name: torch.cat([torch.zeros(0), *(torch.arange(*run).float() for run in s.runs)]) for s in shards}
    return SimpleNamespace(
        shards=shards,
        by_name={name: torch.nn.Parameter(weight) for name, weight in weights.items()},
        local_weight=lambda shard: weights[shard.name],
        expert_blocks={},
        has_one_group=True,
    )


@pytest.mark.parametrize("train", ["selected", "complement"])
def test_runs_are_saved_as_counted_without_the_mask(
    train: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    bits = {name: torch.rand(SHAPES[name], generator=generator) < 0.3 for name in ("gate_up", "down")}
    mask = Mask.load(write_mask(tmp_path, bits, total_numel=str(sum(p.numel for p in parameters().values()))))
    trained = Trained(mask, train, "train", SHAPES)  # ``norm``, which the mask does not name, trains whole
    read, plain = [0], Mask.data

    def counted(self: Mask, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        data = plain(self, name, first, last)
        read[0] += len(data)
        return data

    monkeypatch.setattr(Mask, "data", counted)
    told: list[torch.Tensor] = []
    for rank in range(RANKS):  # what each rank tells the others
        monkeypatch.setattr(runtime, "gather_objects", lambda rows: told.append(rows) or [rows])
        SparseTuner(model_of(rank), trained, Rule(), "scatter")
    monkeypatch.setattr(runtime, "gather_objects", lambda _: told)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in SHAPES}
    for rank in range(RANKS):
        read[0] = 0
        model = model_of(rank)
        tuner = SparseTuner(model, trained, Rule(), "scatter")
        own = sum(num_bytes(high - low) + 1 for shard in model.shards for low, high in shard.runs)
        assert read[0] <= 2 * own  # for the positions, and for those that are watched
        read[0] = 0
        for _ in range(2):
            saved = tuner.saved()
        assert read[0] == 0
        names = {shard.parameter.name for shard in model.shards if shard.numel}
        assert saved.keys() == {f"{name}/{key}" for name in names for key in STATE}
        for name in names:
            flat = trained.bits(name, 0, trained.numels[name]).nonzero().flatten()
            for first, values in saved[f"{name}/master"]:
                assert values.long().equal(flat[first : first + len(values)]), (rank, name, first)
                seen[name].append(values)
            assert [first for first, _ in saved[f"{name}/exp_avg"]] == [first for first, _ in saved[f"{name}/master"]]
    for name in SHAPES:  # every trained weight once
        assert (
            torch.cat(seen[name])
            .sort()
            .values.long()
            .equal(trained.bits(name, 0, trained.numels[name]).nonzero().flatten())
        )
