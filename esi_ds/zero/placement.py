"""Placement of a judge: a whole copy on every rank, or partitioned over the ranks like the model."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from esi_ds.config import JudgeModel
from esi_ds.core.stored import MODEL_DTYPES
from esi_ds.deepspeed_config import with_precision
from esi_ds.judge.classifier import model_class
from esi_ds.judge.guard import Weights, WholeWeights
from esi_ds.models.folder import ModelSource
from esi_ds.models.meta import complete_chunks, meta_model
from esi_ds.zero.engine import load_replicated, load_sharded
from esi_ds.zero.memory import tightest_free_bytes

SHARE = 0.25  # of a rank's free memory that a whole judge may take under `auto`


def model_bytes(
    config: PretrainedConfig,
    source: ModelSource,
    dtype: str,
    auto_class: type[_BaseAutoModelClass] = AutoModelForCausalLM,
) -> int:
    """Bytes of all weights, counted on the meta device."""
    model = meta_model(config, source, auto_class)
    return sum(parameter.numel() for parameter in model.parameters()) * MODEL_DTYPES[dtype].itemsize


def _choose_placement(size: int, placement: str) -> tuple[str, str]:
    """(``replicated`` or ``sharded``, the reason) for a judge of ``size`` bytes.

    One all-reduce: the rank with the least free memory decides.
    """
    free = tightest_free_bytes()
    reason = f"it takes {size / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free on the tightest rank"
    if placement == "auto":
        return ("replicated" if size <= SHARE * free else "sharded"), reason
    return placement, f"set by the config; {reason}"


def load_judge(
    section: JudgeModel, key: str, config: PretrainedConfig, model_dtype: str, deepspeed_config: dict[str, Any]
) -> tuple[PreTrainedModel, Weights, str]:
    """A frozen judge, the way to release its weights, and a sentence on where they are and why.

    section: the judge's, at ``key`` of the experiment's config. config: the judge's architecture. model_dtype: used
    where the section's own is ``auto``. Collectives: one all-reduce, and those of loading.
    """
    auto_class, source = model_class(section, config), ModelSource.of(section, key)
    dtype = model_dtype if section.dtype == "auto" else section.dtype
    size = model_bytes(config, source, dtype, auto_class)
    placement, reason = _choose_placement(size, section.placement)
    note = f"{placement} ({reason})"
    if placement == "replicated":
        whole = load_replicated(source, dtype, auto_class)
        complete_chunks(whole)
        return whole, WholeWeights(), note
    settings = {name: value for name, value in deepspeed_config.items() if name != "expert_parallel"}
    sharded = load_sharded(source, dtype, with_precision(settings, dtype), auto_class=auto_class)
    sharded.module.requires_grad_(False)
    complete_chunks(sharded.module)
    return sharded.module, sharded, note
