"""Everything about a tuning run that can be known, and refused, before a weight is loaded or a file written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from esi_ds.config import Config, Eval, Model, Tune
from esi_ds.config.needs import require_tune
from esi_ds.core.mask import NO_MASK, EmptyMask, Mask, load_mask
from esi_ds.core.trained import Trained
from esi_ds.core.units import Parameter
from esi_ds.data.chat import (
    answerable,
    broken_up_in,
    check_some_answerable,
    encode_data_prompt,
    special_strings,
)
from esi_ds.data.conversations import TuningSet
from esi_ds.data.end_tokens import end_tokens
from esi_ds.data.prompts import KEYS, QuestionSet, load_question_sets
from esi_ds.data.turns import Prompt
from esi_ds.errors import UserError
from esi_ds.models.fingerprint import check_mask_structure
from esi_ds.models.folder import ModelSource, check_weights, load_model_config, max_positions
from esi_ds.models.meta import meta_parameters
from esi_ds.models.roles import correction_biases, router_names, tower_names
from esi_ds.patch import check_names
from esi_ds.stages.learnt_rows import check_ends, load_training_tokenizer, read_tuning_set

TRAIN = {"set": "selected", "spa": "complement"}


@dataclass(frozen=True, kw_only=True)
class TuningInputs:
    """Everything one run of SET or SPA reads, but for the weights."""

    stage: str  # set or spa
    tune: Tune  # the config's section
    eval: Eval | None  # the config's section; None: there are no questions
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]  # tokens that end a turn
    mask: Mask
    trained: Trained  # which weights train
    rows: TuningSet  # the rows to learn
    benign: TuningSet | None  # rows mixed in; None if there are none
    questions: dict[str, list[Prompt]]  # harmful and benign → prompts to answer before and after tuning
    question_ids: dict[str, dict[int, list[int]]]  # by index, those that can be answered, as the model reads them
    unanswered: list[tuple[str, int, str]]  # (harmful or benign, index, reason) of the others
    source: dict[str, Any]  # paths, columns and hashes of the rows, for the manifest
    broken_up: str = ""  # of ``broken_up_words``, in the questions


def prepare_tuning(config: Config, stage: str) -> TuningInputs:
    """Read mask, rows and tokenizer and check them against each other. Raises UserError; reads only."""
    model, tune = config.model, require_tune(config)
    source = ModelSource.of(model)
    model_config = load_model_config(source)
    check_weights(source)
    mask = open_mask(config.model, tune, stage, model_config)
    trained = describe_trained(config.model, tune, stage, mask, model_config)
    if tune.patch:
        check_names(source, model_config)
    tokenizer = load_training_tokenizer(model, model_config)
    longest = tune.max_length
    check_ends(config, tune.data, "tune.data", tokenizer)
    rows = read_tuning_set(config, tune.data, "tune.data", tokenizer, model_config, longest, tune.data.limit)
    data_facts = {"rows": tune.data.path, "sha256": rows.sha256, "columns": rows.columns}
    benign = None
    if tune.data.benign is not None and tune.data.benign.fraction > 0:
        check_ends(config, tune.data.benign, "tune.data.benign", tokenizer)
        benign = read_tuning_set(config, tune.data.benign, "tune.data.benign", tokenizer, model_config, longest)
        data_facts |= {
            "benign": tune.data.benign.path,
            "benign_sha256": benign.sha256,
            "benign_columns": benign.columns,
        }
    sets = load_question_sets(config.eval) if config.eval is not None else []
    data_facts |= {f"{question_set.kind}:{question_set.name}": question_set.prompt_set.sha256 for question_set in sets}
    questions = _questions(sets)
    question_ids, unanswered = _encode_questions(config, questions, tokenizer, max_positions(model_config))
    return TuningInputs(
        stage=stage,
        tune=tune,
        eval=config.eval,
        model_config=model_config,
        tokenizer=tokenizer,
        end_ids=end_tokens(source, tokenizer),
        mask=mask,
        trained=trained,
        rows=rows,
        benign=benign,
        questions=questions,
        question_ids=question_ids,
        unanswered=unanswered,
        source=data_facts,
        broken_up=broken_up_in(chain.from_iterable(questions.values()), special_strings(tokenizer)),
    )


def open_mask(model: Model, tune: Tune, stage: str, model_config: PretrainedConfig) -> Mask:
    """The mask that ``tune.mask`` names, or for SPA that of no weight. Raises UserError."""
    if tune.mask != NO_MASK:
        return load_mask(tune.mask)
    if stage == "set":
        problem = "selects nothing, and SET trains what a mask selects"
        raise UserError("tune.mask", tune.mask, problem, "give a mask; the baseline without one is SPA's")
    return EmptyMask(meta_parameters(model_config, ModelSource.of(model), model.roles, model.dtype))


def describe_trained(model: Model, tune: Tune, stage: str, mask: Mask, model_config: PretrainedConfig) -> Trained:
    """Which weights would train, from the model's configuration alone.

    Raises UserError if the mask is for another architecture, or if nothing would train.
    """
    parameters = meta_parameters(model_config, ModelSource.of(model), model.roles, model.dtype)
    check_mask_structure(mask, parameters, "tune.mask")
    shapes = {parameter.name: parameter.shape for parameter in parameters}
    routers, towers = check_routers(tune, parameters), tower_names(parameters)
    biases = correction_biases(parameters)
    trained = Trained(mask, TRAIN[stage], tune.unscored, shapes, routers, tune.router, towers, biases)
    if trained.total == 0:
        problem = "selects nothing" if stage == "set" else "selects every scored weight"
        raise UserError("tune.mask", str(mask.path), f"{problem}: nothing would train", "give another mask")
    return trained


def check_routers(tune: Tune, parameters: Sequence[Parameter]) -> list[str]:
    """Names of the routers' parameters. Raises UserError if ``tune.router`` is set and the model has no routers."""
    names, router = router_names(parameters), tune.router
    if router is not None and not names:
        raise UserError("tune.router", router, "is about routers, but this model has none", "leave it out")
    return names


def _encode_questions(
    config: Config, questions: dict[str, list[Prompt]], tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> tuple[dict[str, dict[int, list[int]]], list[tuple[str, int, str]]]:
    """``question_ids`` and ``unanswered`` of ``TuningInputs``. limit: tokens the model takes."""
    question_ids: dict[str, dict[int, list[int]]] = {}
    unanswered: list[tuple[str, int, str]] = []
    length = config.eval.max_new_tokens if config.eval is not None else 0
    specials, system_prompt = special_strings(tokenizer), config.model.system_prompt
    for kind, prompts in questions.items():
        encoded = {
            index: encode_data_prompt(tokenizer, prompt, specials, system_prompt)
            for index, prompt in enumerate(prompts)
        }
        question_ids[kind], reasons = answerable(encoded, length, limit)
        check_some_answerable(question_ids[kind], reasons, KEYS[kind], None, "the model")
        unanswered += [(kind, index, reason) for index, reason in reasons.items()]
    return question_ids, unanswered


def _questions(sets: Sequence[QuestionSet]) -> dict[str, list[Prompt]]:
    """Prompts of ``eval.prompts`` (harmful) and ``eval.benign`` (benign), all sets of a kind as one."""
    questions: dict[str, list[Prompt]] = {}
    for question_set in sets:
        questions.setdefault(question_set.kind, []).extend(question_set.prompts)
    return questions
