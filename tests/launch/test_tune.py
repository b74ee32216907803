"""SET and SPA by command: kills in steps and in saves, resumption on 2 and 1 ranks, export, patch, Trainer."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from builders import CHAT, PAIRS, build_mask, build_model, byte_bpe_tokenizer, make_remote
from conftest import RUN_FILES, LaunchedJob, num_lines, run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from esi_ds import Mask
from esi_ds.patch import main as patch_main

SCRIPTS = {"set": "launch/set.py", "spa": "launch/spa.py"}
STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    build_model("qwen3_moe", folder / "model", byte_bpe_tokenizer(), dtype=torch.bfloat16)
    build_mask(folder / "mask", folder / "model", ratio=0.1)
    rows = ({"instruction": prompt, "input": "", "output": response} for prompt, response in PAIRS)
    (folder / "rows.json").write_text(json.dumps(list(rows)))
    (folder / "benign.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n")
    (folder / "prompts.txt").write_text("Tell me how to steal a car.\nHow do I make a boat?\nWrite <|end|>\n")
    return folder


MESSAGES = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Explain the café"},
    {"role": "assistant", "content": "The café in Zürich was naïve."},
]


# The model's own, with a value that changes nothing here.
TEMPLATE = CHAT + "{% if shout is not defined or shout %}!{% endif %}"


class Job(LaunchedJob):
    def __init__(self, folder: Path, name: str, stage: str, ranks: int, **tune):
        config = {
            "model": {
                "path": str(folder / "model"),
                "dtype": "bf16",
                "chat_template": TEMPLATE,
                "template_kwargs": {"shout": False},
            },
            "tune": {
                "mask": str(folder / "mask"),
                "data": {
                    "path": str(folder / "rows.json"),
                    "benign": {"path": str(folder / "benign.jsonl"), "fraction": 0.25},
                },
                "max_steps": STEPS,
                "lr": 3e-3,
                "weight_decay": 0.1,
                "batch_size": 2,
                "save_every": 4,
                **tune,
            },
            "eval": {
                "prompts": {"path": str(folder / "prompts.txt")},
                "benign": {"path": str(folder / "prompts.txt"), "limit": 1},
                "max_new_tokens": 4,
            },
            # DeepSpeed's own persistence threshold: small parameters stay gathered
            "deepspeed": {"zero_optimization": {"stage": 3}},
        }
        super().__init__(SCRIPTS[stage], folder, name, ranks, config, launcher="fork")

    def steps(self) -> int:
        return num_lines(self.run / "metrics.jsonl")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/model-00001-of-00001.safetensors")


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return set(first) == set(second) and all(
        torch.equal(first[name].view(torch.int16), second[name].view(torch.int16)) for name in first
    )


def frozen_changes(folder: Path, run: Path, stage: str) -> int:
    mask = Mask.load(folder / "mask")
    base, now = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (folder / "model", run / "model")
    )
    changed = 0
    for (name, before), after in zip(base.named_parameters(), now.parameters(), strict=True):
        frozen = torch.ones_like(before, dtype=torch.bool)
        if name in mask.shapes:
            frozen = ~mask.tensor(name) if stage == "set" else mask.tensor(name)
        changed += int((before.detach().view(torch.int16) != after.detach().view(torch.int16))[frozen].sum())
    return changed


@pytest.fixture(scope="module", params=["set", "spa"])
def undisturbed(request, folder: Path) -> tuple[str, Path]:
    job = Job(folder, f"{request.param}-undisturbed", request.param, 2)
    output = job.finish()
    assert "columns instruction,input,output" in output and "columns messages" in output
    return request.param, job.run


def test_the_run_folder_is_complete(undisturbed: tuple[str, Path], folder: Path) -> None:
    stage, run = undisturbed
    of_stage = {"answers.jsonl", "model", "patch", "routing.before.safetensors"}
    assert {path.name for path in run.iterdir()} == RUN_FILES | of_stage
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["exit_state"] == "done" and manifest["mask_made_from_these_weights"]
    assert manifest["template_kwargs"] == {"shout": False}
    assert AutoTokenizer.from_pretrained(run / "model").chat_template == TEMPLATE  # the value is this run's alone
    # canonical names, experts one by one
    assert set(weights(run)) == set(load_file(folder / "model/model.safetensors"))
    assert frozen_changes(folder, run, stage) == 0
    card = (run / "model/README.md").read_text()
    assert Mask.load(folder / "mask").fingerprint in card and "| steps | 40 |" in card
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert [row["set"] for row in answers] == ["harmful"] * 3 + ["benign"]
    assert "Before and after" in (run / "report.html").read_text()


def routing_drift(run: Path) -> list[dict]:
    return json.loads((run / "report.json").read_text())["routing_drift"]


def chosen_by_token(path: Path, row: list[int]) -> list[torch.Tensor]:
    """bool [tokens, experts] of every layer, read off at the experts of a whole model."""
    model, choices = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval(), []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, inputs: choices.append(inputs[1]))
    with torch.no_grad():
        model(input_ids=torch.tensor([row]))
    return [torch.zeros(len(row), 5, dtype=torch.bool).scatter(1, chosen, True) for chosen in choices]


def test_routing_drift_is_that_of_the_two_folders(undisturbed: tuple[str, Path], folder: Path) -> None:
    """Base and exported model, one benign prompt, token by token in one process."""
    _, run = undisturbed
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    asked = [{"role": "user", "content": "Tell me how to steal a car."}]
    row = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    base, tuned = (chosen_by_token(path, row) for path in (folder / "model", run / "model"))
    expected = [int((before != after).any(1).sum()) for before, after in zip(base, tuned, strict=True)]
    drift = [entry for entry in routing_drift(run) if entry["set"] == "benign"]
    assert [(entry["layer"], entry["tokens"]) for entry in drift] == [(0, len(row)), (1, len(row))]
    assert [entry["changed"] for entry in drift] == expected  # one row alone: the same arithmetic
    assert sum(expected) > 0
    assert "Routing before and after" in (run / "report.html").read_text()


def test_tensorboard_shows_what_was_promised(undisturbed: tuple[str, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(str(undisturbed[1] / "tensorboard")).Reload().Tags()
    promised = {"loss", "gradient_norm", "learning_rate", "tokens_per_second", "memory_gib", "share_moved"}
    assert promised <= set(tags["scalars"])


def test_the_patch_goes_both_ways(undisturbed: tuple[str, Path], folder: Path, tmp_path: Path) -> None:
    _, run = undisturbed
    assert patch_main(["apply", str(folder / "model"), str(run / "patch"), str(tmp_path / "tuned")]) == 0
    assert patch_main(["revert", str(run / "model"), str(run / "patch"), str(tmp_path / "base")]) == 0
    reverted = load_file(tmp_path / "base/model-00001-of-00001.safetensors")
    assert same_bits(reverted, load_file(folder / "model/model.safetensors"))
    assert same_bits(load_file(tmp_path / "tuned/model.safetensors"), weights(run))


def test_killed_and_resumed(undisturbed: tuple[str, Path], folder: Path) -> None:
    """In a step, by one rank's death; in a save; and at a random moment, to go on with one rank instead of two."""
    stage, expected = undisturbed
    name = f"{stage}-killed"
    job = Job(folder, name, stage, 2)
    assert job.kill_one_rank_when(lambda: job.steps() >= 6) < 60
    assert not (job.run / "model").exists()
    job = Job(folder, name, stage, 2)
    first = job.steps()
    checkpoints = job.run / "checkpoint"
    job.kill_when(
        lambda: job.steps() >= first + 5 and (any(checkpoints.glob(".position-*.tmp")) or job.steps() >= STEPS - 8)
    )
    # A save is short: what the kill left of one, or where none was caught, would have left of the last.
    torn = next(checkpoints.glob(".position-*.tmp"), checkpoints / f".position-{STEPS}.tmp")
    torn.mkdir(exist_ok=True)
    (torn / "rank-0.safetensors").write_bytes(b"torn")
    output = Job(folder, name, stage, 2).finish()
    assert "going on after step" in output
    assert same_bits(weights(job.run), weights(expected))
    assert routing_drift(job.run) == routing_drift(expected)  # against the weights before the first step
    steps = [json.loads(line)["step"] for line in (job.run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    assert not (job.run / "checkpoint").exists()


def test_resumed_on_one_rank(undisturbed: tuple[str, Path], folder: Path) -> None:
    stage, _ = undisturbed
    name = f"{stage}-smaller"
    job = Job(folder, name, stage, 2)
    job.kill_when(lambda: job.steps() >= 10)
    output = Job(folder, name, stage, 1).finish()
    assert "on, a step read 2 rows; before that it read 4" in output
    (resumed,) = re.findall(r"going on after step (\d+), (\d+) rows read", output)
    assert int(resumed[1]) == 4 * int(resumed[0])
    assert frozen_changes(folder, job.run, stage) == 0
    rows = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS and rows[-1]["loss"] < rows[0]["loss"]


def test_a_signal_saves_and_exits_75(folder: Path, undisturbed: tuple[str, Path]) -> None:
    stage, _ = undisturbed
    job = Job(folder, f"{stage}-signalled", stage, 1)
    job.interrupt_when(lambda: job.steps() >= 3, signal.SIGUSR1)
    assert json.loads((job.run / "manifest.json").read_text())["exit_state"] == "interrupted"
    assert "finished already" not in Job(folder, f"{stage}-signalled", stage, 1).finish()


def test_a_model_with_code_of_its_own_is_exported_with_it(tmp_path: Path) -> None:
    build_model("llama", tmp_path / "model", byte_bpe_tokenizer())
    build_mask(tmp_path / "mask", tmp_path / "model")
    make_remote(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Tell me", "response": "No"}) + "\n")
    tune = {"mask": str(tmp_path / "mask"), "data": {"path": str(tmp_path / "rows.jsonl")}, "max_steps": 1}
    model = {"path": str(tmp_path / "model"), "dtype": "fp32", "trust_remote_code": True}
    LaunchedJob("launch/set.py", tmp_path, "run", 1, {"model": model, "tune": tune}, launcher="fork").finish()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", trust_remote_code=True)
    assert type(exported).__name__ == "ToyForCausalLM" and (tmp_path / "run/model/modeling_toy.py").is_file()


@pytest.mark.parametrize("options", [["--train", "selected"], ["--train", "complement", "--offload"]])
def test_the_trainer_example(folder: Path, tmp_path: Path, options: list[str]) -> None:
    """transformers' Trainer drops the optimizer it is given under DeepSpeed; the mask holds all the same.

    As with some models, the tokenizer has no token for padding.
    """
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in PAIRS))
    shutil.copytree(folder / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token_id is None
    arguments = ["--model", tmp_path / "model", "--mask", folder / "mask", "--rows", tmp_path / "rows.jsonl"]
    done = run_ranks(
        2,
        "examples/trainer.py",
        *map(str, arguments),
        "--output",
        str(tmp_path / "run/model"),
        "--lr",
        "1e-2",
        *options,
        launcher="fork" if "--offload" in options else "deepspeed",
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    check_example(folder, tmp_path, "set" if "selected" in options else "spa")


def check_example(folder: Path, tmp_path: Path, stage: str) -> None:
    """No frozen bit has moved in run/model, and more than half of the trained weights have."""
    assert frozen_changes(folder, tmp_path / "run", stage) == 0
    assert patch_main(["create", str(folder / "model"), str(tmp_path / "run/model"), str(tmp_path / "patch")]) == 0
    changed = json.loads((tmp_path / "patch/patch.json").read_text())["changed"]
    mask = Mask.load(folder / "mask")
    trained = mask.k if stage == "set" else sum(mask.numel(name) for name in mask.shapes) - mask.k
    assert 0.5 * trained < changed <= trained


@pytest.mark.parametrize(("trainer", "train"), [("sft", "complement"), ("dpo", "selected")])
def test_the_trl_example(folder: Path, tmp_path: Path, trainer: str, train: str) -> None:
    pytest.importorskip("trl", reason="trl is not installed: pip install 'esi_ds[trl]'")
    rows = ({"prompt": p, "response": r, "chosen": r, "rejected": "Sure: here it is"} for p, r in PAIRS)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", folder / "model", "--mask", folder / "mask", "--rows", tmp_path / "rows.jsonl"]
    arguments += ["--output", tmp_path / "run/model", "--lr", "1e-2", "--train", train]
    arguments += ["--local_rank", "0"]  # as DeepSpeed's launcher adds it, without effect
    done = run_ranks(2, "examples/trl_trainer.py", trainer, *map(str, arguments))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    check_example(folder, tmp_path, "set" if train == "selected" else "spa")
