"""Files that a run adds to piece by piece and trusts when it goes on, each with a record of its sha256.

Before a file is changed, its record says what the file holds and what it will hold. A kill at any moment leaves one of
the two, or the old content and a part of the new rows, which is dropped. Whatever else lies there was altered, and is
refused. Records lie in ``checkpoint/`` beside the file and go with it when the run is done; they name the run, so that
a file and a record of another run are refused too. Files of a version that wrote none are taken as they are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from typing_extensions import NotRequired, TypedDict

from esi_ds.artifacts import (
    CHECKPOINTS,
    FileContent,
    append_jsonl,
    check_same_run,
    content_of_file,
    jsonl,
    parse_jsonl,
    run_id,
    write_json_atomic,
    write_text_atomic,
)
from esi_ds.errors import UserError
from esi_ds.reading import check_regular, check_type, read_json, reading

FIELD = "run.output_dir"
REMEDY = "delete it to have its content computed again, or give a new run.output_dir"
Row = TypeVar("Row", bound=Mapping[str, Any])


class Record(TypedDict):
    """What a file held before the last change, and what it holds after it."""

    before: FileContent
    after: FileContent
    run: NotRequired[str | None]  # the id of the run that wrote it; absent from records of earlier versions


def content_of(data: bytes) -> FileContent:
    """The content that these bytes are."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


NOTHING = content_of(b"")


def record_path(file: Path) -> Path:
    """Where the record of a file lies."""
    return file.parent / CHECKPOINTS / f"{file.name}.sha256.json"


def write_record(file: Path, before: FileContent, after: FileContent) -> None:
    """Record the file's current and next content; call before changing it."""
    path = record_path(file)
    path.parent.mkdir(exist_ok=True)
    write_json_atomic(path, {"before": before, "after": after, "run": run_id(file.parent)})


def read_record(file: Path) -> Record | None:
    """The file's record; None if it has none. Raises UserError for one that is damaged, or that another run wrote."""
    path, remedy = record_path(file), f"delete it and {file.name}, or give a new {FIELD}"
    if not path.exists():
        return None
    record = read_json(path, Record, FIELD, remedy)
    check_same_run(path, record.get("run"), remedy)
    return record


def altered(file: Path) -> UserError:
    """The error for a file that is not what its record says."""
    return UserError(FIELD, str(file), "was altered since the run wrote it (its sha256 differs)", REMEDY)


def check_file(file: Path) -> None:
    """Raise UserError unless a file that is written once, and at once, is what its record says."""
    record = read_record(file)
    with reading(FIELD, file, REMEDY):
        check_regular(file)
        content = content_of_file(file)
    if record is not None and content != record["after"]:
        raise altered(file)


def unrecorded(folder: Path) -> list[str]:
    """Names of the files of rows in a run folder that have no record, but for the curves, which decide nothing."""
    return sorted(
        file.name for file in folder.glob("*.jsonl") if file.name != "metrics.jsonl" and not record_path(file).exists()
    )


class Journal(Generic[Row]):
    """The rows of a JSONL file. One process reads and writes it; the first use reads what is there.

    kind: the rows' TypedDict. Reading raises UserError for rows that are not the ones written, or not of this kind.
    """

    def __init__(self, file: Path, kind: type[Row]):
        self.file, self._kind = file, kind
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._rows: list[Row] | None = None

    def read(self) -> list[Row]:
        """The rows, without any whose writing a kill cut short."""
        if self._rows is not None:
            return self._rows
        record = read_record(self.file)
        data = b""
        if self.file.exists():
            with reading(FIELD, self.file, REMEDY):
                check_regular(self.file)
                data = self.file.read_bytes()
        if record is not None and data:
            sound = _sound_part(data, record)
            if sound is None:
                raise altered(self.file)
            if len(sound) < len(data):
                os.truncate(self.file, len(sound))
            data = sound
        with reading(FIELD, self.file, REMEDY):
            rows: list[Row] = parse_jsonl(data)
            for row in rows:
                check_type(row, self._kind)
        if record is None and data:
            # Of an earlier version: torn lines go, and from now on the rows are on record.
            data = jsonl(rows).encode()
            write_record(self.file, content_of(self.file.read_bytes()), content_of(data))
            write_text_atomic(self.file, data.decode())
        self._set(data)
        self._rows = rows
        return rows

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows, on disk when this returns."""
        known, new = self.read(), list(rows)
        before, text = self._content(), jsonl(new).encode()
        self._digest.update(text)
        self._bytes += len(text)
        write_record(self.file, before, self._content())
        append_jsonl(self.file, new)
        known.extend(new)

    def replace(self, rows: Iterable[Row]) -> None:
        """Let the file hold these rows and no others."""
        new = list(rows)
        self.read()
        before, text = self._content(), jsonl(new)
        self._set(text.encode())
        self._rows = new
        if self._content() != before or not self.file.exists():
            write_record(self.file, before, self._content())
            write_text_atomic(self.file, text)

    def _set(self, data: bytes) -> None:
        self._digest, self._bytes = hashlib.sha256(data), len(data)

    def _content(self) -> FileContent:
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def _sound_part(data: bytes, record: Record) -> bytes | None:
    """What of a file's bytes is on record; None if it was altered."""
    before, after = record["before"], record["after"]
    if content_of(data) == after:
        return data
    size = before["bytes"]
    is_cut_short = size <= len(data) < max(size + 1, after["bytes"])
    return data[:size] if is_cut_short and content_of(data[:size]) == before else None
