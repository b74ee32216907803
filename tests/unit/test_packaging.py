"""Files about the package say what the package is: citation, CI, containers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import esi_ds
from esi_ds import recipes, slurm


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


def test_shipped_files_that_cannot_be_copied_are_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert recipes.main(["copy", "llama3-8b", "--to", str(tmp_path / "file")]) == 2
    assert slurm.main(["copy", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("error: DIR = ") == 2
