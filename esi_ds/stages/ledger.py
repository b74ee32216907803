"""Results that a run produces piece by piece, each only once: rows of a JSONL file, each with a key of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic

from esi_ds.journal import Journal, Row
from esi_ds.zero import runtime

Key = tuple[Any, ...]


class Ledger(Generic[Row]):
    """Rows by key, the same on every rank; rank 0 appends them to the file as they come.

    fields: the columns that make up the key of a row, those of them that it has. kind: the rows' TypedDict. A line torn
    by a kill is dropped when the file is read.
    """

    def __init__(self, file: Path, fields: tuple[str, ...], kind: type[Row]):
        """Rank 0 reads: on a shared file system another rank may see an older file. One broadcast.

        Raises UserError, on every rank, for rows that the run did not write.
        """
        self.file, self.fields = file, fields
        self._journal = Journal(file, kind)
        self.rows: dict[Key, Row] = {self.key(row): row for row in runtime.from_main(self._journal.read)}

    def key(self, row: Mapping[str, Any]) -> Key:
        """What identifies a row."""
        return tuple(row[field] for field in self.fields if field in row)

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows that are the same on every rank. Rows whose key is known are ignored."""
        new = {self.key(row): row for row in rows}
        new = {key: row for key, row in new.items() if key not in self.rows}
        self.rows.update(new)
        if new and runtime.is_main():
            self._journal.append(new.values())

    def share(self, rows: Iterable[Row]) -> None:
        """Add the rows of all ranks; ``rows`` are those of this rank. One gather."""
        self.add(row for part in runtime.gather_objects(list(rows)) for row in part)

    def keep(self, is_wanted: Callable[[Row], bool]) -> None:
        """Drop the other rows, here and in the file. is_wanted: says the same on every rank."""
        kept = {key: row for key, row in self.rows.items() if is_wanted(row)}
        if len(kept) < len(self.rows):
            self.rows = kept
            if runtime.is_main():
                self._journal.replace(kept.values())

    def sort(self, order: Iterable[Key]) -> list[Row]:
        """The rows in this order. The file is rewritten in it, so that it does not depend on batches and ranks."""
        ordered = [self.rows[key] for key in order if key in self.rows]
        if runtime.is_main():
            self._journal.replace(ordered)
        return ordered
