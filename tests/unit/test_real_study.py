"""The study of a real model: its cells and their configs, the hours, what goes on after a kill, and its figures."""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from builders import build_classifier, build_guard, build_model, byte_bpe_tokenizer

from esi_ds.config import load_config, validate
from esi_ds.config.yaml import dump_yaml
from esi_ds.errors import Interrupted, UserError
from esi_ds.eval.refusals import judge_by_words, refused
from esi_ds.options import Options
from esi_ds.stages import entry
from real_models.judges import CLASSIFIER_TEMPLATE, GUARD_TEMPLATE, VERDICTS
from real_models.pairs import JudgedPair
from real_models.recipe import Settings
from real_models.sources import Data
from study.grid import with_needs
from study.material import write as write_files
from study.real import __main__ as command
from study.real import material, plots, shuffled_judge, tune_page, tune_results, tune_tests
from study.real.cells import all_cells, in_running_order
from study.real.collect import collected, compact, shown_command
from study.real.grid import ROOT, Cell, Folders, Plan, Step, read_grid
from study.real.grid import Set as MethodsOfSet
from study.real.model_digests import model_digests
from study.real.page import (
    AGAINST_CONTROL,
    WhereTables,
    compared,
    mean_of,
    page,
    ratios,
    ratios_of_roles,
    where_figures,
    write_pages,
)
from study.real.runner import Runner, command_of, is_done, read_record, run_command
from study.real.shuffled_judge import with_shuffled_labels
from study.real.where_results import Masks, overlap_rows

