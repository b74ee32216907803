"""``status.json``: how far a run is, for people and for jobs that meet its lock. ``esi-ds status RUN...``

A thread of rank 0 writes it every few seconds, whatever the run is doing; reading it does not need torch.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import cast

from tqdm import tqdm
from typing_extensions import TypedDict

from esi_ds.artifacts import STATUS, read_manifest, without_files, write_json_atomic
from esi_ds.errors import Interrupted, UserError
from esi_ds.lock import BEAT_S, Identity, own_identity
from esi_ds.reading import check_type, parse_json, read_text, reading
from esi_ds.terminal import clean_output

REQUIRED = {"state", "stage", "pid", "host", "slurm_job", "updated", "phase"}  # keys of every status of a run
BAR = {"done", "total", "unit", "rate", "seconds_left"}  # keys of a status with a phase
SILENT_S = 60.0  # the run of an older status is probably dead


class Checkpoint(TypedDict, total=False):
    """What a restart would continue from: ``position`` or ``file``."""

    saved: float  # seconds since the epoch
    position: int  # of the newest checkpoint
    file: str  # the newest file of rows that a restart does not compute again


class Progress(TypedDict, total=False):
    """The progress bar's numbers; without a bar ``phase`` alone."""

    phase: str | None  # the bar's description; None before the first bar
    done: float  # number of units
    total: float  # number of units
    unit: str  # singular
    rate: float  # units per second
    seconds_left: float | None  # None while nothing is done


class Status(Identity, Progress, total=False):
    """``status.json``."""

    state: str  # running, done, interrupted or failed; "not started" without a file
    stage: str  # esi, set, spa, perturb or eval
    started: float  # seconds since the epoch
    updated: float  # seconds since the epoch
    beat: int  # how often the file has been written
    last_checkpoint: Checkpoint | None


