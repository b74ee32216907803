"""Shared fixtures: where the tests find real data, and how they start ranks."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from functools import cache
from pathlib import Path

import hold
import psutil
import pytest
import yaml
from endpoint_server import Server, running_server
from fork_server import ForkedProcess, ForkServer, exit_code_file, rank_environments

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What every finished run folder holds, whatever its stage.
RUN_FILES = {
    "inputs.json",
    "config.yaml",
    "manifest.json",
    "metrics.jsonl",
    "tensorboard",
    "report.json",
    "report.html",
    "log.txt",
    "status.json",
}


LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
AT_START = {name: os.environ.get(name) for name in LAUNCHER_VARIABLES}


def pytest_configure(config: pytest.Config) -> None:
    """Tests compute on the CPU on a machine with GPUs, too, unless those of tests/gpu alone are named."""
    if not all("gpu" in Path(named.partition("::")[0]).resolve().parts for named in config.args):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(autouse=True)
def launcher_variables() -> Iterator[None]:
    """Some libraries leave a launcher's variables behind, by which the next test of this process would be a rank."""
    _restore_launcher_variables()
    yield
    _restore_launcher_variables()


def _restore_launcher_variables() -> None:
    for name, value in AT_START.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and weights that lie beside some checkouts and are never part of the project."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("../shared (real data and weights) is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """``SmallStages`` of tests/cluster, whose modules share the runs that nothing happens to."""
    from small_stages import SmallStages

    return SmallStages(tmp_path_factory.mktemp("stages"), fork_server())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A chat-completions endpoint of this machine."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_server() as server:
        yield server


def free_port() -> int:
    """A port that nobody listens on: tests run side by side, and so may two checkouts."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@cache
def fork_server() -> ForkServer:
    """The server of this pytest process, which ends with it."""
    server = ForkServer().__enter__()
    atexit.register(server.__exit__)
    return server


def run_ranks(
    ranks: int, script: str, *arguments: str, timeout: int = 600, launcher: str = "fork"
) -> subprocess.CompletedProcess[str]:
    """Run a script on many ranks; returns its output and exit code. A hang becomes a failure.

    launcher: ``fork`` spares every rank the import of torch and DeepSpeed, which take longer than most tests; one rank
    starts as without a launcher. ``torchrun`` and ``deepspeed`` are the launchers that users take.
    """
    if launcher == "fork":
        return _fork_ranks(ranks, script, *arguments, timeout=timeout)
    commands = {
        "torchrun": (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"),
        "deepspeed": (str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators"),
    }
    command = [*commands[launcher], str(ranks), "--master_port", str(free_port()), script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def _fork_ranks(ranks: int, script: str, *arguments: str, timeout: int) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        log, errors = Path(folder) / "log", Path(folder) / "errors"
        job = fork_server().start(script, list(arguments), _fork_environments(ranks), log, errors=errors)
        if not job.has_ended(timeout):
            job.kill(job.alive())
            raise subprocess.TimeoutExpired(script, timeout, job.said(), errors.read_text(errors="replace"))
        code, stderr = int(exit_code_file(log).read_text()), errors.read_text(errors="replace")
        return subprocess.CompletedProcess(script, code, job.said(), stderr)


def _fork_environments(ranks: int, hold_at: str = "") -> list[dict[str, str]]:
    """The environments of a forked job's ranks. One rank has none of a launcher's variables, as without a launcher."""
    variables = rank_environments(ranks, free_port(), hold_at=hold_at)[0]
    if ranks == 1:
        variables = [{hold.VARIABLE: hold_at}]
    return [{**os.environ, **of_rank} for of_rank in variables]


def write_config(folder: Path, base: dict, changes: dict) -> Path:
    """A config file: ``base`` with some keys, dotted, set to other values."""
    raw = deepcopy(base)
    for dotted, value in changes.items():
        section = raw
        *parents, leaf = dotted.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def whole_lines(file: Path) -> list[str]:
    """The complete lines of a file: one being written, or left by a writer that died, may end in half a line."""
    text = ""
    with suppress(FileNotFoundError):
        text = file.read_text(errors="replace")
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def num_lines(file: Path) -> int:
    return len(whole_lines(file))


def num_rows(run: Path, files: str) -> int:
    """Lines of the longest of these files: ``responses.partial.jsonl`` goes away once ``responses.jsonl`` is there."""
    return max(map(num_lines, run.glob(files)), default=0)


def _start(script: str, arguments: list[str], ranks: int, hold_at: str) -> subprocess.Popen[str]:
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
    port = ["--master_port", str(free_port())]
    command = [*launcher, *port] if ranks > 1 else [sys.executable]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = ["tests/hold.py", Path(script).stem, hold_at] if hold_at else [script]
    return start_in_session([*command, *words, *arguments], environment)


def start_in_session(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """A command from the checkout in a session of its own, what it says to stdout and stderr in one pipe."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


