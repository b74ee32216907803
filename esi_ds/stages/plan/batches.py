"""What ``auto`` batch sizes would be on GPUs of a given size, from shapes alone (``core/batch_size.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from esi_ds.config import Config, Esi, Eval
from esi_ds.config.needs import require_eval
from esi_ds.core.batch_size import (
    WHOLE_SHARE,
    generation_bytes,
    rows_that_fit,
    scoring_bytes,
    surrogate_bytes,
)
from esi_ds.core.footprint import WEIGHT_BYTES, Topology, gathered_tensors, hpz_share, transient, window_bytes
from esi_ds.core.units import Parameter
from esi_ds.deepspeed_config import expert_parallel_size
from esi_ds.models.widths import widths
from esi_ds.stages.esi.losses import loss_sections
from esi_ds.stages.plan.footprints import Work, footprint
from esi_ds.words import counted


@dataclass(frozen=True)
class RowsAtATime:
    """Rows that a rank takes at a time. is_auto: chosen from the memory of the planned GPU. on_cpus: what a run without
    GPUs would take, where that is something else."""

    number: int
    is_auto: bool
    on_cpus: int | None = None

    def __str__(self) -> str:
        chosen = " (auto, if prompts are as long as answers; a run decides by its free memory)"
        elsewhere = "" if self.on_cpus is None else f"; without GPUs {self.on_cpus}"
        return f"{counted(self.number, 'prompt')} per rank{chosen if self.is_auto else ''}{elsewhere}"

    def batches(self, count: int, ranks: int) -> str:
        """How many the ranks together make of ``count`` rows."""
        elsewhere = "" if self.on_cpus is None else f"; without GPUs {-(-count // (self.on_cpus * ranks)):,}"
        return f"{-(-count // (self.number * ranks)):,}{elsewhere}"


def generation_rows(
    section: Esi | Eval,
    parameters: Sequence[Parameter],
    model_config: PretrainedConfig,
    weight: int,
    ranks: int,
    settings: Mapping[str, Any],
    gpu: float,
    beside: float,
) -> RowsAtATime:
    """Prompts that a rank would answer at a time. Prompts are taken to be as long as answers.

    section: gives the batch size and the length of answers. weight: bytes of one weight. settings: DeepSpeed's. gpu:
    bytes of its memory. beside: bytes of that which something other than the model takes.
    """
    if isinstance(section.generation_batch_size, int):
        return RowsAtATime(section.generation_batch_size, False)
    tensors, zero = gathered_tensors(parameters, ranks, expert_parallel_size(settings)), settings["zero_optimization"]
    whole = weight * sum(tensor.numel for tensor in tensors)
    free = gpu - beside - weight * sum(tensor.shard for tensor in tensors) - hpz_share(zero, ranks) * whole
    fixed = 0.0
    if whole <= WHOLE_SHARE * free:
        free -= whole
    else:
        fixed = transient(tensors, weight, {}, "esi").total
        fixed += window_bytes(tensors, weight, zero)
    row = generation_bytes(widths(model_config), weight, section.max_new_tokens, section.max_new_tokens)
    # As ``generation_setting`` of a run says.
    on_cpus = section.batch_size if section.generation_batch_size is None and section.batch_size != "auto" else None
    return RowsAtATime(rows_that_fit(free, row, fixed), True, on_cpus)


def answer_rows(
    config: Config,
    parameters: Sequence[Parameter],
    model_config: PretrainedConfig,
    ranks: int,
    settings: Mapping[str, Any],
    gpu: float,
    beside: float = 0.0,
) -> RowsAtATime:
    """Prompts of ``eval`` that a rank would answer at a time; arguments as those of ``generation_rows``."""
    section, weight = require_eval(config), WEIGHT_BYTES[config.model.dtype]
    return generation_rows(section, parameters, model_config, weight, ranks, settings, gpu, beside)


@dataclass(frozen=True)
class EsiBatches:
    """generation, scoring: prompts that a rank answers and scores at a time. losses: rows at a time, by objective, of
    those that are the mean loss of rows. readers: ranks that read the rows of ``data.benign``, one each at a time."""

    generation: RowsAtATime
    scoring: RowsAtATime
    losses: Mapping[str, RowsAtATime]
    readers: int


def esi_batches(
    config: Config,
    work: Work,
    model_config: PretrainedConfig,
    cluster: Topology,
    settings: Mapping[str, Any],
    gpu: float,
) -> EsiBatches:
    """The batch sizes of an ESI run. settings: DeepSpeed's, resolved. gpu: bytes of its memory."""
    section, new_tokens = config.esi, config.esi.max_new_tokens
    weight = WEIGHT_BYTES[config.model.dtype]
    generation = generation_rows(
        section, work.parameters, model_config, weight, cluster.ranks, settings, gpu, work.judge
    )
    sizes, needed = widths(model_config), footprint(work, "esi", cluster, settings)

    def fitting(tokens: int, learnt: int) -> RowsAtATime:
        if section.batch_size != "auto":
            return RowsAtATime(section.batch_size, False)
        row = scoring_bytes(sizes, weight, tokens, learnt, work.recompute)
        fixed = needed.transient.total + needed.window + surrogate_bytes(sizes, learnt)
        return RowsAtATime(rows_that_fit(gpu - needed.resident.total - needed.judge, row, fixed), True)

    lengths = {name: section.max_length for name, (_, section) in loss_sections(config).items() if name != "benign"}
    losses = {name: fitting(longest, longest) for name, longest in lengths.items()}
    readers = cluster.ranks // (expert_parallel_size(settings) or 1)  # as ``ShardedModel.readers``
    return EsiBatches(generation, fitting(2 * new_tokens, new_tokens), losses, readers)
