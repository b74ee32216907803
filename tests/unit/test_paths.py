"""A path that leads nowhere is refused at once and under its key: models, judges and data alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from conftest import ROOT
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from esi_ds import ask
from esi_ds.config import validate
from esi_ds.data.chat import load_tokenizer
from esi_ds.errors import UserError
from esi_ds.models import hub
from esi_ds.models.folder import ModelSource, checkpoint_folder, load_model_config
from esi_ds.models.hub import is_hub_id
from esi_ds.stages.esi.prepare import _read_data
from esi_ds.stages.paths import check_paths

EXAMPLES = ROOT / "examples"
MODEL, GUARD, ROWS = (
    str(EXAMPLES / part) for part in ("models/llama-aligned", "models/guard", "data/benign_heldout.jsonl")
)


def whole() -> dict:
    """A config that holds everything, of which each stage reads its part."""
    return {
        "run": {"output_dir": "x"},
        "model": {"path": MODEL},
        "judge": {"path": GUARD},
        "data": {"prompts": {"path": "examples/harmful"}, "tuning": {"path": ROWS}, "benign": {"path": ROWS}},
        "tune": {"mask": "m", "data": {"path": ROWS, "benign": {"path": ROWS, "fraction": 0.5}}},
        "eval": {
            "models": [{"path": MODEL, "name": "a"}, {"answers": "answers.jsonl", "name": "b"}],
            "judges": [{"kind": "words"}, {"kind": "guard", "path": GUARD}],
            "prompts": [{"path": "examples/harmful"}, {"path": ROWS}],
            "benign": {"path": ROWS},
        },
    }


def changed(key: str, path: str):
    config = whole()
    section, parts = config, key.split(".")
    for part in parts[:-1]:
        section = section[int(part) if part.isdecimal() else part]
    section[parts[-1]] = path
    return validate(config)


MODELS = {
    "model.path": ("esi", "set", "spa", "eval", "perturb"),
    "judge.path": ("esi",),
    "eval.models.0.path": ("eval",),
    "eval.judges.1.path": ("eval", "perturb"),
}
DATA = {
    "data.prompts.path": ("esi",),
    "data.tuning.path": ("esi",),
    "data.benign.path": ("esi",),
    "tune.data.path": ("set", "spa"),
    "tune.data.benign.path": ("set", "spa"),
    "eval.prompts.1.path": ("set", "spa", "eval", "perturb"),
    "eval.benign.path": ("set", "spa", "eval", "perturb"),
}


class Hub:
    """Instead of the hub: it holds every id unless it has an error to raise, and counts requests."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.asked: list[tuple[str, str]] = []

    def repo_info(self, name: str, *, repo_type: str, timeout: float) -> None:
        assert 0 < timeout <= 10
        self.asked.append((repo_type, name))
        if self.error is not None:
            raise self.error

    def snapshot_download(self, name: str, **options: object) -> str:
        assert self.error is not None
        raise FileNotFoundError("An error happened while trying to locate the files on the Hub") from self.error


@pytest.fixture(autouse=True)
def fabricated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fabricated = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: fabricated)
    monkeypatch.setattr(hub, "snapshot_download", fabricated.snapshot_download)
    monkeypatch.setattr(hub, "_resolved", {})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return fabricated


def answer(kind: type[Exception], status: int) -> Exception:
    """An error of the hub as its library raises it."""
    return kind("the hub's words", response=httpx2.Response(status, request=httpx2.Request("GET", "https://hub")))


ABSENT = {
    "the hub cannot be reached (no such name)": httpx2.ConnectError("no such name"),
    "the hub cannot be reached (late)": httpx2.ConnectTimeout("late"),
    "the hub cannot be reached (proxy)": httpx2.ProxyError("proxy"),
    "the hub has no such id (or it is private": answer(RepositoryNotFoundError, 401),
    "the hub's cache does not hold all of it (HF_HUB_OFFLINE is set": OfflineModeIsEnabled("offline"),
}


