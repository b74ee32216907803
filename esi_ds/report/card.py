"""The model card of a tuned model: what was done to it, so that a stranger can do it again."""

from __future__ import annotations

import os
import re

from esi_ds.config import Config, Tune
from esi_ds.config.tuning import BenignMix
from esi_ds.config.yaml import dump_yaml
from esi_ds.core.trained import Trained
from esi_ds.data.conversations import TuningSet
from esi_ds.report.asked import asked_as
from esi_ds.report.contents import Facts
from esi_ds.report.sentences import mask_bits, routers_fate, what_was_trained
from esi_ds.terminal import printable
from esi_ds.words import counted

METHODS = {"set": "Safety Enhancement Tuning (SET)", "spa": "Safety Preserving Adaptation (SPA)"}


def model_card(
    config: Config,
    tune: Tune,
    *,
    stage: str,
    fingerprint: str,
    trained: Trained,
    ranks: int,
    rows: TuningSet,
    benign: TuningSet | None,
    num_benign: int,
    dequantised_from: str | None,
    rounded_from: str | None,
    remarks: Facts,
) -> str:
    """Markdown with the hub's front matter.

    stage: set or spa. fingerprint: the base model's. ranks: of the run. benign, num_benign: rows mixed in, and how many
    were read. dequantised_from: the format of the base's files; None where they are not quantised. rounded_from: their
    dtypes, where ``model.dtype`` holds them only rounded. remarks: rows of the table for what was unusual.
    """
    mask, routers, has_towers = trained.mask, routers_fate(trained), bool(trained.towers)
    rounded_to = config.model.dtype if rounded_from is not None else None
    sentence = what_was_trained(stage, stage == "spa" and not mask.k, tune.unscored, routers, rounded_to, has_towers)
    facts = {
        "base model": config.model.path + (f" ({config.model.revision})" if config.model.revision else ""),
        **({"base weights": f"dequantised from {dequantised_from}"} if dequantised_from is not None else {}),
        **({"base weights": f"rounded from {rounded_from}"} if rounded_from is not None else {}),
        "base fingerprint": fingerprint,
        **asked_as(config.model),
        **mask_bits(mask),
        "mask made from": mask.fingerprint,
        "mask": f"{mask.k:,} of {mask.total_numel:,} weights by {mask.header.criterion}, order "
        f"{mask.header.order}, ratio {mask.header.ratio}",
        "trained weights": f"{trained.total:,}",
        "unscored parameters": "frozen" if tune.unscored == "freeze" else "trained",
        "routers": routers.replace("freeze", "frozen").replace("train", "trained"),
        **({"towers": "frozen"} if has_towers else {}),
        "steps": tune.max_steps,
        "rows": f"{tune.data.path}, sha256 {rows.sha256}",
        **({"rows written": line} if (line := tune.data.how_written) else {}),
        **rows.facts("rows"),
        "batch": _batch(tune, ranks),
        "AdamW": f"lr {tune.lr}, {tune.scheduler}, warm-up {tune.warmup_ratio}, betas {tune.betas}, eps {tune.eps}, "
        f"weight decay {tune.weight_decay}, clipping {tune.clip}; fp32 masters",
        "seed": config.run.seed,
        **_benign_facts(tune.data.benign, benign, num_benign),
        **remarks,
    }
    table = "\n".join(f"| {key} | {_cell(str(value))} |" for key, value in facts.items())
    base = {} if os.path.isdir(config.model.path) else {"base_model": config.model.path}  # the hub takes ids only
    matter = dump_yaml({**base, "tags": ["esi_ds", stage]})
    return (
        f"---\n{matter}---\n\n"
        f"# {_cell(config.model.path)} after {METHODS[stage]}\n\n"
        f"{sentence} Made by esi_ds "
        "(method: Qi et al., arXiv 2604.08297).\n\n| | |\n|---|---|\n" + table + "\n"
    )


def _benign_facts(mix: BenignMix | None, rows: TuningSet | None, num_read: int) -> Facts:
    """Rows of the table about benign rows; none where none were mixed in."""
    if mix is None or rows is None:
        return {}
    read = f"{counted(num_read, 'row')} read, {mix.fraction:g} of all"
    return {
        "benign rows": f"{mix.path}, {read}, sha256 {rows.sha256}",
        **({"benign rows written": mix.how_written} if mix.how_written else {}),
        **rows.facts("benign rows"),
    }


def _batch(tune: Tune, ranks: int) -> str:
    of_rank = f"{counted(tune.batch_size, 'row')} a rank, {counted(tune.gradient_accumulation, 'micro-batch')} a step"
    return f"{of_rank}, on {counted(ranks, 'rank')}: {counted(tune.step_rows(ranks), 'row')} a step"


def _cell(text: str) -> str:
    """A text that stays within its cell of a table, or its line, and is shown as it is."""
    return re.sub(r"([\\`<>|])", r"\\\1", printable(" ".join(text.split("\n"))))
