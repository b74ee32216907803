"""Patches in one process: both directions to the bit, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import build_model, byte_bpe_tokenizer, model_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from esi_ds import patch
from esi_ds.errors import UserError
from esi_ds.models.fingerprint import tensor_digests
from esi_ds.models.folder import ModelSource
from esi_ds.patch import check_names, main, summary


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base in bf16, and a tuned model with a few other weights: among them a zero whose sign turned, and a NaN."""
    build_model("qwen3_moe", tmp_path / "base", byte_bpe_tokenizer(), dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.view(-1)[:3] = torch.tensor([1.5, torch.nan, -0.0]).bfloat16()
        model.model.layers[1].mlp.experts.down_proj.view(-1)[7] += 1
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_both_ways(folder: Path, capsys) -> None:
    assert run("create", folder / "base", folder / "tuned", folder / "patch") == 0
    assert run("apply", folder / "base", folder / "patch", folder / "again") == 0
    assert run("revert", folder / "tuned", folder / "patch", folder / "back") == 0
    assert tensor_digests(folder / "again") == tensor_digests(folder / "tuned")
    assert tensor_digests(folder / "back") == tensor_digests(folder / "base")
    assert (folder / "back/model.safetensors").read_bytes() == (folder / "base/model.safetensors").read_bytes()
    assert summary(folder / "patch")["changed"] == 4
    assert "q_proj" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(folder / "again", dtype=torch.bfloat16) is not None


def test_a_finer_base_can_be_patched_but_not_brought_back(folder: Path, capsys) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter *= 1.0001
    base.save_pretrained(folder / "fine")
    assert run("create", folder / "fine", folder / "tuned", folder / "patch") == 0
    assert run("apply", folder / "fine", folder / "patch", folder / "again") == 0
    assert tensor_digests(folder / "again") == tensor_digests(folder / "tuned")
    assert run("revert", folder / "tuned", folder / "patch", folder / "back") == 2
    assert "keep the base model" in capsys.readouterr().err and not (folder / "back").exists()


def test_a_coarser_base_comes_back(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder / "tuned", dtype=torch.float32).save_pretrained(folder / "fine")
    assert run("create", folder / "base", folder / "fine", folder / "patch") == 0
    assert run("revert", folder / "fine", folder / "patch", folder / "back") == 0
    assert tensor_digests(folder / "back") == tensor_digests(folder / "base")


@pytest.mark.parametrize("what", ["other model", "damaged", "no patch", "other format", "exists", "no model"])
def test_refusals_leave_nothing_behind(folder: Path, capsys, what: str) -> None:
    assert run("create", folder / "base", folder / "tuned", folder / "patch") == 0
    source = folder / "base"
    if what == "other model":
        source = build_model("qwen3_moe", folder / "other", byte_bpe_tokenizer(), seed=3, dtype=torch.bfloat16)
    elif what == "damaged":
        file = folder / "patch/model.safetensors"
        tensors = load_file(file)
        name = next(key for key in tensors if key.endswith(".new"))
        tensors[name] = tensors[name] * 2
        save_file(tensors, file)
    elif what == "no patch":
        (folder / "patch/patch.json").unlink()
    elif what == "other format":
        (folder / "patch/patch.json").write_text(json.dumps({"format": "esi-patch/9"}))
    elif what == "exists":
        (folder / "out").mkdir()
    elif what == "no model":
        source = folder / "nowhere"
    capsys.readouterr()
    assert run("apply", source, folder / "patch", folder / "out") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert what == "exists" or not (folder / "out").exists()
    assert not any(path.name.startswith(".out") for path in folder.iterdir())


def test_models_of_other_shapes_have_no_patch(folder: Path) -> None:
    build_model("llama", folder / "llama", byte_bpe_tokenizer())
    assert run("create", folder / "base", folder / "llama", folder / "patch") == 2
    assert not (folder / "patch").exists()


OWN = ["model.embed_tokens.weight", "model.layers.0.feed_forward.experts.gate_up_proj", "lm_head.weight"]


def check(folder: Path, stored: list[str], index: bool = False) -> None:
    """``check_names`` of a model with OWN parameters and a folder that stores these."""
    folder.mkdir(exist_ok=True)
    if index:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(stored, "f.safetensors")})
        )
    save_file({name: torch.zeros(1) for name in stored}, folder / ("f.safetensors" if index else "model.safetensors"))
    check_names(ModelSource(str(folder)), model_config("llama4", 50), OWN)


@pytest.mark.parametrize("index", [False, True])
def test_names_that_differ_by_a_prefix_are_refused_before_training(tmp_path: Path, index: bool) -> None:
    """As the hub's Llama-4, of which the text model is loaded, and a model that was saved without its head."""
    for prefixed in ([f"language_model.{name}" for name in OWN], [name.removeprefix("model.") for name in OWN]):
        with pytest.raises(UserError, match=rf"^tune.patch = True: .* calls {prefixed[0]}; set tune.patch: false"):
            check(tmp_path / "base", [*prefixed, "vision_model.a"], index=index)


def test_names_that_the_export_gives_back_are_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own, experts one by one, a prefix that is put back; and a folder that holds nothing yet."""
    check(tmp_path / "same", OWN)
    experts = [f"model.layers.0.feed_forward.experts.{i}.{part}.weight" for i in (0, 1) for part in ("gate", "up")]
    check(tmp_path / "experts", [OWN[0], OWN[2], *experts])
    check_names(ModelSource(str(tmp_path)), model_config("llama4", 50), OWN)
    monkeypatch.setattr(patch, "_exported_name", lambda name, *_: f"thinker.{name}")
    check(tmp_path / "put back", [f"thinker.{name}" for name in OWN])