@pytest.mark.parametrize("reason", ABSENT)
@pytest.mark.parametrize("key", [*MODELS, *DATA])
def test_what_may_be_a_folder_or_a_hub_id_is_told_as_both(key: str, reason: str, fabricated: Hub) -> None:
    """``judges/guard``: it came as the hub's error alone, and for data after half a minute of tries."""
    fabricated.error = ABSENT[reason]
    local = "folder" if key in MODELS else "file"
    with pytest.raises(UserError) as caught:
        check_paths(changed(key, "judges/guard"), {**MODELS, **DATA}[key][0])
    assert str(caught.value).startswith(f"{key} = judges/guard: there is no such {local} here, and {reason}")
    assert f"give the path of a {local} that exists, or the id of a" in caught.value.remedy
    assert fabricated.asked == [("model" if key in MODELS else "dataset", "judges/guard")]


@pytest.mark.parametrize("key", ["data.prompts.path", "eval.prompts.1.path", "eval.benign.path"])
def test_a_built_in_set_is_asked_for_by_its_hub_id(key: str, fabricated: Hub, tmp_path: Path) -> None:
    """``datasets`` would try for half a minute on a node without a network."""
    fabricated.error = ABSENT["the hub cannot be reached (no such name)"]
    with pytest.raises(UserError, match=rf"{key} = walledai/AdvBench: there is no such file here, and the hub cannot"):
        check_paths(changed(key, "advbench"), DATA[key][0])
    assert fabricated.asked == [("dataset", "walledai/AdvBench")]
    (tmp_path / "hub/datasets--walledai--AdvBench/snapshots").mkdir(parents=True)
    check_paths(changed(key, "advbench"), DATA[key][0])
    assert len(fabricated.asked) == 1


@pytest.mark.parametrize("path", ["advbench", "org/set"])
def test_prompts_that_a_file_answers_may_be_out_of_reach(path: str, fabricated: Hub, tmp_path: Path) -> None:
    """The file's own are scored instead, after one request; what is no hub id is a slip."""
    fabricated.error = ABSENT["the hub cannot be reached (no such name)"]
    file = tmp_path / "responses.jsonl"
    file.write_text(json.dumps({"prompt": "Why?", "response": "w"}))
    config = validate({**whole(), "data": {"prompts": {"path": path}, "responses": str(file)}})
    check_paths(config, "esi")
    read = _read_data(config)
    assert read.prompts == ["Why?"] and "the hub cannot be reached" in read.remarks[0] and len(fabricated.asked) == 1
    slip = validate({**whole(), "data": {"prompts": {"path": "runs/old/prompts"}, "responses": str(file)}})
    with pytest.raises(UserError, match="there is no such file"):
        check_paths(slip, "esi")


@pytest.mark.parametrize("error", [answer(GatedRepoError, 403), httpx2.ReadTimeout("busy"), ValueError("odd")])
def test_other_answers_of_the_hub_are_left_to_the_download(error: Exception, fabricated: Hub) -> None:
    fabricated.error = error
    for key, (stage, *_) in {**MODELS, **DATA}.items():
        check_paths(changed(key, "judges/guard"), stage)


def test_what_a_cache_holds_costs_no_request(fabricated: Hub, tmp_path: Path) -> None:
    fabricated.error = ABSENT["the hub cannot be reached (late)"]
    (tmp_path / "hub/models--org--kept/snapshots").mkdir(parents=True)
    (tmp_path / "hub/datasets--org--kept/snapshots").mkdir(parents=True)
    (tmp_path / "datasets/org___prepared").mkdir(parents=True)
    (tmp_path / "datasets/Org-AI___my_llm_set2").mkdir(parents=True)
    (tmp_path / "hub/models--org--failed/refs").mkdir(parents=True)
    for key, (stage, *_) in {**MODELS, **DATA}.items():
        check_paths(changed(key, "org/kept"), stage)
        check_paths(changed(key, ROWS if key in DATA else MODEL), stage)
    for path in ("org/prepared", "Org-AI/MyLLMSet2"):
        check_paths(changed("data.prompts.path", path), "esi")
    assert not fabricated.asked
    for key, path in (("model.path", "org/prepared"), ("model.path", "org/failed"), ("judge.path", "org/failed")):
        with pytest.raises(UserError, match="there is no such folder here"):
            check_paths(changed(key, path), "esi")


