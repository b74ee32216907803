"""Jobs at the price of a fork: one process that has imported everything forks the ranks of job after job.

Started as a script it reads a job a line from stdin and answers with its processes. A job is a launcher, which does
what ``deepspeed.launcher.launch`` does (``watch``), and its ranks, each of which does what ``launch/STAGE.py`` does, or
runs a script. The import is the only thing they share: nothing here begins a thread or a process group before the fork.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import gc
import inspect
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))  # the server runs as a script

import hold  # noqa: E402

PATIENCE_S = 30.0  # between SIGTERM and SIGKILL, as DeepSpeed's launcher
FAIL = signal.SIGUSR2  # has a rank raise wherever it is
SUBREAPER = 36  # prctl's number: orphans become this process's children, which reaps them


def serve() -> None:
    sys.path.insert(0, str(ROOT))
    if "FAKETIME_TIMESTAMP_FILE" in os.environ:
        # libfaketime 0.9.10 makes a negative time of CPython's sleep (wolfcw/libfaketime#426); it leaves select alone.
        time.sleep = lambda seconds: select.select([], [], [], seconds)
    import deepspeed  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import torch._dynamo.repro.after_dynamo  # noqa: F401  DeepSpeed's optimizer imports it and the next
    import torch._inductor.compile_fx  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import esi_ds.stages.esi.work  # noqa: F401
    import esi_ds.stages.evaluate.finish  # noqa: F401
    import esi_ds.stages.evaluate.judging  # noqa: F401
    import esi_ds.stages.evaluate.work  # noqa: F401
    import esi_ds.stages.perturb.finish  # noqa: F401
    import esi_ds.stages.perturb.work  # noqa: F401
    import esi_ds.stages.tune.work  # noqa: F401
    import esi_ds.zero.score  # noqa: F401

    os.fsync = lambda descriptor: None  # a kill loses nothing that is written; fsync itself is tested in tests/unit
    # Nor is a rank bound to cores: of two jobs side by side the ranks of one number would share theirs.
    os.sched_setaffinity = lambda process, cores: None
    spare_overhead()
    gc.collect()
    gc.freeze()  # a full collection, which every model that is closed asks for, would go through all that is imported
    assert len(os.listdir("/proc/self/task")) == 1  # a thread would be lost in the fork
    ctypes.CDLL(None).prctl(SUBREAPER, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.close(reading)
            os._exit(launch(writing, **json.loads(line)))
        os.close(writing)
        with os.fdopen(reading) as opened:
            print(opened.readline(), end="", flush=True)


def spare_overhead() -> None:
    """A tenth of a rank's time on models this small goes into marks for NVIDIA's profiler around every call of
    DeepSpeed's, and into ``inspect.signature`` at every call of an autograd function."""
    import deepspeed.utils.nvtx
    import torch.autograd.function

    deepspeed.utils.nvtx.enable_nvtx = False
    torch.autograd.function.inspect = SimpleNamespace(signature=functools.cache(inspect.signature))


def launch(
    answer: int,
    program: str,
    arguments: list[str],
    rank_environments: list[dict[str, str]],
    log: str,
    errors: str,
    patience: float,
) -> int:
    """The launcher: fork a rank for each of ``rank_environments``, which are environment variables; its exit code.

    log, errors: files for stdout and stderr. The code is also written beside the log (``exit_code_file``): nobody waits
    for this process.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    output, error_output = (os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for file in (log, errors))
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, opened in enumerate((nothing, output, error_output)):
        os.dup2(opened, number)
    ranks = []
    for variables in rank_environments:
        if (process := os.fork()) == 0:
            os.close(answer)
            be_rank(program, arguments, variables)
        ranks.append(process)
    os.write(answer, (json.dumps({"launcher": os.getpid(), "ranks": ranks}) + "\n").encode())
    os.close(answer)
    code = watch(set(ranks), patience)
    exit_code_file(Path(log)).write_text(str(code))
    return code


def exit_code_file(log: Path) -> Path:
    """Where a job's exit code is, once it has ended by itself."""
    return log.with_name(f"{log.name}.exit-code")


def be_rank(program: str, arguments: list[str], variables: dict[str, str]) -> None:
    """program: a stage, or a script's path."""
    from esi_ds.cli import leave, main

    def fail(*_: object) -> None:
        raise RuntimeError(f"rank {variables.get('RANK', 0)} was told to fail")

    signal.signal(FAIL, fail)
    faulthandler.register(signal.SIGQUIT)  # says where a rank hangs
    os.environ.update(variables)
    if moments := variables.get(hold.VARIABLE):
        hold.install(moments)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    if program.endswith(".py"):
        leave(run_script(program, arguments))
    leave(main(program, arguments))


