"""What ESI, SET and SPA would need on a cluster, with and without expert parallelism, and the DeepSpeed configuration
to use there. From shapes alone (core/footprint.py, docs/scaling.md)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from esi_ds.core.footprint import (
    CPU_PREFETCH,
    GatheredTensor,
    Resident,
    Topology,
    Traffic,
    Transient,
    compact_traffic,
    esi_resident,
    gather_traffic,
    gathered_tensors,
    hpz_share,
    in_flight_bytes,
    num_experts,
    reduce_traffic,
    set_resident,
    spa_resident,
    takeover_bytes,
    token_traffic,
    transient,
    window_bytes,
)
from esi_ds.core.units import Parameter
from esi_ds.deepspeed_config import REDUCE_BUCKET, expert_parallel_size

STAGES = ("esi", "set", "spa")
USABLE = 0.8  # of a GPU; the rest is for activations, the CUDA context and the allocator's cache
# Families for which AutoEP of DeepSpeed 0.19.8 has a preset (auto_ep_presets); others need `moe_layer_pattern`.
AUTOEP_MODEL_TYPES = frozenset(
    ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_moe_text", "deepseek_v2", "deepseek_v3", "minimax_m3_vl_text")
)
BORROWED_PRESETS = {"olmoe": "qwen3_moe", "glm4_moe": "deepseek_v3"}  # those of other families that fit


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a plan needs to know besides the hardware.

    trained: stage → parameter name → weights that get a gradient (ESI: those scored). weight: bytes per weight.
    tokens: per rank and micro-batch. top_k: experts per token. hidden: width of a token. compact: whether SET reduces
    by one all-reduce per step. num_sums: of gradients, in ESI, and of scores beside them. accumulation: micro-batches
    per step. recompute: whether activations are recomputed. sums_on_host: whether ESI's gradient sums lie there. judge:
    bytes of ESI's judge on a rank. autoep: what ``expert_parallel`` says besides its size; None where AutoEP has no
    preset for the family and none is named.
    """

    parameters: tuple[Parameter, ...]
    trained: Mapping[str, Mapping[str, int]]
    weight: int
    tokens: int
    top_k: int
    hidden: int
    compact: bool
    num_sums: int = 1
    accumulation: int = 1
    recompute: bool = False
    sums_on_host: bool = False
    judge: float = 0.0
    autoep: Mapping[str, Any] | None = None

    def experts(self) -> list[int]:
        """Number of routed experts in each layer that has any."""
        return [count for p in self.parameters if (count := num_experts(p)) and p.name.endswith("down_proj")]


@dataclass(frozen=True)
class Footprint:
    """Bytes per rank of one stage under one DeepSpeed configuration.

    judge: weights of ESI's judge. host: bytes kept in the node's memory instead. in_flight: gradients that are reduced
    beside the backward pass. window: weights kept for reuse and prefetch. start: the most that a GPU holds while AutoEP
    takes over the experts; 0 without AutoEP, where every step holds more. saving: what a save copies from the GPU into
    the node's memory.
    """

    resident: Resident
    judge: float
    host: float
    transient: Transient
    in_flight: float
    window: int
    start: float
    traffic: Traffic
    saving: float

    @property
    def together(self) -> float:
        """The most that a rank's GPU holds at any time, without activations."""
        step = self.resident.total + self.judge + self.transient.total + self.in_flight + self.window
        return max(self.start, step)


def footprint(work: Work, stage: str, cluster: Topology, settings: Mapping[str, Any]) -> Footprint:
    """Bytes and traffic of a stage. settings: a DeepSpeed configuration, of which ``zero_optimization`` and
    ``expert_parallel`` are read."""
    zero = settings["zero_optimization"]
    size = expert_parallel_size(settings)
    tensors = gathered_tensors(work.parameters, cluster.ranks, size)
    resident, host = _offloaded(_resident(work, stage, tensors, cluster, zero), work, stage, zero)
    judge = work.judge if stage == "esi" else 0.0
    return Footprint(
        resident,
        judge,
        host,
        transient(tensors, work.weight, work.trained[stage], stage, work.compact, work.recompute),
        in_flight_bytes(tensors, work.trained[stage], stage, stage == "set" and work.compact),
        window_bytes(tensors, work.weight, zero),
        0.0 if size is None else judge + _start(work, stage, cluster.ranks, size, zero),
        _traffic(work, stage, tensors, cluster, size),
        resident.gradients / max(1, work.num_sums) if stage == "esi" else resident.optimizer,  # a pass at a time
    )


