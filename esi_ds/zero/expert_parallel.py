"""DeepSpeed's AutoEP: every rank of a group holds some of the experts, and tokens are sent to them (docs/moe.md).

``deepspeed.initialize`` replaces each expert block: ``experts.w1``, ``w2`` and ``w3`` [local experts, ...] are the
gate, down and up matrices of this rank's experts, partitioned by ZeRO-3 over the ranks that hold the same ones. This
module maps them to the original model's names and positions; no other module knows these three names.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import AUTOEP_PARAM_LOCAL_EXPERTS, DS_AUTOEP_UC_META
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe import ep_experts
from deepspeed.utils import groups
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing

from esi_ds.core.units import Parameter, Shard
from esi_ds.errors import UserError
from esi_ds.models.idle_experts import zero_idle_gradient
from esi_ds.reading import first_line
from esi_ds.zero.partitioned import attributes, whole_shape

ROLES = {"w1": "expert.gate", "w2": "expert.down", "w3": "expert.up"}
FIELD = "deepspeed.expert_parallel"
REMEDY = "name the preset_model or the patterns that fit the model, or remove expert_parallel"
NUM_PROBED = 33  # tokens
PROBED_DIFFERENCE = 0.05  # relative; measured: rounding in bf16 0.003, a wrong routing rule 0.58 and more


def is_on(deepspeed_config: Mapping[str, Any]) -> bool:
    """Whether the DeepSpeed config enables expert parallelism."""
    return bool(deepspeed_config.get("expert_parallel", {}).get("enabled"))


def mend_registry(registry: type[dict[Any, Any]] | None = None) -> bool:
    """Let DeepSpeed 0.19.8 use transformers' registry of recorded outputs as the plain dict that it expects.

    transformers 5.23 keys that dict by model in ``get(model)`` and ``registry[model] = ...``; AutoEP calls ``get(key,
    default)`` and ``registry[key] = ...`` with string keys, which is a TypeError at ``get``. String keys are passed to
    dict's methods, models to those of transformers. Does nothing and returns False where ``get`` takes a default,
    because then either library has changed. registry: the class to mend; transformers' except in tests.
    """
    registry = registry or type(output_capturing._CAN_RECORD_REGISTRY)
    model_get, model_set = registry.get, registry.__setitem__
    if registry is dict or model_get is dict.get or len(inspect.signature(model_get).parameters) > 2:
        return False

    def get(self: dict[Any, Any], key: Any, default: Any = None) -> Any:
        return dict.get(self, key, default) if isinstance(key, str) else model_get(self, key)

    def set_item(self: dict[Any, Any], key: Any, value: Any) -> None:
        dict.__setitem__(self, key, value) if isinstance(key, str) else model_set(self, key, value)

    for name, method in (("get", get), ("__setitem__", set_item)):
        setattr(registry, name, method)
    return True


GROUPED = ("_run_experts_grouped_mm", "_run_experts_grouped_mm_fused_gate_up", "_run_experts_triton_grouped_mm")


def mend_grouped_experts() -> None:
    """``models.idle_experts`` for AutoEP's grouped products; again: no effect.

    Where AutoEP itself exchanges tokens, an expert without any has a group of zero rows, which is not empty; with
    ``comm_backend: deepep`` it may be.
    """
    for name in GROUPED:
        run_experts = getattr(ep_experts, name)
        if not getattr(run_experts, "zeroes_idle", False):
            setattr(ep_experts, name, _mended(run_experts))


def _mended(run_experts: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(run_experts)
    def mended(w1: Tensor, w2: Tensor, w3: Tensor, x: Tensor, num_tokens: Tensor, *options: Any) -> Tensor:
        weights = (zero_idle_gradient(weight, num_tokens) for weight in (w1, w2, w3))
        return run_experts(*weights, x, num_tokens, *options)

    mended.zeroes_idle = True  # type: ignore[attr-defined]  # a mark on the function
    return mended


def blocks(module: nn.Module) -> Iterator[tuple[str, AutoEPMoELayer]]:
    """The replaced blocks, by full name, in the model's order."""
    for name, submodule in module.named_modules():
        if isinstance(submodule, AutoEPMoELayer):
            yield name, submodule