def run_script(script: str, arguments: list[str]) -> int:
    """What ``python SCRIPT ARGUMENTS`` does; its exit code."""
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def watch(ranks: set[int], patience: float) -> int:
    """Wait for all; one that fails, and the others get SIGTERM within a second and SIGKILL some time later."""
    while ranks:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == 0:
            time.sleep(0.02)
            continue
        ranks.discard(ended)
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            time.sleep(0.5)
            end_all(ranks, patience)
            print(f"launcher: rank with process {ended} ended with {code}", flush=True)
            return code % 256
    return 0


def end_all(ranks: set[int], patience: float) -> None:
    deadline = time.monotonic() + patience
    for process in ranks:
        os.kill(process, signal.SIGTERM)
    while ranks:
        ended, _ = os.waitpid(-1, os.WNOHANG)
        ranks.discard(ended)
        if ended == 0 and time.monotonic() > deadline:
            for process in ranks:
                os.kill(process, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.02)


@dataclass
class ForkedJob:
    """A started job, as its test sees it."""

    launchers: list[int]
    ranks: list[int]
    log: Path
    started: float = field(default_factory=time.monotonic)

    def alive(self) -> list[int]:
        return [process for process in (*self.launchers, *self.ranks) if is_alive(process)]

    def kill(self, processes: list[int], number: int = signal.SIGKILL) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def is_held(self) -> bool:
        """Whether rank 0 has come to a moment of its ``hold``. The other ranks wait for it."""
        return state(self.ranks[0]) == "T"

    def go_on(self) -> None:
        self.kill(self.ranks[:1], signal.SIGCONT)

    def ends_before(self, condition: Callable[[], bool]) -> bool:
        """Wait for the one or the other: whether all processes have ended."""
        while self.alive():
            if condition():
                return False
            time.sleep(0.005)
        return True

    def has_ended(self, within: float) -> bool:
        """Whether all its processes end in so many seconds, counted from now."""
        deadline = time.monotonic() + within
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def said(self) -> str:
        return self.log.read_text(errors="replace")


class ForkedProcess:
    """What tests use of ``subprocess.Popen``, of a forked job: its one rank, or the launcher of several."""

    def __init__(self, job: ForkedJob):
        self.job = job
        (self.pid,) = job.ranks if len(job.ranks) == 1 else job.launchers

    @property
    def returncode(self) -> int | None:
        """The launcher's; −9 if it was killed before it could write one, None while anything of the job lives."""
        if self.job.alive():
            return None
        file = exit_code_file(self.job.log)
        return int(file.read_text()) if file.is_file() else -signal.SIGKILL

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        self.job.kill([self.pid], number)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for the end; (stdout with stderr, None)."""
        if not self.job.has_ended(float("inf") if timeout is None else timeout):
            raise subprocess.TimeoutExpired("a forked job", timeout or 0.0, self.job.said())
        return self.job.said(), None


def is_alive(process: int) -> bool:
    return state(process) not in "ZX"


def state(process: int) -> str:
    """As ``ps`` shows it: T is stopped; X where there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


class ForkServer:
    """A server process on this host or, with a command before it, on another. A context manager."""

    def __init__(self, *before: str):
        # Its last argument is what a rank looks for in its launcher's command line.
        command = [*before, sys.executable, str(Path(__file__)), "deepspeed.launcher.launch"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> ForkServer:
        while self.process.stdout.readline() not in ("ready\n", ""):
            pass
        assert self.process.poll() is None
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def start(
        self,
        program: str,
        arguments: list[str],
        rank_environments: list[dict[str, str]],
        log: Path,
        patience: float = PATIENCE_S,
        errors: Path | None = None,
    ) -> ForkedJob:
        """program: a stage, or a script's path. errors: what is said to stderr, which else is in the log, too."""
        job = {
            "program": program,
            "arguments": arguments,
            "rank_environments": rank_environments,
            "log": str(log),
            "errors": str(errors or log),
            "patience": patience,
        }
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        processes = json.loads(self.process.stdout.readline())
        return ForkedJob([processes["launcher"]], processes["ranks"], log)


def rank_environments(
    ranks: int, port: int, address: str = "127.0.0.1", hosts: int = 1, hold_at: str = ""
) -> list[list[dict[str, str]]]:
    """For every host the variables of its ranks, as DeepSpeed's launcher sets them. hold_at: moments of
    ``hold.install``."""
    local = ranks // hosts
    common = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(local), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    common[hold.VARIABLE] = hold_at
    return [
        [
            {"RANK": str(host * local + rank), "LOCAL_RANK": str(rank), "CROSS_RANK": str(host), **common}
            for rank in range(local)
        ]
        for host in range(hosts)
    ]


if __name__ == "__main__":
    serve()
