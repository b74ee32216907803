"""DeepSpeed's monitors (CSV files, Weights & Biases, Comet, TensorBoard) without an engine.

The engine would write curves of its optimizer steps, of which most stages make none. Here the monitors get the curves
of the run, and the engine gets no monitor.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from pydantic import ValidationError

from esi_ds.artifacts import MAX_NAME, write_text_atomic
from esi_ds.errors import UserError
from esi_ds.event_files import withdraw
from esi_ds.zero import runtime

STEP = "step"  # in W&B: what the run calls the step of a point
MAX_CSV_NAME = 200  # bytes that are left of the name of a curve whose file could not have all of it


class Monitors:
    """Rank 0's monitors of one run."""

    def __init__(self, master: MonitorMaster):
        self._master = master
        self._wandb_step = _begin_wandb() if master.wandb_monitor is not None else 0
        self._continued: set[str] = set()  # curves whose CSV file goes on where this process does

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve. values: by name of the curve."""
        master, events = self._master, [(name, value, step) for name, value in values.items()]
        if master.csv_monitor is not None and master.csv_monitor.enabled:
            for name in values.keys() - self._continued:
                self._continue_csv(name, step)
            master.csv_monitor.write_events([(_csv_name(name), *point) for name, *point in events])
        for monitor in (master.tb_monitor, master.comet_monitor):
            if monitor is not None:
                monitor.write_events(events)
        if master.wandb_monitor is not None:
            # W&B merges the points of one step, drops those of a lower one, and every phase counts its steps from 0.
            self._wandb_step += 1
            points = {STEP: step, **values}
            master.wandb_monitor.write_events([(name, value, self._wandb_step) for name, value in points.items()])

    def resume_at(self, step: int, names: Collection[str]) -> None:
        """Drop the points of these curves after ``step``; those of a CSV file when its next point is written. Services
        keep what they have been sent."""
        self._continued.difference_update(names)
        monitor = self._master.tb_monitor
        if monitor is not None and monitor.enabled:
            withdraw(monitor.summary_writer, step, lambda tag: tag in names)

    def _continue_csv(self, name: str, step: int) -> None:
        """Drop the points from ``step`` on, which will be written again, and keep the header."""
        self._continued.add(name)
        monitor = self._master.csv_monitor
        filename = _csv_name(name).replace("/", "_").replace(" ", "_")  # as DeepSpeed names it
        file = Path(monitor.log_dir) / f"{filename}.csv"
        if not file.is_file():
            return
        lines = file.read_text().splitlines()
        if not lines:  # as a full disk or a kill leaves it: DeepSpeed writes the header
            return
        kept = [row for row in lines[1:] if (number := row.partition(",")[0]).isdecimal() and int(number) < step]
        write_text_atomic(file, "".join(f"{row}\n" for row in (lines[0], *kept)))
        monitor.filenames.append(filename)

    def close(self) -> None:
        """Send and write everything. DeepSpeed leaves that to the interpreter's exit, which our commands skip."""
        if self._master.tb_monitor is not None:
            self._master.tb_monitor.summary_writer.close()
        if self._master.comet_monitor is not None:
            self._master.comet_monitor.experiment.end()
        if self._master.wandb_monitor is not None:
            import wandb

            wandb.finish()


def _csv_name(name: str) -> str:
    """The curve's name for the CSV monitor, which names a file after it. A name too long for a file is cut to its end,
    behind a digest of the whole."""
    encoded = os.fsencode(name)
    if len(encoded) <= MAX_NAME - len("..csv.tmp"):  # as the file is called while it is written anew
        return name
    return f"{hashlib.sha256(encoded).hexdigest()[:8]} {encoded[-MAX_CSV_NAME:].decode(errors='ignore')}"


def _begin_wandb() -> int:
    """Have W&B draw the curves over ``STEP``. Returns the last step of its own, above 0 in a run that goes on."""
    import wandb

    wandb.define_metric(STEP)
    wandb.define_metric("*", step_metric=STEP)
    return int(wandb.run.step)


def open_monitors(sections: Mapping[str, Mapping[str, Any]]) -> Monitors | None:
    """Rank 0's monitors; None on other ranks, and where no monitor is enabled. One broadcast unless none is enabled.

    sections: the enabled ones of the DeepSpeed config, by name. Raises UserError on every rank where a section is
    invalid or its monitor does not start.
    """
    if not sections:
        return None
    try:
        config = get_monitor_config({name: dict(section) for name, section in sections.items()})
    except ValidationError as error:
        details = error.errors()[0]
        field = ".".join(["deepspeed", *map(str, details["loc"])])
        remedy = "see DeepSpeed's documentation of its monitors"
        raise UserError(field, details["input"], details["msg"], remedy) from error
    monitors, problem = None, None
    if runtime.is_main():
        try:
            monitors = Monitors(MonitorMaster(config))
        except Exception as error:  # any error of a service's client: no login, no network, an unknown project
            problem = f"{type(error).__name__}: {error}"
    if problem := runtime.broadcast_object(problem):
        names = ", ".join(f"deepspeed.{name}" for name in sections)
        raise UserError(names, None, f"could not start ({problem})", "set it up, or set enabled to false")
    return monitors
