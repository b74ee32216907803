"""Dry runs before there is anything but a configuration: what is not there is a note, what is wrong is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import build_mask
from conftest import ROOT

from esi_ds.cli import main
from esi_ds.config import Prompts, RowSource
from esi_ds.errors import UserError
from esi_ds.stages.plan import notes as plan_notes
from esi_ds.stages.plan.notes import count_prompts, count_rows

ARCHITECTURE = f"model.path={ROOT / 'configs/moe/architectures/mixtral-8x22b'}"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_notes, "hub_answers", lambda: False)


def dry_run(stage: str, *arguments: str) -> int:
    suffix = "" if stage == "esi" else f"-{stage}"
    config = str(ROOT / f"configs/moe/mixtral-8x22b{suffix}.yaml")
    return main(stage, ["--config", config, "--dry-run", "--nodes", "2", ARCHITECTURE, *arguments])


@pytest.mark.parametrize(
    ("stage", "noted"),
    [
        ("esi", ["data.prompts.path = walledai/AdvBench: the hub does not answer"]),
        ("set", ["holds no weights", "holds no tokenizer", "tune.mask", "circuit_breakers", "tune.data.benign.path"]),
        ("spa", ["holds no weights", "holds no tokenizer", "tune.mask", "tune.data.path = openai/gsm8k"]),
    ],
)
def test_shipped_configs_with_nothing_there(
    stage: str, noted: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no runs/ of anybody
    assert dry_run(stage) == 0
    shown = capsys.readouterr().out
    notes = [line for line in shown.splitlines() if line.startswith("NOTE: ")]
    assert len(notes) == len(noted) and all(words in note for words, note in zip(noted, notes, strict=True)), notes
    assert "140,630,071,296" in shown and f"recommended for {stage.upper()}" in shown
    if stage != "esi":
        assert "1,406,300,712 weights, expected" in shown and "not known" in shown  # ⌊0.01 · weights⌋


@pytest.mark.parametrize(
    ("stage", "shown"),
    [
        ("esi", ["estimator: paper_code", "score: logit", "context: response_only"]),
        ("set", ["4,994 ", "learn: all", "end_token: false", "weight_decay: 0.01", "tune.mask"]),
        ("spa", ["7,473 ", "learn: all", "end_token: false", "unscored: train", "tune.mask"]),
        ("perturb", ["temperature: 0.9", "top_p: 0.95", "0.38", "threshold: 5"]),
        ("eval", ["temperature: 0.9", "top_p: 0.95", "max_new_tokens: 512", "threshold: 5"]),
    ],
)
def test_the_paper_s_settings_are_planned(
    stage: str, shown: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = ROOT / "examples/models"
    overrides = [f"model.path={examples / 'llama-aligned'}"]
    overrides += [f"judge.path={examples / 'guard'}"] if stage == "esi" else []
    if stage in ("perturb", "eval"):  # read what they ask, and what earlier stages leave, in a dry run too
        overrides += ["eval.prompts={path: examples/harmful}", "eval.benign=[]", "eval.models=[]"]
    if stage == "perturb":
        build_mask(tmp_path / "mask", examples / "llama-aligned")
        overrides += [f"perturb.mask={tmp_path / 'mask'}", "perturb.orders=[top, random]"]
    monkeypatch.chdir(tmp_path)  # no runs/ of anybody
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # a plan asks nobody
    assert main(stage, ["--config", f"paper/{stage}", "--dry-run", *overrides]) == 0
    output = capsys.readouterr().out
    assert all(words in output for words in shown), output


def test_rows_that_are_there_are_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n' * 80)
    assert dry_run("spa", f"tune.data={{path: {rows}, limit: 64}}", f"tune.mask={tmp_path}/mask") == 0
    shown = capsys.readouterr().out
    assert "64, counted only" in shown and "1,000 of 16 rows (250.00 epochs)" in shown


def test_a_server_that_gives_the_responses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n' * 80)
    server = "data.responses={base_url: 'http://127.0.0.1:9/v1', model: m}"  # which a plan does not ask
    assert dry_run("esi", f"data.prompts={{path: {prompts}}}", server) == 0
    shown = capsys.readouterr().out
    assert "m at http://127.0.0.1:9/v1, 8 at a time" in shown and "answered at a time" not in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tune.maks=x"], "tune.maks"),
        (["tune.data={path: ROWS, columns: 'ask,answer'}"], "tune.data.columns"),
        (["tune.data={path: ROWS, columns: 'prompt,response'}", "eval={prompts: {path: ROWS, column: ask}}"], "column"),
        (["tune.mask=FOLDER"], "tune.mask"),  # a folder that is there, and no mask
        (["deepspeed={zero_optimization: {stage: 2}}"], "deepspeed"),
        (["model.roles={nowhere: router}"], "model.roles.nowhere"),
    ],
)
def test_mistakes_stay_errors(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    filled = [argument.replace("ROWS", str(rows)).replace("FOLDER", str(tmp_path)) for argument in arguments]
    assert dry_run("spa", *filled) == 2
    assert words in capsys.readouterr().err


def test_a_router_that_a_dense_model_has_not(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, intermediate_size=12).save_pretrained(tmp_path)
    assert (
        dry_run("set", f"model.path={tmp_path}", "tune.router=train", "deepspeed={zero_optimization: {stage: 3}}") == 2
    )
    assert "tune.router" in capsys.readouterr().err


def test_what_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set that the hub refuses is a note; one that it gives, with a column that is not there, an error."""
    monkeypatch.setattr(plan_notes, "hub_answers", lambda: True)

    def refuse(*_, **__):
        raise UserError("data.x.path", "some/set", "cannot be loaded from the hub (gated)", "ask for it")

    notes: list[str] = []
    monkeypatch.setattr(plan_notes, "read_rows", refuse)
    assert count_rows(RowSource(path="some/set"), "data.x", notes) is None
    assert count_prompts(Prompts(path="advbench"), "data.prompts", notes) is None
    assert len(notes) == 2 and all("gated" in note for note in notes)
    rows = [{"question": "a", "answer": "b"}] * 3
    monkeypatch.setattr(plan_notes, "read_rows", lambda *_, **__: rows)
    assert count_rows(RowSource(path="some/set", limit=2), "data.x", notes) == 2
    with pytest.raises(UserError, match=r"data\.x\.columns"):
        count_rows(RowSource(path="some/set", columns="ask,answer"), "data.x", notes)
