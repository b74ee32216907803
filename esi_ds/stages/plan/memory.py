"""The part of ``--dry-run`` that shows what nodes would hold and send, and recommends a DeepSpeed config."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from esi_ds.config import Config
from esi_ds.core.criteria import num_held
from esi_ds.core.footprint import WEIGHT_BYTES, Topology, hpz_share, reduces_compactly
from esi_ds.core.select import model_k
from esi_ds.core.trained import Trained
from esi_ds.core.units import Parameter
from esi_ds.deepspeed_config import check_experts, expert_parallel_size, read, resolve_deepspeed
from esi_ds.errors import UserError
from esi_ds.judge.classifier import model_class
from esi_ds.models.folder import ModelSource, load_model_config
from esi_ds.models.meta import model_bytes
from esi_ds.models.roles import experts_per_token
from esi_ds.options import Options
from esi_ds.stages.plan.footprints import (
    AUTOEP_MODEL_TYPES,
    BORROWED_PRESETS,
    STAGES,
    Footprint,
    Memory,
    Recommendation,
    Work,
    footprint,
    nodes_needed,
    recommend,
    sizes,
    window_on_cpus,
    with_experts,
)
from esi_ds.words import counted

GIB = 2**30


def human_bytes(size: float) -> str:
    """Bytes in the unit that makes them a number below 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def checkpoint_on_disk(size: float, newest: float) -> str:
    """Bytes of a run's checkpoints. newest: of the one that is written; the one before it is removed afterwards."""
    return f"{human_bytes(size)}, and {human_bytes(newest)} more during a save"


