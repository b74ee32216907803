"""A rank that C++ aborts and one that hangs, under real launchers: the job ends, and its last words name the rank."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from conftest import run_ranks


def test_a_rank_that_aborts_is_named_though_no_other_gets_an_error(tmp_path: Path) -> None:
    """As under NCCL: rank 0 never returns from its wait, so nothing but its watch can speak."""
    (tmp_path / "config.yaml").write_text("{}")
    bar = {"phase": "tune", "done": 1, "total": 2, "unit": "step", "rate": 0.5, "seconds_left": 2.0}
    known = {"state": "running", "stage": "set", "pid": 7, "host": "a", "slurm_job": None, "updated": 1.0}
    (tmp_path / "status.json").write_text(json.dumps({**known, **bar}))
    done = run_ranks(2, "tests/dist/dying_worker.py", "abort", str(tmp_path), launcher="deepspeed", timeout=300)
    assert done.returncode != 0
    (line,) = re.findall(r"^rank 1 died of SIGABRT during tune: 1 of 2 steps .*$", done.stderr, re.MULTILINE)
    assert "run.collective_timeout_s" in line and line.endswith("Start the same command again to continue")
    assert "failed:" not in done.stderr


def test_a_hang_in_deepspeeds_own_group_ends_after_our_timeout(tmp_path: Path) -> None:
    """torch gives a group that is made without a timeout its default: half an hour, ten minutes under NCCL."""
    started = time.monotonic()
    done = run_ranks(2, "tests/dist/dying_worker.py", "hang", str(tmp_path), timeout=300, launcher="torchrun")
    assert done.returncode != 0 and time.monotonic() - started < 240
    assert "rank 0 failed: gave up waiting for another rank after run.collective_timeout_s" in done.stderr
