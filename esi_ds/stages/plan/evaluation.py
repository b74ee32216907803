"""``--dry-run`` of an evaluation: what it would ask whom, even before models, judges and prompts are there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from esi_ds.config import Config, Eval, EvalRubric, EvalWords, label, resolved_yaml
from esi_ds.config.needs import require_eval
from esi_ds.core.footprint import WEIGHT_BYTES
from esi_ds.deepspeed_config import resolve_deepspeed
from esi_ds.errors import UserError
from esi_ds.models.folder import ModelSource, load_model_config
from esi_ds.models.meta import meta_parameters
from esi_ds.options import Options
from esi_ds.report.contents import Facts
from esi_ds.stages.evaluate.prepare import BASE, prepare_eval
from esi_ds.stages.paths import is_hub_id
from esi_ds.stages.plan.batches import generation_rows
from esi_ds.stages.plan.memory import GIB, readable
from esi_ds.stages.plan.notes import count_prompts, hub_answers, missing_files
from esi_ds.stages.plan.stages import print_eval_plan, print_facts, print_notes


def plan_eval(config: Config, options: Options) -> None:
    """Print the resolved config and the plan. Loads no weights.

    Raises UserError for whatever is wrong. What does not exist yet, or cannot be reached, is noted, and the plan does
    without it: answers and verdicts are counted only where everything is there.
    """
    section, notes = require_eval(config), []
    for source in _models_and_judges(config):
        notes += _missing(source)
    counts: Facts = {}
    for kind, sets in (("harmful", section.prompts), ("benign", section.benign)):
        for number, prompts in enumerate(sets):
            field = f"eval.{'prompts' if kind == 'harmful' else 'benign'}.{number}"
            count = count_prompts(prompts, field, notes, "harmful" if kind == "harmful" else "benign")
            counts[f"{kind} set {prompts.path}"] = "not known" if count is None else f"{count:,} prompts"
    if not notes:
        print_eval_plan(config, options, prepare_eval(config))
        return
    facts: Facts = {"ranks": options.world_size or 1}
    facts |= _model_facts(config, section, options)
    facts |= counts
    facts["judges"] = ", ".join(map(label, section.judges)) or "words"
    facts["tasks"] = ", ".join(task.name for task in section.tasks) or "none"
    print(resolved_yaml(config))
    print_facts(facts)
    print_notes(notes)


def _models_and_judges(config: Config) -> Iterator[ModelSource]:
    """Everything whose files an evaluation loads."""
    section = require_eval(config)
    yield ModelSource.of(config.model)
    for number, model in enumerate(section.models):
        if model.path is not None:
            key = f"eval.models.{number}.path"
            yield ModelSource(model.path, model.revision, config.model.trust_remote_code, key)
    for number, judge in enumerate(section.judges):
        if not isinstance(judge, EvalRubric | EvalWords):
            yield ModelSource.of(judge, f"eval.judges.{number}")


def _missing(source: ModelSource) -> list[str]:
    """Notes on a model that is not there, or not whole."""
    field, path = source.field, source.path
    if Path(path).is_dir():
        return missing_files(field, path)
    if not is_hub_id(path):
        return [f"{field} = {path}: there is no such folder"]
    try:
        if hub_answers():
            load_model_config(source)
            return []
    except UserError as error:
        return [str(error)]
    return [f"{field} = {path}: the hub does not answer; HF_HUB_OFFLINE=1 would look for a local copy"]


def _model_facts(config: Config, section: Eval, options: Options) -> Facts:
    """Weights and answers at a time of every model whose configuration is there."""
    facts: Facts = {}
    settings, size = resolve_deepspeed(config, options.world_size or 1, "eval"), WEIGHT_BYTES[config.model.dtype]
    for name, path, revision in [
        (BASE, config.model.path, config.model.revision),
        *((label(model), model.path, model.revision) for model in section.models),
    ]:
        if path is None:
            facts[f"model {name}"] = "answers from elsewhere"
            continue
        source = ModelSource(path, revision, config.model.trust_remote_code, "model.path")
        try:
            model_config = load_model_config(source)
        except UserError:
            facts[f"model {name}"] = "not known"
            continue
        parameters = meta_parameters(model_config, source, dtype=config.model.dtype)
        total = sum(parameter.numel for parameter in parameters)
        rows = generation_rows(
            section.generation_batch_size,
            parameters,
            model_config,
            size,
            options.world_size or 1,
            settings,
            options.gpu_memory_gib * GIB,
            section.max_new_tokens,
        )
        facts[f"model {name}"] = f"{total:,} weights, {readable(size * total)} whole; answers {rows}"
    return facts
