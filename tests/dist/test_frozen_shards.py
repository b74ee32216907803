"""esi_ds.freeze under ZeRO-3: no frozen bit moves on two and three ranks, whatever optimizer DeepSpeed steps.

So with ``MaskedAdamW`` in the place of an optimizer that the engine was given instead, resumed or not.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import build_mask, build_model, byte_bpe_tokenizer
from conftest import run_ranks
from safetensors.torch import load_file

from esi_ds import Mask

CASES: dict[str, dict] = {
    "adamw-selected": {},
    "adamw-complement": {"train": "complement"},
    "adamw-after-the-engine": {"when": "after"},
    "adamw-offloaded": {"train": "complement", "zero": {"offload_optimizer": {"device": "cpu"}}},
    "adamw-mixture": {"kind": "qwen3_moe"},
    "sgd-selected": {"optimizer": "sgd"},
    "adafactor-complement": {"optimizer": "adafactor", "train": "complement"},
    "muon-selected": {"optimizer": "muon", "zero": {"reduce_scatter": False}},
    "masked-selected": {
        "optimizer": "masked",
        "checkpoint": True,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 2}},  # begins at 0
    },
    "masked-complement": {"optimizer": "masked", "train": "complement", "checkpoint": True},
    "unguarded": {"drop": True, "error": "has frozen weights that were changed"},
    "stage-2": {"zero": {"stage": 2}, "error": "ZeRO stage 1 or 2"},
    "masked-stage-2": {"optimizer": "masked", "zero": {"stage": 2}, "error": "ZeRO stage 1 or 2"},
}


@pytest.fixture(scope="module", params=[2, 3])
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(f"freeze-{request.param}")
    for kind in ("llama", "qwen3_moe"):
        build_model(kind, folder / kind / "model", byte_bpe_tokenizer(), dtype=torch.bfloat16)
        build_mask(folder / kind / "mask", folder / kind / "model", ratio=0.1)
    cases = []
    for name, case in CASES.items():
        kind = folder / case.get("kind", "llama")
        common = {"model": str(kind / "model"), "mask": str(kind / "mask"), "optimizer": "adamw"}
        common |= {"train": "selected", "when": "before", "output": str(folder / f"{name}.safetensors")}
        cases.append({**common, **case})
        if "checkpoint" in case:
            cases[-1]["checkpoint"] = str(folder / f"{name}-checkpoint")
    (folder / "cases.json").write_text(json.dumps(cases))
    done = run_ranks(request.param, "tests/dist/freeze_worker.py", str(folder / "cases.json"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "error" not in case or "drop" in case])
def test_no_frozen_bit_moves(folder: Path, name: str) -> None:
    weights = load_file(folder / f"{name}.safetensors")
    mask = Mask.load(folder / CASES[name].get("kind", "llama") / "mask")
    frozen = trained = 0
    for key in (key for key in weights if key.startswith("before.")):
        parameter = key.removeprefix("before.")
        changed = weights[key].view(torch.int16) != weights[f"after.{parameter}"].view(torch.int16)
        trains = torch.zeros_like(changed)
        if parameter in mask.shapes:
            selected = mask.tensor(parameter)
            trains = ~selected if CASES[name].get("train") == "complement" else selected
        frozen += int(changed[~trains].sum())
        trained += int(changed[trains].sum())
    assert trained > 500
    assert frozen > 500 if "drop" in CASES[name] else frozen == 0
