"""An evaluation of answers from elsewhere, on two ranks: counted as if the model itself had given them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, LaunchedJob
from endpoint_server import running_server

MODELS = ROOT / "examples/models"
NUM_PROMPTS = 6


def job(folder: Path, name: str, models: list[dict], ranks: int) -> LaunchedJob:
    config = {
        "model": {"path": str(MODELS / "llama-aligned"), "dtype": "fp32"},
        "eval": {
            "models": models,
            "judges": [{"kind": "guard", "path": str(MODELS / "guard"), "name": "guard"}],
            "prompts": {"path": str(ROOT / "examples/data/harmful_heldout.jsonl"), "limit": NUM_PROMPTS},
            "benign": {"path": "examples/benign", "limit": 2},
            "refusal_words": "examples",
            "max_new_tokens": 16,
        },
    }
    return LaunchedJob("launch/eval.py", folder, name, ranks, config, launcher="fork")


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def measures(run: Path, model: str) -> list[dict]:
    report = json.loads((run / "report.json").read_text())
    return [row for row in report["measures"] if row["model"] == model and row["measure"] != "incoherent"]


def test_answers_from_a_file_are_judged_like_the_models(tmp_path: Path) -> None:
    first = job(tmp_path, "asked", [{"name": "other", "path": str(MODELS / "llama-complying")}], 1)
    first.finish()
    rows = [row for row in rows_of(first.run / "answers.jsonl") if row["model"] == "other"]
    file = tmp_path / "rows.jsonl"
    pairs = [{"prompt": row["prompt"], "response": row["response"]} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in reversed(pairs[1:])))
    models = [{"name": "other", "answers": str(first.run / "answers.jsonl")}, {"name": "less", "answers": str(file)}]
    second = job(tmp_path, "read", models, 2)
    output = second.finish()
    assert "less to 1 of 6 prompts of harmful_heldout: 0" in output and "fluency is not measured" in output
    assert measures(second.run, "other") == measures(first.run, "other")
    (attacks, _) = measures(second.run, "less")
    assert attacks["n"] == NUM_PROMPTS - 1 and attacks["missing"] == 1
    answers = rows_of(second.run / "answers.jsonl")
    assert [row for row in answers if row["model"] == "other"] == rows
    assert {row["model"] for row in rows_of(second.run / "surprises.jsonl")} == {"base"}
    report = json.loads((second.run / "report.json").read_text())
    assert [model["has_weights"] for model in report["models"]] == [True, False, False]
    assert "not measured" in (second.run / "report.html").read_text()


def test_a_served_model_is_asked_by_one_rank_of_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    prompts = [{"prompt": f"CASE {case}; {n}"} for n, case in enumerate(["one", "cut", "400", "five"])]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    with running_server() as server:
        endpoint = {"base_url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m"}
        config = {
            "model": {"path": str(MODELS / "llama-aligned"), "dtype": "fp32"},
            "eval": {
                "models": [{"endpoint": endpoint}],
                "prompts": {"path": str(tmp_path / "p.jsonl")},
                "max_new_tokens": 8,
            },
        }
        run = LaunchedJob("launch/eval.py", tmp_path, "served", 3, config, launcher="fork")
        run.finish()
        assert len(server.seen) == len(prompts)
    rows = [row for row in rows_of(run.run / "answers.jsonl") if row["model"] == "m"]
    assert [row["response"] is None for row in rows] == [False, False, True, False]
    assert [row.get("cut", False) for row in rows] == [False, True, False, False]
