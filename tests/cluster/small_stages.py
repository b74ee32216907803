"""Every stage on models so small that starting takes longer than running, and what of its outcome must never differ."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import yaml
from builders import PAIRS, build_guard, build_mask, build_model, byte_bpe_tokenizer, sentencepiece_tokenizer
from conftest import free_port
from fork_server import PATIENCE_S, ForkedJob, ForkServer, rank_environments

STAGES = ("esi", "set", "spa", "eval", "perturb")


def build_inputs(folder: Path, num_prompts: int) -> dict[str, Path]:
    """Models, prompts, rows and a mask; name → path."""
    model = build_model("llama", folder / "model", byte_bpe_tokenizer())
    build_guard(folder / "guard", sentencepiece_tokenizer())
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"goal": f"Do thing {i}"}) + "\n" for i in range(num_prompts))
    )
    rows = [{"instruction": prompt, "input": "", "output": response} for prompt, response in PAIRS]
    (folder / "rows.json").write_text(json.dumps(rows))
    build_mask(folder / "mask", model)
    return {path.name.split(".")[0]: path for path in folder.iterdir()}


def sections(inputs: dict[str, Path], *, steps: int, save_every: int) -> dict[str, dict]:
    """Stage → its config without run.output_dir. Small intervals: every save is a moment at which to be killed."""
    prompts = {"prompts": {"path": str(inputs["prompts"])}}
    judges = [{"kind": "guard", "name": "guard", "path": str(inputs["guard"])}]
    questions = {**prompts, "max_new_tokens": 6, "batch_size": 1}
    tune = {
        "tune": {
            "mask": str(inputs["mask"]),
            "data": {"path": str(inputs["rows"])},
            "max_steps": steps,
            "lr": 3e-4,
            "batch_size": 2,
            "save_every": save_every,
        },
        "eval": {**prompts, "max_new_tokens": 4, "batch_size": 2},
    }
    stages = {
        "esi": {
            "judge": {"path": str(inputs["guard"])},
            "data": prompts,
            "esi": {"batch_size": 1, "max_new_tokens": 12, "save_every": 2},
            "select": {"ratio": 0.05},
        },
        "set": tune,
        "spa": tune,
        "eval": {"eval": {**questions, "judges": judges}},
        "perturb": {
            "perturb": {"mask": str(inputs["mask"]), "orders": ["top", "random"], "noise": [0.5], "seeds": [0]},
            "eval": {**questions, "judges": [*judges, {"kind": "words"}]},
        },
    }
    model = {"path": str(inputs["model"]), "dtype": "fp32"}
    return {name: {"run": {"output_dir": "unset"}, "model": model, **section} for name, section in stages.items()}


def write_configs(folder: Path, sections_by_stage: dict[str, dict]) -> dict[str, Path]:
    """Stage → file."""
    for stage, section in sections_by_stage.items():
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(section))
    return {stage: folder / f"{stage}.yaml" for stage in sections_by_stage}


def outcome(run: Path) -> dict[str, bytes]:
    """What must not depend on what happened to the run: name → bytes."""
    kinds = ("scores/*.safetensors", "mask/*", "model/*.safetensors", "patch/*", "*.jsonl")
    files = [file for kind in kinds for file in sorted(run.glob(kind)) if file.name != "metrics.jsonl"]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def differing(run: Path, expected: Path) -> list[str]:
    """Names of what is not the same in two finished runs, or is in one of them only."""
    one, other = outcome(run), outcome(expected)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


class SmallStages:
    """Jobs of a fork server on these inputs, each with its log; and runs that nothing happened to, made when asked."""

    def __init__(self, folder: Path, server: ForkServer):
        self.folder, self.server = folder, server
        self.inputs = build_inputs(folder, num_prompts=24)
        self.configs = write_configs(folder, sections(self.inputs, steps=16, save_every=2))
        self.seconds: dict[tuple[str, int], float] = {}  # how long they took
        self._num_jobs = 0

    def arguments(self, stage: str, run: Path, *overrides: str) -> list[str]:
        return ["--config", str(self.configs[stage]), f"run.output_dir={run}", *overrides]

    def new_log(self) -> Path:
        self._num_jobs += 1
        return self.folder / f"job-{self._num_jobs}.log"

    def start(
        self,
        stage: str,
        run: Path,
        *overrides: str,
        ranks: int = 2,
        patience: float = PATIENCE_S,
        hold_at: str = "",
        **environment: str,
    ) -> ForkedJob:
        """hold_at: moments of ``hold.install``."""
        variables = [
            by_launcher | environment for by_launcher in rank_environments(ranks, free_port(), hold_at=hold_at)[0]
        ]
        return self.server.start(stage, self.arguments(stage, run, *overrides), variables, self.new_log(), patience)

    def finish(self, stage: str, run: Path, *overrides: str, ranks: int = 2, **environment: str) -> ForkedJob:
        """Start, and wait for the end, which must be a good one."""
        job = self.start(stage, run, *overrides, ranks=ranks, **environment)
        assert job.has_ended(200), job.said()
        assert is_done(run), job.said()
        return job

    def undisturbed(self, stage: str, ranks: int = 2) -> Path:
        run = self.folder / f"undisturbed/{stage}-{ranks}"
        if not is_done(run):
            started = time.monotonic()
            self.finish(stage, run, ranks=ranks)
            self.seconds[stage, ranks] = time.monotonic() - started
        return run


def is_done(run: Path) -> bool:
    manifest = run / "manifest.json"
    return manifest.is_file() and json.loads(manifest.read_text())["exit_state"] == "done"


def written(run: Path) -> dict[Path, int]:
    """When rows of anything were last written."""
    times = {}
    for file in run.glob("*.jsonl"):
        with suppress(FileNotFoundError):
            times[file] = file.stat().st_mtime_ns
    return times


def wait_until(job: ForkedJob, condition: Callable[[], bool], seconds: float = 120) -> None:
    """Until the running job has come so far."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.alive(), "ended too early:\n" + job.said()
        assert time.monotonic() < deadline, job.said()
        time.sleep(0.005)


def held(job: ForkedJob) -> ForkedJob:
    """The running job at the next moment of its ``hold_at``."""
    wait_until(job, job.is_held)
    return job
