"""What SET and SPA have in common: an update from micro-batches, and a checkpoint's content (docs/method.md §3)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esi_ds.core.trained import Trained
from esi_ds.core.units import Shard
from esi_ds.zero import runtime
from esi_ds.zero.checkpoint import Parts
from esi_ds.zero.engine import ShardedModel

SAMPLE = 1 << 16  # trained weights a rank watches to say how many have moved


@dataclass(frozen=True)
class Rule:
    """AdamW's constants; the learning rate comes with every step. ``clip``: norm of the trained gradient, or None."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0


class NotFinite(Exception):
    """The gradient of a step is not finite; nothing was changed. ``ranks``: whose own gradients were not finite."""

    def __init__(self, ranks: list[int]):
        super().__init__(ranks)
        self.ranks = ranks


class Tuner(ABC):
    """Trains some coordinates of a sharded model. The losses given to ``backward`` add up to the step's loss over all
    ranks and micro-batches: no averaging happens in here. Every rank makes the same calls."""

    def __init__(self, model: ShardedModel, trained: Trained):
        self.model, self.trained = model, trained
        # A parameter's tensors train together, so that ranks with other experts make the same calls.
        self.shards = [shard for shard in model.shards if trained.count(shard.parameter.name)]
        self._watched = [self._watch(shard) for shard in self.shards]

    def running(self) -> AbstractContextManager[None]:
        """Gradients are collected inside the block."""
        return nullcontext()

    @abstractmethod
    def forward(self, batch: Mapping[str, Tensor], num_logits: int) -> Tensor:
        """Logits [B, num_logits, V] of the last positions."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's share of the loss."""

    @abstractmethod
    def step(self, lr: float) -> float:
        """One update; the norm of the trained gradient before clipping. Raises NotFinite before anything changes."""

    @abstractmethod
    def saved(self) -> Parts:
        """Live tensors that a checkpoint holds, keyed ``<parameter>/<what>``."""

    @abstractmethod
    def restored(self, step: int) -> None:
        """Put what was read into ``saved()`` to work, after ``step`` updates."""

    def _watch(self, shard: Shard) -> tuple[Shard, Tensor, Tensor]:
        """Some trained positions of one of this rank's shards, and their weights now."""
        total, weight = sum(other.numel for other in self.shards), self.model.local_weight(shard)
        share = max(1, SAMPLE * shard.numel // max(1, total))
        positions = self.trained.bits_of(shard).nonzero().flatten()
        positions = positions[:: max(1, len(positions) // share)][:share].clone()
        return shard, positions, weight[positions.to(weight.device)].clone()

    def share_moved(self) -> float:
        """Share of the watched trained weights whose value in the model's dtype is not what it was. One all-reduce."""
        counts = torch.zeros(2, dtype=torch.float64)
        for shard, positions, before in self._watched:
            now = self.model.local_weight(shard)[positions.to(before.device)]
            counts += torch.tensor([int((now != before).sum()), len(before)], dtype=torch.float64)
        moved, watched = runtime.all_reduce_sum(counts).tolist()
        return moved / watched if watched else math.nan


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross entropies of the positions whose label is not −100, in fp32.

    logits: [B, K, V], the last K positions; labels: int64 [B, K], the token that follows each.
    """
    learnt = labels != -100
    return F.cross_entropy(logits[learnt].float(), labels[learnt], reduction="sum")
