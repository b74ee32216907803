"""A path that leads nowhere is refused at once and under its key: models, judges and data alike."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from esi_ds.config import validate
from esi_ds.errors import UserError
from esi_ds.stages.paths import check_paths, is_hub_id

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
        "data": {"prompts": {"path": "advbench"}, "tuning": {"path": ROWS}, "benign": {"path": ROWS}},
        "tune": {"mask": "m", "data": {"path": ROWS, "benign": {"path": ROWS, "fraction": 0.5}}},
        "eval": {
            "models": [{"path": MODEL, "name": "a"}, {"answers": "answers.jsonl", "name": "b"}],
            "judges": [{"kind": "words"}, {"kind": "guard", "path": GUARD}],
            "prompts": [{"path": "examples/harmful"}, {"path": "wildjailbreak/train"}],
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


@pytest.mark.parametrize("key", [*MODELS, *DATA])
def test_a_path_that_leads_nowhere_is_refused_by_the_stages_that_read_it(key: str) -> None:
    readers = {**MODELS, **DATA}[key]
    problem = (
        "there is no such folder, and it is not the form of a hub id" if key in MODELS else "there is no such file"
    )
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
