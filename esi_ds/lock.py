"""One job at a time in a run folder: ``lock.json`` names the process that writes there (docs/design.md §8).

A killed job leaves its lock behind. Whether the job is still alive is checked, not guessed: in the process table of the
same boot of the same host, by asking Slurm about a job of this job's own cluster, else by watching whether
``status.json`` still changes. Names and numbers that two machines or clusters may share prove nothing, and clocks of
different hosts are never compared.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from typing_extensions import TypedDict

from esi_ds.artifacts import STATUS, temporary_name, utc, write_json_atomic, writing
from esi_ds.errors import UserError
from esi_ds.failures import UNSUPPORTED
from esi_ds.reading import check_type, json_sha256, parse_json, read_text, reading

LOCK = "lock.json"
BEAT_S = 5.0  # how often a live run writes its status
WATCH_S = 45.0  # how long to watch for changes; network file systems show one within half a minute
WITHOUT_LINKS = {errno.EPERM, errno.EMLINK, *UNSUPPORTED}  # link(2): exFAT, SMB, mounted object stores
# Slurm's states of a job that has no process: it has ended, or waits for its next start (squeue(1), JOB STATE CODES).
WITHOUT_PROCESSES = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "CONFIGURING",
    "DEADLINE",
    "FAILED",
    "LAUNCH_FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PENDING",
    "PREEMPTED",
    "RECONFIG_FAIL",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "RESV_DEL_HOLD",
    "REVOKED",
    "SPECIAL_EXIT",
    "TIMEOUT",
}


class Identity(TypedDict, total=False):
    """What distinguishes a process from any other on any host, also after a reboot or a requeue.

    Files of older versions may lack keys.
    """

    host: str  # host name
    boot: str | None  # Linux's id of this boot
    pids: str | None  # Linux's id of the process table that the process sees
    pid: int  # process id
    pid_started: int | None  # clock ticks from boot to the process's start
    slurm_cluster: str | None  # the name of the Slurm cluster: each counts its jobs from 1
    slurm_job: str | None  # Slurm's job id, with the task of an array
    slurm_restarts: str  # how often Slurm has requeued the job


class Holder(Identity, total=False):
    """``lock.json``: the process that holds the folder."""

    since: str  # when it took the folder: ISO 8601, UTC


def own_identity() -> Identity:
    """This process's identity."""
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pids": _pid_namespace(),
        "pid": os.getpid(),
        "pid_started": _started(os.getpid()),
        "slurm_cluster": os.environ.get("SLURM_CLUSTER_NAME"),
        "slurm_job": _slurm_job(),
        "slurm_restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def acquire(folder: Path) -> str | None:
    """Lock the folder. Returns a line for the log if the lock of a dead job was taken over.

    Raises UserError if another job is alive and holds it. Called by rank 0 only. The lock appears under its name
    completely or not at all (a hard link), also on NFS; where there are no hard links, others may find it empty at
    first, and watch it.
    """
    identity = own_identity()
    temporary = folder / f".{LOCK}.{identity['host']}-{identity['pid']}.tmp"
    try:
        write_json_atomic(temporary, {**identity, "since": utc(time.time())})
        for _ in range(50):
            if _link(temporary, folder / LOCK):
                return None
            if (holder := read(folder)) is None:
                continue  # released in the meantime
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
        for file in (temporary_name(temporary), temporary):  # the former where the disk was full
            file.unlink(missing_ok=True)
    raise _cannot_be_taken_over(folder)


def _cannot_be_taken_over(folder: Path) -> UserError:
    problem = f"holds the {LOCK} of a dead job, and the job that was taking it over died as well"
    return UserError("run.output_dir", str(folder), problem, f"delete {LOCK} and .{LOCK}.*.claim in it")


def _link(source: Path, name: Path) -> bool:
    """Give a file a second name; False if the name is taken."""
    try:
        os.link(source, name)
    except FileExistsError:
        with suppress(FileNotFoundError):  # released in the meantime
            return source.samefile(name)  # by this call, if NFS lost the server's reply and asked again
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LINKS:
            raise
        return _copy(source, name)
    return True


def _copy(source: Path, name: Path) -> bool:
    """``_link`` for file systems without hard links."""
    try:
        opened = name.open("x", encoding="utf-8")
    except FileExistsError:
        return False
    try:
        with writing(name), opened:
            opened.write(source.read_text(encoding="utf-8"))
            opened.flush()
            os.fsync(opened.fileno())
    except OSError:
        name.unlink(missing_ok=True)
        raise
    return True


