"""The lock of a run folder, and the status that says whether its holder lives."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from esi_ds import lock, status
from esi_ds.errors import Interrupted, UserError
from esi_ds.tracking import Tracker


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """A lock of a process on another host, and a short patience."""
    monkeypatch.setattr(lock, "WATCH_S", 0.1)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "booster")
    holder = {**lock.own_identity(), "host": "node7", "boot": "b", "pid": 1, "pid_started": 1, "since": "then"}
    (tmp_path / lock.LOCK).write_text(json.dumps(holder))
    return holder


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    assert lock.acquire(tmp_path) is None
    with pytest.raises(UserError, match=r"being written by another job \(.*process \d+ on .*wait for it, stop it"):
        lock.acquire(tmp_path)
    lock.release(tmp_path)
    assert lock.acquire(tmp_path) is None
    lock.release(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_one_holder_at_a_time_without_hard_links(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, name: Path) -> None:
        raise OSError(number, os.strerror(number), str(source), None, str(name))

    monkeypatch.setattr(os, "link", link)
    (tmp_path / lock.LOCK).write_text(json.dumps({**lock.own_identity(), "pid_started": 1}))
    assert "no such process here" in lock.acquire(tmp_path)
    with pytest.raises(UserError, match="being written by another job"):
        lock.acquire(tmp_path)
    lock.release(tmp_path)
    assert lock.acquire(tmp_path) is None
    lock.release(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_link_whose_reply_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS asks again, and then is told that the name is taken: by this very link (open(2), O_EXCL)."""
    link = os.link

    def lose_reply(source: Path, name: Path) -> None:
        link(source, name)
        raise FileExistsError(errno.EEXIST, "File exists")

    dead = json.dumps({**lock.own_identity(), "pid_started": 1})
    monkeypatch.setattr(os, "link", lose_reply)
    assert lock.acquire(tmp_path) is None
    lock.release(tmp_path)
    (tmp_path / lock.LOCK).write_text(dead)
    monkeypatch.setattr(os, "link", lambda source, name: (link if name.name == lock.LOCK else lose_reply)(source, name))
    assert "no such process here" in lock.acquire(tmp_path)
    lock.release(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    script = "import sys, os, pathlib; from esi_ds import lock; lock.acquire(pathlib.Path(sys.argv[1])); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == 9
    assert "no such process here" in lock.acquire(tmp_path)


def test_a_pid_that_came_again_is_another_process(tmp_path: Path) -> None:
    holder = {**lock.own_identity(), "pid_started": 1}
    (tmp_path / lock.LOCK).write_text(json.dumps(holder))
    assert "no such process here" in lock.acquire(tmp_path)


@pytest.mark.parametrize("other", [{"pids": "pid:[1]"}, {"boot": "b"}], ids=["container", "boot"])
def test_a_process_that_cannot_be_seen_is_watched(
    other: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two containers may share a host's name and boot, and two machines its name: that a pid is not here says nothing
    of one there."""
    monkeypatch.setattr(lock, "WATCH_S", 0.1)
    holder = {**lock.own_identity(), **other, "pid": 2**22, "pid_started": 1}
    (tmp_path / lock.LOCK).write_text(json.dumps(holder))
    assert "did not change for 0.1 s" in lock.acquire(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "3", "{}", '{"host": "HERE"}', '{"host": "HERE", "pid": null}'])
def test_a_lock_that_is_not_ours_is_watched(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WATCH_S", 0.1)
    (tmp_path / lock.LOCK).write_text(content.replace("HERE", lock.own_identity()["host"]))
    assert "unreadable lock" in lock.acquire(tmp_path)


def test_other_host_is_watched(tmp_path: Path, elsewhere: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WATCH_S", 0.6)
    (tmp_path / lock.STATUS).write_text("1")
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            (tmp_path / lock.STATUS).write_text(str(time.monotonic()))

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(UserError, match="node7"):
            lock.acquire(tmp_path)
    finally:
        ended.set()
        beating.join()
    assert "did not change for 0.6 s" in lock.acquire(tmp_path)  # nothing beats any more


def test_a_status_that_is_replaced_while_it_is_read(
    tmp_path: Path, elsewhere: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over NFS the file that was opened is gone then (ESTALE): its writer lives."""
    (tmp_path / lock.STATUS).write_text("1")
    read_bytes, reads = Path.read_bytes, iter((False, True))

    def read(path: Path) -> bytes:
        if next(reads):
            raise OSError(errno.ESTALE, "Stale file handle")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    assert lock.why_dead(tmp_path, elsewhere) is None


def test_slurm_tells_whether_its_job_lives(tmp_path: Path, elsewhere: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(state: str, code: int = 0, error: str = "") -> None:
        answer = subprocess.CompletedProcess([], code, state, error)
        monkeypatch.setattr(lock.subprocess, "run", lambda *_, **__: answer)

    elsewhere["slurm_job"] = "12"
    for state in ("RUNNING", "SIGNALING", "A_STATE_OF_A_LATER_SLURM"):
        tell(f"{state}\n")
        assert lock.why_dead(tmp_path, elsewhere) is None
    tell("", 1, "slurm_load_jobs error: Invalid job id specified")
    assert "no such running job" in lock.why_dead(tmp_path, elsewhere)
    tell("PENDING\n")
    assert "no such running job" in lock.why_dead(tmp_path, elsewhere)
    tell("RUNNING\n")  # it is this job itself, requeued to another node
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "requeued that job" in lock.why_dead(tmp_path, elsewhere)
    tell("", 1, "slurm_load_jobs error: Unable to contact slurm controller")
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert "did not change" in lock.why_dead(tmp_path, elsewhere)


@pytest.mark.parametrize("cluster", [None, "jureca"])
def test_the_slurm_of_another_cluster_is_not_asked(
    cluster: str | None, tmp_path: Path, elsewhere: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each cluster counts its jobs from 1; locks of earlier versions do not name theirs."""
    monkeypatch.setattr(lock, "_slurm_has", lambda job: False)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "requeued" in lock.why_dead(tmp_path, {**elsewhere, "slurm_job": "12"})
    for job in ("12", "13"):
        other = {**elsewhere, "slurm_cluster": cluster, "slurm_job": job}
        assert "did not change" in lock.why_dead(tmp_path, other)


def test_an_arrays_task_is_asked_for_without_its_siblings(
    tmp_path: Path, elsewhere: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task has the array's id as its job id: asked for by that, Slurm would tell of all tasks."""
    asked = []

    def squeue(command: list[str], **_: object) -> subprocess.CompletedProcess:
        asked.append(command[command.index("-j") + 1])
        return subprocess.CompletedProcess(command, 0, "RUNNING\n" if asked[-1] == "12_1" else "", "")

    monkeypatch.setattr(lock.subprocess, "run", squeue)
    for name, value in (("SLURM_JOB_ID", "12"), ("SLURM_ARRAY_JOB_ID", "12"), ("SLURM_ARRAY_TASK_ID", "2")):
        monkeypatch.setenv(name, value)
    elsewhere["slurm_job"] = lock.own_identity()["slurm_job"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert "no such running job" in lock.why_dead(tmp_path, elsewhere)
    elsewhere["slurm_job"] = lock.own_identity()["slurm_job"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert lock.why_dead(tmp_path, elsewhere) is None
    assert asked == ["12_2", "12_1"]


@pytest.mark.parametrize("since", ["2199-01-01T00:00:00Z", "1970-01-01T00:00:00Z"])
def test_no_clock_keeps_a_lock_alive_or_dead(tmp_path: Path, since: str) -> None:
    for file in (tmp_path / lock.LOCK, tmp_path / lock.STATUS):
        file.write_text(json.dumps({**lock.own_identity(), "since": since}))
        os.utime(file, (0, 0) if since < "2000" else (7e9, 7e9))
    with pytest.raises(UserError, match="being written by another job"):  # this very process
        lock.acquire(tmp_path)
    dead = {**lock.own_identity(), "pid_started": 1, "since": since}
    (tmp_path / lock.LOCK).write_text(json.dumps(dead))
    assert "no such process here" in lock.acquire(tmp_path)


@pytest.mark.parametrize("claims", [0, 1, 2])
def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path: Path, claims: int) -> None:
    """Ten processes at once: a file tells all that are ready to start, and another, when all have said what they got,
    to end. Also where earlier ones were killed while they took over: one from the holder, a second one from the first;
    and the holder itself had been killed before it gave up its own claim."""
    folder = tmp_path / "run"
    folder.mkdir()
    dead = [{**lock.own_identity(), "pid": 1, "pid_started": -1 - number} for number in range(4)]
    (folder / lock.LOCK).write_text(json.dumps(dead[1]))
    for number in range(claims + 1 if claims else 0):
        lock._claim(folder, dead[number]).write_text(json.dumps(dead[number + 1]))
    script = (
        "import os, sys, time, pathlib; from esi_ds import lock, errors\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "(folder / f'ready-{os.getpid()}').touch()\n"
        "while not (folder / 'go').exists(): time.sleep(0.001)\n"
        "try: print(lock.acquire(folder / 'run') is not None, flush=True)\n"
        "except errors.UserError: print('refused', flush=True)\n"
        "while not (folder / 'stop').exists(): time.sleep(0.01)"
    )
    jobs = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(10)
    ]
    try:
        while len(list(tmp_path.glob("ready-*"))) < len(jobs):
            assert all(job.poll() is None for job in jobs)
            time.sleep(0.01)
        (tmp_path / "go").touch()
        said = [job.stdout.readline().strip() for job in jobs]
    finally:
        for name in ("go", "stop"):
            (tmp_path / name).touch()
        for job in jobs:
            job.communicate(timeout=60)
    assert sorted(said) == ["True"] + ["refused"] * 9
    assert [file.name for file in (tmp_path / "run").iterdir()] == [lock.LOCK]


def test_status_while_running_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(status, "BEAT_S", 0.05)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(Interrupted), Tracker(tmp_path, enabled=True, tensorboard=False, stage="esi") as tracker:
        bar = tracker.progress(total=8, initial=2, unit="prompt", description="score")
        bar.update(3)
        beats = [json.loads((tmp_path / lock.STATUS).read_text())["beat"] for _ in range(2) if not time.sleep(0.3)]
        assert beats[1] > beats[0]
        shown = status.read_status(tmp_path)
        assert (shown["state"], shown["stage"], shown["phase"]) == ("running", "esi", "score")
        assert (shown["done"], shown["total"], shown["unit"]) == (5, 8, "prompt")
        assert shown["seconds_left"] == pytest.approx(3 / shown["rate"])
        (tmp_path / "checkpoint/safety/position-4").mkdir(parents=True)
        (tmp_path / "checkpoint/safety/position-4/state.json").write_text("{}")
        bar.close()  # a bar that is left open moves those of later tests
        raise Interrupted("x")
    assert status.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert json.loads((tmp_path / "status.json").read_text())["last_checkpoint"]["position"] == 4
    assert "interrupted, stage esi" in shown and "score: 5 of 8 prompts" in shown and "last checkpoint: at 4" in shown


@pytest.mark.parametrize("done", [8, 5])
def test_the_rate_of_a_phase_that_has_ended_stays(done: int, tmp_path: Path) -> None:
    """The work after it, such as selecting and writing, has no bar."""
    (tmp_path / "config.yaml").touch()
    with Tracker(tmp_path, enabled=True, tensorboard=False, stage="esi") as tracker:
        bar = tracker.progress(total=8, initial=2, unit="prompt", description="score")
        bar.update(done - 2)
        if done < 8:
            bar.close()
        first = tracker._status._progress()["rate"]  # type: ignore[union-attr]
        assert first > 0
        time.sleep(0.05)
        assert tracker._status._progress()["rate"] == first  # type: ignore[union-attr]
        tracker._status._write("running")  # type: ignore[union-attr]
        shown = status.show(tmp_path, time.time())
        assert ("a second; what follows is not counted" in shown) == (done == 8)
        bar.close()


def test_status_of_a_run_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with status.StatusWriter(tmp_path, "set") as writer:
        writer._write("running")
        stored = (tmp_path / lock.STATUS).read_text()
    (tmp_path / lock.STATUS).write_text(stored)
    assert "silent" not in status.show(tmp_path, time.time())
    assert "silent for 1:00:00 by this host's clock: " in status.show(tmp_path, time.time() + 3600)


WHOLE = {"state": "running", "stage": "esi", "pid": 1, "host": "a", "slurm_job": None, "updated": 1.0, "phase": None}


@pytest.mark.parametrize(
    "content",
    [
        None,
        "[]",
        "{}",
        '{"state": "running"}',
        '{"state": ',
        "[" * 100_000,
        json.dumps({**WHOLE, "pid": "1"}),
        json.dumps({**WHOLE, "updated": [1]}),
        json.dumps({**WHOLE, "phase": "score"}),
        json.dumps(WHOLE).replace('"pid": 1', '"pid": ' + "9" * 5000),
    ],
    ids=range(10),
)
def test_status_of_no_run(content: str | None, tmp_path: Path, capsys) -> None:
    """The others are shown all the same."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.yaml").touch()
    if content is not None:
        (tmp_path / "config.yaml").touch()
        (tmp_path / lock.STATUS).write_text(content)
    assert status.main([str(tmp_path), str(tmp_path / "other")]) == 2
    said = capsys.readouterr()
    assert f"error: RUN = {tmp_path}: holds" in said.err and f"{tmp_path}/other: not started" in said.out


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"host": 1, "pid": 2}',
        '{"host": "a", "pid": true}',
        "[" * 100_000,
        '{"host": "a", "pid": 1, "slurm_job": []}',
    ],
    ids=range(6),
)
def test_a_foreign_lock_is_watched_like_that_of_another_host(content: str, tmp_path: Path, elsewhere: dict) -> None:
    (tmp_path / lock.LOCK).write_text(content)
    assert "unreadable lock" in lock.acquire(tmp_path)


def test_checkpoints_of_other_names_are_passed_over(tmp_path: Path) -> None:
    for name in ("position-x", "position-3", "position-"):
        (tmp_path / "checkpoint" / name).mkdir(parents=True)
        (tmp_path / "checkpoint" / name / "state.json").touch()
    assert status.last_checkpoint(tmp_path)["position"] == 3


@pytest.mark.parametrize("row", ["[1]", '{"step": "1"}', '{"time": 1.0}', '{"step": 1, "loss": [2]}', "[" * 100_000])
def test_foreign_rows_of_the_curves(row: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 2, "lo\n')
    with Tracker(tmp_path, enabled=True, tensorboard=False, stage="esi") as tracker:
        tracker.resume_at(5)
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'
        (tmp_path / "metrics.jsonl").write_text(row + "\n")
        with pytest.raises(UserError, match=r"metrics\.jsonl.*delete it"):
            tracker.resume_at(5)
