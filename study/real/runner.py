"""Runs cells one after the other, each a few commands in a folder; stops before one for which the hours are too few.

``CELL/cell.json`` says what was run and how it ended; with it a start knows what is left. A killed command goes on by
itself: the stages keep their state in their run folders.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from esi_ds.artifacts import write_json_atomic, write_text_atomic
from esi_ds.config.yaml import dump_yaml, parse_yaml
from esi_ds.errors import Interrupted, UserError
from study.real.grid import ROOT, Cell, Device, Plan, Step
from study.real.model_digests import model_digests, model_names

RECORD = "cell.json"
EXIT_INTERRUPTED = 75
PARENT_DEATH_SIGNAL = 1  # prctl's number, PR_SET_PDEATHSIG
State = Literal["done", "failed", "waits", "no time", "not needed"]
Due = Callable[[Cell], bool]
RunCommand = Callable[[Sequence[str], Path, Device], int]


@dataclass(frozen=True)
class Outcome:
    """What became of a cell in this start. reason: why it is not done."""

    cell: str
    state: State
    seconds: float = 0.0
    reason: str = ""


def command_of(step: Step, folder: Path) -> list[str]:
    """The command of a step: a stage with its config, or a module."""
    config = ["--config", str(folder / f"{step.stage}.yaml")] if step.config is not None else []
    module = step.stage if "." in step.stage else f"study.real.{step.stage}"
    program = ["-m", module] if step.is_module else [str(ROOT / f"launch/{step.stage}.py")]
    return [sys.executable, *program, *config, *step.arguments]


def environment(device: Device) -> dict[str, str]:
    """One process has all cores. On the CPU no GPU is seen, also where there is one."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    more = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "PYTHONPATH": path}
    if device == "cpu":
        more |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return {**os.environ, **more}


def end_with(parent: int, prctl: Callable[[int, int], int]) -> None:
    """Have this process, a new one, get a SIGTERM once its parent has ended, however that was (prctl(2), Linux)."""
    prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGTERM)


def run_command(command: Sequence[str], log: Path, device: Device) -> int:
    """Run a command, its output behind that of earlier starts; the exit code. It gets a SIGTERM for one, for Ctrl-C,
    for a closed terminal, and on Linux for a SIGKILL of this process, after which it would write on beside the next
    start.

    Raises Interrupted after a signal, once the command has saved and ended, however that was: a finished stage has
    nothing to do at the next start.
    """
    signals: list[int] = []
    with log.open("a") as output:
        output.write(f"$ {shlex.join(command)}\n")
        output.flush()
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(device),
            start_new_session=True,
            cwd=ROOT,
            preexec_fn=partial(end_with, os.getpid(), ctypes.CDLL(None).prctl) if sys.platform == "linux" else None,
        )

        def hand_on(number: int, _: object) -> None:
            signals.append(number)
            process.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if signals or code in (EXIT_INTERRUPTED, -signal.SIGTERM):
        raise Interrupted(f"{log.with_suffix('')} was stopped by a signal; start again")
    return code


def read_record(folder: Path) -> dict[str, Any]:
    """What ``CELL/cell.json`` says; empty where the cell was never started."""
    file = folder / RECORD
    record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return record


def is_done(cell: Cell, output: Path) -> bool:
    """Whether the cell has been run. Raises UserError where that was with other settings, but for ``deepspeed``, whose
    file lies elsewhere in another checkout."""
    folder = output / cell.name
    record = read_record(folder)
    if record.get("state") != "done":
        return False
    for step in cell.steps:
        file = folder / f"{step.stage}.yaml"
        command = shlex.split(record["steps"][step.stage]["command"])
        if step.arguments and command[-len(step.arguments) :] != list(step.arguments):
            remedy = "give another --output, or delete the cell's folder"
            raise UserError("--output", folder, "was run with arguments other than the grid's", remedy)
        if step.config is not None and _settings(file.read_text(encoding="utf-8")) != _settings(dump_yaml(step.config)):
            remedy = "give another --output, or delete the cell's folder"
            raise UserError("--output", folder, "was run with a config other than the grid's", remedy)
    return True


def _settings(text: str) -> dict[str, Any]:
    """The sections of a config, but for ``deepspeed``."""
    return {name: section for name, section in parse_yaml(text).items() if name != "deepspeed"}


def check_models(plan: Plan, cells: Sequence[Cell], models_needed: bool = True) -> None:
    """Raise UserError for a cell that was begun with other models or judges than are in ``--models`` now or than
    another cell was, or that does not say with which.

    Every cell is bound to all of them: it may read the masks and answers that another cell made with a judge.
    models_needed: raise UserError, too, where ``--models`` lacks one; else it is compared between cells alone.
    """
    records = {cell.name: read_record(plan.folders.output / cell.name) for cell in cells}
    of_cells = {name: record.get("models", {}) for name, record in records.items() if record}
    if not of_cells:
        return
    now, (first, of_first) = model_digests(plan, models_needed), next(iter(of_cells.items()))
    for name, of_cell in of_cells.items():
        folder = plan.folders.output / name
        if not of_cell:
            remedy = "give another --output, or delete this cell's folder"
            raise UserError("--output", folder, "does not say with which models it was run", remedy)
        if others := [model for model in now if of_cell.get(model) != now[model]]:
            remedy = (
                f"give another --output, or the --models that it was run with: {plan.folders.models} holds others now"
            )
            raise UserError("--output", folder, f"was run with another {others[0]}", remedy)
        if others := [model for model in model_names(plan) if of_cell.get(model) != of_first.get(model)]:
            remedy = "give another --output, or delete the folders of the cells that were run with other models"
            raise UserError("--output", folder, f"was run with another {others[0]} than {first}", remedy)


