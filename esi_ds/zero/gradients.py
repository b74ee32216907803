"""Gradients on partitions: reduce-scatter each one in fp32 as it appears, add it to the shard, free it.

docs/design.md §6, docs/zero3.md §1: an engine without an optimizer and one hook a parameter. 2 bytes of weight and 4 of
accumulator a parameter over N ranks. Small tensors that are cut over the same ranks share one collective. Every rank
must run the same backward calls on the same parameters, for the hooks' collectives are in the order of the backward
pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esi_ds.core.units import Shard
from esi_ds.zero.checkpoint import Parts
from esi_ds.zero.engine import ShardedModel

BUCKET_NUMEL = 1 << 21  # gradients below this size wait for one another: 8 MiB of fp32 a collective


class _Block:
    """Parameters of one block with a list of experts: their gradients come in another order on every rank, so they wait
    until all are there and are reduced in the model's order. One block's gradients are whole for that time."""

    def __init__(self, names: list[str]):
        self.names = names
        self.waiting: dict[str, tuple[Shard, Tensor]] = {}


class _Bucket:
    """Small gradients, padded, that wait for a collective of one group of ranks."""

    def __init__(self):
        self.waiting: list[tuple[Shard, Tensor]] = []
        self.numel = 0


class ReducedGradients:
    """Gradients of some tensors, summed over their ranks in fp32 as they appear; each rank gets its shard's part.

    ``contribution`` says what of a rank's gradient is summed, ``receive`` what is done with the sum; ``flush`` must
    follow every backward pass.
    """

    def __init__(self, model: ShardedModel, shards: Iterable[Shard]):
        self._model = model
        self.collected = tuple(shards)
        self._by_tensor: dict[nn.Parameter, Shard] = {model.by_name[shard.name]: shard for shard in self.collected}
        self._buckets: dict[torch.distributed.ProcessGroup, _Bucket] = {}
        self._blocks = self._find_blocks()

    def _find_blocks(self) -> dict[str, _Block]:
        """The block of every collected tensor that lies in one with a list of experts."""
        found: dict[str, _Block] = {}
        for block_name in self._model.expert_blocks:
            names = [shard.name for shard in self.collected if shard.name.startswith(f"{block_name}.")]
            found |= dict.fromkeys(names, _Block(names))
        return found

    def contribution(self, gradient: Tensor) -> Tensor:
        """What this rank adds to the sum over ranks: its own whole gradient, fp32 [numel]; may be overwritten."""
        return gradient

    def receive(self, shard: Shard, local: Tensor) -> None:
        """The reduced gradient of one of this rank's shards: fp32 [shard.numel], for the moment only."""
        raise NotImplementedError

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Hooks live inside the block; only these tensors get a gradient at all."""
        for tensor in self._model.by_name.values():
            tensor.requires_grad_(tensor in self._by_tensor)
            tensor.grad = None
        handles = [tensor.register_post_accumulate_grad_hook(self._collect) for tensor in self._by_tensor]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for tensor in self._model.by_name.values():
                tensor.grad = None

    def _collect(self, tensor: nn.Parameter) -> None:
        """Post-accumulate hook: one reduce-scatter, or none while the bucket has room or a block is not complete."""
        shard = self._by_tensor[tensor]
        gradient, tensor.grad = self.contribution(tensor.grad.detach().reshape(-1).float()), None
        if (block := self._blocks.get(shard.name)) is None:
            self._add(shard, gradient)
            return
        block.waiting[shard.name] = (shard, gradient)
        if len(block.waiting) == len(block.names):
            waiting, block.waiting = block.waiting, {}
            for name in block.names:
                self._add(*waiting[name])

    def _add(self, shard: Shard, gradient: Tensor) -> None:
        """Reduce one gradient, or let it wait in its bucket. The order of calls must be the same on every rank."""
        group = self._model.group(shard)
        size = self._model.partition_numel(shard) * torch.distributed.get_world_size(group)
        # Padding by nothing would be a copy, of the largest gradient too.
        padded = F.pad(gradient, (0, size - gradient.numel())) if size > gradient.numel() else gradient
        if padded.numel() >= BUCKET_NUMEL:
            self._reduce([(shard, padded)], group)
            return
        bucket = self._buckets.setdefault(group, _Bucket())
        bucket.waiting.append((shard, padded))
        bucket.numel += padded.numel()
        if bucket.numel >= BUCKET_NUMEL:
            self._reduce(self._buckets.pop(group).waiting, group)

    def flush(self) -> None:
        """Reduce what waits in buckets; call after every backward pass. At most one reduce-scatter a group.

        Raises RuntimeError where a gradient of a block with a list of experts did not come: it would be lost unseen.
        """
        for block in self._blocks.values():
            if block.waiting:
                absent = [name for name in block.names if name not in block.waiting]
                raise RuntimeError(f"no gradient reached {absent[0]} ({len(absent)} of its block)")
        buckets, self._buckets = self._buckets, {}
        for group, bucket in buckets.items():
            self._reduce(bucket.waiting, group)

    def _reduce(self, gradients: list[tuple[Shard, Tensor]], group: torch.distributed.ProcessGroup) -> None:
        """One reduce-scatter (sum, fp32) of several padded gradients; each rank keeps its slices' valid parts."""
        ranks = torch.distributed.get_world_size(group)
        rows = [gradient.view(ranks, -1) for _, gradient in gradients]
        send = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        local = send.view(-1)
        if ranks > 1:
            local = torch.empty(send.shape[1], dtype=send.dtype, device=send.device)
            torch.distributed.reduce_scatter_tensor(local, send.view(-1), group=group)
        start = 0
        for shard, gradient in gradients:
            self.receive(shard, local[start : start + shard.numel])
            start += gradient.numel() // ranks


