"""Where a judge lives: a whole copy on every rank, or cut over the ranks like the model."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from esi_ds.judge.guard import WholeWeights
from esi_ds.models.meta import meta_model
from esi_ds.zero import runtime
from esi_ds.zero.engine import DTYPES, load_replicated, load_sharded

SHARE = 0.25  # of a rank's free memory that a whole guard may take under `auto`


def model_bytes(
    config: PretrainedConfig, dtype: str, auto_class: type = AutoModelForCausalLM, trust_remote_code: bool = False
) -> int:
    """Bytes of all weights, counted on the meta device. trust_remote_code: of the judge's section."""
    model = meta_model(config, auto_class, trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters()) * DTYPES[dtype].itemsize


def choose_placement(
    config: PretrainedConfig,
    dtype: str,
    placement: str,
    auto_class: type = AutoModelForCausalLM,
    trust_remote_code: bool = False,
) -> tuple[str, str]:
    """(``replicated`` or ``sharded``, why). One all-reduce: the tightest rank decides."""
    size = model_bytes(config, dtype, auto_class, trust_remote_code)
    free = -runtime.all_reduce_max(torch.tensor([-float(runtime.free_memory_bytes())], dtype=torch.float64)).item()
    reason = f"it takes {size / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free on the tightest rank"
    if placement == "auto":
        return ("replicated" if size <= SHARE * free else "sharded"), reason
    return placement, f"set by the config; {reason}"


def load_frozen(path: str, dtype: str, placement: str, deepspeed_config: dict, field: str, **kwargs):
    """A frozen model, and how its weights are reached (``judge.guard.Weights``)."""
    if placement == "replicated":
        return load_replicated(path, dtype, field, **kwargs), WholeWeights()
    settings = {key: value for key, value in deepspeed_config.items() if key != "expert_parallel"}
    sharded = load_sharded(path, dtype, settings, field, **kwargs)
    module: nn.Module = sharded.module
    module.requires_grad_(False)
    return module, sharded
