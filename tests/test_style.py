"""The checks of `make style`, beside the other tests: without its cache mypy takes one core a minute."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

RECIPE = (ROOT / "Makefile").read_text().partition("\nstyle:")[2].partition("\n\n")[0]
CHECKS = re.findall(r"^\t\$\(BIN\)/(.+)$", RECIPE, re.MULTILINE)


def test_all_checks_are_here() -> None:
    assert [check.split()[0] for check in CHECKS] == ["ruff", "ruff", "python", "mypy"]


@pytest.mark.parametrize("check", CHECKS)
def test_style(check: str) -> None:
    program, *arguments = check.split()
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
