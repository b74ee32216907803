"""``--dry-run`` of SET and SPA: what they would do, also where weights, mask or rows are not there yet."""

from __future__ import annotations

from pathlib import Path

from esi_ds.config import Config, require_tune, resolved_yaml
from esi_ds.core.mask import load_mask
from esi_ds.core.select import model_k
from esi_ds.core.trained import Trained
from esi_ds.core.units import Parameter
from esi_ds.deepspeed_config import resolve_deepspeed
from esi_ds.models.folder import ModelSource, load_model_config
from esi_ds.models.meta import meta_parameters
from esi_ds.options import Options
from esi_ds.stages.plan.memory import describe_work, expected_trained, is_compact, known_trained, print_bytes, topology
from esi_ds.stages.plan.notes import count_prompts, count_rows
from esi_ds.stages.plan.stages import print_facts
from esi_ds.stages.tune.prepare import check_routers, describe_trained, prepare_tuning

Counts = dict[str, dict[str, int]]  # stage → parameter → weights that get a gradient


def print_tuning_plan(config: Config, options: Options, stage: str) -> None:
    """The resolved config, then the plan. No collectives, no weights.

    Raises UserError for what is wrong; what is not there is noted, and the plan does without it: weights of a mask are
    expected to lie evenly, rows are counted and not read.
    """
    require_tune(config)
    source, tune, ranks = ModelSource.of(config.model), config.tune, topology(options).ranks
    resolve_deepspeed(config, ranks, stage)
    model_config = load_model_config(source)
    parameters = meta_parameters(model_config, source, config.model.roles)
    check_routers(config, parameters)
    notes = _missing_files(config)
    num_rows = count_rows(tune.data, "tune.data", notes)
    _reach_others(config, notes)
    rows = "not known" if num_rows is None else f"{num_rows:,}, counted only"
    trained: Trained | None = None
    if not notes:
        inputs = prepare_tuning(config, stage)
        trained, found = inputs.trained, inputs.rows
        num_rows = len(found.sequences)
        rows = f"{num_rows:,} ({found.columns}), {len(found.skipped)} skipped"
    elif Path(tune.mask).exists():
        trained = describe_trained(config, stage, load_mask(tune.mask), model_config)
    counts = known_trained(trained, parameters) if trained else expected_trained(config, parameters)
    print(resolved_yaml(config))
    facts = _weight_facts(config, stage, parameters, trained, counts) | {"ranks": ranks, "rows": rows}
    print_facts(facts | {"steps": _steps(config, ranks, num_rows)})
    for note in notes:
        print(f"NOTE: {note}")
    print_bytes(
        config, options, stage, describe_work(config, stage, model_config, parameters, counts, ranks), model_config
    )


def _missing_files(config: Config) -> list[str]:
    """Of the model folder and the mask, which earlier runs or downloads make."""
    notes, folder = [], Path(config.model.path)
    if folder.is_dir():
        for kind, pattern in (("weights", "*.safetensors"), ("tokenizer", "tokenizer*")):
            if not any(folder.glob(pattern)):
                notes.append(f"model.path = {folder}: holds no {kind} ({pattern})")
    if not Path(config.tune.mask).exists():
        ratio = config.select.ratio
        notes.append(f"tune.mask = {config.tune.mask}: is not there; select.ratio = {ratio:g} is taken to lie evenly")
    return notes


def _reach_others(config: Config, notes: list[str]) -> None:
    """Benign rows, and the prompts to answer before and after."""
    benign = config.tune.data.benign
    if benign is not None and benign.fraction > 0:
        count_rows(benign, "tune.data.benign", notes)
    if config.eval is not None:
        for key, kind in (("prompts", "harmful"), ("benign", "benign")):
            for number, section in enumerate(getattr(config.eval, key)):
                count_prompts(section, f"eval.{key}.{number}", notes, kind)


def _weight_facts(
    config: Config, stage: str, parameters: tuple[Parameter, ...], trained: Trained | None, counts: Counts
) -> dict[str, object]:
    learning = counts[stage]
    total = sum(learning.values())
    if trained is None:
        mask = f"{model_k(parameters, config.select.ratio, config.select.of):,} weights, expected"
    else:
        mask = f"{trained.mask.k:,} weights by {trained.mask.metadata.get('criterion')}"
    facts: dict[str, object] = {
        "weights": f"{sum(parameter.numel for parameter in parameters):,}",
        "mask": mask,
        "trained weights": f"{total:,} in {sum(count > 0 for count in learning.values())} parameters",
    }
    if stage == "set":
        is_one = is_compact(config, total)
        facts["gradients"] = "compact: one all-reduce a step" if is_one else "scatter: reduce-scatter in the hooks"
    return facts


def _steps(config: Config, ranks: int, num_rows: int | None) -> str:
    tune = config.tune
    stride = tune.batch_size * tune.gradient_accumulation * ranks
    epochs = "" if num_rows is None else f" ({tune.max_steps * stride / num_rows:.2f} epochs)"
    return f"{tune.max_steps:,} of {stride} rows{epochs}"
