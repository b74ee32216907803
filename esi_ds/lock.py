"""One job at a time in a run folder: ``lock.json`` names the process that writes there (docs/design.md §8).

A killed job leaves its lock behind. Whether it still lives is found out, not guessed: from the process table on the
same host, from Slurm where the job has an id, else by watching whether ``status.json`` still changes. No clock is
compared between hosts.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from esi_ds.artifacts import utc, write_json_atomic
from esi_ds.errors import UserError

LOCK, STATUS = "lock.json", "status.json"
BEAT_S = 5.0  # a living run writes its status this often
WATCH_S = 45.0  # so long is a lock of another host watched; network file systems show a change within half a minute


def own_identity() -> dict[str, Any]:
    """What tells this process from any other on any host, after a reboot and after a requeue too."""
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pids": _pid_namespace(),
        "pid": os.getpid(),
        "pid_started": _started(os.getpid()),
        "slurm_job": _slurm_job(),
        "slurm_restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def acquire(folder: Path) -> str | None:
    """Take the folder; a line for the log where an earlier job's lock was taken over. Raises UserError where it lives.

    Called by rank 0 only. The lock appears whole under its name or not at all (a hard link), also on NFS.
    """
    own = own_identity()
    temporary = folder / f".{LOCK}.{own['host']}-{own['pid']}.tmp"
    try:
        write_json_atomic(temporary, {**own, "since": utc(time.time())})
        for _ in range(50):
            if _link(temporary, folder / LOCK):
                return None
            if (holder := read(folder)) is None:
                continue  # released since
            if (reason := why_dead(folder, holder)) is None:
                raise UserError(
                    "run.output_dir",
                    str(folder),
                    f"is being written by another job ({describe(holder)})",
                    "wait for it, stop it, or give another folder",
                )
            if _replace(folder, temporary, holder):
                return f"taking over the folder of {describe(holder)}: {reason}"
            time.sleep(0.1)
    finally:
        temporary.unlink(missing_ok=True)
    problem = f"holds {LOCK} of a dead job, and another job that wanted it died too"
    raise UserError("run.output_dir", str(folder), problem, f"delete {LOCK} and .{LOCK}.claim there")


def _link(source: Path, name: Path) -> bool:
    """Give a file a second name; False where somebody has the name."""
    try:
        os.link(source, name)
    except FileExistsError:
        return False
    return True


def _replace(folder: Path, temporary: Path, holder: dict[str, Any]) -> bool:
    """Put our lock in a dead holder's place. Of several that find it dead, one has the claim at a time."""
    claim = folder / f".{LOCK}.claim"
    if not _link(temporary, claim):
        _drop_dead_claim(folder, claim, temporary.with_suffix(".claim"))
        return False
    try:
        if read(folder) != holder:  # another claim came first
            return False
        os.replace(temporary, folder / LOCK)
    finally:
        claim.unlink()
    return True


def _drop_dead_claim(folder: Path, claim: Path, aside: Path) -> None:
    """A job that is killed while it takes over leaves its claim. ``aside``: a name that nobody else uses."""
    holder = _read(claim)
    if holder is None or why_dead(folder, holder) is None:
        return
    try:
        os.rename(claim, aside)
    except FileNotFoundError:  # somebody else dropped it
        return
    if _read(aside) != holder:  # dropped meanwhile, and this is another job's: give it back
        _link(aside, claim)
    aside.unlink()


def release(folder: Path) -> None:
    """Give the folder free, if the lock is this process's."""
    holder, own = read(folder), own_identity()
    if holder is not None and all(holder.get(key) == value for key, value in own.items()):
        (folder / LOCK).unlink(missing_ok=True)


def read(folder: Path) -> dict[str, Any] | None:
    """The lock's content, or None where there is none."""
    return _read(folder / LOCK)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    named = isinstance(found, dict) and isinstance(found.get("host"), str) and isinstance(found.get("pid"), int)
    return found if named else {"host": "a host its unreadable lock does not name"}


def describe(holder: dict[str, Any]) -> str:
    job = f"Slurm job {holder['slurm_job']}, " if holder.get("slurm_job") else ""
    return f"{job}process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def why_dead(folder: Path, holder: dict[str, Any]) -> str | None:
    """Why the holder cannot be writing any more; None where it lives."""
    own = own_identity()
    if holder.get("host") == own["host"]:
        if holder.get("boot") != own["boot"]:
            return "the host was started again since"
        # Containers of one host may share its name, and not its processes.
        same_table = holder.get("pids") == own["pids"]
        if same_table and (holder.get("pid_started") is not None or _boot() is not None):
            return None if _started(holder["pid"]) == holder.get("pid_started") else "no such process here"
    job = holder.get("slurm_job")
    if job and job == own["slurm_job"] and holder.get("slurm_restarts") != own["slurm_restarts"]:
        return "Slurm has started that job again as this one"
    if job and (live := _slurm_has(job)) is not None and not (live and job == own["slurm_job"]):
        return None if live else "Slurm knows no such running job"
    return _watch(folder)


def _watch(folder: Path) -> str | None:
    """A living run's status changes; compared by content, for clocks of two hosts may differ."""
    status = folder / STATUS
    before = status.read_bytes() if status.is_file() else None
    print(f"{folder} is locked from another host: watching for {WATCH_S:g} s whether that job lives", flush=True)
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, WATCH_S / 4))
        if (status.read_bytes() if status.is_file() else None) != before:
            return None
    return f"its {STATUS} did not change for {WATCH_S:g} s"


def _slurm_job() -> str | None:
    """This process's job as squeue takes it: of an array its own task, for the array's id stands for all tasks."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _slurm_has(job: str) -> bool | None:
    """Whether Slurm holds a job that runs or is about to end; None where it cannot be asked."""
    try:
        shown = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if shown.returncode != 0:
        return False if "Invalid job id" in shown.stderr else None
    return any(state in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED") for state in shown.stdout.split())


def _boot() -> str | None:
    """Linux's id of this boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _pid_namespace() -> str | None:
    """Linux's name for the process table that this process sees."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """Clock ticks from boot to a process's start (proc(5)): pids come again, and clocks jump. None: not there."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])
