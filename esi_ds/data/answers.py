"""Answers that another engine gave, read from a file and matched to the prompts of an evaluation.

Three formats: ``answers.jsonl`` as an evaluation writes it, rows of {"prompt", "response"}, and HarmBench's completions
({behavior_id: [{"test_case", "generation"}]}, github.com/centerforaisafety/HarmBench, ``generate_completions.py``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from esi_ds.artifacts import file_sha256
from esi_ds.data.asked import Asked
from esi_ds.data.columns import yes_or_no
from esi_ds.data.prompts import QuestionSet, load_responses
from esi_ds.data.rows import Row
from esi_ds.data.thoughts import UNFINISHED, cut_within, final_answer, marks_with
from esi_ds.data.turns import Prompt
from esi_ds.errors import UserError
from esi_ds.reading import is_text

Key = tuple[str, int] | tuple[str, int, int]  # name of a set, index of a prompt in it and, of several, which answer
MISSING = "the file of answers has none for this prompt"
SCORE_ALL = "set data.prompts: null to score every row"


@dataclass(frozen=True)
class RecordedAnswer:
    """An answer from a file. response: None if the row has none; excluded: why it does not count, None if it does."""

    response: str | None
    excluded: str | None
    is_cut: bool = False  # whether the engine stopped it at its longest length


@dataclass(frozen=True)
class RecordedAnswers:
    """One model's answers from a file.

    answers: those to the prompts of the sets. num_unused: rows that answer other prompts. differences: how they were
    asked for differently than this run asks (``Asked.differences``). unrecorded: what they do not record of that
    (``Asked.unrecorded``).
    """

    path: str
    sha256: str
    answers: dict[Key, RecordedAnswer]
    num_unused: int
    differences: str = ""
    unrecorded: str = ""


def load_answers(
    path: str,
    field: str,
    model: str,
    sets: Sequence[QuestionSet],
    samples: int = 1,
    asked: Asked | None = None,
    answers_of: str | None = None,
) -> RecordedAnswers:
    """The answers of ``model`` in a file, to the prompts of the sets.

    model: its name, which chooses among the models of an ``answers.jsonl``, unless answers_of does. A row that names
    set and index answers that prompt, if it is the same; any other is matched by its prompt. samples: answers to a
    prompt; several are numbered in the file's order. A prompt that the sets hold several times takes its rows in turn.
    asked: how this run asks. Raises UserError naming ``field``: for a file that cannot be read, that answers no prompt,
    or that has more answers to one; and naming a key of model, as ``_check_marks`` and ``Asked.check_system_prompt``
    do.
    """
    rows = _rows_of_model(load_responses(path, field), path, field, model, answers_of)
    _check_marks(rows, path, asked.model.thought_marks if asked is not None else None)
    differences = unrecorded = ""
    if asked is not None:
        asked.check_system_prompt(rows, path)
        differences, unrecorded = asked.differences(rows), asked.unrecorded(rows)
    _check_rows(rows, path, field)
    by_key: dict[tuple[str, int], list[int]] = {}
    for number, row in enumerate(rows):
        if _is_evaluated(row):
            by_key.setdefault((row["set"], row["index"]), []).append(number)
    by_prompt = _numbers_by_prompt(rows)
    texts = Counter(_text_key(prompt) for question_set in sets for prompt in question_set.prompts)
    before: Counter[str] = Counter()  # how often each prompt came before
    answers: dict[Key, RecordedAnswer] = {}
    used: set[int] = set()
    for question_set in sets:
        for index, prompt in enumerate(question_set.prompts):
            key, text = (question_set.name, index), _text_key(prompt)
            numbers = by_prompt.get(text, [])
            if of_index := [number for number in by_key.get(key, []) if number in numbers]:
                numbers = sorted(of_index, key=lambda number: rows[number].get("sample", 0))
            elif len(numbers) == samples * texts[text]:  # of a prompt that is there several times, in turn
                numbers = numbers[samples * before[text] :][:samples]
            before[text] += 1
            used.update(numbers)
            matched = [rows[number] for number in numbers]
            if matched and samples == 1:
                answers[key] = _only_answer(matched, texts[text], prompt, path, field)
            elif len(matched) > samples:
                problem = f"has {len(matched)} answers to the prompt {json.dumps(prompt)[:60]}, not {samples}"
                raise UserError(field, path, problem, "set eval.samples to the number of answers, or keep as many")
            else:
                answers |= {(*key, sample): _answer_of(row) for sample, row in enumerate(matched)}
    if sets and not answers:
        raise UserError(field, path, "answers none of the prompts", "give the answers to eval.prompts and eval.benign")
    sha256, num_unused = file_sha256(Path(path).expanduser()), len(rows) - len(used)
    return RecordedAnswers(path, sha256, answers, num_unused, differences, unrecorded)


def _numbers_by_prompt(rows: Sequence[Row]) -> dict[str, list[int]]:
    """``_text_key`` of a prompt → the numbers of its rows, in their order."""
    by_prompt: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_prompt.setdefault(_text_key(row["prompt"]), []).append(number)
    return by_prompt


def _check_rows(rows: Sequence[Row], path: str, field: str) -> None:
    """Raise UserError for a row whose reason or number is none, and drop reasons that hold for another reader alone."""
    for row in rows:
        if row["response"] is not None and not _is_excluded(row):
            row["excluded"] = None
        if not isinstance(row.get("excluded"), str | None):
            problem = f"has a row whose 'excluded' is {json.dumps(row['excluded'])[:20]}"
            raise UserError(field, path, problem, "give the reason as a text, or null")
        if _is_evaluated(row) and not isinstance(row.get("sample", 0), int):
            problem = f"has a row whose 'sample' is {json.dumps(row['sample'])[:20]}"
            raise UserError(field, path, problem, "give a number")


def _is_evaluated(row: Row) -> bool:
    """Whether an evaluation wrote this row: others may name models too, and mean something else by it."""
    return isinstance(row.get("model"), str) and isinstance(row.get("set"), str) and isinstance(row.get("index"), int)


def _names(rows: Sequence[Row], key: Literal["model", "set"]) -> list[str]:
    """The models, or the sets, that rows of an evaluation name."""
    return list(dict.fromkeys(row[key] for row in rows if _is_evaluated(row)))


def _rows_of_model(rows: list[Row], path: str, field: str, model: str, answers_of: str | None) -> list[Row]:
    """The rows of one model; all of them, where they name one model or none, and answers_of names none."""
    names = _names(rows, "model")
    if answers_of is None and len(names) < 2:
        return rows
    wanted = answers_of or model
    if wanted not in names:
        problem = f"has answers of {', '.join(names) or 'no model that is named'}, and none of {wanted}"
        remedy = f"set {field}_of to one of them" if names else f"leave {field}_of out"
        raise UserError(field, path, problem, remedy)
    return [row for row in rows if row.get("model") == wanted]


def check_unmixed(rows: Sequence[Row], path: str, are_matched: bool) -> None:
    """Raise UserError for answers of several models, of which ESI would score none, and for answers to several sets,
    of which it would score the benign ones as harmful: rows do not say which sets these are.

    path: ``data.responses``. are_matched: whether ``data.prompts`` says which rows are scored.
    """
    models, sets = _names(rows, "model"), _names(rows, "set")
    if len(models) > 1:
        raise UserError("data.responses", path, f"has answers of {', '.join(models)}", "keep the rows of one of them")
    if len(sets) > 1 and not are_matched:
        problem = f"has answers to the sets {', '.join(sets)}, and all would be scored as answers to harmful prompts"
        raise UserError("data.responses", path, problem, "name the harmful prompts in data.prompts")


def matched_rows(prompts: Sequence[Prompt], rows: Sequence[Row], path: str) -> tuple[list[tuple[int, int | None]], int]:
    """(index of a prompt of ``data.prompts``, row of ``data.responses`` that answers it) of every response, with None
    once for a prompt without any; and how many rows answer other prompts.

    A prompt may have several responses. If it stands in ``data.prompts`` several times, it must have as many rows,
    which are taken in turn, or one; rows with the prompt's index, as this package writes them, are taken by that.
    Raises UserError for other numbers of rows.
    """
    by_prompt = _numbers_by_prompt(rows)
    keys = [_text_key(prompt) for prompt in prompts]
    num_prompts_of, before, pairs = Counter(keys), Counter[str](), list[tuple[int, int | None]]()
    for index, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
        numbers = by_prompt.get(key, [])
        by_index = [number for number in numbers if rows[number].get("index") == index and "excluded" in rows[number]]
        if len(by_index) == 1:
            numbers = by_index
        elif len(numbers) == num_prompts_of[key]:
            numbers = numbers[before[key] :][:1]
        elif num_prompts_of[key] > 1 and len(numbers) > 1:
            times = f"{len(numbers)} rows to the prompt {json.dumps(prompt)[:60]}"
            problem = f"has {times}, which data.prompts has {num_prompts_of[key]} times"
            raise UserError("data.responses", path, problem, f"name the prompt once, or {SCORE_ALL}")
        before[key] += 1
        pairs += [(index, number) for number in numbers] or [(index, None)]
    return pairs, sum(len(of_prompt) for key, of_prompt in by_prompt.items() if key not in num_prompts_of)


def counted_responses(rows: Sequence[Row], path: str, thought_marks: Sequence[str] | None = None) -> list[str]:
    """``counted_response`` of each row, and "" where the engine cut it within a thought that its prompt had opened.

    path: of the file. thought_marks: of the config. Raises UserError as ``_check_marks`` does.
    """
    _check_marks(rows, path, thought_marks)
    texts = [counted_response(row) for row in rows]
    are_cut = [yes_or_no(row.get("cut")) is True for row in rows]
    unfinished = cut_within(texts, are_cut, marks_with(thought_marks))
    return ["" if is_unfinished else text for is_unfinished, text in zip(unfinished, texts, strict=True)]


def counted_response(row: Row) -> str:
    """The response of a row of ``load_responses``; "" where it has none, or is excluded."""
    return "" if row["response"] is None or _is_excluded(row) else row["response"]


def _is_excluded(row: Row) -> bool:
    """Whether the row's reason for being excluded holds for every reader: an evaluation gave it, or the response is
    unfinished, whoever wrote the row. What else excludes one, such as a judge's limit, is of that run alone."""
    return row.get("excluded") == UNFINISHED or (_is_evaluated(row) and bool(row.get("excluded")))


