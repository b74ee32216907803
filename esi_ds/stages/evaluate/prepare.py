"""Everything about an evaluation that can be known, and refused, before a weight is loaded or a file written."""

from __future__ import annotations

from collections.abc import Sequence
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
    Model,
    label,
)
from esi_ds.config.needs import require_eval
from esi_ds.data.answers import RecordedAnswers, load_answers
from esi_ds.data.asked import Asked
from esi_ds.data.chat import (
    answerable,
    broken_up_in,
    check_some_answerable,
    check_vocabulary,
    day_of,
    encode_data_prompt,
    load_chat_tokenizer,
    load_tokenizer,
    special_strings,
)
from esi_ds.data.end_tokens import end_tokens
from esi_ds.data.prompts import KEYS, QuestionSet, load_question_sets
from esi_ds.data.template_values import unread_values, without_values
from esi_ds.data.thought_rows import ThoughtTemplate
from esi_ds.errors import UserError
from esi_ds.eval.classifiers import yes_no_family
from esi_ds.eval.endpoint import Endpoint
from esi_ds.eval.refusals import RefusalList, refusal_list
from esi_ds.eval.rubric import TEMPLATE, check_template
from esi_ds.eval.tasks import prepare_tasks
from esi_ds.judge.classifier import SequenceRule, family_rule, read_rule
from esi_ds.judge.families import Family
from esi_ds.judge.pairs import PairEncoder
from esi_ds.judge.recognition import choose_family
from esi_ds.models.folder import ModelSource, check_weights, load_model_config, max_positions
from esi_ds.stages.served import ENDPOINT_KEYS, ServedModel

if TYPE_CHECKING:
    from esi_ds.eval.harness_tasks import PreparedTask

BASE = "base"
# Of eval.tasks where a model is too large for them.
WHOLE_MODEL = "lm-eval needs the whole model on every rank"
WITHOUT_TASKS = "leave eval.tasks out; lm-eval itself can measure them on a server of the model"


@dataclass(frozen=True)
class Candidate:
    """A model under evaluation, without its weights."""

    name: str  # in tables and files
    source: ModelSource
    before: str | None  # name of the model it is compared with; None for the base
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]  # tokens that end an answer
    prompt_ids: dict[tuple[str, int], list[int] | str]  # (set, index) → what ``encode_data_prompt`` returns
    unread: tuple[str, ...] = ()  # names of model.template_kwargs that its chat template does not read
    thought_marks: list[str] | None = None  # of the config
    broken_up: str = ""  # of ``broken_up_words``, in the prompts

    @property
    def path(self) -> str:
        """Folder or hub id."""
        return self.source.path

    @property
    def field(self) -> str:
        """The path's key in the config."""
        return self.source.field

    @property
    def thinks(self) -> bool:
        """Whether its chat template knows of thoughts, or the config names their marks."""
        return self.thought_marks is not None or ThoughtTemplate(self.tokenizer).thinks

    @property
    def max_positions(self) -> int | None:
        """Tokens the model takes; None if its configuration does not say."""
        return max_positions(self.config)


@dataclass(frozen=True)
class RecordedModel:
    """A model under evaluation whose answers lie in a file. Its weights are not here, nor what needs them."""

    name: str  # in tables and files
    before: str | None  # name of the model it is compared with
    recorded: RecordedAnswers
    field: str  # the file's key in the config
    thought_marks: list[str] | None = None  # of the config

    @property
    def path(self) -> str:
        """The file of answers."""
        return self.recorded.path

    @property
    def fingerprint(self) -> str:
        """The file's fingerprint, in place of the weights'."""
        return f"answers:{self.recorded.sha256}"


@dataclass(frozen=True)
class PreparedJudge:
    """A judge of the config, checked as far as possible without its weights."""

    name: str  # in tables and files
    field: str  # the section's key in the config
    section: EvalJudge


@dataclass(frozen=True)
class PreparedWords(PreparedJudge):
    """A list of refusal words."""

    section: EvalWords
    words: RefusalList


@dataclass(frozen=True)
class PreparedEndpoint(PreparedJudge):
    """A model behind an endpoint."""

    section: EvalRubric
    endpoint: Endpoint


@dataclass(frozen=True)
class PreparedModel(PreparedJudge):
    """A judge whose weights are loaded."""

    section: EvalClassifier | EvalGuard | EvalYesNo
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig


