"""DeepSpeed's monitors after a restart: curves go on where they were."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import deepspeed.comm
import pytest
from deepspeed.monitor.comet import CometMonitor
from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig, get_monitor_config
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.tensorboard import TensorBoardMonitor
from deepspeed.monitor.wandb import WandbMonitor

from esi_ds.config import validate
from esi_ds.deepspeed_config import monitor_settings
from esi_ds.zero.monitor import Monitors


def write_csv(folder: Path, steps: range, names: Sequence[str]) -> None:
    """The curves that one process writes."""
    csv_monitor = csvMonitor(CSVConfig(enabled=True, output_path=str(folder), job_name="job"))
    monitors = Monitors(
        SimpleNamespace(tb_monitor=None, csv_monitor=csv_monitor, comet_monitor=None, wandb_monitor=None)
    )
    for step in steps:
        monitors.write(step, {name: float(step) for name in names})


def test_csv_curves_hold_each_step_once_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, the second from an earlier step on; one curve had a torn last line, one is new."""
    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 0)

    write_csv(tmp_path, range(1, 5), ("loss", "progress/tune"))
    with (tmp_path / "job/loss.csv").open("a") as opened:
        opened.write("5,")
    write_csv(tmp_path, range(3, 7), ("loss", "progress/tune", "speed/tune"))
    for name, first in (("loss", 1), ("progress_tune", 1), ("speed_tune", 3)):
        head, *rows = (tmp_path / f"job/{name}.csv").read_text().splitlines()
        assert head == f"step,{name.rpartition('_')[2]}"
        assert rows == [f"{step},{float(step)}" for step in range(first, 7)]


def test_a_csv_file_that_a_full_disk_left_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed makes the file before there is room for what it holds."""
    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 0)
    (tmp_path / "job").mkdir()
    (tmp_path / "job/loss.csv").touch()
    write_csv(tmp_path, range(1, 3), ("loss",))
    assert (tmp_path / "job/loss.csv").read_text().splitlines() == ["step,loss", "1,1.0", "2,2.0"]


@pytest.mark.parametrize(("filler", "length"), [("x", 246), ("x", 247), ("x", 300), ("ü", 150)])
def test_csv_curves_with_long_names(filler: str, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves are named after sets, judges and models, often by their paths. A file's name has at most 255 bytes, and so
    has that of the temporary file by which a restart replaces it."""
    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 0)
    names = [f"{first}/".ljust(length - 5, filler) + "/rate" for first in "ab"]
    for steps in (range(1, 5), range(3, 7)):
        write_csv(tmp_path, steps, names)
    files = sorted((tmp_path / "job").iterdir())
    assert len(files) == 2
    for file in files:
        assert file.read_text().splitlines() == ["step,rate", *(f"{step},{float(step)}" for step in range(1, 7))]


def test_runs_that_share_a_deepspeed_config_have_folders_of_their_own() -> None:
    shared = {"enabled": True, "output_path": "curves", "job_name": "llama"}

    def folders(run: str, identity: str) -> dict[str, str]:
        deepspeed = {"csv_monitor": shared, "tensorboard": {"enabled": True}}
        config = validate({"run": {"output_dir": run}, "model": {"path": "m"}, "deepspeed": deepspeed})
        sections = monitor_settings(config, identity)
        return {name: f"{section['output_path']}/{section['job_name']}" for name, section in sections.items()}

    first = folders("runs/set", "0123456789abcdef")
    assert first == {
        "csv_monitor": "curves/llama/set-01234567",
        "tensorboard": "runs/set/deepspeed_tensorboard",
    }
    others = [folders("runs/spa", "0123456789abcdef"), folders("seed-1/set", "123456789abcdef0")]
    assert len({section["csv_monitor"] for section in (first, *others)}) == 3


def test_weights_and_biases_keeps_every_point_of_every_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that merges the points of one step and drops those of an earlier one, as W&B does; its run goes on."""
    rows, axes = dict[int, dict[str, float]](), dict[str, str | None]()

    def log(data: dict[str, float], step: int, commit: bool | None) -> None:
        if step >= max(rows, default=client.run.step):
            rows.setdefault(step, {}).update(data)

    client = SimpleNamespace(
        run=SimpleNamespace(step=7),
        init=lambda **options: None,
        log=log,
        define_metric=lambda name, step_metric=None: axes.update({name: step_metric}),
    )
    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 0)
    monkeypatch.setitem(sys.modules, "wandb", client)
    wandb_monitor = WandbMonitor(WandbConfig(enabled=True, project="p"))
    monitors = Monitors(
        SimpleNamespace(tb_monitor=None, csv_monitor=None, comet_monitor=None, wandb_monitor=wandb_monitor)
    )
    for step in range(1, 4):
        monitors.write(step, {"progress/answer": 10.0 * step})
    for step in range(1, 3):
        monitors.write(step, {"loss": 1.0 / step, "gradient_norm": 2.0})
    assert axes == {"step": None, "*": "step"} and min(rows) > 7
    assert list(rows.values()) == [
        *({"step": step, "progress/answer": 10.0 * step} for step in range(1, 4)),
        *({"step": step, "loss": 1.0 / step, "gradient_norm": 2.0} for step in range(1, 3)),
    ]


@pytest.mark.parametrize(("section", "steps"), [({}, [8, 16, 20, 20]), ({"samples_log_interval": 10}, [8, 20])])
def test_comet_gets_every_point(section: dict[str, int], steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one, over all answers, may be at the step of the one before. A user's own interval stays."""
    points = []

    def log(name: str, value: float, step: int) -> None:
        points.append((name, value, step))

    experiment = SimpleNamespace(__internal_api__log_metric__=log)
    spec = importlib.machinery.ModuleSpec("comet_ml", None)
    client = SimpleNamespace(start=lambda **options: experiment, __spec__=spec, __version__="3.47.1")
    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 0)
    monkeypatch.setitem(sys.modules, "comet_ml", client)
    config = validate(
        {"run": {"output_dir": "r"}, "model": {"path": "m"}, "deepspeed": {"comet": {"enabled": True, **section}}}
    )
    comet_monitor = CometMonitor(get_monitor_config(monitor_settings(config)).comet)
    monitors = Monitors(
        SimpleNamespace(tb_monitor=None, csv_monitor=None, comet_monitor=comet_monitor, wandb_monitor=None)
    )
    for step in (8, 16, 20, 20):
        monitors.write(step, {"attack_success": step / 100})
    assert points == [("attack_success", step / 100, step) for step in steps]


def test_a_run_that_goes_back_draws_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one process: of what was measured; other curves in the same folder stay."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 0)
    csv_monitor = csvMonitor(CSVConfig(enabled=True, output_path=str(tmp_path), job_name="csv"))
    tensorboard = TensorBoardMonitor(TensorBoardConfig(enabled=True, output_path=str(tmp_path), job_name="tb"))
    monitors = Monitors(
        SimpleNamespace(tb_monitor=tensorboard, csv_monitor=csv_monitor, comet_monitor=None, wandb_monitor=None)
    )
    for start, number in ((1, 10.0), (3, 20.0)):
        monitors.resume_at(start - 1, ["loss"])
        for step in range(start, 5):
            monitors.write(step, {"loss": number + step, f"speed/{number:g}": 1.0})
    monitors.close()
    expected = [(1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0)]
    rows = (tmp_path / "csv/loss.csv").read_text().splitlines()
    assert rows == ["step,loss", *(f"{step},{value}" for step, value in expected)]
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected
    assert [event.step for event in events.Scalars("speed/10")] == [1, 2, 3, 4]