def _check_marks(rows: Sequence[Row], path: str, thought_marks: Sequence[str] | None) -> None:
    """Raise UserError for a row that was written with other ``model.thought_marks``, if its answer would be another
    one with those of the config."""
    for number, row in enumerate(rows, 1):
        written, response = row.get("thought_marks"), counted_response(row)
        if not (isinstance(written, list) and len(written) == 2 and all(map(is_text, written))):
            continue
        if final_answer(response, None, marks_with(written)) != final_answer(response, None, marks_with(thought_marks)):
            config_marks = None if thought_marks is None else list(thought_marks)
            problem = f"would read row {number} of {path} differently from the run that wrote it, with {written}"
            raise UserError("model.thought_marks", config_marks, problem, "set it to those marks")


def _text_key(prompt: Prompt) -> str:
    """What two equal prompts share, white space around them and Windows' ends of lines apart."""
    return json.dumps(prompt.replace("\r\n", "\n").strip() if isinstance(prompt, str) else prompt, sort_keys=True)


def _answer_of(row: Row) -> RecordedAnswer:
    answer = RecordedAnswer(row["response"], row.get("excluded"), yes_or_no(row.get("cut")) is True)
    return RecordedAnswer(None, answer.excluded or MISSING) if answer.response is None else answer


def _only_answer(rows: Sequence[Row], times: int, prompt: Prompt, path: str, field: str) -> RecordedAnswer:
    """The answer that these rows to one prompt, which the sets hold ``times`` times, have in common; a failed request
    gives way to its retry. Raises UserError where they differ."""
    answers = {answer for answer in map(_answer_of, rows) if answer.response is not None} or {_answer_of(rows[-1])}
    if len(answers) > 1:
        problem = f"has {len(answers)} different answers to the prompt {json.dumps(prompt)[:60]}"
        if times > 1:
            problem += f", which is asked {times} times"
        other = f"set eval.samples to {len(rows)}" if times == 1 else f"{times}, in the order of the prompts"
        raise UserError(field, path, problem, f"keep one of them, or {other}")
    (answer,) = answers
    return answer
