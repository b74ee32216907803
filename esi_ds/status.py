"""``status.json``: where a run stands, for people and for whoever finds its lock. ``python -m esi_ds.status RUN...``

A thread of rank 0 writes it every few seconds, whatever the run is doing; reading needs no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from esi_ds.artifacts import write_json_atomic
from esi_ds.errors import Interrupted, UserError
from esi_ds.lock import BEAT_S, STATUS, own_identity

WRITTEN = {"state", "stage", "pid", "host", "slurm_job", "updated", "phase"}  # in every status of a run
SILENT_S = 60.0  # a status older than this is probably of a dead run


class StatusWriter:
    """A context manager; between enter and exit the file is never older than ``BEAT_S``."""

    def __init__(self, folder: Path, stage: str):
        self._folder = folder
        self._facts = {"stage": stage, **own_identity(), "started": time.time()}
        self._progress: Any = None  # tqdm's bar
        self._beat = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def watch(self, bar: Any) -> None:
        """From now on this bar's numbers are shown."""
        self._progress = bar

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
        facts = {"state": state, **self._facts, "updated": time.time(), "beat": self._beat, **self._numbers()}
        with suppress(OSError):  # a full disk ends the run where it matters, not here
            facts["last_checkpoint"] = last_checkpoint(self._folder)
            write_json_atomic(self._folder / STATUS, facts)

    def _numbers(self) -> dict[str, Any]:
        if self._progress is None:
            return {"phase": None}
        shown = self._progress.format_dict
        done, total, seconds = shown["n"], shown["total"], shown["elapsed"]
        rate = (done - shown["initial"]) / seconds if seconds > 0 else 0.0
        return {
            "phase": shown["prefix"].removesuffix(": "),
            "done": done,
            "total": total,
            "unit": shown["unit"],
            "rate": rate,
            "seconds_left": (total - done) / rate if rate > 0 else None,
        }


def last_checkpoint(run: Path) -> dict[str, Any] | None:
    """What a restart would find: the newest checkpoint's position, or the newest file of rows that are made once."""
    found: list[tuple[float, dict[str, Any]]] = []
    for file in (*run.glob("checkpoint/position-*/state.json"), *run.glob("checkpoint/*/position-*/state.json")):
        with suppress(FileNotFoundError):  # what is replaced is removed at any moment
            position = int(file.parent.name.removeprefix("position-"))
            found.append((file.stat().st_mtime, {"position": position}))
    for file in run.glob("*.jsonl"):
        with suppress(FileNotFoundError):
            if file.name != "metrics.jsonl":
                found.append((file.stat().st_mtime, {"file": file.name}))
    saved, what = max(found, key=lambda pair: pair[0], default=(None, {}))
    return None if saved is None else {**what, "saved": saved}


def read_status(run: Path) -> dict[str, Any]:
    """The status with the last checkpoint and how the run ended. Raises UserError where the folder holds no run."""
    if not (run / "config.yaml").is_file():
        raise UserError("RUN", str(run), "holds no run", "give a run's folder")
    found: dict[str, Any] = {"state": "not started"}
    with suppress(FileNotFoundError, ValueError):
        stored = json.loads((run / STATUS).read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or not stored.keys() >= WRITTEN:
            raise UserError("RUN", str(run), f"holds a {STATUS} of something else", "look at its log.txt")
        found = stored
    return {**found, "last_checkpoint": last_checkpoint(run)}


def show(run: Path, now: float) -> str:
    """A few lines for a person."""
    found = read_status(run)
    lines = [f"{run}: {found['state']}" + (f", stage {found['stage']}" if "stage" in found else "")]
    if "pid" in found:
        job = f", Slurm job {found['slurm_job']} (restarts: {found['slurm_restarts']})" if found["slurm_job"] else ""
        lines.append(f"  process {found['pid']} on {found['host']}{job}")
    if found.get("phase"):
        left = found["seconds_left"]
        rest = f", {_span(left)} left" if left is not None and found["state"] == "running" else ""
        numbers = f"{found['done']:,} of {found['total']:,} {found['unit']}s, {found['rate']:.3g} a second"
        lines.append(f"  {found['phase']}: {numbers}{rest}")
    if checkpoint := found.get("last_checkpoint"):
        where = f"at {checkpoint['position']:,}" if "position" in checkpoint else checkpoint["file"]
        lines.append(f"  last checkpoint: {where}, {_span(now - checkpoint['saved'])} ago")
    if found["state"] == "running" and now - found["updated"] > SILENT_S:
        lines.append(f"  silent for {_span(now - found['updated'])}: it was probably killed; start it again to go on")
    return "\n".join(lines)


def _span(seconds: float) -> str:
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m esi_ds.status", description="where runs stand")
    made.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folders")
    made.add_argument("--json", action="store_true", help="one line of JSON a run instead of text")
    arguments, code = made.parse_args(argv), 0
    for run in arguments.runs:
        try:
            print(json.dumps({"run": str(run), **read_status(run)}) if arguments.json else show(run, time.time()))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(main())