def window_on_cpus(work: Work, cluster: Topology, settings: Mapping[str, Any]) -> int:
    """``Footprint.window`` on CPUs, where a run gathers fewer weights ahead if the configuration names no number."""
    tensors = gathered_tensors(work.parameters, cluster.ranks, expert_parallel_size(settings))
    return window_bytes(tensors, work.weight, settings["zero_optimization"], CPU_PREFETCH)


def _start(work: Work, stage: str, ranks: int, size: int, zero: Mapping[str, Any]) -> float:
    """Weights, and the block of experts that is being replaced. SPA's optimizer refers to the original experts, which
    therefore stay until all of them are replaced."""
    weights = 0
    if _device(zero, "offload_param") != "cpu":
        whole = gathered_tensors(work.parameters, ranks)
        doubled = [piece for piece in whole if stage == "spa" and num_experts(piece.parameter)]
        weights = work.weight * sum(piece.shard for piece in (*whole, *doubled))
    return weights + takeover_bytes(work.parameters, work.weight, ranks, size)


def _resident(
    work: Work, stage: str, tensors: Sequence[GatheredTensor], cluster: Topology, zero: Mapping[str, Any]
) -> Resident:
    if stage == "esi":
        resident = esi_resident(tensors, work.weight, work.num_sums)
    elif stage == "set":
        resident = set_resident(tensors, work.weight, work.trained["set"], work.compact)
    else:
        bucket = zero.get("reduce_bucket_size", "auto")
        size = REDUCE_BUCKET if bucket == "auto" else int(bucket)
        resident = spa_resident(tensors, work.weight, work.trained["spa"], size)
    copies = hpz_share(zero, cluster.ranks) * work.weight * sum(parameter.numel for parameter in work.parameters)
    return replace(resident, weights=resident.weights + copies)


def _offloaded(resident: Resident, work: Work, stage: str, zero: Mapping[str, Any]) -> tuple[Resident, float]:
    """What stays on the GPU, and the bytes that move to the host."""
    on_gpu = resident
    if _device(zero, "offload_param") == "cpu":
        on_gpu = replace(on_gpu, weights=0.0)
    if stage == "spa" and _device(zero, "offload_optimizer") == "cpu":
        on_gpu = replace(on_gpu, optimizer=0.0, gradients=0.0)
    if stage == "esi" and work.sums_on_host:
        on_gpu = replace(on_gpu, gradients=0.0)
    return on_gpu, resident.total - on_gpu.total


def _device(zero: Mapping[str, Any], key: str) -> str | None:
    section = zero.get(key)
    return section.get("device") if isinstance(section, Mapping) else None


def _traffic(work: Work, stage: str, tensors: Sequence[GatheredTensor], cluster: Topology, size: int | None) -> Traffic:
    """Per step: ``accumulation`` micro-batches (ESI: one), and SET's one all-reduce where it is compact."""
    gathers = gather_traffic(tensors, work.weight, cluster, 3 if work.recompute else 2)
    compact = stage == "set" and work.compact
    total = gathers if compact else gathers + reduce_traffic(tensors, work.trained[stage], cluster)
    if size is not None:
        times, layers = 6 if work.recompute else 4, len(work.experts())
        total += token_traffic(layers, work.tokens, work.top_k, work.hidden, work.weight, size, cluster, times)
    count = 1 if stage == "esi" else work.accumulation
    total = Traffic(count * total.rank, count * total.node)
    return total + compact_traffic(tensors, work.trained["set"], cluster) if compact else total


