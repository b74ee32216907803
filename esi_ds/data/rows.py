"""Rows of a CSV, TSV, JSON, JSONL, parquet or text file, or of a hub data set (through ``datasets``)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from esi_ds.data.columns import ATTACKS, CHATS, HISTORY, QUESTIONS, WHOLES
from esi_ds.data.hub_sets import load_once
from esi_ds.data.tables import read_data_text, read_parquet, read_table
from esi_ds.errors import UserError
from esi_ds.reading import parse_json, reading

TABLES = {".csv", ".tsv"}
OF_A_ROW = {*QUESTIONS, *ATTACKS, *CHATS, "behavior", "turns"}  # columns of a question
SUFFIXES = {*TABLES, ".json", ".jsonl", ".parquet", ".txt"}
# Options for reading a hub data set's files: WildJailbreak's are tab-separated, and "NA" in them is text.
HUB_OPTIONS: dict[str, dict[str, Any]] = {"allenai/wildjailbreak": {"delimiter": "\t", "keep_default_na": False}}
Row = dict[str, Any]  # a user's row, whatever its columns


def looks_like_file(path: str) -> bool:
    """A path rather than a hub id: it exists, has a data file's suffix, or starts like a path."""
    return exists(path) or Path(path).suffix.lower() in SUFFIXES or path.startswith((".", "/", "~"))


def exists(path: str) -> bool:
    """Whether there is such a file or folder. False, as of ``os.path``, for what cannot name one (a name too long)."""
    return os.path.exists(os.path.expanduser(path))


def read_rows(path: str, field: str, *, name: str | None = None, split: str | None = None) -> list[Row]:
    """Every row, in order. ``field`` is the config key to name in an error; ``name`` a hub set's configuration."""
    if not looks_like_file(path):
        return _read_hub(path, field, name, split)
    file = data_file(path, field)
    for key, value in (("name", name), ("split", split)):
        if value is not None:
            problem = f"is for data sets of the hub, and {path} is a file"
            key = f"{field.removesuffix('path')}{key}"
            raise UserError(key, value, problem, f"leave it out, or set {key}=null")
    with reading(field, path, "check that its format matches its suffix"):
        rows = _read_file(file)
    if not rows:
        raise UserError(field, path, "holds no rows", "give a file with data")
    return rows


def data_file(path: str, field: str) -> Path:
    """The file to read. Raises UserError naming ``field`` for a folder, a missing file or an unknown suffix."""
    file = Path(os.path.expanduser(path))
    if not exists(path):
        raise UserError(field, path, "there is no such file", "give a file, a hub id or a built-in name")
    if file.is_dir():
        raise UserError(field, path, "is a folder", "give a file inside it")
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(field, path, f"has the suffix {file.suffix!r}", f"use one of {', '.join(sorted(SUFFIXES))}")
    return file


def _read_file(file: Path) -> list[Row]:
    suffix = file.suffix.lower()
    if suffix in TABLES:
        return read_table(file)
    if suffix == ".parquet":
        return read_parquet(file)
    text = read_data_text(file)
    if suffix == ".txt":
        return [{"prompt": line} for line in text.split("\n") if line.strip()]
    return _json_lines(text) if suffix == ".jsonl" else _json_rows(text)


