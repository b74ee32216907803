"""Files that a config, or the command line, names: the DeepSpeed config and recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esi_ds import shipped
from esi_ds.config import load_config
from esi_ds.errors import UserError

YAML = "run: {output_dir: runs/a}\nmodel: {path: examples/models/llama-aligned}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(YAML)
    return tmp_path


@pytest.mark.parametrize("more", ["", "deepspeed: zero3_offload\n"])
def test_an_override_changes_a_key_of_the_deepspeed_file(folder: Path, more: str) -> None:
    (folder / "own.yaml").write_text(YAML + more)
    file = next(shipped.folder("ds_configs").glob("zero3_offload.json" if more else "zero3.json"))
    expected = json.loads(file.read_text())
    expected["zero_optimization"]["overlap_comm"] = "changed"
    config = load_config("own.yaml", ["deepspeed.zero_optimization.overlap_comm=changed"])
    assert config.deepspeed == expected


def test_an_override_counts_beside_a_deepspeed_file_of_the_command_line(folder: Path) -> None:
    """It was dropped without a word."""
    (folder / "ds.json").write_text(json.dumps({"gradient_clipping": 1.0, "zero_optimization": {"stage": 3}}))
    config = load_config("own.yaml", ["deepspeed.gradient_clipping=0.25"], "ds.json")
    assert config.deepspeed == {"gradient_clipping": 0.25, "zero_optimization": {"stage": 3}}
    with pytest.raises(UserError, match="contradicts --deepspeed_config ds.json"):
        load_config("own.yaml", ["deepspeed=zero3_offload"], "ds.json")


@pytest.mark.parametrize("name", ["tutorial/esi", "demo/esi"])
def test_a_file_of_another_recipe_is_not_a_copy_of_this_one(folder: Path, name: str) -> None:
    """paper, demo and tutorial have recipes of the same last names."""
    shipped.copy(shipped.recipe("paper/esi"), folder / "esi.yaml")
    assert load_config(name, []) == load_config(str(shipped.recipe(name)), [])


def test_a_changed_copy_of_a_recipe_is_never_passed_over(folder: Path) -> None:
    """What ``esi-ds recipes copy`` wrote, named without its suffix; a folder of that name is no config."""
    (folder / "llama3-8b").mkdir()
    assert load_config("llama3-8b", []).select.ratio == 0.01
    for copied, name in (
        ("llama3-8b.yaml", "llama3-8b"),
        ("esi.yaml", "tutorial/esi"),
        ("configs/paper/esi.yaml", "paper/esi"),
    ):
        file, recipe = folder / copied, shipped.recipe(name).read_text()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(recipe)
        assert load_config(name, []) == load_config(copied, [])
        file.write_text(recipe.replace("ratio: 0.01", "ratio: 0.5"))
        with pytest.raises(UserError, match=f"{copied} here may be a changed copy of it; give --config {copied}"):
            load_config(name, [])
        assert load_config(copied, []).select.ratio == 0.5
        file.unlink()


def test_single_values_that_need_no_list_and_no_kind(folder: Path) -> None:
    config = load_config(
        "own.yaml",
        ["perturb.mask=m", "perturb.seeds=4", "eval.judges=[{path: guard}]", "eval.prompts={path: advbench}"],
    )
    assert config.perturb is not None and config.perturb.seeds == [4]
    assert config.eval is not None and config.eval.judges[0].kind == "guard"
