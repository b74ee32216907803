"""What ESI reads, and all checks that need no weights: they come before any weight is loaded or file written."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from esi_ds.artifacts import file_sha256
from esi_ds.config import Config, EsiClassifier, EsiGuard, ModelEndpoint, Prompts
from esi_ds.config.judges import Reads
from esi_ds.config.needs import scores_given
from esi_ds.core.select import check_ratio, share_sizes
from esi_ds.data.answers import MISSING, check_unmixed, counted_responses, matched_rows
from esi_ds.data.asked import Asked
from esi_ds.data.benchmarks import Kind, source_of
from esi_ds.data.chat import (
    EncodedResponse,
    answerable,
    break_up,
    break_up_prompt,
    check_vocabulary,
    encode_data_prompt,
    encode_response,
    load_chat_tokenizer,
    load_tokenizer,
    special_strings,
)
from esi_ds.data.end_tokens import end_tokens
from esi_ds.data.goals import GOAL, has_unread_goals, recorded_goals
from esi_ds.data.prompts import PromptSet, load_responses, load_section, question_sections, recorded_scores
from esi_ds.data.rows import Row, looks_like_file
from esi_ds.data.thought_rows import ThoughtTemplate
from esi_ds.data.thoughts import (
    CHANNEL,
    MARKS,
    NO_THOUGHT,
    UNFINISHED,
    JudgedResponse,
    Marks,
    Piece,
    ResponseParts,
    Span,
    continuation,
    has_marks,
    has_thought,
    judged_response,
    mark_strings,
    marks_with,
    opening_in,
    parts,
    prompt_end,
    spans_in_text,
    unread_note,
)
from esi_ds.data.turns import Prompt
from esi_ds.errors import UserError
from esi_ds.eval.asking import asked_of
from esi_ds.judge.classifier import (
    SequenceRule,
    classifier_family,
    family_rule,
    longest_input,
    model_class,
    read_rule,
)
from esi_ds.judge.families import Family
from esi_ds.judge.guard import longest_guard_input
from esi_ds.judge.pairs import EncodedPair, PairEncoder
from esi_ds.judge.recognition import choose_family
from esi_ds.models import hub
from esi_ds.models.folder import ModelSource, check_weights, load_model_config, max_positions
from esi_ds.models.meta import meta_model, meta_parameters
from esi_ds.reading import json_sha256
from esi_ds.stages.esi.losses import LossRows, prepare_losses
from esi_ds.stages.served import ServedModel
from esi_ds.words import counted


@dataclass(frozen=True)
class PreparedEsiJudge:
    """ESI's judge, checked as far as possible without its weights. section: of the config.

    encoder: turns pairs into the ids it reads. labels: of a classifier, the indices of the unsafe labels and whether
    each label is judged by itself; None: a causal guard.
    """

    section: EsiGuard | EsiClassifier
    tokenizer: PreTrainedTokenizerBase
    family: Family
    encoder: PairEncoder
    config: PretrainedConfig
    labels: tuple[list[int], bool] | None = None


@dataclass(frozen=True)
class PromptData:
    """Prompts and responses exactly as they were read.

    responses: one per prompt; None where they are yet to come, of ``served`` or else of the model itself. scores: J of
    each response, where they come with the responses instead of from a judge. source: what was read, with its hash, for
    the manifest. skipped: (row, reason) of every row without a usable prompt. note: what of the rows is not read, for
    the log. goals: what each prompt is after, which the judge reads instead of it; None where a row, or all of them,
    has none. unanswered: index → why the file of responses has none; remarks: how it fits the prompts, for the report.
    """

    prompts: list[Prompt]
    responses: list[str] | None
    source: dict[str, str]
    skipped: list[tuple[int, str]]
    scores: list[float] | None = None
    note: str = ""
    served: ServedModel | None = None
    goals: Sequence[str | None] | None = None
    unanswered: Mapping[int, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def are_generated(self) -> bool:
        """Whether the model itself generates the responses."""
        return self.responses is None and self.served is None

    @property
    def origin(self) -> str:
        """Where prompts and responses come from, for people."""
        if "prompts" not in self.source:
            return self.source["responses"]
        answered = f", answered by {self.source['responses']}" if "responses" in self.source else ""
        beside = f", read with {self.source['also_read']}" if "also_read" in self.source else ""
        return f"{self.source['prompts']} (column {self.source['column']}{beside}){answered}"


@dataclass(frozen=True)
class PromptInputs:
    """Prompts, and what turns them into ids of the model and of the judge.

    end_ids: tokens that end a response. judge: None where the scores come with the responses. specials: strings of
    special tokens, of both tokenizers. benign_prompts: those of ``eval.benign``, for the routing frequencies of a
    mixture. marks: of thoughts. reads: what the judge reads of a response. trace_gradient: of the config. name: of the
    objective.
    """

    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    judge: PreparedEsiJudge | None
    data: PromptData
    specials: tuple[str, ...]
    benign_prompts: tuple[Prompt, ...] = ()
    marks: Marks = MARKS
    reads: Reads = "answer"
    trace_gradient: bool = False
    name: Literal["safety", "control"] = "safety"

    @cached_property
    def thought_template(self) -> ThoughtTemplate:
        """What the model's chat template does with thoughts."""
        return ThoughtTemplate(self.tokenizer, self.marks)

    @cached_property
    def before_answer(self) -> str:
        """What stands between a prompt and an answer without a thought."""
        return self.thought_template.before_answer()

    @property
    def prefix(self) -> str:
        """What begins the names of files, metrics and batch sizes that both objectives have."""
        return "" if self.name == "safety" else f"{self.name}_"

    @property
    def field(self) -> str:
        """The config key that names the prompts."""
        return "data" if self.name == "safety" else "control.prompts"


