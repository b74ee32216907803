"""The Slurm scripts on a real Slurm of two nodes: a chain undisturbed, one stopped in every stage, a node drained."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from builders import PAIRS, build_guard, build_model, byte_bpe_tokenizer, sentencepiece_tokenizer
from conftest import num_rows
from safetensors.torch import load_file
from slurm_site import Cluster, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
STAGES = ("esi", "set", "spa", "eval")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    site = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        site.start()
        yield site
    finally:
        site.stop()


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, Path]:
    """A config for every stage, on small random models; what the pipeline sets itself is not in them."""
    folder = tmp_path_factory.mktemp("inputs")
    build_model("llama", folder / "model", byte_bpe_tokenizer())
    build_guard(folder / "guard", sentencepiece_tokenizer())
    # Many to score: a signal from outside takes as long as several of its micro-batches.
    for name, count in (("prompts", 24), ("scored", 72)):
        rows = ({"goal": f"Do thing {i}"} for i in range(count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = ({"instruction": prompt, "input": "", "output": response} for prompt, response in PAIRS)
    (folder / "rows.json").write_text(json.dumps(list(rows)))
    prompts = {"prompts": {"path": str(folder / "prompts.jsonl")}}
    data = {"path": str(folder / "rows.json")}
    tune = {
        "tune": {"mask": "", "data": data, "max_steps": 200, "lr": 3e-4, "save_every": 20},
        "eval": {**prompts, "max_new_tokens": 4},
    }
    stages = {
        "esi": {
            "judge": {"path": str(folder / "guard")},
            "data": {"prompts": {"path": str(folder / "scored.jsonl")}},
            "esi": {"batch_size": 1, "max_new_tokens": 6, "save_every": 2},
            "select": {"ratio": 0.05},
        },
        "set": tune,
        "spa": tune,
        "eval": {
            "eval": {
                **prompts,
                "judges": [{"kind": "guard", "name": "guard", "path": str(folder / "guard")}],
                "max_new_tokens": 6,
                "batch_size": 1,
            }
        },
    }
    files = {}
    for stage, section in stages.items():
        files[stage] = folder / f"{stage}.yaml"
        whole = {"run": {"output_dir": "unset"}, "model": {"path": str(folder / "model"), "dtype": "fp32"}, **section}
        files[stage].write_text(yaml.safe_dump(whole))
    return files


def start_chain(cluster: Cluster, configs: dict[str, Path], runs: str, *more: str) -> dict[str, str]:
    """Stage → job id, as pipeline.sh tells."""
    files = [word for stage in STAGES for word in (f"--{stage}", str(configs[stage]))]
    done = subprocess.run(
        ["slurm/pipeline.sh", "--runs", runs, *files, *more],
        env=cluster.environment,
        cwd=cluster.work,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    words = [line.split() for line in done.stdout.splitlines()]
    return {line[0].rstrip(":"): line[2] for line in words if line[1:2] == ["job"]}


def stop_when_begun(cluster: Cluster, run: Path, stage: str, job: str, files: str, rows: int) -> None:
    """Slurm's warning signal once the run has written so much; Slurm starts the job again."""
    cluster.wait_until(lambda: num_rows(run, files) >= rows, 240, lambda: cluster.logs(stage, job))
    cluster.say("scancel", "--signal=USR1", job)
    cluster.wait_until(
        lambda: "requeueing" in cluster.log(stage, job), 60, lambda: cluster.state(job) + cluster.logs(stage, job)
    )


def outputs(run: Path) -> dict[str, bytes]:
    """What must not depend on what happened to the run."""
    kinds = ("scores/*.safetensors", "mask/*.safetensors", "model/*.safetensors", "*.jsonl")
    files = [file for kind in kinds for file in sorted(run.glob(kind)) if file.name != "metrics.jsonl"]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, configs: dict[str, Path]) -> Path:
    jobs = start_chain(cluster, configs, "runs/undisturbed", "--", "--nodes=2")
    assert list(jobs) == list(STAGES)
    assert cluster.state(jobs["eval"]) == "PENDING" and "afterok" in cluster.fact(jobs["eval"], "Dependency")
    for stage, job in jobs.items():
        cluster.wait_for(job, stage, "COMPLETED")
        logs = sorted(path.name for path in (cluster.work / "slurm/logs" / job / "start-0").iterdir())
        assert logs == ["rank-0.log", "rank-1.log"]
        assert "(restarts: 0)" in cluster.log(stage, job)
    return cluster.work / "runs/undisturbed"


