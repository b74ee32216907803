"""Readers of artifacts: damaged, foreign and hostile files end in one message, and nothing is read without a bound."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from esi_ds.errors import Interrupted, UserError
from esi_ds.reading import check_type, is_bare_name, parse_json, read_index, read_json, read_text, reading


@pytest.mark.parametrize(
    "error",
    [ValueError("a\nb"), KeyError("x"), RecursionError(), OverflowError("too large"), MemoryError(), OSError(5, "io")],
)
def test_any_exception_becomes_one_message(error: Exception) -> None:
    with pytest.raises(UserError) as raised, reading("data.prompts.path", Path("a.csv"), "look at it"):
        raise error
    assert (raised.value.field, raised.value.value, raised.value.remedy) == ("data.prompts.path", "a.csv", "look at it")
    assert raised.value.problem.startswith("cannot be read (") and "\n" not in str(raised.value)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [UserError("a", 1, "b", "c"), Interrupted("stopped"), KeyboardInterrupt()])
def test_what_is_said_already_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, reading("x", None, "y"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '{"a": "1"}',
        '{"a": 1.5}',
        '{"a": true}',
        '{"a": NaN}',
        '{"a": 1, "a": 2}',
        '{"a": ' + "9" * 5000 + "}",
        "[" * 100_000,
        '{"a": ' * 50_000,
        '{"a": null}',
    ],
    ids=range(12),
)
def test_json_that_is_not_of_the_type(text: str, tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    file.write_text(text)
    with pytest.raises(UserError, match="state.json") as raised:
        read_json(file, dict[str, int], "run.output_dir", "give a new folder")
    assert len(str(raised.value)) < 600


def test_json_of_the_type(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    file.write_text('{"a": 1, "ä\u2028": 2}')
    assert read_json(file, dict[str, int], "x", "y") == {"a": 1, "ä\u2028": 2}
    assert parse_json("[1.5, null]") == [1.5, None]
    with pytest.raises(ValueError, match="a.0"):
        check_type({"a": ["x"]}, dict[str, list[int]])


def test_what_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"\xff\xfe{}")
    (tmp_path / "large").write_text(" " * 100 + "{}")
    for name in ("pipe", "missing", ".", "binary"):
        with pytest.raises(UserError):
            read_json(tmp_path / name, dict[str, int], "x", "y")
    with pytest.raises(ValueError, match="more than the 50"):
        read_text(tmp_path / "large", max_bytes=50)


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/a", "a/b", "a\\b", "a\0", "a\n", "x" * 300, "~/../a"])
def test_names_that_lead_elsewhere(name: str, tmp_path: Path) -> None:
    assert not is_bare_name(name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError, match="not the name of a file beside it"):
        read_index(index, "mask", "make the mask again")


def test_index(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {"w": "model-1.safetensors"}}))
    assert read_index(index, "mask", "make the mask again") == {"w": "model-1.safetensors"}
    for content in ([], {}, {"weight_map": []}, {"weight_map": {"w": 1}}, {"weight_map": None}):
        index.write_text(json.dumps(content))
        with pytest.raises(UserError):
            read_index(index, "mask", "make the mask again")
