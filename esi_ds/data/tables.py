"""Tables whose rows must not shift: CSV and TSV read strictly, with the line of a mistake; parquet, without a cache."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from esi_ds.reading import check_regular, read_text
from esi_ds.words import counted

MAX_DATA_BYTES = 1 << 32  # 4 GiB: rows are held in memory
PARQUET_ROWS = 64  # decoded at a time


class Line(NamedTuple):
    """One row of a CSV or TSV file. number: of the line it begins on, from 1."""

    number: int
    cells: list[str]


def read_data_text(file: Path, newline: str | None = None) -> str:
    """The text of a data file, without a byte order mark.

    newline: as of ``open``; "" keeps line ends. Raises OSError or ValueError, for a NUL character too: the file is
    UTF-16, binary or damaged.
    """
    text = read_text(file, MAX_DATA_BYTES, newline).removeprefix("\ufeff")
    position = text.find("\0")
    if position >= 0:
        raise ValueError(f"line {text.count(chr(10), 0, position) + 1} holds a NUL character: it is not UTF-8 text")
    return text


def read_lines(file: Path) -> list[Line]:
    """The rows of a CSV or TSV file, without empty lines. Raises OSError, or ValueError naming the line."""
    text = read_data_text(file, newline="")
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # 131,072 characters otherwise, a long prompt's length
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    # Not pandas, which reads a prompt "null" or "NA" as a missing value.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines: list[Line] = []
    number = 1
    try:
        for cells in reader:
            if cells:
                lines.append(Line(number, cells))
            number = reader.line_num + 1
    except csv.Error as error:
        is_open = "unexpected end of data" in str(error)
        problem = "a quote is opened and not closed" if is_open else f"{error} (quotes inside a cell are doubled)"
        raise ValueError(f"the row that begins on line {number}: {problem}") from error
    return lines


def table_rows(names: Sequence[str], lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Rows by column name. Raises ValueError, naming the line, where a row has more or fewer cells than columns."""
    for line in lines:
        if len(line.cells) != len(names):
            cells, columns = counted(len(line.cells), "cell"), counted(len(names), "column")
            problem = f"line {line.number} has {cells}, and the file has {columns}"
            raise ValueError(f"{problem}: quote cells that contain a delimiter or a line end")
    return [dict(zip(names, line.cells, strict=True)) for line in lines]


def read_table(file: Path) -> list[dict[str, Any]]:
    """Rows of a CSV or TSV file whose first line names the columns. Raises OSError or ValueError."""
    header, *lines = read_lines(file) or [Line(1, [])]
    names = [name.strip() for name in header.cells]
    # Spreadsheets write commas for columns that were used once and are empty.
    while names[1:] and not names[-1] and all(len(line.cells) == len(names) and not line.cells[-1] for line in lines):
        for cells in (names, *(line.cells for line in lines)):
            cells.pop()
    _check_delimiter(names, file.suffix.lower())
    check_names(names)
    return table_rows(names, lines)


def _check_delimiter(names: Sequence[str], suffix: str) -> None:
    """Raises ValueError for a header that is one name, with another format's delimiter inside: spreadsheets of many
    languages separate the cells of a .csv by semicolons."""
    others = ",;" if suffix == ".tsv" else ";\t"
    delimiter = next((other for other in others if len(names) == 1 and other in names[0]), None)
    if delimiter is not None:
        remedy = "save it with tabs, or as .csv with commas" if suffix == ".tsv" else "save it with commas, or as .tsv"
        raise ValueError(f"the names in its first line are separated by {delimiter!r}: {remedy}")


def read_parquet(file: Path) -> list[dict[str, Any]]:
    """Rows of one parquet file. Not ``datasets``, whose cache would answer for a file that has changed since.

    Raises OSError, ValueError or what pyarrow raises.
    """
    from pyarrow import parquet

    check_regular(file)
    rows: list[dict[str, Any]] = []
    size = 0
    with parquet.ParquetFile(file) as opened:
        check_names(opened.schema_arrow.names)
        # The sizes that the file states are of its encoding, in which a text that recurs stands once.
        for batch in opened.iter_batches(batch_size=PARQUET_ROWS):
            size += sum(_num_bytes(column) for column in batch.columns)
            if size > MAX_DATA_BYTES:
                raise ValueError(f"its rows take more than the {MAX_DATA_BYTES:,} bytes that are read")
            rows += batch.to_pylist()
    return rows


def _num_bytes(column: Any) -> int:
    """What a column of a parquet file takes when every row has its own value."""
    return int(getattr(column, "dictionary_decode", lambda: column)().nbytes)


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for two columns of one name: a row could keep one of them only."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two columns are named {twice!r}")
