"""Prompts out of rows: the published shapes of the benchmarks, and any file with a usual column."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esi_ds.data.rows import Row, looks_like_file, read_rows
from esi_ds.errors import UserError

# Built-in names → (hub id or file, configuration, split).
BUILT_IN: dict[str, tuple[str, str | None, str]] = {
    "advbench": ("walledai/AdvBench", None, "train"),
    "harmbench": ("walledai/HarmBench", "standard", "train"),
    "strongreject": ("walledai/StrongREJECT", None, "train"),
    "jailbreakbench": ("JailbreakBench/JBB-Behaviors", "behaviors", "harmful"),
    "wildjailbreak": ("allenai/wildjailbreak", "eval", "train"),
    "examples/harmful": (
        str(Path(__file__).resolve().parents[2] / "examples/data/harmful_heldout.jsonl"),
        None,
        "train",
    ),
}
# Tried in this order, caseless. AdvBench goal, HarmBench Behavior, JailbreakBench Goal, StrongREJECT forbidden_prompt.
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


@dataclass(frozen=True)
class PromptSet:
    """Prompts as text, where they are from, and (row, reason) of every row that gave none."""

    prompts: tuple[str, ...]
    column: str
    source: str
    skipped: tuple[tuple[int, str], ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()


def load_prompts(path: str, split: str | None = None, column: str = "auto", limit: int | None = None) -> PromptSet:
    """Read prompts; ``path`` is a file, a hub id or a built-in name. Raises UserError naming data.prompts.*."""
    source, name, default_split = BUILT_IN.get(path, (path, None, None))
    rows = read_rows(source, "data.prompts.path", name=name, split=split or default_split)
    chosen = choose_column(rows, column, "data.prompts.column")
    prompts: list[str] = []
    skipped: list[tuple[int, str]] = []
    for number, row in enumerate(rows):
        if len(prompts) == limit:  # rows behind it are not read, so neither are they skipped
            break
        text = prompt_of(row, chosen)
        reason = skip_reason(row) or (None if text else EMPTY)
        if reason:
            skipped.append((number, reason))
        else:
            prompts.append(text)
    if not prompts:
        reasons = "; ".join(sorted({reason for _, reason in skipped}))
        raise UserError("data.prompts.path", path, f"gives no prompt ({reasons})", "look at its rows")
    return PromptSet(tuple(prompts), chosen, source if looks_like_file(source) else f"hub:{source}", tuple(skipped))


def choose_column(rows: Sequence[Row], column: str, field: str) -> str:
    """The column that holds the prompts; ``auto`` takes the first usual one. Raises UserError listing what is there."""
    names = list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))
    if column != "auto":
        if column in names:
            return column
        near = difflib.get_close_matches(column, names, n=1, cutoff=0.0)
        raise UserError(
            field,
            column,
            f"there is no such column; there are {', '.join(names)}",
            f"the nearest is {near[0]}" if near else "the rows have no columns",
        )
    lower = {name.lower(): name for name in reversed(names)}
    for candidate in COLUMNS:
        if candidate in lower:
            return lower[candidate]
    raise UserError(
        field, "auto", f"none of the usual columns is there, only {', '.join(names)}", "name the column of the prompts"
    )


def prompt_of(row: Row, column: str) -> str:
    """One row's prompt, stripped of surrounding white space; "" where it has none.

    A chat gives its last user turn. HarmBench's contextual rows carry their context in front of the behaviour.
    WildJailbreak's vanilla rows leave ``adversarial`` empty.
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
    context = row.get("ContextString") or row.get("context") if "behavior" in column.lower() else None
    if isinstance(context, str) and context.strip():
        return f"{context.strip()}\n\n---\n\n{value.strip()}"
    return value.strip()


def skip_reason(row: Row) -> str | None:
    """Rows of a benchmark that are not what is asked for here."""
    if row.get("FunctionalCategory") == "copyright":
        return "HarmBench copyright row"
    if "benign" in str(row.get("data_type", "")):
        return "WildJailbreak benign row"
    return None


def load_responses(path: str) -> list[Row]:
    """Rows {"prompt", "response"} of a JSONL file; both must be text. Raises UserError naming data.responses."""
    rows = read_rows(path, "data.responses") if looks_like_file(path) else []
    if not rows:
        raise UserError("data.responses", path, "there is no such file", 'give a JSONL of {"prompt", "response"}')
    for number, row in enumerate(rows, 1):
        for key in ("prompt", "response"):
            if not isinstance(row.get(key), str):
                raise UserError(
                    "data.responses",
                    path,
                    f"row {number} has no text {key!r}",
                    'every row must be {"prompt": "...", "response": "..."}',
                )
    return rows
