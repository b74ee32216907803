"""A run of three passes for two criteria, killed in its second and in its third: what is done is not done again."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from builders import PAIRS, build_guard, build_model, byte_bpe_tokenizer, sentencepiece_tokenizer
from conftest import LaunchedJob, whole_lines
from safetensors import safe_open

NUM_PAIRS, NUM_TUNING, NUM_BENIGN = 14, 40, 30  # 4 + 10 + 15 micro-batches on two ranks


def build(folder: Path) -> dict:
    """Model, guard and data; the config without its run section."""
    build_model("llama", folder / "model", byte_bpe_tokenizer())
    build_guard(folder / "guard", sentencepiece_tokenizer())
    files = {
        "pairs": [{"prompt": p, "response": r} for p, r in PAIRS * 2],
        "tuning": [{"question": f"Tell me thing {i}", "answer": "No " * (1 + i % 7)} for i in range(NUM_TUNING)],
        "benign": [{"question": f"Story {i}", "answer": "Once upon " * (1 + i % 4)} for i in range(NUM_BENIGN)],
    }
    files["benign"].append({"question": "Nothing", "answer": " "})
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "judge": {"path": str(folder / "guard")},
        "data": {
            "responses": str(folder / "pairs.jsonl"),
            "tuning": {"path": str(folder / "tuning.jsonl")},
            "benign": {"path": str(folder / "benign.jsonl")},
        },
        "esi": {"batch_size": 2, "save_every": 2},
        "select": {"criterion": ["directed", "snip"], "contrastive": True},
    }


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in whole_lines(run / "metrics.jsonl")]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model-00001-of-00001.safetensors", "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  safe_open is no mapping


def test_killed_in_the_second_and_in_the_third_pass_same_bits(tmp_path: Path) -> None:
    config = build(tmp_path)
    undisturbed = LaunchedJob("launch/esi.py", tmp_path, "undisturbed", 2, config)
    output = undisturbed.finish()
    assert "data.benign: 30 rows of columns question,answer" in output and "1 skipped" in output

    for key, enough, rows in (("tuning_loss", 3, 4 + 3), ("benign_loss", 3, 4 + 10 + 3)):
        job = LaunchedJob("launch/esi.py", tmp_path, "killed", 2, config, f"metrics.jsonl {rows}")
        job.kill_when(lambda job=job, key=key, n=enough: sum(key in row for row in metrics(job.run)) >= n)
        assert not (job.run / "scores").exists()
        before = metrics(job.run)
    job = LaunchedJob("launch/esi.py", tmp_path, "killed", 2, config)
    job.finish()

    for part in ("scores/directed", "mask/directed", "scores/snip", "mask/snip"):
        expected, got = tensors(undisturbed.run / part), tensors(job.run / part)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    after = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in after]
    assert steps == sorted(set(steps)) and steps[-1] == NUM_PAIRS + NUM_TUNING + NUM_BENIGN
    # The time a line was written tells whether its micro-batch ran again: the first two passes' did not.
    finished = [row for row in before if row["step"] <= NUM_PAIRS + NUM_TUNING]
    assert after[: len(finished)] == finished and "tuning_loss" in finished[-1]
    assert not (job.run / "checkpoint").exists()

    report = json.loads((job.run / "report.json").read_text())
    assert report["selection"]["criterion"] == "directed" and report["selection"]["contrastive"] is True
    assert report["selection"]["tuning rows used"] == NUM_TUNING
    assert report["selection"]["benign rows skipped"] == 1 and "benign.jsonl" in report["selection"]["benign rows from"]
    assert [loss["name"] for loss in report["losses"]] == ["tuning", "benign"]
    assert report["losses"][1]["skipped"] == [{"row": NUM_BENIGN, "reason": "the answer is empty"}]
    assert "contrastive" in (job.run / "report.html").read_text()
