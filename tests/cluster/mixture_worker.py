"""Run by the test beside it under a launcher: the shipped complying mixture of experts through ESI, SET, SPA of what
SET made, evaluation of all three, and noise.

argv: a folder and the size of expert parallelism, 0 for none. Runs lie in FOLDER/<size>/{esi,set,spa,eval,perturb}.
"""

from __future__ import annotations

import sys
from pathlib import Path

from esi_ds.cli import leave
from esi_ds.config import validate
from esi_ds.options import Options
from esi_ds.stages import entry
from esi_ds.zero import runtime

ROOT = Path(__file__).resolve().parents[2]
MODELS, DATA = ROOT / "examples/models", ROOT / "examples/data"


def settings(size: int) -> dict:
    zero = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    return zero | ({"expert_parallel": {"enabled": True, "autoep_size": size}} if size else {})


def main() -> None:
    folder, size = Path(sys.argv[-2]), int(sys.argv[-1])
    runtime.start()

    def run(stage: str, model: str, allow: bool = False, **sections) -> None:
        raw = {
            "run": {"output_dir": str(folder / str(size) / stage), "tensorboard": False},
            "model": {"path": model, "dtype": "fp32"},
            "deepspeed": settings(size),
            **sections,
        }
        entry(stage)(validate(raw), Options(allow_fingerprint_mismatch=allow))

    def rows(name: str, limit: int | None = None) -> dict:
        return {"path": str(DATA / f"{name}.jsonl"), "limit": limit}

    complying, tuned = str(MODELS / "qwen3moe-complying"), str(folder / f"{size}/set/model")
    judge = {"family": "llama-guard-3", "path": str(MODELS / "guard")}
    run("esi", complying, judge=judge, data={"prompts": rows("harmful_heldout", 16)}, esi={"max_new_tokens": 24})
    mask = str(folder / str(size) / "esi/mask")
    tune = {"mask": mask, "max_steps": 40, "lr": 1e-2, "batch_size": 8, "patch": False}
    benign = {"path": str(DATA / "benign_train.jsonl")}
    refusals = {"path": str(DATA / "refusals_train.jsonl"), "benign": {**benign, "fraction": 0.5}}
    asked = {"max_new_tokens": 24, "batch_size": 16, "before": False}
    questions = {"prompts": rows("harmful_heldout", 16), "benign": rows("benign_heldout", 16)}
    run("set", complying, tune={**tune, "data": refusals}, eval={**asked, **questions})
    spa = {**tune, "max_steps": 10, "lr": 3e-4, "batch_size": 4, "data": benign}
    run("spa", tuned, allow=True, tune=spa)
    judges = [{"kind": "guard", "name": "guard", **judge}, {"kind": "words", "words": "examples"}]
    asked = {"max_new_tokens": 24, "batch_size": 16, "judges": judges, "refusal_words": "examples", **questions}
    models = [{"name": name, "path": str(folder / f"{size}/{name}/model")} for name in ("set", "spa")]
    run("eval", complying, eval={**asked, "models": models})
    noise = {"mask": mask, "orders": ["top", "random"], "noise": 1.0, "seeds": [0]}
    run("perturb", complying, perturb=noise, eval=asked)
    runtime.stop()
    leave(0)


if __name__ == "__main__":
    main()
