"""Files that an interrupted run trusts: what a kill may leave is read, whatever else was changed is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from esi_ds import journal, reading
from esi_ds.artifacts import RunFolder, jsonl
from esi_ds.errors import UserError
from esi_ds.journal import Journal, check_file, content_of, record_path, unrecorded, write_record
from esi_ds.stages.evaluate.ledgers import EvalLedgers
from esi_ds.stages.ledger import Ledger


class AnswerRow(TypedDict):
    index: int
    response: str


ROWS: list[AnswerRow] = [{"index": index, "response": f"ä answer\u2028{index}\n"} for index in range(6)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Six rows in three batches."""
    rows = Journal(tmp_path / "answers.jsonl", AnswerRow)
    for first in (0, 2, 4):
        rows.append(ROWS[first : first + 2])
    return tmp_path / "answers.jsonl"


def read(file: Path) -> list[AnswerRow]:
    return Journal(file, AnswerRow).read()


def test_what_was_written_is_read(file: Path) -> None:
    assert read(file) == ROWS and len(file.read_bytes().split(b"\n")) == 7
    again = Journal(file, AnswerRow)
    again.append([{"index": 6, "response": ""}])
    assert read(file) == again.read() == [*ROWS, {"index": 6, "response": ""}]
    again.replace(ROWS[::-1])
    assert read(file) == ROWS[::-1]
    assert unrecorded(file.parent) == []


def test_every_row_is_checked_by_one_validator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation has millions of rows, and a validator takes half a millisecond to build."""

    class VerdictRow(TypedDict):
        index: int
        verdict: str

    built = []
    monkeypatch.setattr(reading, "TypeAdapter", lambda kind: built.append(kind) or TypeAdapter(kind))
    rows = [{"index": index, "verdict": "safe"} for index in range(2000)]
    file, other = tmp_path / "verdicts.jsonl", tmp_path / "others.jsonl"
    file.write_text(jsonl(rows))
    assert Journal(file, VerdictRow).read() == rows
    assert built.count(VerdictRow) == 1
    other.write_text(jsonl([*rows, {"index": "2000", "verdict": "safe"}]))
    with pytest.raises(UserError, match=r"others\.jsonl: cannot be read \(index: "):
        Journal(other, VerdictRow).read()
    assert built.count(VerdictRow) == 1


def lines(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True)


ALTERED = {
    "a changed row": lambda rows: [rows[0].replace(b"answer", b"Answer"), *rows[1:]],
    "a changed last row": lambda rows: [*rows[:-1], rows[-1].replace(b"answer", b"Answer")],
    "one flipped bit": lambda rows: [rows[0][:20] + bytes([rows[0][20] ^ 1]) + rows[0][21:], *rows[1:]],
    "a deleted row": lambda rows: [rows[0], *rows[2:]],
    "reordered rows": lambda rows: [rows[1], rows[0], *rows[2:]],
    "a foreign row": lambda rows: [*rows, b'{"index": 6, "response": "x"}\n'],
    "a foreign row amid the others": lambda rows: [*rows[:3], b'{"index": 9, "response": "x"}\n', *rows[3:]],
    "a row twice": lambda rows: [*rows, rows[0]],
    "another layout": lambda rows: [json.dumps(json.loads(row), indent=None).encode() + b"\n" for row in rows],
    "an empty line": lambda rows: [b"\n", *rows],
    "two batches lost": lambda rows: rows[:3],
}


@pytest.mark.parametrize("case", ALTERED)
def test_altered_rows_are_refused(case: str, file: Path) -> None:
    file.write_bytes(b"".join(ALTERED[case](lines(file))))
    altered = file.read_bytes()
    with pytest.raises(UserError, match=r"answers\.jsonl: was altered.*delete it"):
        read(file)
    with pytest.raises(UserError, match="was altered"):
        Ledger(file, ("index",), AnswerRow)
    assert file.read_bytes() == altered


def test_every_moment_of_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record, then any part of the rows: what was whole before stays, and the rest can be added again."""
    file = tmp_path / "answers.jsonl"
    Journal(file, AnswerRow).append(ROWS[:2])
    before = file.read_bytes()
    monkeypatch.setattr(journal, "append_jsonl", lambda *_: None)
    Journal(file, AnswerRow).append(ROWS[2:4])
    record = record_path(file).read_text()
    monkeypatch.undo()
    whole = before + b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS[2:4])
    for size in range(len(before), len(whole) + 1):
        file.write_bytes(whole[:size])
        record_path(file).write_text(record)
        rows = Journal(file, AnswerRow)
        assert rows.read() == ROWS[: 4 if size == len(whole) else 2]
        rows.append(ROWS[4:])
        assert read(file) == rows.read()


def test_a_kill_while_all_rows_are_replaced(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "write_text_atomic", lambda *_: None)
    for rows in (ROWS[::-1], ROWS[:1], [*ROWS, *ROWS]):
        Journal(file, AnswerRow).replace(rows)
        assert read(file) == ROWS
    monkeypatch.undo()
    file.unlink()  # whoever deletes it has its rows computed again
    assert read(file) == []


