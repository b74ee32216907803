"""Everything about an evaluation that can be known, and refused, before a weight is loaded or a file written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from esi_ds.config import (
    Config,
    Eval,
    EvalClassifier,
    EvalGuard,
    EvalJudge,
    EvalRubric,
    EvalWords,
    EvalYesNo,
    JudgeModel,
    label,
)
from esi_ds.data.chat import break_up, encode_prompt, load_chat_tokenizer, load_tokenizer, special_strings
from esi_ds.data.prompts import QuestionSet, load_question_sets
from esi_ds.errors import UserError
from esi_ds.eval.classifiers import SequenceRule, read_rule, yes_no_family
from esi_ds.eval.endpoint import Endpoint
from esi_ds.eval.refusals import refusal_list
from esi_ds.eval.rubric import TEMPLATE, check_template
from esi_ds.eval.tasks import prepare_tasks
from esi_ds.judge.families import Family, choose_family
from esi_ds.judge.pairs import PairEncoder
from esi_ds.models.folder import ModelSource, check_weights, load_model_config, max_positions

if TYPE_CHECKING:
    from esi_ds.eval.harness_tasks import Prepared

BASE = "base"
ENDPOINT_KEYS = {"concurrency", "request_timeout", "item_timeout", "max_attempts", "max_tokens", "extra"}


@dataclass(frozen=True)
class Candidate:
    """A model under evaluation, without its weights. before: the model it is compared with; None for the base.

    max_positions: tokens it takes. prompt_ids: {(set, index): ids}.
    """

    name: str
    source: ModelSource
    before: str | None
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    prompt_ids: dict[tuple[str, int], list[int]]

    @property
    def max_positions(self) -> int | None:
        return max_positions(self.config)


@dataclass(frozen=True)
class PreparedJudge:
    """A judge of the config, checked as far as that goes without its weights."""

    name: str
    field: str
    section: EvalJudge
    tokenizer: PreTrainedTokenizerBase | None = None
    config: PretrainedConfig | None = None
    family: Family | None = None
    endpoint: Endpoint | None = None


@dataclass(frozen=True)
class EvalInputs:
    """What an evaluation works on."""

    sets: list[QuestionSet]
    models: list[Candidate]
    judges: list[PreparedJudge]
    tasks: list[Prepared]
    source: dict[str, str]


def prepare_eval(config: Config) -> EvalInputs:
    """Read the sets, tokenizers and judges and check them. Raises UserError. Reads only; loads no weights."""
    section = config.eval
    if section is None or not (section.prompts or section.benign or section.tasks):
        raise UserError("eval", None, "asks nothing", "give eval.prompts.path, eval.benign.path or eval.tasks")
    refusal_list(section.refusal_words, "eval.refusal_words")
    judges = prepare_judges(section)
    sets = load_question_sets(section)
    models = [_candidate(config, BASE, ModelSource.of(config.model), None, sets)]
    for number, model in enumerate(section.models):
        field = f"eval.models.{number}.path"
        source = ModelSource(model.path, model.revision, config.model.trust_remote_code, field)
        models.append(_candidate(config, label(model), source, model.before, sets))
    data_hashes = {f"{found.kind}:{found.name}": found.prompt_set.sha256 for found in sets}
    tasks = prepare_tasks(section.tasks)
    return EvalInputs(sets, models, judges, tasks, data_hashes)


def _candidate(
    config: Config,
    name: str,
    source: ModelSource,
    before: str | None,
    sets: list[QuestionSet],
) -> Candidate:
    section = config.model
    model_config = load_model_config(source)
    check_weights(source)
    tokenizer = load_chat_tokenizer(source, section)
    specials = special_strings(tokenizer)
    prompt_ids = {
        (found.name, index): encode_prompt(tokenizer, break_up(prompt, specials)[0], section.system_prompt)
        for found in sets
        for index, prompt in enumerate(found.prompts)
    }
    return Candidate(name, source, before, model_config, tokenizer, prompt_ids)


def prepare_judges(section: Eval) -> list[PreparedJudge]:
    """Judges in the config's order, string matching last: it is never the headline. None given: string matching."""
    given = section.judges or [EvalWords(kind="words")]
    judges = [_prepare_judge(judge, f"eval.judges.{number}") for number, judge in enumerate(given)]
    return sorted(judges, key=lambda judge: isinstance(judge.section, EvalWords))


def _prepare_judge(section: EvalJudge, place: str) -> PreparedJudge:
    if isinstance(section, EvalWords):
        refusal_list(section.words, f"{place}.words")
        return PreparedJudge(label(section), place, section)
    if isinstance(section, EvalRubric):
        if (section.prompt_price is None) != (section.completion_price is None):
            raise UserError(f"{place}.prompt_price", section.prompt_price, "is one of two prices", "give both")
        check_template(section.template or TEMPLATE, f"{place}.template")
        limits = section.model_dump(include=ENDPOINT_KEYS)
        endpoint = Endpoint.from_environment(section.model, f"{place}.model", **limits)
        return PreparedJudge(label(section), place, section, endpoint=endpoint)
    return _prepare_model_judge(section, place)


def _prepare_model_judge(section: JudgeModel, place: str) -> PreparedJudge:
    source = ModelSource.of(section, place)
    tokenizer = load_tokenizer(source)
    config = load_model_config(source)
    check_weights(source)
    family = None
    if isinstance(section, EvalGuard):
        family = choose_family(section, tokenizer, place)
    elif isinstance(section, EvalYesNo):
        family = yes_no_family(
            section.template,
            unsafe=section.unsafe,
            safe=section.safe,
            verdict_prefix=section.verdict_prefix,
            field=place,
        )
    if family is not None:
        PairEncoder(family, tokenizer, field=place).check_verdict()
    if isinstance(section, EvalClassifier):
        read_rule(config, sequence_rule(section), place)
    return PreparedJudge(label(section), place, section, tokenizer, config, family)


def sequence_rule(section: EvalClassifier) -> SequenceRule:
    return SequenceRule(
        section.template, section.unsafe_labels, section.multi_label, section.threshold, section.max_length
    )
