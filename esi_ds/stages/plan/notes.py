"""What a dry run goes without: data that is not there yet, or out of reach, becomes a note. What is wrong with data
that is there stays an error."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants, get_session

from esi_ds.config import BenignMix, Prompts, RowSource
from esi_ds.data.benchmarks import BUILT_IN, Kind
from esi_ds.data.conversations import find_columns
from esi_ds.data.prompts import load_prompts, load_responses
from esi_ds.data.rows import looks_like_file, read_rows
from esi_ds.errors import UserError

HUB_TIMEOUT_S = 5.0
Found = TypeVar("Found")


def count_prompts(section: Prompts, field: str, notes: list[str], kind: Kind | None = None) -> int | None:
    """Prompts of a set; None, and a note, where it cannot be reached. Raises UserError for what is wrong with it."""
    built_in = BUILT_IN.get(section.path)
    source, name = (built_in.source, built_in.config) if built_in else (section.path, None)
    split = section.split or (built_in.split if built_in else None)
    place = f"{field}.path"
    if _if_there(source, place, lambda: read_rows(source, place, name=name, split=split), notes) is None:
        return None
    found = load_prompts(section.path, section.split, section.column, section.limit, kind=kind, field=field)
    return len(found.prompts)


def count_responses(path: str, notes: list[str]) -> int | None:
    """Rows of ``data.responses``, likewise."""
    rows = _if_there(path, "data.responses", lambda: load_responses(path), notes)
    return None if rows is None else len(rows)


def count_rows(section: RowSource | BenignMix, field: str, notes: list[str]) -> int | None:
    """Rows that would be learnt, likewise: counted and their columns found, not read as conversations."""
    place = f"{field}.path"
    rows = _if_there(
        section.path, place, lambda: read_rows(section.path, place, name=section.name, split=section.split), notes
    )
    if rows is None:
        return None
    find_columns(rows, section.columns, f"{field}.columns")
    return len(rows[: getattr(section, "limit", None)])


def _if_there(path: str, field: str, read: Callable[[], Found], notes: list[str]) -> Found | None:
    """What ``read`` gives; None, and a note, where there is no such file, or the hub does not give it."""
    if looks_like_file(path):
        if Path(path).expanduser().exists():
            return read()
        notes.append(f"{field} = {path}: there is no such file")
        return None
    if not _hub_answers():
        notes.append(f"{field} = {path}: the hub does not answer; HF_HUB_OFFLINE=1 would look for a copy here")
        return None
    try:
        return read()
    except UserError as error:
        notes.append(str(error))
        return None


@cache
def _hub_answers() -> bool:
    """One request: reading a data set tries for half a minute. True where the hub is not to be asked anyway."""
    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception:  # whatever the library below raises
        return False
    return True