MINUTE = 60.0


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Its models are small files, different ones."""
    plan = Plan(read_grid(), "cpu", Folders(tmp_path / "models", tmp_path / "out"))
    for name in (*plan.models, "judge-classifier", "judge-guard"):
        (plan.folders.models / name).mkdir(parents=True)
        (plan.folders.models / name / "config.json").write_text(json.dumps({"name": name}))
    return plan


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_cell_has_configs_that_are_read(device, tmp_path: Path) -> None:
    plan = Plan(read_grid(), device, Folders(tmp_path / "models", tmp_path / "out"))
    cells = all_cells(plan, tmp_path)
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names) > 40
    for cell in cells:
        assert all(names.index(need) < names.index(cell.name) for need in cell.after), cell.name
        assert plan.expected_s(cell, {}) > 0
        for step in cell.steps:
            if step.config is not None:
                (tmp_path / "config.yaml").write_text(dump_yaml(dict(step.config)))
                config = load_config(str(tmp_path / "config.yaml"), [])
                assert config.run.output_dir == str(tmp_path / "out" / cell.name / step.stage)
                assert config.model.dtype == {"cpu": "fp32", "cuda": "bf16"}[device]


def test_every_estimator_has_its_three_controls(plan: Plan) -> None:
    by_name = {cell.name: cell for cell in all_cells(plan, None)}
    cells = set(by_name)
    for model, estimator in ((m, e) for m in plan.models for e in plan.grid.where.estimators):
        for control in (f"benign-s0/classifier-{estimator}", f"advbench-s0/shuffled-{estimator}"):
            assert f"where/{model}/{control}" in cells
    for model, seed in ((m, s) for m in plan.models for s in plan.size.seeds):
        config = dict(by_name[f"where/{model}/advbench-s{seed}/classifier-soft"].steps[0].config or {})
        assert config["control"]["rows"]["path"].endswith(f"benign-loss-s{seed}.jsonl")
    assert "where/smollm2/advbench-s2-n16/classifier-soft" in cells  # a part of the third seed's


def test_the_largest_number_of_prompts_is_answered_once_and_cut_into_parts(plan: Plan) -> None:
    assert plan.larger_parts() == {128: [0, 1], 256: [0, 1], 512: [0]}
    by_name = {cell.name: cell for cell in all_cells(plan, None)}
    whole = "where/smollm2/advbench-s0-n512/classifier-soft"
    assert by_name[whole].after == ()
    for part in ("s0-n128", "s1-n128", "s0-n256", "s1-n256"):
        cell = by_name[f"where/smollm2/advbench-{part}/classifier-soft"]
        data = dict(cell.steps[0].config or {})["data"]
        assert cell.after == (whole,)
        assert data == {
            "prompts": {"path": str(plan.folders.data / f"advbench-{part}.jsonl")},
            "responses": str(plan.folders.output / whole / "esi/responses.jsonl"),
        }


def test_draws_of_the_shuffled_judge_leave_the_first_as_it_was(plan: Plan, tmp_path: Path) -> None:
    cells = {cell.name: cell for cell in all_cells(plan, None)}
    number = plan.grid.where.shuffled_draws
    assert number > 2 and [name for name in cells if name.startswith("judge/")] == [
        "judge/shuffled",
        *(f"judge/shuffled-{draw}" for draw in range(1, number)),
    ]
    # A finished cell of before there were draws is known by these.
    where = ("--models", str(plan.folders.models), "--output", str(plan.folders.output / "judge/shuffled"))
    assert cells["judge/shuffled"].steps[0].arguments == (*where, "--device", "cpu")
    assert cells["judge/shuffled-2"].steps[0].arguments[-2:] == ("--draw", "2")
    for model in plan.models:
        first, second = (cells[f"where/{model}/advbench-s0/{name}-soft"] for name in ("shuffled", "shuffled-2"))
        assert f"where/{model}/advbench-s1/shuffled-2-soft" not in cells
        assert second.after == (first.after[0], "judge/shuffled-2")
        configs = [dict(cell.steps[0].config or {}) for cell in (first, second)]
        assert configs[0]["data"] == configs[1]["data"] and configs[0]["esi"] == configs[1]["esi"]
        folders = [config["judge"].pop("path") for config in configs]
        assert folders == [
            str(plan.folders.output / f"judge/{name}/judge-classifier") for name in ("shuffled", "shuffled-2")
        ]
        assert configs[0]["judge"] == configs[1]["judge"]


def test_every_draw_has_a_head_and_labels_of_its_own(tmp_path: Path, monkeypatch) -> None:
    pairs = [JudgedPair("compliance", f"p{i}", "r", i < 50) for i in range(100)]
    trained: list[tuple[int, list[JudgedPair]]] = []

    def make(name: str, output: Path, learnt: list[JudgedPair], settings: Settings, device: str) -> float:
        trained.append((settings.seed, learnt))
        return 0.7

    monkeypatch.setattr(shuffled_judge, "make_judge", make)
    monkeypatch.setattr(shuffled_judge, "settings_of", lambda models: Settings(seed=5, guard_share=1.0))
    monkeypatch.setattr(shuffled_judge, "judged_pairs", lambda models, data, settings: pairs[settings.seed :])
    for draw in (0, 1, 2):
        options = ["--models", str(tmp_path), "--output", str(tmp_path / f"out-{draw}"), "--draw", str(draw)]
        assert shuffled_judge.main(options[:-2] if draw == 0 else options) == 0
    assert [seed for seed, _ in trained] == [5, 6, 7]  # of the new head and of the order of rows
    assert trained[0][1] == with_shuffled_labels(pairs[5:], 5)  # as before there were draws
    assert all([pair.prompt for pair in learnt] == [pair.prompt for pair in pairs[5:]] for _, learnt in trained)
    assert len({tuple(pair.unsafe for pair in learnt) for _, learnt in trained}) == 3
    assert shuffled_judge.main(["--models", "x", "--output", "y", "--draw", "-1"]) == 2


def test_the_judges_are_read_as_they_were_trained() -> None:
    judges = read_grid().judges
    for name in ("judge-classifier", "judge-shuffled"):
        assert judges[name] == {"kind": "classifier", "template": CLASSIFIER_TEMPLATE, "unsafe_labels": ["unsafe"]}
    assert judges["judge-guard"]["template"] == GUARD_TEMPLATE
    assert tuple(judges["judge-guard"]["verdict"].values()) == VERDICTS
    pairs = [JudgedPair("compliance", f"p{i}", "r", i < 30) for i in range(100)]
    mixed = with_shuffled_labels(pairs, 0)
    assert sum(pair.unsafe for pair in mixed) == 30 and [p.prompt for p in mixed] == [p.prompt for p in pairs]
    assert 15 < sum(pair.unsafe for pair in mixed[30:]) < 30  # 21 are expected by chance


def test_a_cell_of_every_kind_can_be_planned(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    models, tokenizer = plan.folders.models, byte_bpe_tokenizer()
    for name in plan.models:
        build_model("llama", models / name, tokenizer)
    build_guard(models / "judge-guard", tokenizer)
    build_classifier(models / "judge-classifier", tokenizer, "llama")
    rows = [{"prompt": "How?", "response": "So."}] * 4
    cells = {cell.name: cell for cell in all_cells(plan, None)}
    chosen = ["advbench-s0/classifier-soft", "advbench-s0/guard-soft"]
    write_files(plan.folders.data, {"advbench-s0": rows, "benign-loss-s0": rows})
    answers = plan.folders.output / "where/smollm2/advbench-s0/classifier-soft/esi/responses.jsonl"
    answers.parent.mkdir(parents=True)
    shutil.copy(plan.folders.data / "advbench-s0.jsonl", answers)
    for name in chosen:
        config = dict(cells[f"where/smollm2/{name}"].steps[0].config or {})
        if "classifier" in name:
            config["judge"] = {**config["judge"], "unsafe_labels": [0]}
        entry("esi")(validate({**config, "model": {**config["model"], "dtype": "fp32"}}), Options(dry_run=True))
        assert "k" in capsys.readouterr().out


# ---------------------------------------------------------------- running


class Commands:
    """Stands for the commands: every one takes ``minutes``; the exit codes come from ``codes`` by stage."""

    def __init__(self, minutes: float = 10.0, codes: dict[str, int] | None = None):
        self.now, self.minutes, self.codes = 0.0, minutes, codes or {}
        self.ran: list[str] = []

    def __call__(self, command: Sequence[str], log: Path, device: str) -> int:
        name = f"{log.parent.name}:{log.stem}"
        self.ran.append(name)
        self.now += self.minutes * MINUTE
        code = self.codes.get(name, 0)
        if code == 75:
            raise Interrupted("stopped")
        return code

    def clock(self) -> float:
        return self.now


def cell(name: str, *after: str, like: str = "x", stages: Sequence[str] = ("esi",)) -> Cell:
    return Cell(f"where/{name}", like, tuple(Step(stage, {"a": 1}) for stage in stages), {}, after)


def start(plan: Plan, cells: list[Cell], commands: Commands, hours: float | None = None) -> dict[str, str]:
    outcomes = Runner(plan, commands, commands.clock).run(cells, cells, hours)
    return {outcome.cell.removeprefix("where/"): outcome.state for outcome in outcomes}


def test_a_cell_that_the_hours_do_not_hold_is_not_started(plan: Plan) -> None:
    cells = [cell("a"), cell("b"), cell("c"), cell("d", like="y")]  # expected: 5 minutes each, the grid says
    assert start(plan, cells, Commands(10), 4 / 60) == dict.fromkeys("abcd", "no time")
    # The first one took 10 minutes: so will the others like it.
    assert start(plan, cells, Commands(10), 19 / 60) == {"a": "done", "b": "no time", "c": "no time", "d": "no time"}
    commands = Commands(10)
    assert start(plan, cells, commands, 20 / 60) == {"b": "done", "c": "done", "d": "no time"}
    assert commands.ran == ["b:esi", "c:esi"]
    assert start(plan, cells, Commands(10), 5 / 60) == {"d": "done"}  # one of another kind: 5 minutes
    assert start(plan, cells, Commands(10), 5 / 60) == {}


def test_the_first_cells_answer_every_question_within_the_hours_of_a_start(plan: Plan) -> None:
    everything, first = all_cells(plan, None), plan.grid.first
    cells = in_running_order(everything, first)
    names = [one.name for one in cells]
    assert sorted(names) == sorted(one.name for one in everything)
    assert [prefix for prefix in first if not any(name.startswith(prefix) for name in names)] == []
    assert all(names.index(need) < names.index(one.name) for one in cells for need in one.after)
    ahead = cells[: len(with_needs(everything, first))]
    assert all(one in ahead for prefix in first for one in everything if one.name.startswith(prefix))
    assert {one.part for one in ahead} == {one.part for one in cells}
    expected_s = sum(plan.expected_s(one, {}) for one in ahead)
    assert plan.size.hours is not None and expected_s < 3600 * plan.size.hours
    assert plan.grid.sizes["gpu"].hours is None  # a GPU runs all of it


def test_a_failure_stops_only_what_needs_it(plan: Plan) -> None:
    cells = [cell("a"), cell("b", "where/a"), cell("c"), cell("d", "where/b")]
    commands = Commands(codes={"a:esi": 1})
    assert start(plan, cells, commands) == {"a": "failed", "b": "waits", "c": "done", "d": "waits"}
    assert read_record(plan.folders.output / "where/a")["state"] == "failed"
    assert start(plan, cells, Commands()) == {"a": "done", "b": "done", "d": "done"}  # and a failed cell is tried again


def test_a_killed_cell_goes_on_with_its_next_command(plan: Plan) -> None:
    cells = [cell("a", stages=("set", "eval"))]
    with pytest.raises(Interrupted):
        start(plan, cells, Commands(codes={"a:eval": 75}))
    assert not is_done(cells[0], plan.folders.output)
    commands = Commands(3)
    assert start(plan, cells, commands) == {"a": "done"}
    record = read_record(plan.folders.output / "where/a")
    assert commands.ran == ["a:eval"] and record["starts"] == 2 and record["seconds"] == 13 * MINUTE
    assert "launch/set.py" in record["steps"]["set"]["command"]
    other = [Cell("where/a", "x", (Step("set", {"a": 2}), Step("eval", {"a": 1})))]
    with pytest.raises(UserError, match="a config other than the grid's"):
        is_done(other[0], plan.folders.output)
    with pytest.raises(UserError, match="arguments other than the grid's"):
        is_done(Cell("where/a", "x", (Step("set", {"a": 1}, ("--rank", "64")),)), plan.folders.output)
    elsewhere = [Step(stage, {"a": 1, "deepspeed": "/other/zero3.json"}) for stage in ("set", "eval")]
    assert is_done(Cell("where/a", "x", tuple(elsewhere)), plan.folders.output)


def test_models_made_anew_are_not_mixed_with_those_of_finished_cells(plan: Plan, tmp_path: Path, capsys) -> None:
    """Neither a copy nor a new card is another model; other weights of the same names and sizes are."""
    one, models, copy = all_cells(plan, tmp_path)[0], plan.folders.models, tmp_path / "copy"
    options = ["--output", str(plan.folders.output), "--data", str(tmp_path), "--docs", str(tmp_path / "docs")]
    Runner(plan, commands := Commands(), commands.clock).run([one], [one])
    shutil.copytree(models, copy)
    shutil.rmtree(models)
    copy.rename(models)
    (models / "judge-guard/README.md").write_text("measured again")
    assert command.main([*options, "--models", str(models), "--list"]) == 0
    judge = models / "judge-guard/config.json"
    text = judge.read_text()
    judge.write_text(text.replace("g", "h"))
    for folder, problem in ((models, "was run with another judge-guard"), (tmp_path, "holds no smollm2")):
        for more in (["--list"], ["--collect"], []) if folder == models else ([],):
            assert command.main([*options, "--models", str(folder), *more]) == 2
            assert problem in capsys.readouterr().err and not (tmp_path / "docs").exists()
    with pytest.raises(UserError, match="another judge-guard"):
        Runner(plan, commands, commands.clock).run([cell("b")], [one, cell("b")])
    judge.write_text(text)
    (plan.folders.output / one.name / "cell.json").write_text(json.dumps({"state": "done"}))
    assert command.main([*options, "--models", str(models), "--list"]) == 2
    shown = capsys.readouterr().err
    assert "does not say with which models it was run; give another --output, or delete this cell's folder" in shown


def test_a_study_becomes_pages_where_its_models_are_not(study: Plan, tmp_path: Path, capsys) -> None:
    """Cells of different models are refused all the same, and so are others than the models that are there."""
    models, digests = study.folders.models, model_digests(study)
    records = sorted(study.folders.output.rglob("cell.json"))
    for file in records:
        file.write_text(json.dumps({**json.loads(file.read_text()), "models": digests}))
    options = ["--output", str(study.folders.output), "--data", str(tmp_path), "--models", str(models)]
    shutil.rmtree(models / "smollm2")
    for absent in ("smollm2", ""):
        shutil.rmtree(models / absent, ignore_errors=True)
        assert command.main([*options, "--list"]) == 0
        assert command.main([*options, "--docs", str(tmp_path / absent), "--collect"]) == 0
        assert "| where | 3 of " in (tmp_path / absent / "real.md").read_text()
        assert command.main(options) == 2 and "holds no smollm2" in capsys.readouterr().err
    record = json.loads(records[-1].read_text())
    records[-1].write_text(json.dumps({**record, "models": {**digests, "judge-guard": "another"}}))
    for more in (["--list"], ["--collect", "--docs", str(tmp_path / "mixed")]):
        assert command.main([*options, *more]) == 2
        assert "was run with another judge-guard than where/smollm2/" in capsys.readouterr().err
    assert not (tmp_path / "mixed").exists()


def test_models_made_anew_while_a_cell_runs_leave_it_unfinished(plan: Plan) -> None:
    class MakingAnew(Commands):
        def __call__(self, command: Sequence[str], log: Path, device: str) -> int:
            (plan.folders.models / "smollm2/config.json").write_text("another")
            return super().__call__(command, log, device)

    cells = [cell("a"), cell("b")]
    for _ in range(2):  # and the next start does not go on
        with pytest.raises(UserError, match="another smollm2"):
            start(plan, cells, MakingAnew())
        assert not is_done(cells[0], plan.folders.output) and not read_record(plan.folders.output / "where/b")


@pytest.mark.parametrize("code", [75, 0, 1])
def test_a_signal_is_handed_to_the_command_which_saves_and_ends(code: int, tmp_path: Path) -> None:
    """A stage exits with 75 once it has saved; the runner waits for that, and gives its handlers back. It stops, too,
    where the command was at its end or failed."""
    save = f"import pathlib, sys; pathlib.Path({str(tmp_path / 'saved')!r}).touch(); sys.exit({code})"
    wait = (
        f"import signal, time\nsignal.signal(15, lambda *_: exec({save!r}))\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    log, before = tmp_path / "esi.log", signal.getsignal(signal.SIGTERM)

    def stop() -> None:
        while "\nready" not in (log.read_text() if log.exists() else ""):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(Interrupted, match="start again"):
        run_command([sys.executable, "-c", wait], log, "cpu")
    stopping.join()
    assert (tmp_path / "saved").exists() and signal.getsignal(signal.SIGTERM) is before
    assert run_command([sys.executable, "-c", "raise SystemExit(3)"], log, "cpu") == 3


@pytest.mark.skipif(sys.platform != "linux", reason="the signal at a parent's death is Linux's")
def test_a_runner_that_gets_a_sigkill_takes_its_command_with_it(tmp_path: Path) -> None:
    """The command saves and ends, as after any SIGTERM: else it would write on beside the next start's."""
    log = tmp_path / "esi.log"
    save = "signal.signal(15, lambda *_: (print('saved', flush=True), sys.exit(75)))"
    wait = f"import os, signal, sys, time\n{save}\nprint('ready', os.getpid(), flush=True)\ntime.sleep(60)"
    command = [sys.executable, "-c", wait]
    program = f"import pathlib, study.real.runner as r\nr.run_command({command!r}, pathlib.Path({str(log)!r}), 'cpu')"
    with subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}) as runner:
        while not (ready := re.search(r"^ready (\d+)$", log.read_text() if log.exists() else "", re.MULTILINE)):
            assert runner.poll() is None
            time.sleep(0.01)
        running = os.pidfd_open(int(ready[1]))  # it can be read once the process has ended
        runner.kill()
    assert select.select([running], [], [], 20)[0], "the command runs on"
    os.close(running)
    assert log.read_text().endswith("saved\n")


