"""``--dry-run`` of an evaluation: what it would ask whom, even before models, judges and prompts are there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from transformers import AutoModelForCausalLM, PretrainedConfig

from esi_ds.config import Config, Eval, EvalRubric, EvalWords, label, resolved_yaml
from esi_ds.config.needs import require_eval
from esi_ds.core.footprint import WEIGHT_BYTES
from esi_ds.data.prompts import question_sections
from esi_ds.deepspeed_config import resolve_deepspeed
from esi_ds.errors import UserError
from esi_ds.eval.endpoint import Endpoint
from esi_ds.models.folder import ModelSource, dequantised, load_model_config
from esi_ds.models.hub import is_hub_id
from esi_ds.models.meta import meta_parameters, model_bytes
from esi_ds.options import Options
from esi_ds.report.contents import Facts
from esi_ds.stages.evaluate.prepare import BASE, WHOLE_MODEL, WITHOUT_TASKS, EvalInputs, RecordedModel, prepare_eval
from esi_ds.stages.plan.batches import answer_rows
from esi_ds.stages.plan.footprints import USABLE
from esi_ds.stages.plan.memory import GIB, human_bytes
from esi_ds.stages.plan.notes import count_prompts, missing_files, note_missing_tasks, read_if_reachable
from esi_ds.stages.plan.stages import print_facts, print_notes
from esi_ds.words import counted


def plan_eval(config: Config, options: Options) -> None:
    """Print the resolved config and the plan. Loads no weights.

    Raises UserError for whatever is wrong. What does not exist yet, or cannot be reached, is noted, and the plan does
    without it: answers and verdicts are counted only where everything is there.
    """
    section, surveyed = require_eval(config), survey(config)
    if not surveyed.notes:
        print_eval_plan(config, options, prepare_eval(config))
        return
    facts: Facts = {"ranks": options.world_size or 1}
    for name, field in _fields(section).items():
        model_config = surveyed.configs.get(field)
        if field not in surveyed.sources:
            facts[f"model {name}"] = "answers from elsewhere"
        elif model_config is None:
            facts[f"model {name}"] = "not known"
        else:
            facts[f"model {name}"] = describe_model(config, options, model_config, surveyed.sources[field], None)
    facts |= describe_sets(surveyed.counts)
    facts["judges"] = ", ".join(map(label, section.judges)) or "words"
    facts["tasks"] = _tasks(section)
    for name, field in _fields(section).items():
        if (model_config := surveyed.configs.get(field)) is not None:
            surveyed.notes.extend(too_large_for_tasks(config, options, name, model_config, surveyed.sources[field]))
    print(resolved_yaml(config))
    print_facts(facts)
    surveyed.print_notes()


@dataclass(frozen=True)
class Survey:
    """What an evaluation would load and ask, by field of the config or by name; None for what is not there, of which
    there is a note."""

    sources: dict[str, ModelSource]
    configs: dict[str, PretrainedConfig | None]  # of the models and judges
    counts: dict[str, int | None]  # prompts of each set
    notes: list[str]

    def print_notes(self) -> None:
        """The notes, and which models would be dequantised."""
        present = (source for field, source in self.sources.items() if self.configs[field] is not None)
        print_notes([*self.notes, *dequantised(present)])


def survey(config: Config) -> Survey:
    """Look for everything that an evaluation needs. Raises UserError for what is wrong."""
    section, notes = require_eval(config), list[str]()
    sources = {source.field: source for source in _models_and_judges(config)}
    configs = {field: _configuration(source, notes) for field, source in sources.items()}
    counts = _count_sets(section, notes)
    notes += _missing_tools(section)
    note_missing_tasks(section.tasks, notes)
    return Survey(sources, configs, counts, notes)


def _fields(section: Eval) -> dict[str, str]:
    """Names of the models → the keys of their paths."""
    others = {label(model): f"eval.models.{number}.path" for number, model in enumerate(section.models)}
    return {BASE: "model.path", **others}


def _models_and_judges(config: Config) -> Iterator[ModelSource]:
    """Everything whose files an evaluation loads."""
    section = require_eval(config)
    yield ModelSource.of(config.model)
    for model, field in zip(section.models, list(_fields(section).values())[1:], strict=True):
        if model.path is not None:
            yield ModelSource(model.path, model.revision, config.model.trust_remote_code, field)
    for number, judge in enumerate(section.judges):
        if not isinstance(judge, EvalRubric | EvalWords):
            yield ModelSource.of(judge, f"eval.judges.{number}")


def _configuration(source: ModelSource, notes: list[str]) -> PretrainedConfig | None:
    """The configuration of a model, which may lack weights and tokenizer; None, and a note, where it is not there."""
    field, path = source.field, source.path
    if Path(path).is_dir():
        notes += missing_files(field, path)
        return load_model_config(source)
    if not is_hub_id(path):
        notes.append(f"{field} = {path}: there is no such folder")
        return None
    return read_if_reachable(path, field, lambda: load_model_config(source), notes)


def _missing_tools(section: Eval) -> Iterator[str]:
    """What this machine lacks of what the section needs: a server that a rubric judge is asked at.

    A pipeline's evaluation comes last, hours after a dry run could have said so. Raises UserError for a server's URL
    or key that is wrong.
    """
    for number, judge in enumerate(section.judges):
        if isinstance(judge, EvalRubric):
            field = f"eval.judges.{number}.model"
            try:
                Endpoint.from_environment(judge.model, field)
            except UserError as error:
                if error.field != field:
                    raise
                yield str(error)


def _count_sets(section: Eval, notes: list[str]) -> dict[str, int | None]:
    """How many prompts each set has; None, and a note, where it is not there."""
    return {
        f"{kind} set {name}": count_prompts(prompts, field, notes, kind)
        for field, kind, name, prompts in question_sections(section)
    }


def describe_sets(counts: dict[str, int | None]) -> Facts:
    """Numbers of prompts by set, in words."""
    return {name: "not known" if count is None else counted(count, "prompt") for name, count in counts.items()}


def describe_model(
    config: Config, options: Options, model_config: PretrainedConfig, source: ModelSource, before: str | None
) -> str:
    """A model's weights, and how many prompts it answers at a time. before: the model that it is compared with."""
    ranks, gpu = options.world_size or 1, options.gpu_memory_gib * GIB
    parameters = meta_parameters(model_config, source, dtype=config.model.dtype)
    total = sum(parameter.numel for parameter in parameters)
    whole = human_bytes(WEIGHT_BYTES[config.model.dtype] * total)
    rows = answer_rows(config, parameters, model_config, ranks, resolve_deepspeed(config, ranks, "eval"), gpu)
    against = f", compared with {before}" if before else ""
    return f"{total:,} weights, {whole} whole{against}; answers {rows}"


