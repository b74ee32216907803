"""Where a judge lives: a whole copy on every rank, or cut over the ranks like the model."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from esi_ds.config import JudgeModel
from esi_ds.judge.classifier import model_class
from esi_ds.judge.guard import Weights, WholeWeights
from esi_ds.models.meta import meta_model
from esi_ds.zero import runtime
from esi_ds.zero.engine import DTYPES, load_replicated, load_sharded

SHARE = 0.25  # of a rank's free memory that a whole guard may take under `auto`


def model_bytes(
    config: PretrainedConfig,
    dtype: str,
    auto_class: type = AutoModelForCausalLM,
    trust_remote_code: bool = False,
    field: str = "judge.path",
) -> int:
    """Bytes of all weights, counted on the meta device. ``field`` of the config names the model."""
    model = meta_model(config, auto_class, trust_remote_code, field)
    return sum(parameter.numel() for parameter in model.parameters()) * DTYPES[dtype].itemsize


def _choose_placement(size: int, placement: str) -> tuple[str, str]:
    """(``replicated`` or ``sharded``, why) for a judge of ``size`` bytes. One all-reduce: the tightest rank decides."""
    free = -runtime.all_reduce_max(torch.tensor([-float(runtime.free_memory_bytes())], dtype=torch.float64)).item()
    reason = f"it takes {size / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free on the tightest rank"
    if placement == "auto":
        return ("replicated" if size <= SHARE * free else "sharded"), reason
    return placement, f"set by the config; {reason}"


def load_judge(
    section: JudgeModel, config: PretrainedConfig, model_dtype: str, deepspeed_config: dict, field: str
) -> tuple[nn.Module, Weights, str]:
    """A frozen judge, how its weights are reached, and where they lie and why.

    section: at ``field`` of the experiment's config. config: the judge's architecture. model_dtype: of the judge too
    where its own is ``auto``. Collectives: one all-reduce, and those of loading.
    """
    auto_class, path = model_class(section), f"{field}.path"
    dtype = model_dtype if section.dtype == "auto" else section.dtype
    size = model_bytes(config, dtype, auto_class, section.trust_remote_code, path)
    placement, reason = _choose_placement(size, section.placement)
    options = {
        "auto_class": auto_class,
        "revision": section.revision,
        "trust_remote_code": section.trust_remote_code,
    }
    note = f"{placement} ({reason})"
    if placement == "replicated":
        return load_replicated(section.path, dtype, path, **options), WholeWeights(), note
    settings = {key: value for key, value in deepspeed_config.items() if key != "expert_parallel"}
    sharded = load_sharded(section.path, dtype, settings, path, **options)
    sharded.module.requires_grad_(False)
    return sharded.module, sharded, note