def test_rows_of_an_earlier_version_are_taken_as_they_are_and_recorded(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text('{"index": 0, "response": "a"}\n{"index": 1, "resp\n{"index": 2, "response": "c"}\n{"ind')
    assert unrecorded(tmp_path) == ["answers.jsonl"]
    expected = [{"index": 0, "response": "a"}, {"index": 2, "response": "c"}]
    assert read(file) == expected and read(file) == expected and unrecorded(tmp_path) == []
    file.write_text(file.read_text().replace("a", "b"))
    with pytest.raises(UserError, match="was altered"):
        read(file)


@pytest.mark.parametrize(
    "content", ["[1]\n", '{"index": "0", "response": "a"}\n', '{"response": "a"}\n', "[" * 100_000 + "\n", "3\n"]
)
def test_foreign_rows_without_a_record(content: str, tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"answers\.jsonl"):
        read(tmp_path / "answers.jsonl")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"before": 1, "after": 2}', '{"before": {}, "after": {}}'])
def test_a_damaged_record(content: str, file: Path) -> None:
    record_path(file).write_text(content)
    with pytest.raises(UserError, match=r"answers\.jsonl\.sha256\.json"):
        read(file)


def test_a_file_that_is_written_at_once(tmp_path: Path) -> None:
    file = tmp_path / "routing.before.safetensors"
    file.write_bytes(b"choices")
    check_file(file)  # of an earlier version
    write_record(file, journal.NOTHING, content_of(b"choices"))
    check_file(file)
    file.write_bytes(b"choiceS")
    with pytest.raises(UserError, match="was altered"):
        check_file(file)


@pytest.mark.parametrize("below", [".", "checkpoint"])
def test_rows_of_another_run_are_refused(below: str, tmp_path: Path) -> None:
    """Copied with their record, from a run of the same model."""
    files = {name: tmp_path / name / below / "answers.jsonl" for name in ("mine", "other")}
    for name, file in files.items():
        file.parent.mkdir(parents=True)
        RunFolder(str(tmp_path / name)).identify()
        Journal(file, AnswerRow).append(ROWS[:2] if name == "mine" else ROWS)
        assert read(file)
    for path in (files["other"], record_path(files["other"])):
        shutil.copy(path, tmp_path / "mine" / path.relative_to(tmp_path / "other"))
    with pytest.raises(
        UserError, match=r"answers\.jsonl\.sha256\.json: belongs to another run; delete it and answers\.jsonl"
    ):
        read(files["mine"])
    with pytest.raises(UserError, match="belongs to another run"):
        check_file(files["mine"])
    assert read(files["other"]) == ROWS


def test_rows_of_an_earlier_version_go_on(file: Path) -> None:
    """Their record names no run."""
    assert json.loads(record_path(file).read_text())["run"] is None
    stored = json.loads(record_path(file).read_text())
    record_path(file).write_text(json.dumps({key: stored[key] for key in ("before", "after")}))
    RunFolder(str(file.parent)).identify()
    rows = Journal(file, AnswerRow)
    assert rows.read() == ROWS
    rows.append([{"index": 6, "response": ""}])
    assert len(read(file)) == 7 and json.loads(record_path(file).read_text())["run"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"id": 3}'])
def test_a_damaged_identity(content: str, file: Path) -> None:
    (file.parent / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json"):
        Journal(file, AnswerRow).append(ROWS[:1])


def test_what_was_said_of_answers_goes_with_them(tmp_path: Path) -> None:
    """Who deletes the answers of an evaluation has them given again, and they may be others."""
    key = {"set": "bad", "index": 0}
    ledgers = EvalLedgers.open(tmp_path, has_divergences=True)
    answer = {"prompt": "p", "response": "r", "excluded": None}
    ledgers.answers.add([{"model": model, **key, **answer} for model in ("base", "m")])  # type: ignore[typeddict-item]
    ledgers.surprises.add([{"model": "m", **key, "surprise": 1.0}])  # type: ignore[typeddict-item]
    verdict = {"judge": "j", "model": "m", **key, "unsafe": True, "score": None, "reason": None}
    ledgers.verdicts.add([verdict])  # type: ignore[list-item]
    divergence = {"model": "m", **key, "divergence": 0.5, "tokens": 3, "reason": None}
    ledgers.divergences.add([divergence])  # type: ignore[union-attr,list-item]

    def counts() -> list[int]:
        opened = EvalLedgers.open(tmp_path, has_divergences=True)
        return [len(opened.surprises.rows), len(opened.verdicts.rows), len(opened.divergences.rows)]  # type: ignore[union-attr]

    assert counts() == [1, 1, 1]
    (tmp_path / "answers.jsonl").unlink()
    assert counts() == [0, 0, 0] and (tmp_path / "verdicts.jsonl").read_text() == ""
    assert counts() == [0, 0, 0]
