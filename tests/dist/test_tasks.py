"""Tasks shared between ranks: what one process finds, on every rank; and a rank that fails fails them all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import build_model, byte_bpe_tokenizer
from conftest import run_ranks

NEWS = [{"text": f"Story {number} of the girl and the boat.", "label": number % 4} for number in range(11)]
ANSWERS = [{"prompt": f"Say {number}", "answer": chr(97 + number)} for number in range(7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    build_model("llama", path / "model", byte_bpe_tokenizer())
    for name, rows in (("news", NEWS), ("answers", ANSWERS)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_on(folder: Path, ranks: int, tasks: list[dict], kind: str) -> list:
    """What each rank said."""
    job = run_ranks(ranks, "tests/dist/task_worker.py", str(folder), json.dumps(tasks), kind, timeout=240)
    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-3000:]
    assert "Running loglikelihood requests" in job.stderr
    return json.loads((folder / f"results-{kind}-{ranks}.json").read_text())


def test_ranks_find_what_one_process_finds_even_with_fewer_documents_than_ranks(folder: Path) -> None:
    tasks = [
        {"name": "ag_news", "path": str(folder / "news.jsonl")},
        {"name": "ag_news", "path": str(folder / "news.jsonl"), "limit": 1},  # ranks 1 and 2 have nothing to do
        {"name": "examples/benign", "path": str(folder / "answers.jsonl")},
    ]
    (alone,) = run_on(folder, 1, tasks, "works")
    several = run_on(folder, 3, tasks, "works")
    assert [len(result["correct"]) for result in alone] == [11, 1, 7]
    assert 0 < sum(alone[0]["correct"]) < 11
    assert several == [alone] * 3


def test_a_rank_that_fails_fails_all_at_once(folder: Path) -> None:
    first, second = run_on(folder, 2, [{"name": "ag_news", "path": str(folder / "news.jsonl")}], "fails")
    assert first == ["RuntimeError: rank 1 failed in ag_news: ZeroDivisionError: division by zero"]
    assert second == ["ZeroDivisionError: division by zero"]
