"""A model with code in its folder: ``trust_remote_code`` reaches every function that builds it from its
configuration. Each case has a separate folder, since transformers remembers a class once it was trusted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import build_guard, build_mask, build_model, byte_bpe_tokenizer, make_remote, sentencepiece_tokenizer
from transformers import AutoModelForCausalLM

from esi_ds.cli import main
from esi_ds.config import Config, load_config
from esi_ds.core.mask import Mask
from esi_ds.models.folder import ModelSource, load_model_config
from esi_ds.models.meta import model_bytes
from esi_ds.stages.esi.prepare import prepare
from esi_ds.stages.perturb.prepare import prepare_perturb
from esi_ds.stages.plan.memory import _judge_bytes
from esi_ds.stages.tune.prepare import describe_trained


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    build_model("llama", tmp_path / "model", byte_bpe_tokenizer())
    build_mask(tmp_path / "mask", tmp_path / "model")
    build_guard(tmp_path / "guard", sentencepiece_tokenizer())
    for name in ("model", "guard"):
        make_remote(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Tell me", "response": "No"}\n')
    rows = {"path": str(tmp_path / "rows.jsonl")}
    sections = {
        "run": {"output_dir": str(tmp_path / "run")},
        "model": {"path": str(tmp_path / "model"), "dtype": "fp32", "trust_remote_code": True},
        "judge": {"path": str(tmp_path / "guard"), "trust_remote_code": True},
        "data": {"prompts": rows},
        "tune": {"mask": str(tmp_path / "mask"), "data": rows, "max_steps": 1},
        "perturb": {"mask": str(tmp_path / "mask"), "orders": ["top"]},
        "eval": {"prompts": rows, "judges": [{"kind": "words"}]},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(sections))
    return tmp_path


def the_models_configuration(config: Config):
    return load_model_config(ModelSource.of(config.model))


def _with_roles(config: Config):
    return config.model.model_copy(update={"roles": {"*.q_proj.weight": "attention.q"}})


# What builds the model, or the judge, on the meta device first in its process.
CALLERS: dict[str, Callable[[Config], object]] = {
    "roles": lambda config: prepare(config.model_copy(update={"model": _with_roles(config)})),
    "mask": lambda config: describe_trained(
        config.model, config.tune, "set", Mask.load(config.tune.mask), the_models_configuration(config)
    ),
    "perturb": prepare_perturb,
    "judge in a plan": lambda config: _judge_bytes(config, 1),
    "placement": lambda config: model_bytes(
        the_models_configuration(config), ModelSource.of(config.model), "fp32", AutoModelForCausalLM
    ),
}


@pytest.mark.parametrize("caller", CALLERS)
def test_a_callers_trust_is_passed_on(caller: str, folder: Path) -> None:
    assert CALLERS[caller](load_config(str(folder / "config.yaml"), []))


@pytest.mark.parametrize("stage", ["esi", "set", "spa", "perturb", "eval"])
def test_dry_runs(stage: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(stage, ["--config", str(folder / "config.yaml"), "--dry-run"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    notes = [line for line in shown.out.splitlines() if line.startswith("NOTE")]
    assert all("read by launch/eval.py, not by" in line for line in notes), notes  # one config serves all stages


@pytest.mark.parametrize("section", ["model", "judge"])
def test_without_trust_it_is_refused(section: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main("esi", ["--config", str(folder / "config.yaml"), "--dry-run", f"{section}.trust_remote_code=false"])
    shown = capsys.readouterr().err
    assert code == 2 and f"{section}.path" in shown and "needs code that comes with it" in shown
    assert f"set {section}.trust_remote_code: true" in shown


def test_models_of_an_evaluation_run_code_where_the_model_may() -> None:
    assert ModelSource("a", field="eval.models.1.path").trust_key == "model.trust_remote_code"
    assert ModelSource("a", field="eval.judges.0.path").trust_key == "eval.judges.0.trust_remote_code"
