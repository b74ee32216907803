"""Models under ZeRO-3: load, describe, gather, release (docs/zero3.md)."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation
from deepspeed.utils import set_z3_leaf_module, z3_leaf_module
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from esi_ds.core.footprint import gathered_tensors, transient, window_bytes
from esi_ds.core.units import Parameter, Shard
from esi_ds.deepspeed_config import check_experts
from esi_ds.errors import UserError
from esi_ds.judge.embeddings import embedding_module
from esi_ds.models.folder import ModelSource
from esi_ds.models.idle_experts import mend_grouped_product
from esi_ds.models.roles import describe, expert_blocks, routers
from esi_ds.models.rows import Difference, Together
from esi_ds.zero import expert_parallel, memory, runtime
from esi_ds.zero.loading import read_partitioned, read_replicated
from esi_ds.zero.partitioned import attributes, partition_bounds, partition_group, partition_numel, whole_shape
from esi_ds.zero.settings import refused, with_prefetch


class ShardedModel:
    """A model whose parameters are partitioned over all ranks, and the description that scoring works from.

    Attributes:
        module: the live model.
        parameters: every parameter, in the model's order.
        expert_blocks: those of ``models.roles``, by the names that the model had before DeepSpeed took it.
        routers: name → module, likewise.
        expert_parallel: whether AutoEP has placed experts on different ranks.
        layouts: what each live tensor holds when it is gathered, in the model's order. A tensor holds one whole
            parameter, except for experts under expert parallelism.
        shards: this rank's part of each layout, in the same order.
        by_name: name of a layout or shard → live tensor.
        together: which prompts may share a batch in generation; None until it is asked (``zero/generate.py``).
        beside: how much a longer prompt changes the first logits of the one beside it; likewise.
    """

    together: Together | None = None
    beside: Difference | None = None
    _is_closed = False

    def __init__(
        self,
        module: PreTrainedModel,
        deepspeed_config: dict[str, Any],
        optimizer: Optimizer | None = None,
        roles: Mapping[str, str] | None = None,
    ):
        self.expert_blocks = expert_blocks(module, roles)
        for name in self.expert_blocks:
            _keep_together(module.get_submodule(name))
        self.parameters = describe(module, full_shapes(module), roles)
        self.expert_parallel = expert_parallel.is_on(deepspeed_config)
        self._zero_settings = deepspeed_config.get("zero_optimization", {})
        experts = [
            len({u.expert for u in p.units}) for p in self.parameters if p.units and p.units[0].expert is not None
        ]
        check_experts(deepspeed_config, experts, self.expert_blocks)
        if experts:
            mend_grouped_product()
        tensors, self._buffers = expert_parallel.remember(module), persistent_buffers(module)
        router_names = tuple(routers(module, roles))
        probe = expert_parallel.Probe(module, router_names) if self.expert_parallel else None
        self.engine, zero, _, _ = _initialize(module, optimizer, deepspeed_config)
        self._offload = zero if optimizer is None else zero.parameter_offload
        self.module: PreTrainedModel = self.engine.module
        if optimizer is not None:
            check_leaves(self.module)
        if probe is not None:
            probe.check(self.module)
            self.release()
        self.routers = expert_parallel.routers_now(self.module, router_names)
        self.by_name = dict(self.module.named_parameters())
        self.layouts = tuple(expert_parallel.layouts(self.module, self.parameters, tensors))
        # Without padding: ZeRO-3 pads the last partitions with uninitialised memory.
        self.shards = tuple(layout.cut(*self.bounds(layout)) for layout in self.layouts)

    @cached_property
    def scored(self) -> tuple[Shard, ...]:
        """This rank's shards of the parameters that are scored."""
        return tuple(shard for shard in self.shards if shard.parameter.scored)

    @cached_property
    def _tensors_of(self) -> dict[str, tuple[list[Shard], list[Shard]]]:
        """Parameter's name → (layouts, this rank's shards) of the tensors that hold it."""
        tensors: dict[str, tuple[list[Shard], list[Shard]]] = {p.name: ([], []) for p in self.parameters}
        for layout, shard in zip(self.layouts, self.shards, strict=True):
            layouts, shards = tensors[layout.parameter.name]
            layouts.append(layout)
            shards.append(shard)
        return tensors

    def shards_of(self, parameter: Parameter) -> list[Shard]:
        """This rank's shards of one parameter."""
        return self._tensors_of[parameter.name][1]

    def group(self, shard: Shard) -> torch.distributed.ProcessGroup:
        """The ranks that a tensor is partitioned over: all, or those that hold the same experts."""
        return partition_group(self.by_name[shard.name])

    def is_everywhere(self, shard: Shard) -> bool:
        """Whether a tensor is partitioned over all ranks; under expert parallelism, experts are not."""
        return torch.distributed.get_world_size(self.group(shard)) == runtime.world_size()

    @property
    def has_one_group(self) -> bool:
        """Whether all gathers and reductions are in one group of ranks: not with expert parallelism, nor with hpZ."""
        return not self.expert_parallel and self.engine.zero_hpz_partition_size() == 1

    def partition_numel(self, shard: Shard) -> int:
        """Elements of a rank's partition of a tensor, including padding: the same on every rank of its group."""
        return partition_numel(self.by_name[shard.name])

    def bounds(self, shard: Shard) -> tuple[int, int]:
        """[first, last) of this rank's partition in the flat gathered tensor, including padding."""
        return partition_bounds(self.by_name[shard.name])

    def local_weight(self, shard: Shard) -> Tensor:
        """This rank's weights of one of ``shards``: [shard.numel] in the model's dtype; live storage, no copy."""
        return attributes(self.by_name[shard.name]).ds_tensor.detach().view(-1)[: shard.numel]

    @property
    def readers(self) -> tuple[int, int | None]:
        """(number of ranks that read data for gradients of single rows, this rank's index among them or None).

        Under expert parallelism an expert's gradient sums over the tokens of its whole group of ranks, so only one rank
        of each group reads data.
        """
        size = self.engine._config.expert_parallel_config.autoep_size if self.expert_parallel else 1
        group, rank_in_group = divmod(runtime.rank(), size)
        return runtime.world_size() // size, None if rank_in_group else group

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers, by their names in the original model."""
        buffers = dict(self.module.named_buffers())
        return {
            original: buffers[name]
            for original, name in expert_parallel.buffer_names(self.module, self._buffers).items()
        }

    def whole(self, parameter: Parameter, keeper: int) -> Tensor | None:
        """A copy of a whole parameter, in its dtype, on the CPU of rank ``keeper``; None on the others.

        The model must be released. Collectives: an all-gather of each tensor that holds a part; under expert
        parallelism also a broadcast from each member of the keeper's group.
        """
        keeps = runtime.rank() == keeper
        values: Tensor | None = None
        for layout in self._tensors_of[parameter.name][0]:
            tensor = self.by_name[layout.name]
            with self.gathered([tensor]), torch.no_grad():
                if self.is_everywhere(layout) and layout.numel == parameter.numel:
                    return tensor.detach().to("cpu", copy=True) if keeps else None
                if keeps and values is None:
                    values = torch.empty(parameter.numel, dtype=tensor.dtype)
                expert_parallel.collect(layout, tensor, keeper, values)
        return values.view(parameter.shape) if values is not None else None

    def publish(self) -> None:
        """Let every rank compute with the weights that were written into ``local_weight``. No collectives.

        Drops hpZ's secondary copies, from which gathers would read. Call ``release`` before writing, because gathered
        parameters would hide the new weights. With ``overlap_comm`` DeepSpeed gathers on a stream that does not wait
        for the one that has written, so this waits.
        """
        runtime.synchronize()
        for tensor in self.by_name.values():
            attributes(tensor).ds_secondary_tensor = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight, and of what the model computes."""
        return next(iter(self.by_name.values())).element_size()

    def passing_bytes(self, backward: bool, recompute: bool = False) -> float:
        """Bytes that a pass takes besides its rows: weights while they are gathered, and gradients in flight."""
        size = self.engine._config.expert_parallel_config.autoep_size if self.expert_parallel else None
        tensors = gathered_tensors(self.parameters, runtime.world_size(), size)
        scored = {parameter.name: parameter.numel for parameter in self.parameters if parameter.scored and backward}
        largest = transient(tensors, self.weight_bytes, scored, "esi", recompute=recompute or not backward)
        return largest.total + window_bytes(tensors, self.weight_bytes, self._zero_settings)

    @property
    def num_logits(self) -> int:
        """Width of the logits: the number of rows of the output head."""
        return whole_shape(self.module.get_output_embeddings().weight)[0]

    @contextmanager
    def with_cache(self) -> Iterator[None]:
        """Let layers use their key-value cache inside the block, for generation.

        A checkpointed layer in training mode silently drops its cache, and the model would answer as if it had read
        only its last token.
        """
        before = [(layer, layer.training) for layer in checkpointed_layers(self.module)]
        for layer, _ in before:
            layer.training = False
        try:
            yield
        finally:
            for layer, training in before:
                layer.training = training

    def release(self) -> None:
        """Free every gathered parameter. Call after backward: the embedding's post-backward hook never fires."""
        self._offload.partition_all_parameters()

    def close(self) -> None:
        """Free the weights, buffers and gradients, and what the engine and its optimizer hold. No collectives.

        The model cannot be used afterwards. Dropping the last reference frees nothing: hooks that DeepSpeed gives to
        modules and parameters keep them for the life of the process.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self.engine.destroy()
        tensors = [*self.module.parameters(), *self.module.buffers()]
        for module in self.module.modules():  # tensors that are not buffers are only dropped: others may share them
            for name in [name for name, value in vars(module).items() if isinstance(value, Tensor)]:
                delattr(module, name)
        for parameter in map(attributes, self.module.parameters()):
            tensors += [parameter.ds_tensor, parameter.ds_secondary_tensor]  # the latter is hpZ's
        zero = self.engine.optimizer
        memory.free([tensors, vars(zero), getattr(self.engine.basic_optimizer, "state", None)])
        memory.collect()

    @contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter] | nn.Parameter) -> Iterator[None]:
        """These parameters are whole on every rank inside the block. One all-gather each."""
        with deepspeed.zero.GatheredParameters(parameters):
            yield

    @contextmanager
    def whole_for_generation(self) -> Iterator[PreTrainedModel]:
        """The whole model is on every rank inside the block, without ZeRO's hooks. One all-gather of the model.

        DeepSpeed leaves one hook in place, which compares traces between ranks at the next forward pass and would wait
        forever for a rank that has nothing to generate. It is removed, and put back before the other hooks.
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
    """Gather a block with a list of experts as one, and include all of its parameters in the graph.

    An expert without tokens then has a gradient of zero, and so has a router's correction bias, which only orders
    experts. Otherwise ranks that use different experts would wait for one another's collectives.
    """
    set_z3_leaf_module(block, True)
    parameters = list(block.parameters())

    def touch(module: nn.Module, arguments: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> Any:
        if not torch.is_grad_enabled():
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        # The sum of an empty slice is 0 whatever the weights are.
        touched = [tensor.flatten()[:0].sum() for tensor in parameters if tensor.requires_grad]
        hidden = hidden + torch.stack(touched).sum().to(hidden.dtype) if touched else hidden
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    block.register_forward_hook(touch)  # before ZeRO's hook, which releases the weights


def check_leaves(module: PreTrainedModel) -> None:
    """Raise UserError where one of ZeRO's leaf modules looks up embeddings.

    With an optimizer ZeRO reduces a leaf's gradients in its full backward hook. The hook of a module whose inputs are
    token ids, which have no gradient, runs before the leaf's own gradients exist: zeros would be reduced.
    """
    embedding: nn.Module | None = None
    with suppress(UserError):  # a model that does not say which it is
        embedding = embedding_module(module)
    for name, leaf in module.named_modules():
        if z3_leaf_module(leaf) and (isinstance(leaf, nn.Embedding) or any(m is embedding for m in leaf.modules())):
            raise UserError(
                "deepspeed.zero_optimization",
                None,
                f"lets leaf_module or stage3_module_granularity_threshold make a leaf of {name or 'the whole model'} "
                f"({type(leaf).__name__}), which looks up embeddings: its gradients would be lost",
                "name layers or what is within them, or lower the threshold",
            )


def checkpointed_layers(module: nn.Module) -> list[nn.Module]:
    """The layers whose activations can be recomputed."""
    return [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]


def recompute_activations(module: PreTrainedModel) -> None:
    """Gradient checkpointing of a model in evaluation mode. Only layers get ``training = True``, and only where
    transformers asks for it: dropout stays off, also where a layer applies it itself, as OPT's does.

    Raises UserError where the architecture has none.
    """
    if not module.supports_gradient_checkpointing:
        problem = f"is not supported by {type(module).__name__}"
        raise UserError("model.gradient_checkpointing", True, problem, "set it to false")
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers: list[Any] = checkpointed_layers(module)
    for layer in layers:
        layer._gradient_checkpointing_func = _in_evaluation(layer, layer._gradient_checkpointing_func)
        layer.training = True


def _in_evaluation(layer: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's checkpointing function that computes the layer, the first time and again, in evaluation mode."""

    def checkpointed(compute: Callable[..., Any], *arguments: Any) -> Any:
        def evaluate(*inputs: Any) -> Any:
            layer.training = False
            try:
                return compute(*inputs)
            finally:
                layer.training = True

        return checkpoint(evaluate, *arguments)

    return checkpointed


def _initialize(
    module: PreTrainedModel, optimizer: Optimizer | None, deepspeed_config: dict[str, Any]
) -> tuple[Any, ...]:
    """``deepspeed.initialize``. Raises UserError where AutoEP does not know the model, or DeepSpeed says that it cannot
    do what the config asks for."""
    settings = copy.deepcopy(deepspeed_config)
    if expert_parallel.is_on(settings):
        expert_parallel.mend_registry()
        expert_parallel.mend_grouped_experts()
    try:
        return deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        files = [Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)]
        is_autoep = expert_parallel.is_on(settings) and isinstance(error, ValueError)
        if is_autoep or any("module_inject" in parts for parts in files):  # it takes a block for what it is not
            raise UserError(expert_parallel.FIELD, None, f"does not fit ({error})", expert_parallel.REMEDY) from error
        if isinstance(error, (AttributeError, TypeError)) or "deepspeed" not in files[-1]:
            raise
        raise refused("deepspeed", None, error) from error


def persistent_buffers(module: nn.Module) -> tuple[str, ...]:
    """Names of the buffers that belong to a checkpoint."""
    stored = module.state_dict().keys()
    return tuple(name for name, _ in module.named_buffers() if name in stored)


def full_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter's whole shape by full name, partitioned or not."""
    return {name: whole_shape(tensor) for name, tensor in module.named_parameters()}


def load_sharded(
    source: ModelSource,
    dtype: str,
    deepspeed_config: dict[str, Any],
    make_optimizer: Callable[[PreTrainedModel], Optimizer] | None = None,
    auto_class: type[_BaseAutoModelClass] = AutoModelForCausalLM,
    roles: Mapping[str, str] | None = None,
) -> ShardedModel:
    """A model that is partitioned over the ranks while it is read.

    Raises UserError. Collectives: those of ``read_partitioned``, and of DeepSpeed's initialisation.

    dtype: a key of ``MODEL_DTYPES``. make_optimizer: builds, from the loaded module, the optimizer of a standard ZeRO-3
    engine; None: an engine without one. auto_class: the transformers class that reads the folder. roles:
    ``model.roles``.
    """
    settings = with_prefetch(deepspeed_config, runtime.device().type)
    module = read_partitioned(source, dtype, settings, auto_class)
    return ShardedModel(module, settings, make_optimizer(module) if make_optimizer else None, roles)


def load_replicated(
    source: ModelSource, dtype: str, auto_class: type[_BaseAutoModelClass] = AutoModelForCausalLM
) -> PreTrainedModel:
    """A whole, frozen copy of a model on this rank's device. No collectives."""
    return read_replicated(source, dtype, auto_class, runtime.device()).requires_grad_(False)
