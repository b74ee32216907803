"""``--dry-run`` of ESI: what it would do, from configurations alone. Loads no weights and starts no process group."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from esi_ds.config import Config, ModelEndpoint, Prompts, resolved_yaml
from esi_ds.config.needs import unread_of_eval
from esi_ds.core.criteria import objectives
from esi_ds.core.mask import num_bytes
from esi_ds.core.select import check_ratio, model_k, share_sizes
from esi_ds.core.units import Parameter
from esi_ds.data.benchmarks import Kind
from esi_ds.deepspeed_config import resolve_deepspeed
from esi_ds.models.folder import ModelSource, dequantised, load_model_config
from esi_ds.models.meta import meta_parameters
from esi_ds.models.roles import unrecognised_note
from esi_ds.options import Options
from esi_ds.report.contents import Facts
from esi_ds.stages.esi.losses import loss_sections
from esi_ds.stages.plan.batches import EsiBatches, esi_batches
from esi_ds.stages.plan.memory import (
    GIB,
    checkpoint_on_disk,
    describe_work,
    expected_trained,
    human_bytes,
    print_bytes,
    topology,
)
from esi_ds.stages.plan.notes import count_prompts, count_responses, count_rows, missing_files


def plan(
    config: Config, parameters: tuple[Parameter, ...], world_size: int, batches: EsiBatches, notes: list[str]
) -> Facts:
    """What ESI would do: logical matrices, k, passes, bytes on disk. Adds to ``notes`` what cannot be reached."""
    total = sum(parameter.numel for parameter in parameters)
    scored = [parameter for parameter in parameters if parameter.scored]
    num_scored = sum(parameter.numel for parameter in scored)
    units = Counter(unit.role for parameter in scored for unit in parameter.units)
    facts: Facts = {
        "weights": f"{total:,}",
        "scored weights": f"{num_scored:,}",
        "parameters": len(parameters),
        "logical matrices (units)": f"{sum(units.values()):,}: "
        + ", ".join(f"{r} {n}" for r, n in sorted(units.items())),
        "k": f"{_k(config, parameters):,}",
        "ranks": world_size,
    }
    if note := unrecognised_note(parameters):
        notes.append(note)
    criteria = config.select.criteria
    names = config.objectives
    if len(criteria) > 1:
        facts["masks"] = f"{len(criteria)}, from shared passes: {', '.join(map(_passes_of, criteria))}"
    if names:
        if len(names) > 1:
            facts["sums of gradients"] = f"{len(names)} sums: {', '.join(names)}"
        if "safety" in names:
            facts |= _passes(config, config.data.prompts, "data.prompts", world_size, batches, notes)
        if config.control is not None and config.control.prompts is not None:
            control = _passes(config, config.control.prompts, "control.prompts", world_size, batches, notes)
            facts |= {f"control {label}": fact for label, fact in control.items()}
        facts |= _loss_passes(config, world_size, batches, notes)
        facts["checkpoint on disk"] = checkpoint_on_disk(4 * num_scored * len(names), 4 * num_scored)
    if config.esi.save_scores:
        facts["scores on disk"] = human_bytes(len(criteria) * 4 * num_scored)
    facts["mask on disk"] = human_bytes(len(criteria) * sum(num_bytes(parameter.numel) for parameter in scored))
    return facts


def _k(config: Config, parameters: tuple[Parameter, ...]) -> int:
    """Weights that the mask would hold."""
    section = config.select
    if section.scope == "matrix":
        return sum(int(section.ratio * numel) for numel in share_sizes(parameters, section.of, section.scope))
    return model_k(parameters, config.select.ratio, config.select.of)


def _passes_of(criterion: str) -> str:
    """A criterion with the passes that its own gradients need."""
    return f"{criterion} ({' and '.join(objectives([criterion], contrastive=False)) or 'none'})"


def _passes(
    config: Config, section: Prompts | None, field: str, world_size: int, batches: EsiBatches, notes: list[str]
) -> Facts:
    """Prompts of a section, and the forward and backward passes that each rank makes over them."""
    path = config.data.responses
    if isinstance(path, str) and field == "control.prompts":
        path = None  # the file answers data.prompts only
    if isinstance(path, str):
        count = count_responses(path, section, notes)
    else:
        assert section is not None  # require_esi
        kind: Kind | None = "benign" if field == "control.prompts" else None
        count = count_prompts(section, field, notes, kind)
    answered: Facts = {"answered at a time": str(batches.generation)} if path is None else {}
    if isinstance(path, ModelEndpoint):
        answered = {"answered by": f"{path.model} at {path.base_url}, {path.concurrency} at a time"}
    if count is None:
        return {"prompts": "not known", **answered}
    size, is_auto = batches.scoring.number, batches.scoring.is_auto
    stride = size * world_size
    passes = -(-count // stride)
    work = "each one forward and backward of the judge and of the model"
    if config.esi.estimator == "score_function":
        judged = "" if config.judge is None else ", after one forward of the judge"
        work = f"each one forward and backward of the model{judged}"
    facts: Facts = {
        "prompts": count,
        "passes": f"{passes} of {size}{' (auto)' * is_auto} prompts per rank ({stride} together), {work}",
        "batches to generate": "0" if path is not None else batches.generation.batches(count, world_size),
    }
    return facts | answered


def _loss_passes(config: Config, world_size: int, batches: EsiBatches, notes: list[str]) -> Facts:
    """Rows of each loss, and the passes over them. Rows are counted, not read as conversations."""
    facts: Facts = {}
    for name, (field, section) in loss_sections(config).items():
        count = count_rows(section, field, notes)
        if count is None:
            facts[f"{name} rows"] = "not known"
            continue
        is_mean = name in batches.losses
        # F is made of single rows' gradients, which must not meet in a group of ranks.
        size, readers = (batches.losses[name].number, world_size) if is_mean else (1, batches.readers)
        read_by = "" if readers == world_size else ", read by one rank of each expert-parallel group"
        facts[f"{name} rows"] = count
        facts[f"{name} passes"] = (
            f"{-(-count // (size * readers))} of {size} rows per rank ({size * readers} together{read_by}), each one "
            "forward and backward of the model"
        )
    return facts


def print_plan(config: Config, options: Options) -> None:
    """The resolved config, then what ESI would do, and the memory and traffic of it."""
    cluster, source = topology(options), ModelSource.of(config.model)
    settings = resolve_deepspeed(config, cluster.ranks)
    model_config = load_model_config(source)
    parameters = meta_parameters(model_config, source, config.model.roles, config.model.dtype)
    check_ratio(config.select.ratio, share_sizes(parameters, config.select.of, config.select.scope), "select.ratio")
    notes = missing_files("model.path", source.path) if os.path.isdir(source.path) else []
    trained = expected_trained(config, parameters)
    work = describe_work(config, "esi", model_config, parameters, trained, cluster.ranks)
    batches = esi_batches(config, work, model_config, cluster, settings, options.gpu_memory_gib * GIB)
    facts = plan(config, parameters, cluster.ranks, batches, notes)
    print(resolved_yaml(config))
    print_facts(facts)
    print_notes([*notes, *unread_of_eval(config, "esi"), *dequantised([source])])
    tokens = 2 * config.esi.max_new_tokens * batches.scoring.number
    print_bytes(config, options, "esi", replace(work, tokens=tokens), model_config)


def print_notes(notes: Sequence[str]) -> None:
    """One line each."""
    for note in notes:
        print(f"NOTE: {note}")


def print_facts(facts: Facts) -> None:
    """One line per fact, in columns."""
    width = max(map(len, facts))
    print("\n".join(f"{key:{width}}  {value}" for key, value in facts.items()))
