"""Rows of a CSV, TSV, JSON, JSONL, parquet or text file, or of a hub data set (through ``datasets``)."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from esi_ds.errors import UserError

SUFFIXES = {".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt"}
# Options for reading a hub data set's files: WildJailbreak's are tab-separated, and "NA" in them is text.
HUB_OPTIONS: dict[str, dict[str, Any]] = {"allenai/wildjailbreak": {"delimiter": "\t", "keep_default_na": False}}
Row = dict[str, Any]  # a user's row, whatever its columns


def looks_like_file(path: str) -> bool:
    """A path rather than a hub id: it exists, has a data file's suffix, or starts like a path."""
    return Path(path).exists() or Path(path).suffix.lower() in SUFFIXES or path.startswith((".", "/", "~"))


def read_rows(path: str, field: str, *, name: str | None = None, split: str | None = None) -> list[Row]:
    """Every row, in order. ``field`` is the config key to name in an error; ``name`` a hub set's configuration."""
    if not looks_like_file(path):
        return _read_hub(path, field, name, split)
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(field, path, "is a folder", "give a file inside it")
    if not file.is_file():
        raise UserError(field, path, "there is no such file", "give a file, a hub id or a built-in name")
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(field, path, f"has the suffix {file.suffix!r}", f"use one of {', '.join(sorted(SUFFIXES))}")
    try:
        rows = _read_file(file)
    except (ValueError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(field, path, f"cannot be read: {error}", "check that its format matches its suffix") from error
    if not rows:
        raise UserError(field, path, "holds no rows", "give a file with data")
    return rows


def _read_file(file: Path) -> list[Row]:
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv"):
        # Not pandas, which reads a prompt "null" or "NA" as a missing value.
        with file.open(encoding="utf-8-sig", newline="") as opened:
            return list(csv.DictReader(opened, delimiter="\t" if suffix == ".tsv" else ","))
    if suffix == ".txt":
        return [{"prompt": line} for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    if suffix == ".parquet":
        from datasets import Dataset

        return Dataset.from_parquet(str(file)).to_list()
    text = file.read_text(encoding="utf-8-sig")
    return _json_lines(text) if suffix == ".jsonl" else _json_rows(text)


def _json_lines(text: str) -> list[Row]:
    """One object per line. Not ``splitlines``, which also splits at a U+2028 inside a text."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(rows[-1], dict):
                raise ValueError(f"line {number} is not an object")
    return rows


def _json_rows(text: str) -> list[Row]:
    """Rows of JSON text: a list of objects; an object with one such list, or with one under "data" or "rows"; an object
    of objects (PubMedQA); JSON lines."""
    try:
        content = json.loads(text)
    except ValueError:
        return _json_lines(text)
    if isinstance(content, dict):
        lists = [
            value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        named = [content[key] for key in ("data", "rows") if isinstance(content.get(key), list)]
        if named or len(lists) == 1:
            content = (named or lists)[0]
        elif content and all(isinstance(value, dict) for value in content.values()):
            content = [{"id": key, **value} for key, value in content.items()]
        else:
            content = [content]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError("its rows are not objects")
    return content


def with_input(question: str, extra: Any) -> str:
    """A question and the input it refers to, if any, as one turn; both stripped."""
    extra = extra.strip() if isinstance(extra, str) else ""
    return f"{question.strip()}\n\n{extra}" if extra else question.strip()


def is_text(value: Any) -> bool:
    """Whether this is a string that tokenizers accept: JSON can escape half of a surrogate pair, which they do not."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _read_hub(path: str, field: str, name: str | None, split: str | None) -> list[Row]:
    from datasets import load_dataset

    try:
        rows = load_dataset(path, name, split=split or "train", **HUB_OPTIONS.get(path, {}))
    except Exception as error:  # datasets passes on whatever its many back ends raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            field,
            path,
            f"cannot be loaded from the hub ({first_line})",
            "check the id, the split and the network, or give a local file",
        ) from error
    return rows.to_list()
