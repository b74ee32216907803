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


@contextmanager
def perturbed(
    model: ShardedModel, bits: Mapping[str, Tensor], sigma: Mapping[Unit, float], noise: float, seed: int
) -> Iterator[None]:
    """Add N(0, (noise · σ)²) to the selected weights inside the block, rounded to their dtype.

    bits: shard's name → bool [shard.numel]. sigma: of the unperturbed matrices. The original weights are kept for the
    selected coordinates only, and written back afterwards, also after an error. No collectives; every rank must enter
    and leave the block.
    """
    model.release()  # gathered parameters would hide the new weights
    originals: list[tuple[Shard, Tensor, Tensor]] = []
    try:
        for shard in model.scored:
            if bits[shard.name].any():
                originals.append(_perturb(model, shard, bits[shard.name], sigma, noise, seed))
        model.publish()
        yield
    finally:
        model.release()
        for shard, positions, values in originals:
            model.local_weight(shard)[positions] = values
        model.publish()


def _perturb(
    model: ShardedModel,
    shard: Shard,
    bits: Tensor,
    sigma: Mapping[Unit, float],
    noise: float,
    seed: int,
) -> tuple[Shard, Tensor, Tensor]:
    """Add noise to one shard; returns (shard, int64 positions of the changed weights, their original values)."""
    weight = model.local_weight(shard)
    positions = bits.to(weight.device).nonzero().flatten()
    values = weight[positions].clone()
    scale = torch.zeros(shard.numel, dtype=torch.float32, device=weight.device)
    for unit in shard.parameter.units:
        scale[shard.within(unit)] = noise * sigma[unit]
    noise_values = normal(stream(seed, 0x9E27), shard.parameter.offset + shard.flat(positions))
    weight[positions] = (values.float() + scale[positions] * noise_values).to(weight.dtype)
    return shard, positions, values


def weights_digest(model: ShardedModel) -> str:
    """sha256 over all weights' bits on all ranks, which proves that weights were restored. One gather of digests.

    Comparable within one run only, because it depends on the partitioning.
    """
    digest = hashlib.sha256()
    for shard in model.shards:
        digest.update(model.local_weight(shard).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hashlib.sha256(" ".join(runtime.gather_objects(digest.hexdigest())).encode()).hexdigest()