@dataclass(frozen=True)
class Example:
    """One usable prompt and response: the model's ids, the response's offsets in the text that is judged, and the
    judge's input (None where no judge is asked).

    muted: positions in ``response.ids`` of tokens of thoughts that no gradient reaches (``esi.trace_gradient``).
    """

    index: int
    prompt_ids: list[int]
    response: EncodedResponse
    guard_input: EncodedPair | None
    muted: tuple[int, ...] = ()

    @property
    def ids(self) -> list[int]:
        """Prompt and response as the model reads them."""
        return self.prompt_ids + self.response.ids

    @property
    def judged(self) -> EncodedPair:
        """The judge's input, in a run that has a judge."""
        assert self.guard_input is not None
        return self.guard_input


def prepare_prompts(config: Config) -> list[PromptInputs]:
    """Read prompts and tokenizers and check them against each other: of every objective that is a judge's score.

    Raises UserError. Reads only; loads no weights.
    """
    source = ModelSource.of(config.model)
    model_config = load_model_config(source)
    check_weights(source)
    # Report an invalid role, or a ratio that selects nothing, now and not once everything is scored.
    parameters = meta_parameters(model_config, source, config.model.roles, config.model.dtype)
    check_ratio(config.select.ratio, share_sizes(parameters, config.select.of, config.select.scope), "select.ratio")
    if not config.scores_responses:
        return []
    tokenizer = load_chat_tokenizer(source, config.model)
    check_vocabulary(tokenizer, model_config, source)
    judge = prepare_judge(config.judge, config.esi.batch_size == 1) if config.judge is not None else None
    specials = special_strings(tokenizer, *([judge.tokenizer] if judge else []))

    def inputs(name: Literal["safety", "control"], data: PromptData) -> PromptInputs:
        return PromptInputs(
            model_config=model_config,
            tokenizer=tokenizer,
            end_ids=end_tokens(source, tokenizer),
            judge=judge,
            data=data,
            specials=specials,
            benign_prompts=_benign_prompts(config) if name == "safety" else (),
            marks=marks_with(config.model.thought_marks),
            reads=config.judge.reads if config.judge is not None else "answer",
            trace_gradient=config.esi.trace_gradient,
            name=name,
        )

    all_inputs = [inputs("safety", _read_data(config))] if "safety" in config.objectives else []
    if config.control is not None and config.control.prompts is not None:
        data = _asked_data(config, config.control.prompts, "control.prompts", "benign")
        all_inputs.append(inputs("control", data))
    return all_inputs


