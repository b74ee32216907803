"""Data that a dry run can do without: what does not exist yet or cannot be reached becomes a note. What is wrong with
data that can be read stays an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants, get_session

from esi_ds.config import BenignMix, Prompts, RowSource, Task
from esi_ds.data.answers import check_unmixed, matched_rows
from esi_ds.data.benchmarks import Kind
from esi_ds.data.conversations import find_columns
from esi_ds.data.prompts import PromptSet, load_responses, load_section, where_from
from esi_ds.data.rows import exists, looks_like_file, read_rows
from esi_ds.errors import UserError
from esi_ds.eval.tasks import check_installed, prepare_task

HUB_TIMEOUT_S = 5.0
TRY_CACHE = "HF_HUB_OFFLINE=1 would look for a local copy"
Content = TypeVar("Content")


def count_prompts(section: Prompts, field: str, notes: list[str], kind: Kind | None = None) -> int | None:
    """Number of prompts in a set; None, and a note, where it cannot be reached. Raises UserError where it is wrong."""
    read = reachable_prompts(section, field, notes, kind)
    return None if read is None else len(read.prompts)


def reachable_prompts(section: Prompts, field: str, notes: list[str], kind: Kind | None = None) -> PromptSet | None:
    """A set of prompts, likewise."""
    source, name, split = where_from(section.path, section.name, section.split)
    key = f"{field}.path"
    if read_if_reachable(source, key, lambda: read_rows(source, key, name=name, split=split), notes) is None:
        return None
    return load_section(section, field, kind)


def count_responses(path: str, section: Prompts | None, notes: list[str]) -> int | None:
    """Number of prompts of ``data.prompts``, which the file ``data.responses`` answers; without it of the file's rows.
    Else likewise."""
    rows = read_if_reachable(path, "data.responses", lambda: load_responses(path), notes)
    if rows is not None:
        check_unmixed(rows, path, are_matched=section is not None)
    if section is None:
        return None if rows is None else len(rows)
    read = reachable_prompts(section, "data.prompts", notes)
    if read is None or rows is None:
        return None
    pairs, _ = matched_rows(read.prompts, rows, path)
    return sum(number is not None for _, number in pairs) or len(rows[: section.limit])  # else its own prompts


def count_rows(section: RowSource | BenignMix, field: str, notes: list[str]) -> int | None:
    """Number of rows to learn from, likewise. Their columns are checked, but they are not read as conversations."""
    key = f"{field}.path"
    rows = read_if_reachable(
        section.path, key, lambda: read_rows(section.path, key, name=section.name, split=section.split), notes
    )
    if rows is None:
        return None
    find_columns(rows, section.columns, f"{field}.columns")
    return len(rows[: getattr(section, "limit", None)])


def note_missing_tasks(tasks: Sequence[Task], notes: list[str]) -> None:
    """Read the rows of every task of lm-eval, as the evaluation will hours later, and note what is not there. What the
    hub gives stays in its cache. Raises UserError where a task is wrong."""
    try:
        check_installed(tasks)
    except UserError as error:
        notes.append(str(error))
        return
    for number, task in enumerate(tasks):
        field, files = f"eval.tasks.{number}", {"path": task.path, "fewshot_path": task.fewshot_path}
        missing = [(key, file) for key, file in files.items() if file is not None and not exists(file)]
        is_here = task.path is not None or task.name.startswith("examples/")
        if missing:
            notes += [f"{field}.{key} = {file}: there is no such file" for key, file in missing]
        elif not (is_here or looks_like_file(task.name) or hub_answers()):
            notes.append(f"{field}.name = {task.name}: the hub does not answer; {TRY_CACHE}")
        else:
            try:
                prepare_task(task, field)
            except UserError as error:
                if is_here or error.__cause__ is None:  # wrong, such as a name that lm-eval does not know
                    raise
                notes.append(str(error))


def read_if_reachable(path: str, field: str, read: Callable[[], Content], notes: list[str]) -> Content | None:
    """What ``read`` returns; None, and a note, where the file does not exist or the hub does not provide it."""
    if looks_like_file(path):
        if exists(path):
            return read()
        notes.append(f"{field} = {path}: there is no such file")
        return None
    if not hub_answers():
        problem = "there is no such path here, and the hub does not answer"
        notes.append(f"{field} = {path}: {problem}; {TRY_CACHE}")
        return None
    try:
        return read()
    except UserError as error:
        notes.append(str(error))
        return None


def missing_files(field: str, path: str) -> list[str]:
    """Notes on what the folder of a model lacks, where an earlier run or a download has yet to write it."""
    kinds = (("weights", ("*.safetensors",)), ("tokenizer", ("tokenizer*", "vocab*", "*.model")))
    missing = [
        (kind, patterns) for kind, patterns in kinds if not any(file for p in patterns for file in Path(path).glob(p))
    ]
    return [f"{field} = {path}: holds no {kind} ({patterns[0]})" for kind, patterns in missing]


@cache
def hub_answers() -> bool:
    """One request, for reading a data set would retry for half a minute. True where the hub must not be asked."""
    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception:  # whatever the HTTP library raises
        return False
    return True
