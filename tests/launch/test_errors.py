"""A user's mistakes: one message that names field, value and remedy, exit code 2, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from builders import build_classifier, build_guard, build_model, byte_bpe_tokenizer, sentencepiece_tokenizer
from conftest import ROOT, write_config
from mask_folders import MASK_FILE, write_mask
from safetensors.torch import load_file

from esi_ds.cli import main


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    build_model("llama", folder / "model", byte_bpe_tokenizer())
    build_guard(folder / "guard", sentencepiece_tokenizer())
    build_classifier(folder / "classifier", sentencepiece_tokenizer(), "llama")
    build_classifier(folder / "padless", sentencepiece_tokenizer(), "llama", pad=None)
    (folder / "prompts.jsonl").write_text('{"prompt": "Tell me"}\n')
    return folder


def base(folder: Path) -> dict:
    return {
        "run": {"output_dir": str(folder / "run")},
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "judge": {"path": str(folder / "guard")},
        "data": {"prompts": {"path": str(folder / "prompts.jsonl")}},
    }


CUSTOM = {
    "family": "custom",
    "template": "{prompt} {response} Verdict:",
    "verdict": {"safe": " safe", "unsafe": " unsafe"},
}
ZERO3 = {"zero_optimization": {"stage": 3}}
SERVER = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}

CLASSIFIER = {
    "judge.kind": "classifier",
    "judge.path": "FOLDER/classifier",
    "judge.template": "{prompt} {response}",
    "judge.unsafe_labels": [1],
}

# (overrides as nested keys, FOLDER being the one of the models, words that the message must hold)
CASES = {
    "unknown key": ({"select.ratoi": 0.1}, ["select.ratoi", "select.ratio"]),
    "unknown section": ({"judgge.path": "x"}, ["judgge", "judge"]),
    "wrong type": ({"esi.batch_size": "eight"}, ["esi.batch_size", "eight", "integer"]),
    "number as text": ({"select.ratio": "0.1 %"}, ["select.ratio"]),
    "ratio above one": ({"select.ratio": 1.5}, ["select.ratio", "1.5"]),
    "a seed that numpy does not take": ({"run.seed": 2**32}, ["run.seed", "4294967296"]),
    "ratio zero": ({"select.ratio": 0.0}, ["select.ratio", "0"]),
    "ratio of less than one weight": ({"select.ratio": 1e-9}, ["select.ratio = 1e-09", "the smallest ratio is"]),
    "ratio of less than one weight of any matrix": (
        {"select.ratio": 1e-5, "select.scope": "matrix"},
        ["select.ratio = 1e-05", "the smallest ratio is"],
    ),
    "number too large": ({"esi.temperature": 1e300}, ["esi.temperature", "1e+300"]),
    "unknown family": ({"judge.family": "llama-gard"}, ["judge.family", "llama-gard", "llama-guard-3"]),
    "template without custom": ({"judge.template": "{response}"}, ["judge.template", "custom"]),
    "custom without template": ({"judge.family": "custom"}, ["judge.template"]),
    "verdict the same": (
        {**{f"judge.{k}": v for k, v in CUSTOM.items()}, "judge.verdict": {"safe": "a", "unsafe": "a"}},
        ["judge.verdict"],
    ),
    "verdict alike to the tokenizer": (
        {**{f"judge.{k}": v for k, v in CUSTOM.items()}, "judge.verdict": {"safe": " safe", "unsafe": " safe\u200b"}},
        ["judge.verdict", "tell"],
    ),
    "missing prompts": ({"data.prompts.path": "./nowhere.csv"}, ["data.prompts.path", "nowhere.csv"]),
    "missing responses": ({"data.responses": "./nowhere.jsonl"}, ["data.responses", "nowhere.jsonl"]),
    "responses of neither kind": ({"data.responses": 3}, ["data.responses = 3"]),
    "an endpoint without a model": (
        {"data.responses": {"base_url": "http://h/v1"}},
        ["data.responses.model", "is missing"],
    ),
    "an unknown key of an endpoint": (
        {"data.responses": {**SERVER, "concurency": 2}},
        ["data.responses.concurency", "data.responses.concurrency"],
    ),
    "an endpoint that is no URL": ({"data.responses": {**SERVER, "base_url": "h"}}, ["data.responses.base_url = h"]),
    "an endpoint that keeps the ranks waiting": (
        {"data.responses": {**SERVER, "item_timeout": 900.0}},
        ["data.responses.item_timeout", "run.collective_timeout_s"],
    ),
    "a request's key with another owner": (
        {"data.responses": {**SERVER, "extra": {"n": 2}}},
        ["data.responses.extra.n"],
    ),
    "an endpoint that is asked nothing": (
        {"data": {"responses": SERVER}},
        ["data.prompts: is missing", "data.prompts.path"],
    ),
    "an endpoint instead of a judge": (
        {"data.responses": SERVER, "judge": None, "esi.estimator": "score_function"},
        ["judge: is missing", "the file data.responses"],
    ),
    "missing column": ({"data.prompts.column": "promt"}, ["data.prompts.column", "promt", "prompt"]),
    "missing model": ({"model.path": "./nowhere"}, ["model.path", "nowhere"]),
    "a model's name that is too long": ({"model.path": "x" * 5000}, ["model.path = xxx", "..."]),
    "a guard's name that is too long": ({"judge.path": "x" * 5000}, ["judge.path = xxx", "..."]),
    "a home that is nobody's": ({"run.output_dir": "~nouser/x"}, ["run.output_dir = ~nouser/x", "write the path out"]),
    "missing guard": ({"judge.path": "./nowhere"}, ["judge.path", "nowhere"]),
    "no judge": ({"judge": None}, ["judge"]),
    "no judge and no scores": (
        {"judge": None, "esi.estimator": "score_function"},
        ["judge", "judge.path", "judge_score", "data.responses"],
    ),
    "unknown kind of judge": ({"judge.kind": "clasifier"}, ["judge.kind", "guard", "classifier"]),
    "classifier without template": ({"judge.kind": "classifier"}, ["judge.template", "missing"]),
    "classifier with a guard's key": ({**CLASSIFIER, "judge.context": "response_only"}, ["judge.context"]),
    "classifier without unsafe labels": (
        {**CLASSIFIER, "judge.unsafe_labels": None},
        ["judge.unsafe_labels", "harmless"],
    ),
    "unknown label": ({**CLASSIFIER, "judge.unsafe_labels": ["harmfull"]}, ["judge.unsafe_labels", "harmful"]),
    "template without response": ({**CLASSIFIER, "judge.template": "{prompt}"}, ["judge.template", "{response}"]),
    "classifier without padding": (
        {**CLASSIFIER, "judge.path": "FOLDER/padless"},
        ["judge.path", "esi.batch_size: 1", "pad_token_id"],
    ),
    "missing deepspeed file": ({"deepspeed": "nowhere.json"}, ["deepspeed", "nowhere.json"]),
    "stage 2": ({"deepspeed": {"zero_optimization": {"stage": 2}}}, ["stage", "2", "3"]),
    "no stage": ({"deepspeed": {}}, ["stage", "3"]),
    "batch contradicts": ({"deepspeed": {**ZERO3, "train_micro_batch_size_per_gpu": 3}}, ["3", "8", "esi.batch_size"]),
    "whole batch contradicts": ({"deepspeed": {**ZERO3, "train_batch_size": 99}}, ["99", "train_batch_size"]),
    "accumulation": ({"deepspeed": {**ZERO3, "gradient_accumulation_steps": 2}}, ["gradient_accumulation_steps", "2"]),
    "precision contradicts": ({"deepspeed": {**ZERO3, "bf16": {"enabled": True}}}, ["bf16", "fp32"]),
    "a key that DeepSpeed would ignore": (
        {"deepspeed": {**ZERO3, "gradient_cliping": 1.0}},
        ["deepspeed.gradient_cliping = 1.0", "gradient_clipping"],
    ),
    "a value of another kind": ({"deepspeed": {**ZERO3, "steps_per_print": "x"}}, ["deepspeed.steps_per_print = x"]),
    "a section of another kind": ({"deepspeed": {**ZERO3, "aio": 5}}, ["deepspeed.aio = 5", "mapping"]),
    "a value that DeepSpeed does not take": (
        {"deepspeed": {"zero_optimization": {"stage": 3, "reduce_bucket_size": "abc"}}},
        ["deepspeed.zero_optimization.reduce_bucket_size = abc", "integer"],
    ),
    "a key that ZeRO does not have": (
        {"deepspeed": {"zero_optimization": {"stage": 3, "reduce_bucket": 1}}},
        ["deepspeed.zero_optimization.reduce_bucket = 1", "unknown key"],
    ),
    "a nested value that DeepSpeed does not take": (
        {"deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}},
        ["deepspeed.zero_optimization.offload_param.device = gpu", "cpu"],
    ),
    "a section that DeepSpeed does not take": (
        {"deepspeed": {**ZERO3, "comms_logger": {"enabled": "maybe"}}},
        ["deepspeed.comms_logger", "maybe"],
    ),
    "a data type that DeepSpeed does not have": (
        {"deepspeed": {**ZERO3, "communication_data_type": "x"}},
        ["deepspeed.communication_data_type = x"],
    ),
    "optimizer section": ({"deepspeed": {**ZERO3, "optimizer": {"type": "AdamW"}}}, ["optimizer"]),
    "MiCS": ({"deepspeed": {"zero_optimization": {"stage": 3, "mics_shard_size": 2}}}, ["mics_shard_size"]),
    "NVMe": ({"deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}}, ["nvme"]),
}


def write(folder: Path, changes: dict) -> Path:
    placed = {key: v.replace("FOLDER", str(folder)) if isinstance(v, str) else v for key, v in changes.items()}
    return write_config(folder, base(folder), placed)


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_named(case: str, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, words = CASES[case]
    assert main("esi", ["--config", str(write(inputs, changes))]) == 2
    shown = capsys.readouterr().err
    assert shown.count("error:") == 1 and len(shown.strip().splitlines()) == 1, shown
    assert all(word in shown for word in words), shown
    assert not (inputs / "run").exists()


def test_a_dry_run_refuses_a_ratio_that_selects_nothing(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("esi", ["--config", str(write(inputs, {"select.ratio": 1e-9})), "--dry-run"]) == 2
    assert "the smallest ratio is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", "", ["empty.jsonl", "no rows"]),
        ("blank.csv", "goal,target\n,\n  ,x\n", ["blank.csv", "no prompt"]),
        ("columns.csv", "alpha,beta\n1,2\n", ["data.prompts.column", "alpha", "beta"]),
        ("broken.jsonl", '{"prompt": "a"}\n{"prompt": \n', ["broken.jsonl", "line 2"]),
        ("list.json", "[1, 2]", ["list.json"]),
        ("strange.xyz", "x", ["strange.xyz"]),
    ],
)
def test_bad_data_is_named(name: str, content: str, words: list[str], inputs: Path, capsys) -> None:
    (inputs / name).write_text(content)
    assert main("esi", ["--config", str(write(inputs, {"data.prompts.path": str(inputs / name)}))]) == 2
    shown = capsys.readouterr().err
    assert all(word in shown for word in words), shown


def test_folders_of_others_are_left_alone(inputs: Path, capsys) -> None:
    other = inputs / "other"
    other.mkdir(exist_ok=True)
    (other / "thesis.tex").write_text("years of work")
    config = write(inputs, {"run.output_dir": str(other)})
    assert main("esi", ["--config", str(config)]) == 2
    assert "run.output_dir" in capsys.readouterr().err
    (other / "config.yaml").write_text(yaml.safe_dump({**base(inputs), "select": {"ratio": 0.5}}))
    assert main("esi", ["--config", str(config)]) == 2
    assert "select.ratio" in capsys.readouterr().err
    assert main("esi", ["--config", str(write(inputs, {"run.output_dir": str(inputs / "prompts.jsonl")}))]) == 2
    assert "is a file" in capsys.readouterr().err
    assert sorted(path.name for path in other.iterdir()) == ["config.yaml", "thesis.tex"]


def test_weights_that_are_not_there(inputs: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "model").mkdir()
    for file in (inputs / "model").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    assert main("esi", ["--config", str(write(inputs, {"model.path": str(tmp_path / "model")}))]) == 2
    assert "safetensors" in capsys.readouterr().err


def test_overrides_and_flags(inputs: Path, capsys) -> None:
    config = str(write(inputs, {}))
    assert main("esi", ["--config", config, "--local_rank=0", "select.ratio"]) == 2
    assert "key.path=value" in capsys.readouterr().err
    assert main("esi", ["--config", config, "select.ratio=7"]) == 2
    assert "select.ratio" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main("esi", ["--config", config, "--no-such-flag"])
    assert left.value.code == 2


def test_as_a_command_within_ten_seconds_and_before_torch(inputs: Path) -> None:
    """Of computing: on the clock it depends on what else runs."""
    before = os.times()
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            str(ROOT / "launch/esi.py"),
            "--config",
            str(write(inputs, {})),
            "select.ratio=2",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=60,
    )
    after = os.times()
    assert done.returncode == 2 and "error: select.ratio" in done.stderr
    assert after.children_user + after.children_system - before.children_user - before.children_system < 10
    assert "| torch\n" not in done.stderr and "transformers" not in done.stderr


def test_dry_run_of_671_billion_parameters(inputs: Path, tmp_path: Path, capsys) -> None:
    """From a config file alone; k is ⌊0.01 · weights⌋ and nothing is written."""
    from transformers import DeepseekV3Config

    DeepseekV3Config().save_pretrained(tmp_path)
    config = write(
        inputs,
        {
            "model.path": str(tmp_path),
            "model.dtype": "bf16",
            "judge": None,
            "data": {"responses": str(inputs / "r.jsonl")},
        },
    )
    (inputs / "r.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 520)
    arguments = ["--config", str(config), "--dry-run", "--world-size", "64", "judge.path=x"]
    started = time.process_time()
    assert main("esi", arguments) == 0
    assert time.process_time() - started < 20
    shown = capsys.readouterr().out
    assert "671,026,404,352" in shown and "6,710,264,043" in shown, shown
    assert "2 of 8 prompts per rank" in shown  # ⌈520 / 512⌉
    assert not (inputs / "run").exists()


def test_masks_of_other_models_and_damaged_masks(tmp_path: Path, capsys) -> None:
    from esi_ds.mask import main as mask_main

    def mask(name: str, rows: int, **changes: str) -> Path:
        bits = torch.zeros(rows, 2, dtype=torch.bool)
        bits.view(-1)[[0, 2]] = True
        selection = {"ratio": "0.1", "total_numel": "20", "threshold": "0.5", "scope": "model", "seed": "0"}
        return write_mask(tmp_path / name, {"w": bits}, **{**selection, "offsets": '{"w": 0}', **changes})

    good, other = mask("good", 8), mask("other", 7)
    assert mask_main(["verify", str(good)]) == 0
    assert mask_main(["compare", str(good), str(other)]) == 2
    assert "different models" in capsys.readouterr().err
    assert mask_main(["info", str(tmp_path / "nowhere")]) == 2
    assert mask_main(["info", str(mask("format", 8, format="esi-mask/9"))]) == 2
    assert mask_main(["verify", str(mask("counts", 8, k="3"))]) == 2
    file = good / MASK_FILE
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\x01")  # one bit more than the counts say
    assert mask_main(["verify", str(good)]) == 2
    assert "3 bits set" in capsys.readouterr().out
    file.write_bytes(content[:-1])
    assert mask_main(["verify", str(good)]) == 2
    assert "damaged" in capsys.readouterr().err
    assert load_file(other / MASK_FILE)["w"].tolist() == [5, 0]