def _benign_prompts(config: Config) -> tuple[Prompt, ...]:
    sets = question_sections(config.eval) if config.eval is not None else ()
    return tuple(
        prompt
        for field, kind, _, section in sets
        if kind == "benign"
        for prompt in load_section(section, field, kind).prompts
    )


def prepare_judge(section: EsiGuard | EsiClassifier, one_by_one: bool) -> PreparedEsiJudge:
    """The judge without its weights. Raises UserError where it cannot be asked, or only ``one_by_one``."""
    source = ModelSource.of(section, "judge")
    tokenizer = load_tokenizer(source)
    judge_config = load_model_config(source)
    check_vocabulary(tokenizer, judge_config, source, asks=False)
    check_weights(source)
    if isinstance(section, EsiClassifier):
        rule = SequenceRule(section.template, section.unsafe_labels, section.multi_label)
        return _prepare_classifier(
            section, classifier_family(section.template), rule, tokenizer, judge_config, one_by_one
        )
    family = choose_family(section, tokenizer, judge_config)
    if family.reads == "labels":
        return _prepare_classifier(section, family, family_rule(family), tokenizer, judge_config, one_by_one)
    encoder = PairEncoder(family, tokenizer, context=section.context, max_length=longest_guard_input(judge_config))
    encoder.check_verdict()
    return PreparedEsiJudge(section, tokenizer, family, encoder, judge_config)


def _prepare_classifier(
    section: EsiGuard | EsiClassifier,
    family: Family,
    rule: SequenceRule,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    one_by_one: bool,
) -> PreparedEsiJudge:
    labels = read_rule(config, rule, "judge")
    if config.get_text_config().pad_token_id is None and not one_by_one:
        raise UserError(
            "judge.path",
            section.path,
            "has no padding token, so that answers of different lengths cannot be judged together",
            "set esi.batch_size: 1, or pad_token_id in its config.json",
        )
    model = meta_model(config, ModelSource.of(section, "judge"), model_class(section, config))
    context = section.context if isinstance(section, EsiGuard) else "prompt_and_response"
    limit = longest_input(model, tokenizer, rule.max_length)
    encoder = PairEncoder(family, tokenizer, context=context, max_length=limit)
    return PreparedEsiJudge(section, tokenizer, family, encoder, config, labels)


def _read_data(config: Config) -> PromptData:
    """The prompts of the safety objective: ``data.prompts``, which the file ``data.responses`` answers, the endpoint of
    that name, or the model; without ``data.prompts`` all that the file answers."""
    section, path = config.data.prompts, config.data.responses
    if not isinstance(path, str):
        assert section is not None  # require_esi has seen to it
        return _asked_data(config, section, "data.prompts")
    rows = load_responses(path)
    check_unmixed(rows, path, are_matched=section is not None)
    scores = recorded_scores(rows, path) if scores_given(config) else None
    responses = counted_responses(rows, path, config.model.thought_marks)
    asked = Asked(config.model, config.esi.max_new_tokens)
    asked.check_system_prompt(rows, path)
    asked.check_template(rows, path)
    otherwise, unrecorded = asked.differences(rows), asked.unrecorded(rows)
    problems = [f"were asked for with other settings: {otherwise}"] if otherwise else []
    problems += [unrecorded] if unrecorded else []
    if has_unread_goals(rows) and (section is None or (section.goal is None and section.behaviors is None)):
        problems.append(f"have goals that are not read: give data.prompts with goal: {GOAL}")
    source, goals = {"responses": path, "sha256": file_sha256(Path(path).expanduser())}, recorded_goals(rows)
    prompts, remarks = [row["prompt"] for row in rows], tuple(f"responses of {path} {what}" for what in problems)
    answered = PromptData(prompts, responses, source, [], scores, goals=goals, remarks=remarks)
    return answered if section is None else _matched_data(section, rows, answered)


