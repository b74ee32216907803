"""A job killed, failing or hanging at any moment of any stage: it ends by itself, says why first, and goes on later."""

from __future__ import annotations

import json
import os
import random
import re
import secrets
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from fork_server import FAIL, ForkedJob
from small_stages import STAGES, SmallStages, differing, held, is_done, written

NUM_KILLS = 20
ENDS_WITHIN_S = 60  # what the project promises, not a measurement
# Phase → stage, and files that show when two moments within the phase have come.
PHASES = {
    "generating": ("esi", "responses*.jsonl", (3, 11)),
    "scoring": ("esi", "metrics.jsonl", (2, 4)),
    "set": ("set", "metrics.jsonl", (3, 9)),
    "spa": ("spa", "metrics.jsonl", (3, 9)),
    "eval": ("eval", "answers.jsonl", (3, 7)),
    "perturb": ("perturb", "answers.jsonl", (8, 20)),
}
FAILED = re.compile(r"^rank (\d+) failed: ?(.*)$", re.MULTILINE)
# ESI_DS_KILL_SEED=<printed number> draws the same moments and victims again.
SEED = int(os.environ.get("ESI_DS_KILL_SEED") or secrets.randbelow(10**6))


def where(job: ForkedJob, run: Path) -> str:
    """What the run wrote last."""
    status = run / "status.json"
    if not status.is_file() or json.loads(status.read_text())["pid"] != job.ranks[0]:
        return "starting"
    times = {}
    for folder, *names in os.walk(run):  # passes over a folder that has got another name meanwhile; rglob raises
        for file in (Path(folder, name) for children in names for name in children):
            with suppress(FileNotFoundError):
                times[file.stat().st_mtime_ns] = file.relative_to(run).parts[0].removeprefix(".").removesuffix(".tmp")
    return "after " + times[max(times)]


def draw_victims(draw: random.Random, job: ForkedJob) -> list[int]:
    kind = draw.choice(["rank 0", "another rank", "all", "all and the launcher"])
    everything = [*job.launchers, *job.ranks]
    return {"rank 0": job.ranks[:1], "another rank": job.ranks[1:], "all": job.ranks}.get(kind, everything)


@pytest.mark.parametrize("stage", STAGES)
def test_twenty_random_kills(stages: SmallStages, tmp_path: Path, stage: str) -> None:
    """One run is killed again and again and started with the same command; one that gets through is compared, and a new
    one begun."""
    expected, draw = stages.undisturbed(stage), random.Random(f"{SEED} {stage}")
    length, runs, kills, moments = stages.seconds[stage, 2], 0, 0, Counter()
    while kills < NUM_KILLS or not is_done(tmp_path / str(runs)):
        run = tmp_path / str(runs)
        job = stages.start(stage, run, patience=5)
        about = f"ESI_DS_KILL_SEED={SEED}, kill {kills + 1}, run {run}\n"
        if draw.random() < 0.5:  # starting takes longer than all the rest: half of the moments are after it
            before = written(run)
            job.ends_before(lambda before=before, run=run: written(run) != before)
        if kills == NUM_KILLS or job.has_ended(draw.uniform(0, length / 2)):
            assert job.has_ended(200) and is_done(run), about + job.said()
            assert differing(run, expected) == [], about
            runs += kills < NUM_KILLS
            continue
        moments[where(job, run)] += 1
        job.kill(draw_victims(draw, job))
        kills += 1
        assert job.has_ended(ENDS_WITHIN_S), about + job.said()
    assert len(moments) > 2, moments
    print(f"\n{stage}: ESI_DS_KILL_SEED={SEED}, {length:.1f} s undisturbed, {runs + 1} runs, killed {dict(moments)}")


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_that_raises_and_one_that_hangs(stages: SmallStages, tmp_path: Path, phase: str) -> None:
    stage, files, (first, second) = PHASES[phase]
    run = tmp_path / "run"
    job = held(stages.start(stage, run, hold_at=f"{files} {first}"))
    job.kill(job.ranks[1:], FAIL)
    job.go_on()
    assert job.has_ended(ENDS_WITHIN_S), job.said()
    failures = FAILED.findall(job.said())
    # The rank that raised speaks first, with its traceback; the other says only that it lost one.
    assert failures[0] == ("1", ""), job.said()
    assert "rank 1 was told to fail" in job.said()
    assert all(rank == "0" and said.startswith("lost another rank") for rank, said in failures[1:]), job.said()

    job = stages.start(stage, run, "run.collective_timeout_s=8", patience=1, hold_at=f"{files} {second}")
    assert job.has_ended(ENDS_WITHIN_S), job.said()
    [(rank, said)] = FAILED.findall(job.said())
    assert rank == "1" and said.startswith("waited in vain for another rank for run.collective_timeout_s"), job.said()

    stages.finish(stage, run)
    assert differing(run, stages.undisturbed(stage)) == []
