"""A Slurm of two nodes on this machine: munge, slurmctld, two slurmd under their own node names, in one folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
# The tests' own site: no modules, one rank a node, and rank 0's address, for the two nodes share one host and its name.
SITE = """\
source {venv}/bin/activate
export ESI_DS_TASKS_PER_NODE=1 OMP_NUM_THREADS=1 MASTER_ADDR=127.0.0.1
"""


def missing() -> str | None:
    """Why no Slurm can be started here; None where it can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if os.geteuid() != 0:
        return "starting slurmd needs root"
    return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge)" if absent else None


class Cluster:
    """Started by ``start``, ended by ``stop``. ``work``: a checkout as its user sees it, with an env.sh of its own."""

    def __init__(self, folder: Path):
        self.folder, self.work = folder, folder / "work"
        self.daemons: list[subprocess.Popen] = []
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        self._write_settings()
        munge = [f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file")]
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={self.folder}/key",
            f"--seed-file={self.folder}/seed",
            *munge,
        )
        self.wait_until(lambda: (self.folder / "munge.socket").exists())
        self._daemon("slurmctld", "-D")
        for node in ("node1", "node2"):
            self._daemon("slurmd", "-D", "-N", node)
        self.wait_until(lambda: self.say("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"])

    def _write_settings(self) -> None:
        host, ports = socket.gethostname().split(".")[0], [free_port() for _ in range(3)]
        (self.folder / "key").write_bytes(os.urandom(1024))
        (self.folder / "key").chmod(0o600)
        (self.folder / "slurm.conf").write_text(
            f"ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={ports[0]}\n"
            f"AuthInfo=socket={self.folder}/munge.socket,cred_expire=20\nSlurmUser=root\nSlurmdUser=root\n"
            f"StateSaveLocation={self.folder}/state\nSlurmdSpoolDir={self.folder}/spool-%n\n"
            f"SlurmctldPidFile={self.folder}/slurmctld.pid\nSlurmdPidFile={self.folder}/slurmd-%n.pid\n"
            f"SlurmctldLogFile={self.folder}/slurmctld.log\nSlurmdLogFile={self.folder}/slurmd-%n.log\n"
            "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nReturnToService=2\nSchedulerParameters=sched_interval=2\n"
            "SelectType=select/cons_tres\nSelectTypeParameters=CR_Core\nMinJobAge=3600\nKillWait=30\n"
            + "".join(
                f"NodeName=node{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[i]} CPUs=2 State=UNKNOWN\n"
                for i in (1, 2)
            )
            + "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
        )
        self.work.mkdir()
        for entry in ("launch", "esi_ds", "ds_configs", "configs", "examples"):
            (self.work / entry).symlink_to(ROOT / entry)
        shutil.copytree(ROOT / "slurm", self.work / "slurm", ignore=shutil.ignore_patterns("logs"))
        venv = Path(os.environ.get("VIRTUAL_ENV") or shutil.which("deepspeed") or "/").resolve()
        venv = venv if (venv / "bin").is_dir() else venv.parent.parent
        (self.work / "slurm/env.sh").write_text(SITE.format(venv=venv))

    def _daemon(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.out").open("ab")
        self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def stop(self) -> None:
        self.say("scancel", "--full", "--user", "root")
        time.sleep(1)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def say(self, *command: str) -> str:
        """A Slurm command's standard output."""
        done = subprocess.run(command, env=self.environment, cwd=self.work, capture_output=True, text=True, timeout=120)
        return done.stdout

    def submit(self, stage: str, config: Path, *options: str, arguments: tuple[str, ...] = ()) -> str:
        """The job's id. ``source slurm/env.sh && sbatch slurm/STAGE.sbatch`` as its header says."""
        command = ["sbatch", "--parsable", *options, f"slurm/{stage}.sbatch", "--config", str(config), *arguments]
        done = subprocess.run(
            ["bash", "-c", 'source slurm/env.sh && "$@"', "-", *command],
            env=self.environment,
            cwd=self.work,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def log(self, stage: str, job: str) -> str:
        file = self.work / f"esi_ds-{stage}-{job}.log"
        return file.read_text() if file.is_file() else ""

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, FAILED ... as Slurm says."""
        for word in self.say("scontrol", "show", "job", job).split():
            if word.startswith("JobState="):
                return word.removeprefix("JobState=")
        return ""

    def fact(self, job: str, key: str) -> str:
        """One word of ``scontrol show job``."""
        return next(w for w in self.say("scontrol", "show", "job", job).split() if w.startswith(f"{key}="))[
            len(key) + 1 :
        ]

    def wait_for(self, job: str, stage: str, *states: str, seconds: float = 240) -> None:
        bad = {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"} - set(states)

        def reached() -> bool:
            state = self.state(job)
            assert state not in bad, f"{state}\n{self.logs(stage, job)}"
            return state in states

        self.wait_until(reached, seconds, lambda: self.logs(stage, job))

    def logs(self, stage: str, job: str) -> str:
        """The batch script's log and all ranks', for a failed assertion."""
        ranks = sorted((self.work / "slurm/logs" / job).rglob("*.log"))
        return "\n".join([self.log(stage, job), *(f"== {file}\n{file.read_text()[-3000:]}" for file in ranks)])

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60, say: Callable[[], str] = str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, say()
            time.sleep(0.1)