def _json_lines(text: str) -> list[Row]:
    """One object per line. Not ``splitlines``, which also splits at a U+2028 inside a text."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(parse_json(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(rows[-1], dict):
                raise ValueError(f"line {number} is not an object")
    return rows


def _json_rows(text: str) -> list[Row]:
    """Rows of JSON text: a list of objects; an object with one such list, or with one under "data" or "rows"; an object
    of objects (PubMedQA); JSON lines."""
    try:
        content = parse_json(text)
    except json.JSONDecodeError:
        if text.lstrip().startswith("["):  # a torn list: its lines are not rows
            raise
        return _json_lines(text)
    if isinstance(content, dict):
        content = _wrapped_rows(content)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError("its rows are not objects")
    return content


def _wrapped_rows(content: dict[str, Any]) -> Any:
    """The rows of an object that is more than a list.

    Raises ValueError where it has columns, or two lists of rows: of objects that are alike, or under ``data`` and
    ``rows``.
    """
    if _is_row(content):
        return [content]
    named = {key: content[key] for key in ("data", "rows") if isinstance(content.get(key), list)}
    if not named and is_by_column(content):
        raise ValueError("it holds columns: write a list of objects, one a row (in pandas, orient='records')")
    lists = {key: value for key, value in content.items() if isinstance(value, list) and _has_objects(value)}
    name, rows = next(iter((named or lists).items()), ("", []))
    others = [key for key in {**named, **lists} if key != name and (key in named or _are_alike(rows, lists[key]))]
    if others:
        raise ValueError(f"it has rows under {' and under '.join([name, *others])}: keep one list of them")
    if named or len(lists) == 1:
        return rows
    if content and all(isinstance(value, dict) for value in content.values()):
        return [{"id": key, **value} for key, value in content.items()]
    return [content] if content else []


def is_by_column(content: dict[str, Any]) -> bool:
    """Whether an object holds a list of texts, or an object of them by number, under the name of a question's column,
    as ``datasets``, polars and pandas write a table."""
    columns = [value for key, value in content.items() if key.strip().lower() in (*QUESTIONS, *ATTACKS)]
    return any(
        (isinstance(column, list) and all(cell is None or isinstance(cell, str) for cell in column))
        or (isinstance(column, dict) and bool(column) and all(map(str.isdigit, column)))
        for column in columns
    )


def _are_alike(rows: list[Any], others: list[Any]) -> bool:
    """Whether the objects of another list may be rows too: they have the column of a question or a chat in common with
    the rows, or the same names, which are not those of a turn."""
    if not _has_objects(rows):
        return False
    names, other_names = ({name.strip().lower() for name in first} for first in (rows[0], others[0]))
    shares_question = bool(names & other_names & {*QUESTIONS, *ATTACKS, *WHOLES})
    return shares_question or (names == other_names and names.isdisjoint(("role", "from")))


def _has_objects(values: list[Any]) -> bool:
    return bool(values) and isinstance(values[0], dict)


def _is_row(content: dict[str, Any]) -> bool:
    """Whether an object is one row, and no list in it is one of rows: it has a question that is a text or a chat, and
    only earlier turns, and lists whose objects hold no question of their own, beside it."""
    values = {str(key).strip().lower(): value for key, value in content.items()}
    if any(isinstance(values.get(key), list) for key in ("data", "rows")):
        return False
    others = [value for key, value in values.items() if key not in {*OF_A_ROW, *HISTORY} and isinstance(value, list)]
    firsts = [value[0] for value in others if value and isinstance(value[0], dict)]
    if any(OF_A_ROW & {str(key).lower() for key in first} for first in firsts):
        return False
    return any(isinstance(values.get(key), str) or _is_chat(values.get(key)) for key in OF_A_ROW)


def _is_chat(value: Any) -> bool:
    """Whether a value is a list of turns."""
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns)


def _read_hub(path: str, field: str, name: str | None, split: str | None) -> list[Row]:
    import datasets

    remedy = "check the id, the split and the network, or give a local file"
    if datasets.config.HF_HUB_OFFLINE:
        remedy = (
            "load it once where there is a network, as --dry-run does: with HF_HUB_OFFLINE only what datasets has "
            "prepared is read, not what hf download has fetched; or give a local file"
        )
    with reading(field, path, remedy, "there is no such file here, and it cannot be loaded from the hub"):
        options = HUB_OPTIONS.get(path, {})
        rows: list[Row] = load_once(datasets.load_dataset, path, name, split=split or "train", **options).to_list()
    return rows