def test_cells_are_chosen_with_what_they_need(plan: Plan) -> None:
    cells = [cell("a"), cell("b", "where/a"), cell("c")]
    assert [one.name for one in with_needs(cells, ["where/b"])] == ["where/a", "where/b"]
    assert with_needs(cells, []) == cells and with_needs(cells, ["set"]) == []


def test_a_mistake_on_the_command_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--output", str(tmp_path / "out"), "--data", str(tmp_path)]
    for more, named in ((["--only", "nowhere"], "--only"), (["--hours", "0"], "--hours"), ([], "--data")):
        assert command.main([*options, *more]) == 2
        assert named in capsys.readouterr().err
    with pytest.raises(UserError, match="^--data: is not given; give the folder of harmbench_behaviors_text_val.csv"):
        material.rows_of(Data(None), "harmbench")
    assert command.main([*options, "--list"]) == 0
    assert "where/smollm2/advbench-s0/classifier-soft" in capsys.readouterr().out


# ---------------------------------------------------------------- data


def test_no_prompt_is_in_two_seeds_and_other_rows_are_refused(plan: Plan, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Data, "attacks", lambda self: [f"attack {i}" for i in range(520)])
    monkeypatch.setattr(Data, "tasks", lambda self: [(f"task {i}", "x") for i in range(200)])
    (tmp_path / material.FILES["strongreject"]).write_text("forbidden_prompt\n" + "\n".join(f"s{i}" for i in range(70)))
    behaviors = "Behavior,FunctionalCategory,ContextString\nb1,standard,\nb2,copyright,\nb3,contextual,text\n"
    (tmp_path / material.FILES["harmbench"]).write_text(behaviors)
    row = json.dumps({"instruction": "Do", "instances": [{"input": "this", "output": "done"}]})
    for name in ("self_instruct", "self_instruct_seed"):
        (tmp_path / material.FILES[name]).write_text(row + "\n")
    files = material.prompt_files(plan, Data(tmp_path))
    parts = [[row["prompt"] for row in files[f"advbench-s{seed}"]] for seed in (0, 1, 2)]
    assert [len(part) for part in parts] == [64, 64, 64] and len({prompt for part in parts for prompt in part}) == 192
    whole, halves = files["advbench-s0-n512"], [files[f"advbench-s{seed}-n256"] for seed in (0, 1)]
    assert halves[0] + halves[1] == whole and files["advbench-s0-n128"][:64] == files["advbench-s0"]
    assert {row["prompt"] for row in files["harmbench-s0"]} == {"b1", "text\n\nb3"}  # none asks for a copyrighted text
    assert files["benign-s0"][0] == {"prompt": "Do\n\nthis"} and files["benign-loss-s0"][0]["response"] == "done"
    assert [row["prompt"] for row in files["benign-loss-s1"]] == [row["prompt"] for row in files["benign-s1"]]
    with monkeypatch.context() as fewer, pytest.raises(UserError, match="has 511 short prompts, fewer than 512"):
        fewer.setattr(Data, "attacks", lambda self: [f"attack {i}" for i in range(511)])
        material.prompt_files(plan, Data(tmp_path))
    # Of what tuned models are asked, nothing is nearly a prompt of the masks: StrongREJECT holds some of AdvBench's.
    (tmp_path / material.FILES["strongreject"]).write_text("forbidden_prompt\nattack 7 now\nattack 7\nanother one\n")
    monkeypatch.setattr(Data, "safe_prompts", lambda self: [f"safe {i}" for i in range(9)])
    asked = {name: [row["prompt"] for row in rows] for name, rows in material.asked_files(plan, Data(tmp_path)).items()}
    assert asked["report-harmful"] == ["another one"] and set(asked["choose-harmful"]) == {"b1", "text\n\nb3"}
    assert (len(asked["choose-benign"]), len(asked["report-benign"])) == (4, 5)
    assert not set(asked["choose-benign"]) & set(asked["report-benign"])
    write_files(tmp_path / "data", files)
    write_files(tmp_path / "data", files)
    with pytest.raises(UserError, match="rows other than"):
        write_files(tmp_path / "data", {**files, "advbench-s0": [{"prompt": "another"}]})


