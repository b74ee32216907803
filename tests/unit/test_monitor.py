"""DeepSpeed's monitors after a restart: curves go on where they were."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import deepspeed.comm
import pytest
from deepspeed.monitor.config import CSVConfig
from deepspeed.monitor.csv_monitor import csvMonitor

from esi_ds.zero.monitor import Monitors


def test_csv_curves_hold_each_step_once_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, the second from an earlier step on; one curve had a torn last line, one is new."""
    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 0)

    def run(steps: range, names: tuple[str, ...]) -> None:
        csv_monitor = csvMonitor(CSVConfig(enabled=True, output_path=str(tmp_path), job_name="job"))
        master = SimpleNamespace(tb_monitor=None, csv_monitor=csv_monitor, comet_monitor=None, wandb_monitor=None)
        monitors = Monitors(master)
        for step in steps:
            monitors.write(step, {name: float(step) for name in names})

    run(range(1, 5), ("loss", "progress/tune"))
    with (tmp_path / "job/loss.csv").open("a") as opened:
        opened.write("5,")
    run(range(3, 7), ("loss", "progress/tune", "speed/tune"))
    for name, first in (("loss", 1), ("progress_tune", 1), ("speed_tune", 3)):
        head, *rows = (tmp_path / f"job/{name}.csv").read_text().splitlines()
        assert head == f"step,{name.rpartition('_')[2]}"
        assert rows == [f"{step},{float(step)}" for step in range(first, 7)]
