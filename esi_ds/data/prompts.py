"""Prompts from rows: the benchmarks' published formats, and any file with a column of a usual name."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

from esi_ds.config import Eval, Prompts
from esi_ds.data.benchmarks import (
    ANSWER_COLUMNS,
    BUILT_IN,
    BuiltIn,
    Kind,
    check_one_style,
    choosing_columns,
    context_of,
    scenario_of,
    skip_reason,
)
from esi_ds.data.columns import (
    CHATS,
    UnreadableRow,
    chat_value,
    check_column,
    check_distinct,
    check_prompt_columns,
    check_row,
    column_names,
    columns_beside,
    full_question,
    history_value,
    is_empty,
    lowered,
    only_turn,
    system_text,
    with_all_options,
    yes_or_no,
)
from esi_ds.data.goals import GOAL, NO_GOAL, TEST_CASE, goal_of, test_case_rows
from esi_ds.data.rows import Row, data_file, looks_like_file, read_rows
from esi_ds.data.tables import read_data_text
from esi_ds.data.thoughts import REASONING_KEYS, parts, whole_response
from esi_ds.data.turns import Prompt, asked, prompt_text, read_turns, with_context
from esi_ds.errors import UserError
from esi_ds.reading import is_text, parse_json, reading

# Tried in this order, ignoring case. AdvBench goal, HarmBench Behavior, JailbreakBench Goal, StrongREJECT
# forbidden_prompt, SORRY-Bench turns.
COLUMNS = (
    "goal",
    "forbidden_prompt",
    "adversarial",
    "vanilla",
    "prompt",
    "behavior",
    "instruction",
    "question",
    "query",
    "request",
    "text",
    "messages",
    "conversations",
    "turns",
)
MAX_SCORE = 3e38  # the largest number that a gradient in fp32 can be multiplied by
EMPTY = "the prompt is empty"
HALF = "the prompt holds half of a surrogate pair"
QuestionKind = Literal["harmful", "benign"]  # of a question set
# Kind of a question set → the config's key.
KEYS = {"harmful": "eval.prompts", "benign": "eval.benign"}


@dataclass(frozen=True)
class PromptSet:
    """Prompts, where they come from, and (row, reason) of every row that was skipped.

    unread: columns that no prompt holds; also_read: those that some hold beside ``column``. goals: what each prompt is
    after, where it is an attack and the rows say so; empty otherwise. goal_column: where they were read.
    """

    prompts: tuple[Prompt, ...]
    column: str
    source: str
    skipped: tuple[tuple[int, str], ...]
    unread: tuple[str, ...] = ()
    goals: tuple[str, ...] = ()
    goal_column: str | None = None
    also_read: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """For the end of a line of the log: the number of goals, the number of duplicates, and which other columns of
        the rows are read and not read."""
        goals = f"; judges read {self.goal_column}, {len(set(self.goals))} distinct" if self.goals else ""
        num_repeated = len(self.prompts) - len({json.dumps(prompt) for prompt in self.prompts})
        repeated = f"; {num_repeated} duplicate(s), all counted" if num_repeated else ""
        also_read = f"; read with them: {', '.join(self.also_read)}" if self.also_read else ""
        return goals + repeated + also_read + (f"; columns not read: {', '.join(self.unread)}" if self.unread else "")

    @property
    def sha256(self) -> str:
        """Digest of the prompts, and of their goals if there are any."""
        content = [self.prompts, self.goals] if self.goals else self.prompts
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_prompts(
    path: str,
    name: str | None = None,
    split: str | None = None,
    column: str = "auto",
    limit: int | None = None,
    *,
    goal: str | None = None,
    behaviors: str | None = None,
    kind: Kind | None = None,
    field: str = "data.prompts",
) -> PromptSet:
    """Read prompts; ``path`` is a file, a hub id or a built-in name (benchmarks.py). name: a hub set's configuration.

    goal: the column of what attacks are after; None: of none. behaviors: the CSV of HarmBench's behaviours, for a file
    of its test cases.

    kind: which rows to take from a data set that holds both kinds (XSTest, WildJailbreak); None: those of the built-in
    name. Raises UserError naming ``field`` and its key.
    """
    built_in = BUILT_IN.get(path)
    source, name, split = where_from(path, name, split)
    if built_in:
        kind = _kind_of(built_in, path, kind, field)
    rows = test_case_rows(source, behaviors, field)
    if rows is not None:
        column, goal = TEST_CASE, goal or GOAL
    else:
        rows = read_rows(source, f"{field}.path", name=name, split=split)
    if built_in is None:
        check_one_style(rows, path, f"{field}.path")
    if goal is not None:
        check_column(goal, column_names(rows), f"{field}.goal")
    if built_in and column == "auto" and any(built_in.column in row for row in rows):
        column = built_in.column
    else:  # a copy with other column names is read like any file
        column = choose_column(rows, column, f"{field}.column", goal)
    if goal == column:
        raise UserError(f"{field}.goal", goal, "is the column of the prompts", "name that of the goals")
    prompts: list[Prompt] = []
    goals: list[str] = []
    skipped: list[tuple[int, str]] = []
    named = {name.strip().lower() for name in (column, goal) if name is not None}
    for number, row in enumerate(with_all_options(rows, named)):
        if len(prompts) == limit:  # later rows are not read, so they are not listed as skipped
            break
        prompt, reason = _read_prompt(row, column, kind, built_in)
        aim = None if goal is None else goal_of(row, goal)
        if reason or (goal is not None and aim is None):
            skipped.append((number, reason or NO_GOAL))
            continue
        prompts.append(prompt)
        goals += [] if aim is None else [aim]
    if not prompts:
        reasons = "; ".join(sorted({reason for _, reason in skipped}))
        raise UserError(f"{field}.path", path, f"has no prompt ({reasons})", "check its rows")
    source = source if looks_like_file(source) else f"hub:{source}"
    also_read, unread = _columns_beside(rows, column, goal)
    return PromptSet(tuple(prompts), column, source, tuple(skipped), unread, tuple(goals), goal, also_read)


def _columns_beside(rows: Sequence[Row], column: str, goal: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(columns that a prompt is read with, columns that are not read), as ``columns_beside`` has them."""
    named = {name.strip().lower() for name in (column, goal) if name is not None}
    also = {"contextstring" if row.get("ContextString") else "context" for row in rows if context_of(row, column)}
    if column.strip().lower() == "adversarial" and any(is_empty(row.get(column)) for row in rows):
        also.add("vanilla")
    return columns_beside(rows, {*named, *choosing_columns(rows)}, also - named, _contexts_apart(rows[0], column))