def _replace(folder: Path, temporary: Path, holder: Holder) -> bool:
    """Replace a dead holder's lock by ours; False if another job is faster.

    The right to do so is a file named after the holder, which only one job can link, and which stays until that job
    gives it up or the lock is replaced. If the job dies with it, its right goes to the job that links the file named
    after it, and so on. Raises UserError.
    """
    claims = [_claim(folder, holder)]
    while not _link(temporary, claims[-1]):
        claimant = _read(claims[-1])
        if claimant is None or why_dead(folder, claimant) is None:
            return False
        claims.append(_claim(folder, claimant))
        if claims[-1] in claims[:-1]:  # unreadable ones
            raise _cannot_be_taken_over(folder)
    try:
        if read(folder) != holder:  # another job replaced it first
            return False
        os.replace(temporary, folder / LOCK)
        left = [file for file in folder.glob(f".{LOCK}.*.claim") if _read(file) == holder]  # by the dead job itself
        for claim in [*claims[:-1], *left]:
            claim.unlink(missing_ok=True)
    finally:
        claims[-1].unlink(missing_ok=True)
    return True


def _claim(folder: Path, holder: Holder) -> Path:
    """The file whose first link is the right to succeed a dead job."""
    return folder / f".{LOCK}.{json_sha256(holder)[:16]}.claim"


def release(folder: Path) -> None:
    """Unlock the folder if this process holds the lock."""
    holder, identity = read(folder), own_identity()
    if holder is not None and all(holder.get(key) == value for key, value in identity.items()):
        (folder / LOCK).unlink(missing_ok=True)


def read(folder: Path) -> Holder | None:
    """Who holds the folder; None if nobody does."""
    return _read(folder / LOCK)


def _read(file: Path) -> Holder | None:
    if not file.exists():
        return None
    try:
        with reading("lock", file, "delete it"):
            holder = check_type(parse_json(read_text(file)), Holder)
        if {"host", "pid"} <= holder.keys():
            return holder
    except UserError:
        if not file.exists():  # released in the meantime
            return None
    return {"host": "a host that its unreadable lock does not name"}


def describe(holder: Holder) -> str:
    """The holder in a few words."""
    job = f"Slurm job {holder['slurm_job']}, " if holder.get("slurm_job") else ""
    return f"{job}process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def why_dead(folder: Path, holder: Holder) -> str | None:
    """Why the holder cannot be writing any more; None if it is alive."""
    identity = own_identity()
    # Another boot of a host of this name may be another machine, and containers on one host may share its name and boot
    # but not its process table.
    same_table = all(holder.get(key) == identity[key] for key in ("host", "boot", "pids"))
    if same_table and (holder.get("pid_started") is not None or _boot() is not None):
        return None if _started(holder["pid"]) == holder.get("pid_started") else "no such process here"
    cluster, job = identity["slurm_cluster"], holder.get("slurm_job")
    if cluster is None or holder.get("slurm_cluster") != cluster:
        return _watch(folder)  # whatever squeue says here is of another cluster's jobs
    if job and job == identity["slurm_job"] and holder.get("slurm_restarts") != identity["slurm_restarts"]:
        return "Slurm has requeued that job as this one"
    if job and (live := _slurm_has(job)) is not None and not (live and job == identity["slurm_job"]):
        return None if live else "Slurm has no such running job"
    return _watch(folder)


def _watch(folder: Path) -> str | None:
    """Why the holder is dead: its status does not change. Contents are compared, as clocks of two hosts may differ."""
    status = folder / STATUS
    before = _content(status)
    unseen = f"{folder} is locked by a process that cannot be seen from here"
    print(f"{unseen}: checking for {WATCH_S:g} s whether it is alive", flush=True)
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, WATCH_S / 4))
        if _content(status) != before:
            return None
    return f"its {STATUS} did not change for {WATCH_S:g} s"


def _content(file: Path) -> bytes | None:
    """None if there is no file, or if, over NFS, another file has replaced the one that was opened."""
    try:
        return file.read_bytes() if file.is_file() else None
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        return None


def _slurm_job() -> str | None:
    """This process's job in squeue's notation; for an array with the task, as its id alone means all tasks."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _slurm_has(job: str) -> bool | None:
    """Whether Slurm has the job in a state with processes, as far as is known; None if Slurm cannot be asked."""
    try:
        shown = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if shown.returncode != 0:
        return False if "Invalid job id" in shown.stderr else None
    return any(state not in WITHOUT_PROCESSES for state in shown.stdout.split())


def _boot() -> str | None:
    """Linux's id of this boot; None on other systems."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _pid_namespace() -> str | None:
    """Linux's id of the process table that this process sees; None on other systems."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """Clock ticks from boot to a process's start (proc(5)), since pids are reused and clocks jump; None: no process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])
