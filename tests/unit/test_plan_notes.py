"""Dry runs before there is anything but a configuration: what is not there is a note, what is wrong is an error."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from builders import build_mask
from conftest import ROOT

from esi_ds import recipes, shipped
from esi_ds.cli import main
from esi_ds.config import Prompts, RowSource, Task, load_config
from esi_ds.errors import UserError
from esi_ds.stages.plan import notes as plan_notes
from esi_ds.stages.plan.notes import count_prompts, count_rows

ABSENT = ("holds no weights", "holds no tokenizer")
ASKED = ("eval.prompts.path = walledai/AdvBench", "eval.benign.path = Paul/XSTest")
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
        (
            "esi",
            [
                *ABSENT,
                "data.prompts.path = walledai/AdvBench: there is no such path here, and the hub does not answer",
                "judge.path = meta-llama/Llama-Guard-3-8B: has no readable configuration on this machine: not counted",
            ],
        ),
        ("set", [*ABSENT, "tune.mask", "circuit_breakers", "tune.data.benign.path", *ASKED]),
        ("spa", [*ABSENT, "tune.mask", "tune.data.path = openai/gsm8k", *ASKED]),
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
    kept = next(line for line in shown.splitlines() if line.startswith("checkpoint on disk"))
    size = kept.split("  ")[-1].strip().partition(",")[0]
    assert kept.endswith(f" {size}, and {size} more during a save")
    if stage == "set":
        trained = next(line for line in shown.splitlines() if line.startswith("trained weights")).split()[2]
        assert size == f"{12 * int(trained.replace(',', '')) / 2**30:.4g} GiB"
        count = int(trained.replace(",", ""))
        assert re.search(rf"model on disk +{2 * 140_630_071_296 / 2**30:.4g} GiB\n", shown)
        # Scored are all matrices but the embedding and the routers; each has selected weights.
        scored = 140_630_071_296 - 32768 * 6144 - 56 * 8 * 6144 - (2 * 56 + 1) * 6144
        assert re.search(rf"patch on disk +{(scored / 8 + 4 * count) / 2**30:.4g} GiB at most\n", shown)
    if stage != "esi":
        assert "1,406,300,712 weights, expected" in shown and "not known" in shown  # ⌊0.01 · weights⌋


def test_what_is_left_to_an_evaluation_is_noted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for stage in ("set", "esi"):
        assert dry_run(stage, "eval.judges=[{kind: words}]") == 0
        assert f"NOTE: eval.judges: read by launch/eval.py, not by {stage.upper()}" in capsys.readouterr().out


def test_a_judge_that_is_not_there_is_noted_and_a_model_is_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("runs/no/judge", "runs/judge", "/nowhere"):
        assert dry_run("esi", f"judge.path={path}") == 0
        assert (
            f"NOTE: judge.path = {path}: has no readable configuration on this machine: not counted"
            in capsys.readouterr().out
        )
    assert dry_run("esi", "judge.path=nowhere", "select.criterion=magnitude", "data.prompts=null") == 0
    assert "judge.path = nowhere" not in capsys.readouterr().out  # no judge is needed
    (tmp_path / "empty").mkdir()
    for argument, problem in (
        ("judge.path=empty", "judge.path = empty: is not a model folder: it has no config.json"),
        ("judge.path=./empty", "judge.path = ./empty: is not a model folder"),
        (
            "model.path=runs/x/model",
            "model.path = runs/x/model: there is no such folder, and it is not a hub id",
        ),
    ):
        for stage in ("esi",) if argument.startswith("judge") else ("esi", "set", "spa"):
            assert dry_run(stage, argument) == 2
            assert f"error: {problem}" in capsys.readouterr().err


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
    examples, model = ROOT / "examples/models", tmp_path / "model"
    shutil.copytree(examples / "llama-aligned", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))  # 512 new ones fit
    overrides = [f"model.path={model}"]
    overrides += [f"judge.path={examples / 'guard'}"] if stage == "esi" else []
    if stage in ("perturb", "eval"):  # read what they ask, and what earlier stages leave, in a dry run too
        overrides += ["eval.prompts={path: examples/harmful}", "eval.benign=[]", "eval.models=[]"]
    if stage == "perturb":
        build_mask(tmp_path / "mask", model)
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
    # A quarter of the rows that are taken are benign: 12,000 are of the 64, and 4,000 of the 80.
    mixed = f"tune.data={{path: {rows}, limit: 64, benign: {{path: {rows}, fraction: 0.25}}}}"
    assert dry_run("spa", mixed, f"tune.mask={tmp_path}/mask") == 0
    assert "1,000 of 16 rows (187.50 epochs, 50.00 epochs of the benign rows)" in capsys.readouterr().out
    # None is mixed in, and none counted.
    assert dry_run("spa", mixed.replace("0.25", "0"), f"tune.mask={tmp_path}/mask") == 0
    assert "1,000 of 16 rows (250.00 epochs)" in capsys.readouterr().out


def test_prompts_that_a_file_answers_are_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{number}", "response": "b"}}\n' for number in range(80)))
    for prompts, count in ((f"{{path: {rows}, limit: 40}}", 40), ("null", 80)):
        assert dry_run("esi", f"data.responses={rows}", f"data.prompts={prompts}") == 0
        facts = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["prompts", str(count)] in facts


@pytest.mark.parametrize(
    ("groups", "passes"),
    [
        ("{enabled: true, autoep_size: 8}", "40 of 1 rows per rank (2 together, read by one rank of each"),
        ("{enabled: false}", "5 of 1 rows per rank (16 together), each one"),
    ],
)
def test_benign_rows_are_read_by_one_rank_of_each_group(
    groups: str, passes: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n' * 80)
    settings = f"deepspeed={{zero_optimization: {{stage: 3}}, expert_parallel: {groups}}}"
    assert dry_run("esi", "select.contrastive=true", f"data.benign.path={rows}", settings) == 0
    assert passes in capsys.readouterr().out


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


RECIPES = [name for name in shipped.recipes() if name.startswith(("dense/", "moe/"))]
NODES = {"One": "1", "Two": "2", "Four": "4"}
# Weights as the hub counts them in each model's safetensors: architectures/ were written down, not downloaded.
PUBLISHED = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "smollm2-135m": 134_515_008,
    "mistral-7b": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma3-1b": 999_885_952,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "olmoe-1b-7b": 6_919_161_856,
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_planned_before_anything_is_there(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the model's architecture alone, in an empty folder, and the architecture is the published one."""
    model, stage = name.split("/")[-1], "esi"
    for suffix in ("set", "spa", "eval"):
        if model.endswith(f"-{suffix}"):
            model, stage = model.removesuffix(f"-{suffix}"), suffix
    monkeypatch.chdir(tmp_path)
    architecture = ROOT / "configs" / name.split("/")[0] / "architectures" / model
    nodes = re.search(r"\. (\w+) nodes? of eight 80 GB GPUs\.$", recipes.summary(shipped.recipe(name)))
    shape = ["--nodes", NODES.get(nodes[1], nodes[1])] if nodes else []
    assert main(stage, ["--config", name, "--dry-run", *shape, f"model.path={architecture}"]) == 0
    shown = capsys.readouterr().out
    assert "NOTE: " in shown and f"output_dir: runs/{model}" in shown
    assert "lm-eval needs the whole model" not in shown
    config = load_config(name, [])
    needed = re.search(r"^recommended for S.. \(([\d.]+) GiB of .*:$\n(?s:(\{.*?^\}))", shown, re.MULTILINE)
    if needed and "offload" not in needed[2] and float(needed[1]) < 40:  # with much room for activations
        assert "offload" not in str(config.deepspeed)
    if stage == "spa":  # no more passes over GSM8K's rows than the paper's four, and a few steps
        ranks = 8 * int(shape[1]) if shape else 1
        assert ranks * config.tune.batch_size * config.tune.gradient_accumulation * config.tune.max_steps < 4.5 * 7_473
    if model in PUBLISHED:
        assert f"{PUBLISHED[model]:,}" in shown


