"""DeepSpeed's AutoEP: every rank of a group holds some of the experts, and tokens travel to them (docs/moe.md).

``deepspeed.initialize`` replaces each block of experts: ``experts.w1``, ``w2`` and ``w3`` [experts here, ...] are the
gate, down and up matrices of this rank's experts, cut by ZeRO-3 over the ranks that hold the same ones. What they are
in the model's own names and positions is found here; nothing else in the package knows those three names.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from deepspeed.checkpoint.constants import AUTOEP_PARAM_LOCAL_EXPERTS, DS_AUTOEP_UC_META
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import Tensor, nn
from transformers.utils import output_capturing

from esi_ds.core.units import Parameter, Shard
from esi_ds.errors import UserError

ROLES = {"w1": "expert.gate", "w2": "expert.down", "w3": "expert.up"}
FIELD = "deepspeed.expert_parallel"


def is_on(deepspeed_config: Mapping) -> bool:
    return bool(deepspeed_config.get("expert_parallel", {}).get("enabled"))


def mend_registry(registry: type | None = None) -> bool:
    """Let DeepSpeed 0.19.8 use transformers' registry of recorded outputs as the plain dict it takes it for.

    transformers 5.23 keys that dict by model in ``get(model)`` and ``registry[model] = ...``; AutoEP calls ``get(key,
    default)`` and ``registry[key] = ...`` with text keys: TypeError at ``get``. Text keys are sent to dict's own
    methods, models to transformers'. Does nothing, and returns False, where ``get`` takes a default (then either side
    has been changed). registry: the class to mend, transformers' own unless a test says otherwise.
    """
    registry = registry or type(output_capturing._CAN_RECORD_REGISTRY)
    own_get, own_set = registry.get, registry.__setitem__
    if registry is dict or own_get is dict.get or len(inspect.signature(own_get).parameters) > 2:
        return False

    def get(self, key, default=None):
        return dict.get(self, key, default) if isinstance(key, str) else own_get(self, key)

    def set_item(self, key, value) -> None:
        dict.__setitem__(self, key, value) if isinstance(key, str) else own_set(self, key, value)

    registry.get, registry.__setitem__ = get, set_item
    return True


def blocks(module: nn.Module) -> Iterator[tuple[str, AutoEPMoELayer]]:
    """The replaced blocks, by full name, in the model's order."""
    for name, found in module.named_modules():
        if isinstance(found, AutoEPMoELayer):
            yield name, found


def remember(module: nn.Module) -> dict[str, weakref.ref]:
    """A model's tensors by name, before DeepSpeed is given it; kept alive by the model only."""
    return {name: weakref.ref(tensor) for name, tensor in module.named_parameters()}


def layouts(module: nn.Module, parameters: Sequence[Parameter], before: Mapping[str, weakref.ref]) -> list[Shard]:
    """What every live tensor holds, as a rank sees it gathered, in the order of the model's parameters.

    parameters: the model's own, described before it was handed to DeepSpeed; before: what ``remember`` gave then. A
    tensor that is still there holds its parameter whole. Raises UserError for experts packed in a way that AutoEP
    reorders.
    """
    by_name = {parameter.name: parameter for parameter in parameters}
    names = {id(tensor): name for name, reference in before.items() if (tensor := reference()) is not None}
    found = [
        Shard(by_name[own], ((0, by_name[own].numel),), name)
        for name, tensor in module.named_parameters()
        if (own := names.get(id(tensor), name)) in by_name
    ]
    held = {shard.parameter.name for shard in found}
    for block_name, block in blocks(module):
        replaced = [p for p in parameters if p.name.startswith(f"{block_name}.") and p.name not in held]
        found += [_experts(block_name, leaf, getattr(block.experts, leaf), replaced) for leaf in ROLES]
        for name, _ in block.router.named_parameters(f"{block_name}.router"):
            (own,) = [p for p in replaced if p.role == "router" and p.name.endswith(name.rpartition(".")[2])]
            found.append(Shard(own, ((0, own.numel),), name))
    unnamed = {name for name, _ in module.named_parameters()} - {shard.name for shard in found}
    assert not unnamed, f"AutoEP made tensors that no parameter is known for: {sorted(unnamed)}"
    return sorted(found, key=lambda shard: (shard.parameter.offset, shard.runs[0][0]))


