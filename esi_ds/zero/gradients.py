"""Gradients on partitions: reduce-scatter each one in fp32 as it arrives, add it to the shard, free it.

docs/design.md §6, docs/zero3.md §1: an engine without an optimizer, and one hook per parameter. Each weight takes 2
bytes and 4 bytes of accumulator, divided over the ranks. Small tensors that are partitioned over the same ranks share a
collective. Every rank must run the same backward passes on the same parameters, because the hooks' collectives come in
the order of the backward pass. The collectives run beside the backward pass (``in_flight``), and their sums are
received in the order in which they were started.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esi_ds.core.footprint import IN_FLIGHT
from esi_ds.core.units import Shard
from esi_ds.zero.checkpoint import TensorParts
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.in_flight import InFlight, Reduction

BUCKET_NUMEL = 1 << 21  # smaller gradients share a collective of 8 MiB in fp32


def take_gradient(tensor: nn.Parameter) -> Tensor:
    """The gradient that has just arrived, flat, in the model's dtype; the parameter no longer holds it."""
    gradient = tensor.grad
    assert gradient is not None
    tensor.grad = None
    return gradient.detach().reshape(-1)


class _Block:
    """Gradients of one block with a list of experts, which arrive in a different order on every rank.

    They wait until all have arrived, unreduced, and are then reduced in the model's order.
    """

    def __init__(self, names: list[str]):
        self.names = names
        self.waiting: dict[str, tuple[Shard, Tensor]] = {}


class _Bucket:
    """Small padded gradients that wait for a collective of one group of ranks."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Shard, Tensor]] = []
        self.numel = 0


class ReducedGradients:
    """Gradients of some tensors, summed over ranks in fp32 as they arrive; each rank receives its shard's part.

    Subclasses say what a rank adds to the sum (``contribution``) and what becomes of the sum (``receive``). ``flush``
    must follow every backward pass.
    """

    def __init__(self, model: ShardedModel, shards: Iterable[Shard]):
        self._model = model
        self.collected = tuple(shards)
        self._by_tensor: dict[nn.Parameter, Shard] = {model.by_name[shard.name]: shard for shard in self.collected}
        self._buckets: dict[torch.distributed.ProcessGroup, _Bucket] = {}
        self._blocks = self._find_blocks()
        # Kernels of two of NCCL's groups could wait for each other in a circle. With hpZ a gather that DeepSpeed has
        # begun ahead may run beside a reduction all the same, as it does beside DeepSpeed's own.
        self._in_flight = InFlight(IN_FLIGHT if model.has_one_group else 0)

    def _find_blocks(self) -> dict[str, _Block]:
        """Tensor's name → its block, for collected tensors in a block with a list of experts."""
        blocks: dict[str, _Block] = {}
        for block_name in self._model.expert_blocks:
            names = [shard.name for shard in self.collected if shard.name.startswith(f"{block_name}.")]
            blocks |= dict.fromkeys(names, _Block(names))
        return blocks

    def contribution(self, gradient: Tensor) -> Tensor:
        """What this rank adds to the sum, fp32 [numel]. gradient: fp32 [numel], whole; may be overwritten."""
        return gradient

    def receive(self, shard: Shard, local: Tensor) -> None:
        """Use the sum of one of this rank's shards: fp32 [shard.numel], valid during the call only."""
        raise NotImplementedError

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Hooks are active inside the block, and only the collected tensors get a gradient.

        Raises RuntimeError where the block ends before a ``flush``: gradients would be lost.
        """
        for tensor in self._model.by_name.values():
            tensor.requires_grad_(tensor in self._by_tensor)
            tensor.grad = None
        handles = [tensor.register_post_accumulate_grad_hook(self._collect) for tensor in self._by_tensor]
        try:
            yield
            if self._buckets or len(self._in_flight) or any(block.waiting for block in self._blocks.values()):
                raise RuntimeError("gradients were not flushed: they would be lost")
        finally:
            self._forget()
            for handle in handles:
                handle.remove()
            for tensor in self._model.by_name.values():
                tensor.grad = None

    def _forget(self) -> None:
        """Drop what an error has left: a later pass must not add it."""
        self._buckets.clear()
        self._in_flight.forget()
        for block in self._blocks.values():
            block.waiting.clear()

    def _collect(self, tensor: nn.Parameter) -> None:
        """Post-accumulate hook. At most one reduce-scatter; none while a bucket has room or a block is incomplete."""
        shard = self._by_tensor[tensor]
        gradient = self.contribution(take_gradient(tensor).float())
        if (block := self._blocks.get(shard.name)) is None:
            self._add(shard, gradient)
            return
        block.waiting[shard.name] = (shard, gradient)
        if len(block.waiting) == len(block.names):
            waiting, block.waiting = block.waiting, {}
            for name in block.names:
                self._add(*waiting[name])

    def _add(self, shard: Shard, gradient: Tensor) -> None:
        """Reduce one gradient, or put it into a bucket. The order of calls must be the same on every rank."""
        group = self._model.group(shard)
        size = self._model.partition_numel(shard) * torch.distributed.get_world_size(group)
        # Padding by 0 elements would still copy, even the largest gradient.
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
        """Reduce what is left in buckets, and receive all sums; call after every backward pass.

        Collectives: at most one reduce-scatter per group.

        Raises RuntimeError where a gradient of a block with a list of experts is missing: the others would be lost.
        """
        for block in self._blocks.values():
            if block.waiting:
                absent = [name for name in block.names if name not in block.waiting]
                raise RuntimeError(f"no gradient reached {absent[0]} ({len(absent)} of its block)")
        buckets, self._buckets = self._buckets, {}
        for group, bucket in buckets.items():
            self._reduce(bucket.waiting, group)
        self._in_flight.receive_all()

    def _reduce(self, gradients: list[tuple[Shard, Tensor]], group: torch.distributed.ProcessGroup) -> None:
        """Start one reduce-scatter (sum, fp32) of several padded gradients; a single rank receives them at once."""
        ranks = torch.distributed.get_world_size(group)
        rows = [gradient.view(ranks, -1) for _, gradient in gradients]
        send = (rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)).view(-1)
        receive = partial(self._receive, [(shard, gradient.numel() // ranks) for shard, gradient in gradients])
        if ranks == 1:
            receive(send)
            return
        self._in_flight.make_room(send.nbytes + send.nbytes // ranks)
        local = torch.empty(send.numel() // ranks, dtype=send.dtype, device=send.device)
        work = torch.distributed.reduce_scatter_tensor(local, send, group=group, async_op=True)
        self._in_flight.add(Reduction(work, send, local, receive))

    def _receive(self, slices: list[tuple[Shard, int]], local: Tensor) -> None:
        """Pass on the valid parts of this rank's slices. slices: shards, each with the elements of its padded slice."""
        start = 0
        for shard, size in slices:
            self.receive(shard, local[start : start + shard.numel])
            start += size