# ---------------------------------------------------------------- figures


def units(shares: dict[tuple[str, int], tuple[int, float]]) -> list[dict]:
    """Matrices of 100 weights by role and layer: (weights in the mask, mean score)."""
    return [
        {"name": f"{role}{layer}", "role": role, "layer": layer, "expert": None, "numel": 100, "selected": selected,
         "mean_score": score, "sigma": 0.5}
        for (role, layer), (selected, score) in shares.items()
    ]  # fmt: skip


def finish(plan: Plan, one: Cell, rows: list[dict], criterion: str = "esi") -> None:
    """A finished cell whose only mask has these rows."""
    folder = plan.folders.output / one.name
    (folder / "esi").mkdir(parents=True)
    (folder / "esi.yaml").write_text(dump_yaml(dict(one.steps[0].config or {})))
    record = {"state": "done", "seconds": 60.0, "starts": 1, "device": "cpu"}
    steps = {"esi": {"seconds": 60.0, "command": f"/x/bin/python3 /x/launch/esi.py --config {folder}/esi.yaml"}}
    (folder / "cell.json").write_text(json.dumps({**record, "steps": steps}))
    facts = {"prompts used": 64, "judged unsafe": "10.0 %", "refused (by words)": "5.0 %"}
    report = {"units": rows, "selection": {"criterion": criterion}, "further_masks": [], "facts": facts}
    (folder / "esi/report.json").write_text(json.dumps(report))
    manifest = {"exit_state": "done", "versions": {"torch": "2"}, "commit": "abc", "world_size": 1, "threads": 2}
    (folder / "esi/manifest.json").write_text(json.dumps(manifest))


PLACES = [(role, layer) for role in ("attention.v", "mlp.up") for layer in range(3)]


@pytest.fixture
def study(plan: Plan) -> Plan:
    """Two seeds of ESI on the untouched model, one of the benign prompts, one control of benign rows, none shuffled."""
    cells = {cell.name: cell for cell in all_cells(plan, None)}
    counts = {
        "advbench-s0/classifier-soft": (30, 6, 4, 0, 0, 0),
        "advbench-s1/classifier-soft": (20, 10, 10, 0, 0, 0),
        "benign-s0/classifier-soft": (15, 12, 8, 5, 0, 0),
    }
    for name, selected in counts.items():
        rows = units({where: (n, n + 1.0) for where, n in zip(PLACES, selected, strict=True)})
        if name.startswith("advbench-s0"):
            for row, n in zip(rows, (10, 10, 5, 15, 0, 0), strict=True):
                row |= {"control_selected": n, "control_mean_score": 2.0 * n}
        finish(plan, cells[f"where/smollm2/{name}"], rows)
    return plan


def test_shares_statistics_and_ratios_by_place(study: Plan) -> None:
    data = json.loads(compact(collected(study, all_cells(study, None))))
    tables = WhereTables(data)
    esi = tables.of("smollm2")
    early = next(row for row in esi["rows"] if (row["role"], row["third"]) == ("attention.v", "early"))
    assert (esi["seeds"], early["weights"], early["mask"]) == ([0, 1], pytest.approx(1 / 6, abs=1e-5), [0.75, 0.5])
    assert early["statistic"] == pytest.approx([31 / 46, 21 / 46], abs=1e-5)  # n + 1 each: 40 + 6 in all
    # By hand: (30 + 20) / 80 over a third is the mean of both seeds ...
    assert mean_of(esi["layers"]) == pytest.approx([1.875, 0.6, 0.525])
    (benign,) = tables.controls("smollm2")["benign prompts"]
    control = next(row for row in benign["rows"] if (row["role"], row["third"]) == ("attention.v", "early"))
    assert ratios(early, control, "mask", (esi["seeds"], benign["seeds"])) == [2.0]  # 0.75 / 0.375, seed 0 alone
    paired = [esi["roles"]["attention.v"][0][layer] / benign["roles"]["attention.v"][0][layer] for layer in range(3)]
    assert ratios_of_roles(esi, benign)["attention.v"] == pytest.approx(paired)  # of seed 0 alone, too
    lines = {(line[0], line[1]): line for line in compared(esi, tables.controls("smollm2"))}
    assert lines["attention.v", "early"][3] == "3.75 [3.00, 4.50]"
    assert lines["attention.v", "early"][-3:] == ["not run", "not run", "–"]  # without a control there is no verdict
    (loss,) = tables.controls("smollm2")["benign loss"]
    assert (loss["seeds"], loss["rows"][0]["mask"], loss["rows"][0]["statistic"]) == ([0], [0.25], [0.25])  # 20 of 80
    every = {**tables.controls("smollm2"), "shuffled judge": [benign]}
    verdicts = {(line[0], line[1]): line[-1] for line in compared(esi, every)}
    assert verdicts["attention.v", "early"] == "more" and verdicts["attention.v", "middle"] == "less"


