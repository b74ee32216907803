"""Mistakes in an evaluation: one line that names field, value and remedy, exit code 2, nothing written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from builders import build_guard, build_model, byte_bpe_tokenizer

from esi_ds.cli import main

TEXT = "{prompt} {response}"
WORDS = {"kind": "words"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eval_errors")
    build_model("llama", folder / "model", byte_bpe_tokenizer())
    build_guard(folder / "guard", byte_bpe_tokenizer())
    (folder / "a.jsonl").write_text('{"goal": "How?"}\n')
    (folder / "empty.jsonl").write_text('{"goal": " "}\n')
    return folder


def judge(**keys) -> dict:
    return {"judges": [keys]}


# What the section is changed by → words of the message.
CASES = {
    "nothing asked": ({"prompts": []}, ["eval:", "asks nothing"]),
    "no file": ({"prompts": {"path": "{}/none.jsonl"}}, ["eval.prompts.path", "none.jsonl"]),
    "second set": ({"prompts": [{"path": "{}/a.jsonl"}, {"path": "{}/none.jsonl"}]}, ["eval.prompts.1.path"]),
    "no prompt": ({"benign": {"path": "{}/empty.jsonl"}}, ["eval.benign.path", "the prompt is empty"]),
    "wrong column": ({"prompts": {"path": "{}/a.jsonl", "column": "goa"}}, ["eval.prompts.column", "nearest is goal"]),
    "benign set": ({"prompts": {"path": "examples/benign"}}, ["examples/benign", "benign", "not of harmful"]),
    "words": (judge(kind="words", words="gcgg"), ["eval.judges.0.words", "gcgg", "gcg"]),
    "benign words": ({"refusal_words": "x"}, ["eval.refusal_words", "xstest"]),
    "kind": (judge(kind="gard", path="x"), ["eval.judges.0.kind", "'guard'"]),
    "key of a judge": (judge(kind="guard", pth="x"), ["eval.judges.0.pth", "eval.judges.0.path"]),
    "judge's folder": (judge(kind="guard", path="{}/none"), ["eval.judges.0.path", "none"]),
    "family": (judge(kind="guard", path="{}/model"), ["eval.judges.0.family", "custom"]),
    "template of a guard": (
        judge(kind="guard", path="{}/guard", template=TEXT),
        ["eval.judges.0.template", "belongs to family custom"],
    ),
    "yes or no without response": (
        judge(kind="yes_no", path="{}/guard", template="{prompt}"),
        ["eval.judges.0.template", "{response}"],
    ),
    "same words": (
        judge(kind="yes_no", path="{}/guard", template=TEXT, unsafe=["No"]),
        ["eval.judges.0.unsafe", "cannot tell"],
    ),
    "labels": (
        judge(kind="classifier", path="{}/guard", template=TEXT, unsafe_labels=["harm"]),
        ["eval.judges.0.unsafe_labels", "harm", "LABEL_0"],
    ),
    "threshold": (judge(kind="guard", path="{}/guard", threshold=1.0), ["eval.judges.0.threshold", "1.0"]),
    "no endpoint": (judge(kind="rubric", model="gpt-4o"), ["eval.judges.0.model", "OPENAI_API_KEY"]),
    "rubric without slots": (judge(kind="rubric", model="m", template="{prompt}"), ["eval.judges.0.template"]),
    "an endpoint that outlasts the ranks": (
        judge(kind="rubric", model="m", item_timeout=900.0),
        ["eval.judges.0.item_timeout", "900", "run.collective_timeout_s", "1800"],
    ),
    "one price": (judge(kind="rubric", model="m", prompt_price=1.0), ["eval.judges.0.prompt_price", "both"]),
    "two of a name": ({"judges": [WORDS, WORDS]}, ["eval.judges.1.name", "words", "another name"]),
    "base": ({"models": [{"path": "{}/model", "name": "base"}]}, ["eval.models.0.name", "base"]),
    "before": ({"models": [{"path": "{}/model", "before": "x"}]}, ["eval.models.0.before", "x", "base"]),
    "model": ({"models": [{"path": "{}/none"}]}, ["eval.models.0.path", "none"]),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_named(
    case: str, inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    changes, words = CASES[case]
    section = {"prompts": {"path": f"{inputs}/a.jsonl"}, **json.loads(json.dumps(changes).replace("{}/", f"{inputs}/"))}
    config = {"run": {"output_dir": f"{inputs}/run"}, "model": {"path": f"{inputs}/model"}, "eval": section}
    (inputs / "config.yaml").write_text(yaml.safe_dump(config))
    assert main("eval", ["--config", str(inputs / "config.yaml")]) == 2
    shown = capsys.readouterr().err
    assert shown.count("error:") == 1 and len(shown.strip().splitlines()) == 1, shown
    assert all(word in shown for word in words), shown
    assert not (inputs / "run").exists()


def test_dry_run(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = {
        "prompts": {"path": f"{inputs}/a.jsonl"},
        "benign": {"path": "examples/benign"},
        "models": [{"name": "other", "path": f"{inputs}/model"}],
        "judges": [{"kind": "guard", "path": f"{inputs}/guard", "name": "guard"}, WORDS],
    }
    config = {"run": {"output_dir": f"{inputs}/run"}, "model": {"path": f"{inputs}/model"}, "eval": section}
    (inputs / "config.yaml").write_text(yaml.safe_dump(config))
    assert main("eval", ["--config", str(inputs / "config.yaml"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "402, at most 256 tokens each" in shown and "2 each of guard, words" in shown
    assert re.search(r"^tasks +none$", shown, re.MULTILINE)
    assert not (inputs / "run").exists()