def _matched_data(section: Prompts, rows: Sequence[Row], answered: PromptData) -> PromptData:
    """The prompts of ``data.prompts`` with what a file of responses has of each; the file's own prompts, and a remark,
    where it answers none of them or the hub does not provide them. rows, answered: of the whole file."""
    path, texts, scores, goals = answered.source["responses"], answered.responses or [], answered.scores, answered.goals
    source = source_of(section.path)
    is_file = looks_like_file(source)
    try:
        if not is_file:
            hub.check_exists(source, "dataset", "data.prompts.path")
        read = load_section(section, "data.prompts")
    except UserError as error:
        if is_file or error.field != "data.prompts.path":  # a slip: no such file, or no such column
            raise
        return _own_prompts(section, rows, answered, f"data.prompts = {section.path} cannot be read ({error.problem})")
    pairs, num_unused = matched_rows(read.prompts, rows, path)
    if all(number is None for _, number in pairs):
        return _own_prompts(section, rows, answered, f"{path} answers none of the prompts of data.prompts")
    indices, numbers = [index for index, _ in pairs], [number for _, number in pairs]
    unanswered = {prompt_number: MISSING for prompt_number, number in enumerate(numbers) if number is None}
    remarks = [*answered.remarks]
    if num_unused:
        remarks.append(
            f"not scored: {counted(num_unused, 'row')} of {path} with prompts that data.prompts does not have"
        )
    if unanswered:
        remarks.append(f"excluded: {counted(len(unanswered), 'prompt')} of data.prompts without a response in {path}")
    return PromptData(
        [read.prompts[index] for index in indices],
        ["" if number is None else texts[number] for number in numbers],
        {**_source(read), "responses": path, "responses_sha256": answered.source["sha256"]},
        list(read.skipped),
        None if scores is None else [math.nan if number is None else scores[number] for number in numbers],
        read.note,
        goals=_goals_of(read, goals, pairs),
        unanswered=unanswered,
        remarks=tuple(remarks),
    )


def _own_prompts(section: Prompts, rows: Sequence[Row], answered: PromptData, reason: str) -> PromptData:
    """The first ``data.prompts.limit`` rows of a file of responses with its own prompts."""
    path, first = answered.source["responses"], slice(section.limit)
    check_unmixed(rows, path, are_matched=False)
    return replace(
        answered,
        prompts=answered.prompts[first],
        responses=(answered.responses or [])[first],
        scores=answered.scores and answered.scores[first],
        goals=answered.goals and answered.goals[first],
        remarks=(*answered.remarks, f"{reason}: the file's own are scored ({counted(len(rows[first]), 'row')})"),
    )


def _goals_of(
    read: PromptSet, recorded: Sequence[str | None] | None, pairs: Sequence[tuple[int, int | None]]
) -> list[str | None] | None:
    """The goal of each response's prompt: that of ``data.prompts``, else the one in the response's row."""
    if read.goals:
        return [read.goals[index] for index, _ in pairs]
    return None if recorded is None else [None if number is None else recorded[number] for _, number in pairs]


def asked_with(config: Config, data: PromptData) -> dict[str, Any]:
    """What besides the prompt decided the responses, for their rows."""
    if data.served is not None:
        return asked_of(data.served.endpoint, data.served.system_prompt)
    return Asked(config.model, config.esi.max_new_tokens if data.are_generated else None).as_row()


def _source(read: PromptSet) -> dict[str, str]:
    """What the manifest says of prompts."""
    beside = {"also_read": ", ".join(read.also_read)} if read.also_read else {}
    return {"prompts": read.source, "column": read.column, **beside, "sha256": read.sha256}


def _asked_data(config: Config, section: Prompts, field: str, kind: Kind | None = None) -> PromptData:
    """Prompts that the model answers, or the endpoint ``data.responses``. kind: of the rows that are taken."""
    read, path = load_section(section, field, kind), config.data.responses
    source = _source(read)
    served = None
    if isinstance(path, ModelEndpoint):
        served = ServedModel.of(path, "data.responses", config.esi.max_new_tokens, config.model)
        source["responses"] = served.fingerprint
    goals = list[str | None](read.goals) or None
    return PromptData(list(read.prompts), None, source, list(read.skipped), None, read.note, served, goals)


