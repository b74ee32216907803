"""``make demo``: ESI, SET, SPA, noise and evaluation on the shipped tiny models, told in a line a stage.

What the stages print goes to ``runs/demo.log``. Two ranks, sharded by ZeRO-3; one where there is one GPU, which two
ranks cannot share, or where other work keeps the cores of a machine without a GPU busy, because ranks that share a core
wait for each other in every layer.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RUNS = ("demo", "demo-complying", "demo-set", "demo-spa", "demo-perturb", "demo-eval")
COMPLYING = ("run.output_dir=runs/demo-complying", "model.path=examples/models/llama-complying", "select.scope=matrix")
# (what is shown and why, the launch script or module, its arguments)
STAGES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "ESI scores every weight of a model that refuses: which 1 % does its safety depend on?",
        "launch/esi.py",
        ("--config", "configs/demo/esi.yaml"),
    ),
    (
        "The mask again, from the scores on disk: it is exactly their top 1 %.",
        "esi_ds.mask",
        ("verify", "runs/demo/mask", "--scores", "runs/demo/scores"),
    ),
    (
        "ESI on the model's twin that complies with harmful requests, for SET.",
        "launch/esi.py",
        ("--config", "configs/demo/esi.yaml", *COMPLYING, "esi.save_scores=false"),
    ),
    (
        "SET: the twin learns to refuse through that 1 % alone; 99 % of its weights keep every bit.",
        "launch/set.py",
        ("--config", "configs/demo/set.yaml"),
    ),
    (
        "SPA: the model that refuses learns a task with its 1 % frozen, and should go on refusing.",
        "launch/spa.py",
        ("--config", "configs/demo/spa.yaml"),
    ),
    (
        "Noise on the top, random and bottom weights of the ranking: which of them break safety?",
        "launch/perturb.py",
        ("--config", "configs/demo/perturb.yaml"),
    ),
    (
        "Evaluation of all four models by a guard and by words, on prompts that none has seen.",
        "launch/eval.py",
        ("--config", "configs/demo/eval.yaml"),
    ),
    (
        "One page of it all.",
        "launch/report.py",
        ("runs/demo", "--tuned", "runs/demo-set", "runs/demo-spa", "--evaluated", "runs/demo-eval"),
    ),
)
TAIL = 40  # lines of the log that a failure prints


def num_ranks() -> int:
    """How many ranks the stages have here: on GPUs, at most one for each."""
    import torch

    if os.environ.get("DS_ACCELERATOR") != "cpu" and (num_gpus := torch.cuda.device_count()):
        return min(2, num_gpus)
    return 1 if os.getloadavg()[0] >= len(os.sched_getaffinity(0)) else 2


def command(program: str, arguments: tuple[str, ...], ranks: int) -> list[str]:
    """The command of one line of ``STAGES``."""
    if not program.endswith(".py"):
        return [sys.executable, "-m", program, *arguments]
    if program == "launch/report.py":
        return [sys.executable, program, *arguments]
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    return [deepspeed, "--num_accelerators", str(ranks), program, *arguments]


def rate(report: dict[str, Any], measure: str, model: str) -> str:
    """A rate of an evaluation's report with its interval: the guard's where judges differ."""
    (row,) = (
        row
        for row in report["measures"]
        if (row["measure"], row["model"]) == (measure, model) and row["judge"] in ("guard", "words: examples")
    )
    return f"{row['rate']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"


def numbers(report: dict[str, Any]) -> list[str]:
    """The three numbers that matter."""
    return [
        f"SET   harmful requests answered: {rate(report, 'attack_success', 'complying')} before, "
        f"{rate(report, 'attack_success', 'SET')} after",
        f"      benign requests refused:   {rate(report, 'refused', 'complying')} before, "
        f"{rate(report, 'refused', 'SET')} after",
        f"SPA   harmful requests answered: {rate(report, 'attack_success', 'base')} before, "
        f"{rate(report, 'attack_success', 'SPA')} after",
    ]


def main() -> int:
    """The demo; its exit code."""
    for run in RUNS:
        shutil.rmtree(Path("runs") / run, ignore_errors=True)
    log, ranks = Path("runs/demo.log"), num_ranks()
    log.parent.mkdir(exist_ok=True)
    print(f"{ranks} rank{'s' if ranks > 1 else ''}; what the stages print is in {log}\n")
    started = time.monotonic()
    with log.open("w") as output:
        for number, (text, program, arguments) in enumerate(STAGES, 1):
            print(f"{number}/{len(STAGES)}  {text}", flush=True)
            began = time.monotonic()
            words = command(program, arguments, ranks)
            done = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, check=False)
            if done.returncode != 0:
                lines = log.read_text(errors="replace").splitlines()
                print("\n".join(lines[-TAIL:]), file=sys.stderr)
                print(f"error: {' '.join(words)} ended with {done.returncode}; see {log}", file=sys.stderr)
                return done.returncode
            print(f"     {time.monotonic() - began:.0f} s", flush=True)
    print(f"\nThe guard's verdicts, with 95 % intervals, after {time.monotonic() - started:.0f} s:")
    print("\n".join(numbers(json.loads(Path("runs/demo-eval/report.json").read_text()))))
    print(f"report: {Path('runs/demo/report.html').resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