def too_large_for_tasks(
    config: Config, options: Options, name: str, model_config: PretrainedConfig, source: ModelSource
) -> list[str]:
    """A note where the config has tasks for a model that a GPU does not hold whole. name: of the model."""
    if not require_eval(config).tasks:
        return []
    size = model_bytes(model_config, source, config.model.dtype, AutoModelForCausalLM)
    gpu = options.gpu_memory_gib * GIB
    if size <= USABLE * gpu:
        return []
    return [
        f"eval.tasks: {WHOLE_MODEL}: {name} takes {human_bytes(size)} of a GPU's {human_bytes(gpu)}; {WITHOUT_TASKS}"
    ]


def _tasks(section: Eval) -> str:
    return ", ".join(task.name for task in section.tasks) or "none"


def print_eval_plan(config: Config, options: Options, inputs: EvalInputs) -> None:
    """The resolved config, then which models an evaluation would ask what, and who would judge."""
    section = require_eval(config)
    print(resolved_yaml(config))
    facts: Facts = {"ranks": options.world_size or 1}
    for other in inputs.elsewhere:
        origin = (
            f"{counted(len(other.recorded.answers), 'answer')} from "
            if isinstance(other, RecordedModel)
            else "asked as "
        )
        facts[f"model {other.name}"] = origin + other.path
    for model in inputs.candidates:
        facts[f"model {model.name}"] = describe_model(config, options, model.config, model.source, model.before)
    for prompt_set in inputs.sets:
        row = prompt_set.as_row()
        facts[f"{row['kind']} set {row['set']}"] = (
            f"{counted(row['read'], 'prompt')}, {sum(row['skipped'].values()):,} skipped"
        )
    count = sum(len(prompt_set.prompts) for prompt_set in inputs.sets) * section.samples
    facts["answers"] = f"{count * len(inputs.candidates):,}, at most {section.max_new_tokens} tokens each"
    num_harmful = sum(len(prompt_set.prompts) for prompt_set in inputs.sets if prompt_set.kind == "harmful")
    num_harmful *= section.samples
    if section.divergence:
        facts["divergence"] = (
            f"of {counted(len(inputs.candidates) - 1, 'model')}, each loaded beside the base, a share a rank of both"
        )
    judges = ", ".join(judge.name for judge in inputs.judges)
    facts["verdicts"] = f"{num_harmful * len(inputs.models):,} each of {judges}"
    facts["tasks"] = _tasks(section)
    print_facts(facts)
    too_large = (too_large_for_tasks(config, options, m.name, m.config, m.source) for m in inputs.candidates)
    print_notes([*chain.from_iterable(too_large), *dequantised(inputs.sources)])
