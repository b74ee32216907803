"""SET: train the selected weights only, at little more than the cost of holding the model (docs/zero3.md).

An engine without optimizer; fp32 masters and moments of this rank's trained weights lie in flat tensors. Two ways for a
gradient to get there, chosen by size:

``compact``: the hook keeps the trained coordinates of the whole, unreduced gradient, without a collective; one
all-reduce a step. Index and sums are not sharded: 8 bytes per trained weight on every rank.
``scatter``: the hook reduce-scatters the whole gradient, as scoring does, and keeps this rank's trained coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from esi_ds.core.adamw import adamw, clip_factor
from esi_ds.core.trained import Trained
from esi_ds.core.units import Parameter
from esi_ds.zero import runtime
from esi_ds.zero.checkpoint import Parts
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.gradients import ReducedGradients
from esi_ds.zero.tuner import NotFinite, Rule, Tuner

COMPACT_LIMIT = 2 << 30  # bytes of unsharded index and sums that a rank may hold under `auto`


def choose_reduction(total: int, reduction: str) -> tuple[str, str]:
    """(``compact`` or ``scatter``, a sentence that says why) for ``total`` trained weights."""
    size = 8 * total
    reason = f"index and sums of {total:,} trained weights take {size / 2**30:.3g} GiB on every rank"
    if reduction == "auto":
        return ("compact" if size <= COMPACT_LIMIT else "scatter"), reason
    return reduction, f"set by tune.reduction; {reason}"


class CompactGradients:
    """Sums of the trained coordinates of every parameter's gradient: the same layout on every rank.

    ``sums`` fp32 [trained weights of the model]; ``ranges``: the part of it that is this rank's to train, by name.
    """

    def __init__(self, model: ShardedModel, trained: Trained, parameters: list[Parameter]):
        device = runtime.device()
        self._by_tensor: dict[nn.Parameter, tuple[Tensor | None, slice]] = {}
        self._others = [tensor for name, tensor in model.by_name.items() if not trained.count(name)]
        self.ranges: dict[str, slice] = {}
        start = 0
        for parameter in parameters:
            positions = trained.positions(parameter.name, 0, parameter.numel)
            count = trained.count(parameter.name)
            place = slice(start, start + count)
            self._by_tensor[model.by_name[parameter.name]] = (
                None if positions is None else positions.to(device),
                place,
            )
            shard = model.shard(parameter)
            own = (trained.count_before(parameter.name, index) for index in (shard.low, shard.high))
            self.ranges[parameter.name] = slice(*(start + index for index in own))
            start += count
        self.sums = torch.zeros(start, dtype=torch.float32, device=device)

    def positions(self, parameter: Parameter, tensor: nn.Parameter, low: int) -> Tensor | None:
        """This rank's trained positions of a parameter, counted from its shard's beginning; None: all of the shard."""
        index, place = self._by_tensor[tensor]
        if index is None:
            return None
        own = self.ranges[parameter.name]
        return index[own.start - place.start : own.stop - place.start].long() - low

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Hooks live inside the block; parameters in which nothing trains get no gradient at all."""
        for tensor in self._others:
            tensor.requires_grad_(False)
        handles = []
        for tensor in self._by_tensor:
            tensor.requires_grad_(True)
            tensor.grad = None
            handles.append(tensor.register_post_accumulate_grad_hook(self._collect))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _collect(self, tensor: nn.Parameter) -> None:
        index, place = self._by_tensor[tensor]
        gradient, tensor.grad = tensor.grad.detach().reshape(-1), None
        self.sums[place] += gradient if index is None else gradient.index_select(0, index)

    def flush(self) -> None:
        """Nothing waits here."""

    def own_finite(self) -> bool:
        """Whether this rank's own gradients, before they are reduced, are finite."""
        return math.isfinite(_norm(self.sums))

    def reduce(self) -> tuple[Tensor, float]:
        """This rank's part of the summed gradient, and the norm of all of it. One all-reduce."""
        total = runtime.all_reduce_sum(self.sums)
        return torch.cat([total[place] for place in self.ranges.values()]), _norm(total)

    def zero(self) -> None:
        self.sums.zero_()