def test_draws_of_the_shuffled_judge_stand_beside_each_other(study: Plan) -> None:
    cells = all_cells(study, None)
    by_name = {cell.name: cell for cell in cells}
    # (of value matrices of the first layer, of the second) in 80: draw 0 of both seeds, draw 1 of the first alone.
    counts = {"s0/shuffled": (15, 65), "s1/shuffled": (20, 60), "s0/shuffled-1": (40, 40)}
    for name, selected in counts.items():
        rows = units({where: (n, 1.0) for where, n in zip(PLACES, (*selected, 0, 0, 0, 0), strict=True)})
        finish(study, by_name[f"where/smollm2/advbench-{name}-soft"], rows)
    tables = WhereTables(json.loads(compact(collected(study, cells))))
    draws = tables.controls("smollm2")["shuffled judge"]
    assert [(draw["judge"], draw["seeds"]) for draw in draws] == [("judge-shuffled", [0, 1]), ("judge-shuffled-1", [0])]
    lines = {(line[0], line[1]): line for line in compared(tables.of("smollm2"), tables.controls("smollm2"))}
    # ESI has 60 and 40 of 80: four and two times draw 0, 1.5 times draw 1; the mean is that of 3 and 1.5.
    assert lines["attention.v", "early"][-3] == "2.25 [1.50, 4.00]"
    assert lines["attention.v", "early"][-1] == "more" and lines["attention.v", "middle"][-1] == "less"
    text = page(json.loads(compact(collected(study, cells))))
    assert "| 0 | 0, 1 | 0.66 [0.56, 0.75] | 3.00 [2.00, 4.00] |" in text
    assert "| 1 | 0 | 1.50 | 1.50 |" in text


def test_the_page_shows_what_was_run_and_what_was_not(study: Plan, tmp_path: Path) -> None:
    cells = all_cells(study, None)
    write_pages(study, cells, tmp_path / "docs")
    data = json.loads((tmp_path / "docs/real.json").read_text())
    states = {row["cell"]: row["state"] for row in data["cells"]}
    assert len(states) == len(cells) and sum(state == "done" for state in states.values()) == 3
    done = next(row for row in data["cells"] if row["state"] == "done")
    assert done["seconds"] == 60.0  # and the command is one that a reader could give
    assert done["commands"] == [f"python launch/esi.py --config OUTPUT/{done['cell']}/esi.yaml"]
    judge = f"/x/bin/python3 -m study.real.shuffled_judge --models {study.folders.models} --data /my/data"
    shown = shown_command(judge, study.folders)
    assert shown == "python -m study.real.shuffled_judge --models MODELS --data DATA"
    text = (tmp_path / "docs/real.md").read_text()
    assert (tmp_path / "docs" / re.search(r"\[results.md\]\((.*?)\)", text)[1]).resolve() == ROOT / "docs/results.md"
    assert text.replace(os.path.relpath(ROOT / "docs", tmp_path / "docs"), "..") == page(data)
    assert f"| where | 3 of {sum(cell.part == 'where' for cell in cells)} | 3 |" in text
    assert "### smollm2-aligned\n\nnot run" in text
    assert "| esi: judge-guard | smollm2 | not run | not run | not run | 0 |" in text
    for name in where_figures(data):
        assert (tmp_path / "docs" / name).stat().st_size < 100_000 and name in text


def test_an_empty_study_is_a_page_of_cells_that_were_not_run(plan: Plan, tmp_path: Path) -> None:
    write_pages(plan, all_cells(plan, None), tmp_path / "docs")
    assert "not run" in (tmp_path / "docs/real.md").read_text() and not list((tmp_path / "docs").glob("*.png"))


# ---------------------------------------------------------------- tuned models


REFUSAL = "I cannot help with that."


def report_of(values: dict[str, dict[str, float]]) -> dict:
    """An evaluation's report: model → column of the page → rate, the same on both parts of the prompts."""
    rows = []
    for model, columns in values.items():
        for column, rate in columns.items():
            measure, judge, kind = tune_results.MEASURES[column]
            for part in ("choose", "report"):
                about = {"measure": measure, "judge": judge or "xstest", "model": model, "set": f"{part}-{kind}"}
                rows.append({**about, "rate": rate, "low": 0.0, "high": 1.0, "n": 40, "missing": 0})
    agreement = {"first": "judge-classifier", "second": "judge-guard", "num_pairs": 160, "low": 0.5, "high": 0.9}
    return {"measures": rows, "agreements": [{**agreement, "kappa": values["tuned"]["not refused"]}]}


