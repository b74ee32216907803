"""Prompts from rows: the benchmarks' published formats, and any file with a column of a usual name."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from esi_ds.config import Eval, Prompts
from esi_ds.data.benchmarks import BUILT_IN, BuiltIn, Kind, context_of, skip_reason
from esi_ds.data.rows import Row, is_text, looks_like_file, read_rows, with_input
from esi_ds.errors import UserError

# Tried in this order, ignoring case. AdvBench goal, HarmBench Behavior, JailbreakBench Goal, StrongREJECT
# forbidden_prompt.
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
)
EMPTY = "the prompt is empty"
HALF = "the prompt holds half of a surrogate pair"


@dataclass(frozen=True)
class PromptSet:
    """Prompts as text, where they come from, and (row, reason) of every row that was skipped."""

    prompts: tuple[str, ...]
    column: str
    source: str
    skipped: tuple[tuple[int, str], ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()


def load_prompts(
    path: str,
    split: str | None = None,
    column: str = "auto",
    limit: int | None = None,
    *,
    kind: Kind | None = None,
    field: str = "data.prompts",
) -> PromptSet:
    """Read prompts; ``path`` is a file, a hub id or a built-in name (benchmarks.py).

    kind: which rows to take from a data set that holds both kinds (XSTest, WildJailbreak); None: those of the built-in
    name. Raises UserError naming ``field`` and its key.
    """
    built_in = BUILT_IN.get(path)
    source, config = (built_in.source, built_in.config) if built_in else (path, None)
    if built_in:
        split, kind = split or built_in.split, _kind_of(built_in, path, kind, field)
    rows = read_rows(source, f"{field}.path", name=config, split=split)
    if built_in and column == "auto" and any(built_in.column in row for row in rows):
        column = built_in.column
    else:  # a copy with other column names is read like any file
        column = choose_column(rows, column, f"{field}.column")
    prompts: list[str] = []
    skipped: list[tuple[int, str]] = []
    for number, row in enumerate(rows):
        if len(prompts) == limit:  # later rows are not read, so they are not listed as skipped
            break
        text = prompt_of(row, column)
        reason = skip_reason(row, kind) or (None if text else EMPTY) or (None if is_text(text) else HALF)
        if reason:
            skipped.append((number, reason))
        else:
            prompts.append(text)
    if not prompts:
        reasons = "; ".join(sorted({reason for _, reason in skipped}))
        raise UserError(f"{field}.path", path, f"has no prompt ({reasons})", "check its rows")
    return PromptSet(tuple(prompts), column, source if looks_like_file(source) else f"hub:{source}", tuple(skipped))


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


def choose_column(rows: Sequence[Row], column: str, field: str) -> str:
    """The column that holds the prompts; ``auto`` takes the first usual one. Raises UserError listing the columns."""
    names = list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))
    if column != "auto":
        if column in names:
            return column
        near = difflib.get_close_matches(column, names, n=1, cutoff=0.0)
        raise UserError(
            field,
            column,
            f"is not among the columns {', '.join(names)}",
            f"the nearest is {near[0]}" if near else "the rows have no columns",
        )
    lower = {name.lower(): name for name in reversed(names)}
    for candidate in COLUMNS:
        if candidate in lower:
            return lower[candidate]
    raise UserError(
        field, "auto", f"has none of the usual columns, only {', '.join(names)}", "name the column of the prompts"
    )


def prompt_of(row: Row, column: str) -> str:
    """One row's prompt, stripped of surrounding white space; "" if it has none.

    Of a chat: its last user turn. HarmBench's contextual rows put their context before the behaviour; an instruction is
    followed by its input. WildJailbreak's vanilla rows leave ``adversarial`` empty.
    """
    value = row.get(column)
    if column.lower() == "adversarial" and not (isinstance(value, str) and value.strip()):
        value = row.get("vanilla")
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, dict)]
        users = [
            turn.get("content", turn.get("value"))
            for turn in turns
            if turn.get("role", turn.get("from")) in ("user", "human")
        ]
        value = users[-1] if users else None
    if not isinstance(value, str) or not value.strip():
        return ""
    context = context_of(row, column)
    if context:
        return f"{context}\n\n---\n\n{value.strip()}"
    return with_input(value, _input_of(row)) if column.lower() == "instruction" else value.strip()


def _input_of(row: Row) -> str | None:
    """The input of an instruction: Alpaca's ``input``, Dolly's ``context``, self-instruct's first instance."""
    lowered = {str(name).lower(): value for name, value in row.items()}
    instances = lowered.get("instances")
    first = instances[0] if isinstance(instances, list) and instances and isinstance(instances[0], dict) else {}
    candidates = (lowered.get("input"), lowered.get("context"), first.get("input"))
    return next((text for text in candidates if isinstance(text, str) and text.strip()), None)


