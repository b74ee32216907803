"""Files about the package say what the package is: citation, CI, containers."""

from __future__ import annotations

import re
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from import_boundaries import imports
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import esi_ds
from esi_ds import command, recipes, shipped, slurm
from esi_ds.cli import make_parser
from esi_ds.command import STAGES, TOOLS


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == esi_ds.__version__ and citation["license"] == "Apache-2.0"


def test_ci_runs_what_a_developer_runs() -> None:
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_containers_copy_what_the_package_is_built_from() -> None:
    docker = (ROOT / "containers/Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", docker, re.MULTILINE) for name in line.split()}
    files = (ROOT / "containers/esi_ds.def").read_text().split("%files\n")[1].split("\n\n")[0]
    assert copied == {line.split()[0] for line in files.splitlines()}
    assert all((ROOT / name).exists() for name in copied)
    assert copied >= {"esi_ds", "configs", "ds_configs", "slurm", "setup.py", "setup.cfg"}


LM_EVAL = ("esi_ds.eval.harness", "esi_ds.eval.task_code")  # modules that need it; others import them in functions only
USERS_OWN = {"wandb"}  # there where a user's DeepSpeed config enables it


def declared() -> tuple[set[str], set[str]]:
    """Distributions that setup.cfg requires, and those of its extras but ``test``."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = "".join(text for extra, text in setup["options.extras_require"].items() if extra != "test")
    required, optional = (
        {canonicalize_name(Requirement(line).name) for line in text.split("\n") if line}
        for text in (setup["options"]["install_requires"], extras)
    )
    return required, optional


def undeclared(folder: Path) -> list[str]:
    """Imports of packages that setup.cfg does not require. One of an extra may stand in a function, and in LM_EVAL."""
    required, optional = declared()
    distributions = packages_distributions()
    found = []
    for file in sorted(folder.rglob("*.py")):
        needs_lm_eval = ".".join(file.relative_to(folder.parent).with_suffix("").parts).startswith(LM_EVAL)
        for line, module, is_top in imports(file):
            package = module.partition(".")[0]
            if package in sys.stdlib_module_names or package in USERS_OWN and not is_top:
                continue
            if package == "esi_ds":
                is_allowed = not module.startswith(LM_EVAL) or needs_lm_eval or not is_top
            else:  # a package of an extra that is not installed has its distribution's name
                names = {canonicalize_name(name) for name in distributions.get(package, [package])}
                is_allowed = bool(names & required or (names & optional and (needs_lm_eval or not is_top)))
            if not is_allowed:
                found.append(f"{file.name}:{line}: {module}")
    return found


def test_every_package_that_is_imported_is_required() -> None:
    assert not undeclared(ROOT / "esi_ds")


@pytest.mark.parametrize(
    "wrong",
    [
        "import pytest",
        "def f():\n    import ruff",
        "import lm_eval",
        "import wandb",
        "import esi_ds.eval.harness_tasks",
    ],
)
def test_a_package_that_is_not_required_is_noticed(wrong: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(f"import torch\nfrom huggingface_hub import errors\n{wrong}\n")
    assert undeclared(tmp_path) == [f"module.py:{2 + len(wrong.splitlines())}: {wrong.split()[-1]}"]


def test_shipped_files_that_cannot_be_copied_are_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert recipes.main(["copy", "llama3-8b", "--to", str(tmp_path / "file")]) == 2
    assert slurm.main(["copy", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("error: DIR = ") == 2
    assert slurm.main(["copy", str(tmp_path)]) == 0
    (tmp_path / "slurm/env.sh").write_text("export ACCOUNT=mine\n")
    assert slurm.main(["copy", str(tmp_path)]) == 2
    assert f"error: DIR = {tmp_path}/slurm: already holds another env.sh, or a changed one" in capsys.readouterr().err
    assert (tmp_path / "slurm/env.sh").read_text() == "export ACCOUNT=mine\n"


def test_a_recipe_that_is_not_known_is_named_as_it_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main(["copy", "llama3-8"]) == 2
    message = "error: NAME = llama3-8: is not the name of a recipe; give a name that `esi-ds recipes` lists (near: "
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("name", [*STAGES, *TOOLS])
def test_every_command_says_its_own_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Not that of a file of the checkout, which somebody who installed the package does not have."""
    with pytest.raises(SystemExit) as end:
        make_parser(name).parse_args(["--help"]) if name in STAGES else command.main([name, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.startswith(f"usage: esi-ds {name} ") and "``" not in text


def test_a_recipe_begins_with_a_sentence_and_reads_files_that_a_page_names() -> None:
    """``esi-ds recipes`` lists the first line; a file is the user's own, made by a run, or described in the docs."""
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    for name, file in shipped.recipes().items():
        assert recipes.summary(file).endswith("."), name
        settings = re.sub(r"(^| )#.*", "", file.read_text(), flags=re.MULTILINE)
        for path in re.findall(r"(\w+): ([\w./-]+\.(?:jsonl?|csv))", settings):
            is_known = (ROOT / path[1]).is_file() or Path(path[1]).name in pages
            assert is_known or path[0] == "responses", (name, path)


def test_a_recipe_s_first_line_ends_with_the_hardware() -> None:
    hardware = (
        r"\. (One 80 GB GPU|One GPU, or two CPU cores with model.dtype: auto|[A-Z1-9]\w* nodes? of eight 80 GB GPUs)\.$"
    )
    for name, file in shipped.recipes().items():
        if name.startswith(("dense/", "moe/")):
            assert re.search(hardware, recipes.summary(file)), name


def test_a_recipe_s_dry_run_plans_the_hardware_of_its_first_line() -> None:
    counts = {"One": "1", "Two": "2", "Four": "4"}
    for name, file in shipped.recipes().items():
        nodes = re.search(r"\. (\w+) nodes? of eight 80 GB GPUs\.$", recipes.summary(file))
        for flags in re.findall(r"`--dry-run(.*?)`", file.read_text()):
            assert flags == (f" --nodes {counts.get(nodes[1], nodes[1])}" if nodes else ""), name