@dataclass(frozen=True)
class PreparedClassifier(PreparedModel):
    """A sequence classifier."""

    section: EvalClassifier | EvalGuard
    rule: SequenceRule


@dataclass(frozen=True)
class PreparedNextWord(PreparedModel):
    """A causal model whose next word is the verdict, or one that labels every token (``family.reads``)."""

    section: EvalGuard | EvalYesNo
    family: Family


@dataclass(frozen=True)
class EvalInputs:
    """Everything an evaluation reads, but for weights."""

    section: Eval  # ``eval`` of the config
    sets: list[QuestionSet]
    models: list[Candidate | RecordedModel | ServedModel]  # the base first
    judges: list[PreparedJudge]
    tasks: list[PreparedTask]
    source: dict[str, str]  # hashes of the prompts and of local files of tasks, for the manifest

    @property
    def candidates(self) -> list[Candidate]:
        """The models whose weights are here, the base first."""
        return [model for model in self.models if isinstance(model, Candidate)]

    @property
    def judge_sources(self) -> list[ModelSource]:
        """Where the weights of judges come from."""
        return [ModelSource.of(judge.section, judge.field) for judge in self.judges if isinstance(judge, PreparedModel)]

    @property
    def sources(self) -> list[ModelSource]:
        """Where the weights of models and judges come from."""
        return [*(model.source for model in self.candidates), *self.judge_sources]

    def thinks(self, name: str) -> bool:
        """Whether a model, or a perturbation's cell, may think: nothing is known of those elsewhere."""
        model = next((model for model in self.models if model.name == name), self.models[0])
        return model.thinks if isinstance(model, Candidate) else True

    @property
    def elsewhere(self) -> list[RecordedModel | ServedModel]:
        """The models whose weights are not here: their answers lie in files or come from endpoints."""
        return [model for model in self.models if not isinstance(model, Candidate)]

    @property
    def harmful_sets(self) -> set[str]:
        """Names of the sets whose answers are judged."""
        return {question_set.name for question_set in self.sets if question_set.kind == "harmful"}


def prepare_eval(config: Config) -> EvalInputs:
    """Read the prompts, tokenizers and judges and check them. Raises UserError. Reads only; loads no weights."""
    section = require_eval(config)
    if section.divergence and not (section.benign and any(model.path is not None for model in section.models)):
        remedy = "give eval.benign, and eval.models with a path, or leave it out"
        raise UserError("eval.divergence", True, "has nothing to compare the base with", remedy)
    refusal_list(section.refusal_words, "eval.refusal_words")
    judges = prepare_judges(section)
    sets = load_question_sets(section)
    models: list[Candidate | RecordedModel | ServedModel] = [
        _candidate(config.model, BASE, ModelSource.of(config.model), None, sets)
    ]
    for number, model in enumerate(section.models):
        field, name = f"eval.models.{number}", label(model)
        if model.path is not None:
            source = ModelSource(model.path, model.revision, config.model.trust_remote_code, f"{field}.path")
            models.append(_candidate(config.model, name, source, model.before, sets))
        elif model.answers is not None:
            file_field = f"{field}.answers"
            asked = Asked(config.model, section.max_new_tokens, section.sampling)
            recorded = load_answers(model.answers, file_field, name, sets, section.samples, asked, model.answers_of)
            models.append(RecordedModel(name, model.before, recorded, file_field, config.model.thought_marks))
        elif model.endpoint is not None:
            limit = section.max_new_tokens
            served = ServedModel.of(model.endpoint, f"{field}.endpoint", limit, config.model, name, model.before)
            models.append(served.sampled(section.sampling, config.run.seed) if section.sampling else served)
    for candidate in models:
        if isinstance(candidate, Candidate):
            _check_room(candidate, sets, section.max_new_tokens)
    data_hashes = {f"{question_set.kind}:{question_set.name}": question_set.prompt_set.sha256 for question_set in sets}
    tasks = prepare_tasks(section.tasks)
    data_hashes |= {task.field: task.sha256 for task in tasks if task.sha256 is not None}
    return EvalInputs(section, sets, models, judges, tasks, data_hashes)