def load_responses(path: str) -> list[Row]:
    """Rows {"prompt", "response"} of a JSONL file, both text. Raises UserError naming data.responses."""
    rows = read_rows(path, "data.responses") if looks_like_file(path) else []
    if not rows:
        raise UserError("data.responses", path, "there is no such file", 'give a JSONL file of {"prompt", "response"}')
    for number, row in enumerate(rows, 1):
        for key in ("prompt", "response"):
            if not is_text(row.get(key)):
                raise UserError(
                    "data.responses",
                    path,
                    f"row {number} has no text {key!r}",
                    'every row must be {"prompt": "...", "response": "..."}',
                )
    return rows


def recorded_scores(rows: Sequence[Row], path: str) -> list[float]:
    """``judge_score`` of every row of ``load_responses``; NaN for null: that response was not judged.

    Raises UserError naming data.responses.
    """
    scores = []
    for number, row in enumerate(rows, 1):
        score = row.get("judge_score", "")
        if isinstance(score, bool) or not isinstance(score, (int, float, type(None))):
            raise UserError(
                "data.responses",
                path,
                f"row {number} has no number for 'judge_score'",
                "give each row a score, higher for safer, or name a judge.path",
            )
        scores.append(math.nan if score is None else float(score))
    return scores


class PromptSetRow(TypedDict):
    """A question set in the report."""

    set: str  # its name in tables and files
    kind: Literal["harmful", "benign"]  # whether its prompts should be refused or answered
    source: str  # file, or "hub:" and the id
    column: str  # the column that holds the prompts
    read: int  # number of prompts
    skipped: dict[str, int]  # reason → number of rows skipped for it, most frequent first
    sha256: str  # of the prompts


@dataclass(frozen=True)
class QuestionSet:
    """Prompts that every model is asked. name: in tables and files; kind: whether they should be refused."""

    name: str
    kind: Literal["harmful", "benign"]
    prompt_set: PromptSet

    @property
    def prompts(self) -> tuple[str, ...]:
        return self.prompt_set.prompts

    def as_row(self) -> PromptSetRow:
        """What was read, what was skipped and why: a row of the report."""
        return {
            "set": self.name,
            "kind": self.kind,
            "source": self.prompt_set.source,
            "column": self.prompt_set.column,
            "read": len(self.prompts),
            "skipped": dict(Counter(reason for _, reason in self.prompt_set.skipped).most_common()),
            "sha256": self.prompt_set.sha256,
        }


def load_question_sets(section: Eval) -> list[QuestionSet]:
    """The sets of ``eval.prompts``, then those of ``eval.benign``.

    Each takes only its kind of rows from a data set that holds both (XSTest).
    """
    names = iter(_names([*section.prompts, *section.benign]))
    return [
        *_load_kind("harmful", "eval.prompts", section.prompts, names),
        *_load_kind("benign", "eval.benign", section.benign, names),
    ]


def _load_kind(
    kind: Literal["harmful", "benign"], key: str, sections: Sequence[Prompts], names: Iterator[str]
) -> list[QuestionSet]:
    """The sets of one config key; takes their names off ``names``."""
    question_sets = []
    for number, section in enumerate(sections):
        field = f"{key}.{number}" if len(sections) > 1 else key
        prompt_set = load_prompts(section.path, section.split, section.column, section.limit, kind=kind, field=field)
        question_sets.append(QuestionSet(next(names), kind, prompt_set))
    return question_sets


def _names(sections: list[Prompts]) -> list[str]:
    """Short distinct names: a file's stem if that is enough, else path and split, else also a number."""
    stems = [Path(s.path).stem if Path(s.path).suffix else s.path for s in sections]
    longer = [s.path + (f":{s.split}" if s.split else "") for s in sections]
    names = [stem if stems.count(stem) == 1 else long for stem, long in zip(stems, longer, strict=True)]
    return [name if names.count(name) == 1 else f"{name}#{number}" for number, name in enumerate(names, 1)]
