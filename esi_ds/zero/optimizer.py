"""``esi_ds.MaskedAdamW``: AdamW on a mask's weights or on all others, in plain PyTorch and inside ZeRO-3.

Under ZeRO-3 an optimizer sees neither parameters nor names: DeepSpeed hands it one flat fp32 tensor per sub-group and
step. ``FlatGroups`` knows which weight stands where in them, and closes two traps of that engine (docs/zero3.md): the
clipping norm and its NaN check are taken over frozen coordinates too, and a gradient that did not come in a window is
the last window's. Nothing here imports deepspeed: its optimizer is found through the parameters (``_z3_optimizer``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esi_ds.core.adamw import keep_only, masked_adamw
from esi_ds.core.mask import Mask, pack_bits
from esi_ds.core.trained import Trained
from esi_ds.core.units import Parameter, Shard, whole
from esi_ds.errors import UserError
from esi_ds.models.fingerprint import check_mask_structure
from esi_ds.models.roles import describe, router_names

RULE = ("lr", "betas", "eps", "weight_decay")


class MaskedAdamW(Optimizer):
    """AdamW restricted to the weights of a mask (``train="selected"``: SET) or to all others (``"complement"``: SPA).

    params_or_model: a model, or (name, parameter) pairs with the full names of ``model.named_parameters()``, or groups
    of them (``{"params": [(name, parameter), ...], "lr": ...}``). Bare parameters have no names: they are refused, as
    is a mask that does not fit. mask: an ``esi_ds.Mask`` or its folder. unscored: ``freeze`` | ``train``, for
    parameters the mask does not name (embeddings, norms, biases, routers). router: the same for routers alone, which
    takes a model, not pairs; None: as unscored. roles: the ``model.roles`` that the mask was made with.

    Parameters in which nothing trains stop requiring gradients and are left out. Parameters of lower precision get fp32
    masters. Moments are fp32; for ``selected`` they are as many as the weights that train. Frozen weights keep their
    bits.
    """

    def __init__(
        self,
        params_or_model: nn.Module | Iterable,
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
        for name, value, known in (
            ("train", train, ("selected", "complement")),
            ("unscored", unscored, ("freeze", "train")),
            ("router", router, (None, "freeze", "train")),
        ):
            if value not in known:
                raise UserError(name, value, "is unknown", f"give one of {', '.join(map(str, known))}")
        mask = mask if isinstance(mask, Mask) else Mask.load(mask)
        groups = named_groups(params_or_model)
        named = {name: tensor for group in groups for name, tensor in group["params"]}
        shapes = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in named.items()}
        parameters = _check(params_or_model, named, shapes, mask, roles)
        if router is not None and not router_names(parameters):
            raise UserError("router", router, "speaks of routers, and none is known here", "give a model that has some")
        self.trained = Trained(mask, train, unscored, shapes, router_names(parameters), router)
        if self.trained.total == 0:
            raise UserError("mask", str(mask.path), f"nothing would train with train={train}", "is it the right mask?")
        self._names: dict[int, str] = {}
        self._coordinates: dict[int, Tensor | None] = {}
        kept_groups = []
        for group in groups:
            kept = []
            for name, tensor in group["params"]:
                tensor.requires_grad_(self.trained.count(name) > 0)
                if self.trained.count(name):
                    self._names[id(tensor)] = name
                    kept.append(tensor)
            if kept:
                kept_groups.append({**group, "params": kept})
        super().__init__(kept_groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.zero: FlatGroups | None = None
        self._has_looked = False
        for group in self.param_groups:
            for tensor in group["params"]:
                tensor.register_post_accumulate_grad_hook(self._notice_zero)

    def name_of(self, tensor: Tensor) -> str:
        """Full name of one of the parameters that were given. Raises RuntimeError for any other tensor."""
        if id(tensor) not in self._names:
            raise RuntimeError("a tensor without a name reached MaskedAdamW: it would train in full")
        return self._names[id(tensor)]

    def _shard_of(self, tensor: nn.Parameter) -> Shard:
        """This rank's part of a parameter, without padding, as ZeRO-3 cuts it."""
        name, size = self.name_of(tensor), tensor.partition_numel()
        place = torch.distributed.get_rank(tensor.ds_process_group)
        return whole(Parameter(name, tuple(tensor.ds_shape), 0, "other", ())).cut(place * size, place * size + size)

    def _notice_zero(self, tensor: nn.Parameter) -> None:
        """At the first gradient, before the first step: is this ZeRO-3? Hooks of parameters survive partitioning."""
        if self._has_looked or self.zero is not None:
            return  # the hook is not removed: DeepSpeed's own stands behind it in the list that is being walked
        self._has_looked = True
        engine = getattr(tensor, "_z3_optimizer", None)
        if engine is not None:
            self.attach(engine)

    def attach(self, zero_optimizer: Any, shard_of: Callable[[Tensor], Shard] | None = None) -> FlatGroups:
        """Learn ZeRO-3's flat tensors; happens by itself at the first backward pass. No collectives.

        shard_of: what this rank's part of a tensor holds, where that is not a part of the parameter of its name.
        """
        self.zero = FlatGroups(zero_optimizer, self.trained, shard_of or self._shard_of)
        if zero_optimizer.optimizer is not self:
            self._take_over(zero_optimizer)
        return self.zero

    def _take_over(self, zero_optimizer: Any) -> None:
        """Take the place of an optimizer that the engine was given instead of this one.

        transformers' Trainer (5.23: ``deepspeed_init`` sets ``trainer.optimizer = None``) drops the optimizer it was
        given and makes a plain AdamW, which would train everything. That one's groups go on carrying the schedule: the
        rate used is this optimizer's own times how far the schedule has moved the other's.
        """
        rules = [{key: value for key, value in group.items() if key in RULE} for group in self.param_groups]
        if any(rule != rules[0] for rule in rules):
            raise UserError(
                "MaskedAdamW", None, "has groups of different rules, which Trainer has thrown away", "give one group"
            )
        for other in zero_optimizer.optimizer.param_groups:
            other.setdefault("initial_lr", other["lr"])
        self.param_groups = [
            {**rules[0], "own_lr": rules[0]["lr"], "lr": other["lr"], "initial_lr": other["initial_lr"], "params": []}
            for other in zero_optimizer.optimizer.param_groups
        ]
        zero_optimizer.optimizer = self

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of whatever stands in the parameter groups: parameters, or one of ZeRO's flat tensors."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rule = {key: group[key] for key in RULE}
            if "own_lr" in group:
                rule["lr"] = group["own_lr"] * group["lr"] / group["initial_lr"]
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._update(tensor, rule)
        return loss

    def _update(self, tensor: Tensor, rule: dict[str, Any]) -> None:
        trained = self.coordinates(tensor)
        state = self.state_of(tensor)
        state["step"] += 1
        weight = state.get("master", tensor.detach())
        flat = weight.view(-1) if weight.is_contiguous() else weight.reshape(-1)  # a copy, written back below
        gradient = tensor.grad.reshape(-1).to(flat.dtype)
        masked_adamw(
            flat, gradient, state["exp_avg"], state["exp_avg_sq"], trained, step=int(state["step"].item()), **rule
        )
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.shape))  # fp32 → bf16 of an untouched master is the bits it came from

    def coordinates(self, tensor: Tensor) -> Tensor | None:
        """Trained coordinates of a parameter or of a flat tensor, as ``core.adamw`` takes them."""
        if self.zero is not None and id(tensor) in self.zero.coordinates:
            return self.zero.coordinates[id(tensor)]
        key, name = id(tensor), self.name_of(tensor)
        if key not in self._coordinates:
            shard = whole(Parameter(name, tuple(tensor.shape), 0, "other", ()))
            found = as_coordinates(self.trained, [shard], [tensor.numel()])
            self._coordinates[key] = found if found is None else found.to(tensor.device)
        return self._coordinates[key]

    def state_of(self, tensor: Tensor) -> dict[str, Tensor]:
        """``step`` and fp32 ``exp_avg``, ``exp_avg_sq`` (and ``master``), made at the first use."""
        state = self.state[tensor]
        if not state:
            trained = self.coordinates(tensor)
            size = tensor.numel() if trained is None or trained.dtype == torch.uint8 else len(trained)
            state["step"] = torch.tensor(0.0)
            precision = torch.promote_types(tensor.dtype, torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(size, dtype=precision, device=tensor.device)
            if tensor.dtype != precision:
                state["master"] = tensor.detach().to(precision).reshape(-1).clone()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch casts what it loads to the parameter's dtype; moments and masters stay fp32."""
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        own = [tensor for group in self.param_groups for tensor in group["params"]]
        for key, tensor in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                self.state[tensor][name] = value.clone() if name == "step" else value.to(tensor.device, copy=True)


class FlatGroups:
    """Where every weight stands in ZeRO-3's flat fp32 tensors, and the masking of its gradients.

    ``coordinates``: id of a flat tensor → its trained coordinates.
    """

    def __init__(self, zero_optimizer: Any, trained: Trained, shard_of: Callable[[Tensor], Shard]):
        self.optimizer, self.trained, self.shard_of = zero_optimizer, trained, shard_of
        self.gradient_scale = 1.0  # what reduced gradients are multiplied by before anything is done with them
        self.coordinates: dict[int, Tensor | None] = {}
        for flat, parameters in zip(
            zero_optimizer.fp32_partitioned_groups_flat, zero_optimizer.fp16_groups, strict=True
        ):
            if flat is None:
                raise UserError("offload_optimizer.device", "nvme", "the mask cannot reach weights there", "use cpu")
            sizes = [tensor.partition_numel() for tensor in parameters]
            found = as_coordinates(trained, [shard_of(tensor) for tensor in parameters], sizes)
            self.coordinates[id(flat)] = found if found is None else found.to(flat.device)
        self._step = zero_optimizer.step
        zero_optimizer.step = self._masked_step

    def slices(self) -> Iterator[tuple[Shard, Tensor, int]]:
        """(shard, flat tensor, where it begins there) of every tensor that trains."""
        zero = self.optimizer
        for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            for tensor in parameters:
                _, offset, _ = zero.grad_position[zero.get_param_id(tensor)]
                yield self.shard_of(tensor), flat, offset

    def _masked_step(self, closure: Callable | None = None) -> None:
        """In place of DeepSpeed's ``step``: only trained gradients count, and none outlives its window."""
        zero = self.optimizer
        if self.gradient_scale != 1.0:
            flats = [flat.grad for flat in zero.fp32_partitioned_groups_flat]
            for gradients in flats if zero.offload_optimizer else [zero.grad_partitions_flat_buffer]:
                gradients.mul_(self.gradient_scale)
        for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
            self._mask_gradients(index, flat)
        self._step(closure)
        zero.grad_partitions_flat_buffer.zero_()
        if zero.offload_optimizer:
            for flat in zero.fp32_partitioned_groups_flat:
                flat.grad.zero_()

    def _mask_gradients(self, index: int, flat: Tensor) -> None:
        zero, trained = self.optimizer, self.coordinates[id(flat)]
        if zero.offload_optimizer:  # gradients lie in the flat tensor, and norms were taken while they came
            keep_only(flat.grad, trained)
            for tensor in zero.fp16_groups[index]:
                key = zero.get_param_id(tensor)
                if key in zero.norm_for_param_grads:
                    _, offset, size = zero.grad_position[key]
                    zero.norm_for_param_grads[key] = zero._constant_buffered_norm2(flat.grad.narrow(0, offset, size))
            return
        # The averaged gradients of a sub-group lie one behind another in one buffer, in the flat tensor's order.
        gradients = zero.averaged_gradients[index]
        whole = torch.as_strided(gradients[0], (len(flat),), (1,), gradients[0].storage_offset())
        assert gradients[-1].data_ptr() + gradients[-1].nbytes == whole.data_ptr() + whole.nbytes
        keep_only(whole, trained)


def as_coordinates(trained: Trained, shards: Sequence[Shard], sizes: Sequence[int]) -> Tensor | None:
    """Trained coordinates of shards that lie one behind another, each padded to its size; padding is frozen.

    Positions for ``selected`` (few train), packed bits for ``complement`` (most do).
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


def named_groups(params_or_model: nn.Module | Iterable) -> list[dict[str, Any]]:
    """Parameter groups of (name, parameter) pairs. Raises UserError where there are no names."""
    if isinstance(params_or_model, nn.Module):
        return [{"params": list(params_or_model.named_parameters())}]
    given = list(params_or_model)
    groups = [dict(group) for group in given] if given and isinstance(given[0], dict) else [{"params": given}]
    for group in groups:
        pairs = list(group["params"])
        if "param_names" in group:
            pairs = list(zip(group.pop("param_names"), pairs, strict=True))
        if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            raise UserError(
                "params_or_model",
                None,
                "holds parameters without names, which a mask cannot be matched with",
                "give the model, or model.named_parameters()",
            )
        group["params"] = pairs
    return groups


def _check(
    given: nn.Module | Iterable,
    named: dict[str, Tensor],
    shapes: dict[str, tuple],
    mask: Mask,
    roles: Mapping[str, str] | None,
) -> tuple[Parameter, ...]:
    """Fail closed: names and shapes must be the mask's. The parameters with their roles, where a model was given."""
    for name, tensor in named.items():
        if not tensor.is_floating_point() or "4bit" in type(tensor).__name__ or "8bit" in type(tensor).__name__:
            raise UserError(
                "params_or_model", name, "is quantised: it cannot be trained in place", "load it unquantised"
            )
    if isinstance(given, nn.Module):
        parameters = describe(given, shapes, roles)
        check_mask_structure(mask, parameters, "mask")
        return parameters
    # Without the model's modules there are no roles: every name of the mask must be here in its shape.
    for name, shape in mask.shapes.items():
        if shapes.get(name) != shape:
            problem = "is not among the parameters" if name not in shapes else f"has shape {list(shapes[name])} here"
            raise UserError("mask", str(mask.path), f"its {name} {problem}", "give every parameter of the mask's model")
    if sum(torch.Size(shape).numel() for shape in shapes.values()) != mask.total_numel:
        raise UserError("mask", str(mask.path), "was made for a model of another size", "give all its parameters")
    return ()