def _experts(block_name: str, leaf: str, tensor: nn.Parameter, replaced: Sequence[Parameter]) -> Shard:
    """The layout of w1, w2 or w3: one matrix of each of this rank's experts, one behind another."""
    local = getattr(tensor, DS_AUTOEP_UC_META)[AUTOEP_PARAM_LOCAL_EXPERTS]
    owners = [p for p in replaced if any(unit.role == ROLES[leaf] for unit in p.units)]
    name = f"{block_name}.experts.{leaf}"
    if len(owners) != 1:
        problem = f"{len(owners)} tensors hold what AutoEP calls {leaf}: only experts fused in one tensor are known"
        raise UserError(FIELD, block_name, problem, "take expert_parallel out of the DeepSpeed config")
    layout = Shard(owners[0], expert_runs(owners[0], ROLES[leaf], local), name)
    shape = tuple(tensor.ds_shape)
    straight = leaf != "w2" or owners[0].shape[1:] == shape[1:]
    if any(unit.count > 1 for unit in owners[0].units) or not straight or layout.numel != torch.Size(shape).numel():
        problem = "AutoEP transposes or takes apart the matrices of its experts: a mask's positions would be others"
        raise UserError(FIELD, owners[0].name, problem, "take expert_parallel out of the DeepSpeed config")
    return layout


def expert_runs(parameter: Parameter, role: str, experts: Collection[int]) -> tuple[tuple[int, int], ...]:
    """Where the matrices of one role of some experts lie in a parameter; matrices that touch are one run."""
    runs: list[tuple[int, int]] = []
    for unit in parameter.units:
        if unit.role == role and unit.expert in experts:
            if runs and runs[-1][1] == unit.start:
                runs[-1] = (runs[-1][0], unit.end)
            else:
                runs.append((unit.start, unit.end))
    return tuple(runs)


def routers_now(module: nn.Module, before: Sequence[str]) -> dict[str, nn.Module]:
    """The model's own names of its routers → the modules that route now."""
    replaced = dict(blocks(module))
    return {
        name: next((block.router for own, block in replaced.items() if name.startswith(f"{own}.")), None)
        or module.get_submodule(name)
        for name in before
    }


def buffer_names(module: nn.Module, before: Collection[str]) -> dict[str, str]:
    """The model's own names of persistent buffers → their names now: a router's move with the router."""
    now = dict(module.named_buffers())
    found = {name: name for name in before if name in now}
    for block_name, _ in blocks(module):
        for name in before:
            moved = f"{block_name}.router.{name.rpartition('.')[2]}"
            if name.startswith(f"{block_name}.") and name not in found and moved in now:
                found[name] = moved
    return found


def collect(layout: Shard, tensor: Tensor, keeper: int, into: Tensor | None) -> None:
    """Bring the parts that the members of an expert-parallel group hold of a parameter to ``keeper`` (a global rank).

    tensor: this rank's own part, gathered. into: flat, of the parameter's size, on the keeper's CPU; None elsewhere.
    One broadcast per member, in the keeper's group only: no rank has more than one other's part on its device.
    """
    group = groups._get_expert_parallel_group(tensor.group_name)
    members = torch.distributed.get_process_group_ranks(group)
    if keeper not in members:
        return
    role, size = ROLES[layout.name.rpartition(".")[2]], tensor.shape[0]
    for position, member in enumerate(members):
        part = tensor.detach().clone() if member == torch.distributed.get_rank() else torch.empty_like(tensor)
        torch.distributed.broadcast(part, member, group=group)
        if into is not None:
            experts = range(position * size, (position + 1) * size)
            theirs = Shard(layout.parameter, expert_runs(layout.parameter, role, experts), layout.name)
            values = part.reshape(-1).cpu()
            for where, low, high in theirs.parts():
                into[low:high] = values[where]
