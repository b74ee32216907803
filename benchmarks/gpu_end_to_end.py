"""ESI → SET → SPA with the shipped commands on one rank, and what became of every bit of the weights."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from benchmarks import ROOT
from benchmarks.gpu_models import save_model, shape
from esi_ds import Mask
from esi_ds.core.adamw import as_integers
from esi_ds.models.weights import weight_files
from esi_ds.zero import runtime

Part = dict[str, Any]
ROWS = ROOT / "examples/data/refusals_train.jsonl"
GUARD = ROOT / "examples/models/guard"
NUM_ROWS = 16
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "CROSS_")  # of this process's own group


def end_to_end(tiny: bool, **changes: Any) -> Iterator[Part]:
    """Both tunings of a model of 1 B weights by the mask that ESI has made of it: no frozen bit may differ, and some
    trained ones must. changes: of the model's configuration."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, tiny, changes)
        for stage in ("esi", "set", "spa"):
            yield launch(stage, folder)
        for stage, train in (("set", "selected"), ("spa", "complement")):
            yield changed_bits(stage, folder / "model", folder / stage / "model", folder / "esi/mask", train)
            yield reload(stage, folder / stage / "model")


def prepare(folder: Path, tiny: bool, changes: dict[str, Any]) -> None:
    """The model, rows and configurations of a run, in ``folder``."""
    save_model(shape("Llama-3.2-1B", tiny, **changes), "bf16", folder / "model")
    (folder / "rows.jsonl").write_text("".join(ROWS.read_text().splitlines(keepends=True)[:NUM_ROWS]))
    tune = {"mask": str(folder / "esi/mask"), "data": {"path": str(folder / "rows.jsonl")}, "max_steps": 3, "lr": 1e-3}
    stages = {
        "esi": {
            "judge": {"family": "llama-guard-3", "path": str(GUARD)},
            "data": {"responses": str(folder / "rows.jsonl")},
            "esi": {"max_new_tokens": 48, "batch_size": 4},
            "select": {"ratio": 0.01},
        },
        "set": {"tune": tune},
        "spa": {"tune": tune},
    }
    for stage, sections in stages.items():
        common = {
            "run": {"output_dir": str(folder / stage), "tensorboard": False},
            "model": {"path": str(folder / "model"), "dtype": "bf16"},
            "deepspeed": str(ROOT / "ds_configs/zero3.json"),
        }
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(common | sections))


def launch(stage: str, folder: Path) -> Part:
    """Run one stage as a user does. Raises RuntimeError with the end of its output where it fails."""
    command = [sys.executable, str(ROOT / f"launch/{stage}.py"), "--config", str(folder / f"{stage}.yaml")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"launch/{stage}.py ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return {"part": stage, "passed": True, "wall_seconds": time.perf_counter() - started}


def changed_bits(stage: str, base: Path, tuned: Path, mask_folder: Path, train: str) -> Part:
    """Compare two folders' weights, bit for bit. train: ``selected`` or ``complement``; what the mask does not name is
    frozen."""
    mask = Mask.load(mask_folder)
    before, after = read(base), read(tuned)
    counts = {"frozen": 0, "frozen_changed": 0, "trained": 0, "trained_changed": 0}
    for name in before.keys() & after.keys():
        moved = as_integers(before[name].flatten()) != as_integers(after[name].flatten())
        trained = torch.zeros_like(moved)
        if name in mask.shapes:
            trained = mask.bits(name) if train == "selected" else ~mask.bits(name)
        counts["frozen"] += int((~trained).sum())
        counts["frozen_changed"] += int((moved & ~trained).sum())
        counts["trained"] += int(trained.sum())
        counts["trained_changed"] += int((moved & trained).sum())
    alike = before.keys() == after.keys()
    passed = alike and counts["frozen_changed"] == 0 and counts["trained_changed"] > 0
    return {"part": f"{stage}, bits", "passed": passed, "same_tensors": alike, **counts}


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor of a model's folder, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dictionary
    return tensors


@torch.no_grad()
def reload(stage: str, folder: Path) -> Part:
    """Load an exported model as transformers does: its weights are those of the files, its logits are finite."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(runtime.device())
    stored, loaded = read(folder), model.state_dict()
    different = [name for name, tensor in stored.items() if not torch.equal(loaded[name].cpu(), tensor)]
    logits = model(torch.arange(5, 25, device=runtime.device()).unsqueeze(0)).logits
    passed = bool(stored) and not different and bool(logits.isfinite().all())
    return {"part": f"{stage}, reloaded", "passed": passed, "tensors": len(stored), "different": len(different)}