def topology(options: Options) -> Topology:
    """``--nodes`` × ``--gpus-per-node``; ``--world-size`` alone means equal nodes of at most eight ranks each."""
    ranks = options.world_size or 1
    nodes = options.nodes or ranks // max(size for size in range(1, 9) if ranks % size == 0)
    return Topology(nodes, ranks // nodes)


def is_compact(config: Config, total: int) -> bool:
    """Whether SET reduces the gradients of its ``total`` trained weights by one all-reduce per step."""
    return reduces_compactly(total, config.tune.reduction if config.tune is not None else "auto")


def expected_trained(config: Config, parameters: Sequence[Parameter]) -> dict[str, dict[str, int]]:
    """stage → parameter → weights that get a gradient, before a mask exists: k of them, spread evenly."""
    scored = [parameter for parameter in parameters if parameter.scored]
    k = model_k(tuple(parameters), config.select.ratio, config.select.of)
    density = min(1.0, k / max(1, sum(parameter.numel for parameter in scored)))
    selected = {parameter.name: round(density * parameter.numel) for parameter in scored}
    others, tune = {}, config.tune
    if tune is not None:
        fates = {"router": tune.router or tune.unscored, "tower": "freeze"}
        unscored = [parameter for parameter in parameters if not parameter.scored]
        others = {p.name: p.numel for p in unscored if fates.get(p.role, tune.unscored) == "train"}
    return {
        "esi": {parameter.name: parameter.numel for parameter in scored},
        "set": selected | others,
        "spa": {parameter.name: parameter.numel - selected[parameter.name] for parameter in scored} | others,
    }


def known_trained(trained: Trained, parameters: Sequence[Parameter]) -> dict[str, dict[str, int]]:
    """The same for an existing mask."""
    scored = {parameter.name: parameter.numel for parameter in parameters if parameter.scored}
    others = {name: trained.count(name) for name in trained.numels if not trained.is_masked(name)}
    selected = {name: count for name, count in trained.mask.counts.items() if trained.is_masked(name)}
    spa = {name: trained.numels[name] - count for name, count in selected.items()}
    return {"esi": scored, "set": selected | others, "spa": spa | others}


def describe_work(
    config: Config,
    stage: str,
    model_config: PretrainedConfig,
    parameters: tuple[Parameter, ...],
    trained: Mapping[str, Mapping[str, int]],
    ranks: int,
) -> Work:
    """What a plan for ``stage`` on ``ranks`` ranks has to know of the config and the model.

    trained: stage → parameter → weights that get a gradient there.
    """
    text, tune = model_config.get_text_config(), config.tune
    if stage == "esi" or tune is None:
        rows = 1 if config.esi.batch_size == "auto" else config.esi.batch_size
        tokens, accumulation = rows * 2 * config.esi.max_new_tokens, 1
    else:
        tokens, accumulation = tune.batch_size * tune.max_length, tune.gradient_accumulation
    return Work(
        parameters=parameters,
        trained=trained,
        weight=WEIGHT_BYTES[config.model.dtype],
        tokens=tokens,
        top_k=experts_per_token(text),
        hidden=text.hidden_size,
        compact=is_compact(config, sum(trained["set"].values())),
        num_sums=num_held(config.select.criteria, config.select.contrastive, config.control is not None),
        accumulation=accumulation,
        recompute=config.model.gradient_checkpointing,
        sums_on_host=config.esi.accumulator_device == "cpu",
        judge=_judge_bytes(config, ranks),
        autoep=_autoep(config, text.model_type),
    )


def _autoep(config: Config, model_type: str) -> dict[str, Any] | None:
    """``Work.autoep``."""
    section = read(config).get("expert_parallel")
    items = section.items() if isinstance(section, dict) else ()
    named = {key: value for key, value in items if key not in ("enabled", "autoep_size")}
    is_known = model_type in AUTOEP_MODEL_TYPES or not named.keys().isdisjoint(("preset_model", "moe_layer_pattern"))
    return named if is_known else None


def _judge_bytes(config: Config, ranks: int) -> float:
    """Bytes of the judge on one rank: its share where it is sharded, else all of it. 0 where its configuration is not
    on this machine, for a plan does not wait for the hub. Raises UserError for a folder that holds no model."""
    judge = config.judge
    if judge is None or not config.scores_responses:
        return 0.0
    source = ModelSource.of(judge, "judge")
    try:
        judge_config = load_model_config(source, only_local=True)
    except UserError:
        if os.path.exists(judge.path):  # a folder that is there is what the run will load
            raise
        return 0.0
    dtype = config.model.dtype if judge.dtype == "auto" else judge.dtype
    whole = model_bytes(judge_config, source, dtype, model_class(judge, judge_config))
    share = 1 / ranks + hpz_share(read(config)["zero_optimization"], ranks)
    return whole * share if judge.placement == "sharded" else whole


ROWS: tuple[tuple[str, Callable[[Footprint], float]], ...] = (
    ("weights per rank", lambda stage: stage.resident.weights),
    ("gradient sums per rank", lambda stage: stage.resident.gradients),
    ("masters, moments per rank", lambda stage: stage.resident.optimizer),
    ("positions and sums, mask bits", lambda stage: stage.resident.index),
    ("DeepSpeed's bucket of gradients", lambda stage: stage.resident.buffers),
    ("judge per rank", lambda stage: stage.judge),
    ("largest transient", lambda stage: stage.transient.total),
    ("gradients in flight", lambda stage: stage.in_flight),
    ("kept for reuse and prefetch", lambda stage: stage.window),
    ("at the start, experts taken over", lambda stage: stage.start),
    ("together, without activations", lambda stage: stage.together),
    ("on the host instead, per rank", lambda stage: stage.host),
    ("on the host at a save, per rank", lambda stage: stage.saving),
    ("received per rank and step", lambda stage: stage.traffic.rank),
    ("received per node and step", lambda stage: stage.traffic.node),
)


def print_bytes(config: Config, options: Options, stage: str, work: Work, model_config: PretrainedConfig) -> None:
    """A table of all three stages without expert parallelism, one with it for a mixture, and the recommended DeepSpeed
    config. Raises UserError where the configured ``autoep_size`` does not fit the model."""
    cluster, model_type = topology(options), model_config.get_text_config().model_type
    settings = read(config)
    resolved = resolve_deepspeed(config, cluster.ranks, stage)
    check_experts(resolved, work.experts(), [p.block for p in work.parameters if p.block is not None])
    memory = Memory(options.gpu_memory_gib * GIB, options.node_memory_gib * GIB)
    best = recommend(work, stage, cluster, memory)
    size = expert_parallel_size(resolved)
    chosen = size or expert_parallel_size(best.settings) or next(iter(_near(sizes(work, cluster), cluster)), None)
    if stage == "esi" and config.judge is not None and config.scores_responses and not work.judge:
        print(f"\nNOTE: judge.path = {config.judge.path}: has no readable configuration on this machine: not counted")
    nodes, each = counted(cluster.nodes, "node"), counted(cluster.per_node, "GPU")
    print(f"\n{nodes} of {each}; a step has {work.tokens:,} tokens a rank at most")
    _print_table("without expert parallelism", work, stage, cluster, with_experts(settings, None))
    if chosen is not None:
        _print_table(f"autoep_size {chosen}", work, stage, cluster, with_experts(settings, chosen))
    elif work.experts():
        print(f"\nno expert parallelism to show: {_why_none(work, cluster, model_type)}")
    if size is not None and work.autoep is None:
        print(f"\nNOTE: {_why_none(work, cluster, model_type)}; a run in which it finds no experts is refused")
    if work.experts() and not work.recompute:
        print("\nNOTE: without model.gradient_checkpointing the gathered experts of all layers stay until backward")
    _print_recommendation(best, stage, work, cluster, memory)


def _near(possible: Sequence[int], cluster: Topology) -> list[int]:
    """The sizes whose groups each lie on one node, largest first; without such a size, all of them."""
    return sorted((size for size in possible if cluster.holds(size)), reverse=True) or list(possible)


def _why_none(work: Work, cluster: Topology, model_type: str) -> str:
    if work.autoep is not None:
        return f"nothing above 1 divides both {cluster.ranks} ranks and {sorted(set(work.experts()))} experts"
    fitting = BORROWED_PRESETS.get(model_type)
    remedy = f"name preset_model: {fitting}" if fitting else "name the preset_model or the patterns that fit the model"
    return f"DeepSpeed 0.19.8's AutoEP has no preset for {model_type} ({remedy})"


def _print_table(title: str, work: Work, stage: str, cluster: Topology, settings: Mapping[str, Any]) -> None:
    """Rows as in ``ROWS``, one column per stage."""
    stages = {name: footprint(work, name, cluster, settings) for name in STAGES}
    lines = [(title, [name.upper() for name in STAGES])]
    for label, value in ROWS:
        values = [value(stages[name]) for name in STAGES]
        if any(values):
            lines.append((label, [human_bytes(size) if size else "-" for size in values]))
    width = max(len(label) for label, _ in lines)
    print("\n" + "\n".join(f"{label:{width}}" + "".join(f"{cell:>12}" for cell in cells) for label, cells in lines))
    on_cpus = window_on_cpus(work, cluster, settings)
    if on_cpus != stages[stage].window:
        print(f"on CPUs, kept for reuse and prefetch: {human_bytes(on_cpus)}")
    largest = stages[stage].transient
    print(
        f"largest transient of {stage.upper()}: {largest.module}, gathered weights {human_bytes(largest.weights)}, "
        f"gradients {human_bytes(largest.gradient)}"
    )


def _print_recommendation(best: Recommendation, stage: str, work: Work, cluster: Topology, memory: Memory) -> None:
    host = cluster.per_node * best.footprint.host
    together = f"{human_bytes(best.footprint.together)} of a GPU's {human_bytes(memory.gpu)} without activations"
    together += f", {human_bytes(host)} of a node's {human_bytes(memory.node)}" if host else ""
    if best.fits:
        beside = f", with {best.override}" if best.override else ""
        print(f"\nrecommended for {stage.upper()} ({together}); save it and give it as --deepspeed_config{beside}:")
    else:
        needed = nodes_needed(work, stage, cluster, memory)
        number = counted(needed, "node") if needed else "no number of nodes up to 4,096 ranks"
        more = f"{number} would be enough"
        print(f"\n{stage.upper()} does not fit here ({together}): {more}. The config that takes the least:")
    print(json.dumps(best.settings, indent=2))