def sizes(work: Work, cluster: Topology) -> list[int]:
    """Every ``autoep_size`` above 1 that the ranks, the experts of every layer and DeepSpeed's presets allow."""
    counts = work.experts()
    if work.autoep is None or not counts:
        return []
    return [
        n for n in range(2, cluster.ranks + 1) if cluster.ranks % n == 0 and all(count % n == 0 for count in counts)
    ]


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU, and of a node's main memory."""

    gpu: float
    node: float


@dataclass(frozen=True)
class Recommendation:
    """settings: a complete DeepSpeed configuration. fits: whether the stage fits into ``USABLE`` of the GPU and of the
    node's memory. override: ``key=value`` for the YAML that goes with it."""

    settings: dict[str, Any]
    footprint: Footprint
    fits: bool
    override: str | None = None


# What each stage moves to the host, cheapest first: DeepSpeed's sections, and whether ESI's gradient sums move too.
OFFLOADS: Mapping[str, Sequence[tuple[tuple[str, ...], bool]]] = {
    "esi": (((), False), ((), True), (("offload_param",), True)),
    "set": (((), False), (("offload_param",), False)),
    "spa": (((), False), (("offload_optimizer",), False), (("offload_param", "offload_optimizer"), False)),
}


def recommend(work: Work, stage: str, cluster: Topology, memory: Memory) -> Recommendation:
    """The first of the stage's ``OFFLOADS`` that fits, else the configuration that needs the least memory.

    Sizes of expert parallelism within a node are preferred, and among these the one with the least traffic per rank.
    """
    possible = sizes(work, cluster)
    inside: list[int | None] = [None, *(size for size in possible if cluster.holds(size))]
    across: list[int | None] = [size for size in possible if not cluster.holds(size)]
    too_large: list[Recommendation] = []
    for offload, sums_on_host in OFFLOADS[stage]:
        tried_work = replace(work, sums_on_host=work.sums_on_host or sums_on_host)
        override = "esi.accumulator_device=cpu" if sums_on_host else None
        for candidate_sizes in (inside, across):
            tried = [
                _try(tried_work, stage, cluster, zero3(size, offload, work.autoep), memory, override)
                for size in candidate_sizes
            ]
            if fitting := [candidate for candidate in tried if candidate.fits]:
                return min(fitting, key=lambda candidate: candidate.footprint.traffic.rank)
            too_large += tried
    return min(too_large, key=lambda candidate: candidate.footprint.together)


def _try(
    work: Work, stage: str, cluster: Topology, settings: dict[str, Any], memory: Memory, override: str | None
) -> Recommendation:
    needed = footprint(work, stage, cluster, settings)
    fits = needed.together <= USABLE * memory.gpu and cluster.per_node * needed.host <= USABLE * memory.node
    return Recommendation(settings, needed, fits, override)


def zero3(
    autoep_size: int | None = None, offload: Iterable[str] = (), named: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A DeepSpeed configuration like the files in ds_configs/. offload: sections whose content moves to the host.
    named: as in ``with_experts``."""
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "overlap_comm": autoep_size is None,
        "contiguous_gradients": True,
        **{key: {"device": "cpu", "pin_memory": True} for key in offload},
    }
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
    }
    return with_experts(settings, autoep_size, named)


def with_experts(
    settings: Mapping[str, Any], autoep_size: int | None, named: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The configuration with another size of expert parallelism; None: without it. named: the section's other keys."""
    changed = copy.deepcopy({key: value for key, value in settings.items() if key != "expert_parallel"})
    if autoep_size is not None:
        changed["expert_parallel"] = {"enabled": True, "autoep_size": autoep_size, **(named or {})}
    return changed


def nodes_needed(work: Work, stage: str, cluster: Topology, memory: Memory) -> int | None:
    """The number of nodes, doubled as often as needed, on which the stage fits; None: not on 4,096 ranks either."""
    while cluster.ranks <= 4096:
        if recommend(work, stage, cluster, memory).fits:
            return cluster.nodes
        cluster = Topology(2 * cluster.nodes, cluster.per_node)
    return None
