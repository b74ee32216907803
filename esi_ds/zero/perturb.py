"""Noise on selected weights of a sharded model, and the way back to the exact bits (docs/method.md §4).

Every rank disturbs its own shard; no weight travels. The noise of a weight is a function of the seed and its position
in the model, so it is the same for every world size.
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
    """Selected weights plus N(0, (noise · σ)²) for the time of the block, rounded to the weights' dtype.

    bits: shard's name → bool [shard.numel]. sigma: of the undisturbed matrices. Only the selected weights' originals
    are kept; they are written back as they were, also after an error. No collectives; every rank must enter and leave.
    """
    model.release()  # gathered parameters would hide what is written
    originals: list[tuple[Shard, Tensor, Tensor]] = []
    try:
        for shard in model.scored:
            if bits[shard.name].any():
                originals.append(_disturb(model, shard, bits[shard.name], sigma, noise, seed))
        model.publish()
        yield
    finally:
        model.release()
        for shard, positions, values in originals:
            model.local_weight(shard)[positions] = values
        model.publish()


def _disturb(
    model: ShardedModel,
    shard: Shard,
    bits: Tensor,
    sigma: Mapping[Unit, float],
    noise: float,
    seed: int,
) -> tuple[Shard, Tensor, Tensor]:
    """Add the noise to one shard; what was changed: positions int64 in the shard, and their original values."""
    weight = model.local_weight(shard)
    positions = bits.to(weight.device).nonzero().flatten()
    values = weight[positions].clone()
    scale = torch.zeros(shard.numel, dtype=torch.float32, device=weight.device)
    for unit in shard.parameter.units:
        scale[shard.within(unit)] = noise * sigma[unit]
    drawn = normal(stream(seed, 0x9E27), shard.parameter.offset + shard.flat(positions))
    weight[positions] = (values.float() + scale[positions] * drawn).to(weight.dtype)
    return shard, positions, values


def weights_digest(model: ShardedModel) -> str:
    """sha256 of every weight's bits on every rank: what "exactly restored" is proven by. One gather of digests.

    Comparable within one run only: it depends on how the weights are cut.
    """
    digest = hashlib.sha256()
    for shard in model.shards:
        digest.update(model.local_weight(shard).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hashlib.sha256(" ".join(runtime.gather_objects(digest.hexdigest())).encode()).hexdigest()