class GradientShards(ReducedGradients):
    """fp32 sums of gradients of this rank's scored shards: ``sums[name]`` [shard.numel]."""

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
        """Squared norm, float64 [], of what ``receive`` has added."""
        # In chunks, because torch copies to float64 what it sums in float64.
        norms = [torch.linalg.vector_norm(chunk, dtype=torch.float64) for chunk in added.split(BUCKET_NUMEL)]
        return torch.stack(norms).square().sum()

    def take_norm_squared(self) -> float:
        """This rank's part of the squared norm of the gradients added since the last call.

        Not finite as soon as one added element is not.
        """
        value = float(self._norm_squared)
        self._norm_squared.zero_()
        return value

    def saved(self) -> TensorParts:
        """This rank's part of the checkpoint: the sums by parameter."""
        parts: dict[str, list[tuple[int, Tensor]]] = {}
        for shard in self.collected:
            sums = self.sums[shard.name]
            parts.setdefault(shard.parameter.name, []).extend((low, sums[where]) for where, low, _ in shard.parts())
        return parts


class SquaredGradientShards(GradientShards):
    """fp32 sums of squared gradients, for a diagonal Fisher: Σ g² over ranks and backward passes.

    Each rank squares its whole gradient before the sum over ranks, so its backward pass must be of one row's loss.
    """

    def contribution(self, gradient: Tensor) -> Tensor:
        return gradient.square_()

    def norm_squared(self, added: Tensor) -> Tensor:
        return torch.stack([chunk.sum(dtype=torch.float64) for chunk in added.split(BUCKET_NUMEL)]).sum()
