"""Files of rows: each row keeps its cells, or the message names the line; nothing read ends in a traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from esi_ds.data.chat import load_tokenizer
from esi_ds.data.prompts import load_prompts, load_responses
from esi_ds.data.rows import read_rows
from esi_ds.errors import UserError
from esi_ds.eval.task_rows import read_task_rows
from esi_ds.models.folder import ModelSource, check_weights, load_model_config
from esi_ds.stages.plan.notes import count_responses


def write(folder: Path, name: str, content: str | bytes) -> str:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('goal,target\nfirst,x\n"second\u201d,x\nthird,x\nfourth,x\n', "line 3: a quote is opened and not closed"),
        ('goal,target\na,x\n"b\n,x\n"c",x\nd,x\n', "line 3: "),  # the quote ends at the next row's
        ('goal,target\n"b" he said,x\n', "line 2: .*doubled"),
        ("goal,target\na,x\nSteal, then run,x\n", "line 3 has 3 cells, and the file has 2 columns"),
        ('goal,target\n"a\nb",x\nSteal, then run,x\n', "line 4 has 3 cells"),
        ("goal,target\na,x\nb\n", "line 3 has 1 cell, and the file has 2 columns"),
        ("goal,goal\na,b\n", "two columns are named 'goal'"),
        ("goal,,\na,,x\n", "two columns are named ''"),
        ("goal,target,,\na,x\n", "two columns are named ''"),
        ("goal, goal \na,b\n", "two columns are named 'goal'"),
        ("goal,target\nb,x\0y\n", "line 2 holds a NUL"),
        ("goal,target\n", "holds no rows"),
        ("", "holds no rows"),
        ("\n\n", "holds no rows"),
        ("goal,target\na,b\n".encode("utf-16"), "cannot be read"),
        ("goal,target\na,caf\xe9\n".encode("latin-1"), "cannot be read"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_rows_that_would_shift_name_the_line(text: str | bytes, problem: str, suffix: str, tmp_path: Path) -> None:
    if suffix == "tsv":
        text = text.replace(",", "\t") if isinstance(text, str) else text.replace(b",", b"\t")
    path = write(tmp_path, f"rows.{suffix}", text)
    with pytest.raises(UserError, match=problem) as raised:
        load_prompts(path)
    assert raised.value.field == "data.prompts.path" and raised.value.value == path


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.csv", "prompt;category\nFirst, pick a lock;theft\n", "separated by ';': save it with commas, or as .tsv"),
        ("a.csv", "prompt\tcategory\nPick a lock\ttheft\n", r"separated by '\\t': save it with commas"),
        ("a.tsv", "prompt,category\nPick a lock,theft\n", "separated by ',': save it with tabs"),
        ("a.csv", "prompt\nFirst, pick a lock\n", "line 2 has 2 cells, and the file has 1 column"),
    ],
)
def test_another_delimiter_is_named(name: str, text: str, problem: str, tmp_path: Path) -> None:
    """Whole rows were prompts of a column ``prompt;category``."""
    for column in ("auto", text.splitlines()[0]):
        with pytest.raises(UserError, match=problem):
            load_prompts(write(tmp_path, name, text), column=column)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffgoal,target\na,x\nb,y\n",
        "goal,target\r\na,x\r\nb,y\r\n",
        "goal,target\ra,x\rb,y\r",
        "goal,target\n\na,x\n\nb,y",
        ' goal ,target\n"a",x\n"b",y\n',
        "Goal,TARGET\na,x\nb,y\n",
        "goal,target,,\na,x,,\nb,y,,\n",
        "goal,target,\na,x,\nb,y,\n",
    ],
)
def test_tables_as_programs_write_them(text: str, tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path, "rows.csv", text)).prompts == ("a", "b")
    tabs = write(tmp_path, "rows.tsv", text.replace(",", "\t"))
    assert load_prompts(tabs).prompts == ("a", "b")


def test_cells_keep_their_text(tmp_path: Path) -> None:
    shots = "many shots " * 12_000  # above csv's limit of 131,072 characters
    text = f'goal,target\n{shots},x\n"a\r\nb, ""c""\rd",x\n'
    assert read_rows(write(tmp_path, "rows.csv", text), "f") == [
        {"goal": shots, "target": "x"},
        {"goal": 'a\r\nb, "c"\rd', "target": "x"},
    ]


def test_task_rows_without_a_header_keep_every_cell(tmp_path: Path) -> None:
    rows = read_task_rows("mmlu", write(tmp_path, "law_test.csv", 'Q,4,4,3,"2, or 1",A\nR,1,2,3,4,B\n'), "f")
    assert [row["choices"] for row in rows] == [["4", "4", "3", "2, or 1"], ["1", "2", "3", "4"]]
    with pytest.raises(UserError, match="line 2 has 5 cells"):
        read_task_rows("mmlu", write(tmp_path, "x_test.csv", "Q,4,4,3,2,A\nR,1,2,3,B\n"), "f")
    with pytest.raises(UserError, match="1.5 is not an answer"):
        read_task_rows("ag_news", write(tmp_path, "n.jsonl", '{"text": "a", "label": 1.5}\n'), "f")


def test_a_parquet_file_is_read_and_not_a_cache_of_it(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    for prompts in (["old", "older"], ["new", "newer"]):
        parquet.write_table(pyarrow.table({"prompt": prompts}), file)
        os.utime(file, (1_000_000_000, 1_000_000_000))
        assert load_prompts(str(file)).prompts == tuple(prompts)


def test_parquet_files_that_hold_no_rows_or_too_few_columns(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    tables = {
        "holds no rows": pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}),
        "two columns are named 'prompt'": pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["prompt", "prompt"]),
        "the prompt is not a text": pyarrow.table({"prompt": [b"bytes"]}),
    }
    for problem, table in tables.items():
        parquet.write_table(table, file)
        with pytest.raises(UserError, match=problem):
            load_prompts(str(file))
    whole = file.read_bytes()
    for damaged in (whole[:-5], whole[: len(whole) // 2], b"PAR1", b""):
        with pytest.raises(UserError, match=r"cannot be read|holds no rows"):
            load_prompts(write(tmp_path, "torn.parquet", damaged))


def test_a_folder_named_like_a_partition_adds_no_column(tmp_path: Path) -> None:
    (tmp_path / "prompt=x").mkdir()
    file = tmp_path / "prompt=x" / "rows.parquet"
    parquet.write_table(pyarrow.table({"goal": ["a"]}), file)
    assert read_rows(str(file), "f") == [{"goal": "a"}]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"prompt": "a", "prompt": "b"}', "'prompt' appears twice"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n{"pro', "line 3"),
        ('{"prompt": "a"}\n["b"]', "line 2 is not an object"),
        ('{"prompt": "a", "n": ' + "9" * 5000 + "}", "4300 digits"),
        ('{"prompt": "a", "n": NaN}', "NaN"),
        ('{"prompt": ' + "[" * 100_000, "recursion"),
        ('{"a": ' * 50_000, "recursion"),
        ('{"prompt": "a\0b"}', "NUL"),
        ("3", "not an object|rows are not objects"),
    ],
    ids=range(9),
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_that_is_torn_or_hostile(text: str, problem: str, suffix: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem) as raised:
        load_prompts(write(tmp_path, f"rows.{suffix}", text))
    assert len(str(raised.value)) < 600


def test_torn_lists_and_two_lists_of_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    for text in (json.dumps(rows)[:-8], json.dumps(rows, indent=1)[:-4], json.dumps({"data": rows, "rows": rows[:1]})):
        with pytest.raises(UserError, match=r"data\.prompts\.path"):
            load_prompts(write(tmp_path, "rows.json", text))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "How?", "history": [{"prompt": "earlier", "response": "x"}]},
        {"instruction": "How?", "source": [{"text": "from here"}], "output": "So."},
        {"messages": [{"role": "user", "content": "How?"}]},
        {"Prompt": [{"role": "user", "content": "How?"}], "response": "So."},
    ],
)
def test_an_object_that_is_a_row(row: dict, tmp_path: Path) -> None:
    for suffix in (".json", ".jsonl"):
        file = tmp_path / f"one{suffix}"
        file.write_text(json.dumps(row))
        assert read_rows(str(file), "f") == [row]


def test_two_chats_of_one_row_are_no_two_lists_of_rows(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "How?"}]
    row = {"conversation_a": turns, "conversation_b": turns}
    file = tmp_path / "row.json"
    file.write_text(json.dumps(row))
    assert read_rows(str(file), "f") == [row]


@pytest.mark.parametrize(
    "wrapped",
    [
        {"prompt": "template", "data": "ROWS"},
        {"query": "q", "rows": "ROWS"},
        {"goal": "x", "jailbreaks": "ROWS"},
        {"conversations": "ROWS"},
        {"version": 1, "questions": "ROWS"},
        {"data": "ROWS", "categories": [{"id": 1, "name": "violence"}]},
        {"query": ["llama"], "rows": "ROWS"},
    ],
)
def test_an_object_around_rows(wrapped: dict, tmp_path: Path) -> None:
    rows = [{"id": 1, "messages": [{"role": "user", "content": "How?"}]}, {"id": 2, "messages": []}]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({key: rows if value == "ROWS" else value for key, value in wrapped.items()}))
    assert read_rows(str(file), "f") == rows


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "holds no rows"),
        ('{"prompt": ["a b", "c"]}', "it holds columns: write a list of objects"),
        ('{"Goal": ["a b", null], "target": ["x", "y"]}', "it holds columns"),
        ('{"prompt": {"0": "a", "1": "b"}, "n": {"0": 1, "1": 2}}', "it holds columns"),
    ],
)
def test_tables_written_by_column(text: str, problem: str, tmp_path: Path) -> None:
    """The first list was taken for test cases of HarmBench's behaviour "prompt"."""
    with pytest.raises(UserError, match=problem) as raised:
        load_prompts(write(tmp_path, "rows.json", text))
    assert raised.value.field == "data.prompts.path"