def load_section(section: Prompts, field: str, kind: Kind | None = None) -> PromptSet:
    """The prompts that a section of the config names; ``kind`` and ``field`` as of ``load_prompts``."""
    return load_prompts(
        section.path,
        section.name,
        section.split,
        section.column,
        section.limit,
        goal=section.goal,
        behaviors=section.behaviors,
        kind=kind,
        field=field,
    )


def where_from(path: str, name: str | None, split: str | None) -> tuple[str, str | None, str | None]:
    """File or hub id, configuration and split to read: a built-in set's own where the config names none."""
    built_in = BUILT_IN.get(path)
    if built_in is None:
        return path, name, split
    own_split = None if looks_like_file(built_in.source) else built_in.split
    return built_in.source, name or built_in.config, split or own_split


def _read_prompt(row: Row, column: str, kind: Kind | None, built_in: BuiltIn | None) -> tuple[Prompt, str | None]:
    """A row's prompt, and why the row is skipped (None: it is not)."""
    reason = skip_reason(row, kind) or (built_in.skip_reason(row) if built_in else None)
    try:
        prompt = "" if reason else prompt_of(row, column)
    except UnreadableRow as error:
        return "", str(error)
    return prompt, reason or (None if prompt else EMPTY) or (None if is_text(prompt_text(prompt)) else HALF)


