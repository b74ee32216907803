"""Noise on selected weights of a sharded model, and restoring their exact bits (docs/method.md §4).

Every rank perturbs its shards; no weight leaves a rank. A weight's noise depends only on the seed and its position in
the model, so it is the same for every world size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from esi_ds.core.noise import normal, stream
from esi_ds.core.units import Shard, Unit
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.files import raw_bytes


@contextmanager
def perturbed(
    model: ShardedModel, selected: Mapping[str, Tensor], sigma: Mapping[Unit, float], noise: float, seed: int
) -> Iterator[None]:
    """Add N(0, (noise · σ)²) to the selected weights inside the block, rounded to their dtype.

    selected: shard's name → int64 positions in the shard (``positions``). sigma: of the unperturbed matrices. The
    original weights are kept for the selected coordinates only, and written back afterwards, also after an error. No
    collectives; every rank must enter and leave the block.
    """
    model.release()  # gathered parameters would hide the new weights
    originals: list[tuple[Shard, Tensor]] = []
    try:
        for shard in model.scored:
            if len(selected[shard.name]):
                originals.append((shard, _perturb(model, shard, selected[shard.name], sigma, noise, seed)))
        model.publish()
        yield
    finally:
        model.release()
        for shard, values in originals:
            model.local_weight(shard)[selected[shard.name]] = values
        model.publish()


def positions(model: ShardedModel, bits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Int64 positions of the selected weights in each shard, beside its weights, by the shard's name.

    bits: shard's name → bool [shard.numel], on any device.
    """
    return {
        shard.name: bits[shard.name].to(model.local_weight(shard).device).nonzero().flatten() for shard in model.scored
    }


def _perturb(
    model: ShardedModel,
    shard: Shard,
    selected: Tensor,
    sigma: Mapping[Unit, float],
    noise: float,
    seed: int,
) -> Tensor:
    """Add noise to one shard at int64 positions ``selected``; returns the weights that were there."""
    weight = model.local_weight(shard)
    values = weight[selected]
    scale = torch.zeros(shard.numel, dtype=torch.float32, device=weight.device)
    for unit in shard.parameter.units:
        for view in shard.views(unit, scale):
            view.fill_(noise * sigma[unit])
    noise_values = normal(stream(seed, 0x9E27), shard.parameter.offset + shard.flat(selected))
    weight[selected] = (values.float() + scale[selected] * noise_values).to(weight.dtype)
    return values


def partitioned_bits_digest(model: ShardedModel) -> str:
    """sha256 over all weights' bits on all ranks, which proves that weights were restored. One gather of digests.

    Comparable within one run only, because it depends on the partitioning.
    """
    digest = hashlib.sha256()
    for shard in model.shards:
        digest.update(raw_bytes(model.local_weight(shard)))
    return hashlib.sha256(" ".join(runtime.gather_objects(digest.hexdigest())).encode()).hexdigest()
