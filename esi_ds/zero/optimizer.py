"""``esi_ds.MaskedAdamW``: AdamW on a mask's weights or on all others, in plain PyTorch and under ZeRO-3.

Under ZeRO-3 an optimizer sees neither parameters nor names: DeepSpeed gives it one flat fp32 tensor per sub-group and
step. ``FlatGroups`` knows the position of every weight in them, and avoids two traps of that engine (docs/zero3.md):
its clipping norm and NaN check include frozen coordinates, and a parameter without a gradient in an accumulation window
keeps that of the last window. Nothing here imports deepspeed: its optimizer is reached through the parameters
(``_z3_optimizer``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, overload
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esi_ds.core.adamw import as_integers, chunks, keep_only, masked_adamw
from esi_ds.core.mask import Mask, pack_bits
from esi_ds.core.trained import Trained
from esi_ds.core.units import Parameter, Shard, whole
from esi_ds.errors import UserError
from esi_ds.zero import runtime
from esi_ds.zero.bypass import (
    FIELD,
    OtherSteps,
    refuse_added,
    refuse_other_rules,
    refuse_outer_masters,
    refuse_reshaped,
    refuse_steps_elsewhere,
)
from esi_ds.zero.named_parameters import named_groups, resolve_trained
from esi_ds.zero.partitioned import attributes, is_partitioned, local_range, partition_numel, whole_shape

RULE = ("lr", "betas", "eps", "weight_decay")
MOMENTS = ("exp_avg", "exp_avg_sq")
TRAINED_DIGEST = "trained_sha256"  # key of every group, by which the state of another mask is refused


class MaskedAdamW(Optimizer):
    """AdamW restricted to the weights of a mask (``train="selected"``: SET) or to all others (``"complement"``: SPA).

    Args:
        model_or_params: a model, or (name, parameter) pairs with the full names of ``model.named_parameters()``, or
            groups of them (``{"params": [(name, parameter), ...], "lr": ...}``).
        mask: an ``esi_ds.Mask`` or its folder.
        unscored: ``freeze`` | ``train``, for parameters that the mask does not name (embeddings, norms, biases,
            routers, encoders of images and sound, routers' correction biases: under ZeRO-3 weight decay changes the
            last two even though no row gives them a gradient).
        router: the same for routers alone, even where the mask names them; ``model_or_params`` must then be a model.
            None: as the mask or ``unscored`` says.
        roles: the ``model.roles`` that the mask was made with.

    Parameters without a trained weight no longer require gradients and are left out. Parameters of lower precision get
    fp32 masters. Moments are fp32, and with ``selected`` only as many as there are trained weights. Frozen weights keep
    their bits, and do not count in the gradient's norm: in plain PyTorch their gradients are zeroed as they arrive,
    until ``close()``, unless several ``MaskedAdamW`` train the parameter.

    Raises UserError for parameters without names, for a rule that cannot train (a negative ``lr``), for a damaged mask
    or one of another model, and where nothing would train. Later it raises UserError where a training loop would train
    past the mask (docs/zero3.md §13, "In other training loops"). Names and shapes decide whether a mask fits: a model
    in memory does not say which weights it was loaded with. All bits of the mask are read once to check them.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        mask: Mask | str | Path,
        train: str = "selected",
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        unscored: str = "freeze",
        router: str | None = None,
        roles: Mapping[str, str] | None = None,
    ):
        groups, trained = resolve_trained(model_or_params, mask, train, unscored, router, roles)
        rule = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self._begin(model_or_params, groups, trained, rule)

    @classmethod
    def of(cls, model: nn.Module, trained: Trained, **rule: Any) -> MaskedAdamW:
        """The optimizer of a stage, which has resolved already which weights of its model train. rule: by ``RULE``."""
        groups = named_groups(model)
        assert trained.numels.keys() == dict(groups[0]["params"]).keys()
        optimizer = cls.__new__(cls)
        optimizer._begin(model, groups, trained, rule)
        return optimizer

    def _begin(
        self,
        model_or_params: nn.Module | Iterable[Any],
        groups: Sequence[dict[str, Any]],
        trained: Trained,
        rule: dict[str, Any],
    ) -> None:
        for group in groups:
            check_rule({**rule, **group})
        self.trained = trained
        self.parameters: dict[str, nn.Parameter] = {}
        self._coordinates: dict[int, Tensor | None] = {}
        kept_groups = []
        for group in groups:
            kept = {name: tensor for name, tensor in group["params"] if trained.count(name)}
            for name, tensor in group["params"]:
                tensor.requires_grad_(name in kept)
                if name not in kept:
                    tensor.grad = None
            self.parameters |= kept
            if kept:
                kept_groups.append({**group, "params": list(kept.values())})
        self._names = {id(tensor): name for name, tensor in self.parameters.items()}
        self._shapes = {name: whole_shape(tensor) for name, tensor in self.parameters.items()}
        super().__init__(kept_groups, {**rule, TRAINED_DIGEST: trained.digest})
        self.zero: FlatGroups | None = None
        self._model = ref(model_or_params) if isinstance(model_or_params, nn.Module) else None
        self._other_steps = OtherSteps(self)
        self._hook = GradientHook(self)
        self._handles = [tensor.register_post_accumulate_grad_hook(self._hook) for tensor in self.parameters.values()]
        for tensor in self.parameters.values():
            if tensor.grad is not None:
                self.notice_gradient(tensor)

    def close(self) -> None:
        """Leave gradients and other optimizers alone from now on, so that another can train the parameters."""
        self._other_steps.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __getstate__(self) -> NoReturn:
        problem = "cannot be copied or pickled: it belongs to its parameters, by their hooks"
        raise UserError(FIELD, None, problem, "make another, and load this one's state_dict()")

    def name_of(self, tensor: Tensor) -> str:
        """Full name of one of the trained parameters. Raises UserError for any other tensor."""
        if id(tensor) not in self._names:
            problem = "would train a tensor that is not a parameter of the model, or was added to it afterwards"
            remedy = "use plain PyTorch or ZeRO stage 3 (other stages train masters of their own), without an adapter"
            raise UserError(FIELD, None, problem, remedy)
        return self._names[id(tensor)]

    def refuse_adapters(self) -> None:
        """Raise UserError where an adapter trains instead of the parameters, none of which requires a gradient now."""
        model = self._model() if self._model is not None else None
        if model is not None and not any(tensor.requires_grad for tensor in self.parameters.values()):
            refuse_added(FIELD, model, self._names)

    def _shard_of(self, tensor: Tensor) -> Shard:
        return partition_of(self.name_of(tensor), tensor)

    def notice_gradient(self, tensor: nn.Parameter) -> None:
        """Attach to ZeRO-3, or keep only the trained gradient; looks at each, because an engine may be made later.

        Parameters' hooks survive partitioning, and DeepSpeed's comes after this one. Raises UserError where something
        else trains the parameters.
        """
        zero_optimizer = getattr(tensor, "_z3_optimizer", None)
        if zero_optimizer is not None:
            if (self.zero is None or self.zero.optimizer is not zero_optimizer) and self._is_dropped_by(zero_optimizer):
                self.attach(zero_optimizer)
            return
        refuse_outer_masters(FIELD, self.name_of(tensor), tensor)
        if is_partitioned(tensor):
            return  # an engine without optimizer
        self._other_steps.verify()
        if holders(tensor) == [self]:
            keep_trained_gradient(tensor, self.coordinates(tensor))

    def _is_dropped_by(self, zero_optimizer: Any) -> bool:
        """Whether this engine should step with this optimizer: the one it has, or else the newest of its parameters."""
        if isinstance(zero_optimizer.optimizer, MaskedAdamW):
            return zero_optimizer.optimizer is self
        return all(holders(tensor)[-1] is self for tensor in self.parameters.values())

    def attach(self, zero_optimizer: Any, shard_of: Callable[[Tensor], Shard] | None = None) -> FlatGroups:
        """Learn ZeRO-3's flat tensors; called automatically at the first backward pass. No collectives.

        shard_of: this rank's part of a tensor; needed where a tensor is not the parameter of its name. Raises UserError
        for engines that step elsewhere, for parameters of other models, and for the state of another mask.
        """
        refuse_steps_elsewhere(FIELD, zero_optimizer)
        refuse_other_rules(zero_optimizer)
        self.zero = FlatGroups(zero_optimizer, self.trained, shard_of or self._shard_of)
        self._other_steps.close()
        self._hook.let_go()
        self._coordinates.clear()
        if zero_optimizer.optimizer is not self:
            self._take_over(zero_optimizer)
        for flat in zero_optimizer.fp32_partitioned_groups_flat:
            self._check_size(flat)
        return self.zero

    def _take_over(self, zero_optimizer: Any) -> None:
        """Replace the optimizer that the engine was given instead of this one.

        transformers' Trainer (5.23: ``deepspeed_init`` sets ``trainer.optimizer = None``) drops the user's optimizer
        and creates a plain AdamW, which would train everything. That one's groups become this one's, because a schedule
        that was made for it goes on writing into them. Where training is resumed, its state is what DeepSpeed has
        loaded from a checkpoint of this optimizer.
        """
        other = zero_optimizer.optimizer
        self._adopt_state(other, zero_optimizer.fp32_partitioned_groups_flat)
        if any(TRAINED_DIGEST not in group or "own_lr" in group for group in other.param_groups):
            self._impose_rule(other)  # else its groups are this one's: accelerate makes a DeepSpeedCPUAdam of them
        self.param_groups = other.param_groups
        zero_optimizer.optimizer = self

    def _impose_rule(self, other: Optimizer) -> None:
        """Give another's groups this optimizer's rule, its learning rate scaled as a schedule scales the other's."""
        rules = [{key: group[key] for key in RULE} | {"lr": own_lr(group)} for group in self.param_groups]
        if any(rule != rules[0] for rule in rules):
            problem = "has groups with different settings, which Trainer has dropped"
            raise UserError(FIELD, None, problem, "give one group")
        rule = {**rules[0], "own_lr": rules[0]["lr"], TRAINED_DIGEST: self.trained.digest}
        del rule["lr"]
        for group in other.param_groups:
            # Torch's schedules keep the rate that they scale in the group. DeepSpeed's do not, and write over it.
            if group.setdefault("initial_lr", other.defaults.get("lr", group["lr"])) == 0:
                problem = (
                    f"takes the place of {type(other).__name__}, whose learning rate is 0: no schedule scales that"
                )
                raise UserError(FIELD, None, problem, "give the engine's optimizer another (Trainer's learning_rate)")
            group.update(rule)

    def _adopt_state(self, other: Optimizer, flats: Iterable[Tensor]) -> None:
        self._check_digest(other.param_groups)
        self.state.clear()
        for flat in flats:
            state = other.state.get(flat, {})
            if state and not {"step", *MOMENTS} <= state.keys():
                problem = f"cannot go on with the state of {type(other).__name__}, which has no {' and '.join(MOMENTS)}"
                raise UserError(FIELD, None, problem, "resume from a checkpoint of MaskedAdamW")
            if state:
                moments = {name: state[name] for name in MOMENTS}
                self.state[flat] = {"step": torch.tensor(float(state["step"])), **moments}
        other.state.clear()

    def _check_digest(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Raise UserError where saved groups are of another mask; those of earlier versions do not say."""
        digest = self.trained.digest
        if any(group.get(TRAINED_DIGEST, digest) != digest for group in groups):
            problem = "was given a state that was saved with another mask, train, unscored or router"
            raise UserError(FIELD, None, problem, "resume with those of the checkpoint")

    def _check_size(self, tensor: Tensor) -> None:
        """Raise UserError where the state of a tensor has not the size that its trained weights need."""
        state, size = self.state.get(tensor), self._num_moments(tensor)
        if state and state["exp_avg"].numel() != size:
            problem = f"was given moments of {state['exp_avg'].numel():,} weights for a tensor that needs {size:,}"
            raise UserError(FIELD, None, problem, "resume with the mask and the number of ranks of the checkpoint")

    def _num_moments(self, tensor: Tensor) -> int:
        trained = self.coordinates(tensor)
        return tensor.numel() if trained is None or trained.dtype == torch.uint8 else len(trained)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of the tensors in the parameter groups: parameters, or one of ZeRO's flat tensors."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._other_steps.owner_has_stepped:
            self._check_first_step()
        for group in self.param_groups:
            rule = {key: group[key] for key in RULE}
            if "own_lr" in group:
                rule["lr"] = group["own_lr"] * group["lr"] / group["initial_lr"]
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._update(tensor, tensor.grad, rule)
        return loss

    def _check_first_step(self) -> None:
        """Raise UserError where an adapter trains in the place of the parameters, or nothing does."""
        self.refuse_adapters()
        if all(tensor.grad is None for group in self.param_groups for tensor in group["params"]):
            problem = "steps, but none of its parameters has a gradient"
            raise UserError(FIELD, None, problem, "give the parameters that the loop trains, and step after backward()")
        self._other_steps.owner_has_stepped = True
        self._hook.let_go()

    def _update(self, tensor: Tensor, gradient: Tensor, rule: dict[str, Any]) -> None:
        trained = self.coordinates(tensor)
        state = self.state_of(tensor)
        state["step"] += 1
        if "master" in state:
            refresh_master(state["master"], tensor)
        weight = state.get("master", tensor.detach())
        flat = weight.view(-1) if weight.is_contiguous() else weight.reshape(-1)  # a copy, written back below
        gradient = gradient.reshape(-1).to(flat.dtype)
        masked_adamw(
            flat, gradient, state["exp_avg"], state["exp_avg_sq"], trained, step=int(state["step"].item()), **rule
        )
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.shape))  # an untouched fp32 master rounds to the bits that it was made from

    def coordinates(self, tensor: Tensor) -> Tensor | None:
        """Trained coordinates of a parameter or of a flat tensor, in the form that ``core.adamw`` takes."""
        if self.zero is not None and id(tensor) in self.zero.coordinates:
            return self.zero.coordinates[id(tensor)]
        key, name = id(tensor), self.name_of(tensor)
        refuse_reshaped(FIELD, name, tensor, self._shapes[name])
        if key not in self._coordinates:
            shard = whole(Parameter(name, tuple(tensor.shape), 0, "other", ()))
            self._coordinates[key] = as_coordinates(self.trained, [shard], [tensor.numel()])
        coordinates = self._coordinates[key]
        if coordinates is not None and coordinates.device != tensor.device:
            self._coordinates[key] = coordinates = coordinates.to(tensor.device)
        return coordinates

    def state_of(self, tensor: Tensor) -> dict[str, Tensor]:
        """``step`` and fp32 ``exp_avg``, ``exp_avg_sq`` (and ``master``), created at the first use."""
        state = self.state[tensor]
        if not state:
            size = self._num_moments(tensor)
            state["step"] = torch.tensor(0.0)
            precision = torch.promote_types(tensor.dtype, torch.float32)
            for name in MOMENTS:
                state[name] = torch.zeros(size, dtype=precision, device=tensor.device)
        precision = state["exp_avg"].dtype
        # Of a run in fp32 the state has no master, and the model may be loaded in bf16 or converted.
        if "master" not in state and torch.promote_types(tensor.dtype, precision) != tensor.dtype:
            state["master"] = tensor.detach().to(precision).reshape(-1).clone()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments and masters stay fp32 instead of being cast to the parameter's dtype.

        Raises UserError for a state that was saved with another mask, train, unscored or router.
        """
        self._check_digest(state_dict["param_groups"])
        groups = self.param_groups
        super().load_state_dict(state_dict)
        for group, loaded in zip(groups, self.param_groups, strict=True):
            group.update({**loaded, TRAINED_DIGEST: self.trained.digest})
        self.param_groups = groups  # a schedule of the optimizer that this one has replaced writes into them
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        for key, tensor in zip(saved, tensors, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                self.state[tensor][name] = value.clone() if name == "step" else value.to(tensor.device, copy=True)
            if self.zero is not None or id(tensor) in self._names:  # else ``attach`` looks
                self._check_size(tensor)


class GradientHook:
    """Has a ``MaskedAdamW`` look at each gradient of its parameters.

    It keeps the optimizer alive until something else does: transformers' Trainer drops the optimizer that it is given
    under DeepSpeed. Once it steps, whoever lets it step holds it; one that is dropped then is gone.
    """

    def __init__(self, owner: MaskedAdamW):
        self._owner, self._held = ref(owner), [owner]

    @property
    def owner(self) -> MaskedAdamW | None:
        return self._owner()

    def let_go(self) -> None:
        """Keep the optimizer alive no longer."""
        self._held.clear()

    def __call__(self, tensor: nn.Parameter) -> None:
        if (owner := self.owner) is not None:
            owner.notice_gradient(tensor)


class FlatGroups:
    """The position of every weight in ZeRO-3's flat fp32 tensors, and the masking of their gradients.

    coordinates: id of a flat tensor → its trained coordinates.
    """

    def __init__(self, zero_optimizer: Any, trained: Trained, shard_of: Callable[[Tensor], Shard]):
        self.optimizer, self.trained, self.shard_of = zero_optimizer, trained, shard_of
        self.gradient_scale = 1.0  # factor of the reduced gradients, applied first in each step
        self.coordinates: dict[int, Tensor | None] = {}
        for flat, parameters in zip(
            zero_optimizer.fp32_partitioned_groups_flat, zero_optimizer.fp16_groups, strict=True
        ):
            sizes = [partition_numel(tensor) for tensor in parameters]
            coordinates = as_coordinates(trained, [shard_of(tensor) for tensor in parameters], sizes)
            self.coordinates[id(flat)] = None if coordinates is None else coordinates.to(flat.device)
        self._step = zero_optimizer.step
        zero_optimizer.step = self._masked_step

    def slices(self) -> Iterator[tuple[Shard, Tensor, int]]:
        """(shard, flat tensor, offset of the shard in it) of every trained tensor."""
        zero = self.optimizer
        for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            for tensor in parameters:
                _, offset, _ = zero.grad_position[zero.get_param_id(tensor)]
                yield self.shard_of(tensor), flat, offset

    def _masked_step(self, closure: Callable[[], float] | None = None) -> None:
        """Replaces DeepSpeed's ``step``: only trained gradients count, and none outlives its accumulation window."""
        zero = self.optimizer
        if self.gradient_scale != 1.0:
            flats = [flat.grad for flat in zero.fp32_partitioned_groups_flat]
            for gradients in flats if zero.offload_optimizer else [zero.grad_partitions_flat_buffer]:
                gradients.mul_(self.gradient_scale)
        for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
            self._mask_gradients(index, flat)
        # With overlap_comm DeepSpeed looks for overflows (fp16), and gathers weights, on streams of its own, which do
        # not wait for what this one has written.
        runtime.synchronize()
        self._step(closure)
        runtime.synchronize()
        zero.grad_partitions_flat_buffer.zero_()
        if zero.offload_optimizer:
            for flat in zero.fp32_partitioned_groups_flat:
                flat.grad.zero_()

    def _mask_gradients(self, index: int, flat: Tensor) -> None:
        zero, trained = self.optimizer, self.coordinates[id(flat)]
        if zero.offload_optimizer:  # gradients lie in the flat tensor, and their norms were taken as they arrived
            flat_gradient = flat.grad
            assert flat_gradient is not None
            keep_only(flat_gradient, trained)
            for tensor in zero.fp16_groups[index]:
                key = zero.get_param_id(tensor)
                if key in zero.norm_for_param_grads:
                    _, offset, size = zero.grad_position[key]
                    zero.norm_for_param_grads[key] = zero._constant_buffered_norm2(
                        flat_gradient.narrow(0, offset, size)
                    )
            return
        # The averaged gradients of a sub-group are consecutive in one buffer, in the flat tensor's order.
        gradients = zero.averaged_gradients[index]
        buffer = torch.as_strided(gradients[0], (len(flat),), (1,), gradients[0].storage_offset())
        assert gradients[-1].data_ptr() + gradients[-1].nbytes == buffer.data_ptr() + buffer.nbytes
        keep_only(buffer, trained)


def holders(tensor: Tensor) -> list[MaskedAdamW]:
    """Every optimizer of this class that trains a parameter, oldest first."""
    hooks = (attributes(tensor)._post_accumulate_grad_hooks or {}).values()
    owners = [hook.owner for hook in hooks if isinstance(hook, GradientHook)]
    return [owner for owner in owners if owner is not None]


def check_rule(rule: Mapping[str, Any]) -> None:
    """Raise UserError for a value by which AdamW would train uphill, divide by zero or make every weight NaN.

    rule: by ``RULE``; further keys are left alone.
    """
    lr, betas, eps, weight_decay = (rule[key] for key in RULE)
    bounded = [("lr", lr, math.inf), ("eps", eps, math.inf), ("weight_decay", weight_decay, math.inf)]
    for key, value, limit in (*bounded, *(("betas", beta, 1.0) for beta in betas)):
        if not 0 <= value < limit:  # NaN too
            below = "finite" if limit == math.inf else "below 1"
            raise UserError(key, value, f"is not at least 0 and {below}", "give a number that is")


def own_lr(group: Mapping[str, Any]) -> float:
    """The learning rate of a group before any schedule scales it: one that Trainer drops may have begun at 0."""
    return group.get("own_lr", group.get("initial_lr", group["lr"]))


def keep_trained_gradient(tensor: Tensor, trained: Tensor | None) -> None:
    """Zero the gradient of a whole parameter at its frozen weights, in place; a sparse one is left as it is."""
    gradient = tensor.grad
    if gradient is not None and not gradient.is_sparse:
        flat = gradient.reshape(-1)
        keep_only(flat, trained)
        if flat.data_ptr() != gradient.data_ptr():
            gradient.copy_(flat.view(gradient.shape))


def refresh_master(master: Tensor, tensor: Tensor) -> None:
    """Give a flat master the weights that something else has written into its parameter since the last update.

    They are those whose bits it does not round to. ``Tensor._version`` would not show a write through ``.data``.
    """
    flat = tensor.detach().reshape(-1)
    for part in chunks(flat):
        rounded, written = as_integers(master[part].to(flat.dtype)), as_integers(flat[part])
        kept = torch.where(rounded == written, master[part], flat[part].to(master.dtype))
        master[part].copy_(kept)  # whether or not it is needed: to look would have a GPU waited for


def partition_of(name: str, tensor: Tensor) -> Shard:
    """This rank's partition of a parameter under ZeRO-3, without padding; the whole of one that is not partitioned."""
    return whole(Parameter(name, whole_shape(tensor), 0, "other", ())).cut(*local_range(tensor))


def as_coordinates(trained: Trained, shards: Sequence[Shard], sizes: Sequence[int]) -> Tensor | None:
    """Trained coordinates of consecutive shards, each padded to its size; padding is frozen.

    None where all train; positions for ``selected`` (a small share), packed bits for ``complement`` (a large share).
    """
    parts = []
    for shard, size in zip(shards, sizes, strict=True):
        parts.append(torch.cat([trained.bits_of(shard), torch.zeros(size - shard.numel, dtype=torch.bool)]))
    bits = torch.cat(parts)
    if bool(bits.all()):
        return None
    if trained.train == "selected":
        return bits.nonzero().flatten().to(torch.int32 if len(bits) < 1 << 31 else torch.int64)
    return pack_bits(bits)