def remember(module: nn.Module) -> dict[str, weakref.ref[nn.Parameter]]:
    """Weak references to a model's tensors by name, taken before DeepSpeed replaces blocks."""
    return {name: weakref.ref(tensor) for name, tensor in module.named_parameters()}


def layouts(
    module: nn.Module, parameters: Sequence[Parameter], before: Mapping[str, weakref.ref[nn.Parameter]]
) -> list[Shard]:
    """What every live tensor holds when it is gathered, in the order of the model's parameters.

    parameters, before: described, and returned by ``remember``, before the model was passed to DeepSpeed. A tensor that
    DeepSpeed has kept holds its parameter whole. Raises UserError for experts packed in a way that AutoEP reorders.
    """
    by_name = {parameter.name: parameter for parameter in parameters}
    names = {id(tensor): name for name, reference in before.items() if (tensor := reference()) is not None}
    shards = [
        Shard(by_name[original], ((0, by_name[original].numel),), name)
        for name, tensor in module.named_parameters()
        if (original := names.get(id(tensor), name)) in by_name
    ]
    kept = {shard.parameter.name for shard in shards}
    for block_name, block in blocks(module):
        replaced = [p for p in parameters if p.name.startswith(f"{block_name}.") and p.name not in kept]
        shards += [_experts(block_name, leaf, getattr(block.experts, leaf), replaced) for leaf in ROLES]
        for name, _ in block.router.named_parameters(f"{block_name}.router"):
            (parameter,) = [p for p in replaced if p.role == "router" and p.name.endswith(name.rpartition(".")[2])]
            shards.append(Shard(parameter, ((0, parameter.numel),), name))
    unnamed = {name for name, _ in module.named_parameters()} - {shard.name for shard in shards}
    assert not unnamed, f"AutoEP created tensors of unknown parameters: {sorted(unnamed)}"
    return sorted(shards, key=lambda shard: (shard.parameter.offset, shard.runs[0][0]))


def _experts(block_name: str, leaf: str, tensor: nn.Parameter, replaced: Sequence[Parameter]) -> Shard:
    """The layout of w1, w2 or w3: consecutive matrices, one for each of this rank's experts."""
    local = getattr(tensor, DS_AUTOEP_UC_META)[AUTOEP_PARAM_LOCAL_EXPERTS]
    owners = [p for p in replaced if any(unit.role == ROLES[leaf] for unit in p.units)]
    name = f"{block_name}.experts.{leaf}"
    if len(owners) != 1:
        problem = f"has {len(owners)} tensors for AutoEP's {leaf}, but only experts fused in one tensor are supported"
        raise UserError(FIELD, block_name, problem, "remove expert_parallel from the DeepSpeed config")
    layout = Shard(owners[0], expert_runs(owners[0], ROLES[leaf], local), name)
    shape = whole_shape(tensor)
    is_transposed = leaf == "w2" and owners[0].shape[1:] != shape[1:]
    if any(unit.count > 1 for unit in owners[0].units) or is_transposed or layout.numel != torch.Size(shape).numel():
        problem = "has experts whose matrices AutoEP transposes or splits, so a mask's positions would not fit"
        raise UserError(FIELD, owners[0].name, problem, "remove expert_parallel from the DeepSpeed config")
    return layout


def expert_runs(parameter: Parameter, role: str, experts: Collection[int]) -> tuple[tuple[int, int], ...]:
    """Runs [low, high) in a parameter of the matrices of one role of some experts; adjacent matrices form one run."""
    runs: list[tuple[int, int]] = []
    for unit in parameter.units:
        if unit.role == role and unit.expert in experts:
            if runs and runs[-1][1] == unit.start:
                runs[-1] = (runs[-1][0], unit.end)
            else:
                runs.append((unit.start, unit.end))
    return tuple(runs)