class GradientShards(ReducedGradients):
    """fp32 sums of gradients, one flat tensor for each of this rank's shards that are scored (no padding).

    ``sums[name]`` [shard.numel]. ``take_norm_squared`` gives this rank's part of the squared norm of the gradients that
    were added since it was last taken; it is not finite as soon as one added element is not.
    """

    def __init__(self, model: ShardedModel, device: torch.device):
        super().__init__(model, model.scored)
        self.sums = {
            shard.name: torch.zeros(shard.numel, dtype=torch.float32, device=device) for shard in self.collected
        }
        self._norm_squared = torch.zeros((), dtype=torch.float64, device=device)

    def receive(self, shard: Shard, local: Tensor) -> None:
        target = self.sums[shard.name]
        added = local.to(target.device)
        target += added
        self._norm_squared += self.norm_squared(added) if len(added) else 0.0

    def norm_squared(self, added: Tensor) -> Tensor:
        """Of what ``receive`` was given, float64 []."""
        # Piece by piece: torch makes a copy in float64 of what it sums so.
        norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in added.split(BUCKET_NUMEL)]
        return torch.stack(norms).square().sum()

    def take_norm_squared(self) -> float:
        value = float(self._norm_squared)
        self._norm_squared.zero_()
        return value

    def saved(self) -> Parts:
        """What a checkpoint holds: of every parameter, this rank's parts and where each begins."""
        parts: dict[str, list[tuple[int, Tensor]]] = {}
        for shard in self.collected:
            found = [(low, self.sums[shard.name][where]) for where, low, _ in shard.parts()]
            parts.setdefault(shard.parameter.name, []).extend(found)
        return parts


class SquaredGradientShards(GradientShards):
    """fp32 sums of squared gradients, for a diagonal Fisher: Σ over ranks and backward passes of g².

    The square is taken of each rank's own whole gradient, before anything is added up: (g_0 + g_1)² is another thing.
    So a rank's backward pass must be of one row's loss.
    """

    def contribution(self, gradient: Tensor) -> Tensor:
        return gradient.square_()

    def norm_squared(self, added: Tensor) -> Tensor:
        return torch.stack([piece.sum(dtype=torch.float64) for piece in added.split(BUCKET_NUMEL)]).sum()
