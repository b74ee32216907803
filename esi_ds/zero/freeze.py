"""``esi_ds.freeze``: any optimizer trains a mask's weights, or all others; the rest keep their bits.

In plain PyTorch the frozen weights are copied before every ``step`` of a ``torch.optim.Optimizer`` and written back
after it, by torch's hooks for all optimizers; under ZeRO-3 the same happens to each flat fp32 tensor that DeepSpeed
steps. Weight decay, momentum and factored or orthogonalised updates move only trained weights so, whatever the rule.
What changes weights in another way is noticed by the digests of the frozen bits (``FrozenWeights.check``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from esi_ds.core.adamw import frozen_digest, restore_frozen
from esi_ds.core.mask import Mask
from esi_ds.core.trained import Trained
from esi_ds.core.units import Shard
from esi_ds.errors import UserError
from esi_ds.zero.bypass import refuse_added, refuse_outer_masters, refuse_reshaped, refuse_steps_elsewhere
from esi_ds.zero.named_parameters import resolve_trained
from esi_ds.zero.optimizer import FlatGroups, as_coordinates, keep_trained_gradient, partition_of
from esi_ds.zero.partitioned import attributes, is_partitioned, whole_shape

FIELD, OUTSIDE = "esi_ds.freeze", "something other than an optimizer's step"


def freeze(
    model: nn.Module,
    mask: Mask | str | Path,
    train: str = "selected",
    *,
    unscored: str = "freeze",
    router: str | None = None,
    roles: Mapping[str, str] | None = None,
) -> FrozenWeights:
    """Keep every frozen weight of ``model`` bit-identical; the arguments are those of ``MaskedAdamW``.

    Call it before the optimizer is made: parameters without a trained weight no longer require gradients. A step takes
    the memory of a copy of the optimizer's weights, or under ZeRO-3 of one sub-group. No collectives. Raises UserError
    as ``MaskedAdamW`` does.
    """
    return FrozenWeights(model, mask, train, unscored, router, roles)


@dataclass(frozen=True)
class OpenStep:
    """A step of an optimizer that has begun, and not ended: it is under way, or has raised an error."""

    copies: list[tuple[nn.Parameter, Tensor]]  # the parameters, with their weights before it
    depth: int  # calls of ``step``, as a class's own step() calls that of the class it derives from


class FrozenWeights:
    """The guard that ``freeze`` returns: it lasts until ``close()``, or to the end of a ``with`` block.

    Gradients of frozen weights are zeroed as they arrive, so that norms and shared statistics are of trained weights.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Mask | str | Path,
        train: str,
        unscored: str,
        router: str | None,
        roles: Mapping[str, str] | None,
    ):
        self._model = model
        groups, self.trained = resolve_trained(model, mask, train, unscored, router, roles)
        self.parameters: dict[str, nn.Parameter] = dict(groups[0]["params"])
        self._names = {id(tensor): name for name, tensor in self.parameters.items()}
        self._required_gradients = {name: tensor.requires_grad for name, tensor in self.parameters.items()}
        self._coordinates: dict[str, Tensor | None] = {}
        self._digests: dict[str, str] = {}
        self._versions: dict[str, int] = {}
        self._shapes = {name: whole_shape(tensor) for name, tensor in self.parameters.items()}
        self._dtypes: dict[str, torch.dtype] = {}
        self._open_steps: dict[Optimizer, OpenStep] = {}
        # Steps of optimizers that hold none of these parameters.
        self._stranger_steps: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._unverified = ""  # class of a stranger that has stepped since the weights were verified
        self._flat_groups: FrozenFlatGroups | None = None
        self._handles: list[Any] = []
        for name, tensor in self.parameters.items():
            self._freeze(name, tensor)
        self._handles.append(register_optimizer_step_pre_hook(torch.compiler.disable(self._before_step)))
        self._handles.append(register_optimizer_step_post_hook(torch.compiler.disable(self._after_step)))

    def _freeze(self, name: str, tensor: nn.Parameter) -> None:
        if not hasattr(tensor, "_z3_optimizer"):  # an engine waits for the gradients of all that it was made with
            tensor.requires_grad_(self.trained.count(name) > 0)
        if not tensor.requires_grad:
            tensor.grad = None
        if not is_partitioned(tensor):
            self._record(name, tensor)
        if tensor.requires_grad:
            self._handles.append(tensor.register_post_accumulate_grad_hook(self._mask_gradient))
            if tensor.grad is not None:
                self._mask_gradient(tensor)

    def __enter__(self) -> FrozenWeights:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._remove()

    def close(self) -> None:
        """Check the frozen weights, and remove every hook; parameters require gradients as they did before ``freeze``.

        Each rank checks its own part: no collectives. Raises UserError as ``check`` does, once all is removed.
        """
        try:
            if self._handles:
                self.check()
        finally:
            self._remove()

    def check(self) -> None:
        """Raise UserError unless all frozen weights of this rank have the bits that they had when they were frozen.

        Under ZeRO-3 that is before the first step. No collectives; all weights are read once.
        """
        self._undo_open_steps()
        self._check_present()
        for name in self._digests:
            self._verify(name, OUTSIDE)

    def _check_present(self) -> None:
        """Raise UserError where the model no longer holds a parameter that was frozen, or trains one that was added."""
        held = {id(tensor) for tensor in self._model.parameters()}
        for name, tensor in self.parameters.items():
            if id(tensor) not in held:
                problem = (
                    "was replaced by another tensor since it was frozen, as FSDP and load_state_dict(assign=True) do"
                )
                raise UserError(FIELD, name, problem, "freeze after that, and use ZeRO-3 instead of FSDP")
        refuse_added(FIELD, self._model, self._names)

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._undo_open_steps()
        if self._flat_groups is not None:
            self._flat_groups.detach()
        for name, tensor in self.parameters.items():
            tensor.requires_grad_(self._required_gradients[name])

    def _values(self, tensor: nn.Parameter) -> Tensor:
        """This rank's weights of a parameter, flat, without padding."""
        if is_partitioned(tensor):
            return attributes(tensor).ds_tensor.detach()[: partition_of(self._names[id(tensor)], tensor).numel]
        return tensor.detach().reshape(-1)

    def _coordinates_of(self, tensor: nn.Parameter) -> Tensor | None:
        """Trained coordinates among ``_values``, on their device, in the form that ``core.adamw`` takes."""
        name, device = self._names[id(tensor)], self._values(tensor).device
        if name not in self._coordinates:
            shard = partition_of(name, tensor)
            self._coordinates[name] = as_coordinates(self.trained, [shard], [shard.numel])
        coordinates = self._coordinates[name]
        if coordinates is not None and coordinates.device != device:
            self._coordinates[name] = coordinates = coordinates.to(device)
        return coordinates

    def _digest(self, tensor: nn.Parameter) -> str:
        return frozen_digest(self._values(tensor), self._coordinates_of(tensor))

    def _record(self, name: str, tensor: nn.Parameter) -> None:
        if self.trained.count(name) < self.trained.numels[name]:
            self._digests[name], self._versions[name] = self._digest(tensor), tensor._version
            self._dtypes[name] = tensor.dtype

    def _check_form(self, tensor: nn.Parameter) -> None:
        """Raise UserError where a parameter no longer has the shape and dtype that it was frozen in."""
        name = self._names[id(tensor)]
        refuse_reshaped(FIELD, name, tensor, self._shapes[name])
        if tensor.dtype != (before := self._dtypes.get(name, tensor.dtype)):
            problem = f"was converted from {before} to {tensor.dtype} after it was frozen, which changes its bits"
            raise UserError(FIELD, name, problem, "convert first, then freeze")

    def _verify(self, name: str, culprit: str) -> None:
        tensor = self.parameters[name]
        self._check_form(tensor)
        if self._digest(tensor) != self._digests[name]:
            remedy = "let a torch.optim.Optimizer update the model's own parameters, in plain PyTorch or under ZeRO-3"
            raise UserError(FIELD, name, f"has frozen weights that were changed by {culprit}", remedy)
        self._versions[name] = tensor._version

    def _mask_gradient(self, tensor: nn.Parameter) -> None:
        """Zero a new gradient at frozen weights, after looking for changes that no step of an optimizer has made."""
        if self._flat_groups is not None:
            return
        engine = getattr(tensor, "_z3_optimizer", None)
        if engine is not None:
            self._attach(engine)
            return
        refuse_outer_masters(FIELD, self._names[id(tensor)], tensor)
        if is_partitioned(tensor):
            return  # an engine without optimizer
        self._check_form(tensor)
        if self._unverified:
            culprit, self._unverified = f"a step of {self._unverified}", ""
            for name in self._digests:
                self._verify(name, culprit)
        elif tensor._version != self._versions.get(self._names[id(tensor)], tensor._version):
            self._verify(self._names[id(tensor)], OUTSIDE)
        keep_trained_gradient(tensor, self._coordinates_of(tensor))

    def _attach(self, zero_optimizer: Any) -> None:
        """Guard the steps of ZeRO-3 from now on, which is before the first one: at the first gradient."""
        refuse_steps_elsewhere(FIELD, zero_optimizer)
        if isinstance(getattr(zero_optimizer._optimizer_step, "__self__", None), FrozenFlatGroups):
            raise UserError(FIELD, "this engine", "is frozen by another mask already", "close that one first")
        self._check_present()
        self._coordinates.clear()
        self._flat_groups = FrozenFlatGroups(
            zero_optimizer, self.trained, lambda tensor: partition_of(self._names[id(tensor)], tensor)
        )
        for name, tensor in self.parameters.items():
            self._record(name, tensor)

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        if self._flat_groups is not None:
            return
        depth = 1
        if outer := self._open_steps.pop(optimizer, None):  # its step() calls another class's, or has raised an error
            self._restore(outer.copies)
            depth += outer.depth
        stepped = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        tensors = [tensor for tensor in stepped if id(tensor) in self._names]
        if len(tensors) < len(stepped) and optimizer not in self._stranger_steps:
            self._check_present()
        for tensor in tensors:
            self._check_form(tensor)
        self._open_steps[optimizer] = OpenStep([(tensor, tensor.detach().clone()) for tensor in tensors], depth)

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        step = self._open_steps.pop(optimizer, None)
        if self._flat_groups is not None or step is None:
            return
        if not step.copies:
            self._count_stranger(optimizer)
        self._restore(step.copies)
        if step.depth > 1:  # after an error too: its copies are kept until ``check()`` or ``close()``
            self._open_steps[optimizer] = OpenStep(step.copies, step.depth - 1)

    def _count_stranger(self, optimizer: Optimizer) -> None:
        """Have the weights verified at the next gradient after its steps 1, 2, 4, 8, ...

        A small step of masters outside of the model may round to the same bits; many do not.
        """
        count = self._stranger_steps.get(optimizer, 0) + 1
        self._stranger_steps[optimizer] = count
        if count.bit_count() == 1:
            self._unverified = type(optimizer).__name__

    def _undo_open_steps(self) -> None:
        """Write back the frozen weights of steps that have raised an error."""
        while self._open_steps:
            self._restore(self._open_steps.popitem()[1].copies)

    @torch.no_grad()
    def _restore(self, copies: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        for tensor, before in copies:
            name = self._names[id(tensor)]
            if tensor.shape != before.shape or tensor.dtype != before.dtype:
                problem = f"was replaced by a tensor {list(tensor.shape)} of {tensor.dtype} in an optimizer's step"
                raise UserError(FIELD, name, problem, "take an optimizer that updates parameters in place")
            flat = tensor.detach().reshape(-1)
            restore_frozen(flat, before.reshape(-1), self._coordinates_of(tensor))
            if flat.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(flat.view(tensor.shape))
            if name in self._versions:
                self._versions[name] = tensor._version


class FrozenFlatGroups(FlatGroups):
    """ZeRO-3's flat tensors, whose frozen coordinates keep their bits through every step of any optimizer."""

    def __init__(self, zero_optimizer: Any, trained: Trained, shard_of: Callable[[Tensor], Shard]):
        super().__init__(zero_optimizer, trained, shard_of)
        self._step_sub_group = zero_optimizer._optimizer_step
        zero_optimizer._optimizer_step = self._guarded_step

    def _guarded_step(self, index: int) -> None:
        """Replaces DeepSpeed's step of one sub-group, which takes any optimizer."""
        flat = self.optimizer.fp32_partitioned_groups_flat[index].detach()
        before = flat.clone()
        try:
            self._step_sub_group(index)
        finally:
            restore_frozen(flat, before, self.coordinates[id(self.optimizer.fp32_partitioned_groups_flat[index])])

    def detach(self) -> None:
        """Give DeepSpeed its own steps back."""
        self.optimizer.step, self.optimizer._optimizer_step = self._step, self._step_sub_group
