"""Reading a model's weights, whole or partitioned while they are read, so that it is the model that transformers'
``from_pretrained`` gives: the same ties, buffers and precision (docs/zero3.md §9)."""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import EllipsisType
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.utils import groups
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, build_glob_alternation
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from esi_ds.core.quantised import Weight, whole_weight
from esi_ds.core.stored import MODEL_DTYPES, StoredReader
from esi_ds.errors import UserError
from esi_ds.models.folder import (
    ModelSource,
    checked_folder,
    checkpoint_folder,
    load_model_config,
    quantisation_of,
    stored_weights,
)
from esi_ds.models.quantised import model_weights
from esi_ds.models.ties import by_loaded_name
from esi_ds.reading import reading
from esi_ds.words import counted
from esi_ds.zero import runtime
from esi_ds.zero.weights import every_rank_reads_its_part


def read_module(
    source: ModelSource,
    dtype: str,
    auto_class: type[_BaseAutoModelClass],
    problem: str = "cannot be loaded",
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The whole model in evaluation mode. Only safetensors are read, nothing pickled. Raises UserError.

    dtype: a key of ``MODEL_DTYPES``. auto_class: the transformers class that reads the folder. problem: what the error
    says where transformers fails. device: where each weight goes once it is read, so that host memory never holds the
    model; None: under ZeRO-3, where DeepSpeed places them.
    """
    remedy = _remedy(auto_class)
    field, path = source.field, source.path
    reads = reading(field, path, f"{remedy}; docs/architectures.md lists the architectures that load", problem)
    with reads, _dequantising(source, in_parts=device is None) as options:
        module, info = auto_class.from_pretrained(
            checked_folder(source),
            dtype=MODEL_DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=source.trust_remote_code,
            code_revision=source.code_revision(),
            device_map=None if device is None else {"": device},
            **options,
        )
    # transformers would initialise them at random, for instance where a causal model is read as a classifier.
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(field, path, f"holds no weights for {missing[0]} ({len(missing)} are missing)", remedy)
    module.name_or_path = path
    if "output_router_logits" in inspect.signature(module.forward).parameters:
        module.register_forward_pre_hook(_without_router_loss, with_kwargs=True)
    return module.eval()


def _without_router_loss(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    """Forward pre-hook: no load-balancing loss, which ``output_router_logits`` in a config.json turns on.

    Nothing here adds it to a loss, and transformers fails in it when several rows are generated with a cache: their
    mask is longer than the tokens that are read. The configuration keeps the setting, and is exported with it.
    """
    return arguments, {"output_router_logits": False, **options}


class UnreadWeight:
    """A weight as transformers' loader wants it: a slice of a file, which is read when it is moved to its device."""

    def __init__(self, weight: Weight):
        self._weight = weight

    def __getitem__(self, _: EllipsisType) -> UnreadWeight:
        return self

    def to(self, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
        """The values; quantised ones are computed in ``dtype``, a model's default where there is none."""
        with StoredReader() as reader:  # of its own: transformers reads several weights at a time
            return whole_weight(reader, self._weight, dtype or torch.get_default_dtype()).to(device, dtype)


@contextmanager
def _dequantising(source: ModelSource, in_parts: bool) -> Iterator[dict[str, Any]]:
    """Options with which ``from_pretrained`` reads a quantised model as a plain one inside the block; none, and nothing
    changed, where it is not quantised.

    in_parts: for ``every_rank_reads_its_part``, which takes the weights as they are. Raises UserError.
    """
    if quantisation_of(source) is None:
        yield {}
        return
    weights = {weight.name: weight for weight in model_weights(checkpoint_folder(source), source.field)}
    state_dict = weights if in_parts else {name: UnreadWeight(weight) for name, weight in weights.items()}
    load = PreTrainedModel._load_pretrained_model

    def load_weights(model: PreTrainedModel, _: None, *arguments: Any, **options: Any) -> Any:
        return load(model, state_dict, *arguments, **options)

    with patch.object(PreTrainedModel, "_load_pretrained_model", staticmethod(load_weights)):
        yield {"config": load_model_config(source)}


def read_replicated(
    source: ModelSource, dtype: str, auto_class: type[_BaseAutoModelClass], device: torch.device
) -> PreTrainedModel:
    """``read_module`` of the whole model onto this rank's device, a weight at a time. No collectives.

    What transformers computes there instead of reading it, such as the frequencies of rotary embeddings, has the bits
    that the CPU gives it, as in ``read_partitioned``.
    """
    module = read_module(source, dtype, auto_class, device=device)
    if device.type != "cpu":
        _mend_computed_buffers(module, _unread(module, dtype))
    return module


def _remedy(auto_class: type[_BaseAutoModelClass]) -> str:
    return f"give a folder that transformers' {auto_class.__name__} reads whole, with safetensors weights"


def read_partitioned(
    source: ModelSource, dtype: str, deepspeed_config: dict[str, Any], auto_class: type[_BaseAutoModelClass]
) -> PreTrainedModel:
    """``read_module`` with parameters that are partitioned over the ranks while they are read.

    Every rank reads its own parts (``zero/weights.py``). Raises UserError, also where ZeRO-3 would change the model.
    Collectives: one gather, and an all-gather of each weight that may be tied.
    """
    # transformers finds this object through a weak reference: it must live until the model is loaded.
    zero3 = HfDeepSpeedConfig(copy.deepcopy(deepspeed_config))
    problem = "cannot be loaded in parts, as ZeRO-3 does"
    try:
        reads = every_rank_reads_its_part(source, _remedy(auto_class), problem)
        with _ties_compare_whole_weights(), _one_hpz_group(), reads:
            module = read_module(source, dtype, auto_class, problem)
    finally:
        unset_hf_deepspeed_config()
        del zero3
    plain = _unread(module, dtype)
    _warn_of_unread_weights(plain, source)
    _check_precision(module, plain, source, dtype)
    _mend_persistent_buffers(module, plain, source)
    _mend_computed_buffers(module, plain)
    return module


@contextmanager
def _ties_compare_whole_weights() -> Iterator[None]:
    """Let transformers compare weights that may be tied while they are whole.

    Of two weights that the configuration ties, transformers keeps both if the checkpoint holds different values
    (``PreTrainedModel.tie_weights``). Under ZeRO-3 it would compare two empty placeholders, which are always equal,
    and drop one. Collectives: an all-gather of each such weight; every rank comes to the same decision.
    """
    tie_weights = PreTrainedModel.tie_weights

    def tie_whole_weights(self: PreTrainedModel, *arguments: Any, **options: Any) -> None:
        names = {name for pair in self.all_tied_weights_keys.items() for name in pair}
        modules = (self.get_submodule(name.rpartition(".")[0]) for name in sorted(names))
        # With their biases: tie_weights pads a bias that is shorter than its weight, as an empty placeholder is.
        parameters = {id(p): p for module in modules for p in module.parameters(recurse=False) if hasattr(p, "ds_id")}
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            tie_weights(self, *arguments, **options)

    with patch.object(PreTrainedModel, "tie_weights", tie_whole_weights):
        yield


@contextmanager
def _one_hpz_group() -> Iterator[None]:
    """Let all models of a process share hpZ's group of ranks, which every ``zero.Init`` would create: DeepSpeed keeps
    one for the process, and fails at a second."""
    create = groups._create_zero_param_parallel_group

    def create_first(size: int) -> None:
        if groups._get_zero_param_intra_parallel_group() is None:
            create(size)

    with patch.object(groups, "_create_zero_param_parallel_group", create_first):
        yield


def _unread(module: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """The model as transformers builds it before it reads weights: on the meta device, without ZeRO-3."""
    with torch.device("meta"):
        return type(module)._from_config(copy.deepcopy(module.config), dtype=MODEL_DTYPES[dtype])


def _warn_of_unread_weights(plain: PreTrainedModel, source: ModelSource) -> None:
    """Rank 0 says which stored weights the model has no place for, as transformers reports of plain loading only.

    A configuration with fewer layers than the checkpoint would otherwise cut the model without a word.
    """
    if not runtime.is_main():
        return
    known = [*(plain._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    names, state = by_loaded_name(plain, stored_weights(source)), plain.state_dict()
    unread = [name for name in names if name not in state and not re.search("|".join(known), name)]
    if unread:
        number = counted(len(unread), "weight")
        left = f"holds {number} that its configuration has no place for (the first: {unread[0]})"
        print(f"WARNING: {source.field} = {source.path}: {left}; they are not loaded", file=sys.stderr, flush=True)


def _check_precision(module: PreTrainedModel, plain: PreTrainedModel, source: ModelSource, dtype: str) -> None:
    """Raise UserError where transformers keeps weights in float32 that ZeRO-3, which has one dtype, has rounded.

    Routers and decay rates are kept so: rounded, they choose other experts.
    """
    kept: list[WeightRenaming | WeightConverter | str] = [*(plain._keep_in_fp32_modules_strict or ())]
    if dtype == "fp16":
        kept += plain._keep_in_fp32_modules or ()
    pattern = build_glob_alternation(kept)[0] if kept and dtype != "fp32" else None
    parameters = dict(module.named_parameters())
    rounded = [
        name
        for name, parameter in plain.named_parameters()
        if name in parameters
        and parameters[name].dtype != (torch.float32 if pattern and pattern.search(name) else parameter.dtype)
    ]
    if rounded:
        problem = f"keeps {rounded[0]} in float32 ({len(rounded)} such weights), which ZeRO-3 would round to {dtype}"
        raise UserError(source.field, source.path, problem, "load it in fp32 (dtype: fp32)")


def _mend_persistent_buffers(module: PreTrainedModel, plain: PreTrainedModel, source: ModelSource) -> None:
    """Read buffers again that the checkpoint holds and ZeRO-3's construction has rounded to the parameters' dtype."""
    buffers, computed = dict(module.named_buffers()), {name for name, _ in plain.named_non_persistent_buffers()}
    wanted = {name: buffer.dtype for name, buffer in plain.named_buffers() if name not in computed}
    rounded = [name for name, dtype in wanted.items() if name in buffers and buffers[name].dtype != dtype]
    stored = by_loaded_name(plain, stored_weights(source)) if rounded else {}
    with StoredReader() as reader:
        for name in rounded:
            # A copy, which a closed model frees; what is read itself stays [measured: tests/dist/test_loading.py].
            value = whole_weight(reader, stored[name], wanted[name])
            _set_buffer(module, name, value.to(buffers[name].device, wanted[name], copy=True))


def _mend_computed_buffers(module: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Give buffers that no checkpoint holds the values that transformers computes without ZeRO-3.

    DeepSpeed casts what a constructor computes to the parameters' dtype, whatever dtype it asks for, and transformers
    initialises modules with parameters on rank 0 only. Values that only a constructor computes (in a model's own code)
    stay: on the meta device they are not known.
    """
    for tensor in plain.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # transformers skips it, and every random initialisation with it
    computed = [(name, buffer) for name, buffer in plain.named_non_persistent_buffers() if buffer.is_floating_point()]
    for name, buffer in computed:
        _set_buffer(plain, name, torch.full_like(buffer, torch.nan, device="cpu"))
    plain.initialize_weights()
    buffers, expected = dict(module.named_buffers()), dict(plain.named_buffers())
    for name, _ in computed:
        if name not in buffers or expected[name].isnan().any():
            continue
        value = expected[name].to(buffers[name].device)
        if buffers[name].dtype != value.dtype or buffers[name].shape != value.shape:
            _set_buffer(module, name, value)
        elif not torch.equal(buffers[name], value):
            buffers[name].copy_(value)


def _set_buffer(module: PreTrainedModel, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module.get_submodule(parent)._buffers[leaf] = value
