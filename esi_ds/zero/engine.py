"""Models under ZeRO-3 without an optimizer: load, describe, gather, release (docs/zero3.md).

DeepSpeed's attributes on parameters (``ds_tensor``, ``ds_shape``, ...) are touched in this file only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from esi_ds.core.units import Parameter, Shard
from esi_ds.deepspeed_config import check_experts
from esi_ds.errors import UserError
from esi_ds.models.folder import ModelSource
from esi_ds.models.roles import describe, expert_blocks, routers
from esi_ds.zero import expert_parallel, runtime

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class ShardedModel:
    """A causal LM whose parameters are cut over all ranks, with the description that scoring works from.

    Attributes: module, parameters (every parameter in the model's order), expert_blocks and routers {name: module}
    (``models.roles``; names are the model's own), expert_parallel (whether AutoEP has laid experts on different ranks),
    layouts (what each live tensor holds of which parameter when it is gathered, in the model's order; every parameter
    whole in one tensor but for experts under expert parallelism), shards (this rank's part of each of them), by_name
    {layout's name: nn.Parameter}.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        deepspeed_config: dict,
        optimizer: Optimizer | None = None,
        roles: Mapping[str, str] | None = None,
    ):
        self.expert_blocks = expert_blocks(module)
        for block in self.expert_blocks.values():
            _keep_together(block)
        self.parameters = describe(module, full_shapes(module), roles)
        self.expert_parallel = expert_parallel.is_on(deepspeed_config)
        experts = [
            len({u.expert for u in p.units}) for p in self.parameters if p.units and p.units[0].expert is not None
        ]
        check_experts(deepspeed_config, experts)
        tensors, self._buffers = expert_parallel.remember(module), persistent_buffers(module)
        router_names = tuple(routers(module, roles))
        probe = expert_parallel.Probe(module, router_names) if self.expert_parallel else None
        self.engine, zero, _, _ = _initialize(module, optimizer, deepspeed_config)
        self._offload = zero if optimizer is None else zero.parameter_offload
        self.module: PreTrainedModel = self.engine.module
        if probe is not None:
            probe.check(self.module)
            self.release()
        self.routers = expert_parallel.routers_now(self.module, router_names)
        self.by_name = dict(self.module.named_parameters())
        self.layouts = tuple(expert_parallel.layouts(self.module, self.parameters, tensors))
        self.shards = tuple(self._shard(layout) for layout in self.layouts)

    def _shard(self, layout: Shard) -> Shard:
        """This rank's valid part: ZeRO-3 pads the last slices with uninitialised memory, which is left out here."""
        return layout.cut(*self.bounds(layout))

    @cached_property
    def scored(self) -> tuple[Shard, ...]:
        """This rank's shards of the parameters that are scored."""
        return tuple(shard for shard in self.shards if shard.parameter.scored)

    @cached_property
    def _tensors_of(self) -> dict[str, tuple[list[Shard], list[Shard]]]:
        """Parameter's name → (layouts, this rank's shards) of the tensors that hold it."""
        found: dict[str, tuple[list[Shard], list[Shard]]] = {p.name: ([], []) for p in self.parameters}
        for layout, shard in zip(self.layouts, self.shards, strict=True):
            layouts, shards = found[layout.parameter.name]
            layouts.append(layout)
            shards.append(shard)
        return found

    def shards_of(self, parameter: Parameter) -> list[Shard]:
        """This rank's shards of one parameter."""
        return self._tensors_of[parameter.name][1]

    def group(self, shard: Shard) -> torch.distributed.ProcessGroup:
        """The ranks that a tensor is cut over: all, or those that hold the same experts."""
        return self.by_name[shard.name].ds_process_group

    def is_everywhere(self, shard: Shard) -> bool:
        """Whether a tensor is cut over all ranks: not so with experts that other ranks have others of."""
        return torch.distributed.get_world_size(self.group(shard)) == runtime.world_size()

    def partition_numel(self, shard: Shard) -> int:
        """Elements of a rank's slice of a tensor, padding included: the same on every rank of its group."""
        return self.by_name[shard.name].ds_tensor.ds_numel

    def bounds(self, shard: Shard) -> tuple[int, int]:
        """Where this rank's slice of a tensor begins and ends in the whole, flat; padding included."""
        size = self.partition_numel(shard)
        first = torch.distributed.get_rank(self.group(shard)) * size
        return first, first + size

    def local_weight(self, shard: Shard) -> Tensor:
        """This rank's weights of one of ``shards``, flat, without padding; the live storage, not a copy."""
        return self.by_name[shard.name].ds_tensor.detach().view(-1)[: shard.numel]

    @property
    def readers(self) -> tuple[int, int | None]:
        """(how many ranks' data can be told apart in experts' gradients, this rank's number among them or None).

        Under expert parallelism an expert's gradient is that of the whole group that sends it tokens, whatever rank
        they are from; so one rank of each group reads, where the gradients of single rows are asked for.
        """
        size = self.engine._config.expert_parallel_config.autoep_size if self.expert_parallel else 1
        group, place = divmod(runtime.rank(), size)
        return runtime.world_size() // size, None if place else group

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers, by the model's own names."""
        now = dict(self.module.named_buffers())
        return {own: now[name] for own, name in expert_parallel.buffer_names(self.module, self._buffers).items()}

    def whole(self, parameter: Parameter, keeper: int) -> Tensor | None:
        """A copy of a whole parameter on the CPU of one rank; None on the others.

        Collectives: an all-gather of each tensor that holds a part, and under expert parallelism a broadcast per member
        of the keeper's group. The model must be released.
        """
        keeps, found = runtime.rank() == keeper, None
        for layout in self._tensors_of[parameter.name][0]:
            tensor = self.by_name[layout.name]
            with self.gathered([tensor]), torch.no_grad():
                if self.is_everywhere(layout) and layout.numel == parameter.numel:
                    return tensor.detach().to("cpu", copy=True) if keeps else None
                if keeps and found is None:
                    found = torch.empty(parameter.numel, dtype=tensor.dtype)
                expert_parallel.collect(layout, tensor, keeper, found)
        return found.view(parameter.shape) if found is not None else None

    def publish(self) -> None:
        """Make weights that were written into ``local_weight`` what every rank computes with.

        hpZ's second copies, which gathers would read, are dropped. ``release`` before writing: gathered parameters
        would hide what is written."""
        for tensor in self.by_name.values():
            tensor.ds_secondary_tensor = None

    @property
    def num_logits(self) -> int:
        """Width of the logits: rows of the output head."""
        return self.module.get_output_embeddings().weight.ds_shape[0]

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass. Only the layers are told that they train: no dropout wakes."""
        self.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for layer in self._checkpointed_layers():
            layer.training = True

    def _checkpointed_layers(self) -> list[nn.Module]:
        return [layer for layer in self.module.modules() if isinstance(layer, GradientCheckpointingLayer)]

    @contextmanager
    def with_cache(self) -> Iterator[None]:
        """Generation inside the block: a layer that is told that it trains and recomputes drops its key-value cache
        without a word, and the model answers as if it had read nothing but its last token."""
        before = [(layer, layer.training) for layer in self._checkpointed_layers()]
        for layer, _ in before:
            layer.training = False
        try:
            yield
        finally:
            for layer, training in before:
                layer.training = training

    def release(self) -> None:
        """Give back every gathered parameter. The embedding's post-backward hook never fires: call after backward."""
        self._offload.partition_all_parameters()

    @contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter] | nn.Parameter) -> Iterator[None]:
        """These parameters whole on every rank for the time of the block. One all-gather each."""
        with deepspeed.zero.GatheredParameters(parameters):
            yield

    @contextmanager
    def whole_for_generation(self) -> Iterator[PreTrainedModel]:
        """The whole model on every rank, without ZeRO's hooks. One all-gather of the model.

        DeepSpeed leaves one hook on, which compares traces between ranks at the next forward pass: a rank that has
        nothing to generate would be waited for without end. It is taken off, and put back in front of the others.
        """
        self.release()
        offload = self._offload
        offload.fwd_pre_hook.remove()
        with unwrap_model_for_generation(self.engine):
            yield self.module
        offload.fwd_pre_hook = self.module.register_forward_pre_hook(
            lambda module, *arguments: offload.get_param_coordinator().reset_step(), prepend=True
        )
        self.release()


def _keep_together(block: nn.Module) -> None:
    """A block with a list of experts: gathered as one, and all of its parameters take part in the graph, with a
    gradient of zero where no token came, and of a router's correction bias, which only orders experts. Otherwise ranks
    that use other experts wait for one another's collectives."""
    set_z3_leaf_module(block, True)
    parameters = list(block.parameters())

    def touch(module: nn.Module, arguments: tuple, output: Tensor | tuple) -> Tensor | tuple:
        if not torch.is_grad_enabled():
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        # An empty slice: its sum is 0 whatever the weights are.
        touched = [tensor.flatten()[:0].sum() for tensor in parameters if tensor.requires_grad]
        hidden = hidden + torch.stack(touched).sum().to(hidden.dtype) if touched else hidden
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    block.register_forward_hook(touch)  # before ZeRO's own hook, which gives the weights back


def _initialize(module: PreTrainedModel, optimizer: Optimizer | None, deepspeed_config: dict) -> tuple:
    """``deepspeed.initialize``. Raises UserError where AutoEP does not know the model."""
    settings = copy.deepcopy(deepspeed_config)
    if not expert_parallel.is_on(settings):
        return deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    expert_parallel.mend_registry()
    try:
        return deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    except ValueError as error:
        raise UserError(expert_parallel.FIELD, None, f"does not fit ({error})", expert_parallel.REMEDY) from error


def persistent_buffers(module: nn.Module) -> tuple[str, ...]:
    """Names of the buffers that a checkpoint holds."""
    stored = module.state_dict().keys()
    return tuple(name for name, _ in module.named_buffers() if name in stored)


def full_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter's whole shape by full name, partitioned or not."""
    return {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in module.named_parameters()}


def load_sharded(
    source: ModelSource,
    dtype: str,
    deepspeed_config: dict[str, Any],
    make_optimizer: Callable[[PreTrainedModel], Optimizer] | None = None,
    auto_class: type[_BaseAutoModelClass] = AutoModelForCausalLM,
    roles: Mapping[str, str] | None = None,
) -> ShardedModel:
    """A model cut over the ranks while it is read. Rank 0 reads the files; every parameter is broadcast once.

    dtype: a key of ``DTYPES``. make_optimizer: builds, from the loaded module, the optimizer of a standard ZeRO-3
    engine; None: an engine without one. auto_class: the transformers class that reads the folder. roles:
    ``model.roles``.
    """
    # transformers finds this object through a weak reference: it must live until the model is loaded.
    zero3 = HfDeepSpeedConfig(copy.deepcopy(deepspeed_config))
    try:
        module = _from_pretrained(source, dtype, auto_class)
    finally:
        unset_hf_deepspeed_config()
        del zero3
    return ShardedModel(module, deepspeed_config, make_optimizer(module) if make_optimizer else None, roles)


def load_replicated(
    source: ModelSource, dtype: str, auto_class: type[_BaseAutoModelClass] = AutoModelForCausalLM
) -> PreTrainedModel:
    """A whole, frozen copy of a model on this rank's device. No collectives."""
    return _from_pretrained(source, dtype, auto_class).requires_grad_(False).to(runtime.device())


def _from_pretrained(source: ModelSource, dtype: str, auto_class: type[_BaseAutoModelClass]) -> PreTrainedModel:
    """The model in evaluation mode. Only safetensors are read, nothing pickled. Raises UserError."""
    remedy = f"give a folder that transformers' {auto_class.__name__} reads whole, with safetensors weights"
    field, path = source.field, source.path
    try:
        module, info = auto_class.from_pretrained(
            path,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise UserError(field, path, f"cannot be loaded ({str(error).strip().splitlines()[0]})", remedy) from error
    # transformers would fill them with random numbers and go on: a causal model read as a classifier, for instance.
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(field, path, f"holds no weights for {missing[0]} ({len(missing)} are missing)", remedy)
    return module.eval()
