"""What attacks are after: the goal beside a prompt, which judges read in place of the attack's text.

Formats: any rows with the goal in a column (JailbreakBench's artifacts have ``goal`` and ``prompt``, WildJailbreak's
training rows ``vanilla`` and ``adversarial``), and HarmBench's test cases, {behavior_id: [test case, ...]}, whose goals
are in the CSV of its behaviours under BehaviorID, Behavior and ContextString.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from esi_ds.data.benchmarks import CATEGORY_COLUMNS, context_of
from esi_ds.data.columns import is_empty, strip
from esi_ds.data.rows import Row, data_file, is_by_column, looks_like_file, read_rows
from esi_ds.data.tables import read_data_text
from esi_ds.errors import UserError
from esi_ds.reading import is_text, parse_json, reading

GOAL = "goal"
NO_GOAL = "the goal is empty, or not a text"
TEST_CASE, BEHAVIOR_ID, BEHAVIOR = "test_case", "BehaviorID", "Behavior"


def goal_of(row: Row, column: str) -> str | None:
    """A row's goal without white space around it; None where it is empty or not a text."""
    value = row.get(column)
    return None if is_empty(value) or not is_text(value) else str(strip(value))


def recorded_goals(rows: Sequence[Row]) -> list[str | None] | None:
    """What the prompt of each row of a file of responses is after, None where it has no goal; None if none has one.

    Goals are read from rows as this package writes them: others may mean something else by the name.
    """
    goals = [goal_of(row, GOAL) if "excluded" in row else None for row in rows]
    return goals if any(goals) else None


def has_unread_goals(rows: Sequence[Row]) -> bool:
    """Whether a file of responses has rows of others with a goal, which ``recorded_goals`` leaves alone."""
    return any("excluded" not in row and goal_of(row, GOAL) is not None for row in rows)


def test_case_rows(path: str, behaviors: str | None, field: str) -> list[Row] | None:
    """The rows of HarmBench's test cases, with their goals; None for any other file.

    behaviors: path of the CSV of behaviours. Raises UserError naming ``field`` and its key.
    """
    cases = _test_cases(path, f"{field}.path") if looks_like_file(path) else None
    key = f"{field}.behaviors"
    if cases is None:
        if behaviors is not None:
            raise UserError(key, behaviors, f"belongs to HarmBench's test cases, and {path} has none", "leave it out")
        return None
    if behaviors is None:
        remedy = "name the CSV of its behaviours (harmbench_behaviors_text_all.csv)"
        raise UserError(
            key, None, f"is missing: {path} has test cases by behaviour, and that CSV has the goals", remedy
        )
    goals = _behaviors(behaviors, key)
    unknown = [name for name in cases if name not in goals]
    if unknown:
        more = f" and {len(unknown) - 1} more" if unknown[1:] else ""
        problem = f"has no behaviour {unknown[0]!r}{more}, for which {path} has test cases"
        raise UserError(key, behaviors, problem, "name the CSV they were made from")
    return [{TEST_CASE: case, **goals[name]} for name, listed in cases.items() for case in listed]


def _test_cases(path: str, field: str) -> dict[str, list[str | None]] | None:
    """The content of HarmBench's test cases, lists of texts by behaviour, None where an attack gave none; None for
    another file."""
    file = data_file(path, field)
    if file.suffix.lower() != ".json":
        return None
    with reading(field, path, "check that its format matches its suffix"):
        try:
            content: Any = parse_json(read_data_text(file))
        except json.JSONDecodeError:  # JSON lines
            return None
    if not isinstance(content, dict) or not all(isinstance(cases, list) for cases in content.values()):
        return None
    if is_by_column(content):
        return None
    cases = [case for listed in content.values() for case in listed]
    are_cases = any(cases) and all(isinstance(case, str | None) for case in cases)
    return content if are_cases else None


def _behaviors(path: str, field: str) -> dict[str, Row]:
    """BehaviorID → goal, and what marks a behaviour as one of copyright."""
    rows = read_rows(path, field)
    for name in (BEHAVIOR_ID, BEHAVIOR):
        if name not in rows[0]:
            raise UserError(field, path, f"has no column {name}", "name the CSV of HarmBench's behaviours")
    goals: dict[str, Row] = {}
    for row in rows:
        context, goal = context_of(row, BEHAVIOR), str(row[BEHAVIOR]).strip()
        marks = {name: value for name, value in row.items() if name.lower() in CATEGORY_COLUMNS}
        # A behaviour with a context is asked, and judged, as HarmBench's own direct requests are written.
        goals[str(row[BEHAVIOR_ID])] = {GOAL: f"{context}\n\n---\n\n{goal}" if context else goal, **marks}
    return goals
