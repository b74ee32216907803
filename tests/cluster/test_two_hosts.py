"""Two hosts with two ranks each: DeepSpeed's launcher over ssh, and in every phase the death of a rank of the other
host, of the other host's launcher, and of rank 0."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
from conftest import free_port, num_lines
from fork_server import ForkedJob, ForkServer, rank_environments
from small_stages import SmallStages, differing, held, is_done, written
from two_hosts import ADDRESSES, Hosts, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
ENDS_WITHIN_S = 60  # what the project promises, not a measurement
# Phase → stage, and files that show when three moments within the phase have come.
PHASES = {
    "generating": ("esi", "responses*.jsonl", (1, 5, 13)),
    "scoring": ("esi", "metrics.jsonl", (1, 3, 4)),
    "set": ("set", "metrics.jsonl", (2, 6, 10)),
    "spa": ("spa", "metrics.jsonl", (2, 6, 10)),
    "eval": ("eval", "answers.jsonl", (1, 5, 13)),
    "perturb": ("perturb", "answers.jsonl", (4, 20, 40)),
}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    pair = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        pair.start()
        yield pair
    finally:
        pair.stop()


@pytest.fixture(scope="module")
def servers(hosts: Hosts) -> Iterator[list[ForkServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(ForkServer(*hosts.on(name))) for name in ADDRESSES]


def parts(
    servers: list[ForkServer], stages: SmallStages, stage: str, run: Path, *overrides: str, hold_at: str = ""
) -> Iterator[ForkedJob]:
    """A job of four ranks, host by host as they are asked for; one log."""
    log, arguments = stages.new_log(), stages.arguments(stage, run, *overrides)
    by_host = rank_environments(4, free_port(), next(iter(ADDRESSES.values())), hosts=2, hold_at=hold_at)
    for server, environments in zip(servers, by_host, strict=True):
        yield server.start(stage, arguments, environments, log)


def whole(jobs: Iterable[ForkedJob]) -> ForkedJob:
    """Launchers and ranks in the hosts' order."""
    parts = list(jobs)
    return ForkedJob(
        [part.launchers[0] for part in parts], [rank for part in parts for rank in part.ranks], parts[0].log
    )


@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_every_phase(servers: list[ForkServer], stages: SmallStages, tmp_path: Path, phase: str) -> None:
    stage, files, moments = PHASES[phase]
    run = tmp_path / "run"
    # The launcher last: its ranks go on to the next boundary, which can be the end.
    for victim, moment in zip(("rank 3", "rank 0", "launcher"), moments, strict=True):
        job = held(whole(parts(servers, stages, stage, run, hold_at=f"{files} {moment}")))
        job.kill({"rank 3": job.ranks[3:], "launcher": job.launchers[1:], "rank 0": job.ranks[:1]}[victim])
        job.go_on()
        assert job.has_ended(ENDS_WITHIN_S), job.said()
        if victim == "launcher":
            assert is_done(run) or "the launcher is gone; saving, then ending" in job.said(), job.said()
        else:
            assert "failed: lost another rank" in job.said() and "Traceback" not in job.said(), job.said()
    job = whole(parts(servers, stages, stage, run))
    assert job.has_ended(200) and is_done(run), job.said()
    assert differing(run, stages.undisturbed(stage, 4)) == []


def test_rank_0_killed_before_anybody_has_found_it(servers: list[ForkServer], stages: SmallStages, tmp_path) -> None:
    """Nothing tells the other host of it but the time that all are waited for at the start."""
    coming = parts(servers, stages, "set", tmp_path / "run", "run.start_timeout_s=10")
    first = next(coming)
    first.kill(first.ranks[:1])
    job = whole([first, *coming])
    assert job.has_ended(ENDS_WITHIN_S), job.said()
    said = [line for line in job.said().splitlines() if line.startswith("error: ")]
    assert len(said) in (1, 2), job.said()  # whichever gives up first, and the other if it is not ended before
    for line in said:
        assert "no process group forms there" in line and "rank 0 has ended: its own message says why" in line
        assert line.endswith(tuple(f"(rank {rank} on {list(ADDRESSES)[1]})" for rank in (2, 3)))


def ranks_on(host: str) -> list[psutil.Process]:
    """The ranks that run on a host now, as the process table shows them."""
    pids = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True, check=True).stdout.split()
    processes = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if any(word.startswith("launch/") for word in process.cmdline()[2:3]):
                processes.append(process)
    return processes


def wait_while_it_runs(job: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Until a launched job has come so far."""
    deadline = time.monotonic() + 200
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate(timeout=60)[0]
        time.sleep(0.005)


def test_deepspeed_over_ssh_runs_esi(hosts: Hosts, stages: SmallStages, tmp_path: Path) -> None:
    """Killed once: the last rank of the other host, which has all ranks end and the launcher fail."""
    run = tmp_path / "run"
    command = ("launch/esi.py", *stages.arguments("esi", run))
    job = hosts.launch(*command)
    wait_while_it_runs(job, (run / "status.json").is_file)
    ranks = [ranks_on(host) for host in ADDRESSES]  # before the moment: looking for them takes as long as many steps
    assert [len(processes) for processes in ranks] == [2, 2]
    wait_while_it_runs(job, lambda: written(run) != {})
    ranks[1][-1].send_signal(signal.SIGKILL)
    said, _ = job.communicate(timeout=ENDS_WITHIN_S)
    assert job.returncode != 0 and "failed: lost another rank" in said, said
    assert [len(ranks_on(host)) for host in ADDRESSES] == [0, 0]
    again = hosts.launch(*command)
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0, said
    assert differing(run, stages.undisturbed("esi", 4)) == []


def test_deepspeed_over_ssh_runs_set(hosts: Hosts, stages: SmallStages, tmp_path: Path) -> None:
    """Killed once: the command itself. pdsh and the other hosts' launchers live on, the ranks save and end."""
    run, longer = tmp_path / "run", ("tune.max_steps=150", "tune.save_every=100")
    command = ("launch/set.py", *stages.arguments("set", run, *longer))
    job = hosts.launch(*command)
    wait_while_it_runs(job, lambda: num_lines(run / "metrics.jsonl") >= 2)
    job.send_signal(signal.SIGKILL)  # ``Hosts.on`` ends in exec: this is deepspeed itself
    said, _ = job.communicate(timeout=ENDS_WITHIN_S)  # to the end of pdsh, which has the other end of the pipe
    assert "the launcher is gone; saving, then ending" in said and "interrupted: " in said, said
    assert [len(ranks_on(host)) for host in ADDRESSES] == [0, 0]
    again = hosts.launch(*command)
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0 and "going on after step" in said, said
    stages.finish("set", tmp_path / "undisturbed", *longer, ranks=4)
    assert differing(run, tmp_path / "undisturbed") == []