def test_tasks_of_a_model_that_no_gpu_holds_are_noted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tasks = [f"eval.tasks={[{'name': 'gsm8k', 'path': f'{tmp_path}/rows.jsonl'}]}", "eval.models=[]"]
    assert dry_run("eval", *tasks) == 0
    note = (
        "NOTE: eval.tasks: lm-eval needs the whole model on every rank: base takes 261.9 GiB of a GPU's 80 GiB; leave"
    )
    assert note in capsys.readouterr().out
    model = ROOT / "examples/models/llama-aligned"
    whole = [f"model.path={model}", "eval.prompts=[{path: examples/harmful}]", "eval.benign=[]", "eval.judges=[]"]
    small = ["--gpu-memory-gib", "0.001", *whole, "eval.models=[]", "eval.tasks=[examples/benign]"]
    assert main("eval", ["--config", "llama3-8b-eval", "--dry-run", *small]) == 0
    shown = capsys.readouterr().out
    assert "verdicts" in shown and "base takes 4.176 MiB of a GPU's 1.024 MiB" in shown  # with all that it needs there


def test_rows_of_tasks_are_looked_for_before_the_model_is_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were once there was nothing else to note, which before a pipeline is never."""
    monkeypatch.chdir(tmp_path)
    command = ["--config", "llama3-8b-eval", "--dry-run"]
    assert main("eval", [*command, "eval.tasks=[{name: medqa, path: no.jsonl}, gsm8k]"]) == 0
    shown = capsys.readouterr().out
    assert "NOTE: eval.tasks.0.path = no.jsonl: there is no such file" in shown
    assert "NOTE: eval.tasks.1.name = gsm8k: the hub does not answer" in shown
    assert main("eval", [*command, "eval.tasks=[examples/benign, {name: gsm8kk, path: p.jsonl}]"]) == 0
    (tmp_path / "p.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n')
    assert main("eval", [*command, "eval.tasks=[examples/benign, {name: gsm8kk, path: p.jsonl}]"]) == 2
    assert "eval.tasks.1.name = gsm8kk: is not a task of lm-eval" in capsys.readouterr().err

    def unreachable(task: object, field: str) -> None:
        raise UserError(f"{field}.name", "medqa", "cannot be built (offline)", "check the network") from OSError()

    monkeypatch.setattr(plan_notes, "hub_answers", lambda: True)
    monkeypatch.setattr(plan_notes, "prepare_task", unreachable)
    notes: list[str] = []
    plan_notes.note_missing_tasks([Task(name="medqa")], notes)
    assert notes == ["eval.tasks.0.name = medqa: cannot be built (offline); check the network"]


def test_every_model_has_a_recipe_of_each_stage() -> None:
    models = {path.parent.name for path in ROOT.glob("configs/*/architectures/*/config.json")}
    names = {name.split("/")[-1] for name in RECIPES}
    assert names == {f"{model}{suffix}" for model in models for suffix in ("", "-set", "-spa", "-eval")}
    assert len(models) == 18


def perturbation(folder: Path, *more: str) -> list[str]:
    """Arguments that plan noise on the tiny model, whose prompts, judge and mask are those of ``folder``."""
    words = [f"model.path={ROOT / 'examples/models/llama-aligned'}", f"perturb.mask={folder / 'mask'}"]
    words += [f"eval.prompts=[{{path: {folder / 'harmful.jsonl'}}}, {{path: examples/harmful, limit: 6}}]"]
    words += [f"eval.judges=[{{kind: guard, path: {folder / 'guard'}, name: guard}}, {{kind: words}}]"]
    words += ["eval.benign=[]", "perturb.orders=[top, random]", "perturb.noise=[0.5, 1.0]", "perturb.seeds=[0, 1, 2]"]
    return ["--config", "demo/perturb", "--dry-run", "perturb.ratios=null", *words, *more]


def test_a_perturbation_is_planned_before_anything_is_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It stopped at the first set or mask that did not exist."""
    assert main("perturb", perturbation(tmp_path)) == 0
    shown = capsys.readouterr().out
    notes = [line.removeprefix("NOTE: ") for line in shown.splitlines() if line.startswith("NOTE: ")]
    assert [note.split(" = ")[0] for note in notes] == ["eval.judges.0.path", "eval.prompts.0.path", "perturb.mask"]
    assert all("there is no such" in note or "does not exist" in note for note in notes)
    lines = {" ".join(line.split()) for line in shown.splitlines()}
    assert "cells 12, and the model without noise" in lines and "answers not known" in lines
    assert {"mask not known", "scores not known", "harmful set examples/harmful 6 prompts"} <= lines
    # With the prompts and the mask there, all is counted; the judge is still to come.
    (tmp_path / "harmful.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    build_mask(tmp_path / "mask", ROOT / "examples/models/llama-aligned")
    assert main("perturb", perturbation(tmp_path)) == 0
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert "answers 104, at most 48 tokens each" in lines and "scores not needed" in lines
    assert any(line.startswith("mask ") and " weights by " in line for line in lines)
    # Two sets of one file are two sets.
    twice = f"eval.prompts=[{{path: {tmp_path / 'harmful.jsonl'}}}, {{path: {tmp_path / 'harmful.jsonl'}, limit: 1}}]"
    assert main("perturb", perturbation(tmp_path, twice)) == 0
    assert "answers 39, at most" in " ".join(capsys.readouterr().out.split())
    # Scores that the config names and that are still to come are a note, too.
    scores = f"perturb.scores={tmp_path / 'scores'}"
    assert main("perturb", perturbation(tmp_path, scores)) == 0
    assert f"NOTE: perturb.scores = {tmp_path / 'scores'}: does not exist" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("perturb.seeds=[0, 0]", "perturb.seeds"),
        ("eval.tasks=[gsm8k]", "eval.tasks"),
        ("eval.prompts={path: examples/harmful, column: nothing}", "eval.prompts.column"),
    ],
)
def test_what_is_wrong_stops_the_plan_of_a_perturbation_all_the_same(
    wrong: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main("perturb", perturbation(tmp_path, wrong)) == 2
    assert words in capsys.readouterr().err


def test_a_hub_id_without_a_namespace_is_one_for_an_evaluation_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("eval", ["--config", "llama3-8b-eval", "--dry-run", "model.path=gpt2"]) == 0
    shown = capsys.readouterr().out
    assert (
        "model.path = gpt2: there is no such path here, and the hub does not answer" in shown
        and "no such folder" in shown
    )  # runs/llama3-8b-spa


def test_a_judge_that_cannot_be_asked_is_noted_long_before_the_evaluation(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    command = ["--config", "llama3-8b-eval", "--dry-run", "model.path=./not-made-yet"]
    assert main("eval", command) == 0
    note = "NOTE: eval.judges.1.model = gpt-4o: has no endpoint: neither OPENAI_BASE_URL nor OPENAI_API_KEY is set"
    assert note in capsys.readouterr().out
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    assert main("eval", command) == 0
    assert "has no endpoint" not in capsys.readouterr().out
    monkeypatch.setenv("OPENAI_BASE_URL", "h")  # wrong, not missing
    assert main("eval", command) == 2
    assert "OPENAI_BASE_URL" in capsys.readouterr().err
