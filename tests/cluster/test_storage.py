"""Full disks, read-only folders, clocks that jump: a clear message, a sound run folder, the same bits in the end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import free_port
from fork_server import ForkedJob, ForkServer, rank_environments
from small_stages import SmallStages, differing, held, is_done, wait_until

from esi_ds.artifacts import read_jsonl

FAILED = re.compile(r"^rank (\d+) failed: ?(.*)$", re.MULTILINE)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own in memory. Skips where none may be mounted."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "esi-ds-test", str(folder)], capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"mounting needs root: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all room that is left."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as opened:
        size = 1 << 20
        while size:
            try:
                opened.write(b"0" * size)
            except OSError:
                size //= 2
    return ballast


def fail_for_room(
    stages: SmallStages, stage: str, run: Path, take_room: Callable[[ForkedJob], Path], hold_at: str = ""
) -> None:
    """A run that ends for want of room, which it has again afterwards. ``take_room``: what took it."""
    job = stages.start(stage, run, hold_at=hold_at)
    taken = take_room(job)
    assert job.has_ended(60), job.said()
    assert not is_done(run)
    said = dict(FAILED.findall(job.said()))
    errors = [text for text in said.values() if "no space left on device" in text]
    assert len(errors) == 1, (
        job.said()
    )  # one rank ran out of room, or one of two that did was killed by the other's end
    assert f"(run.output_dir = {run}: " in errors[0] and f"writing {run}/" in errors[0], errors
    assert "ended with 1" in job.said()
    assert "Traceback" not in job.said(), job.said()
    taken.unlink()


def fill_when_held(disk: Path) -> Callable[[ForkedJob], Path]:
    """``take_room``: no byte is free on the disk from the moment on that the job is held at."""

    def take_room(job: ForkedJob) -> Path:
        held(job)
        ballast = fill(disk)
        job.go_on()
        return ballast

    return take_room


@pytest.mark.parametrize(
    ("stage", "files", "rows"),
    [
        ("esi", "responses*.jsonl", 3),
        ("esi", "metrics.jsonl", 2),
        ("set", "metrics.jsonl", 3),
        ("spa", "metrics.jsonl", 5),
        ("eval", "answers.jsonl", 3),
        ("perturb", "verdicts.jsonl", 1),
    ],
)
def test_a_full_disk(stages: SmallStages, tmp_path: Path, stage: str, files: str, rows: int) -> None:
    with mounted(tmp_path / "disk", "size=16m") as disk:
        run = disk / "run"
        fail_for_room(stages, stage, run, fill_when_held(disk), hold_at=f"{files} {rows}")
        stages.finish(stage, run)
        assert differing(run, stages.undisturbed(stage)) == []


@pytest.mark.parametrize("folder", ["checkpoint", "model", "patch", "scores", "mask"])
def test_no_room_for_one_more_folder(stages: SmallStages, tmp_path: Path, folder: str) -> None:
    """The disk fills up when this folder has just been made, mostly under its temporary name."""
    stage = "esi" if folder in ("scores", "mask") else "set"
    with mounted(tmp_path / "disk", "size=16m") as disk:
        run = disk / "run"
        fail_for_room(stages, stage, run, fill_when_held(disk), hold_at=f"*{folder}*")
        stages.finish(stage, run)
        assert differing(run, stages.undisturbed(stage)) == []


@pytest.mark.parametrize("file", ["config.yaml", "report.json"])
def test_no_room_for_one_more_file(stages: SmallStages, tmp_path: Path, file: str) -> None:
    """Too small to be caught in the making: its temporary name leads to where there never is any room."""
    run = tmp_path / "run"
    full = run / f".{file}.tmp"

    def take_room(job: ForkedJob) -> Path:
        if file != "config.yaml":  # any other file in an unbegun run's folder would be somebody else's
            wait_until(job, (run / "config.yaml").is_file)
            full.symlink_to("/dev/full")
        return full

    if file == "config.yaml":
        run.mkdir()
        full.symlink_to("/dev/full")
    fail_for_room(stages, "set", run, take_room)
    stages.finish("set", run)
    assert differing(run, stages.undisturbed("set")) == []


@pytest.mark.parametrize("begun", [False, True])
def test_a_read_only_folder(stages: SmallStages, tmp_path: Path, begun: bool) -> None:
    with mounted(tmp_path / "disk", "size=16m") as disk:
        run = disk / "run"
        if begun:
            job = held(stages.start("set", run, hold_at="metrics.jsonl 3"))
            job.kill(job.alive())
            assert job.has_ended(10)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        job = stages.start("set", run)
        assert job.has_ended(60)
        said = [line for line in job.said().splitlines() if line.startswith("error: ")]
        assert said == [f"error: run.output_dir = {run}: cannot be written to; give a writable folder"], job.said()
        assert "ended with 2" in job.said()
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        stages.finish("set", run)
        assert differing(run, stages.undisturbed("set")) == []


@pytest.mark.parametrize("years", [-20, 20])
def test_files_of_another_time(stages: SmallStages, tmp_path: Path, years: int) -> None:
    """Everything a killed run left is dated far off, its lock and checkpoints too: nothing goes by these dates."""
    run = tmp_path / "run"
    job = held(stages.start("spa", run, hold_at="metrics.jsonl 5"))
    job.kill(job.alive())
    assert job.has_ended(10) and (run / "lock.json").exists()
    for file in (run, *run.rglob("*")):
        date = file.stat().st_mtime + years * 365 * 86400
        os.utime(file, (date, date))
    again = stages.finish("spa", run)
    assert "taking over the folder" in again.said(), again.said()
    saved = re.search(r"going on after step (\d+)", again.said())
    assert saved and int(saved[1]) >= 4, again.said()
    assert differing(run, stages.undisturbed("spa")) == []
    status = subprocess.run([shutil.which("python"), "-m", "esi_ds.status", str(run)], capture_output=True, text=True)
    assert "done, stage spa" in status.stdout


def test_a_clock_that_jumps_while_it_runs(stages: SmallStages, tmp_path: Path) -> None:
    """Ten days ahead in the middle of training, ten days back after a kill in the middle of the rest."""
    libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not libraries:
        pytest.skip("faketime is not installed (Debian: faketime)")
    clock, run, longer = tmp_path / "clock", tmp_path / "run", ("tune.max_steps=40",)

    def set_clock(offset: str) -> None:
        """At once: an empty file would be the true time."""
        (tmp_path / "next").write_text(offset)
        (tmp_path / "next").replace(clock)

    set_clock("+0")
    faked = {"LD_PRELOAD": str(libraries[0]), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
    words = [f"{name}={value}" for name, value in {**faked, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}.items()]
    with ForkServer("env", *words) as server:

        def start(hold_at: str) -> ForkedJob:
            arguments = stages.arguments("set", run, *longer)
            return server.start(
                "set", arguments, rank_environments(2, free_port(), hold_at=hold_at)[0], stages.new_log()
            )

        job = held(start("metrics.jsonl 3 7"))  # a save holds steps of both times
        set_clock("+10d")
        job.go_on()
        held(job)
        job.kill(job.alive())
        assert job.has_ended(10) and "Traceback" not in job.said(), job.said()
        job = held(start("metrics.jsonl 10"))
        set_clock("-10d")
        job.go_on()
        assert job.has_ended(120) and is_done(run), job.said()
    assert "going on after step" in job.said() and "Traceback" not in job.said(), job.said()
    stages.finish("set", tmp_path / "undisturbed", *longer)
    assert differing(run, tmp_path / "undisturbed") == []
    times = [row["time"] for row in read_jsonl(run / "metrics.jsonl")]
    jumps = [round((after - before) / 86400) for before, after in zip(times, times[1:], strict=False)]
    assert sorted(jump for jump in jumps if jump) == [-20, 10]  # the clock did jump