def _check_room(candidate: Candidate, sets: Sequence[QuestionSet], max_new_tokens: int) -> None:
    """Raises UserError if a model can answer no prompt of a set: its rates would be of nothing."""
    for question_set in sets:
        encoded = {key: ids for key, ids in candidate.prompt_ids.items() if key[0] == question_set.name}
        results = answerable(encoded, max_new_tokens, candidate.max_positions)
        check_some_answerable(*results, KEYS[question_set.kind], question_set.name, candidate.name)


def _candidate(
    section: Model, name: str, source: ModelSource, before: str | None, sets: Sequence[QuestionSet]
) -> Candidate:
    """section: ``model`` of the config, whose chat template and system prompt every candidate uses."""
    model_config = load_model_config(source)
    check_weights(source)
    tokenizer = load_chat_tokenizer(source, section, is_base=before is None)
    check_vocabulary(tokenizer, model_config, source)
    specials = special_strings(tokenizer)
    prompt_ids = {
        (question_set.name, index): encode_data_prompt(tokenizer, prompt, specials, section.system_prompt)
        for question_set in sets
        for index, prompt in enumerate(question_set.prompts)
    }
    plain = without_values(tokenizer, section.template_kwargs, day_of(section))
    unread = tuple(unread_values(plain.chat_template, section.template_kwargs))
    return Candidate(
        name=name,
        source=source,
        before=before,
        config=model_config,
        tokenizer=tokenizer,
        end_ids=end_tokens(source, tokenizer),
        prompt_ids=prompt_ids,
        unread=unread,
        thought_marks=section.thought_marks,
        broken_up=broken_up_in((prompt for question_set in sets for prompt in question_set.prompts), specials),
    )


def prepare_judges(section: Eval) -> list[PreparedJudge]:
    """Judges in the config's order, but refusal words last: they are never the headline. Without judges: words alone.

    Raises UserError.
    """
    sections = section.judges or [EvalWords(kind="words")]
    judges = [_prepare_judge(judge, f"eval.judges.{number}") for number, judge in enumerate(sections)]
    return sorted(judges, key=lambda judge: isinstance(judge, PreparedWords))


def _prepare_judge(section: EvalJudge, field: str) -> PreparedJudge:
    name = label(section)
    if isinstance(section, EvalWords):
        return PreparedWords(name, field, section, refusal_list(section.words, f"{field}.words"))
    if isinstance(section, EvalRubric):
        return _prepare_endpoint(section, field, name)
    source = ModelSource.of(section, field)
    tokenizer = load_tokenizer(source)
    config = load_model_config(source)
    check_vocabulary(tokenizer, config, source, asks=False)
    check_weights(source)
    if isinstance(section, EvalClassifier):
        rule = SequenceRule(
            section.template, section.unsafe_labels, section.multi_label, section.threshold, section.max_length
        )
    else:
        family = _family(section, tokenizer, config, field)
        if family.reads != "labels" or isinstance(section, EvalYesNo):
            PairEncoder(family, tokenizer, field=field).check_verdict()
            return PreparedNextWord(name, field, section, tokenizer, config, family)
        rule = family_rule(family, section.threshold, section.max_length)
    read_rule(config, rule, field)
    return PreparedClassifier(name, field, section, tokenizer, config, rule)


def _prepare_endpoint(section: EvalRubric, field: str, name: str) -> PreparedEndpoint:
    if (section.prompt_price is None) != (section.completion_price is None):
        raise UserError(
            f"{field}.prompt_price", section.prompt_price, "goes with completion_price", "give both or neither"
        )
    check_template(section.template or TEMPLATE, f"{field}.template")
    is_safeguard = "gpt-oss-safeguard" in section.model.lower()
    if (is_safeguard and section.policy is None) or (section.policy is not None and not section.policy.strip()):
        problem = (
            "is empty" if section.policy is not None else f"is missing, which {section.model} reads in its system turn"
        )
        raise UserError(f"{field}.policy", section.policy, problem, "write what a reply must not hold")
    limits = section.model_dump(include=ENDPOINT_KEYS)
    return PreparedEndpoint(name, field, section, Endpoint.from_environment(section.model, f"{field}.model", **limits))


def _family(
    section: EvalGuard | EvalYesNo, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, field: str
) -> Family:
    if isinstance(section, EvalGuard):
        return choose_family(section, tokenizer, config, field)
    return yes_no_family(
        section.template,
        unsafe=section.unsafe,
        safe=section.safe,
        verdict_prefix=section.verdict_prefix,
        field=field,
    )
