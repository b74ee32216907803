"""SPA: train all weights but the mask's in DeepSpeed's standard ZeRO-3 engine, with MaskedAdamW (docs/zero3.md)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from esi_ds.models.rows import last_logits
from esi_ds.zero import memory, runtime
from esi_ds.zero.checkpoint import TensorParts
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.optimizer import MaskedAdamW
from esi_ds.zero.tuner import STATE, NotFinite, Tuner


class DenseTuner(Tuner):
    """The engine reduces, clips and steps; ``MaskedAdamW`` keeps frozen weights out of all three.

    Clipping and gradient accumulation are set in the engine's configuration.
    """

    def __init__(self, model: ShardedModel, optimizer: MaskedAdamW):
        super().__init__(model, optimizer.trained)
        self.optimizer = optimizer
        self.zero = model.engine.optimizer
        shards = {id(model.by_name[shard.name]): shard for shard in model.shards}
        self.flat = optimizer.zero or optimizer.attach(self.zero, lambda tensor: shards[id(tensor)])
        # The engine averages over ranks, and the losses here add up. Scaling the loss instead would change the rounding
        # of bf16 gradients where the number of ranks is not a power of two.
        self.flat.gradient_scale = float(runtime.world_size())
        self._not_finite = torch.zeros((), dtype=torch.bool, device=runtime.device())
        tensors = [model.by_name[shard.name] for shard in self.shards]
        self._handles = [tensor.register_hook(self._note_not_finite) for tensor in tensors]

    def _note_not_finite(self, gradient: Tensor) -> None:
        """Look at this rank's gradient before it is reduced, because afterwards no rank can be named."""
        self._not_finite |= ~gradient.sum(dtype=torch.float32).isfinite()

    @property
    def may_get_no_gradient(self) -> bool:
        """See ``Tuner``: only where nothing but routed experts trains."""
        trained = [parameter for parameter in self.model.parameters if self.trained.count(parameter.name)]
        return all(any(unit.expert is not None for unit in parameter.units) for parameter in trained)

    def forward(self, batch: Mapping[str, Tensor], num_logits: int) -> Tensor:
        """See ``Tuner``. Through the engine, whose forward counts micro-batches."""
        return last_logits(self.model.module, batch, num_logits, forward=self.model.engine)

    def backward(self, loss: Tensor) -> None:
        """See ``Tuner``. Collectives: the engine's. At an accumulation boundary ``step`` must follow."""
        engine = self.model.engine
        engine.backward(loss, scale_wrt_gas=False)
        if not engine.is_gradient_accumulation_boundary():
            engine.step()

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.engine.step()
        if self.zero.overflow:  # the norm is not finite, and DeepSpeed has changed nothing
            flags = runtime.gather_objects(bool(self._not_finite))
            raise NotFinite([rank for rank, flag in enumerate(flags) if flag])
        self._not_finite.zero_()
        return float(self.model.engine.get_global_grad_norm())

    def saved(self) -> TensorParts:
        parts: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        for shard, flat, offset in self.flat.slices():
            state = {**self.optimizer.state_of(flat), "master": flat.detach()}
            for key in STATE:
                values = state[key][offset : offset + shard.numel]
                parts[f"{shard.parameter.name}/{key}"] += [(low, values[where]) for where, low, _ in shard.parts()]
        return parts

    def close(self) -> None:
        """See ``Tuner``. The engine goes on gathering weights."""
        zero = self.zero
        weights = {self.model.local_weight(shard).untyped_storage().data_ptr() for shard in self.model.shards}
        buffers = [zero.fp32_partitioned_groups_flat, zero.averaged_gradients, zero.grad_partitions_flat_buffer]
        memory.free([*buffers, self.optimizer.state], kept=weights)
        for handle in self._handles:
            handle.remove()
        for references in (zero.ipg_buckets, self.flat.coordinates, self._watched):
            references.clear()
        memory.collect()

    def restored(self, step: int) -> None:
        zero = self.zero
        self.model.release()
        for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
            self.optimizer.state_of(flat)["step"].fill_(step)
            # Writes masters into the partitions, as after a step.
            zero._reassign_or_swap_out_partitioned_parameters(index)
        self.model.publish()