def clean(inputs: PromptInputs, prompts: Sequence[Prompt]) -> tuple[list[Prompt], int]:
    """Prompts with special-token strings broken up, and how many there were."""
    pairs = [break_up_prompt(prompt, inputs.specials) for prompt in prompts]
    return [prompt for prompt, _ in pairs], sum(count for _, count in pairs)


@dataclass(frozen=True)
class CleanResponse:
    """A response with special-token strings broken up. parts: its thoughts and its answer, characters of ``text``.
    read: what the judge reads; None: the response ends within a thought. lead: text between the prompt and it."""

    text: str
    parts: ResponseParts
    read: JudgedResponse | None
    lead: str = ""

    @property
    def answer(self) -> list[Span] | None:
        """The characters of the answer; None: the response ends within a thought."""
        return self.parts.answer


def clean_responses(
    inputs: PromptInputs, prompt_ids: Sequence[list[int] | str], responses: Sequence[str]
) -> tuple[list[CleanResponse], int]:
    """The responses to prompts, and how many special-token strings were broken up.

    prompt_ids: of each prompt, or why it has none. Marks of thoughts stay whole outside of what the judge reads: the
    model must read its thought as it wrote it. Responses from a file or an endpoint may come without their thoughts,
    or with the mark that the prompt ends with, which is left out. Those to gpt-oss may come without their channel.
    """
    cleaned, total = list[CleanResponse](), 0
    for ids, response in zip(prompt_ids, responses, strict=True):
        prompt = "" if isinstance(ids, str) else prompt_end(inputs.tokenizer, ids)
        opening, text, lead = opening_in(prompt, inputs.marks), response, ""
        if not inputs.data.are_generated:
            text = continuation(response, prompt, inputs.marks)
            if text == response and (opening is not None or CHANNEL in inputs.before_answer):
                opening = None
                lead = "" if has_marks(response, inputs.marks) else inputs.before_answer
        clean, count = _clean_response(text, parts(text, opening, inputs.marks), inputs)
        cleaned.append(replace(clean, lead=lead))
        total += count
    return cleaned, total


def _clean_response(response: str, response_parts: ResponseParts, inputs: PromptInputs) -> tuple[CleanResponse, int]:
    specials = inputs.specials
    if response_parts.answer is None:
        text, total = break_up(response, specials)
        return CleanResponse(text, response_parts, None), total
    marks = mark_strings(specials, inputs.marks)
    outside = [special for special in specials if special not in marks]
    spans = sorted([(span, False) for span in response_parts.answer] + [(span, True) for span in response_parts.trace])
    moved: dict[bool, list[Span]] = {False: [], True: []}
    text, total, position = "", 0, 0
    for (start, end), is_trace in [*spans, ((len(response), len(response)), None)]:
        before, num_before = break_up(response[position:start], outside)
        part, num_in_part = break_up(
            response[start:end], outside if is_trace and inputs.reads == "answer" else specials
        )
        text, total, position = text + before + part, total + num_before + num_in_part, end
        if is_trace is not None:
            moved[is_trace].append((len(text) - len(part), len(text)))
    clean = ResponseParts(moved[True], moved[False])
    return CleanResponse(text, clean, judged_response(text, clean, inputs.reads)), total


def thoughts_note(inputs: PromptInputs, responses: Sequence[CleanResponse]) -> str | None:
    """``unread_note`` of the responses to harmful prompts."""
    if inputs.judge is None or inputs.reads != "answer" or inputs.name != "safety":
        return None
    thinks = inputs.marks != MARKS or inputs.thought_template.thinks
    finished = [response for response in responses if response.read is not None and response.text]
    return unread_note([has_thought(response.text, response.parts) for response in finished], "responses", thinks)


def encode_prompts(inputs: PromptInputs, config: Config, prompts: Sequence[Prompt]) -> list[list[int] | str]:
    """Ids of each prompt in the chat template, up to where the response begins, or why it has none."""
    return [encode_data_prompt(inputs.tokenizer, prompt, (), config.model.system_prompt) for prompt in prompts]