class LaunchedJob:
    """One launched command in its own process group, which can be killed at any moment."""

    def __init__(
        self,
        script: str,
        folder: Path,
        name: str,
        ranks: int,
        config: dict,
        hold_at: str = "",
        launcher: str = "deepspeed",
    ):
        """hold_at: moments of ``hold.install``; the job is held there until it is killed or interrupted.

        launcher: ``deepspeed``, for one rank plain python, with the script; ``fork`` as for ``run_ranks``.
        """
        self.run, self.hold_at = folder / name, hold_at
        self.old_lock = whole_lines(self.run / "lock.json")  # of a killed job
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"run": {"output_dir": str(self.run), "tensorboard": True}, **config}))
        arguments = ["--config", str(file)]
        if launcher == "fork":
            log = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder)) / "log"
            job = fork_server().start(script, arguments, _fork_environments(ranks, hold_at), log)
            self.process: subprocess.Popen[str] | ForkedProcess = ForkedProcess(job)
        else:
            self.process = _start(script, arguments, ranks, hold_at)

    def finish(self) -> str:
        output, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, output[-4000:]
        return output

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 200
        while not condition():
            assert self.process.poll() is None, "ended too early:\n" + self.process.communicate()[0][-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def interrupt_when(self, condition: Callable[[], bool], number: signal.Signals) -> None:
        """A signal to the first process, which must save and exit with 75; where it is held, it goes on."""
        self.wait_until(condition)
        if self.hold_at:
            self.wait_until(lambda: psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED)
        self.process.send_signal(number)
        self.process.send_signal(signal.SIGCONT)
        output, _ = self.process.communicate(timeout=100)
        assert self.process.returncode == 75, output[-3000:]

    def processes(self) -> list[psutil.Process]:
        """The launcher starts its workers in groups of their own: all descendants, the launcher last.

        Waits until rank 0 has the run folder: all ranks are there then. To be called before the moment that is waited
        for, since looking through all processes can take as long as some steps.
        """
        self.wait_until(lambda: whole_lines(self.run / "lock.json") not in ([], self.old_lock))
        launcher = psutil.Process(self.process.pid)
        return [*launcher.children(recursive=True), launcher]

    def kill_when(self, condition: Callable[[], bool]) -> None:
        """SIGKILL of every process of the job, launcher included."""
        victims = self.processes()
        self.wait_until(condition)
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=60)

    def kill_one_rank_when(self, condition: Callable[[], bool]) -> float:
        """SIGKILL of the last rank only; seconds until the whole job has ended, by itself."""
        ranks = self._ranks()
        self.wait_until(condition)
        started = time.monotonic()
        ranks[-1].send_signal(signal.SIGKILL)
        self.process.communicate(timeout=120)
        assert self.process.returncode != 0
        return time.monotonic() - started

    def _ranks(self) -> list[psutil.Process]:
        """The processes of several ranks, without their launcher."""
        processes = self.processes()[:-1]
        if isinstance(self.process, ForkedProcess):
            return [process for process in processes if process.pid in self.process.job.ranks]
        ranks = []
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                if "launch/" in " ".join(process.cmdline()[2:4]):
                    ranks.append(process)
        return ranks
