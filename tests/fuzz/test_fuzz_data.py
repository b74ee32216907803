"""Readers of data: damaged, foreign and hostile files give rows or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from damage import VALUES, damaged_bytes, damaged_json, fuzz, outcome
from hypothesis import given
from hypothesis import strategies as st

from esi_ds.data.conversations import conversation, find_columns
from esi_ds.data.prompts import load_prompts, load_responses, recorded_scores
from esi_ds.data.rows import read_rows
from esi_ds.errors import UserError
from esi_ds.eval.task_rows import NEEDED, read_task_rows

ROWS: list[dict[str, Any]] = [
    {"prompt": "How?", "response": "So, \"quoted\".", "judge_score": 0.5},
    {"prompt": "Why\nnot, é?", "response": "No.", "judge_score": -1},
]  # fmt: skip
CHATS = [
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                  {"role": "assistant", "content": "Hello", "weight": 1}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
]  # fmt: skip
TABLE = 'prompt,response,label\n"How, ""so""?",No.,1\nWhy?,"a\nb",2\n'
FILES: dict[str, bytes] = {
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "chats.jsonl": "".join(json.dumps(row) + "\n" for row in CHATS).encode(),
    "rows.json": json.dumps({"data": ROWS}).encode(),
    "rows.csv": TABLE.encode(),
    "rows.tsv": TABLE.replace(",", "\t").encode(),
    "rows.txt": b"How?\nWhy?\n",
}


def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


FILES["rows.parquet"] = parquet()


def read_all(path: Path) -> None:
    """The file in every part that data may play."""
    rows = outcome(lambda: read_rows(str(path), "data.x"))
    assert isinstance(rows, UserError) or (rows and all(isinstance(row, dict) for row in rows))
    outcome(lambda: load_prompts(str(path)))
    responses = outcome(lambda: load_responses(str(path)))
    if not isinstance(responses, UserError):
        outcome(lambda: recorded_scores(responses, str(path)))
    if not isinstance(rows, UserError):
        columns = outcome(lambda: find_columns(rows, "auto", "tune.data"))
        for row in [] if isinstance(columns, UserError) else rows:
            outcome(lambda row=row: conversation(row, columns))
    for shape in NEEDED:
        outcome(lambda shape=shape: read_task_rows(shape, str(path), "eval.tasks.0.path"))


@pytest.mark.parametrize("name", FILES)
def test_sound_files_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert len(read_rows(str(tmp_path / name), "data.x")) == 2
    read_all(tmp_path / name)


@fuzz(250)
@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_damaged_files(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    file = tmp_path_factory.getbasetemp() / name
    file.write_bytes(data.draw(damaged_bytes(FILES[name])))
    read_all(file)


@fuzz(200)
@given(row=st.sampled_from([*ROWS, *CHATS]), suffix=st.sampled_from([".json", ".jsonl"]), data=st.data())
def test_damaged_rows(tmp_path_factory: pytest.TempPathFactory, row: dict, suffix: str, data: st.DataObject) -> None:
    file = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    file.write_text(data.draw(damaged_json(json.dumps(row))) + "\n" + json.dumps(row), errors="surrogatepass")
    read_all(file)


NAMES = ["prompt", "response", "question", "answer", "input", "options", "system", "history", "messages", "weight",
         "goal", "conversations", "instruction", "output", "context", "tools", "judge_score", "label", "choices",
         "text"]  # fmt: skip


@fuzz(200)
@given(row=st.dictionaries(st.sampled_from(NAMES), st.sampled_from(VALUES), min_size=1, max_size=5))
def test_rows_of_any_values(tmp_path_factory: pytest.TempPathFactory, row: dict[str, str]) -> None:
    file = tmp_path_factory.getbasetemp() / "values.jsonl"
    body = ", ".join(f'"{name}": {value}' for name, value in row.items())
    file.write_text('{"prompt": "a", "response": "b"}\n{' + body + "}\n", errors="surrogatepass")
    read_all(file)
    file.write_text("{" + body + "}\n", errors="surrogatepass")
    read_all(file)


@fuzz(150)
@given(suffix=st.sampled_from([".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet"]), content=st.binary(max_size=80))
def test_files_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / f"any{suffix}"
    file.write_bytes(content)
    read_all(file)


@pytest.mark.parametrize(
    "path", ["./a\0b.csv", "~nouser/x.csv", "/" + "x" * 5000 + ".json", ".", "/dev/zero", "./\ud800.csv"]
)
def test_paths_that_are_no_file(path: str) -> None:
    assert isinstance(outcome(lambda: read_rows(path, "data.x")), UserError)