@pytest.mark.parametrize(
    "name", ["a/FalseReject", "A-B/BeaverTails-Eval", "x/XSTest", "a/my_Set.v2GB", "squad", "GLUE2Go"]
)
def test_a_prepared_data_set_is_called_as_datasets_calls_it(name: str) -> None:
    *namespace, last = name.split("/")
    assert hub.prepared_name(name) == "___".join([*namespace, camelcase_to_snakecase(last)])


def test_readers_of_a_folder_say_the_same(fabricated: Hub, tmp_path: Path) -> None:
    """Tools that check no config: patches, the library. The rest of what a download may raise keeps its words."""
    source = ModelSource("runs/model", field="base")
    for read in (load_model_config, load_tokenizer, checkpoint_folder, ModelSource.folder):
        fabricated.error = ABSENT["the hub cannot be reached (no such name)"]
        with pytest.raises(UserError, match=r"base = runs/model: there is no such folder here, and the hub cannot be"):
            read(source)
        fabricated.error = answer(GatedRepoError, 403)
        with pytest.raises((UserError, FileNotFoundError), match="An error happened while trying to locate"):
            read(source)


@pytest.mark.parametrize("source", ["data/prompts", "advbench"])
def test_prompts_to_ask_are_checked_first(
    fabricated: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    fabricated.error = ABSENT["the hub cannot be reached (no such name)"]
    words = ["--base-url", "http://localhost:1/v1", "--model", "m", "--output", str(tmp_path / "a.jsonl")]
    assert ask.main([*words, "--prompts", source]) == 2
    asked = {"advbench": "walledai/AdvBench"}.get(source, source)
    assert f"--prompts = {asked}: there is no such file here, and the hub cannot be" in capsys.readouterr().err


@pytest.mark.parametrize("key", [*MODELS, *DATA])
def test_a_path_that_leads_nowhere_is_refused_by_the_stages_that_read_it(key: str) -> None:
    readers = {**MODELS, **DATA}[key]
    problem = "there is no such folder, and it is not a hub id" if key in MODELS else "there is no such file"
    for stage in ("esi", "set", "spa", "eval", "perturb"):
        check_paths(changed(key, "some-one/on-the-hub"), stage)
        for path in ("runs/old/judge", "./judge", "/nowhere/judge", "~/nowhere/judge"):
            config = changed(key, path)
            if stage not in readers:
                check_paths(config, stage)
                continue
            with pytest.raises(UserError) as caught:
                check_paths(config, stage)
            assert str(caught.value).startswith(f"{key} = {path}: {problem};")


def test_what_is_not_read_need_not_be_there() -> None:
    config = whole()
    config["data"]["prompts"]["path"] = config["judge"]["path"] = "no/such/thing"
    config["tune"]["data"]["benign"] = {"path": "no/such/rows.jsonl", "fraction": 0.0}
    check_paths(validate({**config, "select": {"criterion": "magnitude"}}), "esi")
    check_paths(validate(config), "spa")


def test_names_of_the_hub() -> None:
    assert all(map(is_hub_id, ("gpt2", "meta-llama/Llama-3.1-8B", "a/b.c")))
    assert not any(map(is_hub_id, ("a/b/c", "./a", "/a", "~/a", "a b", "")))


def test_the_command_says_it_before_torch_is_imported(tmp_path: Path) -> None:
    """It came after half a minute, as the hub's library says it: Repo id must be in the form ..."""
    config = whole()
    config["judge"]["path"], config["run"]["output_dir"] = "runs/nobody/judge", str(tmp_path / "run")
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config))
    code = (
        "import sys; from esi_ds.cli import main; code = main('esi', sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "--config", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr.startswith("error: judge.path = runs/nobody/judge: there is no such folder, and it is not")
    # What has the form of a hub id too; here the hub's library is told not to ask.
    config["judge"]["path"] = "judges/guard"
    file.write_text(json.dumps(config))
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, env=offline)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr.startswith("error: judge.path = judges/guard: there is no such folder here, and the hub's cache")
    assert len(done.stderr.splitlines()) == 1