def _kind_of(built_in: BuiltIn, path: str, kind: Kind | None, field: str) -> Kind:
    """The kind of rows to take from a built-in set. Raises UserError if the set has none of the requested kind."""
    if kind is None or built_in.kind in (kind, "all"):
        return built_in.kind
    others = {name: other for name, other in BUILT_IN.items() if other.source == built_in.source and other.kind == kind}
    # Two names for the same rows: the data set holds both kinds, and its rows say which they are.
    if kind == "all" or any(other[:3] == built_in[:3] for other in others.values()):
        return kind
    remedy = f"name {next(iter(others))}" if others else f"it holds {built_in.kind} prompts only"
    raise UserError(f"{field}.path", path, f"is a set of {built_in.kind} prompts, not of {kind} ones", remedy)


def choose_column(rows: Sequence[Row], column: str, field: str, goal: str | None) -> str:
    """The column that holds the prompts; ``auto`` takes the first usual one but ``goal``. Raises UserError listing the
    columns."""
    names = column_names(rows)
    if column != "auto":
        check_column(column, names, field)
        return column
    names = [name for name in names if name != goal]
    check_distinct(names, COLUMNS, field)
    check_prompt_columns(names, field)
    lower = {name.strip().lower(): name for name in names}
    for candidate in COLUMNS:
        if candidate in lower:
            return lower[candidate]
    raise UserError(
        field, "auto", f"has none of the usual columns, only {', '.join(names)}", "name the column of the prompts"
    )


def prompt_of(row: Row, column: str) -> Prompt:
    """One row's prompt, a text without surrounding white space or a chat; "" if it has none.

    A system prompt and earlier turns in other columns belong to it. HarmBench's contextual rows put their context
    before the behaviour; a question is followed by its input and the options to choose from. CoSApien's scenario is a
    system prompt. WildJailbreak's vanilla rows leave ``adversarial`` empty. Raises UnreadableRow where the row holds
    what a prompt cannot: tools, or a chat that does not end with the user's turn.
    """
    name = column.strip().lower()
    value = row.get(column)
    if name == "adversarial" and is_empty(value):
        value = row.get("vanilla")
    if name == "turns":
        value = only_turn(value)
    if is_empty(value):
        return ""
    if name in CHATS or isinstance(value, list):
        turns = read_turns(chat_value(value, name))
    elif isinstance(value, str):
        turns = [{"role": "user", "content": value.strip()}]
    else:
        raise UnreadableRow("the prompt is not a text")
    other = lowered(row, without={name, *_contexts_apart(row, column)})
    if scenario := scenario_of(row):
        other.setdefault("system", scenario)
    check_row(other)
    if turns and turns[-1]["role"] == "user" and (question := turns[-1]["content"].strip()):
        context = context_of(row, column)
        whole = f"{context}\n\n---\n\n{question}" if context else full_question(question, other)
        if whole != question:
            turns[-1]["content"] = whole
    return asked(with_context(turns, other))


def _contexts_apart(row: Row, column: str) -> tuple[str, ...]:
    """Columns of context that are not part of a prompt: HarmBench's, read by ``context_of``, and that of an answered
    prompt, which refers to it only for a reader of the answer."""
    is_answered = column.lower() == "prompt" and bool(ANSWER_COLUMNS & {str(name).lower() for name in row})
    return ("context",) if is_answered or "behavior" in column.lower() else ()


