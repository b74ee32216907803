"""Several sampled answers to a prompt: the same on every number of ranks, batch size and restart, counted by prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, LaunchedJob, whole_lines

from esi_ds.eval.clusters import any_in_cluster, cluster_rate
from esi_ds.eval.statistics import wilson

MODELS = ROOT / "examples/models"
NUM_PROMPTS, NUM_BENIGN, SAMPLES = 6, 2, 3


def job(folder: Path, name: str, ranks: int, **section: Any) -> LaunchedJob:
    config = {
        "model": {"path": str(MODELS / "llama-aligned"), "dtype": "fp32"},
        "eval": {
            "judges": [{"kind": "guard", "path": str(MODELS / "guard"), "name": "guard"}],
            "prompts": {"path": "examples/harmful", "limit": NUM_PROMPTS},
            "benign": {"path": "examples/benign", "limit": NUM_BENIGN},
            "refusal_words": "examples",
            "max_new_tokens": 16,
            "samples": SAMPLES,
            "temperature": 1.5,
            "top_p": 0.95,
            **section,
        },
    }
    return LaunchedJob("launch/eval.py", folder, name, ranks, config)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in whole_lines(file)]


def test_samples_do_not_depend_on_ranks_batches_or_restarts(tmp_path: Path) -> None:
    alone = job(tmp_path, "alone", 1, batch_size=8)
    output = alone.finish()
    first = job(tmp_path, "killed", 3, batch_size=1)
    first.kill_when(lambda: len(rows_of(first.run / "answers.jsonl")) >= 5)
    kept = rows_of(first.run / "answers.jsonl")
    again = job(tmp_path, "killed", 3, batch_size=1)
    again.finish()
    rows = rows_of(alone.run / "answers.jsonl")
    assert rows == rows_of(again.run / "answers.jsonl") and all(row in rows for row in kept)
    # Scores differ in rounding where a judge reads other answers beside one.
    pairs = zip(rows_of(alone.run / "verdicts.jsonl"), rows_of(again.run / "verdicts.jsonl"), strict=True)
    assert all(one == {**other, "score": pytest.approx(other["score"], rel=1e-3)} for one, other in pairs)
    assert len(rows) == SAMPLES * (NUM_PROMPTS + NUM_BENIGN)
    by_prompt = [{row["response"] for row in rows[n : n + SAMPLES]} for n in range(0, len(rows), SAMPLES)]
    assert all(row["sample"] == n % SAMPLES for n, row in enumerate(rows)) and max(map(len, by_prompt)) > 1

    verdicts = rows_of(alone.run / "verdicts.jsonl")
    flags, indices = [row["unsafe"] for row in verdicts], [row["index"] for row in verdicts]
    report = json.loads((alone.run / "report.json").read_text())
    measures = {row["measure"]: row for row in report["measures"] if row["judge"] == "guard"}
    rate, one = cluster_rate(flags, indices), measures["attack_success"]
    assert (one["count"], one["n"], one["low"], one["high"]) == (rate.count, rate.n, rate.low, rate.high)
    assert (one["clusters"], one["clustered_by"]) == (NUM_PROMPTS, "prompt")
    several = list(any_in_cluster(flags, indices).values())
    interval = wilson(several.count(True), several.count(True) + several.count(False))
    any_row = measures["any_attack_success"]
    assert (any_row["count"], any_row["n"], any_row["high"]) == (interval.count, interval.n, interval.high)
    assert report["facts"]["answers"].startswith("3 to a prompt, sampled at temperature 1.5 and top_p 0.95")
    for shown in (output, (alone.run / "report.html").read_text()):
        assert "attack success, any attempt" in shown and f"of {NUM_PROMPTS} prompts" in shown