def test_json_lines_as_programs_write_them(tmp_path: Path) -> None:
    text = '\ufeff{"prompt": "a"}\r\n\r\n{"prompt": "a", "n": 1e300}\r\n  \r\n{"prompt": "b"}'
    assert load_prompts(write(tmp_path, "rows.jsonl", text)).prompts == ("a", "a", "b")  # no prompt is merged


NO_FILES = ["~nouser/rows.jsonl", "x" * 300 + ".csv", "/" + "y/" * 3000 + "rows.json", "a\0b.txt"]


@pytest.mark.parametrize("name", NO_FILES, ids=range(len(NO_FILES)))
def test_paths_that_name_no_file(name: str) -> None:
    with pytest.raises(UserError, match=r"data\.prompts\.path.*there is no such file"):
        load_prompts(name)
    with pytest.raises(UserError, match=r"data\.responses"):
        load_responses(name)
    notes: list[str] = []
    assert count_responses(name, None, notes) is None and "no such file" in notes[0]


@pytest.mark.parametrize("name", [*NO_FILES, ""], ids=range(len(NO_FILES) + 1))
def test_paths_that_name_no_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for read in (load_model_config, load_tokenizer):
        with pytest.raises(UserError, match=r"judge\.path"):
            read(ModelSource(name, field="judge.path"))
    if name:  # "" is this folder
        check_weights(ModelSource(name))  # left to what reads the configuration