def seconds_by_kind(cells: Sequence[Cell], output: Path) -> dict[str, list[float]]:
    """``like`` → seconds of the finished cells, of starts that were not killed."""
    seconds: dict[str, list[float]] = {}
    for cell in cells:
        record = read_record(output / cell.name)
        if record.get("state") == "done" and record.get("starts", 1) == 1:
            seconds.setdefault(cell.like, []).append(record["seconds"])
    return seconds


class Runner:
    """Runs the cells of a plan, in their order."""

    def __init__(
        self,
        plan: Plan,
        run: RunCommand = run_command,
        clock: Callable[[], float] = time.monotonic,
        due: Due = lambda cell: True,
    ):
        """due: whether the finished cells ask for a cell; it is asked when the cell's turn comes."""
        self.plan, self.run_command, self.clock, self.due = plan, run, clock, due

    def run(self, cells: Sequence[Cell], everything: Sequence[Cell], hours: float | None = None) -> list[Outcome]:
        """Run the cells that are not done; what became of each of these. A failed one stops only those that need it.

        everything: all cells of the grid, whose finished ones say how long others take. Raises Interrupted, UserError.
        """
        started, output, outcomes = self.clock(), self.plan.folders.output, list[Outcome]()
        done = {cell.name for cell in everything if is_done(cell, output)}
        remaining_cells = [cell for cell in cells if cell.name not in done]
        for index, cell in enumerate(remaining_cells):
            check_models(self.plan, everything)
            if not self.due(cell):
                outcomes.append(Outcome(cell.name, "not needed"))
                continue
            if missing := [name for name in cell.after if name not in done]:
                outcomes.append(Outcome(cell.name, "waits", reason=f"{missing[0]} is not done"))
                continue
            expected = self.plan.expected_s(cell, seconds_by_kind(everything, output))
            if hours is not None and self.clock() - started + expected > 3600 * hours:
                reason = (
                    f"{expected / 60:.0f} minutes are expected, {60 * hours - (self.clock() - started) / 60:.0f} left"
                )
                return outcomes + [Outcome(other.name, "no time", reason=reason) for other in remaining_cells[index:]]
            outcome = self.cell(cell)
            outcomes.append(outcome)
            done |= {cell.name} if outcome.state == "done" else set()
            about = f"{(self.clock() - started) / 60:6.1f} min  {outcome.state:6s}  {outcome.seconds:7.1f} s"
            print(f"{about}  {cell.name}  {outcome.reason}".rstrip(), flush=True)
        return outcomes

    def cell(self, cell: Cell) -> Outcome:
        """Run a cell's commands. Raises Interrupted, and UserError where the models have been made again meanwhile."""
        folder = self.plan.folders.output / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        record = read_record(folder)
        # Seconds of a start that was killed are not known: ``starts`` says that there was one.
        record = {**record, "state": "started", "starts": record.get("starts", 0) + 1, "device": self.plan.device}
        record["models"] = model_digests(self.plan)
        steps: dict[str, Any] = record.setdefault("steps", {})
        write_json_atomic(folder / RECORD, record)
        for step in cell.steps:
            if step.stage in steps:
                continue
            if step.config is not None:
                write_text_atomic(folder / f"{step.stage}.yaml", dump_yaml(dict(step.config)))
            command, started = command_of(step, folder), self.clock()
            code = self.run_command(command, folder / f"{step.stage}.log", self.plan.device)
            seconds = self.clock() - started
            if code != 0:
                write_json_atomic(folder / RECORD, {**record, "state": "failed"})
                reason = f"exit code {code}: {folder / f'{step.stage}.log'}"
                return Outcome(cell.name, "failed", seconds, reason)
            steps[step.stage] = {"seconds": round(seconds, 1), "command": shlex.join(command)}
            write_json_atomic(folder / RECORD, record)
        check_models(self.plan, [cell])  # a step reads them when it starts
        for dropped in cell.drops:
            shutil.rmtree(folder / dropped, ignore_errors=True)
        total = sum(step["seconds"] for step in steps.values())
        write_json_atomic(folder / RECORD, {**record, "state": "done", "seconds": round(total, 1)})
        return Outcome(cell.name, "done", total)


def counts(outcomes: Sequence[Outcome]) -> Mapping[State, int]:
    """How many cells ended in each way."""
    states: dict[State, int] = {}
    for outcome in outcomes:
        states[outcome.state] = states.get(outcome.state, 0) + 1
    return states
