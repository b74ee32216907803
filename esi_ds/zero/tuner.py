"""The interface of SET and SPA: updates from micro-batches, and the content of checkpoints (docs/method.md §3)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esi_ds.core.loss import IGNORED
from esi_ds.core.trained import Trained
from esi_ds.core.units import Shard
from esi_ds.zero import runtime
from esi_ds.zero.checkpoint import TensorParts
from esi_ds.zero.engine import ShardedModel

STATE = ("master", "exp_avg", "exp_avg_sq")  # fp32 tensors of the optimizer, as a checkpoint names them
SAMPLE = 1 << 16  # trained weights that a rank watches, to report the share that has moved


@dataclass(frozen=True)
class Rule:
    """AdamW's constants; each step gets its learning rate. clip: limit of the trained gradient's norm, or None."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0


class NotFinite(Exception):
    """The gradient of a step is not finite; no weight was changed. ranks: those with gradients that are not finite."""

    def __init__(self, ranks: list[int]):
        super().__init__(ranks)
        self.ranks = ranks


class Tuner(ABC):
    """Trains some coordinates of a sharded model. Every rank must make the same calls.

    The losses passed to ``backward`` are summed over ranks and micro-batches to the step's loss; nothing is averaged.
    """

    def __init__(self, model: ShardedModel, trained: Trained):
        self.model, self.trained = model, trained
        # Decided by the whole parameter, so that ranks with different experts make the same calls.
        self.shards = [shard for shard in model.shards if trained.count(shard.parameter.name)]
        numel = sum(shard.numel for shard in self.shards)
        watched = ((shard, self._watch(shard, numel)) for shard in self.shards)
        self._watched = [(shard, positions) for shard, positions in watched if len(positions)]
        self._before = self._watched_weights()

    def running(self) -> AbstractContextManager[None]:
        """Context in which gradients are collected; ``backward`` must be called inside it."""
        return nullcontext()

    @abstractmethod
    def forward(self, batch: Mapping[str, Tensor], num_logits: int) -> Tensor:
        """Logits [B, num_logits, V] of the last positions."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's part of the loss."""

    @abstractmethod
    def step(self, lr: float) -> float:
        """One update; returns the norm of the trained gradient before clipping. Raises NotFinite before any change."""

    @abstractmethod
    def saved(self) -> TensorParts:
        """The live tensors of a checkpoint, keyed ``<parameter>/<state>``, such as ``<parameter>/exp_avg``."""

    @abstractmethod
    def restored(self, step: int) -> None:
        """Continue after ``step`` updates, once the tensors of ``saved()`` have been filled from a checkpoint."""

    @abstractmethod
    def close(self) -> None:
        """Free masters, moments, sums and positions; the model keeps its weights. Nothing can be trained or saved
        afterwards. No collectives."""

    @property
    def may_get_no_gradient(self) -> bool:
        """Whether a step's gradient may be exactly 0: rows need not reach what a mask selects, such as experts."""
        return True

    def _watch(self, shard: Shard, numel: int) -> Tensor:
        """Some trained positions of a shard, int64, where its weights are. numel: elements of all shards."""
        weight = self.model.local_weight(shard)
        share = max(1, SAMPLE * shard.numel // max(1, numel))
        positions = self.trained.bits_of(shard).nonzero().flatten()
        return positions[:: max(1, len(positions) // share)][:share].to(weight.device, copy=True)

    def _watched_weights(self) -> Tensor:
        """The weights that are watched, in the model's dtype, as they are now."""
        parts = [self.model.local_weight(shard).index_select(0, positions) for shard, positions in self._watched]
        return torch.cat(parts) if parts else torch.zeros(0)

    def share_moved(self) -> float:
        """Share of the watched trained weights whose value in the model's dtype has changed. One all-reduce.

        The GPU is waited for once, whatever the number of tensors.
        """
        moved = (self._watched_weights() != self._before).sum()
        counts = torch.stack([moved, moved.new_tensor(len(self._before))]).to(runtime.device(), torch.float64)
        num_moved, num_watched = runtime.all_reduce_sum(counts).tolist()
        return num_moved / num_watched if num_watched else math.nan


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross entropies of the learnt positions, float32 [].

    logits: [B, K, V], of the last K positions. labels: int64 [B, K], the token that follows each, or IGNORED.
    """
    learnt = labels != IGNORED
    return F.cross_entropy(logits[learnt].float(), labels[learnt], reduction="sum")
