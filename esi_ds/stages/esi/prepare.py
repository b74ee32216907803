"""Everything about a run that can be known, and refused, before a weight is loaded or a file written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from esi_ds.artifacts import file_sha256
from esi_ds.config import Config, EsiClassifier, scores_given
from esi_ds.core.criteria import objectives
from esi_ds.data.chat import (
    EncodedResponse,
    break_up,
    encode_prompt,
    encode_response,
    load_chat_tokenizer,
    load_tokenizer,
    special_strings,
)
from esi_ds.data.prompts import PromptSet, load_prompts, load_responses, recorded_scores
from esi_ds.errors import UserError
from esi_ds.judge.classifier import SequenceRule, classifier_family, longest_input, model_class, read_rule
from esi_ds.judge.families import Family, choose_family
from esi_ds.judge.pairs import EncodedPair, PairEncoder
from esi_ds.models.folder import ModelSource, check_weights, load_model_config, max_positions
from esi_ds.models.meta import meta_model, meta_parameters
from esi_ds.stages.esi.losses import LossRows, prepare_losses


@dataclass(frozen=True)
class PreparedEsiJudge:
    """ESI's judge, checked as far as that goes without its weights.

    encoder: turns pairs into the ids it reads. labels: of a classifier, the indices of the unsafe ones and whether
    labels are judged one by one; None: a causal guard.
    """

    tokenizer: PreTrainedTokenizerBase
    family: Family
    encoder: PairEncoder
    config: PretrainedConfig
    labels: tuple[list[int], bool] | None = None


@dataclass(frozen=True)
class Inputs:
    """Prompts, and what is needed to turn them into the model's and the judge's ids.

    prompts, given_responses: texts as they were given (responses None: to be generated). given_scores: J of each,
    where they come with the responses and ``judge`` is None. benign_prompts: of ``eval.benign``, for a mixture's
    routing frequencies.
    """

    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    judge: PreparedEsiJudge | None
    prompts: list[str]
    given_responses: list[str] | None
    source: dict[str, str]
    skipped: list[tuple[int, str]]
    given_scores: list[float] | None
    specials: tuple[str, ...]
    benign_prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """One usable pair: the model's ids, the response's offsets in its own text, and the judge's input (None: no judge
    is asked)."""

    index: int
    prompt_ids: list[int]
    response: EncodedResponse
    guard_input: EncodedPair | None


def prepare_prompts(config: Config) -> Inputs | None:
    """Read prompts and tokenizers and check them against each other. None where the criterion asks no judge.

    Raises UserError. Reads only; loads no weights.
    """
    source = ModelSource.of(config.model)
    model_config = load_model_config(source)
    check_weights(source)
    if config.model.roles:
        meta_parameters(model_config, source, config.model.roles)  # refuses an invalid role now
    if "safety" not in objectives(config.select.criterion, config.select.contrastive):
        return None
    tokenizer = load_chat_tokenizer(source, config.model)
    judge = prepare_judge(config) if config.judge is not None else None
    specials = special_strings(tokenizer, *([judge.tokenizer] if judge else []))
    return Inputs(model_config, tokenizer, judge, *_read_data(config), specials, _benign_prompts(config))


def _benign_prompts(config: Config) -> tuple[str, ...]:
    found: list[str] = []
    for number, section in enumerate(config.eval.benign if config.eval is not None else ()):
        field = f"eval.benign.{number}"
        found += load_prompts(
            section.path, section.split, section.column, section.limit, kind="benign", field=field
        ).prompts
    return tuple(found)


def prepare_judge(config: Config) -> PreparedEsiJudge:
    section = config.judge
    source = ModelSource.of(section, "judge")
    tokenizer = load_tokenizer(source)
    judge_config = load_model_config(source)
    check_weights(source)
    if isinstance(section, EsiClassifier):
        return _prepare_classifier(section, tokenizer, judge_config, config.esi.batch_size)
    family = choose_family(section, tokenizer)
    encoder = PairEncoder(family, tokenizer, context=section.context, max_length=max_positions(judge_config))
    encoder.check_verdict()
    return PreparedEsiJudge(tokenizer, family, encoder, judge_config)


def _prepare_classifier(
    section: EsiClassifier, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, batch_size: int
) -> PreparedEsiJudge:
    family = classifier_family(section.template)
    labels = read_rule(config, SequenceRule(section.template, section.unsafe_labels, section.multi_label), "judge")
    if config.get_text_config().pad_token_id is None and batch_size > 1:
        raise UserError(
            "judge.path",
            section.path,
            "has no padding token, so that its answers of unlike length cannot be judged together",
            "set esi.batch_size: 1, or pad_token_id in its config.json",
        )
    model = meta_model(config, ModelSource.of(section, "judge"), model_class(section))
    encoder = PairEncoder(family, tokenizer, max_length=longest_input(model, tokenizer, None))
    return PreparedEsiJudge(tokenizer, family, encoder, config, labels)


def _read_data(
    config: Config,
) -> tuple[list[str], list[str] | None, dict[str, str], list[tuple[int, str]], list[float] | None]:
    """Prompts, responses if given, what they were read from, rows that were skipped, and the responses' scores where
    no judge is asked. Responses bring their own prompts along; ``data.prompts`` then only limits their number."""
    limit = config.data.prompts.limit if config.data.prompts is not None else None
    if config.data.responses is not None:
        rows = load_responses(config.data.responses)[:limit]
        source = {"responses": config.data.responses, "sha256": file_sha256(Path(config.data.responses))}
        scores = recorded_scores(rows, config.data.responses) if scores_given(config) else None
        return [row["prompt"] for row in rows], [row["response"] for row in rows], source, [], scores
    section = config.data.prompts
    found: PromptSet = load_prompts(section.path, section.split, section.column, limit)
    source = {"prompts": found.source, "column": found.column, "sha256": found.sha256}
    return list(found.prompts), None, source, list(found.skipped), None


def clean(inputs: Inputs, texts: Sequence[str]) -> tuple[list[str], int]:
    """Texts with special-token strings broken up, and how many there were."""
    pairs = [break_up(text, inputs.specials) for text in texts]
    return [text for text, _ in pairs], sum(count for _, count in pairs)


def encode_prompts(inputs: Inputs, config: Config, prompts: Sequence[str]) -> list[list[int]]:
    return [encode_prompt(inputs.tokenizer, prompt, config.model.system_prompt) for prompt in prompts]


def encode_examples(
    inputs: Inputs,
    prompt_ids: Sequence[list[int]],
    prompts: Sequence[str],
    responses: Sequence[str],
    max_new_tokens: int,
) -> tuple[list[Example], dict[int, str]]:
    """Usable pairs in order, and index → reason of every pair that cannot be used."""
    limit = max_positions(inputs.model_config)
    judge = inputs.judge
    examples, excluded = [], {}
    for index, (ids, prompt, response) in enumerate(zip(prompt_ids, prompts, responses, strict=True)):
        encoded = encode_response(inputs.tokenizer, response)
        if inputs.given_responses is None and limit is not None and len(ids) + max_new_tokens > limit:
            excluded[index] = f"no room for a response ({len(ids)} + {max_new_tokens} tokens, the model takes {limit})"
            continue
        if not response.strip() or not encoded.ids:
            excluded[index] = "the response is empty"
            continue
        if limit is not None and len(ids) + len(encoded.ids) > limit:
            excluded[index] = f"too long for the model ({len(ids) + len(encoded.ids)} tokens, it takes {limit})"
            continue
        guard_input = judge.encoder.encode(prompt, response) if judge is not None else None
        if isinstance(guard_input, str):
            excluded[index] = guard_input
            continue
        if guard_input is not None and not guard_input.response_tokens:
            excluded[index] = "the judge sees no token of the response"
            continue
        examples.append(Example(index, ids, encoded, guard_input))
    return examples, excluded


@dataclass(frozen=True)
class EsiInputs:
    """What a run of ESI reads.

    prompts: None for criteria that ask no judge; losses: the rows of the criterion's further objectives, in the order
    of their passes.
    """

    prompts: Inputs | None
    losses: list[LossRows]

    @property
    def source(self) -> dict[str, Any]:
        """Paths and hashes, for the manifest."""
        source: dict[str, Any] = dict(self.prompts.source) if self.prompts else {}
        for loss in self.losses:
            source |= loss.source
        return source


def prepare(config: Config) -> EsiInputs:
    """Everything the stage reads but weights. Raises UserError; reads only."""
    return EsiInputs(prepare_prompts(config), prepare_losses(config))