def load_responses(path: str, field: str = "data.responses") -> list[Row]:
    """Rows {"prompt", "response"} of a file: a ``Prompt``, whose turns are a list, and a text.

    The file is JSON lines of such rows, an ``answers.jsonl``, or HarmBench's completions; a response is None where
    there is none. A thought beside the response, as engines give it, is joined to it. Raises UserError naming
    ``field``.
    """
    rows = _response_rows(path, field) if looks_like_file(path) else []
    if not rows:
        raise UserError(field, path, "there is no such file", 'give a JSONL file of {"prompt", "response"}')
    for number, row in enumerate(rows, 1):
        if isinstance(row.get("prompt"), list):
            row["prompt"] = _asked_chat(row["prompt"], number, path, field)
        for key in ("prompt", "response"):
            is_chat = key == "prompt" and isinstance(row.get("prompt"), list)
            is_missing = key == "response" and row.get(key, "") is None
            if not (is_text(row.get(key)) or is_chat or is_missing):
                raise UserError(
                    field,
                    path,
                    f"row {number} has no text under {key!r}",
                    'every row must be {"prompt": "...", "response": "..."}',
                )
        _check_response_row(row, number, path, field)
        row["response"] = _with_thought(row)
    return rows


def _with_thought(row: Row) -> str | None:
    """The response behind the thought that an engine gave beside it, unless it holds one itself."""
    response = row["response"]
    thoughts = [text for name in REASONING_KEYS if isinstance(text := row.get(name), str) and text.strip()]
    if not thoughts or (response is None and row.get("excluded") is not None) or parts(response or "").trace:
        return response
    may_be_cut = "cut" not in row or yes_or_no(row["cut"]) is True
    is_unfinished = response is None or (may_be_cut and not response.strip())
    return whole_response(thoughts[0], None if is_unfinished else response)


def _response_rows(path: str, field: str) -> list[Row]:
    """The rows of a file of responses; those of HarmBench's completions under the names that other files have."""
    file = data_file(path, field)
    if file.suffix.lower() == ".json":
        with reading(field, path, "check that its format matches its suffix"):
            completions = _completions(read_data_text(file))
        if completions is not None:
            return completions
    return read_rows(path, field)


def _completions(text: str) -> list[Row] | None:
    """The rows of HarmBench's completions, {behavior_id: [{"test_case", "generation"}]}; None for any other text."""
    try:
        content = parse_json(text)
    except json.JSONDecodeError:  # JSON lines
        return None
    lists = list(content.values()) if isinstance(content, dict) else []
    rows = [row for rows in lists if isinstance(rows, list) for row in rows]
    if not rows or not all(isinstance(rows, list) for rows in lists):
        return None
    if not all(isinstance(row, dict) and "test_case" in row and "generation" in row for row in rows):
        return None
    return [{"prompt": row["test_case"], "response": row["generation"]} for row in rows]


def _asked_chat(turns: list[Any], number: int, path: str, field: str) -> Prompt:
    """The prompt of a row of responses that is a chat. Raises UserError naming ``field``."""
    try:
        prompt = asked(read_turns(turns))
        if not prompt or not is_text(prompt_text(prompt)):
            raise UnreadableRow(HALF if prompt else EMPTY)
    except UnreadableRow as error:
        remedy = 'give "prompt" as a text, or as a list of turns that ends with the user\'s'
        raise UserError(field, path, f"row {number} cannot be read: {error}", remedy) from error
    return prompt


def _check_response_row(row: Row, number: int, path: str, field: str) -> None:
    """Raises UserError for a response to more than its prompt: behind another context its score would differ."""
    try:
        other = lowered(row, without=("prompt", "response"))
        check_row(other)
        beside = full_question("", other)
        problem = "has an input or options beside its prompt" if beside else ""
        if system_text(other) is not None:
            problem = "has a system prompt of its own"
        if history_value(other) is not None:
            problem = "has earlier turns"
    except UnreadableRow as error:
        problem = f"cannot be read: {error}"
    if problem:
        remedy = "give rows whose prompt is all that was asked; model.system_prompt is the system's turn"
        raise UserError(field, path, f"row {number} {problem}", remedy)


