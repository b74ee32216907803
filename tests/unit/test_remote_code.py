"""A model with code of its own: ``trust_remote_code`` reaches every function that builds it from its configuration, and
the code is of one commit. Each case has a separate folder, since transformers remembers a class once it was trusted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import build_guard, build_mask, build_model, byte_bpe_tokenizer, make_remote, sentencepiece_tokenizer
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from esi_ds.cli import main
from esi_ds.config import Config, load_config
from esi_ds.core.mask import Mask
from esi_ds.data.chat import load_tokenizer
from esi_ds.errors import UserError
from esi_ds.models import hub
from esi_ds.models.folder import ModelSource, load_model_config
from esi_ds.models.meta import meta_model, model_bytes
from esi_ds.stages.esi.prepare import prepare
from esi_ds.stages.perturb.prepare import prepare_perturb
from esi_ds.stages.plan.memory import _judge_bytes
from esi_ds.stages.tune.prepare import describe_trained
from esi_ds.zero.loading import read_module


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


COMMIT, LATER = "a" * 40, "b" * 40
TOKENIZER = """
from transformers import PreTrainedTokenizerFast

class ToyTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the hub, which cannot be reached."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_resolved", {})
    monkeypatch.setattr(hub, "_complete", set())
    monkeypatch.setattr(hub, "_kept", {})
    return tmp_path / "hub"


def build_tuned(folder: Path, repository: str = "") -> Path:
    """A model and a tokenizer with code of their own, or of ``repository``."""
    build_model("llama", folder, byte_bpe_tokenizer())
    make_remote(folder, repository)
    (folder / "tokenization_toy.py").write_text(TOKENIZER)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    auto_map = {"AutoTokenizer": [None, f"{repository}tokenization_toy.ToyTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": auto_map}))
    return folder


def publish(cache: Path, name: str, folder: Path, main: str | None = COMMIT) -> None:
    """Two commits of a folder, whose modules say which they are of. main: that of the main branch."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for commit in (COMMIT, LATER):
        shutil.copytree(folder, repository / "snapshots" / commit)
        for module in (repository / "snapshots" / commit).glob("*.py"):
            module.write_text(f"{module.read_text()}    COMMIT = {commit!r}\n")
    if main is not None:
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(main)


def loaded(source: ModelSource) -> set[str]:
    """The commits of the code with which a model is planned, loaded and read."""
    model = meta_model(load_model_config(source), source)
    parts = (model, read_module(source, "fp32", AutoModelForCausalLM), load_tokenizer(source))
    return {type(part).COMMIT for part in parts}


@pytest.mark.parametrize("main", [LATER, None])
@pytest.mark.parametrize("repository", ["", "org/toy--"])
def test_code_is_of_the_commit_of_the_model(repository: str, main: str | None, cache: Path, tmp_path: Path) -> None:
    """Also where the cache holds no branch, and where the model's own repository is named before its classes."""
    publish(cache, "org/toy", build_tuned(tmp_path / "model", repository), main)
    assert loaded(ModelSource("org/toy", COMMIT, trust_remote_code=True)) == {COMMIT}
    assert hub.commits() == {f"org/toy ({COMMIT})": COMMIT}


def test_code_of_another_repository_is_of_the_commit_that_the_run_began_with(cache: Path, tmp_path: Path) -> None:
    publish(cache, "org/base", build_tuned(tmp_path / "base"))
    tuned = build_tuned(tmp_path / "tuned", "org/base--")
    for module in tuned.glob("*.py"):
        module.unlink()
    source = ModelSource(str(tuned), trust_remote_code=True)
    assert load_model_config(source, only_local=True) and hub.commits() == {}
    load_model_config(source)
    (cache / "models--org--base/refs/main").write_text(LATER)
    assert loaded(source) == {COMMIT} and hub.commits() == {"org/base": COMMIT}
    hub._resolved.clear()  # as in a new process
    hub.keep({"org/base": COMMIT})
    assert loaded(source) == {COMMIT}


@pytest.mark.parametrize(
    ("repositories", "problem"),
    [
        (("org/base", "org/base"), r"takes code from org/base, which cannot be read \("),
        (("org/base", "org/other"), "takes code from org/base and org/other, but only code of one repository"),
        (("here/base", "here/base"), "takes code from here/base, but only code of one repository"),
    ],
)
def test_code_that_cannot_be_held_to_a_commit(
    repositories: tuple[str, str], problem: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the cache, of two repositories, or of a folder that lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("here/base").mkdir(parents=True)
    model, tokenizer = repositories
    folder = build_tuned(tmp_path / "model", f"{model}--")
    file = folder / "tokenizer_config.json"
    file.write_text(file.read_text().replace(model, tokenizer))
    remedy = f"copy that code into the model's folder, and remove {model}-- from auto_map"
    for read in (load_model_config, load_tokenizer):
        with pytest.raises(UserError, match=rf"judge\.path = .*: {problem}.*; {remedy}"):
            read(ModelSource(str(folder), trust_remote_code=True, field="judge.path"))
    assert not (tmp_path / "modules").exists()
    assert ModelSource(str(folder)).code_revision() is None  # no code may run


def test_a_folder_may_name_itself(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that lies under its name on the hub."""
    monkeypatch.chdir(tmp_path)
    build_tuned(tmp_path / "org/toy", "org/toy--")
    source = ModelSource("org/toy", trust_remote_code=True)
    assert source.code_revision() is None and meta_model(load_model_config(source), source)