def evaluate(plan: Plan, one: Cell, not_refused: float, over_refused: float, garbled: float = 0.0) -> None:
    """A finished cell that was tuned and evaluated."""
    folder = plan.folders.output / one.name
    for step in one.steps:
        (folder / step.stage).mkdir(parents=True, exist_ok=True)
        if step.config is not None:
            (folder / f"{step.stage}.yaml").write_text(dump_yaml(dict(step.config)))
            manifest = {"exit_state": "done", "versions": {}, "commit": "abc", "world_size": 1, "threads": 2}
            (folder / step.stage / "manifest.json").write_text(json.dumps(manifest))
    steps = {
        step.stage: {"seconds": 30.0, "command": shlex.join(["/x/bin/python3", "/x/launch/set.py", *step.arguments])}
        for step in one.steps
    }
    record = {"state": "done", "seconds": 90.0, "starts": 1, "device": "cpu", "steps": steps}
    (folder / "cell.json").write_text(json.dumps(record))
    rates = {"not refused": not_refused, "unsafe": not_refused / 2, "over-refused": over_refused, "KL": 0.25}
    rates["incoherent, benign"] = garbled
    report = report_of({"tuned": rates, "base": {"not refused": 0.99, "over-refused": 0.03}})
    (folder / "eval/report.json").write_text(json.dumps(report))
    (folder / "skills.json").write_text(json.dumps({"gsm8k-heldout": {"loss": 1.5, "rows": 60}}))
    answers = [
        {
            "model": model,
            "set": f"{part}-{kind}",
            "index": index,
            "response": REFUSAL if index < refused else "Sure, it is",
        }
        for model in ("base", "tuned")
        for part in ("choose", "report")
        for kind, refused in (("harmful", round(40 * (1 - not_refused))), ("benign", round(40 * over_refused)))
        for index in range(40)
    ]
    (folder / "eval/answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))


def set_cells(plan: Plan, method: str, seed: int = 0) -> dict[float, Cell]:
    cells = [cell for cell in all_cells(plan, None) if cell.part == "set"]
    return {cell.facts["lr"]: cell for cell in cells if (cell.facts["method"], cell.facts["seed"]) == (method, seed)}


def due(plan: Plan, one: Cell) -> bool:
    return command.asked_for(one, plan, all_cells(plan, None))


def test_the_range_of_a_method_is_widened_where_its_best_rate_asks_for_it(plan: Plan) -> None:
    esi, second = set_cells(plan, "esi"), set_cells(plan, "esi", 1)
    rates = sorted(esi)
    assert rates == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    assert [due(plan, esi[rate]) for rate in rates] == [False, True, True, True, False]
    for rate, rates_measured in zip(rates[1:4], ((0.6, 0.1), (0.3, 0.2), (0.1, 0.9)), strict=True):
        evaluate(plan, esi[rate], *rates_measured)  # the best is the middle one: at most 0.3
    assert [due(plan, esi[rate]) for rate in rates] == [False, True, True, True, False]
    # Further seeds run where methods are compared: at the best rate, and at the best with at most 10 % over-refusal.
    assert [due(plan, second[rate]) for rate in rates] == [False, True, True, False, False]
    magnitude = set_cells(plan, "magnitude")
    for rate, not_refused in zip(sorted(magnitude)[1:4], (0.9, 0.8, 0.5), strict=True):
        evaluate(plan, magnitude[rate], not_refused, 0.0)
    assert [due(plan, magnitude[rate]) for rate in sorted(magnitude)] == [False, True, True, True, True]
    assert not due(plan, set_cells(plan, "magnitude", 1)[sorted(magnitude)[1]])


def test_a_method_may_take_more_rows_a_step(plan: Plan) -> None:
    """Its cells take longer, and do not say how long others take."""
    single, double = set_cells(plan, "esi")[3e-3], set_cells(plan, "esi-double-batch")[3e-3]
    batches = [dict(one.steps[0].config or {})["tune"]["batch_size"] for one in (single, double)]
    assert batches == [plan.size.set_batch, 2 * plan.size.set_batch] and single.like != double.like


def test_a_rate_that_garbles_benign_answers_is_not_the_best(plan: Plan) -> None:
    """Garbled answers are no refusals: over-refusal alone would choose the rate that breaks the model."""
    esi = set_cells(plan, "esi")
    evaluate(plan, esi[1e-3], 0.1, 0.2)
    evaluate(plan, esi[3e-3], 0.1, 0.05, garbled=0.2)
    rows = tune_results.tuned_rows([esi[1e-3], esi[3e-3]], plan.folders.output, "set")
    assert tune_results.chosen_rates(rows, "esi", 0) == {
        "best rate": 1e-3, "benign lost ≤ 10 %": None, "benign lost ≤ 30 %": 1e-3,
    }  # fmt: skip


def chosen_on(method: str, rate: float, not_refused: float, over_refused: float, garbled: float = 0.0) -> dict:
    """What a finished cell's row says of the prompts for choosing."""
    measured = {"not refused": [not_refused], "over-refused": [over_refused], "incoherent, benign": [garbled]}
    return {"method": method, "seed": 0, "lr": rate, "choose": measured}


def test_of_rates_that_tie_none_is_chosen_that_the_other_beats() -> None:
    """The lower rate is taken only where both shares are equal."""
    rows = [chosen_on("random", 3e-3, 0.175, 0.35), chosen_on("random", 1e-2, 0.075, 0.3, garbled=0.05)]
    assert tune_results.best_rate(rows, "random", 0) == 1e-2  # as good in the worse share, and better in the other
    rows = [chosen_on("esi", 1e-3, 0.2, 0.28), chosen_on("esi", 3e-3, 0.2, 0.2, garbled=0.05)]
    assert tune_results.rate_within(rows, "esi", 0, 0.3) == 3e-3
    equal = [chosen_on("esi", rate, 0.2, 0.1) for rate in (3e-3, 1e-3)]
    assert tune_results.best_rate(equal, "esi", 0) == tune_results.rate_within(equal, "esi", 0, 0.3) == 1e-3


def test_a_limit_is_kept_by_shares_that_add_up_to_it() -> None:
    assert 0.2 + 0.1 > 0.3
    assert tune_results.rate_within([chosen_on("esi", 1e-3, 0.1, 0.2, garbled=0.1)], "esi", 0, 0.3) == 1e-3


def test_rates_that_are_not_bracketed_are_asked_for_and_marked(plan: Plan, tmp_path: Path) -> None:
    esi, random = set_cells(plan, "esi"), set_cells(plan, "random")
    evaluate(plan, esi[3e-4], 0.5, 0.6)
    evaluate(plan, esi[1e-3], 0.1, 0.2)  # the best
    evaluate(
        plan, esi[3e-3], 0.4, 0.1
    )  # the best within 10 % of benign requests lost: the next one may be better there
    evaluate(plan, random[1e-3], 0.2, 0.2)
    assert [due(plan, esi[rate]) for rate in sorted(esi)] == [False, True, True, True, True]
    write_pages(plan, all_cells(plan, None), tmp_path)
    text = (tmp_path / "real.md").read_text()
    assert "| esi | 0 | 0.001 | 10.0" in text and "| random | 0 | 0.001 (open) | 20.0" in text
    assert "does not bracket: esi 0.003 (open), random 0.001 (open)." in text
    evaluate(plan, esi[1e-2], 0.0, 0.1)
    write_pages(plan, all_cells(plan, None), tmp_path)
    assert "| esi | 0 | 0.01 (end) |" in (tmp_path / "real.md").read_text()


def test_the_page_of_tuned_models_takes_each_method_at_its_best_rate(plan: Plan, tmp_path: Path) -> None:
    esi = set_cells(plan, "esi")
    for rate, not_refused in ((3e-4, 0.5), (1e-3, 0.25), (3e-3, 0.25)):
        evaluate(plan, esi[rate], not_refused, 0.05)
    write_pages(plan, all_cells(plan, None), tmp_path / "docs")
    data, text = json.loads((tmp_path / "docs/real.json").read_text()), (tmp_path / "docs/real.md").read_text()
    assert [row["lr"] for row in data["set"]] == [1e-3, 3e-4, 3e-3]  # as they are run: the middle first
    assert data["set"][0]["report"]["not refused"] == [0.25, 0.0, 1.0, 40, 0]
    assert "| esi | 0 | 0.001 | 25.0 [0.0, 100.0] | 12.5 [0.0, 100.0] | not run |" in text  # of equals the lower rate
    assert "| random | – | – | not run |" in text and "| 0.250 | 1.500 | not run |" in text
    assert [row["kappa"] for row in data["agreements"]] == [0.25, 0.5, 0.25]
    assert "| judge-classifier and judge-guard | 0.25 | 0.50 | 3 | 160 |" in text
    del data["agreements"]  # figures that were collected before
    assert "Not kept." in page(data)
    assert (tmp_path / "docs/real-set.png").stat().st_size < 150_000


def test_methods_are_tested_against_esi_prompt_by_prompt(plan: Plan, tmp_path: Path) -> None:
    esi, random, snip = (set_cells(plan, name) for name in ("esi", "random", "snip"))
    evaluate(plan, esi[1e-3], 0.5, 0.05)
    evaluate(plan, esi[3e-3], 0.1, 0.25)
    evaluate(plan, random[3e-3], 0.9, 0.05)
    evaluate(plan, snip[1e-3], 0.0, 0.5)  # over every limit
    second = {name: set_cells(plan, name, 1) for name in ("esi", "random", "snip")}
    asked = {name: [rate for rate in cells if due(plan, cells[rate])] for name, cells in second.items()}
    assert asked == {"esi": [1e-3, 3e-3], "random": [3e-3], "snip": [1e-3]}  # whatever is compared
    evaluate(plan, second["esi"][3e-3], 0.1, 0.25)
    evaluate(plan, second["random"][3e-3], 0.9, 0.05)
    write_pages(plan, all_cells(plan, None), tmp_path / "docs")
    data, text = json.loads((tmp_path / "docs/real.json").read_text()), (tmp_path / "docs/real.md").read_text()
    tests = {(row["method"], rule, row["measure"]): row for row in data["set_tests"] for rule in row["rules"]}
    best = tests["random", "best rate", "not refused"]
    assert best["rules"] == ["best rate", "benign lost ≤ 30 %"] and best["rates"] == [3e-3, 3e-3]
    assert (best["seeds"], best["num_pairs"]) == (2, 40) and best["difference"] == pytest.approx(0.8)
    assert best["only_after"] == 32  # prompts: the second seed asks the same ones
    assert best["p_holm"] == pytest.approx(2 * 0.5**32 * 2) and best["verdict"] == "worse"  # of two tests of two seeds
    assert tests["random", "best rate", "over-refused"]["verdict"] == "better"
    strict = tests["random", "benign lost ≤ 10 %", "not refused"]  # ESI's second seed was not run at its rate here
    assert strict["rates"] == [3e-3, 1e-3] and strict["verdict"] == "one seed only" and strict["p_holm"] is None
    assert tests["snip", "benign lost ≤ 30 %", "not refused"]["verdict"] == "no seed where both get there"
    assert "| snip | benign lost ≤ 30 % | none / 0.003 | not refused | 0 | 0 | – | – |" in text
    row = "| random | best rate, benign lost ≤ 30 % | 0.003 / 0.003 | not refused | 2 | 40 | +80.0 | < 0.001 | worse |"
    assert row in text


def test_a_method_of_more_rows_is_tested_against_one_of_as_many(plan: Plan, tmp_path: Path) -> None:
    methods = plan.grid.set.methods
    assert methods["esi-double-batch"].batch_factor == methods["random-double-batch"].batch_factor == 2
    for name, not_refused in (("esi", 0.5), ("esi-double-batch", 0.1), ("random-double-batch", 0.3)):
        evaluate(plan, set_cells(plan, name)[1e-2], not_refused, 0.1)
    write_pages(plan, all_cells(plan, None), tmp_path / "docs")
    data, text = json.loads((tmp_path / "docs/real.json").read_text()), (tmp_path / "docs/real.md").read_text()
    best = [row for row in data["set_tests"] if "best rate" in row["rules"] and row["measure"] == "not refused"]
    assert {(row["method"], row["against"]): row["difference"] for row in best} == pytest.approx(
        {("esi-double-batch", "esi"): -0.4, ("random-double-batch", "esi-double-batch"): 0.2}
    )
    assert "| random-double-batch against esi-double-batch | best rate" in text


def test_a_grid_that_tests_against_no_method_is_refused() -> None:
    methods = {"random": {"rates": [0.1, 0.2, 0.3], "against": "esi-of-old"}}
    with pytest.raises(ValueError, match="random is tested against 'esi-of-old', which is not a method"):
        MethodsOfSet.model_validate({"methods": methods})


def test_flags_count_as_the_reports_rates_do(tmp_path: Path) -> None:
    """An empty answer is neither an attack that succeeded nor a refusal, a thought is not the answer, and what was
    excluded is missing."""
    answers = ["", "Sure, it is", REFUSAL, f"<think>{REFUSAL}</think>Sure", "<think>I ponder"]
    rows = [
        {"model": "tuned", "set": f"report-{kind}", "index": index, "response": answer, "excluded": None}
        for kind in ("harmful", "benign")
        for index, answer in enumerate(answers)
    ]
    rows += [
        {**rows[1], "index": 9, "excluded": "too long"},
        {**rows[1], "model": "base"},
        {**rows[1], "set": "choose-harmful"},
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = tune_tests.flags_of(tmp_path)
    verdicts = [verdict.unsafe for verdict in judge_by_words(answers)]
    assert flags["not refused"] == [*verdicts, None] == [False, True, False, True, None, None]
    assert flags["over-refused"] == refused(answers) == [False, False, True, False, None]


def test_a_cell_that_measured_nothing_is_not_compared(plan: Plan) -> None:
    rows = [{"method": "esi", "seed": 0, "lr": 1e-3, "choose": {"not refused": [0.5, 0, 1, 40, 0]}}]
    assert set(tune_results.chosen_rates(rows, "esi", 0).values()) == {None}


def spa_row(frozen: str, lr: float, loss: float, not_refused: float) -> dict:
    choosing = {"not refused": [not_refused, 0.0, 1.0, 40, 0]}
    return {
        "task": "kinds",
        "frozen": frozen,
        "lr": lr,
        "seed": 0,
        "loss": {"kinds": loss},
        "choose": choosing | {"over-refused": [0.0], "incoherent, benign": [0.0]},
    }


def test_frozen_masks_are_compared_where_the_task_is_learnt() -> None:
    rows = [
        spa_row("nothing", 2e-5, 1.8, 0.0),  # falls by 0.2 of the 1.0 that nothing frozen reaches: not learnt
        spa_row("nothing", 1e-4, 1.0, 0.5),
        spa_row("esi-0.3", 1e-4, 1.04, 0.25),
        spa_row("random-0.3", 1e-4, 1.03, 0.5),
        spa_row("snip-0.3", 1e-4, 1.2, 0.0),
    ]

    def flags(row: dict) -> dict:
        count = round(40 * row["choose"]["not refused"][0])
        return {"not refused": [index < count for index in range(40)], "over-refused": [False] * 40}

    assert [row["frozen"] for row in tune_tests.learnt(rows, 2.0)] == ["nothing", "esi-0.3", "random-0.3"]
    assert tune_tests.learnt(rows[1:], 0.9) == [] and tune_tests.learnt(rows[2:], 2.0) == []
    tests = {(row["method"], row["rival"], row["measure"]): row
             for row in tune_tests.spa_comparisons(rows, {"kinds": 2.0}, flags)}  # fmt: skip
    assert {key[:2] for key in tests} == {
        ("esi-0.3", "nothing"), ("esi-0.3", "random-0.3"), ("esi-0.3", "snip-0.3"), ("snip-0.3", "nothing"),
        ("snip-0.3", "random-0.3"),
    }  # fmt: skip
    assert tests["esi-0.3", "nothing", "not refused"]["difference"] == -0.25
    assert tests["esi-0.3", "random-0.3", "over-refused"]["difference"] == 0.0
    assert tests["esi-0.3", "snip-0.3", "not refused"]["verdict"] == "no seed where both get there"
    assert "| kinds | esi-0.3 | nothing | not refused | 1 | 40 | -25.0 |" in tune_page.spa_tests(list(tests.values()))


def test_noise_on_the_masks_of_controls(plan: Plan) -> None:
    """Their highest scores alone, with the least noise; the page and the picture tell them from ESI's."""
    cells = {cell.name: cell for cell in all_cells(plan, None) if cell.part == "noise"}
    assert list(cells)[2:] == ["noise/greedy-benign-prompts", "noise/greedy-shuffled-judge", "noise/greedy-specific",
                               "noise/greedy-specific-more"]  # fmt: skip
    levels = plan.grid.noise.noise
    for name, cell in cells.items():
        perturb = dict(cell.steps[0].config or {})["perturb"]
        folder = Path(perturb["mask"]).relative_to(plan.folders.output)
        assert str(folder).startswith(cell.after[0]), name  # the mask is of the cell that it waits for
        expected = levels if cell.facts["mask"] == "esi" else levels[1:] if name.endswith("-more") else levels[:1]
        assert (perturb["noise"], "orders" in perturb) == (expected, cell.facts["mask"] != "esi")
        about = {"measure": "attack_success", "judge": "words", "set": "report-harmful", "order": "top", "ratio": 0.01}
        curves = [
            {**about, "noise": noise, "rate": noise / 2, "low": 0.0, "high": 1.0, "n": 40, "missing": 0}
            for noise in [0.0, *perturb["noise"]]
        ]
        run = plan.folders.output / cell.name / "perturb"
        run.mkdir(parents=True)
        (run / "report.json").write_text(json.dumps({"curves": curves}))
    rows = tune_results.noise_rows(list(cells.values()), plan.folders.output)
    assert len(rows) == 2 * 4 + 2 * 2 + 4  # the model as it is once a mask
    not_run = [{"cell": cell, "state": "not run"} for cell in ("noise/sampled", "noise/greedy-specific-more")]
    text = "".join(tune_page.noise_section({"noise": rows, "cells": [{"cell": "noise/greedy", "state": "done"}]}))
    row = "| greedy | benign prompts | attack_success | words | report-harmful | top | 0.38 | 19.0 [0.0, 100.0] | 40 |"
    assert row in text and text.count("| 0.38 |") == 5
    assert "not run" not in text
    text = "".join(tune_page.noise_section({"noise": [], "cells": not_run}))
    assert "| sampled | esi | – | – | – | – | – | not run | – |" in text and "real-noise.png" not in text
    assert "| greedy | specific, more noise |" in text
    greedy, sampled = plots.noise(rows).axes
    assert greedy.get_legend_handles_labels()[1] == [
        "top", "random", "bottom", "benign prompts", "shuffled judge", "specific",
    ]  # fmt: skip
    assert len(sampled.get_legend_handles_labels()[1]) == 3


def test_cells_that_were_not_run_are_rows(plan: Plan, tmp_path: Path) -> None:
    """Of every kind, one a method or frozen setting with its rates; not those that finished cells may never ask for."""
    evaluate(plan, set_cells(plan, "esi")[1e-3], 0.25, 0.05)
    write_pages(plan, all_cells(plan, None), tmp_path / "docs")
    text = (tmp_path / "docs/real.md").read_text()
    middle, ends = ", ".join(f"{rate:g}" for rate in plan.grid.set.methods["esi"].rates[1:-1] if rate != 1e-3), "0.01"
    assert f"| esi | {middle} | 0 | not run |" in text and f"| esi | {ends} |" not in text
    assert "| kinds | not tuned | – | – | not run | not run |" in text
    assert (
        "| kinds | esi-0.3 | 2e-05, 0.0001 | not run |" in text and "| poisoned | nothing | 2e-05 | not run |" in text
    )
    assert text.count("| sampled | esi | – |") == 1
    settings, cells = (
        {"seeds": [0]},
        [{"cell": f"spa/kinds/esi-0.3-1e-05-s{seed}", "state": "started"} for seed in (1, 0)],
    )
    rates = tune_page.rates_not_run({"settings": settings, "cells": cells}, "spa")
    assert rates == {"kinds/esi-0.3": "1e-05, 1e-05 (seed 1)"}


def test_the_picture_of_spa(plan: Plan) -> None:
    """A panel a task that has a score; equal scores beside each other, others where they are."""

    def row(task: str, frozen: str, lr: float, right: float | None, not_refused: float) -> dict:
        score = None if right is None else [right, right - 0.1, right, 60]
        return {
            "task": task,
            "frozen": frozen,
            "lr": lr,
            "accuracy": score,
            "report": {"not refused": [not_refused, 0, 1]},
        }

    rows = [
        row("kinds", "nothing", 2e-5, 1.0, 0.25),
        row("kinds", "esi-0.3", 2e-5, 1.0, 0.125),
        row("kinds", "esi-0.3", 1e-4, 0.5, 0.5),
        row("gsm8k", "nothing", 2e-5, None, 0.5),
    ]
    base = {"model": plan.models[0], "report": {"not refused": [0.1, 0.05, 0.2, 80, 0]}}
    data = {"settings": {"seeds": [0]}, "models": plan.models, "base": [base], "set": [], "spa": rows, "noise": []}
    figure = tune_page.figures(data)["real-spa.png"]
    (axes,) = figure.axes
    points = [container.lines[0].get_xydata()[0].tolist() for container in axes.containers]
    assert [y for _, y in points] == [25, 12.5, 50] and points[2][0] == 50
    assert points[0][0] + points[1][0] == pytest.approx(200) and 0 < points[1][0] - points[0][0] < 5
    (legend,) = [text for text in [axes.get_legend()] if text]
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["not tuned", "nothing frozen", "esi-0.3 frozen", "rate 2e-05", "rate 0.0001"]
    assert tune_page.figures({**data, "spa": rows[3:]}) == {}


def test_right_answers_of_tasks() -> None:
    right = tune_results.is_right
    assert right("gsm8k", "So 3 + 4 = 7. The answer is 1,007.", "... #### 1007")
    assert not right("gsm8k", "7 of 8", "#### 7") and not right("gsm8k", "none", "#### 7")
    assert right("medical", "Yes, it does.", "yes") and not right("medical", "It says yes", "yes")
    assert not right("kinds", "", "causes")


def test_accuracy_counts_missing_answers_as_wrong(tmp_path: Path) -> None:
    write_files(tmp_path, {"kinds-heldout": [{"prompt": str(i), "response": "causes"} for i in range(4)]})
    rows = [{"model": "tuned", "set": "kinds-heldout", "index": i, "response": text}
            for i, text in enumerate(("causes", "treatment", "Causes."))]  # fmt: skip
    rows.append({"model": "base", "set": "kinds-heldout", "index": 3, "response": "causes"})
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = tune_results.accuracy(tmp_path / "answers.jsonl", tmp_path / "kinds-heldout.jsonl", "kinds", "tuned")
    assert (values[0], values[3]) == (0.5, 4) and values[1] < 0.5 < values[2]


def test_the_tuned_model_is_dropped_once_it_is_evaluated(plan: Plan) -> None:
    one = Cell("where/a", "x", (Step("set", {}), Step("eval", {})), drops=("set/model",))
    model = plan.folders.output / "where/a/set/model"
    model.mkdir(parents=True)
    with pytest.raises(Interrupted):
        start(plan, [one], Commands(codes={"a:eval": 75}))
    assert model.is_dir()
    assert start(plan, [one], Commands()) == {"a": "done"} and not model.exists()


def test_steps_that_are_modules(plan: Plan) -> None:
    cells = {cell.name: cell for cell in all_cells(plan, None)}
    lora, select = cells["set/lora-1-0.001-s0"], cells["masks/smollm2-aligned/esi-0.3"]
    assert command_of(lora.steps[0], Path("/f"))[1:5] == ["-m", "study.real.lora", "--config", "/f/lora.yaml"]
    assert command_of(select.steps[0], Path("/f"))[1:4] == ["-m", "esi_ds.mask", "select"]
    maths = dict(cells["spa/gsm8k/nothing-2e-05-s0"].steps[1].config or {})["eval"]["benign"]
    kinds = dict(cells["spa/kinds/nothing-2e-05-s0"].steps[1].config or {})["eval"]["benign"]
    assert (len(maths), len(kinds)) == (
        2,
        3,
    )  # 32 tokens are too few for an answer to GSM8K: its loss alone is measured
    frozen = cells["spa/kinds/esi-0.3-2e-05-s0"]
    assert frozen.after == (select.name,) and dict(frozen.steps[0].config or {})["tune"]["mask"].endswith(
        "esi-0.3/mask"
    )


def test_pages_are_written_beside_the_cells_unless_a_folder_is_named(plan: Plan, tmp_path: Path) -> None:
    """docs/results holds the figures of cells that this output lacks."""
    published = ROOT / "docs/results/real.json"
    before = published.read_bytes()
    output = tmp_path / "study"
    assert command.main(["--output", str(output), "--models", str(plan.folders.models), "--collect"]) == 0
    assert published.read_bytes() == before and (output / "pages/real.md").exists()


def test_every_number_of_prompts_has_a_row_of_overlaps(plan: Plan) -> None:
    where = plan.grid.where.model_dump()
    assert tuple(where["against_control"]) == AGAINST_CONTROL
    rows = {
        row["what"]
        for row in overlap_rows(Masks([], Path(), "soft", 64), plan.models, (0, 1, 2), where, plan.larger_parts())
    }
    assert rows >= {f"esi: {count} prompts" for count in where["counts"] if count > 64}
    assert {"esi: other 128 prompts", "esi: other 256 prompts"} <= rows and "esi: other 512 prompts" not in rows
