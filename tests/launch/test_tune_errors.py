"""Mistakes in SET and SPA: one line that names field, value and remedy, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from builders import PAIRS, build_mask, build_model, byte_bpe_tokenizer
from conftest import run_ranks, write_config
from safetensors.torch import load_file, save_file

from esi_ds import Mask
from esi_ds.cli import main
from esi_ds.core.mask import INDEX_NAME

ZERO3 = {"zero_optimization": {"stage": 3}}
FILE = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tune_errors")
    build_model("llama", folder / "model", byte_bpe_tokenizer())
    build_model("llama", folder / "same-shapes", byte_bpe_tokenizer(), seed=9)
    build_model("mixtral", folder / "other", byte_bpe_tokenizer())
    build_mask(folder / "mask", folder / "model")
    build_mask(folder / "mask-nothing", folder / "model", ratio=0.0)
    first = next(iter(Mask.load(folder / "mask").shapes))
    build_mask(folder / "mask-all", folder / "model", ratio=2.0, whole=first)
    for name in ("missing", "extra", "shape"):
        changed_mask(folder, name)
    shutil.copytree(folder / "model", folder / "adapter")
    (folder / "adapter/adapter_config.json").write_text("{}")
    shutil.copytree(folder / "model", folder / "quantised")
    config = json.loads((folder / "model/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "quantised/config.json").write_text(json.dumps(config))
    rows = ({"prompt": prompt, "response": response} for prompt, response in PAIRS)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "strange.jsonl").write_text('{"alpha": "a", "beta": "b"}\n')
    (folder / "empty.jsonl").write_text('{"prompt": "a", "response": ""}\n')
    return folder


def changed_mask(folder: Path, what: str) -> None:
    """The sound mask's copy without one parameter, with one too many, or with one in another shape."""
    mask = Mask.load(folder / "mask")
    tensors, metadata = load_file(folder / "mask" / FILE), dict(mask.metadata)
    shapes, counts = json.loads(metadata["shapes"]), json.loads(metadata["counts"])
    name = list(shapes)[2]
    if what == "missing":
        del tensors[name], shapes[name]
        k = mask.k - counts.pop(name)
        metadata |= {"k": str(k), "ratio": repr((k + 0.5) / mask.total_numel)}
    elif what == "extra":
        tensors["model.layers.7.extra.weight"], shapes["model.layers.7.extra.weight"] = (
            torch.zeros(2, dtype=torch.uint8),
            [4, 4],
        )
        counts["model.layers.7.extra.weight"] = 0
    else:
        shapes[name] = shapes[name][::-1]
    metadata |= {"shapes": json.dumps(shapes), "counts": json.dumps(counts)}
    target = folder / f"mask-{what}"
    target.mkdir()
    save_file(tensors, target / FILE, metadata=metadata)
    (target / INDEX_NAME).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, FILE)}))


def base(folder: Path) -> dict:
    return {
        "run": {"output_dir": str(folder / "run"), "tensorboard": False},
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "tune": {"mask": str(folder / "mask"), "data": {"path": str(folder / "rows.jsonl")}, "max_steps": 2},
        "deepspeed": ZERO3,
    }