class Probe:
    """Compares the first expert block before and after it is replaced.

    AutoEP's presets define how a family of models routes. With a wrong one (experts' weights normalised where the
    model's are not, another score function) the model would silently compute another function.
    """

    def __init__(self, module: PreTrainedModel, routers: Sequence[str]):
        self._name = routers[0].rpartition(".")[0] if routers else ""
        self._expected: Tensor | None = None
        self._error: str | None = None
        try:
            self._expected = self._answer(module) if routers else None
        except (AttributeError, TypeError) as error:
            # A layer routes by itself (Gemma 4), or by token ids (DeepSeek-V4).
            self._error = first_line(error)

    def _answer(self, module: PreTrainedModel) -> Tensor:
        """float32 [tokens, hidden]: the block's output for random tokens, the same on every rank. Gathers the block."""
        block = module.get_submodule(self._name)
        weight = next(block.parameters())
        size = module.config.get_text_config().hidden_size
        hidden = torch.randn(1, NUM_PROBED, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), deepspeed.zero.GatheredParameters(list(block.parameters())):
            output = block.forward(hidden.to(weight))
        return (output[0] if isinstance(output, tuple) else output).reshape(NUM_PROBED, size).float()

    def check(self, module: PreTrainedModel) -> None:
        """Raise UserError where no block was replaced, or its output differs or is unknown. Gathers the block."""
        if self._error is not None:
            problem = f"cannot be checked: {self._name} does not run on hidden states alone ({self._error})"
            raise UserError(FIELD, None, problem, REMEDY)
        if self._expected is None or self._name not in dict(blocks(module)):
            raise UserError(FIELD, None, "finds no expert block that it supports in this model", REMEDY)
        difference = (self._answer(module) - self._expected).norm(dim=-1) / self._expected.norm(dim=-1)
        # The median, because in half precision an occasional token goes to another expert of the same score.
        if not float(difference.median()) <= PROBED_DIFFERENCE:
            problem = f"does not compute what the model's {self._name} computes (off by {difference.median():.1%})"
            raise UserError(FIELD, None, problem, REMEDY)


def routers_now(module: nn.Module, before: Sequence[str]) -> dict[str, nn.Module]:
    """Names of the original model's routers → the modules that route now."""
    replaced = dict(blocks(module))
    return {
        name: next((block.router for block_name, block in replaced.items() if name.startswith(f"{block_name}.")), None)
        or module.get_submodule(name)
        for name in before
    }


def buffer_names(module: nn.Module, before: Collection[str]) -> dict[str, str]:
    """Names of the original model's persistent buffers → their names now: a router's buffers move with it."""
    buffers = dict(module.named_buffers())
    names = {name: name for name in before if name in buffers}
    for block_name, _ in blocks(module):
        for name in before:
            moved = f"{block_name}.router.{name.rpartition('.')[2]}"
            if name.startswith(f"{block_name}.") and name not in names and moved in buffers:
                names[name] = moved
    return names


def collect(layout: Shard, tensor: Tensor, keeper: int, into: Tensor | None) -> None:
    """Bring the parts of a parameter that the members of an expert-parallel group hold to the global rank ``keeper``.

    tensor: this rank's part, gathered. into: flat, of the parameter's size, on the keeper's CPU; None on other ranks.
    Collectives: one broadcast per member, in the keeper's group only, so that no device holds more than one other part.
    """
    group = groups._get_expert_parallel_group(attributes(tensor).group_name)
    members = torch.distributed.get_process_group_ranks(group)
    if keeper not in members:
        return
    role, size = ROLES[layout.name.rpartition(".")[2]], tensor.shape[0]
    for position, member in enumerate(members):
        part = tensor.detach().clone() if member == torch.distributed.get_rank() else torch.empty_like(tensor)
        torch.distributed.broadcast(part, member, group=group)
        if into is not None:
            experts = range(position * size, (position + 1) * size)
            shard = Shard(layout.parameter, expert_runs(layout.parameter, role, experts), layout.name)
            values = part.reshape(-1).cpu()
            for where, low, high in shard.parts():
                into[low:high] = values[where]