def _norm(values: Tensor) -> float:
    """Summed in float64, without a copy."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


class ScatteredGradients(ReducedGradients):
    """Sums of this rank's trained coordinates; each gradient is reduce-scattered whole as it appears."""

    def __init__(self, model: ShardedModel, trained: Trained, parameters: list[Parameter]):
        super().__init__(model, parameters)
        device = runtime.device()
        self._positions: dict[str, Tensor | None] = {}
        self.ranges: dict[str, slice] = {}
        start = 0
        for parameter in parameters:
            shard = model.shard(parameter)
            positions = trained.positions(parameter.name, shard.low, shard.high)
            self._positions[parameter.name] = None if positions is None else positions.to(device)
            count = shard.numel if positions is None else len(positions)
            self.ranges[parameter.name] = slice(start, start + count)
            start += count
        self.sums = torch.zeros(start, dtype=torch.float32, device=device)

    def positions(self, parameter: Parameter, tensor: nn.Parameter, low: int) -> Tensor | None:
        found = self._positions[parameter.name]
        return None if found is None else found.long()

    def receive(self, parameter: Parameter, local: Tensor) -> None:
        index = self._positions[parameter.name]
        self.sums[self.ranges[parameter.name]] += local if index is None else local.index_select(0, index)

    def own_finite(self) -> bool:
        """The sums hold every rank's gradients: nobody in particular can be named."""
        return True

    def reduce(self) -> tuple[Tensor, float]:
        """Already reduced; one all-reduce of the squared norm."""
        norm_squared = torch.tensor(_norm(self.sums) ** 2, dtype=torch.float64)
        return self.sums.clone(), math.sqrt(runtime.all_reduce_sum(norm_squared))

    def zero(self) -> None:
        self.sums.zero_()


class SparseTuner(Tuner):
    """AdamW on the trained weights of this rank's shards; state in flat fp32 tensors, parameter after parameter."""

    def __init__(self, model: ShardedModel, trained: Trained, rule: Rule, reduction: str):
        super().__init__(model, trained)
        self.rule, self.num_steps = rule, 0
        kind = CompactGradients if reduction == "compact" else ScatteredGradients
        self.gradients = kind(model, trained, self.parameters)
        sizes = [place.stop - place.start for place in self.gradients.ranges.values()]
        self._places: dict[str, slice] = {}
        start = 0
        for parameter, size in zip(self.parameters, sizes, strict=True):
            self._places[parameter.name] = slice(start, start + size)
            start += size
        self.state = {
            what: torch.zeros(start, dtype=torch.float32, device=runtime.device())
            for what in ("master", "exp_avg", "exp_avg_sq")
        }
        for parameter in self.parameters:
            weight = model.local_weight(parameter)
            positions = self._positions(parameter)
            picked = weight if positions is None else weight[positions.to(weight.device)]
            self.state["master"][self._places[parameter.name]] = picked.to(self.state["master"])

    def _positions(self, parameter: Parameter) -> Tensor | None:
        low = self.model.shard(parameter).low
        return self.gradients.positions(parameter, self.model.by_name[parameter.name], low)

    @contextmanager
    def running(self) -> Iterator[None]:
        with self.gradients.collecting():
            yield

    def forward(self, batch: Mapping[str, Tensor], num_logits: int) -> Tensor:
        return self.model.module(**batch, use_cache=False, logits_to_keep=num_logits).logits

    def backward(self, loss: Tensor) -> None:
        """Collectives: the model's gathers, and in mode ``scatter`` the reduce-scatters."""
        loss.backward()
        self.gradients.flush()
        # Some modules' post-backward hooks never fire; a parameter still gathered would hide what is written below.
        self.model.release()

    def step(self, lr: float) -> float:
        finite = self.gradients.own_finite()
        gradient, norm = self.gradients.reduce()
        if not math.isfinite(norm):
            raise NotFinite([rank for rank, good in enumerate(runtime.gather_objects(finite)) if not good])
        factor = clip_factor(norm, self.rule.clip)
        if factor is not None:
            gradient.mul_(factor)
        self.num_steps += 1
        state = self.state
        adamw(
            state["master"],
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            step=self.num_steps,
            lr=lr,
            betas=self.rule.betas,
            eps=self.rule.eps,
            weight_decay=self.rule.weight_decay,
        )
        self.gradients.zero()
        self._write_back()
        return norm

    @torch.no_grad()
    def _write_back(self) -> None:
        """Masters into the partitions, by index; frozen weights are not touched. The model must be released."""
        for parameter in self.parameters:
            weight = self.model.local_weight(parameter)
            values = self.state["master"][self._places[parameter.name]].to(weight)
            positions = self._positions(parameter)
            if positions is None:
                weight.copy_(values)
            else:
                weight.index_copy_(0, positions.to(weight.device), values)
        self.model.publish()

    def saved(self) -> Parts:
        return {
            f"{parameter.name}/{what}": (
                self.trained.count_before(parameter.name, self.model.shard(parameter).low),
                values[self._places[parameter.name]],
            )
            for parameter in self.parameters
            for what, values in self.state.items()
        }

    def restored(self, step: int) -> None:
        self.num_steps = step
        self.model.release()
        self._write_back()
