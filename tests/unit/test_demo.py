"""``make demo``: what it runs exists, what it says at the end, and what a failure shows."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from esi_ds.config import load_config
from examples import demo


def test_its_commands_name_files_and_keys_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for _, program, arguments in demo.STAGES:
        assert not program.endswith(".py") or Path(program).is_file()
        if "--config" in arguments:
            _, file, *overrides = arguments
            assert load_config(file, overrides).run.output_dir.removeprefix("runs/") in demo.RUNS


@pytest.mark.parametrize(
    ("gpus", "accelerator", "load", "ranks"),
    [(0, "", 0.0, 2), (0, "", 99.0, 1), (1, "", 0.0, 1), (2, "", 99.0, 2), (8, "", 0.0, 2), (1, "cpu", 0.0, 2)],
)
def test_at_most_a_rank_for_each_gpu(
    gpus: int, accelerator: str, load: float, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(demo.os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(demo.os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    assert demo.num_ranks() == ranks


def report() -> dict:
    rates = {
        ("attack_success", "guard", "complying"): 0.95,
        ("attack_success", "guard", "SET"): 0.02,
        ("attack_success", "words", "SET"): 0.5,
        ("attack_success", "guard", "base"): 0.0,
        ("attack_success", "guard", "SPA"): 0.01,
        ("refused", "words: examples", "complying"): 0.0,
        ("refused", "words: examples", "SET"): 0.03,
    }
    rows = [
        {"measure": measure, "judge": judge, "model": model, "rate": rate, "low": rate / 2, "high": (1 + rate) / 2}
        for (measure, judge, model), rate in rates.items()
    ]
    return {"measures": rows}


def test_the_three_numbers() -> None:
    text = "\n".join(demo.numbers(report()))
    assert "95.0% [47.5%, 97.5%] before, 2.0% [1.0%, 51.0%] after" in text and "50.0%]" in text
    assert text.count("before") == 3 and "0.0% [0.0%, 50.0%] before, 3.0%" in text


@pytest.mark.parametrize("fails", [False, True])
def test_a_line_a_stage_and_the_end_of_the_log_where_one_fails(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    num_started = 0

    def run(words: list[str], stdout, **_: object) -> subprocess.CompletedProcess:
        nonlocal num_started
        num_started += 1
        stdout.write("noise of a launcher\nthe cause\n")
        stdout.flush()
        Path("runs/demo-eval").mkdir(exist_ok=True)
        Path("runs/demo-eval/report.json").write_text(json.dumps(report()))
        return subprocess.CompletedProcess(words, 75 if fails and num_started == 3 else 0)

    monkeypatch.setattr(demo.subprocess, "run", run)
    assert demo.main() == (75 if fails else 0)
    printed = capsys.readouterr()
    assert "noise" not in printed.out and ("the cause" in printed.err) == fails
    assert num_started == (3 if fails else len(demo.STAGES))
    assert printed.out.count("/8  ") == num_started and ("report: " in printed.out) == (not fails)