def test_offline_a_data_set_that_was_only_downloaded_is_told_how_to_be_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub/datasets--org--set/snapshots/x/data.jsonl"
    snapshot.parent.mkdir(parents=True)
    write(snapshot.parent, snapshot.name, '{"prompt": "a"}\n')
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    with pytest.raises(UserError, match=r"x = org/set: .*; load it once where there is a network, as --dry-run does"):
        read_rows("org/set", "x")


def test_the_split_of_a_file_is_not_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.txt", "a\nb\n")
    for name in (path, "examples/harmful"):
        with pytest.raises(UserError, match=r"data\.prompts\.split = test: is for data sets of the hub"):
            load_prompts(name, split="test")
    with pytest.raises(UserError, match=r"tune\.data\.name = main: .*; leave it out, or set tune\.data\.name=null"):
        read_rows(path, "tune.data.path", name="main")


@pytest.mark.parametrize("encoded", [False, True])
def test_a_parquet_file_is_as_large_as_its_rows(encoded: bool, tmp_path: Path, monkeypatch) -> None:
    """A text that recurs stands once in the file: 5 GB may be a file of 500 bytes."""
    prompts = pyarrow.array(["word " * 2000] * 500)
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"prompt": prompts.dictionary_encode() if encoded else prompts}), file)
    assert file.stat().st_size < 50_000 and len(load_prompts(str(file)).prompts) == 500
    monkeypatch.setattr("esi_ds.data.tables.MAX_DATA_BYTES", 10**6)
    with pytest.raises(UserError, match="its rows take more than the 1,000,000 bytes that are read"):
        load_prompts(str(file))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "txt", "json", "jsonl", "parquet"])
def test_a_pipe_is_not_waited_for(suffix: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"rows.{suffix}")
    with pytest.raises(UserError, match="not a regular file"):
        load_prompts(str(tmp_path / f"rows.{suffix}"))


@pytest.mark.parametrize("score", ["1e300", "-1e39", "1e999", "true", "9" * 400, '"safe"'])
def test_scores_that_are_no_numbers_of_a_judge(score: str, tmp_path: Path) -> None:
    from esi_ds.data.prompts import recorded_scores

    path = write(tmp_path, "r.jsonl", f'{{"prompt": "a", "response": "b", "judge_score": {score}}}\n')
    with pytest.raises(UserError, match="row 1 has no number for 'judge_score'"):
        recorded_scores(load_responses(path), path)