def encode_examples(
    inputs: PromptInputs,
    prompt_ids: Sequence[list[int] | str],
    prompts: Sequence[Prompt],
    responses: Sequence[CleanResponse],
    max_new_tokens: int,
    goals: Sequence[str | None] | None = None,
) -> tuple[list[Example], dict[int, str]]:
    """Usable pairs in order, and index → reason of every pair that cannot be used. goals: as of ``PromptData``."""
    limit = max_positions(inputs.model_config)
    judge = inputs.judge
    examples: list[Example] = []
    room = max_new_tokens if inputs.data.are_generated else 0
    readable, excluded = answerable(dict(enumerate(prompt_ids)), room, limit)
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if index in excluded:
            continue
        ids = readable[index]
        if response.lead:
            ids = ids + encode_response(inputs.tokenizer, ids, response.lead).ids
        encoded = encode_response(inputs.tokenizer, ids, response.text)
        if response.read is None and (judge is not None or not inputs.trace_gradient):
            excluded[index] = UNFINISHED
            continue
        read = response.read or JudgedResponse(response.text, [Piece(0, len(response.text), 0, False)])
        # The model's tokens outside of these pieces have no characters in what is judged, and no part in its gradient.
        pieces = read.pieces if inputs.trace_gradient else [piece for piece in read.pieces if not piece.is_trace]
        if not any(response.text[piece.start : piece.end].strip() for piece in pieces) or not encoded.ids:
            excluded[index] = NO_THOUGHT if inputs.reads == "trace" and encoded.ids else "the response is empty"
            continue
        if limit is not None and len(ids) + len(encoded.ids) > limit:
            excluded[index] = f"too long for the model ({len(ids) + len(encoded.ids)} tokens, it takes {limit})"
            continue
        goal = goals[index] if goals is not None else None
        asked = prompt if goal is None else break_up(goal, inputs.specials)[0]
        guard_input = judge.encoder.encode(asked, read.text, attack=prompt) if judge is not None else None
        if isinstance(guard_input, str):
            excluded[index] = guard_input
            continue
        if guard_input is not None and not guard_input.response_tokens:
            excluded[index] = "the judge sees no token of the response"
            continue
        offsets = spans_in_text(encoded.offsets, pieces)
        outside = [] if inputs.trace_gradient else _outside_answer(encoded.offsets, response.parts)
        examples.append(Example(index, ids, EncodedResponse(encoded.ids, offsets), guard_input, tuple(outside)))
    return examples, excluded


def _outside_answer(spans: Sequence[Span], response_parts: ResponseParts) -> list[int]:
    """Which tokens, by their spans in the response, lie outside of its answer; none where nothing else is there."""
    answer = response_parts.answer or []
    if not response_parts.trace:
        return []
    starts = [start for start, _ in answer]
    outside = []
    for number, (start, end) in enumerate(spans):
        last = bisect_left(starts, max(end, start + 1)) - 1  # the last part that begins before the token ends
        if last < 0 or answer[last][1] <= start:
            outside.append(number)
    return outside


@dataclass(frozen=True)
class EsiInputs:
    """What a run of ESI reads.

    prompts: those of the objectives that are a judge's score, none for criteria that need no judge. losses: the rows of
    the other objectives. Both in the order of their passes.
    """

    prompts: list[PromptInputs]
    losses: list[LossRows]

    @property
    def judge(self) -> PreparedEsiJudge | None:
        """The judge of all responses; None where none is asked."""
        return self.prompts[0].judge if self.prompts else None

    @property
    def served(self) -> ServedModel | None:
        """The server that answers prompts, if one does."""
        return next((inputs.data.served for inputs in self.prompts if inputs.data.served is not None), None)

    @property
    def source(self) -> dict[str, Any]:
        """Paths and hashes, for the manifest."""
        source: dict[str, Any] = {}
        for inputs in self.prompts:
            source |= {f"{inputs.prefix}{key}": value for key, value in inputs.data.source.items()}
            if inputs.benign_prompts:
                source["benign_prompts_sha256"] = json_sha256({"prompts": list(inputs.benign_prompts)})
        for loss in self.losses:
            source |= loss.source
        return source


def prepare(config: Config) -> EsiInputs:
    """Everything that the stage reads, except weights. Raises UserError. Reads only."""
    return EsiInputs(prepare_prompts(config), prepare_losses(config))
