"""What SET and SPA have in common: one update from micro-batches, and what a checkpoint must hold (METHOD §3)."""

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
from esi_ds.core.units import Parameter
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
        self.parameters = [parameter for parameter in model.parameters if trained.count(parameter.name)]
        self._watched = [self._watch(parameter) for parameter in self.parameters]

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

    def _watch(self, parameter: Parameter) -> tuple[Parameter, Tensor, Tensor]:
        """Some trained positions of this rank's shard, and their weights now."""
        shard = self.model.shard(parameter)
        share = max(1, SAMPLE * shard.numel // max(1, self._shard_total))
        positions = self.trained.bits(parameter.name, shard.low, shard.high).nonzero().flatten()
        positions = positions[:: max(1, len(positions) // share)][:share].clone()
        return parameter, positions, self.model.local_weight(parameter)[positions.to(self._where(parameter))].clone()

    @property
    def _shard_total(self) -> int:
        return sum(self.model.shard(parameter).numel for parameter in self.parameters)

    def _where(self, parameter: Parameter) -> torch.device:
        return self.model.local_weight(parameter).device

    def share_moved(self) -> float:
        """Share of the watched trained weights whose value in the model's dtype is not what it was. One all-reduce."""
        counts = torch.zeros(2, dtype=torch.float64)
        for parameter, positions, before in self._watched:
            now = self.model.local_weight(parameter)[positions.to(before.device)]
            counts += torch.tensor([int((now != before).sum()), len(before)], dtype=torch.float64)
        moved, watched = runtime.all_reduce_sum(counts).tolist()
        return moved / watched if watched else math.nan


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross entropies of the positions whose label is not −100, in fp32.

    logits: [B, K, V], the last K positions; labels: int64 [B, K], the token that follows each.
    """
    learnt = labels != -100
    return F.cross_entropy(logits[learnt].float(), labels[learnt], reduction="sum")
