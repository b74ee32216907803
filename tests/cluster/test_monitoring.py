"""What a pipeline of all stages shows: one TensorBoard with shared tags, DeepSpeed's monitors, status, one page."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, LaunchedJob, write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from esi_ds.cli import main
from esi_ds.core.mask import Mask

MODELS, DATA = ROOT / "examples/models", ROOT / "examples/data"
ZERO = {"zero_optimization": {"stage": 3}}
MODEL = {"path": str(MODELS / "llama-complying"), "dtype": "fp32"}
ASKED = {
    "prompts": {"path": "examples/harmful", "limit": 6},
    "benign": {"path": "examples/benign", "limit": 4},
    "max_new_tokens": 6,
    "batch_size": 2,
}
JUDGED = {**ASKED, "judges": [{"kind": "guard", "name": "guard", "path": str(MODELS / "guard")}]}
# A client that writes what it is told; the monitors' own ones want an account.
WANDB = """
import json, os
def say(*what):
    with open(os.environ["SAID"], "a") as opened:
        opened.write(json.dumps(what) + "\\n")
def init(**options): say("init", options)
def log(data, step=None, commit=None): say("log", data, step)
def define_metric(name, step_metric=None): say("metric", name, step_metric)
class run: step = 0
def finish(): say("finish")
"""


def esi(folder: Path, name: str, ranks: int, deepspeed: dict, **select) -> LaunchedJob:
    config = {
        "model": MODEL,
        "judge": {"family": "llama-guard-3", "path": str(MODELS / "guard")},
        "data": {"prompts": {"path": "examples/harmful", "limit": 6}},
        "esi": {"max_new_tokens": 6, "batch_size": 1},
        "select": {"ratio": 0.01, **select},
        "deepspeed": deepspeed,
    }
    return LaunchedJob("launch/esi.py", folder, name, ranks, config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A pipeline's folder: two ESI runs, and SET, SPA, an evaluation and a perturbation of the first one's mask."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "clients").mkdir()
    (folder / "clients/wandb.py").write_text(WANDB)
    monitors = {"csv_monitor": {"enabled": True}, "wandb": {"enabled": True, "project": "safety", "group": "one"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder / "clients"))
        patch.setenv("SAID", str(folder / "said.jsonl"))
        esi(folder, "esi", 2, {**ZERO, **monitors}).finish()
    mask = str(folder / "esi/mask")
    tune = {"mask": mask, "max_steps": 5, "batch_size": 2, "lr": 1e-3, "patch": False}
    tune["data"] = {"path": str(DATA / "refusals_train.jsonl")}
    stages = {
        "set": {"tune": tune, "eval": ASKED, "deepspeed": {**ZERO, "csv_monitor": {"enabled": True}}},
        "spa": {"tune": tune, "eval": ASKED},
        "eval": {"eval": {**JUDGED, "models": [{"name": "SET", "path": str(folder / "set/model")}]}},
        "perturb": {"perturb": {"mask": mask, "noise": [0.5, 2.0], "seeds": [0]}, "eval": JUDGED},
    }
    other = esi(folder, "esi-snip", 1, ZERO, criterion="snip")
    for stage, config in stages.items():
        LaunchedJob(f"launch/{stage}.py", folder, stage, 1, {"model": MODEL, **config}).finish()
    other.finish()
    return folder


def tags(run: Path) -> set[str]:
    return set(EventAccumulator(str(run / "tensorboard")).Reload().Tags()["scalars"])


def test_one_tensorboard_for_all_stages(runs: Path) -> None:
    """Below one folder, under tags that stages share."""
    tags_of = {stage: tags(runs / stage) for stage in ("esi", "set", "spa", "eval", "perturb")}
    for stage, phases in {
        "esi": ("generate", "score"),
        "set": ("answer/harmful before", "tune", "answer/benign after"),
        "spa": ("answer/harmful before", "tune", "answer/benign after"),
        "eval": ("answer/base", "answer/SET", "judge/guard", "surprise"),
        "perturb": ("answer/clean", "answer/top 0.01, noise 2, seed 0", "judge/guard"),
    }.items():
        assert {f"{what}/{phase}" for what in ("progress", "speed") for phase in phases} <= tags_of[stage], stage
    assert {"gradient_norm", "memory_gib"} <= tags_of["esi"] & tags_of["set"] & tags_of["spa"]
    assert {"loss", "refused/harmful/words", "refused/benign/words"} <= tags_of["set"] & tags_of["spa"]
    assert "attack_success/examples/harmful/guard/base" in tags_of["eval"]
    assert "noise/attack_success/examples/harmful/guard/top 0.01" in tags_of["perturb"]
    events = EventAccumulator(str(runs / "eval/tensorboard")).Reload()
    rates = [(event.step, event.value) for event in events.Scalars("attack_success/examples/harmful/guard/SET")]
    # While it is judged, and at the end what the report says.
    report = json.loads((runs / "eval/report.json").read_text())
    cell = next(r for r in report["measures"] if r["measure"] == "attack_success" and r["model"] == "SET")
    assert rates[0][0] < rates[-1][0] == 6 and rates[-1][1] == pytest.approx(cell["rate"])
    events = EventAccumulator(str(runs / "perturb/tensorboard")).Reload()
    curve = [event.step for event in events.Scalars("noise/attack_success/examples/harmful/guard/bottom 0.01")]
    assert curve == [0, 50, 200]


def test_csv_files_hold_the_curves(runs: Path) -> None:
    for stage, name in (("esi", "judge_score"), ("set", "loss")):
        with (runs / stage / f"deepspeed_csv_monitor/{name}.csv").open(newline="") as opened:
            rows = [(int(row["step"]), float(row[name])) for row in csv.DictReader(opened)]
        metrics = [json.loads(line) for line in (runs / stage / "metrics.jsonl").read_text().splitlines()]
        assert rows == [(row["step"], pytest.approx(row[name])) for row in metrics] and len(rows) >= 3
    assert (runs / "esi/deepspeed_csv_monitor/progress_generate.csv").is_file()


def test_weights_and_biases_gets_them_once_and_in_order(runs: Path) -> None:
    """Rank 0 alone, one run, closed at its end; no step before an earlier one, which W&B would drop."""
    said = [json.loads(line) for line in (runs / "said.jsonl").read_text().splitlines()]
    assert [what for what, *_ in said if what not in ("log", "metric")] == ["init", "finish"]
    assert said[-1] == ["finish"] and ["metric", "*", "step"] in said
    assert said[0][1]["project"] == "safety" and said[0][1]["group"] == "one"
    points = [(data, step) for what, data, step in said[1:-1] if what == "log"]
    steps = [step for _, step in points]
    assert steps == sorted(steps)
    logged = {name for data, _ in points for name in data}
    assert {"judge_score", "progress/generate", "progress/score"} <= logged


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"wandb": {"enabled": True}}, ["deepspeed.wandb.enabled", "pip install wandb"]),
        ({"comet": {"enabled": True}}, ["deepspeed.comet.enabled", "pip install comet_ml"]),
        ({"csv_monitor": {"enabled": "yes"}}, ["deepspeed.csv_monitor.enabled", "neither true nor false"]),
    ],
)
def test_a_monitor_that_is_not_there(sections: dict, words: list[str], tmp_path: Path, capsys) -> None:
    base = {"run": {"output_dir": str(tmp_path / "run")}, "model": MODEL, "eval": JUDGED}
    file = write_config(tmp_path, base, {"deepspeed": {**ZERO, **sections}})
    assert main("eval", ["--config", str(file)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("error:") == 1 and all(word in shown for word in words) and not (tmp_path / "run").exists()


def test_status_of_every_stage(runs: Path) -> None:
    stages = {"esi": "score", "set": "answer: benign after", "spa": "answer: benign after", "eval": "judge: guard"}
    stages["perturb"] = "judge: guard"
    command = [sys.executable, "-m", "esi_ds.status", "--json", *(str(runs / stage) for stage in stages)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for (stage, phase), line in zip(stages.items(), shown, strict=True):
        status = json.loads(line)
        assert (status["state"], status["stage"], status["phase"]) == ("done", stage, phase)
        assert status["done"] == status["total"] > 0 and status["rate"] > 0
        assert status["last_checkpoint"]["file"].endswith(".jsonl")  # the run is done: its checkpoints are gone


def test_one_page_of_all_runs(runs: Path, capsys) -> None:
    """Two ESI runs whose masks are held against each other, SET and SPA, an evaluation, noise; links lead there."""
    sys.path.insert(0, str(ROOT / "launch"))
    from report import main as report_main

    names = ["esi", "esi-snip", "set", "spa", "eval", "perturb"]
    assert report_main([str(runs / name) for name in names]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(runs / "overview.html")
    page = (runs / "overview.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    links = set(re.findall(r'href="([^"#]+)"', page))
    assert links == {f"{name}/report.html" for name in names} and all((runs / link).is_file() for link in links)
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(re.findall(r'id="([^"]+)"', page))
    one, other = (Mask.load(runs / name / "mask") for name in ("esi", "esi-snip"))
    both = sum(int((one.bits(name) & other.bits(name)).sum()) for name in one.names)
    assert 0 < both < one.k and f'<td class="n">{both:,}</td><td class="n">{100 * both / one.k:.1f} %</td>' in page
    assert "attack success" in page and "rate against noise" in page and "loss of every run by step" in page
    # One run alone, and the older way of showing the others on ESI's own page, make no such page.
    (runs / "overview.html").unlink()
    assert report_main([str(runs / "esi"), "--tuned", str(runs / "set"), "--evaluated", str(runs / "eval")]) == 0
    assert "What tuning did, before and after" in (runs / "esi/report.html").read_text()
    assert report_main([str(runs / "set")]) == 0 and not (runs / "overview.html").exists()
    assert report_main([str(runs / "set"), str(runs / "nowhere")]) == 2 and "RUN" in capsys.readouterr().err
