"""Container recipes and shell scripts pass the linters of their languages. ``containers/check.sh`` builds images."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [".ci/run", "slurm/env.sh", "slurm/job.sh", "slurm/pipeline.sh", "tests/cluster/install.sh"]
SCRIPTS += ["containers/check.sh"]
SCRIPTS += [f"slurm/{stage}.sbatch" for stage in ("esi", "set", "spa", "eval")]
IGNORED = "SC1091"  # a sourced file is not at hand here


def linter(name: str) -> str:
    """The program beside this Python; the test is skipped where its package has none for this platform."""
    program = shutil.which(name, path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip(f"{name} is not installed: pip install {name}-bin or {name}-py")
    return program


def complaints(*command: str, text: str | None = None) -> str:
    result = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode == 0) == (not result.stdout), result.stderr
    return result.stdout


def test_the_dockerfile_passes_hadolint() -> None:
    assert complaints(linter("hadolint"), "containers/Dockerfile") == ""
    careless = "FROM ubuntu\nRUN cd /tmp && apt-get install git\n"
    assert "DL3006" in complaints(linter("hadolint"), "-", text=careless)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_scripts_pass_shellcheck(script: str) -> None:
    assert complaints(linter("shellcheck"), f"--exclude={IGNORED}", script) == ""


def test_all_shell_scripts_are_checked() -> None:
    shells = {str(file.relative_to(ROOT)) for folder in ("slurm", "tests/cluster", "launch", "containers", "examples")
              for file in (ROOT / folder).rglob("*") if file.suffix in (".sh", ".sbatch")}  # fmt: skip
    assert shells | {".ci/run"} == set(SCRIPTS)


def test_the_apptainer_definition_passes_shellcheck() -> None:
    text = (ROOT / "containers/esi_ds.def").read_text()
    head, *rest = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    assert list(sections) == ["files", "post", "environment", "test", "runscript"]
    assert re.findall(r"^(\w+): (\S+)$", head, re.MULTILINE)[:2] == [
        ("Bootstrap", "docker"),
        ("From", re.findall(r"^FROM (\S+)$", (ROOT / "containers/Dockerfile").read_text(), re.MULTILINE)[0]),
    ]
    for name in ("post", "environment", "test", "runscript"):
        script = "#!/bin/sh -e\n" + sections[name]  # as apptainer runs %post
        assert complaints(linter("shellcheck"), f"--exclude={IGNORED}", "-", text=script) == "", name