class StatusWriter:
    """A context manager; between enter and exit the file is never older than ``BEAT_S``."""

    def __init__(self, folder: Path, stage: str):
        self._folder = folder
        self._stage, self._identity, self._started = stage, own_identity(), time.time()
        self._bar: tqdm | None = None
        self._beat = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def watch(self, bar: tqdm) -> None:
        """Write this bar's numbers from now on."""
        self._bar = bar

    def __enter__(self) -> StatusWriter:
        self._write("running")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._write(
            "done"
            if kind is None
            else "interrupted"
            if issubclass(kind, (Interrupted, KeyboardInterrupt))
            else "failed"
        )

    def _run(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._write("running")

    def _write(self, state: str) -> None:
        self._beat += 1
        status: Status = {
            "state": state,
            "stage": self._stage,
            **self._identity,
            "started": self._started,
            "updated": time.time(),
            "beat": self._beat,
            **self._progress(),
        }
        with suppress(OSError):  # a full disk ends the run at the run's own files, not here
            status["last_checkpoint"] = last_checkpoint(self._folder)
            write_json_atomic(self._folder / STATUS, status)

    def _progress(self) -> Progress:
        if self._bar is None:
            return {"phase": None}
        numbers = self._bar.format_dict
        done, total, seconds = numbers["n"], numbers["total"], numbers["elapsed"]
        rate = (done - numbers["initial"]) / seconds if seconds > 0 else 0.0
        return {
            "phase": numbers["prefix"].removesuffix(": "),
            "done": done,
            "total": total,
            "unit": numbers["unit"],
            "rate": rate,
            "seconds_left": (total - done) / rate if rate > 0 else None,
        }


def last_checkpoint(run: Path) -> Checkpoint | None:
    """What a restart would continue from; None if there is nothing yet."""
    checkpoints: list[Checkpoint] = []
    for file in (*run.glob("checkpoint/position-*/state.json"), *run.glob("checkpoint/*/position-*/state.json")):
        with suppress(FileNotFoundError):  # a newer checkpoint may replace it at any moment
            if position := re.fullmatch(r"position-([0-9]{1,18})", file.parent.name):
                checkpoints.append({"position": int(position[1]), "saved": file.stat().st_mtime})
    for file in run.glob("*.jsonl"):
        with suppress(FileNotFoundError):
            if file.name != "metrics.jsonl":
                checkpoints.append({"file": file.name, "saved": file.stat().st_mtime})
    return max(checkpoints, key=lambda checkpoint: checkpoint["saved"], default=None)


def read_status(run: Path) -> Status:
    """The run's status with its last checkpoint. Raises UserError if the folder does not hold a run."""
    if not (run / "config.yaml").is_file():
        raise UserError("RUN", str(run), "holds no run", "give a run's folder")
    status: Status = {"state": "not started"}
    if (run / STATUS).exists():
        with reading("RUN", run, "look at its log.txt", f"holds a {STATUS} that is not a run's status"):
            content = parse_json(read_text(run / STATUS))
            check_type(content, Status)  # what is shown keeps its integers
            status = cast(Status, content)
            needed = REQUIRED | (BAR if status.get("phase") else set())
            if missing := sorted(needed - status.keys()):
                raise ValueError(f"without {missing[0]}")
        if status["state"] == "running" and _is_done(run):
            status["state"] = "done"
    return {**status, "last_checkpoint": last_checkpoint(run)}


def _is_done(run: Path) -> bool:
    """Whether the run's manifest says so, which is written before the last status: a kill may come between them."""
    with suppress(UserError):
        return bool(read_manifest(run, "RUN").get("exit_state") == "done")
    return False


def say_done(run: Path) -> None:
    """Set ``status.json`` to done if a finished run was killed before its last write.

    Raises UserError as ``read_status``.
    """
    if (run / STATUS).exists():
        write_json_atomic(run / STATUS, read_status(run))


def progress_of(run: Path) -> str | None:
    """The phase of a run and how far it is, in words; None before the first. Raises UserError as ``read_status``."""
    status = read_status(run)
    if not status.get("phase"):
        return None
    return f"{status['phase']}: {status['done']:,} of {status['total']:,} {status['unit']}s"


def show(run: Path, now: float) -> str:
    """A few lines for people. now: seconds since the epoch."""
    status = read_status(run)
    lines = [f"{run}: {status['state']}" + (f", stage {status['stage']}" if "stage" in status else "")]
    if "pid" in status:
        job = status["slurm_job"]
        slurm = f", Slurm job {job} (restarts: {status.get('slurm_restarts', '?')})" if job else ""
        lines.append(f"  process {status['pid']} on {status['host']}{slurm}")
    if status.get("phase"):
        lines.append(f"  {progress_of(run)}, {status['rate']:.3g} a second{_remaining(status)}")
    if checkpoint := status.get("last_checkpoint"):
        where = f"at {checkpoint['position']:,}" if "position" in checkpoint else checkpoint["file"]
        lines.append(f"  last checkpoint: {where}, {_span(now - checkpoint['saved'])} ago")
    if status["state"] == "running" and now - status["updated"] > SILENT_S:
        silent = f"{_span(now - status['updated'])} by this host's clock"
        lines.append(f"  silent for {silent}: it was probably killed; start it again to continue")
    return "\n".join(lines)


def _remaining(status: Status) -> str:
    """The time that a running phase still takes; one that has ended is followed by work without a bar."""
    left = status["seconds_left"]
    if status["state"] != "running" or left is None:
        return ""
    return f", {_span(left)} left" if status["done"] < status["total"] else "; what follows is not counted"


def _span(seconds: float) -> str:
    """A duration as hours:minutes:seconds."""
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="esi-ds status",
        description="Show how far runs have come.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folders")
    parser.add_argument("--json", action="store_true", help="one line of JSON per run instead of text")
    return parser


@clean_output()
def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    arguments, code = make_parser().parse_args(argv), 0
    runs, files = without_files(arguments.runs)
    for file in files:
        print(f"left out: {file} is a file", file=sys.stderr)
    for run in runs:
        try:
            print(json.dumps({"run": str(run), **read_status(run)}) if arguments.json else show(run, time.time()))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(main())