def test_pipeline_leaves_every_stage_finished(cluster: Cluster, undisturbed: Path) -> None:
    for stage in STAGES:
        manifest = json.loads((undisturbed / stage / "manifest.json").read_text())
        assert (manifest["exit_state"], manifest["world_size"]) == ("done", 2)
        assert list((undisturbed / stage / "tensorboard").iterdir())
        assert not (undisturbed / stage / "lock.json").exists()
        assert json.loads((undisturbed / stage / "status.json").read_text())["state"] == "done"
    evaluated = json.loads((undisturbed / "eval/report.json").read_text())
    assert "SET" in json.dumps(evaluated) and "SPA" in json.dumps(evaluated)


def test_stopped_in_every_stage_requeued_same_bits(
    cluster: Cluster, configs: dict[str, Path], undisturbed: Path
) -> None:
    jobs = start_chain(cluster, configs, "runs/stopped", "--", "--nodes=2")
    runs = cluster.work / "runs/stopped"
    moments = {
        "esi": ("metrics.jsonl", 5),
        "set": ("metrics.jsonl", 7),
        "spa": ("metrics.jsonl", 9),
        "eval": ("answers.jsonl", 5),
    }
    for together in (["esi"], ["set", "spa"], ["eval"]):  # SET and SPA run side by side
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda s: stop_when_begun(cluster, runs / s, s, jobs[s], *moments[s]), together))
    for stage, job in jobs.items():
        cluster.wait_for(job, stage, "COMPLETED")
        log = cluster.log(stage, job)
        assert "(restarts: 0)" in log and "(restarts: 1)" in log  # appended, not overwritten
        assert "Slurm has started this job again (1 time so far)" in (runs / stage / "log.txt").read_text()
        assert cluster.fact(job, "Restarts") == "1"
        first, second = outputs(undisturbed / stage), outputs(runs / stage)
        assert first.keys() == second.keys()
        assert [name for name in first if first[name] != second[name]] == []


def test_stopped_while_generating_and_finished_on_one_node(
    cluster: Cluster, configs: dict[str, Path], undisturbed: Path
) -> None:
    """The second node is drained meanwhile, so that Slurm has one node left for the requeued job."""
    job = cluster.submit("esi", configs["esi"], "--nodes=1-2", arguments=("run.output_dir=runs/drained",))
    run = cluster.work / "runs/drained"
    stop_when_begun(cluster, run, "esi", job, "responses*.jsonl", 3)
    cluster.say("scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=test")
    try:
        cluster.wait_for(job, "esi", "COMPLETED")
    finally:
        cluster.say("scontrol", "update", "NodeName=node2", "State=RESUME")
    assert json.loads((run / "manifest.json").read_text())["world_size"] == 1
    got, expected = (
        load_file(folder / "scores/model-00001-of-00001.safetensors") for folder in (run, undisturbed / "esi")
    )
    for name, values in expected.items():
        # Other micro-batches: fp32 sums in another order, as in test_resume.py.
        assert float((got[name] - values).norm()) <= 1e-5 * float(values.norm()), name


def test_a_users_mistake_is_not_requeued(cluster: Cluster, configs: dict[str, Path]) -> None:
    job = cluster.submit("set", configs["set"], arguments=("run.output_dir=runs/x", "tune.mask=nowhere"))
    cluster.wait_for(job, "set", "FAILED")
    assert cluster.fact(job, "ExitCode") == "2:0"
    log = cluster.log("set", job)
    assert "failed with exit code 2; the first message" in log and "error: tune.mask = nowhere" in log
    assert not (cluster.work / "runs/x").exists()