CASES = {
    "no tune section": ("set", {"tune": None}, ["tune", "missing"]),
    "router of a dense model": ("set", {"tune.router": "train"}, ["tune.router", "none"]),
    "role that there is not": (
        "spa",
        {"model.roles": {"*q_proj*": "queries"}},
        ["model.roles", "queries", "is not a role"],
    ),
    "role of nothing": (
        "spa",
        {"model.roles": {"*.wq": "attention.q"}},
        ["model.roles", "*.wq", "matches no parameter"],
    ),
    "no mask": ("set", {"tune.mask": "nowhere"}, ["tune.mask", "nowhere"]),
    "mask of another model": ("set", {"model.path": "{}/other"}, ["tune.mask", "another model"]),
    "missing name": ("spa", {"tune.mask": "{}/mask-missing"}, ["tune.mask", "does not name", "v_proj"]),
    "extra name": ("spa", {"tune.mask": "{}/mask-extra"}, ["tune.mask", "model.layers.7.extra.weight"]),
    "other shape": ("set", {"tune.mask": "{}/mask-shape"}, ["tune.mask", "shape"]),
    "nothing selected": ("set", {"tune.mask": "{}/mask-nothing"}, ["tune.mask", "nothing would train"]),
    "everything frozen": ("spa", {"tune.mask": "{}/mask-all"}, ["tune.mask", "nothing would train"]),
    "adapter": ("set", {"model.path": "{}/adapter"}, ["model.path", "adapter", "merge"]),
    "quantised": ("set", {"model.path": "{}/quantised"}, ["model.path", "quantised"]),
    "stage 2": ("spa", {"deepspeed": {"zero_optimization": {"stage": 2}}}, ["stage", "2", "must be 3"]),
    "no rows": ("set", {"tune.data.path": "{}/nowhere.jsonl"}, ["tune.data.path", "nowhere.jsonl"]),
    "strange columns": ("set", {"tune.data.path": "{}/strange.jsonl"}, ["tune.data.columns", "alpha, beta"]),
    "empty answers": ("set", {"tune.data.path": "{}/empty.jsonl"}, ["tune.data.path", "the answer is empty"]),
    "wrong column": ("set", {"tune.data.columns": "prompt,reply"}, ["tune.data.columns", "prompt, response"]),
    "no benign rows": (
        "set",
        {"tune.data.benign": {"path": "{}/nowhere.jsonl", "fraction": 0.5}},
        ["tune.data.benign.path"],
    ),
    "benign only": ("set", {"tune.data.benign": {"path": "{}/rows.jsonl", "fraction": 1.0}}, ["fraction"]),
    "steps": ("set", {"tune.max_steps": 0}, ["tune.max_steps", "0"]),
    "betas": ("set", {"tune.betas": [0.9, 1.0]}, ["tune.betas"]),
    "learning rate": ("set", {"tune.lr": 0.0}, ["tune.lr"]),
    "misspelt": ("set", {"tune.learning_rate": 0.1}, ["tune.learning_rate", "unknown"]),
    "optimizer section": ("spa", {"deepspeed": {**ZERO3, "optimizer": {"type": "Adam"}}}, ["deepspeed.optimizer"]),
    "clipping contradicts": ("spa", {"deepspeed": {**ZERO3, "gradient_clipping": 3.0}}, ["3.0", "1.0", "tune.clip"]),
    "accumulation contradicts": (
        "spa",
        {"deepspeed": {**ZERO3, "gradient_accumulation_steps": 8}},
        ["8", "tune.gradient_accumulation"],
    ),
    "bf16 reduction": ("spa", {"deepspeed": {**ZERO3, "communication_data_type": "bf16"}}, ["communication_data_type"]),
    "prompts": ("set", {"eval": {"prompts": {"path": "{}/nowhere.txt"}}}, ["nowhere.txt"]),
}


def write(folder: Path, changes: dict) -> Path:
    """{}/ in a change's value stands for ``folder``."""
    return write_config(folder, base(folder), json.loads(json.dumps(changes).replace("{}/", f"{folder}/")))


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_named(case: str, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage, changes, words = CASES[case]
    config = write(inputs, changes)
    capsys.readouterr()
    assert main(stage, ["--config", str(config)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("error:") == 1 and len(shown.strip().splitlines()) == 1, shown
    assert all(word in shown for word in words), shown
    assert not (inputs / "run").exists()


def launched(inputs: Path, changes: dict, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What needs the weights to be seen."""
    return run_ranks(1, "launch/set.py", "--config", str(write(inputs, changes)), *arguments, timeout=200)


@pytest.mark.parametrize("how", ["altered", "truncated"])
def test_damaged_masks(inputs: Path, how: str) -> None:
    target = inputs / f"mask-{how}"
    shutil.copytree(inputs / "mask", target)
    content = (target / FILE).read_bytes()
    (target / FILE).write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if how == "altered" else content[:-1])
    done = launched(inputs, {"tune.mask": str(target), "run.output_dir": str(inputs / f"run-{how}")})
    assert done.returncode == 2 and "tune.mask" in done.stderr and "damaged" in done.stderr, done.stderr[-2000:]
    assert not (inputs / f"run-{how}/model").exists()


def test_other_weights_of_the_same_shapes(inputs: Path) -> None:
    """Refused, or accepted where that is asked for, and the manifest says so."""
    changes = {"model.path": str(inputs / "same-shapes"), "run.output_dir": str(inputs / "run-same")}
    done = launched(inputs, changes)
    assert done.returncode == 2 and "--allow-fingerprint-mismatch" in done.stderr, done.stderr[-2000:]
    shutil.rmtree(inputs / "run-same")
    done = launched(inputs, changes, "--allow-fingerprint-mismatch")
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = json.loads((inputs / "run-same/manifest.json").read_text())
    assert manifest["mask_made_from_these_weights"] is False
    assert manifest["mask_fingerprint"] != manifest["model_fingerprint"]


@pytest.mark.parametrize("stage", ["set", "spa"])
def test_dry_run(stage: str, inputs: Path, capsys) -> None:
    arguments = ["--config", str(write(inputs, {})), "--dry-run", "--world-size", "4"]
    assert main(stage, arguments) == 0
    shown = capsys.readouterr().out
    assert "trained weights" in shown and "2 of 16 rows" in shown
    assert not (inputs / "run").exists()