def recorded_scores(rows: Sequence[Row], path: str) -> list[float]:
    """``judge_score`` of every row of ``load_responses``; NaN for null: that response was not judged.

    Raises UserError naming data.responses.
    """
    scores = []
    for number, row in enumerate(rows, 1):
        score = row.get("judge_score", "")
        is_number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if score is not None and not (is_number and abs(score) <= MAX_SCORE):
            raise UserError(
                "data.responses",
                path,
                f"row {number} has no number for 'judge_score'",
                "give each row a finite score, higher for safer, or name a judge.path",
            )
        scores.append(math.nan if score is None else float(score))
    return scores


class PromptSetRow(TypedDict):
    """A question set in the report."""

    set: str  # its name in tables and files
    kind: QuestionKind  # whether its prompts should be refused or answered
    source: str  # file, or "hub:" and the id
    column: str  # the column that holds the prompts
    read: int  # number of prompts
    skipped: dict[str, int]  # reason → number of rows skipped for it, most frequent first
    sha256: str  # of the prompts
    also_read: NotRequired[list[str]]  # columns that are read with the prompts; there if there are any
    goal_column: NotRequired[str]  # the column of what attacks are after; there if it was read
    goals: NotRequired[int]  # how many there are


@dataclass(frozen=True)
class QuestionSet:
    """Prompts that every model is asked. name: in tables and files; kind: whether they should be refused."""

    name: str
    kind: QuestionKind
    prompt_set: PromptSet

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return self.prompt_set.prompts

    def goal(self, index: int) -> str | None:
        """What a prompt is after; None where the set has no goals."""
        return self.prompt_set.goals[index] if self.prompt_set.goals else None

    def as_row(self) -> PromptSetRow:
        """What was read, what was skipped and why: a row of the report."""
        row: PromptSetRow = {
            "set": self.name,
            "kind": self.kind,
            "source": self.prompt_set.source,
            "column": self.prompt_set.column,
            "read": len(self.prompts),
            "skipped": dict(Counter(reason for _, reason in self.prompt_set.skipped).most_common()),
            "sha256": self.prompt_set.sha256,
        }
        if self.prompt_set.also_read:
            row["also_read"] = list(self.prompt_set.also_read)
        if self.prompt_set.goal_column is not None:
            row["goal_column"], row["goals"] = self.prompt_set.goal_column, len(set(self.prompt_set.goals))
        return row


def question_sections(section: Eval) -> Iterator[tuple[str, QuestionKind, str, Prompts]]:
    """(key in the config, kind, name, section) of every set of ``eval.prompts``, then of ``eval.benign``."""
    names = iter(distinct_names([*section.prompts, *section.benign]))
    kinds: dict[QuestionKind, list[Prompts]] = {"harmful": section.prompts, "benign": section.benign}
    for kind, sections in kinds.items():
        for number, prompts in enumerate(sections):
            yield f"{KEYS[kind]}.{number}" if len(sections) > 1 else KEYS[kind], kind, next(names), prompts


def load_question_sets(section: Eval) -> list[QuestionSet]:
    """The sets of ``question_sections``. Each takes only its kind of rows from a data set that holds both (XSTest)."""
    sets = question_sections(section)
    return [QuestionSet(name, kind, load_section(prompts, field, kind)) for field, kind, name, prompts in sets]


def distinct_names(sections: list[Prompts]) -> list[str]:
    """Short distinct names: a file's stem if that is enough, else path, configuration and split, else also a number."""
    stems = [Path(s.path).stem if Path(s.path).suffix else s.path for s in sections]
    longer = [":".join(part for part in (s.path, s.name, s.split) if part) for s in sections]
    names = [stem if stems.count(stem) == 1 else long for stem, long in zip(stems, longer, strict=True)]
    return [name if names.count(name) == 1 else f"{name}#{number}" for number, name in enumerate(names, 1)]
