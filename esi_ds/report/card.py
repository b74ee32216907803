"""The model card of a tuned model: what was done to it, so that a stranger can do it again."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from esi_ds.config import Config, Tune
from esi_ds.config.yaml import dump_yaml
from esi_ds.core.mask import Mask
from esi_ds.data.conversations import TuningSet
from esi_ds.report.asked import asked_as
from esi_ds.report.sentences import what_was_trained
from esi_ds.terminal import printable
from esi_ds.words import counted

METHODS = {"set": "Safety Enhancement Tuning (SET)", "spa": "Safety Preserving Adaptation (SPA)"}


def model_card(
    config: Config,
    tune: Tune,
    *,
    stage: str,
    fingerprint: str,
    mask: Mask,
    num_trained: int,
    ranks: int,
    rows: TuningSet,
    benign: TuningSet | None,
    dequantised_from: str | None = None,
    rounded_from: str | None = None,
    num_benign: int = 0,
    routers: str | None = None,
    has_towers: bool = False,
    remarks: Mapping[str, str] | None = None,
) -> str:
    """Markdown with the hub's front matter.

    stage: set or spa. fingerprint: the base model's. dequantised_from: the format of its files; None where they are not
    quantised. rounded_from: their dtypes, where ``model.dtype`` holds them only rounded. num_trained: weights that were
    trained. ranks: of the run. benign, num_benign: rows mixed in, and how many were read. routers: of
    ``sentences.routers_fate``; None: as the config says. has_towers: whether the model has encoders of images or sound.
    remarks: rows of the table for what was unusual.
    """
    routers = routers or tune.router or tune.unscored
    rounded_to = config.model.dtype if rounded_from is not None else None
    sentence = what_was_trained(stage, stage == "spa" and not mask.k, tune.unscored, routers, rounded_to, has_towers)
    facts = {
        "base model": config.model.path + (f" ({config.model.revision})" if config.model.revision else ""),
        **({"base weights": f"dequantised from {dequantised_from}"} if dequantised_from is not None else {}),
        **({"base weights": f"rounded from {rounded_from}"} if rounded_from is not None else {}),
        "base fingerprint": fingerprint,
        **asked_as(config.model),
        **({"mask bits": f"sha256 {mask.bits_sha256}"} if mask.bits_sha256 is not None else {}),
        "mask made from": mask.fingerprint,
        "mask": f"{mask.k:,} of {mask.total_numel:,} weights by {mask.header.criterion}, order "
        f"{mask.header.order}, ratio {mask.header.ratio}",
        "trained weights": f"{num_trained:,}",
        "unscored parameters": "frozen" if tune.unscored == "freeze" else "trained",
        "routers": routers.replace("freeze", "frozen").replace("train", "trained"),
        **({"towers": "frozen"} if has_towers else {}),
        "steps": tune.max_steps,
        "rows": f"{tune.data.path}, sha256 {rows.sha256}",
        **({"rows written": line} if (line := tune.data.how_written) else {}),
        "batch": _batch(tune, ranks),
        "AdamW": f"lr {tune.lr}, {tune.scheduler}, warm-up {tune.warmup_ratio}, betas {tune.betas}, eps {tune.eps}, "
        f"weight decay {tune.weight_decay}, clipping {tune.clip}; fp32 masters",
        "seed": config.run.seed,
    }
    if benign is not None and tune.data.benign is not None:
        mix = tune.data.benign
        read = f"{counted(num_benign, 'row')} read, {mix.fraction:g} of all"
        facts["benign rows"] = f"{mix.path}, {read}, sha256 {benign.sha256}"
        if mix.how_written:
            facts["benign rows written"] = mix.how_written
    facts |= remarks or {}
    table = "\n".join(f"| {key} | {_cell(str(value))} |" for key, value in facts.items())
    base = {} if os.path.isdir(config.model.path) else {"base_model": config.model.path}  # the hub takes ids only
    matter = dump_yaml({**base, "tags": ["esi_ds", stage]})
    return (
        f"---\n{matter}---\n\n"
        f"# {_cell(config.model.path)} after {METHODS[stage]}\n\n"
        f"{sentence} Made by esi_ds "
        "(method: Qi et al., arXiv 2604.08297).\n\n| | |\n|---|---|\n" + table + "\n"
    )


def _batch(tune: Tune, ranks: int) -> str:
    of_rank = f"{counted(tune.batch_size, 'row')} a rank, {counted(tune.gradient_accumulation, 'micro-batch')} a step"
    return f"{of_rank}, on {counted(ranks, 'rank')}: {counted(tune.step_rows(ranks), 'row')} a step"


def _cell(text: str) -> str:
    """A text that stays within its cell of a table, or its line, and is shown as it is."""
    return re.sub(r"([\\`<>|])", r"\\\1", printable(" ".join(text.split("\n"))))
