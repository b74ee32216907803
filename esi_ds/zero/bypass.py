"""Ways in which weights would be trained past a mask, and their refusals: for ``MaskedAdamW`` and ``freeze``.

Other people's training loops step masters of their own, step in other processes, add adapters, or drop the optimizer
that they are given. Nothing here imports deepspeed: what it does is read off parameters and its optimizer.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from esi_ds.core.adamw import frozen_digest
from esi_ds.errors import UserError
from esi_ds.zero.partitioned import is_partitioned, whole_shape

FIELD = "MaskedAdamW"
REMEDY = (
    "let MaskedAdamW step (under DeepSpeed Trainer drops it: use stage 3), or close() it before another optimizer steps"
)


def refuse_outer_masters(field: str, name: str, tensor: Tensor) -> None:
    """Raise UserError where DeepSpeed's ZeRO 1, 2 or bf16 optimizer trains copies of a parameter."""
    if hasattr(tensor, "_hp_mapping"):
        problem = "is trained by DeepSpeed's ZeRO stage 1 or 2, which steps copies of the parameters"
        raise UserError(field, name, problem, "use stage 3, or plain PyTorch")


def refuse_steps_elsewhere(field: str, zero_optimizer: Any) -> None:
    """Raise UserError where a ZeRO-3 engine does not step in this process, thread and memory."""
    if type(zero_optimizer).__name__.startswith("SuperOffload") or getattr(zero_optimizer, "zenflow", False):
        problem = "steps weights in other processes or threads, where frozen ones cannot be kept"
        raise UserError(field, "SuperOffload or ZenFlow", problem, "use plain ZeRO-3, with or without offload to cpu")
    if getattr(zero_optimizer, "swap_optimizer", False):
        raise UserError("offload_optimizer.device", "nvme", "holds weights where the mask cannot reach them", "use cpu")


def refuse_other_rules(zero_optimizer: Any) -> None:
    """Raise UserError where a ZeRO-3 engine updates weights by other rules than its optimizer's."""
    ratio = getattr(zero_optimizer, "partial_offload", 1.0)
    if getattr(zero_optimizer, "offload_optimizer", False) and ratio != 1.0:
        problem = "lets DeepSpeed's own AdamW step the weights that are not offloaded"
        raise UserError("offload_optimizer.ratio", ratio, problem, "set it to 1, or use esi_ds.freeze")
    if getattr(zero_optimizer, "use_muon", False):
        problem = "would step gradients that DeepSpeed has orthogonalised for Muon"
        raise UserError(FIELD, None, problem, "give the engine another optimizer, or use esi_ds.freeze")


def refuse_reshaped(field: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise UserError where a parameter no longer has the shape that the mask was applied in."""
    if (now := whole_shape(tensor)) != shape:
        problem = f"has shape {list(now)}, not {list(shape)} as when the mask was applied: FSDP or a resize changes it"
        raise UserError(field, name, problem, "resize before that, and use ZeRO-3 instead of FSDP")


def refuse_added(field: str, model: nn.Module, known: Container[int]) -> None:
    """Raise UserError where the model would train a parameter whose id is not ``known``, as an adapter's."""
    for name, tensor in model.named_parameters():
        if tensor.requires_grad and id(tensor) not in known:
            problem = "was added to the model after the mask was applied, as by an adapter, and would train past it"
            raise UserError(field, name, problem, "train the model's own weights, without an adapter")


class Owner(Protocol):
    """What ``OtherSteps`` asks of ``MaskedAdamW``."""

    parameters: dict[str, nn.Parameter]  # those that it trains, by name

    def refuse_adapters(self) -> None: ...


class OtherSteps:
    """Refuses steps of other optimizers in the place of a ``MaskedAdamW``.

    transformers' Trainer drops the optimizer that it is given under DeepSpeed. At stage 0 another one steps parameters,
    which is refused before it happens, or masters that are copied back into them, which shows in weights that change
    before the owner's first step. They are read only before another's first step, and at the gradient after each.
    """

    def __init__(self, owner: Owner):
        self._owner = ref(owner)  # torch keeps hooks for all optimizers for the life of the process
        self._before: dict[str, str] | None = None
        self._unverified = ""  # class of an optimizer that has stepped since the weights were verified
        self.owner_has_stepped = False
        self._handles = [
            register_optimizer_step_pre_hook(torch.compiler.disable(self._before_step)),
            register_optimizer_step_post_hook(torch.compiler.disable(self._after_step)),
        ]

    def close(self) -> None:
        """Refuse nothing from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.owner_has_stepped, self._before = True, None

    def verify(self) -> None:
        """Raise UserError if weights differ from those before another optimizer's first step, unless the owner has
        stepped. Reads them only if another has stepped since the last call."""
        owner, culprit, self._unverified = self._owner(), self._unverified, ""
        if not culprit or owner is None or self.owner_has_stepped or self._before is None:
            return
        now = digests(owner.parameters)
        if changed := [name for name, before in self._before.items() if now.get(name) != before]:
            raise UserError(FIELD, changed[0], f"was changed by a step of {culprit}, not of MaskedAdamW", REMEDY)

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        owner = self._owner()
        if owner is None or isinstance(optimizer, type(owner)):
            return
        if any(value is owner for value in vars(optimizer).values()):
            return  # a wrapper of it
        held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        if taken := [name for name, tensor in owner.parameters.items() if id(tensor) in held]:
            problem = f"is about to be stepped by {type(optimizer).__name__}, with a gradient that the mask has cut"
            raise UserError(FIELD, taken[0], problem, REMEDY)
        if not self.owner_has_stepped:
            owner.refuse_adapters()
            self._before = self._before or digests(owner.parameters)

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        owner = self._owner()
        if owner is not None and not isinstance(optimizer, type(owner)):
            self._unverified = type(optimizer).__name__


def digests(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """{name: sha256 of the bits} of the parameters that are not partitioned."""
    none = torch.zeros(0, dtype=torch.int64)
    kept = {name: tensor for name, tensor in parameters.items() if not is_partitioned(tensor)}
    return {name: frozen_digest(tensor.detach().reshape(-1), none.to(tensor.device)) for name, tensor in kept.items()}
