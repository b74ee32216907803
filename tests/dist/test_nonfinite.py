"""What is not finite never reaches the scores; bf16 models run. One launch on two ranks for all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import PAIRS, build_guard, build_model, byte_bpe_tokenizer, sentencepiece_tokenizer
from conftest import ROOT, run_ranks
from reference import esi_scores, relative_error
from test_scores import TOLERANCE, config, read


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nonfinite")
    tokenizer = byte_bpe_tokenizer()
    build_model("qwen3_moe", folder / "moe", tokenizer)
    build_model("llama", folder / "llama", tokenizer)
    # A token that only one response has: its embedding makes that prompt's loss NaN, and no other's.
    others = {token for i, pair in enumerate(PAIRS) if i != 3 for token in tokenizer(" ".join(pair))["input_ids"]}
    token = next(token for token in tokenizer(PAIRS[3][1])["input_ids"][:-1] if token not in others)
    build_model("llama", folder / "nan", tokenizer, nan_token=token)
    build_model("llama", folder / "bf16", tokenizer, dtype=torch.bfloat16)
    build_model("qwen3_moe", folder / "moe-bf16", tokenizer, dtype=torch.bfloat16)
    build_guard(folder / "other", sentencepiece_tokenizer())
    rows = ({"prompt": prompt, "response": response} for prompt, response in [*PAIRS, ("Nothing", " ")])
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cases = [
        config(folder, "nan", "other", 2, "nan-token"),
        {**config(folder, "moe", "other", 1, "bad-gradient", {"save_every": 1}), "poison": {"gradient": 3}},
        {**config(folder, "moe", "other", 1, "bad-gradient-unsaved", {"save_every": 100}), "poison": {"gradient": 4}},
        {**config(folder, "llama", "other", 3, "bad-score"), "poison": {"score": 5}},
        {
            **config(folder, "llama", "other", 1, "stop", {"on_nonfinite": "stop"}),
            "poison": {"gradient": 2},
            "error": "prompts [2, 3]",
        },
        config(folder, "bf16", "other", 3, "run-bf16", ratio=0.01),
        config(folder, "moe-bf16", "other", 3, "run-moe-bf16", ratio=0.01),
    ]
    for case in cases[-2:]:
        case["config"]["model"]["dtype"] = "bf16"
    (folder / "cases.json").write_text(json.dumps(cases))
    done = run_ranks(2, str(ROOT / "tests/dist/score_worker.py"), str(folder / "cases.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def excluded(run: Path) -> dict[int, str]:
    rows = [json.loads(line) for line in (run / "responses.jsonl").read_text().splitlines()]
    return {row["index"]: row["excluded"] for row in rows if row["excluded"] is not None}


@pytest.mark.parametrize(
    ("run", "model", "guilty", "reason"),
    [
        ("nan-token", "nan", [3], "the loss is not finite"),
        ("bad-gradient", "moe", [2, 3], "the gradient of its micro-batch is not finite"),
        ("bad-gradient-unsaved", "moe", [4, 5], "the gradient of its micro-batch is not finite"),
        ("bad-score", "llama", [5], "the judge's score is not finite"),
    ],
)
def test_only_the_guilty_are_left_out(folder: Path, run: str, model: str, guilty: list[int], reason: str) -> None:
    """Two ranks, one prompt each: a bad gradient takes its micro-batch's other prompt along."""
    assert excluded(folder / run) == {**dict.fromkeys(guilty, reason), 7: "the response is empty"}
    pairs = [pair for index, pair in enumerate(PAIRS) if index not in guilty]
    expected, _ = esi_scores(folder / model, folder / "other", pairs)
    assert relative_error(read(folder / run / "scores"), expected) <= TOLERANCE


def test_stop_writes_no_scores(folder: Path) -> None:
    assert not (folder / "stop" / "scores").exists()
    assert json.loads((folder / "stop" / "manifest.json").read_text())["exit_state"] == "failed"


@pytest.mark.parametrize(("run", "model"), [("run-bf16", "bf16"), ("run-moe-bf16", "moe-bf16")])
def test_bf16_agrees_in_its_top_percent(folder: Path, run: str, model: str) -> None:
    """Against the oracle on the same (bf16) weights in fp32 arithmetic.

    bf16 keeps 8 bits: activations and gradients are off by up to 0.4 % each, which reorders scores near the
    threshold. A random mask would agree in 1 %.
    """
    expected, _ = esi_scores(folder / model, folder / "other", PAIRS)
    got = read(folder / run / "scores")
    names = list(expected)
    flat = [torch.cat([scores[name].flatten() for name in names]) for scores in (expected, got)]
    k = len(flat[0]) // 100
    tops = [set(values.topk(k).indices.tolist()) for values in flat]
    overlap = len(tops[0] & tops[1]) / k
    print(f"{run}: top 1 % agrees in {overlap:.1%}, relative L2 {relative_error(got, expected):.2e}")
    assert overlap >= 0.85
