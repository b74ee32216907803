"""``tune.mask: none``: SPA that freezes no scored weight, and SET that is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import build_model, byte_bpe_tokenizer
from conftest import ROOT
from mask_folders import write_mask
from transformers import AutoModelForCausalLM

from esi_ds.cli import main
from esi_ds.config import Config, validate
from esi_ds.config.needs import require_tune
from esi_ds.core.mask import EmptyMask, Mask, digest, pack_bits
from esi_ds.core.trained import Trained
from esi_ds.data.chat import load_tokenizer
from esi_ds.data.conversations import TuningSet
from esi_ds.errors import UserError
from esi_ds.models.fingerprint import check_mask_weights
from esi_ds.models.folder import ModelSource, load_model_config, rounded_from
from esi_ds.models.meta import meta_parameters
from esi_ds.models.roles import describe
from esi_ds.report.asked import asked_as
from esi_ds.report.card import model_card
from esi_ds.report.html import render
from esi_ds.stages.evaluate.prepare import prepare_eval
from esi_ds.stages.tune.prepare import describe_trained, open_mask, prepare_tuning
from esi_ds.stages.tune.work import TuneRun

sys.path.append(str(ROOT / "tests/sweep"))
import tiny  # noqa: E402

MODEL = str(ROOT / "examples/models/llama-aligned")


def config(**tune):
    settings = {"mask": "none", "data": {"path": str(ROOT / "examples/data/benign_train.jsonl")}, **tune}
    return validate({"run": {"output_dir": "x"}, "model": {"path": MODEL, "dtype": "fp32"}, "tune": settings})


ROWS = TuningSet((), "", (), 0, 90, "0")


def card_of(section: Config, stage: str, **changes: Any) -> str:
    """The card of a run that trained what SPA trains without a mask, but for ``changes``."""
    about = {
        "fingerprint": "f",
        "ranks": 1,
        "rows": ROWS,
        "benign": None,
        "num_benign": 0,
        "dequantised_from": None,
        "rounded_from": None,
        "remarks": {},
    }
    tune = require_tune(section)
    if "trained" not in changes:
        model_config = load_model_config(ModelSource.of(section.model))
        mask = open_mask(section.model, tune, "spa", model_config)
        about["trained"] = describe_trained(section.model, tune, "spa", mask, model_config)
    return model_card(section, tune, stage=stage, **{**about, **changes})


@pytest.mark.parametrize("unscored", ["freeze", "train"])
def test_every_scored_weight_trains(unscored: str) -> None:
    section = config(unscored=unscored)
    tune, model_config = require_tune(section), load_model_config(ModelSource.of(section.model))
    mask = open_mask(section.model, tune, "spa", model_config)
    parameters = meta_parameters(model_config, ModelSource.of(section.model), dtype="fp32")
    trained = describe_trained(section.model, tune, "spa", mask, model_config)
    assert isinstance(mask, EmptyMask) and mask.k == 0 and mask.problems() == []
    assert trained.total == sum(p.numel for p in parameters if p.scored or unscored == "train") > 10**6
    scored = next(p for p in parameters if p.scored)
    assert not mask.bits(scored.name).any() and trained.bits(scored.name, 3, 70).all()
    assert torch.equal(mask.data(scored.name, 1, 3), torch.zeros(2, dtype=torch.uint8))
    assert check_mask_weights(mask, "any weights", False, "tune.mask")  # it is every model's


@pytest.mark.parametrize(("names_towers", "unscored"), [(False, "train"), (True, "freeze")])
def test_spas_optimizer_trains_what_the_report_says(names_towers: bool, unscored: str, tmp_path: Path) -> None:
    """Also of a model with encoders of images: rows of text give them no gradient, and weight decay would shrink them.
    The masks of other tools may name them."""
    tiny.tiny_config("gemma3", 300).save_pretrained(tmp_path)
    model_config = load_model_config(ModelSource(str(tmp_path)))
    module = AutoModelForCausalLM.from_config(model_config)
    parameters = describe(module)
    towers = {parameter.name for parameter in parameters if parameter.role == "tower"}
    mask: Mask = EmptyMask(parameters)
    if names_towers:
        bits = {p.name: torch.zeros(p.shape, dtype=torch.bool) for p in parameters if p.scored or p.name in towers}
        mask = Mask.load(write_mask(tmp_path, bits, total_numel=str(sum(p.numel for p in parameters))))
    given = config(unscored=unscored, weight_decay=0.01).model_dump()
    section = validate({**given, "model": {"path": str(tmp_path), "dtype": "fp32"}})
    run: Any = TuneRun.__new__(TuneRun)
    trained = describe_trained(section.model, require_tune(section), "spa", mask, model_config)
    run.config, run.load_model = section, lambda make_optimizer: make_optimizer(module)
    run.inputs = SimpleNamespace(stage="spa", tune=require_tune(section), trained=trained, mask=mask)
    optimizer, make_tuner = run._load()
    requiring = {name for name, tensor in module.named_parameters() if tensor.requires_grad}
    trains = {parameter.name for parameter in parameters if parameter.scored or unscored == "train"}
    assert towers and requiring == optimizer.parameters.keys() == trains - towers
    assert make_tuner.args == (optimizer, optimizer) and optimizer.trained is trained  # the first stands for the model
    assert optimizer.param_groups[0]["weight_decay"] == 0.01 and optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("trains", [{"router": "train"}, {"unscored": "train"}])
def test_no_decay_reaches_a_correction_bias(trains: dict[str, str], tmp_path: Path) -> None:
    """AFMoE's is a parameter that only orders experts: shrunk, it would choose others. In the stages: another training
    loop may balance the experts with it."""
    tiny.tiny_config("afmoe", 300).save_pretrained(tmp_path)
    section = validate({**config(**trains).model_dump(), "model": {"path": str(tmp_path), "dtype": "fp32"}})
    model_config = load_model_config(ModelSource(str(tmp_path)))
    mask = open_mask(section.model, require_tune(section), "spa", model_config)
    trained = describe_trained(section.model, require_tune(section), "spa", mask, model_config)
    bias, gate = "model.layers.1.mlp.expert_bias", "model.layers.1.mlp.router.gate.weight"
    assert trained.count(bias) == 0 and not trained.bits(bias, 0, 5).any() and trained.count(gate) == 5 * 32
    others = Trained(mask, "complement", trained.unscored, mask.shapes, trained.routers, trained.router)
    assert trained.digest != others.digest  # the state of one is not the other's


def test_what_is_asked_before_and_after_is_among_a_runs_inputs(tmp_path: Path) -> None:
    """Answers before tuning stay, and would be compared with those to other prompts."""
    asked = {}
    for name in ("one", "other"):
        (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": f"How does {name} do it?"}) + "\n")
        evaluated = {"eval": {"prompts": {"path": str(tmp_path / "asked.jsonl")}}}
        asked[name] = prepare_tuning(validate({**config().model_dump(), **evaluated}), "spa").source
    assert asked["one"].keys() == asked["other"].keys()
    assert [key for key in asked["one"] if asked["one"][key] != asked["other"][key]] == ["harmful:asked"]


def test_rows_and_questions_begin_with_the_system_prompt(tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": "How?"}) + "\n")
    texts = []
    for system in ({}, {"system_prompt": "Be brief."}):
        given = {**config().model_dump(), "eval": {"prompts": {"path": str(tmp_path / "asked.jsonl")}}}
        inputs = prepare_tuning(validate({**given, "model": {"path": MODEL, "dtype": "fp32"} | system}), "spa")
        ids = [inputs.question_ids["harmful"][0], *(row.ids for row in inputs.rows.sequences)]
        texts.append(inputs.tokenizer.batch_decode(ids))
    start, system = "<|bos|>", "<|system|>\nBe brief.<|eos|>\n"
    assert len(texts[0]) > 2 and texts[1] == [start + system + text.removeprefix(start) for text in texts[0]]


def test_special_tokens_in_what_is_asked_are_counted(tmp_path: Path) -> None:
    """Before and after tuning, and in an evaluation."""
    special = load_tokenizer(ModelSource(MODEL)).eos_token
    prompts = [f"How? {special}", f"{special}{special} Why?", "Where?"]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    asked = validate({**config().model_dump(), "eval": {"prompts": {"path": str(tmp_path / "asked.jsonl")}}})
    expected = f"{special} in 2 prompts"
    assert prepare_tuning(asked, "spa").broken_up == prepare_eval(asked).candidates[0].broken_up == expected


@pytest.mark.parametrize(
    ("stored", "dtype", "lost"),
    [("bf16", "bf16", None), ("fp32", "bf16", "F32"), ("fp16", "bf16", "F16"), ("bf16", "fp32", None)],
)
def test_what_is_rounded_is_not_called_the_bases_bits(
    stored: str, dtype: str, lost: str | None, tmp_path: Path
) -> None:
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    folder = build_model("llama", tmp_path / "model", byte_bpe_tokenizer(), dtype=kinds[stored])
    section = validate({**config().model_dump(), "model": {"path": str(folder), "dtype": dtype}})
    assert rounded_from(section.model) == lost
    card = card_of(section, "set", rounded_from=lost)
    assert ("the base model’s, rounded to bf16." in card) == (lost is not None) == ("bit for bit" not in card)


def test_a_card_says_how_the_model_was_asked() -> None:
    """What is as by default is left out. A page has no copy of the template, and gives its digest."""
    asked = {
        **{"system_prompt": "You are a pirate.", "template_kwargs": {"enable_thinking": False, "effort": "high"}},
        **{"chat_template": "t.jinja", "date": "2026-11-30", "thought_marks": ["<r>", "</r>"]},
    }
    model = {**config().model.model_dump(), **asked}
    section = validate({**config().model_dump(), "model": model})
    card = card_of(section, "spa")
    for line in (
        "| system prompt | You are a pirate. |",
        '| values for chat templates | enable_thinking: false, effort: "high" |',
        "| chat template | t.jinja |",
        "| date for chat templates | 2026-11-30 |",
        "| marks of thoughts | \\<r\\> … \\</r\\> |",
    ):
        assert line in card, card
    facts = asked_as(section.model, "0a")
    assert facts["chat template"] == "t.jinja, sha256 0a" and len(facts) == 5
    for template in ("{{ messages }}", None):
        other = section.model.model_copy(update={"chat_template": template, "system_prompt": ""})
        assert asked_as(other, "0a").get("chat template") == (template and "a text in the config, sha256 0a")
        assert asked_as(other)["system prompt"] == "a turn without text"
    assert asked_as(config().model) == {}


def test_a_card_says_how_many_benign_rows_were_read() -> None:
    section = config()
    data = {**section.tune.data.model_dump(), "benign": {"path": "b", "fraction": 0.05}}
    card = card_of(config(data=data), "spa", benign=ROWS, num_benign=12)
    assert "| benign rows | b, 12 rows read, 0.05 of all, sha256 0 |" in card


def test_a_card_names_the_mask_and_all_rows_of_a_step(tmp_path: Path) -> None:
    section = validate(
        {
            "run": {"output_dir": "x"},
            "model": {"path": str(tmp_path)},
            "tune": {"mask": "m", "data": {"path": "rows"}, "batch_size": 4, "gradient_accumulation": 1},
        }
    )
    masks = []
    for number in (0, 1):
        folder = write_mask(tmp_path / str(number), {"a": torch.arange(8) == number})
        (folder / "digests.json").write_text(json.dumps({"a": digest(pack_bits(torch.arange(8) == number))}))
        masks.append(Mask.load(folder))
    one, other = (
        card_of(section, "set", trained=Trained(mask, "selected", "freeze", {"a": (8,)}), ranks=2) for mask in masks
    )
    assert "| batch | 4 rows a rank, 1 micro-batch a step, on 2 ranks: 8 rows a step |" in one
    assert f"| mask bits | sha256 {masks[0].bits_sha256} |\n| mask made from | {masks[0].fingerprint} |" in one
    assert masks[0].fingerprint == masks[1].fingerprint and masks[0].bits_sha256 not in other
    assert "base_model" not in one  # the hub takes ids only


def test_a_card_does_not_say_that_a_mask_was_frozen() -> None:
    card = card_of(config(), "spa")
    assert "No weight that has a score was frozen: a baseline of SPA. All weights that have no score, such as" in card
    assert "mask’s weights were frozen" not in card
    card = card_of(config(unscored="train"), "set")
    assert "The mask’s weights were trained, and so were all weights that have no score, such as embeddings" in card


@pytest.mark.parametrize("criterion", ["none", "esi"])
def test_nor_does_the_page(criterion: str) -> None:
    report = {
        "kind": "tuning",
        "method": "spa",
        "title": "SPA",
        "trained": 5,
        "total_numel": 10,
        "steps": 1,
        "changed": None,
        "changed_tensors": {},
        "refusals": [],
        "samples": [],
        "routing_drift": [],
        "facts": {"mask criterion": criterion},
        "progress": [],
    }
    page = render(report)
    assert ("No weight that has a score was frozen" in page) == (criterion == "none")
    assert ("mask’s weights were frozen" in page) == (criterion == "esi")


def test_set_without_a_mask_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    section = config()
    with pytest.raises(UserError, match=r"tune.mask = none: selects nothing, and SET trains what a mask selects"):
        open_mask(section.model, require_tune(section), "set", None)  # type: ignore[arg-type]
    overrides = [f"model.path={MODEL}", "model.dtype=fp32", "tune.mask=none", f"run.output_dir={tmp_path / 'run'}"]
    assert main("set", ["--config", str(ROOT / "configs/demo/set.yaml"), *overrides]) == 2
    assert "tune.mask = none: selects nothing" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_baseline_is_planned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main("spa", ["--config", "demo/spa", "--dry-run", "tune.mask=none"]) == 0
    output = capsys.readouterr().out
    assert "0 weights by none" in output and "NOTE" not in output
