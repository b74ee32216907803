"""Deaths of other ranks of this host: processes that really end, each in its way, and who says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esi_ds.peers import PeerWatch, RankProcess, exit_code, own_process

ENDS = {
    "abort": "import os; os.abort()",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "stopped": "import os; os.kill(os.getpid(), 15)",
    "failed": "raise SystemExit(3)",
    "done": "",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("{}")
    bar = {"phase": "score", "done": 3, "total": 12, "unit": "prompt", "rate": 0.5, "seconds_left": 18.0}
    known = {"state": "running", "stage": "esi", "pid": 7, "host": "a", "slurm_job": None, "updated": 1.0}
    (tmp_path / "status.json").write_text(json.dumps({**known, **bar}))
    return tmp_path


def start(end: str) -> subprocess.Popen[bytes]:
    """A process that waits for a line and then ends; nobody asks for its exit code."""
    words = [sys.executable, "-c", f"input(); {ENDS[end]}"]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)


def end(process: subprocess.Popen[bytes]) -> int | None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.close()
    deadline = time.monotonic() + 60
    while (code := exit_code(process.pid)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return code


def test_exit_codes_before_the_launcher_asks() -> None:
    processes = {name: start(name) for name in ENDS}
    assert exit_code(processes["done"].pid) is None  # lives
    codes = {name: end(process) for name, process in processes.items()}
    assert codes == {"abort": -6, "killed": -9, "stopped": -15, "failed": 3, "done": 0}
    assert all(process.wait() == codes[name] for name, process in processes.items())
    assert exit_code(processes["abort"].pid) is None  # its parent has asked


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("how", ENDS)
def test_the_lowest_that_lives_tells(how: str, rank: int, run: Path, capfd: pytest.CaptureFixture) -> None:
    """Rank 1 ends, after rank 3 did in good order; this process is rank 0, or rank 2 beside a living rank 0."""
    processes = {number: start(how if number == 1 else "done") for number in range(4) if number != rank}
    own = own_process(rank)
    ranks = [own, *(RankProcess(number, process.pid, own.table) for number, process in processes.items())]
    table = (own.table[0], "another boot", own.table[2])  # of a host with the same name: a pid there says nothing here
    ranks.append(RankProcess(9, processes[1].pid, table))
    with PeerWatch(rank, ranks, run) as watch:
        end(processes[3])
        end(processes[1])
        watch._thread.join(5 if how in ("abort", "killed") else 0.2)
    said = capfd.readouterr().err
    for process in processes.values():
        process.kill()
        process.wait()
    if how in ("abort", "killed") and rank == 0:
        name = "SIGABRT" if how == "abort" else "SIGKILL"
        process_name = f"process {processes[1].pid} on {own.table[0]}"
        assert said.startswith(f"\nrank 1 died of {name} during score: 3 of 12 prompts ({process_name}): "), said
        assert said.count("\n") == 2 and said.endswith("Start the same command again to continue\n")
        assert ("run.collective_timeout_s" in said) == (how == "abort")
    else:
        assert said == ""


def test_a_death_is_told_before_the_error_that_follows_from_it(run: Path, capfd: pytest.CaptureFixture) -> None:
    """gloo's connections close while the process ends, perhaps before its end can be seen."""
    process, own = start("abort"), own_process(0)
    with pytest.raises(RuntimeError), PeerWatch(0, [own, RankProcess(1, process.pid, own.table)], run):
        end(process)
        raise RuntimeError("connection closed by peer")
    assert "rank 1 died of SIGABRT" in capfd.readouterr().err
    process.wait()


def test_a_rank_that_has_ended_already_hides_no_other(run: Path, capfd: pytest.CaptureFixture) -> None:
    ended, process, own = start("done"), start("killed"), own_process(0)
    ended.communicate()
    with PeerWatch(
        0, [own, RankProcess(1, ended.pid, own.table), RankProcess(2, process.pid, own.table)], run
    ) as watch:
        end(process)
        watch._thread.join(5)
    assert "rank 2 died of SIGKILL" in capfd.readouterr().err
    process.wait()


def test_no_descriptor_and_no_thread_stays(run: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    process, own = start("done"), own_process(0)
    with PeerWatch(0, [own, RankProcess(1, process.pid, own.table)], run) as watch:
        assert len(os.listdir("/proc/self/fd")) > len(before)
    assert not watch._thread.is_alive()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert set(os.listdir("/proc/self/fd")) == before
