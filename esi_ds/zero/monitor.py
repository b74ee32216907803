"""DeepSpeed's monitors (CSV files, Weights & Biases, Comet, its own TensorBoard) without an engine.

The engine would write what it knows of its own optimizer steps, of which most stages make none: these get the run's own
curves instead, and the engine none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from pydantic import ValidationError

from esi_ds.artifacts import write_text_atomic
from esi_ds.errors import UserError
from esi_ds.zero import runtime


class Monitors:
    """Rank 0's monitors of one run."""

    def __init__(self, master: MonitorMaster):
        self._master = master
        self._last_step = 0
        self._cut: set[str] = set()  # curves of CSV files that this process has gone on with

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A point in each curve."""
        master, events = self._master, [(name, value, step) for name, value in values.items()]
        if master.csv_monitor is not None and master.csv_monitor.enabled:
            for name in values.keys() - self._cut:
                self._go_on_with(name, step)
        for monitor in (master.tb_monitor, master.csv_monitor, master.comet_monitor):
            if monitor is not None:
                monitor.write_events(events)
        if master.wandb_monitor is not None:
            # W&B drops what comes at a lower step than something before it, and every phase counts from its own start.
            self._last_step = max(self._last_step, step)
            master.wandb_monitor.write_events([(name, value, self._last_step) for name, value in values.items()])

    def _go_on_with(self, name: str, step: int) -> None:
        """Drop what an earlier process wrote of a curve from ``step`` on, for it comes again; the header must not."""
        self._cut.add(name)
        monitor, filename = self._master.csv_monitor, name.replace("/", "_").replace(" ", "_")  # as DeepSpeed names it
        file = Path(monitor.log_dir) / f"{filename}.csv"
        if not file.is_file():
            return
        head, *rows = file.read_text().splitlines()
        kept = [row for row in rows if (at := row.partition(",")[0]).isdecimal() and int(at) < step]
        write_text_atomic(file, "".join(f"{row}\n" for row in (head, *kept)))
        monitor.filenames.append(filename)

    def close(self) -> None:
        """Everything is sent and on disk. DeepSpeed leaves that to the interpreter's end, which our commands skip."""
        if self._master.tb_monitor is not None:
            self._master.tb_monitor.summary_writer.close()
        if self._master.comet_monitor is not None:
            self._master.comet_monitor.experiment.end()
        if self._master.wandb_monitor is not None:
            import wandb

            wandb.finish()


def open_monitors(sections: Mapping[str, Mapping[str, Any]]) -> Monitors | None:
    """Rank 0's monitors; None elsewhere, and where none is asked for. One broadcast, and none without a monitor.

    sections: those of the DeepSpeed config that are enabled, by name. Raises UserError on every rank where a section
    has a wrong key, or its monitor does not start.
    """
    if not sections:
        return None
    try:
        config = get_monitor_config({name: dict(section) for name, section in sections.items()})
    except ValidationError as error:
        found = error.errors()[0]
        field = ".".join(["deepspeed", *map(str, found["loc"])])
        raise UserError(field, found["input"], found["msg"], "see DeepSpeed's documentation of its monitors") from error
    made, problem = None, None
    if runtime.is_main():
        try:
            made = Monitors(MonitorMaster(config))
        except Exception as error:  # whatever a service's client raises: no login, no network, no such project
            problem = f"{type(error).__name__}: {error}"
    if problem := runtime.broadcast_object(problem):
        names = ", ".join(f"deepspeed.{name}" for name in sections)
        raise UserError(names, None, f"could not start ({problem})", "set it up, or set enabled to false")
    return made
