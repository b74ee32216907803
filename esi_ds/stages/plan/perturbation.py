"""``--dry-run`` of a perturbation: what it would do, even before model, judges, prompts, mask and scores are there."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from esi_ds.config import Config, Perturb, label, resolved_yaml
from esi_ds.config.needs import require_eval
from esi_ds.core.mask import Mask
from esi_ds.models.folder import ModelSource
from esi_ds.models.meta import meta_parameters
from esi_ds.options import Options
from esi_ds.report.contents import Facts
from esi_ds.stages.perturb.prepare import (
    PerturbInputs,
    check_sections,
    chosen_by_scores,
    noise_cells,
    open_mask,
    prepare_perturb,
)
from esi_ds.stages.plan.evaluation import describe_model, describe_sets, survey
from esi_ds.stages.plan.stages import print_facts


def plan_perturb(config: Config, options: Options) -> None:
    """Print the resolved config and the plan. Loads no weights.

    Raises UserError for whatever is wrong. What does not exist yet, or cannot be reached, is noted, and the plan does
    without it.
    """
    section, surveyed = check_sections(config), survey(config)
    model_config = surveyed.configs["model.path"]
    for key, path in (("mask", section.mask), ("scores", section.scores)):
        if path is not None and not Path(path).exists():
            surveyed.notes.append(f"perturb.{key} = {path}: does not exist")
    inputs = None if surveyed.notes else prepare_perturb(config)
    mask = inputs.mask if inputs else _mask(config, section, model_config)
    print(resolved_yaml(config))
    print_facts(_facts(config, options, model_config, surveyed.counts, mask, inputs))
    surveyed.print_notes()


def _mask(config: Config, section: Perturb, model_config: PretrainedConfig | None) -> Mask | None:
    """The mask; None where it or the model that it belongs to is not there. Raises UserError."""
    if model_config is None or not Path(section.mask).exists():
        return None
    source = ModelSource.of(config.model)
    return open_mask(section, meta_parameters(model_config, source, config.model.roles, config.model.dtype))


def _facts(
    config: Config,
    options: Options,
    model_config: PretrainedConfig | None,
    counts: dict[str, int | None],
    mask: Mask | None,
    inputs: PerturbInputs | None,
) -> Facts:
    """The plan. mask, inputs: None where something is not there; skipped prompts are then counted as asked."""
    asked, source = require_eval(config), ModelSource.of(config.model)
    ratio = mask.header.ratio if mask else config.select.ratio  # any would do: the cells are counted only
    cells = noise_cells(check_sections(config), ratio)
    scores = "not known"
    if inputs:
        scores = str(inputs.scores or "not needed")
    elif mask:
        scores = "needed" if chosen_by_scores(cells, ratio) else "not needed"
    numbers = [count for count in counts.values() if count is not None]
    total = sum(numbers) * asked.samples * (len(cells) + 1)
    known = len(numbers) == len(counts)
    model = describe_model(config, options, model_config, source, None) if model_config else "not known"
    return {
        "ranks": options.world_size or 1,
        "model": model,
        "mask": f"{mask.k:,} weights by {mask.header.criterion}" if mask else "not known",
        "scores": scores,
        "cells": f"{len(cells)}, and the model without noise",
        **describe_sets(counts),
        "answers": f"{total:,}, at most {asked.max_new_tokens} tokens each" if known else "not known",
        "judges": ", ".join(map(label, asked.judges)) or "words",
    }
