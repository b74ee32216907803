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
from conftest import num_lines
from endpoint_server import running_server
from fork_server import FAIL, ForkedJob
from small_stages import STAGES, SmallStages, differing, held, is_done, outcome, wait_until, written

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
    assert rank == "1" and said.startswith("gave up waiting for another rank after run.collective_timeout_s"), (
        job.said()
    )

    stages.finish(stage, run)
    assert differing(run, stages.undisturbed(stage)) == []


@pytest.mark.parametrize("stage", ["esi", "eval"])
def test_killed_while_a_server_is_asked(stages: SmallStages, tmp_path: Path, stage: str) -> None:
    """It goes on with the questions that have no answer yet, and ends as if nothing had happened to it."""
    prompts = [f"CASE {case}; {n}" for n, case in enumerate(["one", "400", "cut", "null", "five"] + ["slow"] * 15)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"goal": prompt}) + "\n" for prompt in prompts))
    run, section = tmp_path / "run", "data" if stage == "esi" else "eval"

    def rows_of(name: str) -> list[dict]:
        return [json.loads(line) for line in (run / name).read_text().splitlines()]

    with running_server() as server:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        endpoint = f"{{base_url: '{url}', model: m, concurrency: 1}}"
        asking = [f"data.responses={endpoint}"]
        if stage == "eval":
            asking = [f"eval.models=[{{endpoint: {endpoint}}}]", "eval.judges=[{kind: words}]"]
        overrides = f"{section}.prompts.path={tmp_path / 'p.jsonl'}", *asking
        job = stages.start(stage, run, *overrides, NO_PROXY="127.0.0.1")
        wait_until(job, lambda: num_lines(run / "answers.jsonl") >= 8)
        job.kill([*job.launchers, *job.ranks])
        assert job.has_ended(ENDS_WITHIN_S), job.said()
        kept = num_lines(run / "answers.jsonl")
        assert kept < len(prompts)
        server.seen.clear()
        stages.finish(stage, run, *overrides, NO_PROXY="127.0.0.1")
        assert [body["messages"][-1]["content"] for _, _, body in server.seen] == prompts[kept:]
        undisturbed = tmp_path / "undisturbed"
        stages.finish(stage, undisturbed, *overrides, NO_PROXY="127.0.0.1")
    assert differing(run, undisturbed) == []
    answers = [row for row in rows_of("answers.jsonl") if row["model"] == "m"]
    assert [row["prompt"] for row in answers] == prompts
    assert [n for n, row in enumerate(answers) if row.get("cut")] == [2]
    if stage == "eval":
        tables = [json.loads((folder / "report.json").read_text())["measures"] for folder in (run, undisturbed)]
        assert tables[0] == tables[1]
        counted = {row["n"] for row in tables[0] if (row["model"], row["measure"]) == ("m", "attack_success")}
        assert counted == {len(prompts) - 2}
        return
    excluded = {row["index"]: row["excluded"] for row in rows_of("responses.jsonl") if row["excluded"]}
    assert excluded.keys() == {1, 3} and "HTTP 400" in excluded[1] and "no text" in excluded[3]
    # The same responses from a file give the same bits.
    pairs = [{"prompt": row["prompt"], "response": row["response"]} for row in answers if row["response"] is not None]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    read = tmp_path / "read"
    stages.finish(stage, read, f"data.responses={tmp_path / 'r.jsonl'}")
    scores = [{name: data for name, data in outcome(folder).items() if "/" in name} for folder in (run, read)]
    assert scores[0] and scores[0] == scores[1]
